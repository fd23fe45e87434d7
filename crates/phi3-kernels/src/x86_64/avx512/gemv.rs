//! Products of weights in blocks of 256 with one token or two, read once and in order: as in
//! [`gemv`](crate::x86_64::gemv), with fewer instructions.
//!
//! Blocks of 32 are better left to AVX2: their pairs of weights lie across the lines of the cache that
//! vectors of 512 bits would be read from, which takes longer than it saves.

#![expect(
    clippy::needless_range_loop,
    reason = "one index into several arrays; closures in iterators would lose the target features"
)]

use std::arch::x86_64::*;

use super::vector::{load, or_masked};
use crate::MatrixRef;
use crate::activations::Quantized;
use crate::x86_64::blocks::{Q5_K, Q6_K, array, factors, factors_at, has_minimum, offset_shift};
use crate::x86_64::gemv::{MAX_TOKENS, PREFETCH, each_row, in_order};
use crate::x86_64::layouts::{LANES, Layouts, Superblock};
use crate::x86_64::panel::groups_of_32;
use crate::x86_64::vector::{load as load_32, load_f32 as load_eight, prefetch, sum_each};

/// [`int8_rows`](super::int8_rows) of Q4_K, Q5_K, Q6_K and INT4.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
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
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
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
        // Both factors of a block; zeros where there are fewer than eight.
        let mut both = [0; LANES];
        for i in 0..len {
            prefetch::<_MM_HINT_NTA>(&blocks[i], PREFETCH);
            both[i] = i32::from_le_bytes(*array(&blocks[i], factors_at(ID, BYTES).0));
            let weights = SuperWeights::new::<ID, BYTES>(&blocks[i]);
            for t in 0..T {
                (a[t][i], b[t][i]) = weights.times::<ID>(&tokens[t][i]);
                scales[t][i] = tokens[t][i].scale;
            }
        }
        let (mut d, mut dmin) = both_factors(load_32(&both));
        if factors_at(ID, BYTES).1 {
            (d, dmin) = (dmin, d);
        }
        for t in 0..T {
            let scales = load_eight(&scales[t]);
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

/// The numbers in half precision in the lower words, and those in the upper.
#[target_feature(enable = "avx512f,avx512vl,avx2,f16c")]
#[inline]
fn both_factors(both: __m256i) -> (__m256, __m256) {
    let upper = _mm256_srli_epi32::<16>(both);
    (
        _mm256_cvtph_ps(_mm256_cvtepi32_epi16(both)),
        _mm256_cvtph_ps(_mm256_cvtepi32_epi16(upper)),
    )
}

/// A block of 256.
struct SuperWeights {
    /// In order.
    q: [__m512i; 4],
    /// What pairs of sums in sixteen bits are multiplied with: those of the first and the second 64
    /// weights in turn, and those of the third and the fourth.
    scales: [__m512i; 2],
    /// As in [`factors`]; of types with an offset what the sums of activations are multiplied with.
    minima: __m256i,
}

impl SuperWeights {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2")]
    #[inline]
    fn new<const ID: u32, const BYTES: usize>(block: &[u8; BYTES]) -> Self {
        let q = superblock::<ID, BYTES>(block);
        let (factors, minima) = factors::<ID, BYTES>(block);
        let wide = _mm512_castsi256_si512(factors);
        let scales = [
            _mm512_permutexvar_epi16(load(&scales_at::<ID>(0)), wide),
            _mm512_permutexvar_epi16(load(&scales_at::<ID>(8)), wide),
        ];
        let minima = match offset_shift(ID) {
            Some(shift) => {
                let offset = _mm256_sll_epi16(factors, _mm_cvtsi32_si128(shift));
                _mm256_sub_epi16(_mm256_setzero_si256(), offset)
            }
            None => minima,
        };
        Self { q, scales, minima }
    }

    /// The integer parts of the products with one token, each in eight addends.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2")]
    #[inline]
    fn times<const ID: u32>(&self, x: &Superblock) -> (__m256i, __m256i) {
        let zero = _mm512_setzero_si512();
        let mut products = [zero; 4];
        let (values, _) = x.values.as_flattened().as_chunks::<64>();
        for i in 0..4 {
            // Of four products each, which fit sixteen bits: 4 * 63 * 127 = 32,004.
            products[i] = _mm512_dpbusd_epi32(zero, self.q[i], load(&values[i]));
        }
        let minima = _mm256_madd_epi16(self.minima, load_32(&x.sums));
        let mut a = zero;
        if offset_shift(ID).is_some() {
            a = _mm512_zextsi256_si512(minima);
        }
        for i in 0..2 {
            let words = _mm512_packs_epi32(products[2 * i], products[2 * i + 1]);
            a = _mm512_dpwssd_epi32(a, words, self.scales[i]);
        }
        let halves = (_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64::<1>(a));
        (_mm256_add_epi32(halves.0, halves.1), minima)
    }
}

/// Where [`factors`] has the scale for each word of packed sums of the groups of sixteen from `first`
/// on: four words of one, four of the group four behind it.
const fn scales_at<const ID: u32>(first: usize) -> [i16; 32] {
    let mut at = [0; 32];
    let mut i = 0;
    while i < 32 {
        let group = first + i / 8 + i % 8 / 4 * 4;
        at[i] = if groups_of_32(ID) {
            group / 2
        } else {
            group / 2 + group % 2 * 8
        } as i16;
        i += 1;
    }
    at
}

/// The weight bytes of a block of 256, in order.
#[target_feature(enable = "avx512f,avx512bw,avx2")]
#[inline]
fn superblock<const ID: u32, const BYTES: usize>(block: &[u8; BYTES]) -> [__m512i; 4] {
    let mask = _mm512_set1_epi8(15);
    let mut q = [_mm512_setzero_si512(); 4];
    if ID == Q6_K {
        let two = _mm512_set1_epi8(0x30);
        for i in 0..2 {
            let low = load(array::<64>(block, 64 * i));
            let high = _mm512_broadcast_i64x4(load_32(array::<32>(block, 128 + 32 * i)));
            let first = _mm512_sllv_epi16(high, halves(4, 2));
            let second = _mm512_srlv_epi16(high, halves(0, 2));
            q[2 * i] = or_masked(_mm512_and_si512(low, mask), first, two);
            let low = _mm512_and_si512(_mm512_srli_epi16::<4>(low), mask);
            q[2 * i + 1] = or_masked(low, second, two);
        }
        return q;
    }
    let at = BYTES - 128;
    for i in 0..4 {
        let both = _mm512_broadcast_i64x4(load_32(array::<32>(block, at + 32 * i)));
        q[i] = _mm512_and_si512(_mm512_srlv_epi16(both, halves(0, 4)), mask);
        if ID == Q5_K {
            let bits = _mm512_broadcast_i64x4(load_32(array::<32>(block, at - 32)));
            let left = _mm512_slli_epi16::<4>(_mm512_and_si512(
                _mm512_srlv_epi16(bits, halves(2 * i as i16, 2 * i as i16 + 1)),
                _mm512_set1_epi8(1),
            ));
            q[i] = _mm512_or_si512(q[i], left);
        }
    }
    q
}

/// `low` in the words of the lower half, `high` in those of the upper.
#[target_feature(enable = "avx512f,avx2")]
#[inline]
fn halves(low: i16, high: i16) -> __m512i {
    let low = _mm512_castsi256_si512(_mm256_set1_epi16(low));
    _mm512_inserti64x4::<1>(low, _mm256_set1_epi16(high))
}
