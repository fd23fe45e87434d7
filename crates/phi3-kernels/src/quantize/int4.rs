//! INT4: 256 weights `d * q`, q from -8 to 7. `scalar::decode` states the layout.

use super::float::factor;
use super::{LARGEST, SMALLEST, symmetric};

type Weights = [f32; 256];

/// Number of candidates for the scale.
const CANDIDATES: i32 = 48;

/// The span of candidates: the largest magnitude becomes 8, or is so far beyond that the range
/// ends at a share of it.
const SMALLEST_SHARE: f32 = 0.2;

#[inline(always)]
pub(super) fn int4(x: &Weights, w: &Weights, out: &mut [u8; 130]) {
    let (stored, d) = factor(scale(x, w).clamp(-LARGEST, LARGEST));
    let inverse = if d != 0.0 { 1.0 / d } else { 0.0 };
    let q = symmetric::rounded(x, inverse, 8.0).map(|q| (q + 8.0) as u8);
    out[..2].copy_from_slice(&stored.to_le_bytes());
    for i in 0..4 {
        for l in 0..32 {
            out[2 + 32 * i + l] = q[64 * i + l] | q[64 * i + l + 32] << 4;
        }
    }
}

/// The scale of the smallest weighted error.
///
/// Of 256 weights the largest is often so far out that cutting it off and giving the others finer
/// steps is nearer, by much more than in a block of 32: candidates reach from the largest weight
/// at the end of the range down to a fifth of it, of either sign, since only one end of the range
/// has the eighth step. Where the largest is cut, its error counts like any other's.
#[inline(always)]
fn scale(x: &Weights, w: &Weights) -> f32 {
    let largest = symmetric::signed_largest(x);
    if largest.abs() <= SMALLEST {
        return 0.0;
    }
    let (mut best, mut gain) = (0.0, 0.0);
    let mut consider = |inverse: f32| {
        let q = symmetric::rounded(x, inverse, 8.0);
        let (xq, qq) = symmetric::products(x, w, &q);
        // The least-squares scale xq / qq lowers the error by xq² / qq.
        if qq > 0.0 && xq * xq > gain * qq {
            gain = xq * xq / qq;
            best = xq / qq;
        }
        best
    };
    let mut d = 0.0;
    for i in 0..=CANDIDATES {
        let share = 1.05 - (1.05 - SMALLEST_SHARE) * i as f32 / CANDIDATES as f32;
        d = consider(-8.0 / (share * largest));
        if share < 0.95 {
            d = consider(8.0 / (share * largest));
        }
    }
    for _ in 0..4 {
        if d != 0.0 {
            d = consider(1.0 / d);
        }
    }
    best
}
