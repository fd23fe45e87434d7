//! Tests of attention's parts; `tests/attention.rs` has those of the whole.

use half::f16;
use proptest::prelude::*;

use super::*;
use crate::dispatch::{Backend, available};
use crate::testing::Random;

#[test]
fn visible_keys_follow_the_definition() {
    for q_start in 0..6 {
        for k_start in 0..6 {
            for window in [None, Some(0), Some(1), Some(3), Some(usize::MAX)] {
                let shape = AttentionShape {
                    head_dim: 1,
                    q_start,
                    k_start,
                    window,
                    scale: 1.0,
                };
                for i in 0..4 {
                    let (q, s) = (q_start + i, 5);
                    let expected: Vec<usize> = (0..s)
                        .filter(|j| {
                            let k = k_start + j;
                            k <= q && window.is_none_or(|w| q - k < w)
                        })
                        .collect();
                    let found: Vec<usize> = shape.visible_keys(i, s).collect();
                    assert_eq!(found, expected, "{shape:?} row {i}");
                }
            }
        }
    }
}

/// Two equal keys: the output is the mean of their values.
#[test]
fn equal_scores_average() {
    let shape = AttentionShape {
        head_dim: 2,
        q_start: 1,
        k_start: 0,
        window: None,
        scale: 0.5,
    };
    let mut out = [0.0; 2];
    attend(
        &[1.0, 1.0],
        &[3.0, 0.0, 0.0, 3.0],
        &[1.0, 2.0, 5.0, 10.0],
        shape,
        &mut out,
    );
    assert_eq!(out, [3.0, 6.0]);
    // Before the first key nothing is visible.
    let shape = AttentionShape {
        k_start: 2,
        ..shape
    };
    attend(&[1.0, 1.0], &[3.0, 0.0], &[1.0, 2.0], shape, &mut out);
    assert_eq!(out, [0.0, 0.0]);
}

/// Every half there is, and every single near one: rounding, subnormals, overflow.
#[test]
fn halves_convert_exactly_and_round_to_nearest_even() {
    let halves: Vec<u16> = (0..=u16::MAX).collect();
    let mut values: Vec<f32> = Vec::new();
    for pair in halves.windows(2) {
        let (low, high) = (
            f16::from_bits(pair[0]).to_f32(),
            f16::from_bits(pair[1]).to_f32(),
        );
        if low.is_finite() && high.is_finite() {
            let middle = (low + high) / 2.0;
            values.extend([low, middle, middle.next_up(), middle.next_down()]);
        }
    }
    values.extend([65519.9, 65520.0, 1e9, f32::MAX, 1e-30, f32::MIN_POSITIVE]);
    values.extend([f32::INFINITY, f32::NAN, 0.0, -0.0]);
    values.extend(values.clone().iter().map(|v| -v));
    for backend in available() {
        let name = backend.name();
        let mut wide = vec![0.0; halves.len()];
        backend.widen(&halves, &mut wide);
        for (half, wide) in halves.iter().zip(&wide) {
            let expected = f16::from_bits(*half).to_f32();
            assert!(
                wide.to_bits() == expected.to_bits() || wide.is_nan() && expected.is_nan(),
                "{name} {half:#x}: {wide}, expected {expected}"
            );
        }
        let mut narrow = vec![0; values.len()];
        backend.narrow(&values, &mut narrow);
        for (value, found) in values.iter().zip(&narrow) {
            let clamped = if value.is_infinite() {
                *value
            } else {
                value.clamp(-65504.0, 65504.0)
            };
            let (expected, found) = (f16::from_f32(clamped), f16::from_bits(*found));
            assert!(
                expected.to_bits() == found.to_bits() || expected.is_nan() && found.is_nan(),
                "{name} {value}: {found:?}, expected {expected:?}"
            );
        }
    }
}

/// Relative error of an exponential; measured 1.0e-7 with AVX2, 6.0e-8 with the standard library.
const EXP_TOLERANCE: f64 = 1.3e-7;

/// The error of `e^x` against f64 over the whole range, and what is special.
#[test]
fn exponentials_are_exact_to_an_ulp() {
    for backend in available() {
        let name = backend.name();
        let mut worst = 0f64;
        // With a 0 among them the largest is 0, so that nothing is subtracted.
        for chunk in 0..40_000 {
            let mut x: Vec<f32> = (0..8)
                .map(|i| -(87.2 * (chunk * 8 + i) as f32 / 320_000.0))
                .collect();
            x[0] = 0.0;
            let expected: Vec<f64> = x.iter().map(|x| f64::from(*x).exp()).collect();
            let (max, sum) = backend.exponentials(&mut x);
            assert_eq!(max, 0.0);
            assert!((f64::from(sum) / expected.iter().sum::<f64>() - 1.0).abs() < 1e-6);
            for (found, expected) in x.iter().zip(expected) {
                worst = worst.max((f64::from(*found) / expected - 1.0).abs());
            }
        }
        assert!(worst < EXP_TOLERANCE, "{name}: {worst:e}");

        let mut x = [f32::NEG_INFINITY; 8];
        let (max, sum) = backend.exponentials(&mut x);
        assert_eq!((max, sum, x), (f32::NEG_INFINITY, 0.0, [0.0; 8]), "{name}");
        x = [
            -1.0,
            -200.0,
            -f32::MAX,
            f32::NEG_INFINITY,
            -88.0,
            0.0,
            -1e-40,
            -1.0,
        ];
        let (max, _) = backend.exponentials(&mut x);
        assert_eq!(
            (max, x[2], x[3], x[5], x[6]),
            (0.0, 0.0, 0.0, 1.0, 1.0),
            "{name}"
        );
        for special in [f32::NAN, f32::INFINITY] {
            for i in 0..16 {
                let mut x = [f32::NEG_INFINITY; 16];
                x[3] = 1.0;
                x[i] = special;
                assert!(backend.exponentials(&mut x).1.is_nan(), "{name} {i}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Products, weighted sums and exponentials of every backend against scalar; and each row
    /// alone against the same among others, to the bit.
    #[test]
    fn backends_equal_scalar(
        rows in 1usize..8,
        n in 1usize..30,
        vectors in 1usize..20,
        gap in 0usize..5,
        half: bool,
        seed: u64,
    ) {
        let (d, stride) = (8 * vectors, n + gap);
        let mut random = Random(seed);
        let q = random.units(rows * d);
        let weights = random.units(rows * stride);
        let start = random.units(rows * d);
        let kv = random.units(n * d);
        let halves: Vec<u16> = kv.iter().map(|v| f16::from_f32(*v).to_bits()).collect();
        let kv = if half { Rows::F16(&halves) } else { Rows::F32(&kv) };
        let scores = |backend: Backend, q: &[f32]| {
            let mut out = vec![7.0; q.len() / d * stride];
            backend.scores(q, &[kv], d, &mut out, stride);
            out
        };
        let sums = |backend: Backend, weights: &[f32], start: &[f32]| {
            let mut acc = start.to_vec();
            backend.weighted_sum(weights, stride, &[kv], d, &mut acc);
            acc
        };
        let expected_scores = scores(Backend::Scalar, &q);
        let expected_sums = sums(Backend::Scalar, &weights, &start);
        for backend in available() {
            let name = backend.name();
            let found = scores(backend, &q);
            for (found, expected) in found.iter().zip(&expected_scores) {
                prop_assert!((found - expected).abs() <= 1e-6 * d as f32, "{name}: {found} {expected}");
            }
            let found_sums = sums(backend, &weights, &start);
            for (found, expected) in found_sums.iter().zip(&expected_sums) {
                prop_assert!((found - expected).abs() <= 1e-6 * n as f32, "{name}: {found} {expected}");
            }
            for r in 0..rows {
                let alone = scores(backend, &q[r * d..][..d]);
                prop_assert_eq!(&alone[..n], &found[r * stride..][..n], "{} row {}", name, r);
                let alone = sums(backend, &weights[r * stride..], &start[r * d..][..d]);
                prop_assert_eq!(&alone[..], &found_sums[r * d..][..d], "{} row {}", name, r);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 40,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// As many rows and keys as a prompt has: those of each row alone, to the bit.
    #[test]
    fn many_rows_are_computed_as_each_alone(
        rows in 4usize..40,
        n in 1usize..300,
        vectors in 1usize..20,
        half: bool,
        seed: u64,
    ) {
        let (d, stride) = (8 * vectors, n + 3);
        let mut random = Random(seed);
        let q = random.units(rows * d);
        let weights = random.units(rows * stride);
        let start = random.units(rows * d);
        let kv = random.units(n * d);
        let halves: Vec<u16> = kv.iter().map(|v| f16::from_f32(*v).to_bits()).collect();
        let kv = if half { Rows::F16(&halves) } else { Rows::F32(&kv) };
        for backend in available() {
            let name = backend.name();
            let mut scores = vec![7.0; rows * stride];
            backend.scores(&q, &[kv], d, &mut scores, stride);
            let mut sums = start.clone();
            backend.weighted_sum(&weights, stride, &[kv], d, &mut sums);
            for r in 0..rows {
                let mut alone = vec![7.0; stride];
                backend.scores(&q[r * d..][..d], &[kv], d, &mut alone, stride);
                prop_assert_eq!(&alone[..], &scores[r * stride..][..stride], "{} row {}", name, r);
                let mut alone = start[r * d..][..d].to_vec();
                backend.weighted_sum(&weights[r * stride..], stride, &[kv], d, &mut alone);
                prop_assert_eq!(&alone[..], &sums[r * d..][..d], "{} row {}", name, r);
            }
        }
    }
}
