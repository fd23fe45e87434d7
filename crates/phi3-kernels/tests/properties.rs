//! Kernels against naive f64 oracles, on shapes with tails, zeros, extremes and unaligned
//! slices.

use phi3_kernels::testing::{self, Random};
use phi3_kernels::{
    AttentionShape, BlockType, Heads, MatrixRef, Rotation, attend, matmul, rms_norm,
    set_num_threads, silu_mul, take_heads,
};
use proptest::prelude::*;
use proptest::sample::select;

/// Error of an f32 sum of products, relative to the sum of their magnitudes; measured 1.3e-7
/// (8,192 positive products).
const MATMUL_TOLERANCE: f64 = 5e-7;
/// Error of one head of attention with values up to 1; measured 1.9e-7 with scores up to 1,
/// and growing with them.
const ATTEND_TOLERANCE: f64 = 1e-6;
/// Relative error of norm and silu_mul, and error of rope on values up to 1; measured 2.3e-7.
const SMALL_OP_TOLERANCE: f64 = 1e-6;

fn config() -> ProptestConfig {
    ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// Values of an activation: moderate ones, zeros, and magnitudes from subnormal to 1e15, which
/// products and sums of this file's lengths still hold.
fn activations(random: &mut Random, len: usize, kind: u8) -> Vec<f32> {
    match kind {
        0 => random.units(len),
        1 => vec![0.0; len],
        _ => {
            let extreme = |random: &mut Random| {
                let scale = [1e-42, 1e-20, 1.0, 1e15][(random.bits() % 4) as usize];
                random.unit() * scale
            };
            (0..len).map(|_| extreme(random)).collect()
        }
    }
}

fn close(found: f32, expected: f64, scale: f64, tolerance: f64) -> bool {
    // The last term: products of subnormals round to 0.
    (f64::from(found) - expected).abs() <= tolerance * scale + 1e-40
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn matmul_is_a_sum_of_products(
        block_type in select(BlockType::ALL.to_vec()),
        rows in 0usize..40,
        blocks in 0usize..5,
        tail in 0usize..40,
        n in 0usize..6,
        kind in 0u8..3,
        (before, after) in (0usize..3, 0usize..3),
        misaligned in 0usize..4,
        seed: u64,
    ) {
        // Float rows have any length; blocks only their multiples.
        let cols = match block_type.block_len() {
            1 => 17 * blocks + tail,
            len => len * blocks,
        };
        let mut bytes = vec![0; misaligned];
        bytes.extend(testing::random_matrix(block_type, rows, cols, seed));
        let w = MatrixRef::new(block_type, rows, cols, &bytes[misaligned..]).unwrap();
        let mut random = Random(seed);
        let x = activations(&mut random, misaligned + n * cols, kind);
        let x = &x[misaligned..];
        let stride = before + rows + after;
        let mut out = vec![f32::NAN; n * stride];
        matmul(x, n, w, &mut out, stride, before);

        let expected = testing::matmul(x, n, w);
        for (i, found) in out.iter().enumerate() {
            let (t, r) = (i / stride, i % stride);
            if r < before || r >= before + rows {
                prop_assert!(found.is_nan(), "{i} was written");
            } else {
                let (sum, scale) = expected[t * rows + r - before];
                prop_assert!(
                    close(*found, sum, scale, MATMUL_TOLERANCE),
                    "{w:?} token {t} row {r}: {found}, expected {sum} of {scale}"
                );
            }
        }
    }

    #[test]
    fn attend_is_softmax_of_visible_keys(
        head_dim in 1usize..100,
        l in 0usize..9,
        s in 0usize..40,
        q_start in 0usize..40,
        k_start in 0usize..20,
        window in proptest::option::of(0usize..30),
        sharpness in select(vec![0.1f32, 1.0, 50.0]),
        seed: u64,
    ) {
        let mut random = Random(seed);
        let q = random.units(l * head_dim);
        let (keys, values) = (random.units(s * head_dim), random.units(s * head_dim));
        let scale = sharpness / (head_dim as f32).sqrt();
        let shape = AttentionShape { head_dim, q_start, k_start, window, scale };
        let mut out = vec![f32::NAN; q.len()];
        attend(&q, &keys, &values, shape, &mut out);
        // The error of a score grows with it, and the weight's relative error is the score's
        // absolute one.
        let tolerance = ATTEND_TOLERANCE * f64::from(sharpness.max(1.0));
        for (i, expected) in testing::attend(&q, &keys, &values, shape).iter().enumerate() {
            prop_assert!(
                close(out[i], *expected, 1.0, tolerance),
                "{shape:?} element {i}: {}, expected {expected}", out[i]
            );
        }
    }

    #[test]
    fn small_ops_equal_their_formulas(
        n in 0usize..5,
        heads in 1usize..4,
        half in 1usize..40,
        pass in 0usize..5,
        seed: u64,
    ) {
        let mut random = Random(seed);
        let head_dim = 2 * half + pass;
        let width = heads * head_dim;
        let x = random.units(n * width);

        let weight = random.units(width);
        let mut out = vec![f32::NAN; x.len()];
        rms_norm(&x, &weight, 1e-5, &mut out);
        for (found, expected) in out.iter().zip(testing::rms_norm(&x, &weight, 1e-5)) {
            prop_assert!(close(*found, expected, expected.abs(), SMALL_OP_TOLERANCE));
        }

        let gate_up: Vec<f32> = random.units(n * 2 * width).iter().map(|v| v * 100.0).collect();
        silu_mul(&gate_up, width, &mut out);
        for (found, expected) in out.iter().zip(testing::silu_mul(&gate_up, width)) {
            // exp overflows beyond 88: the gate is then 0, and truly below 1e-36.
            let error = (f64::from(*found) - expected).abs();
            prop_assert!(error <= SMALL_OP_TOLERANCE * expected.abs() + 1e-33, "{found} {expected}");
        }

        let (cos, sin) = (random.units(n * half), random.units(n * half));
        let mut out = vec![f32::NAN; x.len()];
        let taken: Vec<usize> = (0..heads).collect();
        let all = Heads { head_dim, in_row: heads, taken: &taken };
        take_heads(&x, all, Some(Rotation { cos: &cos, sin: &sin, half }), &mut out);
        for (i, expected) in testing::rope(&x, heads, head_dim, &cos, &sin, half).iter().enumerate() {
            prop_assert!(close(out[i], *expected, 1.0, SMALL_OP_TOLERANCE), "element {i}");
            if i % head_dim >= 2 * half {
                prop_assert_eq!(out[i], x[i]);
            }
        }
    }
}

/// The contract of packed batches: neither neighbors nor threads change a bit.
#[test]
fn a_token_alone_equals_the_token_among_many() {
    // Large enough that rows are split between threads, in parts that do not divide evenly.
    let (n, rows, cols) = (5, 203, 512);
    for (seed, block_type) in (0..).zip(BlockType::ALL) {
        let bytes = testing::random_matrix(block_type, rows, cols, seed);
        let w = MatrixRef::new(block_type, rows, cols, &bytes).unwrap();
        let x = Random(seed).units(n * cols);
        let run = |x: &[f32], threads| {
            set_num_threads(threads);
            let n = x.len() / cols;
            let mut out = vec![f32::NAN; n * rows];
            matmul(x, n, w, &mut out, rows, 0);
            out
        };
        let together = run(&x, 1);
        assert_eq!(together, run(&x, 3), "{block_type}");
        for threads in [1, 2, 3] {
            for (t, x) in x.chunks(cols).enumerate() {
                let alone = run(x, threads);
                assert_eq!(
                    alone,
                    together[t * rows..][..rows],
                    "{block_type} token {t}"
                );
            }
        }
    }
    set_num_threads(0);
}

#[test]
fn a_query_alone_equals_the_query_among_many() {
    let (l, s, head_dim) = (37, 300, 64);
    let mut random = Random(1);
    let q = random.units(l * head_dim);
    let (keys, values) = (random.units(s * head_dim), random.units(s * head_dim));
    for window in [None, Some(100)] {
        let shape = AttentionShape {
            head_dim,
            q_start: s - l,
            k_start: 0,
            window,
            scale: 0.125,
        };
        let mut together = vec![0.0; q.len()];
        attend(&q, &keys, &values, shape, &mut together);
        for i in 0..l {
            let (from, to) = (i * head_dim, (i + 1) * head_dim);
            let mut alone = vec![0.0; head_dim];
            // Keys out of sight, later or before the window, may be absent.
            let first = window.map_or(0, |w| (s - l + i + 1).saturating_sub(w));
            let seen = first * head_dim..(s - l + i + 1) * head_dim;
            let shape = AttentionShape {
                q_start: s - l + i,
                k_start: first,
                ..shape
            };
            attend(
                &q[from..to],
                &keys[seen.clone()],
                &values[seen],
                shape,
                &mut alone,
            );
            assert_eq!(alone, together[from..to], "query {i}");
        }
    }
}

/// NaN and infinity in weights or activations come out as such, without a panic.
#[test]
fn non_finite_numbers_propagate() {
    for block_type in BlockType::ALL {
        let bytes = vec![0xff; block_type.row_bytes(256).unwrap()];
        let w = MatrixRef::new(block_type, 1, 256, &bytes).unwrap();
        let mut out = [0.0];
        matmul(&[1.0; 256], 1, w, &mut out, 1, 0);
        assert!(out[0].is_nan(), "{block_type}");
    }
    let shape = AttentionShape {
        head_dim: 2,
        q_start: 1,
        k_start: 0,
        window: None,
        scale: 1.0,
    };
    let mut out = [0.0; 2];
    attend(&[1.0, f32::NAN], &[1.0; 4], &[1.0; 4], shape, &mut out);
    assert!(out[0].is_nan());
}
