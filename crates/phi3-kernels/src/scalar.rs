//! The specification: every kernel in portable Rust, always compiled, the fallback of every
//! machine and the oracle of every other backend.
//!
//! Functions here work on the part of an operation that one thread does; lengths were checked
//! by the entry points in `lib.rs`.

pub(crate) mod attention;
mod decode;
mod int8;
mod kernels;
mod units;

#[cfg(target_arch = "x86_64")]
pub(crate) use decode::decode_inline;
pub(crate) use decode::{IQ4_NL_VALUES, decode, f16_to_f32};

#[cfg(target_arch = "x86_64")]
pub(crate) use decode::q3_k_scales;
#[cfg(any(
    target_arch = "x86_64",
    target_arch = "aarch64",
    target_arch = "wasm32"
))]
pub(crate) use int8::LANES as INT8_LANES;
pub(crate) use int8::{int8_rows, quantize};
pub(crate) use kernels::Scalar;
#[cfg(any(
    target_arch = "aarch64",
    all(target_arch = "wasm32", target_feature = "simd128")
))]
pub(crate) use units::{Factors, Unit, unpack_row};

use crate::MatrixRef;

/// Independent partial sums of a dot product, so that the additions of one need not wait for
/// each other and fill vector registers.
const LANES: usize = 16;

/// Rows decoded at once: together they stay in the first-level cache, and a long prompt's
/// activations are read once for all of them.
const TILE_ROWS: usize = 4;

/// `out[t][i] = x[t] · w[first_row + i]`.
#[inline(always)]
pub(crate) fn matmul_rows(x: &[f32], w: MatrixRef<'_>, first_row: usize, out: &mut [&mut [f32]]) {
    let cols = w.cols();
    let rows = out.first().map_or(0, |out| out.len());
    let mut tile = vec![0.0; TILE_ROWS.min(rows) * cols];
    for tile_start in (0..rows).step_by(TILE_ROWS) {
        let tile_rows = TILE_ROWS.min(rows - tile_start);
        for i in 0..tile_rows {
            let row = w.row(first_row + tile_start + i);
            decode(w.block_type(), row, &mut tile[i * cols..][..cols]);
        }
        for (t, out) in out.iter_mut().enumerate() {
            let x = &x[t * cols..][..cols];
            for i in 0..tile_rows {
                out[tile_start + i] = dot(x, &tile[i * cols..][..cols]);
            }
        }
    }
}

/// The sum of products in f32, in an order that depends on the length alone.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a_chunks, a_tail) = a.as_chunks::<LANES>();
    let (b_chunks, b_tail) = b.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    for (lane, (a, b)) in lanes.iter_mut().zip(a_tail.iter().zip(b_tail)) {
        *lane += a * b;
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// One row: `x / sqrt(mean(x²) + eps) * weight`.
#[inline(always)]
pub(crate) fn rms_norm_row(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let scale = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * weight;
    }
}

/// One row: `(x - mean) / sqrt(variance + eps) * weight + bias`.
#[inline(always)]
pub(crate) fn layer_norm_row(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    let mean = sum(x) / x.len() as f32;
    for (out, x) in out.iter_mut().zip(x) {
        *out = x - mean;
    }
    let scale = 1.0 / (dot(out, out) / x.len() as f32 + eps).sqrt();
    for ((out, weight), bias) in out.iter_mut().zip(weight).zip(bias) {
        *out = *out * scale * weight + bias;
    }
}

/// The sum, in an order that depends on the length alone.
#[inline(always)]
fn sum(x: &[f32]) -> f32 {
    let (chunks, tail) = x.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for x in chunks {
        for i in 0..LANES {
            lanes[i] += x[i];
        }
    }
    lanes.iter().chain(tail).sum()
}

/// `x * sigmoid(1.702 x)`.
#[inline(always)]
pub(crate) fn quick_gelu(x: &mut [f32]) {
    for x in x {
        *x /= 1.0 + exp(-1.702 * *x);
    }
}

/// `exp(x)` within 2 units in the last place, of which the compiler can do several at once: 2^k
/// times a polynomial, k being what rounding `x / ln 2` to an integer leaves in the low bits of a
/// large number. What would be from 1.7e38 on is 1.7e38 or infinite, what would be subnormal 1e-38; NaN stays.
#[inline(always)]
fn exp(x: f32) -> f32 {
    // 1.5 * 2^23: numbers of this size are whole.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, the first of few digits, so that its multiples are exact.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    // 1/7! to 1/2!.
    const TAYLOR: [f32; 6] = [
        1.0 / 5040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
    ];
    // Comparisons, since `min` and `max` would lose a NaN.
    let too_large = x > 88.73;
    let x = if x > 88.0 { 88.0 } else { x };
    let x = if x < -87.0 { -87.0 } else { x };
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let k = rounded - ROUND;
    let r = (x - k * LN_2[0]) - k * LN_2[1];
    let tail = TAYLOR.iter().fold(0.0, |sum, factor| sum * r + factor);
    let power = f32::from_bits((rounded.to_bits() << 23).wrapping_add(1f32.to_bits()));
    let exp = (1.0 + (r + r * r * tail)) * power;
    if too_large { f32::INFINITY } else { exp }
}

/// One row: `up * silu(gate)` with `silu(g) = g / (1 + exp(-g))`.
#[inline(always)]
pub(crate) fn silu_mul_row(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = up * (gate / (1.0 + exp(-gate)));
    }
}

/// Pairs `(a, b)`: `a * sigmoid(1.702 a) * (b + 1)`, what is finite limited before.
#[inline(always)]
pub(crate) fn gegelu_row(up: &[f32], limit: f32, out: &mut [f32]) {
    // Written with comparisons, since `min` would lose a NaN.
    let below = |x: f32| {
        if x > limit && x < f32::INFINITY {
            limit
        } else {
            x
        }
    };
    let above = |x: f32| {
        if x < -limit && x > f32::NEG_INFINITY {
            -limit
        } else {
            x
        }
    };
    for (out, [a, b]) in out.iter_mut().zip(up.as_chunks::<2>().0) {
        let (a, b) = (below(*a), above(below(*b)));
        *out = a / (1.0 + exp(-1.702 * a)) * (b + 1.0);
    }
}

/// One head: rotates `(x[j], x[j + half])` by the angle j, for j below `half = cos.len()`.
#[inline(always)]
pub(crate) fn rope_head(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (low, high) = x.split_at_mut(cos.len());
    for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

/// Index of the largest value, the first of equals; NaN never wins.
#[inline(always)]
pub(crate) fn argmax(x: &[f32]) -> Option<usize> {
    let mut best: Option<(usize, f32)> = None;
    for (i, &v) in x.iter().enumerate() {
        if !v.is_nan() && best.is_none_or(|(_, max)| v > max) {
            best = Some((i, v));
        }
    }
    best.map(|(i, _)| i)
}
