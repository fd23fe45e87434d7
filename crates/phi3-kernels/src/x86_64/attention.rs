//! Attention's operations with AVX2, FMA and F16C: see `backend::Kernels` for what each has
//! to give.

use std::arch::x86_64::*;
use std::mem::transmute;

use super::tile::{self, Element, LANES, RegisterTile, SixRows, store_lanes};
use super::vector::{load_f32, store_f32};
use super::{Avx2, many};
use crate::backend::{Rows, numbered};
use crate::scalar::attention as scalar;

/// Rows from which on keys and values are laid out anew for all of them.
const MANY_ROWS: usize = 5;

/// Rows of the register block of values: 3 * 4 sums, three vectors of one operand and one of the
/// other are the sixteen registers.
const BLOCK_ROWS: usize = 3;

/// `Kernels::scores`, many queries by the tile `T`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn scores<T: RegisterTile>(
    q: &[f32],
    keys: &[Rows<'_>],
    d: usize,
    out: &mut [f32],
    stride: usize,
) {
    let few = q.len() < MANY_ROWS * d;
    match keys.first() {
        None => {}
        Some(Rows::F32(_)) if !few => many::scores::<T, f32>(q, keys, d, out, stride),
        Some(Rows::F16(_)) if !few => many::scores::<T, u16>(q, keys, d, out, stride),
        Some(_) => {
            for (first, keys) in numbered(keys, d) {
                let out = &mut out[first..];
                match keys {
                    Rows::F32(keys) => few_scores(q, keys, d, out, stride),
                    Rows::F16(keys) => few_scores(q, keys, d, out, stride),
                }
            }
        }
    }
}

/// `Kernels::weighted_sum`, many rows by the tile `T`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn weighted_sum<T: RegisterTile>(
    weights: &[f32],
    stride: usize,
    values: &[Rows<'_>],
    d: usize,
    acc: &mut [f32],
) {
    let few = acc.len() < MANY_ROWS * d;
    match values.first() {
        None => {}
        Some(Rows::F32(_)) if !few => {
            many::weighted_sum::<T, f32>(weights, stride, values, d, acc);
        }
        Some(Rows::F16(_)) if !few => {
            many::weighted_sum::<T, u16>(weights, stride, values, d, acc);
        }
        Some(_) => {
            for (first, values) in numbered(values, d) {
                let weights = &weights[first..];
                match values {
                    Rows::F32(values) => few_sums(weights, stride, values, d, acc),
                    Rows::F16(values) => few_sums(weights, stride, values, d, acc),
                }
            }
        }
    }
}

impl Avx2 {
    pub(crate) fn scores(
        self,
        q: &[f32],
        keys: &[Rows<'_>],
        d: usize,
        out: &mut [f32],
        stride: usize,
    ) {
        // SAFETY: `self` exists only where `new` detected the features.
        unsafe { scores::<SixRows>(q, keys, d, out, stride) }
    }

    pub(crate) fn exponentials(self, scores: &mut [f32]) -> (f32, f32) {
        // SAFETY: `self` exists only where `new` detected the features.
        unsafe { exponentials(scores) }
    }

    pub(crate) fn weighted_sum(
        self,
        weights: &[f32],
        stride: usize,
        values: &[Rows<'_>],
        d: usize,
        acc: &mut [f32],
    ) {
        // SAFETY: `self` exists only where `new` detected the features.
        unsafe { weighted_sum::<SixRows>(weights, stride, values, d, acc) }
    }

    pub(crate) fn prefetch(self, rows: Rows<'_>) {
        match rows {
            Rows::F32(rows) => prefetch(rows.as_ptr(), 0, rows.len()),
            Rows::F16(rows) => prefetch(rows.as_ptr(), 0, rows.len()),
        }
    }

    pub(crate) fn widen(self, halves: &[u16], out: &mut [f32]) {
        // SAFETY: `self` exists only where `new` detected the features.
        unsafe { widen(halves, out) }
    }

    pub(crate) fn narrow(self, values: &[f32], out: &mut [u16]) {
        // SAFETY: `self` exists only where `new` detected the features.
        unsafe { narrow(values, out) }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn few_scores<E: Element>(q: &[f32], keys: &[E], d: usize, out: &mut [f32], stride: usize) {
    match q.len() / d {
        1 => score_rows::<E, 1>(q, keys, d, out, stride),
        2 => score_rows::<E, 2>(q, keys, d, out, stride),
        3 => score_rows::<E, 3>(q, keys, d, out, stride),
        4 => score_rows::<E, 4>(q, keys, d, out, stride),
        _ => {}
    }
}

/// [`few_scores`] of `R` queries.
#[target_feature(enable = "avx2,fma,f16c")]
fn score_rows<E: Element, const R: usize>(
    q: &[f32],
    keys: &[E],
    d: usize,
    out: &mut [f32],
    stride: usize,
) {
    let n = keys.len() / d;
    for j in (0..n).step_by(2 * LANES) {
        let sums = dots::<E, R>(q, keys, d, j);
        for r in 0..R {
            let wanted = (n - j).min(2 * LANES);
            store_lanes(&mut out[r * stride + j..], wanted, sums[r]);
        }
    }
}

/// The products of `R` queries with sixteen keys from the one at `j` on, a key to a lane; behind the
/// last key comes the last key again. Each sum goes through the elements one by one.
#[expect(clippy::needless_range_loop, reason = "one index into several arrays")]
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn dots<E: Element, const R: usize>(q: &[f32], keys: &[E], d: usize, j: usize) -> tile::Sums<R> {
    // Slices of `vectors` elements each, so that the loop needs no check.
    let vectors = d / LANES;
    let mut q_vectors = [&[][..]; R];
    for r in 0..R {
        q_vectors[r] = &q[r * d..][..d].as_chunks::<LANES>().0[..vectors];
    }
    let rows = tile::eights(&keys[j * d..], d);
    let ahead = keys[j * d..].as_ptr().wrapping_add(2 * LANES * d);
    let mut sums = tile::zeros::<R>();
    for c in 0..vectors {
        // The keys of the next call, as many lines as this step reads.
        prefetch(ahead, c * LANES * 2 * LANES, LANES * 2 * LANES);
        // SAFETY: this function is compiled with the features.
        let columns = unsafe { E::turn(&rows, c) };
        for i in 0..LANES {
            // SAFETY: this function is compiled with the features.
            let [low, high] = unsafe { E::lanes(columns[i]) };
            for r in 0..R {
                let x = _mm256_set1_ps(q_vectors[r][c][i]);
                sums[r][0] = _mm256_fmadd_ps(low, x, sums[r][0]);
                sums[r][1] = _mm256_fmadd_ps(high, x, sums[r][1]);
            }
        }
    }
    sums
}

/// Asks for `count` elements from the one at `first` behind `base` on, wherever that is.
#[inline(always)]
fn prefetch<E>(base: *const E, first: usize, count: usize) {
    let line = 64 / size_of::<E>();
    for i in 0..count / line {
        let address = base.wrapping_add(first + i * line);
        // SAFETY: a hint, which reads nothing and ignores addresses that are not mapped; SSE is
        // part of x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn exponentials(scores: &mut [f32]) -> (f32, f32) {
    let (vectors, tail) = scores.as_chunks_mut::<LANES>();
    debug_assert!(tail.is_empty(), "scores come in whole vectors");
    let mut max = _mm256_set1_ps(f32::NEG_INFINITY);
    for scores in &*vectors {
        // Of a NaN and a number the instruction returns the second operand.
        max = _mm256_max_ps(load_f32(scores), max);
    }
    let lanes = store_f32(max);
    let max = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
    // Where all are -inf any finite number gives exponentials of 0.
    let shift = if max == f32::NEG_INFINITY { 0.0 } else { max };
    let shift = _mm256_set1_ps(shift);
    let mut sum = _mm256_setzero_ps();
    for scores in vectors {
        let e = exp(_mm256_sub_ps(load_f32(scores), shift));
        sum = _mm256_add_ps(sum, e);
        *scores = store_f32(e);
    }
    let [a, b, c, d, e, f, g, h] = store_f32(sum);
    (max, ((a + e) + (c + g)) + ((b + f) + (d + h)))
}

/// `e^x` for x up to 0, within 1.2e-7 of it relatively from -87.3 on; 0 below -87.7, and less exact
/// between.
///
/// `e^x = 2^n e^r` with n the nearest integer to `x / ln 2`, and `e^r` by a polynomial: `1 + r +
/// r² p(r)`, p of degree 4, whose largest relative error for `|r| <= ln 2 / 2` is smallest
/// (fitted by Lawson's iteration).
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn exp(x: __m256) -> __m256 {
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
    // Its n is -127, whose power comes out as 0.
    const LOWEST: f32 = -88.0;
    // 1.5 * 2^23: added to a number it leaves the nearest integer in the lowest bits.
    const ROUNDING: f32 = 12_582_912.0;

    // Of a NaN and a number the instruction returns the second operand.
    let x = _mm256_max_ps(_mm256_set1_ps(LOWEST), x);
    let rounding = _mm256_set1_ps(ROUNDING);
    let rounded = _mm256_fmadd_ps(x, _mm256_set1_ps(std::f32::consts::LOG2_E), rounding);
    let n = _mm256_sub_ps(rounded, rounding);
    let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(LN_2_HIGH), x);
    let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(LN_2_LOW), r);
    let mut p = _mm256_set1_ps(P[4]);
    for factor in [P[3], P[2], P[1], P[0]] {
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(factor));
    }
    let p = _mm256_fmadd_ps(
        _mm256_mul_ps(r, r),
        p,
        _mm256_add_ps(r, _mm256_set1_ps(1.0)),
    );
    // The bits of 1.0 are the exponent 127, to which n is added.
    let exponent = _mm256_slli_epi32::<23>(_mm256_castps_si256(rounded));
    let power = _mm256_add_epi32(exponent, _mm256_castps_si256(_mm256_set1_ps(1.0)));
    _mm256_mul_ps(p, _mm256_castsi256_ps(power))
}

/// Rows of the next register block of so many: four are two and two, for a row alone costs as much
/// as two.
fn next_block(rows: usize) -> usize {
    match rows {
        4 => 2,
        _ => BLOCK_ROWS.min(rows),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn few_sums<E: Element>(weights: &[f32], stride: usize, values: &[E], d: usize, acc: &mut [f32]) {
    let n = values.len() / d;
    let values = values.as_chunks::<LANES>().0;
    let per_row = d / LANES;
    let rows = acc.len() / d;
    let mut r = 0;
    while r < rows {
        let block = next_block(rows - r);
        let acc = &mut acc[r * d..(r + block) * d];
        let weights = &weights[r * stride..];
        let mut c = 0;
        while c < per_row {
            let left = per_row - c;
            c += match (block, left) {
                // One row goes through whole rows of values, which stream from memory.
                (1, 16 | 8..12) => add_rows::<E, 1, 8>(weights, stride, values, n, c, acc),
                (1, 12..) => add_rows::<E, 1, 12>(weights, stride, values, n, c, acc),
                (1, 4..) => add_rows::<E, 1, 4>(weights, stride, values, n, c, acc),
                (1, _) => add_rows::<E, 1, 1>(weights, stride, values, n, c, acc),
                (2, 6 | 7 | 10..) => add_rows::<E, 2, 6>(weights, stride, values, n, c, acc),
                (2, 4..) => add_rows::<E, 2, 4>(weights, stride, values, n, c, acc),
                (2, _) => add_rows::<E, 2, 1>(weights, stride, values, n, c, acc),
                (_, 4..) => add_rows::<E, 3, 4>(weights, stride, values, n, c, acc),
                (_, 2..) => add_rows::<E, 3, 2>(weights, stride, values, n, c, acc),
                _ => add_rows::<E, 3, 1>(weights, stride, values, n, c, acc),
            };
        }
        r += block;
    }
}

/// Vectors `first..first + C` of [`few_sums`] for `R` rows; returns `C`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn add_rows<E: Element, const R: usize, const C: usize>(
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
    let mut sums = [[_mm256_setzero_ps(); C]; R];
    for r in 0..R {
        for c in 0..C {
            sums[r][c] = load_f32(&acc[r * per_row + first + c]);
        }
    }
    for (j, row) in values.chunks_exact(per_row).take(n).enumerate() {
        if first == 0 {
            prefetch(row.as_ptr().wrapping_add(8 * per_row), 0, per_row + 3);
        }
        let Some(row) = row[first..].first_chunk::<C>() else {
            break;
        };
        let mut weight = [_mm256_setzero_ps(); R];
        for r in 0..R {
            weight[r] = _mm256_set1_ps(weights_of[r][j]);
        }
        for c in 0..C {
            // SAFETY: this function is compiled with the features.
            let value = unsafe { E::load(&row[c]) };
            for r in 0..R {
                sums[r][c] = _mm256_fmadd_ps(weight[r], value, sums[r][c]);
            }
        }
    }
    for r in 0..R {
        for c in 0..C {
            acc[r * per_row + first + c] = store_f32(sums[r][c]);
        }
    }
    C
}

#[target_feature(enable = "avx2,fma,f16c")]
fn widen(halves: &[u16], out: &mut [f32]) {
    let (halves, tail) = halves.as_chunks::<LANES>();
    let (out, out_tail) = out.as_chunks_mut::<LANES>();
    for (halves, out) in halves.iter().zip(out) {
        // SAFETY: this function is compiled with the features.
        *out = store_f32(unsafe { u16::load(halves) });
    }
    scalar::widen(tail, out_tail);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn narrow(values: &[f32], out: &mut [u16]) {
    let (values, tail) = values.as_chunks::<LANES>();
    let (out, out_tail) = out.as_chunks_mut::<LANES>();
    let highest = _mm256_set1_ps(scalar::F16_MAX);
    let lowest = _mm256_set1_ps(-scalar::F16_MAX);
    let infinity = _mm256_set1_ps(f32::INFINITY);
    let sign = _mm256_set1_ps(-0.0);
    for (values, out) in values.iter().zip(out) {
        let x = load_f32(values);
        // Of a NaN and a number both instructions return the second operand.
        let clamped = _mm256_min_ps(highest, _mm256_max_ps(lowest, x));
        let infinite = _mm256_cmp_ps::<_CMP_EQ_OQ>(_mm256_andnot_ps(sign, x), infinity);
        let x = _mm256_blendv_ps(clamped, x, infinite);
        let halves = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x);
        // SAFETY: both types are 16 bytes, and any bits are valid in them.
        *out = unsafe { transmute::<__m128i, [u16; LANES]>(halves) };
    }
    scalar::narrow(tail, out_tail);
}
