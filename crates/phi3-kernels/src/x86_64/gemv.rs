//! Products of quantized weights with one to four tokens, read once and in order.

#![expect(
    clippy::needless_range_loop,
    reason = "one index into several arrays; closures in iterators would lose the target features"
)]

use std::arch::x86_64::*;

use super::blocks::{
    INT4, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, eight_factors, factors, has_minimum, is_signed,
    offset_shift, pair, sums_in_i16, superblock,
};
use super::layouts::{LANES, Layouts, Octet, Superblock};
use super::vector::{load, load_f32, prefetch, store_f32, sum_each, sum_halves};
use crate::MatrixRef;
use crate::activations::Quantized;

/// How far ahead of their use weights are asked for, in bytes: as what is read once, which keeps them
/// out of the larger caches. On Zen 4 asking the usual way is slower than not asking.
pub(super) const PREFETCH: usize = 4096;

/// The most tokens that share a block in registers.
pub(super) const MAX_TOKENS: usize = 4;

/// How many tokens take less time here than with weights that are unpacked and turned, of a type.
pub(super) const fn max_tokens(id: u32) -> usize {
    match id {
        // Their bytes are unpacked fastest.
        Q2_K | Q4_K => 2,
        Q3_K | Q5_K | Q6_K | INT4 => 3,
        _ => MAX_TOKENS,
    }
}

/// Calls `$dots` for every row, with one to four tokens, whose layout is `$each` elements a token.
macro_rules! each_row {
    ($dots:ident::<$id:ident, $bytes:ident>, $x:ident, $each:ident, $w:ident, $first_row:ident, $out:ident) => {
        let rows = $out.first().map_or(0, |out| out.len());
        assert!($out.len() <= MAX_TOKENS, "at most four tokens");
        for i in 0..rows {
            let row = $w.row($first_row + i);
            let mut sums = [0.0; MAX_TOKENS];
            match $out.len() {
                1 => sums[..1].copy_from_slice(&$dots::<$id, $bytes, 1>(row, $x, $each)),
                2 => sums[..2].copy_from_slice(&$dots::<$id, $bytes, 2>(row, $x, $each)),
                3 => sums[..3].copy_from_slice(&$dots::<$id, $bytes, 3>(row, $x, $each)),
                _ => sums = $dots::<$id, $bytes, 4>(row, $x, $each),
            }
            for (out, sum) in $out.iter_mut().zip(sums) {
                out[i] = sum;
            }
        }
    };
}
pub(super) use each_row;

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
    each_row!(row_dots::<ID, BYTES>, x, octets, w, first_row, out);
}

/// A row times `T` tokens of `each` octets.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn row_dots<const ID: u32, const BYTES: usize, const T: usize>(
    row: &[u8],
    x: &[Octet],
    each: usize,
) -> [f32; T] {
    let (octets, rest) = row.as_chunks::<BYTES>().0.as_chunks::<LANES>();
    let mut tokens = [&[][..]; T];
    for t in 0..T {
        tokens[t] = &x[t * each..][..octets.len()];
    }
    let mut lanes = [_mm256_setzero_ps(); T];
    for i in 0..octets.len() {
        prefetch::<_MM_HINT_NTA>(octets[i].as_flattened(), PREFETCH);
        let weights = Weights::new::<ID, BYTES>(&octets[i]);
        for t in 0..T {
            lanes[t] = weights.times::<ID>(&tokens[t][i], lanes[t]);
        }
    }
    if !rest.is_empty() {
        let mut blocks = [[0; BYTES]; LANES];
        blocks[..rest.len()].copy_from_slice(rest);
        let weights = Weights::new::<ID, BYTES>(&blocks);
        for t in 0..T {
            lanes[t] = weights.times::<ID>(&x[t * each + octets.len()], lanes[t]);
        }
    }
    in_order(lanes)
}

/// Eight blocks, a lane each.
struct Weights {
    q: [[__m256i; 2]; 4],
    d: __m256,
    m: __m256,
}

impl Weights {
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn new<const ID: u32, const BYTES: usize>(blocks: &[[u8; BYTES]; LANES]) -> Self {
        let mut q = [[_mm256_setzero_si256(); 2]; 4];
        for i in 0..4 {
            q[i] = pair::<ID, BYTES>(&blocks[i], &blocks[i + 4]);
        }
        let (d, m) = eight_factors::<ID, BYTES>(blocks.each_ref());
        Self { q, d, m }
    }

    /// Adds the products with one token to `lanes`.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn times<const ID: u32>(&self, x: &Octet, lanes: __m256) -> __m256 {
        let ones = _mm256_set1_epi16(1);
        let mut sums = [_mm256_setzero_si256(); 4];
        for i in 0..4 {
            let [first, second] = self.q[i];
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
        let d = _mm256_mul_ps(self.d, scales);
        let lanes = _mm256_fmadd_ps(d, _mm256_cvtepi32_ps(a), lanes);
        if !has_minimum(ID) {
            return lanes;
        }
        let m = _mm256_mul_ps(self.m, scales);
        _mm256_fmadd_ps(m, _mm256_cvtepi32_ps(x_sums), lanes)
    }
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
    each_row!(super_row_dots::<ID, BYTES>, x, groups, w, first_row, out);
}

/// A row times `T` tokens of `each` superblocks.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn super_row_dots<const ID: u32, const BYTES: usize, const T: usize>(
    row: &[u8],
    x: &[Superblock],
    each: usize,
) -> [f32; T] {
    let mut lanes = [_mm256_setzero_ps(); T];
    let blocks = row.as_chunks::<BYTES>().0;
    for first in (0..blocks.len()).step_by(LANES) {
        let len = LANES.min(blocks.len() - first);
        let blocks = &blocks[first..][..len];
        let mut tokens = [&[][..]; T];
        for t in 0..T {
            tokens[t] = &x[t * each + first..][..len];
        }
        let mut a = [[_mm256_setzero_si256(); LANES]; T];
        let mut b = [[_mm256_setzero_si256(); LANES]; T];
        let mut scales = [[0.0; LANES]; T];
        for i in 0..len {
            prefetch::<_MM_HINT_NTA>(&blocks[i], PREFETCH);
            let weights = SuperWeights::new::<ID, BYTES>(&blocks[i]);
            for t in 0..T {
                (a[t][i], b[t][i]) = weights.times::<ID>(&tokens[t][i]);
                scales[t][i] = tokens[t][i].scale;
            }
        }
        // Those of the last block again, times zero, where there are fewer than eight.
        let eight = std::array::from_fn(|i| &blocks[i.min(len - 1)]);
        let (d, dmin) = eight_factors::<ID, BYTES>(eight);
        for t in 0..T {
            let scales = load_f32(&scales[t]);
            let a = _mm256_cvtepi32_ps(sum_each(&a[t]));
            lanes[t] = _mm256_fmadd_ps(_mm256_mul_ps(d, scales), a, lanes[t]);
            if has_minimum(ID) {
                let b = _mm256_cvtepi32_ps(sum_each(&b[t]));
                lanes[t] = _mm256_fnmadd_ps(_mm256_mul_ps(dmin, scales), b, lanes[t]);
            }
        }
    }
    in_order(lanes)
}

/// A block of 256.
struct SuperWeights {
    q: [__m256i; 8],
    /// Scale i of either half in all of that half.
    scales: [__m256i; 8],
    /// What the sums of activations are multiplied with: minima, or scales.
    minima: __m256i,
}

impl SuperWeights {
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn new<const ID: u32, const BYTES: usize>(block: &[u8; BYTES]) -> Self {
        let q = superblock::<ID, BYTES>(block);
        let (factors, minima) = factors::<ID, BYTES>(block);
        let mut scales = [_mm256_setzero_si256(); 8];
        for i in 0..8 {
            let index = _mm256_set1_epi16(0x0100 + 0x0202 * i as i16);
            scales[i] = _mm256_shuffle_epi8(factors, index);
        }
        let minima = match offset_shift(ID) {
            Some(_) => factors,
            None => minima,
        };
        Self { q, scales, minima }
    }

    /// The integer parts of the products with one token, each in eight addends.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn times<const ID: u32>(&self, x: &Superblock) -> (__m256i, __m256i) {
        let mut a = _mm256_setzero_si256();
        for i in 0..8 {
            let products = _mm256_maddubs_epi16(self.q[i], load(&x.values[i]));
            a = _mm256_add_epi32(a, _mm256_madd_epi16(products, self.scales[i]));
        }
        let b = _mm256_madd_epi16(self.minima, load(&x.sums));
        match offset_shift(ID) {
            Some(shift) => {
                let offset = _mm256_sll_epi32(b, _mm_cvtsi32_si128(shift));
                (_mm256_sub_epi32(a, offset), _mm256_setzero_si256())
            }
            None => (a, b),
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn in_order<const T: usize>(lanes: [__m256; T]) -> [f32; T] {
    let mut sums = [0.0; T];
    for t in 0..T {
        for lane in store_f32(lanes[t]) {
            sums[t] += lane;
        }
    }
    sums
}
