//! Speed of attention on the shapes of phi-3-mini, and its share of the machine:
//! `cargo run --release -p phi3-kernels --example attention_speed [SECONDS [CASE]]`.
//!
//! Decoding is bound by memory: the keys and values of 32 layers, which no cache holds, are read
//! once per token. A prompt is bound by arithmetic.
#![expect(clippy::print_stdout, reason = "what the example is for")]

use std::time::{Duration, Instant};

use phi3_kernels::testing::Random;
use phi3_kernels::{
    AttentionJob, AttentionShape, KvPage, KvPages, attend_packed, backend_name, f32_to_f16,
    num_threads,
};

const PAGE_LEN: usize = 256;

/// One layer: pages of keys and values.
struct Layer {
    f32: Vec<Vec<f32>>,
    f16: Vec<Vec<u16>>,
}

#[derive(Clone, Copy)]
struct Case {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Sequences, and queries of each.
    sequences: usize,
    queries: usize,
    keys: usize,
    layers: usize,
    half: bool,
}

fn main() {
    let seconds = std::env::args().nth(1).and_then(|s| s.parse().ok());
    let limit = Duration::from_secs_f64(seconds.unwrap_or(3.0));
    let probe = phi3_kernels::probe(num_threads());
    println!(
        "{} on {} threads, which read {:.1} GB/s and do {:.0} GFLOP/s at most",
        backend_name(),
        num_threads(),
        probe.read_bytes / 1e9,
        probe.f32_ops() / 1e9
    );
    let only: Option<usize> = std::env::args().nth(2).and_then(|s| s.parse().ok());
    let mini = Case {
        heads: 32,
        kv_heads: 32,
        head_dim: 96,
        sequences: 1,
        queries: 1,
        keys: 4096,
        layers: 32,
        half: true,
    };
    let few = Case { layers: 8, ..mini };
    let grouped = Case {
        heads: 40,
        kv_heads: 10,
        head_dim: 128,
        ..mini
    };
    let prompt = |case: Case, keys| Case {
        queries: keys,
        keys,
        layers: 1,
        ..case
    };
    let cases = [
        mini,
        Case { half: false, ..few },
        Case { keys: 512, ..mini },
        Case { queries: 4, ..few },
        Case {
            sequences: 4,
            keys: 1024,
            ..few
        },
        grouped,
        Case {
            heads: 2,
            kv_heads: 1,
            keys: 65536,
            ..mini
        },
        prompt(mini, 512),
        prompt(mini, 4096),
        prompt(
            Case {
                half: false,
                ..mini
            },
            4096,
        ),
        prompt(grouped, 2048),
        Case {
            queries: 512,
            keys: 4096,
            layers: 1,
            ..mini
        },
    ];
    for (i, case) in cases.into_iter().enumerate() {
        if only.is_none_or(|only| only == i) {
            measure(case, limit);
        }
    }
}

fn measure(case: Case, limit: Duration) {
    let Case {
        heads,
        kv_heads,
        head_dim: d,
        sequences,
        queries,
        keys,
        layers,
        half,
    } = case;
    let page = kv_heads * PAGE_LEN * d;
    let pages = keys.div_ceil(PAGE_LEN);
    let mut random = Random(1);
    let values = random.units(2 * page);
    let mut halves = vec![0; 2 * page];
    f32_to_f16(&values, &mut halves);
    let layers: Vec<Layer> = (0..layers * sequences)
        .map(|_| Layer {
            f32: if half {
                Vec::new()
            } else {
                vec![values.clone(); pages]
            },
            f16: if half {
                vec![halves.clone(); pages]
            } else {
                Vec::new()
            },
        })
        .collect();
    let q = random.units(queries * heads * d);
    let mut outs = vec![vec![0.0; q.len()]; sequences];

    let mut times = Vec::new();
    let begin = Instant::now();
    let cpu_begin = cpu_seconds();
    while times.len() < 3 || begin.elapsed() < limit {
        let start = Instant::now();
        for layers in layers.chunks(sequences) {
            let views: Vec<_> = layers
                .iter()
                .map(|layer| {
                    let f32: Vec<_> = layer.f32.iter().map(|p| view(p, page)).collect();
                    let f16: Vec<_> = layer.f16.iter().map(|p| view(p, page)).collect();
                    (f32, f16)
                })
                .collect();
            let mut jobs: Vec<_> = views
                .iter()
                .zip(&mut outs)
                .map(|((f32, f16), out)| AttentionJob {
                    q: &q,
                    out,
                    pages: if half {
                        KvPages::F16(f16)
                    } else {
                        KvPages::F32(f32)
                    },
                    page_heads: kv_heads,
                    page_len: PAGE_LEN,
                    len: keys,
                    num_heads: heads,
                    num_kv_heads: kv_heads,
                    layout: None,
                    shape: AttentionShape {
                        head_dim: d,
                        q_start: keys - queries,
                        k_start: 0,
                        window: None,
                        scale: 1.0 / (d as f32).sqrt(),
                    },
                })
                .collect();
            attend_packed(&mut jobs);
        }
        times.push(start.elapsed().as_secs_f64());
    }
    let cpu = (cpu_seconds() - cpu_begin) / times.len() as f64;
    times.sort_by(f64::total_cmp);
    let (best, median) = (times[0], times[times.len() / 2]);
    let element = if half { 2.0 } else { 4.0 };
    let bytes = (layers.len() * 2 * kv_heads * keys * d) as f64 * element;
    // Query i of the last `queries` sees all keys but those behind it.
    let pairs = queries * keys - queries * (queries - 1) / 2;
    let flops = (layers.len() * heads * pairs * d) as f64 * 4.0;
    println!(
        "{sequences} x {queries:4} queries, {keys:5} keys, {heads}/{kv_heads} heads of {d}, {}, \
         {:2} layers: median {:8.2} ms, best {:8.2} ms | {:6.1} (best {:6.1}) GB/s of keys and \
         values | {:6.1} (best {:6.1}) GFLOP/s | per second of a core: {:5.1} GB, {:5.1} GFLOP",
        if half { "f16" } else { "f32" },
        layers.len() / sequences,
        median * 1e3,
        best * 1e3,
        bytes / median / 1e9,
        bytes / best / 1e9,
        flops / median / 1e9,
        flops / best / 1e9,
        bytes / cpu / 1e9,
        flops / cpu / 1e9,
    );
}

/// Seconds that the threads of this process have run, where the system tells (Linux): unlike the
/// clock it does not count what other processes take.
fn cpu_seconds() -> f64 {
    let mut total = 0.0;
    for task in std::fs::read_dir("/proc/self/task")
        .into_iter()
        .flatten()
        .flatten()
    {
        let stat = std::fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
        let nanoseconds = stat.split(' ').next().and_then(|n| n.parse::<f64>().ok());
        total += nanoseconds.unwrap_or(0.0) / 1e9;
    }
    total
}

fn view<T>(page: &[T], keys: usize) -> KvPage<'_, T> {
    let (keys, values) = page.split_at(keys);
    KvPage { keys, values }
}
