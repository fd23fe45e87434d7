//! Speed of the products of phi-3-mini's matrices beside what the machine can do:
//!
//! ```text
//! cargo run --release -p phi3-kernels --example speed -- Q4_0,Q4_K 1,4,16,32,512
//! cargo run --release -p phi3-kernels --example speed -- BF16 577 3072x1024,1024x1024,4096x1024,1024x4096
//! ```
//!
//! A fourth argument is how many MB of weights there are, 300 unless told: few stay in the caches,
//! and are gone through as often as makes 300 MB.
//! The second form names the matrices of a layer, rows by columns: here those of CLIP's image tower, whose
//! crops are 577 tokens. Random weights of a few layers, more than the caches hold, are multiplied one matrix after
//! another. `token/s` is what all 32 layers and phi-3-mini's head would give (of named matrices: the
//! layers alone), from the median of several runs; memory bandwidth is measured between the runs. On a machine that does other things, too,
//! the figures by processor time say more.
#![expect(clippy::print_stdout, reason = "a program that prints a table")]

use std::time::Instant;

use phi3_kernels::testing::{self, Random};
use phi3_kernels::{Activations, BlockType, MatrixRef, backend_name, linear, num_threads};

/// (rows, cols) of a layer of phi-3-mini.
const LAYER: [(usize, usize); 4] = [(9216, 3072), (3072, 3072), (16384, 3072), (3072, 8192)];
const HEAD: (usize, usize) = (32064, 3072);
const LAYERS: usize = 32;

/// MB of weights below which the caches may help.
const MEGABYTES: usize = 300;

const REPEAT: usize = 5;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let types = args.next().unwrap_or_else(|| "Q4_0,Q8_0,Q4_K,Q6_K".into());
    let counts = args.next().unwrap_or_else(|| "1,4,16,32,512".into());
    let (layer, head) = match args.next() {
        Some(named) => (shapes(&named)?, (0, 0)),
        None => (LAYER.to_vec(), HEAD),
    };
    let megabytes = args.next().map_or(Ok(MEGABYTES), |number| number.parse())?;
    let widest_row = layer.iter().map(|m| m.1).max().unwrap_or(0);
    let most_rows = layer.iter().map(|m| m.0).max().unwrap_or(0);
    println!("{} on {} threads", backend_name(), num_threads());
    for block_type in types.split(',') {
        let block_type: BlockType = block_type.parse()?;
        let layer_bytes: usize = layer
            .iter()
            .map(|(rows, cols)| rows * block_type.row_bytes(*cols).unwrap_or(0))
            .sum();
        let layers = (megabytes << 20).div_ceil(layer_bytes.max(1));
        let matrices: Vec<(usize, usize, Vec<u8>)> = layer
            .iter()
            .cycle()
            .take(layer.len() * layers)
            .enumerate()
            .map(|(i, &(rows, cols))| {
                let bytes = testing::random_matrix(block_type, rows, cols, i as u64);
                (rows, cols, bytes)
            })
            .collect();
        let weights: usize = matrices.iter().map(|m| m.0 * m.1).sum();
        let bytes: usize = matrices.iter().map(|m| m.2.len()).sum();
        let passes = (MEGABYTES << 20).div_ceil(bytes);
        let (weights, bytes) = (passes * weights, passes * bytes);
        // What these layers stand for.
        let layer_weights: usize = layer.iter().map(|m| m.0 * m.1).sum();
        let whole = (LAYERS * layer_weights + head.0 * head.1) as f64 / weights as f64;

        for n in counts.split(',') {
            let n: usize = n.parse()?;
            let repeat = if n > 64 { 3 } else { REPEAT };
            let (mut seconds, mut bandwidths, mut busy) = (Vec::new(), Vec::new(), Vec::new());
            let x = Random(1).units(n * widest_row);
            for _ in 0..repeat {
                bandwidths.push(read_bandwidth(&matrices));
                let mut out = vec![0.0; n * most_rows];
                let (start, busy_before) = (Instant::now(), processor_seconds());
                for (rows, cols, bytes) in (0..passes).flat_map(|_| &matrices) {
                    let Ok(w) = MatrixRef::new(block_type, *rows, *cols, bytes) else {
                        continue;
                    };
                    let x = Activations::new(&x[..n * cols], n, *cols);
                    linear(&x, w, &mut out, *rows, 0);
                }
                seconds.push(start.elapsed().as_secs_f64());
                busy.push((processor_seconds() - busy_before) / num_threads() as f64);
            }
            let busy = median(&mut busy);
            let (seconds, bandwidth) = (median(&mut seconds), median(&mut bandwidths));
            println!(
                "{block_type:7} n {n:4}: {:8.1} ms {:6.1} token/s {:6.1} GB/s of {:5.1} {:7.1} Gop/s; \
                 by processor time {:6.1} token/s {:7.1} Gop/s",
                seconds * 1e3,
                n as f64 / (seconds * whole),
                bytes as f64 / seconds / 1e9,
                bandwidth,
                (2 * weights * n) as f64 / seconds / 1e9,
                n as f64 / (busy * whole),
                (2 * weights * n) as f64 / busy / 1e9,
            );
        }
    }
    Ok(())
}

/// `ROWSxCOLUMNS,…`
fn shapes(named: &str) -> Result<Vec<(usize, usize)>, Box<dyn std::error::Error>> {
    let shape = |one: &str| -> Result<_, Box<dyn std::error::Error>> {
        let (rows, cols) = one.split_once('x').ok_or("a matrix is ROWSxCOLUMNS")?;
        Ok((rows.parse()?, cols.parse()?))
    };
    named.split(',').map(shape).collect()
}

/// Time that the threads of this process have run, which other processes' use of the cores
/// changes less than the time on the clock; 0 where the system does not tell.
fn processor_seconds() -> f64 {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else {
        return 0.0;
    };
    let nanoseconds = tasks.flatten().filter_map(|task| {
        let line = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        line.split(' ').next()?.parse::<f64>().ok()
    });
    nanoseconds.sum::<f64>() / 1e9
}

/// GB/s that all threads read the weights with, when nothing is done but adding words.
fn read_bandwidth(matrices: &[(usize, usize, Vec<u8>)]) -> f64 {
    let start = Instant::now();
    let mut bytes = 0;
    for (_, _, matrix) in matrices {
        bytes += matrix.len();
        let parts = matrix.len().div_ceil(num_threads());
        std::thread::scope(|scope| {
            for part in matrix.chunks(parts) {
                scope.spawn(move || {
                    let mut sums = [0u64; 16];
                    for words in part.as_chunks::<8>().0.as_chunks::<16>().0 {
                        for (sum, word) in sums.iter_mut().zip(words) {
                            *sum = sum.wrapping_add(u64::from_le_bytes(*word));
                        }
                    }
                    std::hint::black_box(sums);
                });
            }
        });
    }
    bytes as f64 / start.elapsed().as_secs_f64() / 1e9
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
