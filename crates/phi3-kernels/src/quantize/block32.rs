//! The types with blocks of 32 weights. `scalar::decode` states their layouts.

use super::float::factor;
use super::{LARGEST, SMALLEST, affine, symmetric};
use crate::scalar::IQ4_NL_VALUES;

type Weights = [f32; 32];

#[inline(always)]
pub(super) fn q4_0(x: &Weights, w: &Weights, out: &mut [u8; 18]) {
    let (d, q) = symmetric_block(x, w, 8.0);
    out[..2].copy_from_slice(&d.to_le_bytes());
    put_nibbles(&q, &mut out[2..]);
}

#[inline(always)]
pub(super) fn q5_0(x: &Weights, w: &Weights, out: &mut [u8; 22]) {
    let (d, q) = symmetric_block(x, w, 16.0);
    out[..2].copy_from_slice(&d.to_le_bytes());
    put_fifth_bits(&q, &mut out[2..6]);
    put_nibbles(&q, &mut out[6..]);
}

#[inline(always)]
pub(super) fn q8_0(x: &Weights, w: &Weights, out: &mut [u8; 34]) {
    // One level less below zero: activations in this type are never -128 either, and kernels that
    // take absolute values rely on it.
    let largest = symmetric::signed_largest(x).abs();
    let mut d = largest / 127.0;
    if largest > SMALLEST {
        let q = x.map(|x| super::round((x / d).clamp(-127.0, 127.0)));
        let (xq, qq) = symmetric::products(x, w, &q);
        if qq > 0.0 && xq > 0.0 {
            d = xq / qq;
        }
    }
    let (half, d) = factor(d.min(LARGEST));
    out[..2].copy_from_slice(&half.to_le_bytes());
    let inverse = if d > 0.0 { 1.0 / d } else { 0.0 };
    for (x, out) in x.iter().zip(&mut out[2..]) {
        *out = super::round((x * inverse).clamp(-127.0, 127.0)) as i8 as u8;
    }
}

#[inline(always)]
pub(super) fn q4_1(x: &Weights, w: &Weights, out: &mut [u8; 20]) {
    let (d, m, q) = affine_block(x, w, 15.0);
    out[..2].copy_from_slice(&d.to_le_bytes());
    out[2..4].copy_from_slice(&m.to_le_bytes());
    put_nibbles(&q, &mut out[4..]);
}

#[inline(always)]
pub(super) fn q5_1(x: &Weights, w: &Weights, out: &mut [u8; 24]) {
    let (d, m, q) = affine_block(x, w, 31.0);
    out[..2].copy_from_slice(&d.to_le_bytes());
    out[2..4].copy_from_slice(&m.to_le_bytes());
    put_fifth_bits(&q, &mut out[4..8]);
    put_nibbles(&q, &mut out[8..]);
}

/// The scale as a half, and q + `half` as it is stored.
#[inline(always)]
fn symmetric_block(x: &Weights, w: &Weights, half: f32) -> (u16, [u8; 32]) {
    let (stored, d) = factor(symmetric::fit(x, w, half).d.clamp(-LARGEST, LARGEST));
    let inverse = if d != 0.0 { 1.0 / d } else { 0.0 };
    let q = symmetric::rounded(x, inverse, half);
    (stored, q.map(|q| (q + half) as u8))
}

/// Scale and minimum as halves, and q.
#[inline(always)]
fn affine_block(x: &Weights, w: &Weights, top: f32) -> (u16, u16, [u8; 32]) {
    let found = affine::fit(x, w, top, false);
    let (stored_d, d) = factor(found.d.clamp(0.0, LARGEST));
    let (stored_m, m) = factor(found.m.clamp(-LARGEST, LARGEST));
    let inverse = if d > 0.0 { 1.0 / d } else { 0.0 };
    let q = affine::rounded(x, inverse, m, top);
    (stored_d, stored_m, q.map(|q| q as u8))
}

/// Candidates on each side of the two scales that map the largest weight to one end of the table.
const STEPS: i32 = 9;

#[inline(always)]
pub(super) fn iq4_nl(x: &Weights, w: &Weights, out: &mut [u8; 18]) {
    let largest = symmetric::signed_largest(x);
    let mut scale = 0.0;
    if largest.abs() > SMALLEST {
        let mut gain = 0.0;
        let mut consider = |inverse: f32| {
            let q = nearest_values(x, inverse);
            let (xq, qq) = symmetric::products(x, w, &q);
            if qq > 0.0 && xq * xq > gain * qq {
                gain = xq * xq / qq;
                scale = xq / qq;
            }
            scale
        };
        let mut d = 0.0;
        for end in [IQ4_NL_VALUES[0], IQ4_NL_VALUES[15]] {
            for i in -STEPS..=STEPS {
                d = consider((end + 2.0 * i as f32) / largest);
            }
        }
        for _ in 0..3 {
            if d != 0.0 {
                d = consider(1.0 / d);
            }
        }
    }
    let (half, d) = factor(scale.clamp(-LARGEST, LARGEST));
    let inverse = if d != 0.0 { 1.0 / d } else { 0.0 };
    out[..2].copy_from_slice(&half.to_le_bytes());
    put_nibbles(&x.map(|x| nearest(x * inverse)), &mut out[2..]);
}

/// The values of the table nearest to `x * inverse`: the first, and a step more for every middle
/// between neighbors that is below. Whole numbers, so that the sums are exact.
#[inline(always)]
fn nearest_values(x: &Weights, inverse: f32) -> Weights {
    let mut values = [IQ4_NL_VALUES[0]; 32];
    for (low, high) in IQ4_NL_VALUES.iter().zip(&IQ4_NL_VALUES[1..]) {
        let middle = 0.5 * (low + high);
        for (value, x) in values.iter_mut().zip(x) {
            *value += if x * inverse > middle {
                high - low
            } else {
                0.0
            };
        }
    }
    values
}

/// Index of the nearest value of the table.
#[inline(always)]
fn nearest(v: f32) -> u8 {
    let middles = IQ4_NL_VALUES
        .windows(2)
        .map(|pair| 0.5 * (pair[0] + pair[1]));
    middles.map(|middle| u8::from(v > middle)).sum()
}

/// Byte j holds weight j low and weight j + 16 high.
#[inline(always)]
fn put_nibbles(q: &[u8; 32], out: &mut [u8]) {
    for (j, out) in out.iter_mut().enumerate() {
        *out = q[j] & 15 | q[j + 16] << 4;
    }
}

/// Bit j is the fifth of weight j.
#[inline(always)]
fn put_fifth_bits(q: &[u8; 32], out: &mut [u8]) {
    let bits = (0..32).fold(0u32, |bits, j| bits | u32::from(q[j] >> 4) << j);
    out.copy_from_slice(&bits.to_le_bytes());
}
