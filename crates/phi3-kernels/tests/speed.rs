//! Speed of the products that one token and one prompt of a small model make:
//! `cargo test -p phi3-kernels --test speed -- --ignored --nocapture`.

#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "clippy's exception for tests covers only test functions"
)]

use std::time::Instant;

use phi3_kernels::testing::{self, Random};
use phi3_kernels::{
    AttentionShape, BlockType, MatrixRef, attend, backend_name, matmul, num_threads,
};

/// (rows, cols, how many) of SmolLM2-135M's fused matrices and its tied head.
const SMOLLM2: [(usize, usize, usize); 5] = [
    (960, 576, 30),
    (576, 576, 30),
    (3072, 576, 30),
    (576, 1536, 30),
    (49152, 576, 1),
];

#[test]
#[ignore = "a measurement"]
fn tokens_per_second_of_a_135m_model() {
    println!("{} on {} threads", backend_name(), num_threads());
    for block_type in BlockType::ALL {
        if block_type.block_len() == 256 {
            continue;
        }
        measure(block_type, &SMOLLM2);
    }
}

#[test]
#[ignore = "a measurement"]
fn seconds_of_wide_matrices() {
    println!("{} on {} threads", backend_name(), num_threads());
    for block_type in BlockType::ALL {
        measure(block_type, &[(3072, 3072, 10)]);
    }
}

#[test]
#[ignore = "a measurement"]
fn attention_of_one_head() {
    println!("{} on {} threads", backend_name(), num_threads());
    for (l, s, head_dim) in [(512, 512, 64), (1, 4096, 64), (512, 512, 96), (1, 4096, 96)] {
        let mut random = Random(1);
        let q = random.units(l * head_dim);
        let (keys, values) = (random.units(s * head_dim), random.units(s * head_dim));
        let shape = AttentionShape {
            head_dim,
            q_start: s - l,
            k_start: 0,
            window: None,
            scale: 1.0 / (head_dim as f32).sqrt(),
        };
        let mut out = vec![0.0; q.len()];
        let mut seconds: Vec<f64> = (0..21)
            .map(|_| {
                let start = Instant::now();
                attend(&q, &keys, &values, shape, &mut out);
                start.elapsed().as_secs_f64()
            })
            .collect();
        seconds.sort_by(f64::total_cmp);
        println!(
            "{l} queries, {s} keys of {head_dim}: {:.3} ms",
            seconds[10] * 1e3
        );
    }
}

fn measure(block_type: BlockType, shapes: &[(usize, usize, usize)]) {
    let mut matrices = Vec::new();
    for &(rows, cols, count) in shapes {
        for seed in 0..count as u64 {
            let bytes = testing::random_matrix(block_type, rows, cols, seed);
            matrices.push((rows, cols, bytes));
        }
    }
    let weights: usize = matrices.iter().map(|m| m.0 * m.1).sum();
    let bytes: usize = matrices.iter().map(|m| m.2.len()).sum();
    let mut line = format!("{:7} {:6.1} MB", block_type.to_string(), bytes as f64 / 1e6);
    for (n, repeat) in [(1, 9), (4, 5), (64, 3)] {
        let mut seconds: Vec<f64> = (0..repeat)
            .map(|_| {
                let start = Instant::now();
                for (rows, cols, bytes) in &matrices {
                    let w = MatrixRef::new(block_type, *rows, *cols, bytes).unwrap();
                    let x = Random(1).units(n * cols);
                    let mut out = vec![0.0; n * rows];
                    matmul(&x, n, w, &mut out, *rows, 0);
                }
                start.elapsed().as_secs_f64()
            })
            .collect();
        seconds.sort_by(f64::total_cmp);
        let median = seconds[repeat / 2];
        line += &format!(
            " | n {n:2}: {:7.1} ms {:6.1} token/s {:5.1} GMAC/s",
            median * 1e3,
            n as f64 / median,
            (weights * n) as f64 / median / 1e9,
        );
    }
    println!("{line}");
}
