//! Products of quantized weights with one or a few tokens, read once and in order.

#![expect(
    clippy::needless_range_loop,
    reason = "one index into several arrays; closures in iterators would lose the target features"
)]

use std::arch::x86_64::*;

use super::blocks::{
    factors, half_factors, has_minimum, is_signed, offset_shift, pair, sums_in_i16, superblock,
};
use super::layouts::{LANES, Layouts, Octet, Superblock};
use super::vector::{from_f16, load, load_f32, prefetch, store_f32, sum_each, sum_halves};
use crate::MatrixRef;
use crate::activations::Quantized;

/// How far ahead of their use weights are asked for, in bytes.
const PREFETCH: usize = 2048;

/// [`scalar::int8_rows`](crate::scalar::int8_rows) for types with blocks of 32.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn rows<const ID: u32, const BYTES: usize>(
    x: &Quantized,
    w: MatrixRef<'_>,
    first_row: usize,
    out: &mut [&mut [f32]],
) {
    let octets = x.groups().div_ceil(LANES);
    let x = Layouts::octets(x);
    let rows = out.first().map_or(0, |out| out.len());
    for i in 0..rows {
        let row = w.row(first_row + i);
        for (t, out) in out.iter_mut().enumerate() {
            out[i] = row_dot::<ID, BYTES>(row, &x[t * octets..][..octets]);
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn row_dot<const ID: u32, const BYTES: usize>(row: &[u8], x: &[Octet]) -> f32 {
    let (octets, rest) = row.as_chunks::<BYTES>().0.as_chunks::<LANES>();
    let mut lanes = _mm256_setzero_ps();
    let whole = &x[..octets.len()];
    for i in 0..octets.len() {
        prefetch::<_MM_HINT_T0>(octets[i].as_flattened(), PREFETCH);
        lanes = octet::<ID, BYTES>(&octets[i], &whole[i], lanes);
    }
    if let ([_, ..], Some(x)) = (rest, x.last()) {
        let mut blocks = [[0; BYTES]; LANES];
        blocks[..rest.len()].copy_from_slice(rest);
        lanes = octet::<ID, BYTES>(&blocks, x, lanes);
    }
    in_order(lanes)
}

/// Eight blocks, a lane each.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn octet<const ID: u32, const BYTES: usize>(
    blocks: &[[u8; BYTES]; LANES],
    x: &Octet,
    lanes: __m256,
) -> __m256 {
    let ones = _mm256_set1_epi16(1);
    let mut sums = [_mm256_setzero_si256(); 4];
    for i in 0..4 {
        let [first, second] = pair::<ID, BYTES>(&blocks[i], &blocks[i + 4]);
        let (x_first, x_second) = (load(&x.values[i][0]), load(&x.values[i][1]));
        sums[i] = if is_signed(ID) {
            let first = _mm256_madd_epi16(signed_products(first, x_first), ones);
            let second = _mm256_madd_epi16(signed_products(second, x_second), ones);
            _mm256_add_epi32(first, second)
        } else {
            _mm256_add_epi16(
                _mm256_maddubs_epi16(first, x_first),
                _mm256_maddubs_epi16(second, x_second),
            )
        };
    }
    let mut a = if sums_in_i16(ID) == 8 {
        // Sums of sixteen products stay below 2^15: pairs of vectors become one before they
        // are widened.
        let ab = _mm256_castsi256_ps(merge_pairs(sums[0], sums[1]));
        let cd = _mm256_castsi256_ps(merge_pairs(sums[2], sums[3]));
        let even = _mm256_castps_si256(_mm256_shuffle_ps::<0x88>(ab, cd));
        let odd = _mm256_castps_si256(_mm256_shuffle_ps::<0xdd>(ab, cd));
        _mm256_madd_epi16(_mm256_add_epi16(even, odd), ones)
    } else {
        if !is_signed(ID) {
            for sum in &mut sums {
                *sum = _mm256_madd_epi16(*sum, ones);
            }
        }
        sum_halves(sums)
    };
    let x_sums = load(&x.sums);
    if let Some(shift) = offset_shift(ID) {
        let shift = _mm_cvtsi32_si128(shift);
        a = _mm256_sub_epi32(a, _mm256_sll_epi32(x_sums, shift));
    }
    let scales = load_f32(&x.scales);
    let (mut d, mut m) = ([0; LANES], [0; LANES]);
    for i in 0..LANES {
        (d[i], m[i]) = half_factors::<ID, BYTES>(&blocks[i]);
    }
    let d = from_f16(d);
    let lanes = _mm256_fmadd_ps(_mm256_mul_ps(d, scales), _mm256_cvtepi32_ps(a), lanes);
    if !has_minimum(ID) {
        return lanes;
    }
    let m = from_f16(m);
    _mm256_fmadd_ps(_mm256_mul_ps(m, scales), _mm256_cvtepi32_ps(x_sums), lanes)
}

/// Sums of two products of signed bytes. The largest, 2 * 128 * 127, fits i16.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn signed_products(w: __m256i, x: __m256i) -> __m256i {
    _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w))
}

/// In each half the eight i16 of `a` summed to four, then those of `b`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn merge_pairs(a: __m256i, b: __m256i) -> __m256i {
    _mm256_add_epi16(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b))
}

/// [`scalar::int8_rows`](crate::scalar::int8_rows) for types with blocks of 256.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn super_rows<const ID: u32, const BYTES: usize>(
    x: &Quantized,
    w: MatrixRef<'_>,
    first_row: usize,
    out: &mut [&mut [f32]],
) {
    let groups = x.groups();
    let x = Layouts::superblocks(x);
    let rows = out.first().map_or(0, |out| out.len());
    for i in 0..rows {
        let row = w.row(first_row + i);
        for (t, out) in out.iter_mut().enumerate() {
            out[i] = super_row_dot::<ID, BYTES>(row, &x[t * groups..][..groups]);
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn super_row_dot<const ID: u32, const BYTES: usize>(row: &[u8], x: &[Superblock]) -> f32 {
    let mut lanes = _mm256_setzero_ps();
    let blocks = row.as_chunks::<BYTES>().0;
    for first in (0..blocks.len()).step_by(LANES) {
        let len = LANES.min(blocks.len() - first);
        let (blocks, x) = (&blocks[first..][..len], &x[first..][..len]);
        let mut a = [_mm256_setzero_si256(); LANES];
        let mut b = [_mm256_setzero_si256(); LANES];
        let (mut d, mut dmin) = ([0; LANES], [0; LANES]);
        let mut scales = [0.0; LANES];
        for i in 0..len {
            prefetch::<_MM_HINT_T0>(&blocks[i], PREFETCH);
            (a[i], b[i]) = integers::<ID, BYTES>(&blocks[i], &x[i]);
            (d[i], dmin[i]) = half_factors::<ID, BYTES>(&blocks[i]);
            scales[i] = x[i].scale;
        }
        let scales = load_f32(&scales);
        let a = _mm256_cvtepi32_ps(sum_each(&a));
        lanes = _mm256_fmadd_ps(_mm256_mul_ps(from_f16(d), scales), a, lanes);
        if has_minimum(ID) {
            let b = _mm256_cvtepi32_ps(sum_each(&b));
            lanes = _mm256_fnmadd_ps(_mm256_mul_ps(from_f16(dmin), scales), b, lanes);
        }
    }
    in_order(lanes)
}

/// The integer parts of a block, each in eight addends.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn integers<const ID: u32, const BYTES: usize>(
    block: &[u8; BYTES],
    x: &Superblock,
) -> (__m256i, __m256i) {
    let q = superblock::<ID, BYTES>(block);
    let (scales, minima) = factors::<ID, BYTES>(block);
    let mut a = _mm256_setzero_si256();
    for i in 0..8 {
        let products = _mm256_maddubs_epi16(q[i], load(&x.values[i]));
        // Scale i of either half in all of that half.
        let index = _mm256_set1_epi16(0x0100 + 0x0202 * i as i16);
        let scale = _mm256_shuffle_epi8(scales, index);
        a = _mm256_add_epi32(a, _mm256_madd_epi16(products, scale));
    }
    let sums = load(&x.sums);
    if let Some(shift) = offset_shift(ID) {
        let offset = _mm256_madd_epi16(scales, sums);
        a = _mm256_sub_epi32(a, _mm256_sll_epi32(offset, _mm_cvtsi32_si128(shift)));
    }
    (a, _mm256_madd_epi16(minima, sums))
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn in_order(lanes: __m256) -> f32 {
    let mut sum = 0.0;
    for lane in store_f32(lanes) {
        sum += lane;
    }
    sum
}
