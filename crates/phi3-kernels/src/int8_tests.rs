//! Products with eight-bit activations: every backend against the specification, bit by bit, and
//! the specification against exact arithmetic.

use proptest::prelude::*;
use proptest::sample::select;

use crate::activations::{BLOCK_GROUP, Quantized, SUPERBLOCK_GROUP};
use crate::dispatch::{Backend, available};
use crate::testing::{self, Random};
use crate::{Activations, BlockType, MIN_INT8_COLS, MatrixRef, linear, set_num_threads};

/// Error that rounding activations to eight bits adds to a dot product of 3,072 random terms,
/// relative to the root of the sum of the squared products. Measured: 0.0036 to 0.0042 over the
/// types; rounding to steps of 1 / 127, uniformly, of values uniform in [-1, 1) gives 0.0039.
const INT8_TOLERANCE: f64 = 0.006;

/// Integer sums are exact, so only the few float operations of each block differ from f64.
const FLOAT_TOLERANCE: f64 = 1e-6;

fn block_types() -> impl Iterator<Item = BlockType> {
    BlockType::ALL.into_iter().filter(|t| t.block_len() > 1)
}

fn quantized(x: &[f32], n: usize, block_type: BlockType) -> Quantized {
    let cols = x.len() / n.max(1);
    Quantized::new(x, n, cols, block_type.block_len())
}

fn run(backend: Backend, x: &Quantized, w: MatrixRef<'_>, first_row: usize) -> Vec<f32> {
    let rows = w.rows() - first_row;
    let mut out = vec![f32::NAN; x.n * rows];
    let mut tokens: Vec<&mut [f32]> = out.chunks_mut(rows).collect();
    backend.int8_rows(x, w, first_row, &mut tokens);
    out
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Every backend gives the specification's bits, whatever the shape; a token alone gives what
    /// it gives among many.
    #[test]
    fn backends_give_the_same_bits(
        block_type in select(block_types().collect::<Vec<_>>()),
        rows in 1usize..40,
        blocks in 0usize..20,
        n in prop_oneof![4 => 1usize..18, 1 => 29usize..40],
        first_row in 0usize..3,
        misaligned in 0usize..4,
        extreme: bool,
        seed: u64,
    ) {
        let cols = blocks * block_type.block_len();
        let mut random = Random(seed);
        let mut bytes = vec![0; misaligned];
        bytes.extend(testing::random_matrix(block_type, first_row + rows, cols, seed));
        if extreme {
            // All bits set or clear reach the largest sums; factors may be anything but NaN.
            for byte in &mut bytes[misaligned..] {
                *byte = if random.bits().is_multiple_of(8) { 0 } else { 0xff };
            }
            testing::tame_factors(block_type, &mut bytes[misaligned..], &mut random);
        }
        let w = MatrixRef::new(block_type, first_row + rows, cols, &bytes[misaligned..]).unwrap();
        let mut x = random.units(n * cols);
        if extreme {
            x.iter_mut().for_each(|x| *x = x.signum() * [0.0, 1e-40, 1.0][(random.bits() % 3) as usize]);
        }
        let together = quantized(&x, n, block_type);
        let expected = run(Backend::Scalar, &together, w, first_row);
        for backend in available() {
            let found = run(backend, &together, w, first_row);
            prop_assert_eq!(&found, &expected, "{} {:?}", backend.name(), w);
        }
        for (t, x) in x.chunks(cols.max(1)).enumerate() {
            for backend in available() {
                let alone = run(backend, &quantized(x, 1, block_type), w, first_row);
                prop_assert_eq!(&alone, &expected[t * rows..][..rows], "{} alone", backend.name());
            }
        }
    }

    /// The specification against f64 on the quantized activations.
    #[test]
    fn the_specification_is_a_sum_of_products(
        block_type in select(block_types().collect::<Vec<_>>()),
        blocks in 0usize..20,
        seed: u64,
    ) {
        let cols = blocks * block_type.block_len();
        let bytes = testing::random_matrix(block_type, 3, cols, seed);
        let w = MatrixRef::new(block_type, 3, cols, &bytes).unwrap();
        let x = quantized(&Random(seed).units(2 * cols), 2, block_type);
        let rounded: Vec<f32> = (0..2 * cols)
            .map(|i| f32::from(x.values[i]) * x.scales[i / x.group])
            .collect();
        let found = run(Backend::Scalar, &x, w, 0);
        for (found, (sum, scale)) in found.iter().zip(testing::matmul(&rounded, 2, w)) {
            let error = (f64::from(*found) - sum).abs();
            // A minimum and what it is taken from are summed apart, and may cancel out.
            prop_assert!(error <= 8.0 * FLOAT_TOLERANCE * scale.max(1.0), "{w:?}: {found}, {sum} of {scale}");
        }
    }
}

/// Rows of more blocks than a backend unpacks at once, for numbers of tokens on both sides of every change of
/// its way.
#[test]
fn partial_sums_go_on_from_one_round_of_blocks_to_the_next() {
    for (seed, block_type) in (0..).zip(block_types()) {
        let blocks = if block_type.block_len() == 32 {
            300
        } else {
            41
        };
        let (rows, cols) = (17, blocks * block_type.block_len());
        let bytes = testing::random_matrix(block_type, rows, cols, seed);
        let w = MatrixRef::new(block_type, rows, cols, &bytes).unwrap();
        for n in [4, 12, 13, 16, 32, 33, 37] {
            let x = quantized(&Random(seed).units(n * cols), n, block_type);
            let expected = run(Backend::Scalar, &x, w, 0);
            for backend in available() {
                let found = run(backend, &x, w, 0);
                assert!(found == expected, "{} {w:?}, {n} tokens", backend.name());
            }
        }
    }
}

#[test]
fn eight_bits_cost_what_rounding_costs() {
    let (n, rows, cols) = (8, 64, 3072);
    for (seed, block_type) in (0..).zip(block_types()) {
        let bytes = testing::random_matrix(block_type, rows, cols, seed);
        let w = MatrixRef::new(block_type, rows, cols, &bytes).unwrap();
        let x = Random(seed).units(n * cols);
        let found = run(Backend::Scalar, &quantized(&x, n, block_type), w, 0);
        let mut weights = vec![0.0; rows * cols];
        crate::dequantize(block_type, &bytes, &mut weights).unwrap();
        let (mut error, mut scale) = (0.0, 0.0);
        for (i, (sum, _)) in testing::matmul(&x, n, w).iter().enumerate() {
            error += (f64::from(found[i]) - sum).powi(2);
            let pairs = x[i / rows * cols..][..cols]
                .iter()
                .zip(&weights[i % rows * cols..]);
            scale += pairs
                .map(|(x, w)| (f64::from(*x) * f64::from(*w)).powi(2))
                .sum::<f64>();
        }
        let relative = (error / scale).sqrt();
        assert!(relative < INT8_TOLERANCE, "{block_type}: {relative}");
        assert!(
            relative > INT8_TOLERANCE / 4.0,
            "{block_type}: {relative} is too good"
        );
    }
}

#[test]
fn backends_quantize_alike() {
    let mut random = Random(5);
    for group in [BLOCK_GROUP, SUPERBLOCK_GROUP] {
        let mut x = random.units(16 * group);
        for (i, x) in x.chunks_mut(group).enumerate() {
            match i {
                0 => x.fill(0.0),
                1 => x.fill(1e-42),
                2 => x[7] = f32::MAX,
                3 => x[9] = f32::NEG_INFINITY,
                4 => x[11] = f32::NAN,
                5 => x
                    .iter_mut()
                    .enumerate()
                    .for_each(|(i, x)| *x = i as f32 / 2.0 - 3.5),
                _ => {}
            }
        }
        let quantize = |backend: Backend| {
            let mut values = vec![1; x.len()];
            let mut scales = vec![1.0; 16];
            let mut sums = vec![1; x.len() / 16];
            backend.quantize(&x, group, &mut values, &mut scales, &mut sums);
            (
                values,
                scales.iter().map(|s| s.to_bits()).collect::<Vec<_>>(),
                sums,
            )
        };
        let expected = quantize(Backend::Scalar);
        for backend in available() {
            assert_eq!(quantize(backend), expected, "{}", backend.name());
        }
        let (values, scales, sums) = expected;
        for (i, x) in x.chunks(group).enumerate() {
            let scale = f32::from_bits(scales[i]);
            let values = &values[i * group..][..group];
            match i {
                0 | 1 => assert!(scale == 0.0 && values.iter().all(|v| *v == 0)),
                3 | 4 => assert!(scale.is_nan() && values.iter().all(|v| *v == 0)),
                _ => {
                    assert!(values.iter().any(|v| v.abs() == 127));
                    for (x, v) in x.iter().zip(values) {
                        let error = f64::from(*x) - f64::from(scale) * f64::from(*v);
                        assert!(error.abs() <= 0.5001 * f64::from(scale), "{x} {v} {scale}");
                    }
                }
            }
        }
        let sum: i32 = sums.iter().map(|s| i32::from(*s)).sum();
        assert_eq!(sum, values.iter().map(|v| i32::from(*v)).sum());
    }
}

/// Through the entry point: threads, strides and several matrices over one input.
#[test]
fn neither_threads_nor_neighbors_change_a_bit() {
    let (n, rows, cols) = (5, 203, MIN_INT8_COLS);
    for (seed, block_type) in (0..).zip(BlockType::ALL) {
        let bytes = testing::random_matrix(block_type, rows, cols, seed);
        let w = MatrixRef::new(block_type, rows, cols, &bytes).unwrap();
        let x = Random(seed).units(n * cols);
        let run = |x: &[f32], threads| {
            set_num_threads(threads);
            let n = x.len() / cols;
            let x = Activations::new(x, n, cols);
            let mut out = vec![7.0; n * (2 * rows + 1)];
            linear(&x, w, &mut out, 2 * rows + 1, 0);
            linear(&x, w, &mut out, 2 * rows + 1, rows + 1);
            out
        };
        let together = run(&x, 1);
        assert_eq!(together, run(&x, 3), "{block_type}");
        for (t, x) in x.chunks(cols).enumerate() {
            let alone = run(x, 2);
            assert_eq!(
                alone,
                together[t * (2 * rows + 1)..][..2 * rows + 1],
                "{block_type}"
            );
            assert_eq!(alone[..rows], alone[rows + 1..]);
            assert_eq!(alone[rows], 7.0);
        }
    }
    set_num_threads(0);
}

#[test]
fn what_is_not_finite_propagates() {
    for block_type in block_types() {
        let cols = MIN_INT8_COLS;
        let bytes = testing::random_matrix(block_type, 20, cols, 1);
        let w = MatrixRef::new(block_type, 20, cols, &bytes).unwrap();
        for n in [1, 5] {
            for bad in [f32::NAN, f32::INFINITY] {
                let mut x = Random(1).units(n * cols);
                x[300] = bad;
                let mut out = vec![0.0; n * 20];
                linear(&Activations::new(&x, n, cols), w, &mut out, 20, 0);
                assert!(out[..20].iter().all(|v| v.is_nan()), "{block_type}");
                assert!(out[20..].iter().all(|v| v.is_finite()), "{block_type}");
            }
            let bytes = vec![0xff; bytes.len()];
            let w = MatrixRef::new(block_type, 20, cols, &bytes).unwrap();
            let mut out = vec![0.0; n * 20];
            linear(
                &Activations::new(&vec![1.0; n * cols], n, cols),
                w,
                &mut out,
                20,
                0,
            );
            assert!(out.iter().all(|v| v.is_nan()), "{block_type}");
        }
    }
}

/// Narrow rows multiply the activations as they are, to the bit as [`crate::matmul`].
#[test]
fn narrow_rows_keep_f32_activations() {
    for (cols, narrow) in [(MIN_INT8_COLS - 256, true), (MIN_INT8_COLS, false)] {
        for block_type in block_types() {
            let (n, rows) = (3, 5);
            let bytes = testing::random_matrix(block_type, rows, cols, 2);
            let w = MatrixRef::new(block_type, rows, cols, &bytes).unwrap();
            let x = Random(3).units(n * cols);
            let (mut found, mut exact) = (vec![0.0; n * rows], vec![0.0; n * rows]);
            linear(&Activations::new(&x, n, cols), w, &mut found, rows, 0);
            crate::matmul(&x, n, w, &mut exact, rows, 0);
            assert_eq!(found == exact, narrow, "{block_type} {cols}");
        }
    }
}

#[test]
fn empty_operands_are_no_panic() {
    let w = MatrixRef::new(BlockType::Q4_0, 2, 0, &[]).unwrap();
    for n in [0, 1, 9] {
        let mut out = vec![7.0; n * 2];
        linear(&Activations::new(&[], n, 0), w, &mut out, 2, 0);
        assert!(out.iter().all(|v| *v == 0.0));
    }
}

#[test]
#[should_panic(expected = "tokens of 32 elements; expected 64")]
fn tokens_of_another_length_panic() {
    let w = MatrixRef::new(BlockType::Q4_0, 2, 64, &[0; 72]).unwrap();
    linear(&Activations::new(&[0.0; 32], 1, 32), w, &mut [0.0; 2], 2, 0);
}
