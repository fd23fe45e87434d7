//! Attention's operations: see `backend::Kernels` for what each has to give.

#![expect(
    clippy::needless_range_loop,
    reason = "one index into several arrays; closures in iterators would lose the instructions"
)]

use super::Vectors;
use crate::backend::Rows;
use crate::scalar::attention as scalar;

const LANES: usize = 4;

/// Rows of the register block.
const BLOCK_ROWS: usize = 3;

/// Rows up to which half-precision keys and values are widened while they are multiplied: more
/// would widen them again and again.
const DIRECT_ROWS: usize = 4;

/// An element of keys and values.
trait Element: Copy {
    fn load<V: Vectors>(v: V, four: &[Self; LANES]) -> V::F32;
}

impl Element for f32 {
    #[inline(always)]
    fn load<V: Vectors>(v: V, four: &[Self; LANES]) -> V::F32 {
        v.load(four)
    }
}

impl Element for u16 {
    #[inline(always)]
    fn load<V: Vectors>(v: V, four: &[Self; LANES]) -> V::F32 {
        v.load_f16(four)
    }
}

#[inline(always)]
pub(crate) fn scores<V: Vectors>(
    v: V,
    q: &[f32],
    keys: Rows<'_>,
    d: usize,
    out: &mut [f32],
    stride: usize,
) {
    match keys {
        Rows::F32(keys) => scores_of(v, q, keys, d, out, stride),
        Rows::F16(keys) if q.len() <= DIRECT_ROWS * d => scores_of(v, q, keys, d, out, stride),
        Rows::F16(keys) => scores_of(v, q, &widened(v, keys), d, out, stride),
    }
}

#[inline(always)]
fn scores_of<V: Vectors, E: Element>(
    v: V,
    q: &[f32],
    keys: &[E],
    d: usize,
    out: &mut [f32],
    stride: usize,
) {
    let (rows, n) = (q.len() / d, keys.len() / d);
    let mut r = 0;
    while r < rows {
        let block = BLOCK_ROWS.min(rows - r);
        let q = &q[r * d..(r + block) * d];
        let out = &mut out[r * stride..];
        let mut j = 0;
        while j < n {
            j += match block {
                // Eight sums that do not wait for each other.
                1 if n - j >= 8 => dots::<V, E, 1, 2>(v, q, keys, d, j, out, stride),
                1 => dots::<V, E, 1, 1>(v, q, keys, d, j, out, stride),
                2 => dots::<V, E, 2, 1>(v, q, keys, d, j, out, stride),
                _ => dots::<V, E, 3, 1>(v, q, keys, d, j, out, stride),
            };
        }
        r += block;
    }
}

/// The products of `R` queries with `F` times four keys from the one at `j` on; behind the last
/// key comes the last key again, whose products are dropped. Each sum goes through the elements
/// four by four, and adds up its lanes in one order. Returns the number of keys.
#[inline(always)]
fn dots<V: Vectors, E: Element, const R: usize, const F: usize>(
    v: V,
    q: &[f32],
    keys: &[E],
    d: usize,
    j: usize,
    out: &mut [f32],
    stride: usize,
) -> usize {
    // Slices of `vectors` elements each, so that the loop needs no check.
    let vectors = d / LANES;
    let n = keys.len() / d;
    let mut q_vectors = [&[][..]; R];
    for r in 0..R {
        q_vectors[r] = &q[r * d..][..d].as_chunks::<LANES>().0[..vectors];
    }
    let mut k_vectors = [[&[][..]; 4]; F];
    for f in 0..F {
        for i in 0..4 {
            let key = (j + 4 * f + i).min(n - 1);
            k_vectors[f][i] = &keys[key * d..][..d].as_chunks::<LANES>().0[..vectors];
        }
    }
    let mut sums = [[[v.splat(0.0); 4]; F]; R];
    for c in 0..vectors {
        let mut q = [v.splat(0.0); R];
        for r in 0..R {
            q[r] = v.load(&q_vectors[r][c]);
        }
        for f in 0..F {
            for i in 0..4 {
                let k = E::load(v, &k_vectors[f][i][c]);
                for r in 0..R {
                    sums[r][f][i] = v.mul_add(k, q[r], sums[r][f][i]);
                }
            }
        }
    }
    for r in 0..R {
        for f in 0..F {
            let four = v.store(v.sum_each(sums[r][f]));
            let first = j + 4 * f;
            let wanted = LANES.min(n - first);
            out[r * stride + first..][..wanted].copy_from_slice(&four[..wanted]);
        }
    }
    4 * F
}

#[inline(always)]
pub(crate) fn exponentials<V: Vectors>(v: V, scores: &mut [f32]) -> (f32, f32) {
    let (vectors, tail) = scores.as_chunks_mut::<LANES>();
    debug_assert!(tail.is_empty(), "scores come in whole vectors");
    let mut max = v.splat(f32::NEG_INFINITY);
    for scores in &*vectors {
        max = v.larger(v.load(scores), max);
    }
    let [a, b, c, d] = v.store(max);
    let max = a.max(b).max(c.max(d));
    // Where all are -inf any finite number gives exponentials of 0.
    let shift = v.splat(if max == f32::NEG_INFINITY { 0.0 } else { max });
    let mut sum = v.splat(0.0);
    for scores in vectors {
        let e = exp(v, v.sub(v.load(scores), shift));
        sum = v.add(sum, e);
        *scores = v.store(e);
    }
    let [a, b, c, d] = v.store(sum);
    (max, (a + c) + (b + d))
}

/// `e^x` for x up to 0, within 1.2e-7 of it relatively from -87.3 on; 0 below.
///
/// `e^x = 2^n e^r` with n the nearest integer to `x / ln 2`, and `e^r` by a polynomial: `1 + (r +
/// r² p(r))`, p of degree 4, whose largest relative error for `|r| <= ln 2 / 2` is smallest
/// (fitted by Lawson's iteration). Added in this order it needs no fused operation.
#[inline(always)]
fn exp<V: Vectors>(v: V, x: V::F32) -> V::F32 {
    const P: [f32; 5] = [
        0.499_999_94,
        0.166_665_21,
        0.041_668_39,
        0.008_368_731,
        0.001_381_457,
    ];
    // ln 2 in two parts: n times the first is exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    const LOWEST: f32 = -87.3;

    let lowest = v.splat(LOWEST);
    let clamped = v.max(x, lowest);
    let n = v.round(v.mul(clamped, v.splat(std::f32::consts::LOG2_E)));
    let r = v.mul_add(n, v.splat(-LN_2_HIGH), clamped);
    let r = v.mul_add(n, v.splat(-LN_2_LOW), r);
    let mut p = v.splat(P[4]);
    for i in (0..4).rev() {
        p = v.mul_add(p, r, v.splat(P[i]));
    }
    let e = v.add(v.splat(1.0), v.mul_add(v.mul(r, r), p, r));
    let e = v.mul(e, v.power_of_2(n));
    v.zero_where_less(e, x, lowest)
}

#[inline(always)]
pub(crate) fn weighted_sum<V: Vectors>(
    v: V,
    weights: &[f32],
    stride: usize,
    values: Rows<'_>,
    d: usize,
    acc: &mut [f32],
) {
    match values {
        Rows::F32(values) => weighted_sum_of(v, weights, stride, values, d, acc),
        Rows::F16(values) if acc.len() <= DIRECT_ROWS * d => {
            weighted_sum_of(v, weights, stride, values, d, acc);
        }
        Rows::F16(values) => weighted_sum_of(v, weights, stride, &widened(v, values), d, acc),
    }
}

#[inline(always)]
fn weighted_sum_of<V: Vectors, E: Element>(
    v: V,
    weights: &[f32],
    stride: usize,
    values: &[E],
    d: usize,
    acc: &mut [f32],
) {
    let n = values.len() / d;
    let values = values.as_chunks::<LANES>().0;
    // Even, since d is a multiple of 8.
    let per_row = d / LANES;
    let rows = acc.len() / d;
    let mut r = 0;
    while r < rows {
        let block = BLOCK_ROWS.min(rows - r);
        let acc = &mut acc[r * d..(r + block) * d];
        let weights = &weights[r * stride..];
        let mut c = 0;
        while c < per_row {
            c += match (block, per_row - c) {
                (1, 12..) => add_rows::<V, E, 1, 12>(v, weights, stride, values, n, c, acc),
                (1, 4..) => add_rows::<V, E, 1, 4>(v, weights, stride, values, n, c, acc),
                (1, _) => add_rows::<V, E, 1, 2>(v, weights, stride, values, n, c, acc),
                (2, 4..) => add_rows::<V, E, 2, 4>(v, weights, stride, values, n, c, acc),
                (2, _) => add_rows::<V, E, 2, 2>(v, weights, stride, values, n, c, acc),
                (_, 4..) => add_rows::<V, E, 3, 4>(v, weights, stride, values, n, c, acc),
                _ => add_rows::<V, E, 3, 2>(v, weights, stride, values, n, c, acc),
            };
        }
        r += block;
    }
}

/// Vectors `first..first + C` of [`weighted_sum`] for `R` rows; returns `C`.
#[inline(always)]
fn add_rows<V: Vectors, E: Element, const R: usize, const C: usize>(
    v: V,
    weights: &[f32],
    stride: usize,
    values: &[[E; LANES]],
    n: usize,
    first: usize,
    acc: &mut [f32],
) -> usize {
    let per_row = acc.len() / LANES / R;
    let acc = acc.as_chunks_mut::<LANES>().0;
    let mut weights_of = [&[][..]; R];
    for r in 0..R {
        weights_of[r] = &weights[r * stride..][..n];
    }
    let mut sums = [[v.splat(0.0); C]; R];
    for r in 0..R {
        for c in 0..C {
            sums[r][c] = v.load(&acc[r * per_row + first + c]);
        }
    }
    for (j, row) in values.chunks_exact(per_row).take(n).enumerate() {
        let Some(row) = row[first..].first_chunk::<C>() else {
            break;
        };
        let mut weight = [v.splat(0.0); R];
        for r in 0..R {
            weight[r] = v.splat(weights_of[r][j]);
        }
        for c in 0..C {
            let value = E::load(v, &row[c]);
            for r in 0..R {
                sums[r][c] = v.mul_add(weight[r], value, sums[r][c]);
            }
        }
    }
    for r in 0..R {
        for c in 0..C {
            acc[r * per_row + first + c] = v.store(sums[r][c]);
        }
    }
    C
}

#[inline(always)]
fn widened<V: Vectors>(v: V, halves: &[u16]) -> Vec<f32> {
    let mut out = vec![0.0; halves.len()];
    widen(v, halves, &mut out);
    out
}

#[inline(always)]
pub(crate) fn widen<V: Vectors>(v: V, halves: &[u16], out: &mut [f32]) {
    let (halves, tail) = halves.as_chunks::<LANES>();
    let (out, out_tail) = out.as_chunks_mut::<LANES>();
    for (halves, out) in halves.iter().zip(out) {
        *out = v.store(v.load_f16(halves));
    }
    scalar::widen(tail, out_tail);
}

#[inline(always)]
pub(crate) fn narrow<V: Vectors>(v: V, values: &[f32], out: &mut [u16]) {
    let (values, tail) = values.as_chunks::<LANES>();
    let (out, out_tail) = out.as_chunks_mut::<LANES>();
    for (values, out) in values.iter().zip(out) {
        *out = v.to_f16(v.load(values));
    }
    scalar::narrow(tail, out_tail);
}
