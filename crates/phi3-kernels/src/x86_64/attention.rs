//! Attention's operations with AVX2, FMA and F16C: see `backend::Kernels` for what each has
//! to give.

use std::arch::x86_64::*;
use std::mem::transmute;

use super::Avx2;
use crate::backend::Rows;
use crate::scalar::attention as scalar;

/// Lanes of a vector of f32.
const LANES: usize = 8;

/// Rows of the register block: 3 * 4 sums, three vectors of one operand and one of the other
/// are the sixteen registers.
const BLOCK_ROWS: usize = 3;

impl Avx2 {
    pub(crate) fn scores(
        self,
        q: &[f32],
        keys: Rows<'_>,
        d: usize,
        out: &mut [f32],
        stride: usize,
    ) {
        // SAFETY: `self` exists only where `new` detected the features.
        unsafe {
            match keys {
                Rows::F32(keys) => scores(q, keys, d, out, stride),
                Rows::F16(keys) => scores(q, keys, d, out, stride),
            }
        }
    }

    pub(crate) fn exponentials(self, scores: &mut [f32]) -> (f32, f32) {
        // SAFETY: `self` exists only where `new` detected the features.
        unsafe { exponentials(scores) }
    }

    pub(crate) fn weighted_sum(
        self,
        weights: &[f32],
        stride: usize,
        values: Rows<'_>,
        d: usize,
        acc: &mut [f32],
    ) {
        // SAFETY: `self` exists only where `new` detected the features.
        unsafe {
            match values {
                Rows::F32(values) => weighted_sum(weights, stride, values, d, acc),
                Rows::F16(values) => weighted_sum(weights, stride, values, d, acc),
            }
        }
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

/// An element of keys and values.
trait Element: Copy {
    /// Eight of them as f32.
    ///
    /// # Safety
    /// The processor has AVX and F16C.
    unsafe fn load(eight: &[Self; LANES]) -> __m256;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load(eight: &[Self; LANES]) -> __m256 {
        // SAFETY: both types are eight f32 in the same order, and any bits are valid in them.
        unsafe { transmute::<[f32; LANES], __m256>(*eight) }
    }
}

impl Element for u16 {
    #[inline(always)]
    unsafe fn load(eight: &[Self; LANES]) -> __m256 {
        // SAFETY: both types are 16 bytes, and any bits are valid in them; the caller vouches
        // for the instruction.
        unsafe { _mm256_cvtph_ps(transmute::<[u16; LANES], __m128i>(*eight)) }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn scores<E: Element>(q: &[f32], keys: &[E], d: usize, out: &mut [f32], stride: usize) {
    let (rows, n) = (q.len() / d, keys.len() / d);
    let mut r = 0;
    while r < rows {
        let block = next_block(rows - r);
        let q = &q[r * d..(r + block) * d];
        let out = &mut out[r * stride..];
        let mut j = 0;
        while j < n {
            match block {
                1 if n - j >= 8 => {
                    // Eight sums that do not wait for each other.
                    let [[low, high]] = dots::<E, 1, 2>(q, keys, d, j);
                    store_scores(&mut out[j..], low, 4);
                    store_scores(&mut out[j + 4..], high, 4);
                    j += 8;
                    continue;
                }
                1 => {
                    let [[s]] = dots::<E, 1, 1>(q, keys, d, j);
                    store_scores(&mut out[j..], s, n - j);
                }
                2 => {
                    for (i, [s]) in dots::<E, 2, 1>(q, keys, d, j).into_iter().enumerate() {
                        store_scores(&mut out[i * stride + j..], s, n - j);
                    }
                }
                _ => {
                    for (i, [s]) in dots::<E, 3, 1>(q, keys, d, j).into_iter().enumerate() {
                        store_scores(&mut out[i * stride + j..], s, n - j);
                    }
                }
            }
            j += 4;
        }
        r += block;
    }
}

/// Rows of the next register block of so many: four are two and two, for a row alone costs as much
/// as two.
fn next_block(rows: usize) -> usize {
    match rows {
        4 => 2,
        _ => BLOCK_ROWS.min(rows),
    }
}

/// Whether elements of this type come straight from memory: where many rows share them, they have
/// been widened into the cache before.
const fn streams<E>() -> bool {
    size_of::<E>() == 2
}

/// The products of `R` queries with `F` times four keys from the one at `j` on, four to a vector;
/// behind the last key comes the last key again. Each goes through the elements in vectors of
/// eight, and adds up their lanes in one order.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn dots<E: Element, const R: usize, const F: usize>(
    q: &[f32],
    keys: &[E],
    d: usize,
    j: usize,
) -> [[__m128; F]; R] {
    // Slices of `vectors` elements each, so that the loop needs no check.
    let vectors = d / LANES;
    let last = keys.len() / d - 1;
    let mut q_vectors = [&[][..]; R];
    for r in 0..R {
        q_vectors[r] = &q[r * d..][..d].as_chunks::<LANES>().0[..vectors];
    }
    let mut k_vectors = [[&[][..]; 4]; F];
    for (four, j) in k_vectors.iter_mut().zip((j..).step_by(4)) {
        for (key, j) in four.iter_mut().zip(j..) {
            let row = &keys[j.min(last) * d..][..d];
            *key = &row.as_chunks::<LANES>().0[..vectors];
        }
    }
    let ahead = keys[j * d..].as_ptr().wrapping_add(4 * F * d);
    let mut sums = [[[_mm256_setzero_ps(); 4]; F]; R];
    for c in 0..vectors {
        if R == 1 || streams::<E>() {
            // The keys of the next call, as many lines as this step reads.
            prefetch(ahead, c * LANES * 4 * F, LANES * 4 * F);
        }
        let mut q = [_mm256_setzero_ps(); R];
        for r in 0..R {
            // SAFETY: this function is compiled with the features.
            q[r] = unsafe { f32::load(&q_vectors[r][c]) };
        }
        for f in 0..F {
            for i in 0..4 {
                // SAFETY: this function is compiled with the features.
                let k = unsafe { E::load(&k_vectors[f][i][c]) };
                for r in 0..R {
                    sums[r][f][i] = _mm256_fmadd_ps(k, q[r], sums[r][f][i]);
                }
            }
        }
    }
    let mut out = [[_mm_setzero_ps(); F]; R];
    for r in 0..R {
        for f in 0..F {
            out[r][f] = add_lanes(sums[r][f]);
        }
    }
    out
}

/// The sum of each vector's lanes.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn add_lanes([a, b, c, d]: [__m256; 4]) -> __m128 {
    let sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_add_ps(
        _mm256_castps256_ps128(sums),
        _mm256_extractf128_ps::<1>(sums),
    )
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn store_scores(out: &mut [f32], four: __m128, wanted: usize) {
    // SAFETY: both types are four f32 in the same order, and any bits are valid in them.
    let four = unsafe { transmute::<__m128, [f32; 4]>(four) };
    if let Some(out) = out.first_chunk_mut().filter(|_| wanted >= 4) {
        *out = four;
    } else {
        out[..wanted].copy_from_slice(&four[..wanted]);
    }
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
        max = _mm256_max_ps(load(scores), max);
    }
    let lanes = store(max);
    let max = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
    // Where all are -inf any finite number gives exponentials of 0.
    let shift = if max == f32::NEG_INFINITY { 0.0 } else { max };
    let shift = _mm256_set1_ps(shift);
    let mut sum = _mm256_setzero_ps();
    for scores in vectors {
        let e = exp(_mm256_sub_ps(load(scores), shift));
        sum = _mm256_add_ps(sum, e);
        *scores = store(e);
    }
    let [a, b, c, d, e, f, g, h] = store(sum);
    (max, ((a + e) + (c + g)) + ((b + f) + (d + h)))
}

/// `e^x`, within 1.2e-7 of it relatively for x from -87.3 to 88.3; 0 below, infinity above.
///
/// `e^x = 2^n e^r` with n the nearest integer to `x / ln 2`, and `e^r` by a polynomial: `1 + r +
/// r² p(r)`, p of degree 4, whose largest relative error for `|r| <= ln 2 / 2` is smallest
/// (fitted by Lawson's iteration).
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn exp(x: __m256) -> __m256 {
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
    const HIGHEST: f32 = 88.3;

    // Of a NaN and a number both instructions return the second operand.
    let clamped = _mm256_min_ps(
        _mm256_set1_ps(HIGHEST),
        _mm256_max_ps(_mm256_set1_ps(LOWEST), x),
    );
    let n = _mm256_mul_ps(clamped, _mm256_set1_ps(std::f32::consts::LOG2_E));
    let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(n);
    let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(LN_2_HIGH), clamped);
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
    let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    let power = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent));
    let e = _mm256_mul_ps(p, power);
    let in_range = _mm256_cmp_ps::<_CMP_NLT_UQ>(x, _mm256_set1_ps(LOWEST));
    let above = _mm256_cmp_ps::<_CMP_GT_OQ>(x, _mm256_set1_ps(HIGHEST));
    let e = _mm256_and_ps(e, in_range);
    _mm256_blendv_ps(e, _mm256_set1_ps(f32::INFINITY), above)
}

#[target_feature(enable = "avx2,fma,f16c")]
fn weighted_sum<E: Element>(
    weights: &[f32],
    stride: usize,
    values: &[E],
    d: usize,
    acc: &mut [f32],
) {
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

/// Vectors `first..first + C` of [`weighted_sum`] for `R` rows; returns `C`.
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
            sums[r][c] = load(&acc[r * per_row + first + c]);
        }
    }
    for (j, row) in values.chunks_exact(per_row).take(n).enumerate() {
        if (R == 1 || streams::<E>()) && first == 0 {
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
            acc[r * per_row + first + c] = store(sums[r][c]);
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
        *out = store(unsafe { u16::load(halves) });
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
        let x = load(values);
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

// By value rather than by the intrinsics that take pointers, as in `avx2.rs`.

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn load(eight: &[f32; LANES]) -> __m256 {
    // SAFETY: this function is compiled with the features.
    unsafe { f32::load(eight) }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn store(vector: __m256) -> [f32; LANES] {
    // SAFETY: both types are eight f32 in the same order, and any bits are valid in them.
    unsafe { transmute::<__m256, [f32; LANES]>(vector) }
}
