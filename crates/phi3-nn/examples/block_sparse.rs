//! Attention of Phi-3-small's shape, block-sparse beside dense, in time and in memory;
//! `scripts/bench_block_sparse` runs it and draws what it prints.
//!
//! `block_sparse depths` goes through a prompt of 32,768 tokens in chunks of 1,024 with a stack of
//! one block-sparse and one dense layer, and prints a line of CSV for each layer and the stack:
//! the whole prompt up to a length, one chunk at that depth, and single tokens. For 65,536 and
//! 131,072 tokens the cache is filled by queries that see only themselves, and only the chunk and
//! the single tokens are measured.
//!
//! `block_sparse peer TOKENS FOLDER` runs one prompt in either layer and leaves its tensors, f32
//! and little-endian, for another program to compute the same.
#![expect(clippy::print_stdout, reason = "what the example is for")]

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{Device, Tensor};
use phi3_kernels::testing::Random;
use phi3_nn::{
    AttentionParams, AttentionPattern, BlockSparseLayout, CacheSpec, CacheStore, CacheType, Input,
    KvCache, Packed, Recompute, Span, attention,
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const HEADS: usize = 32;
const KV_HEADS: usize = 8;
const HEAD_DIM: usize = 128;
const SCALE: f32 = 1.0 / 128.0;
/// Tokens of a prompt that go through a model at once.
const CHUNK: usize = 1024;
/// Longest prompt that is measured whole.
const LONGEST: usize = 1 << 15;
/// Single tokens at a depth; the median counts.
const STEPS: usize = 15;

fn main() -> Result<()> {
    let args: Vec<_> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["depths"] => depths(),
        ["peer", tokens, folder] => peer(tokens.parse()?, Path::new(folder)),
        _ => Err("expected `depths`, or `peer TOKENS FOLDER`".into()),
    }
}

fn sparse() -> Result<AttentionPattern> {
    let layout = BlockSparseLayout::new(HEADS, 64, 16, 8, false).ok_or("a layout")?;
    Ok(AttentionPattern::BlockSparse(layout))
}

fn spec(patterns: &[AttentionPattern], cache_type: CacheType) -> Arc<CacheSpec> {
    Arc::new(CacheSpec {
        patterns: patterns.to_vec(),
        num_key_value_heads: KV_HEADS,
        head_dim: HEAD_DIM,
        rope_limit: None,
        recompute: Recompute::Never,
        max_len: usize::MAX,
        store: CacheStore::Pages(cache_type),
    })
}

/// Queries, keys and values of some tokens.
struct Rows {
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

impl Rows {
    fn random(tokens: usize, seed: u64) -> Result<Self> {
        let mut random = Random(seed);
        let mut tensor = |heads: usize| {
            let values = random.units(tokens * heads * HEAD_DIM);
            Tensor::from_vec(values, (tokens, heads, HEAD_DIM), &Device::Cpu)
        };
        Ok(Self {
            q: tensor(HEADS)?,
            k: tensor(KV_HEADS)?,
            v: tensor(KV_HEADS)?,
        })
    }

    fn part(&self, first: usize, len: usize) -> Result<Self> {
        let part = |tensor: &Tensor| tensor.narrow(0, first, len)?.contiguous();
        Ok(Self {
            q: part(&self.q)?,
            k: part(&self.k)?,
            v: part(&self.v)?,
        })
    }
}

/// Appends tokens to all layers of a cache. Gives the outputs and how long each layer took.
fn run(
    cache: &mut KvCache,
    patterns: &[AttentionPattern],
    rows: &Rows,
) -> Result<Vec<(Tensor, f64)>> {
    let ids = vec![0; rows.q.dim(0)?];
    let mut spans = [Span::new(ids.len(), cache)];
    let mut packed = Packed::begin(Input::Ids(&ids), &mut spans, None)?;
    let mut results = Vec::new();
    for (layer_idx, pattern) in patterns.iter().enumerate() {
        let params = AttentionParams {
            layer_idx,
            pattern: *pattern,
            scale: SCALE,
        };
        let begin = Instant::now();
        let out = attention(&rows.q, &rows.k, &rows.v, params, &mut packed)?;
        results.push((out, begin.elapsed().as_secs_f64()));
    }
    packed.finish()?;
    Ok(results)
}

fn depths() -> Result<()> {
    let patterns = [sparse()?, AttentionPattern::Causal];
    let spec = spec(&patterns, CacheType::F16);
    let chunk = Rows::random(CHUNK, 1)?;
    let resident_before = resident();
    let mut cache = KvCache::new(Arc::clone(&spec));
    println!("layers,measure,context,tokens,seconds_per_token,cache_bytes");
    let mut prompt = [0f64; 2];
    while cache.len() <= LONGEST {
        let context = cache.len();
        let reported = context >= CHUNK && context.is_power_of_two();
        if reported {
            print_times(&spec, "prompt", context, context, prompt);
            single_tokens(&spec, &cache, &patterns, &chunk)?;
        }
        let times = times(&mut cache, &patterns, &chunk)?;
        if reported {
            print_times(&spec, "chunk", context, CHUNK, times);
        }
        for (sum, time) in prompt.iter_mut().zip(times) {
            *sum += time;
        }
    }
    // What the layers of the stack hold is what is stated for them.
    let mut depth = LONGEST;
    while depth < 4 * LONGEST {
        depth *= 2;
        let alone = [AttentionPattern::SlidingWindow(1); 2];
        while cache.len() < depth {
            run(&mut cache, &alone, &chunk)?;
        }
        if cache.size_in_bytes() != spec.bytes_at(depth) {
            return Err(format!("the cache holds {} bytes", cache.size_in_bytes()).into());
        }
        single_tokens(&spec, &cache, &patterns, &chunk)?;
        if let Some(grown) = resident().and_then(|now| Some(now - resident_before?)) {
            eprintln!(
                "at {depth} tokens the process has grown by {:.1} MB, the caches hold {:.1} MB",
                grown as f64 / 1e6,
                cache.size_in_bytes() as f64 / 1e6
            );
        }
        let mut longer = cache.clone();
        let times = times(&mut longer, &patterns, &chunk)?;
        print_times(&spec, "chunk", depth, CHUNK, times);
    }
    Ok(())
}

fn times(cache: &mut KvCache, patterns: &[AttentionPattern; 2], rows: &Rows) -> Result<[f64; 2]> {
    let results = run(cache, patterns, rows)?;
    Ok(std::array::from_fn(|layer| {
        results.get(layer).map_or(0.0, |(_, time)| *time)
    }))
}

fn single_tokens(
    spec: &CacheSpec,
    cache: &KvCache,
    patterns: &[AttentionPattern; 2],
    rows: &Rows,
) -> Result<()> {
    let context = cache.len();
    let mut cache = cache.clone();
    let mut all = [Vec::new(), Vec::new()];
    for step in 0..STEPS {
        let times = times(&mut cache, patterns, &rows.part(step, 1)?)?;
        for (all, time) in all.iter_mut().zip(times) {
            all.push(time);
        }
    }
    let median = all.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[STEPS / 2]
    });
    print_times(spec, "decode", context, 1, median);
    Ok(())
}

/// `times`: of all `tokens` in the sparse and in the dense layer.
fn print_times(
    stack: &CacheSpec,
    measure: &str,
    context: usize,
    tokens: usize,
    [sparse, dense]: [f64; 2],
) {
    let bytes = |layers: std::ops::Range<usize>| {
        let mut spec = stack.clone();
        spec.patterns = stack.patterns[layers].to_vec();
        spec.bytes_at(context)
    };
    for (layers, time, range) in [
        ("sparse", sparse, 0..1),
        ("dense", dense, 1..2),
        ("stack", sparse + dense, 0..2),
    ] {
        println!(
            "{layers},{measure},{context},{tokens},{:e},{}",
            time / tokens as f64,
            bytes(range)
        );
    }
}

fn peer(tokens: usize, folder: &Path) -> Result<()> {
    let rows = Rows::random(tokens, 7)?;
    for (name, tensor) in [("q", &rows.q), ("k", &rows.k), ("v", &rows.v)] {
        write(folder, name, tensor)?;
    }
    for (name, pattern) in [("sparse", sparse()?), ("dense", AttentionPattern::Causal)] {
        let (mut times, mut out, mut grown) = (Vec::new(), None, None);
        for _ in 0..3 {
            let mut cache = KvCache::new(spec(&[pattern], CacheType::F32));
            let before = resident();
            let results = run(&mut cache, &[pattern], &rows)?;
            grown = resident().and_then(|now| now.checked_sub(before?));
            for (result, time) in results {
                times.push(time);
                out = Some(result);
            }
        }
        times.sort_by(f64::total_cmp);
        write(folder, name, &out.ok_or("an output")?)?;
        println!("{name},{},{}", times[times.len() / 2], grown.unwrap_or(0));
    }
    Ok(())
}

fn write(folder: &Path, name: &str, tensor: &Tensor) -> Result<()> {
    let values = tensor.flatten_all()?.to_vec1::<f32>()?;
    let bytes: Vec<_> = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    std::fs::write(folder.join(format!("{name}.f32")), bytes)?;
    Ok(())
}

/// Bytes of memory that this process occupies, where the system tells (Linux).
fn resident() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    let kilobytes: usize = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes * 1024)
}
