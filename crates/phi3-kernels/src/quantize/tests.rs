use super::*;
use crate::dequantize;
use crate::testing::Random;

const COLS: usize = 1024;

fn types() -> impl Iterator<Item = BlockType> {
    BlockType::ALL.into_iter()
}

fn quantized() -> impl Iterator<Item = BlockType> {
    types().filter(|t| t.block_len() > 1)
}

/// Roughly normal: the sum of twelve uniform numbers.
fn normal(random: &mut Random) -> f32 {
    (0..12).map(|_| 0.5 * random.unit()).sum()
}

fn encoded(t: BlockType, x: &[f32], cols: usize, importance: Option<&[f32]>) -> Vec<u8> {
    let mut out = vec![0xa5; t.row_bytes(cols).unwrap() * (x.len() / cols)];
    quantize(t, x, cols, importance, &mut out).unwrap();
    out
}

fn decoded(t: BlockType, bytes: &[u8], len: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; len];
    dequantize(t, bytes, &mut out).unwrap();
    out
}

fn relative_error(t: BlockType, x: &[f32]) -> f64 {
    let y = decoded(t, &encoded(t, x, COLS, None), x.len());
    let square = |v: f32| f64::from(v) * f64::from(v);
    let error: f64 = x.iter().zip(y).map(|(x, y)| square(x - y)).sum();
    (error / x.iter().map(|x| square(*x)).sum::<f64>()).sqrt()
}

#[test]
fn what_a_type_can_hold_comes_back() {
    for t in quantized() {
        let x: Vec<f32> = (0..COLS)
            .map(|i| match t {
                BlockType::Q2K => (i % 4) as f32 * 0.5,
                BlockType::IQ4NL => crate::scalar::IQ4_NL_VALUES[i % 16] * 0.25,
                BlockType::Q8_0 => [-1.27, 0.64, 0.0, 0.01][i % 4],
                _ => [-0.5, 0.25, 0.0, -0.25][i % 4],
            })
            .collect();
        let error = relative_error(t, &x);
        assert!(error < 1e-3, "{t}: {error:e}");
    }
}

#[test]
fn every_odd_number_gives_valid_blocks() {
    let odd = [
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::MAX,
        f32::MIN,
        f32::MIN_POSITIVE,
        1e-45,
        -1e-40,
        1e-7,
        0.0,
        -0.0,
        65504.0,
        -1e5,
    ];
    let mut random = Random(3);
    for t in quantized() {
        for case in 0..200 {
            let x: Vec<f32> = (0..256)
                .map(|i| match case {
                    // All the same odd number, then mixtures of odd and ordinary ones.
                    0..13 => odd[case],
                    13..26 if i == 100 => odd[case - 13],
                    13..26 => random.unit(),
                    _ => match random.bits() as usize % 32 {
                        choice @ 0..13 => odd[choice],
                        _ => f32::from_bits(random.bits() as u32),
                    },
                })
                .collect();
            let y = decoded(t, &encoded(t, &x, 256, None), 256);
            assert!(y.iter().all(|y| y.is_finite()), "{t} {case}: {y:?}");
        }
        let zeros = decoded(t, &encoded(t, &[0.0; 256], 256, None), 256);
        assert!(zeros.iter().all(|y| *y == 0.0), "{t}");
    }
}

#[test]
fn important_columns_are_nearer() {
    let mut random = Random(5);
    let x: Vec<f32> = (0..16 * COLS).map(|_| normal(&mut random)).collect();
    let importance: Vec<f32> = (0..COLS).map(|c| [100.0, 1.0, 0.01][c % 3]).collect();
    let error = |t, importance: Option<&[f32]>| {
        let y = decoded(t, &encoded(t, &x, COLS, importance), x.len());
        let mut error = 0.0;
        for (i, (x, y)) in x.iter().zip(y).enumerate() {
            error += [100.0, 1.0, 0.01][i % COLS % 3] * f64::from(x - y).powi(2);
        }
        error
    };
    for t in quantized().filter(|t| *t != BlockType::Q8_0) {
        let (plain, weighted) = (error(t, None), error(t, Some(&importance)));
        assert!(
            weighted < 0.97 * plain,
            "{t}: {weighted:e}, plain {plain:e}"
        );
    }
}

#[test]
fn threads_change_nothing() {
    let mut random = Random(7);
    let x: Vec<f32> = (0..70 * COLS).map(|_| normal(&mut random)).collect();
    for t in types() {
        let all = encoded(t, &x, COLS, None);
        let rows: Vec<u8> = x
            .chunks(COLS)
            .flat_map(|row| encoded(t, row, COLS, None))
            .collect();
        assert_eq!(all, rows, "{t}");
    }
}

#[test]
fn useless_importance_is_none() {
    let mut random = Random(9);
    let x: Vec<f32> = (0..256).map(|_| normal(&mut random)).collect();
    for importance in [[0.0; 256], [f32::NAN; 256], [-1.0; 256]] {
        let y = decoded(
            BlockType::Q4K,
            &encoded(BlockType::Q4K, &x, 256, Some(&importance)),
            256,
        );
        assert!(x.iter().zip(y).all(|(x, y)| (x - y).abs() < 0.5));
    }
}

#[test]
fn wrong_lengths_are_errors() {
    let t = BlockType::Q4_0;
    let message = |x: &[f32], cols, importance, out: &mut [u8]| {
        quantize(t, x, cols, importance, out)
            .unwrap_err()
            .to_string()
    };
    assert!(message(&[0.0; 33], 33, None, &mut [0; 18]).contains("blocks of 32"));
    assert!(message(&[0.0; 33], 32, None, &mut [0; 18]).contains("expected 32, found 33"));
    assert!(message(&[0.0; 32], 32, None, &mut [0; 17]).contains("expected 18, found 17"));
    let short = message(&[0.0; 32], 32, Some(&[1.0; 31]), &mut [0; 18]);
    assert!(short.contains("importance of columns"), "{short}");
    assert_eq!(quantize(t, &[], 0, None, &mut []), Ok(()));
}
