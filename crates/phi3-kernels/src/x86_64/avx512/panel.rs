//! Blocks of sixteen rows, unpacked to bytes with a row to a lane.

#![expect(
    clippy::needless_range_loop,
    reason = "one index into several arrays; closures in iterators would lose the target features"
)]

use std::arch::x86_64::*;

use super::vector::{both_halves, load, or_masked, store, store_f32, transpose};
use crate::scalar::{IQ4_NL_VALUES, q3_k_scales};
use crate::x86_64::blocks::{
    IQ4_NL, Q2_K, Q3_K, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0, array, eight_factors, has_minimum,
    is_signed, offset_shift, quants_at, stored_at,
};
use crate::x86_64::layouts::OFFSETS;
use crate::x86_64::panel::groups_of_32;

/// Rows of a panel: the lanes of a vector.
pub(super) const PANEL_ROWS: usize = 16;

/// Four successive columns of the rows of a panel.
type Weights = [u8; 64];

/// One block of 32 of sixteen rows.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Panel {
    /// The stored weights, or signed ones with 128 added.
    pub(super) q: [Weights; 8],
    pub(super) d: [f32; 16],
    pub(super) m: [f32; 16],
}

pub(super) const EMPTY_PANEL: Panel = Panel {
    q: [[0; 64]; 8],
    d: [0.0; 16],
    m: [0.0; 16],
};

/// One block of 256 of sixteen rows.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct SuperPanel {
    pub(super) q: [[Weights; 8]; 8],
    pub(super) factors: Factors,
}

/// What the weights of a [`SuperPanel`] are multiplied with.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Factors {
    /// The scale of each group of sixteen; of groups of 32 eight scales.
    pub(super) scales: [[i32; 16]; 16],
    /// What the sums of activations are multiplied with, two successive groups to a lane: minima, or
    /// what is to be added for the offset of the bytes.
    pub(super) minima: [[i16; 32]; 8],
    pub(super) d: [f32; 16],
    pub(super) dmin: [f32; 16],
}

pub(super) const EMPTY_SUPER_PANEL: SuperPanel = SuperPanel {
    q: [[[0; 64]; 8]; 8],
    factors: NO_FACTORS,
};

pub(super) const NO_FACTORS: Factors = Factors {
    scales: [[0; 16]; 16],
    minima: [[0; 32]; 8],
    d: [0.0; 16],
    dmin: [0.0; 16],
};

/// Which of [`OFFSETS`] is to be subtracted from the bytes of a panel, if any.
pub(super) const fn offset(id: u32) -> Option<usize> {
    let shift = match (is_signed(id), offset_shift(id)) {
        (true, _) => 7,
        (false, Some(shift)) => shift as u32,
        (false, None) => return None,
    };
    let mut at = 0;
    while OFFSETS[at] != shift {
        at += 1;
    }
    Some(at)
}

#[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
#[inline]
pub(super) fn unpack<const ID: u32, const BYTES: usize>(
    blocks: [&[u8; BYTES]; PANEL_ROWS],
    panel: &mut Panel,
) {
    let q = columns::<ID, BYTES>(blocks);
    for i in 0..8 {
        store(q[i], &mut panel.q[i]);
    }
    let (d, m) = sixteen_factors::<ID, BYTES>(blocks);
    store_f32(d, &mut panel.d);
    if has_minimum(ID) {
        store_f32(m, &mut panel.m);
    }
}

/// The factors of blocks, and those of their minima; zeros where they have none.
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
#[inline]
pub(super) fn sixteen_factors<const ID: u32, const BYTES: usize>(
    blocks: [&[u8; BYTES]; PANEL_ROWS],
) -> (__m512, __m512) {
    let mut d = [_mm256_setzero_ps(); 2];
    let mut m = d;
    for half in 0..2 {
        let mut eight = [blocks[0]; 8];
        eight.copy_from_slice(&blocks[8 * half..][..8]);
        let (of_d, of_m) = eight_factors::<ID, BYTES>(eight);
        d[half] = of_d;
        if has_minimum(ID) {
            m[half] = of_m;
        }
    }
    (both_halves(d), both_halves(m))
}

/// The sixteen bytes from byte `at` on of each block, by fours.
#[target_feature(enable = "avx512f,avx2")]
#[inline]
fn fours<const BYTES: usize>(blocks: [&[u8; BYTES]; PANEL_ROWS], at: usize) -> [__m512i; 4] {
    let mut rows = [&[0; 16]; PANEL_ROWS];
    for i in 0..PANEL_ROWS {
        rows[i] = array(blocks[i], at);
    }
    transpose(rows)
}

/// The 32 bytes from byte `at` on of each block, by fours.
#[target_feature(enable = "avx512f,avx2")]
#[inline]
fn eights<const BYTES: usize>(blocks: [&[u8; BYTES]; PANEL_ROWS], at: usize) -> [__m512i; 8] {
    let [a, b, c, d] = fours(blocks, at);
    let [e, f, g, h] = fours(blocks, at + 16);
    [a, b, c, d, e, f, g, h]
}

/// The weight bytes of blocks of 32.
#[target_feature(enable = "avx512f,avx512bw,avx2")]
#[inline]
pub(super) fn columns<const ID: u32, const BYTES: usize>(
    blocks: [&[u8; BYTES]; PANEL_ROWS],
) -> [__m512i; 8] {
    let at = quants_at(ID);
    if ID == Q8_0 {
        let mut q = eights(blocks, at);
        for i in 0..8 {
            q[i] = _mm512_xor_si512(q[i], _mm512_set1_epi8(-128));
        }
        return q;
    }
    let packed = fours(blocks, at);
    let mut q = [_mm512_setzero_si512(); 8];
    for i in 0..4 {
        [q[i], q[i + 4]] = nibbles(packed[i]);
    }
    match ID {
        Q5_0 | Q5_1 => {
            let mut bits = [0; 16];
            for i in 0..16 {
                bits[i] = i32::from_le_bytes(*array(blocks[i], at - 4));
            }
            let bits = load(&bits);
            let dwords = _mm512_set4_epi32(0x0c0c_0c0c, 0x0808_0808, 0x0404_0404, 0);
            for i in 0..8 {
                // Bits 4i to 4i + 3 of a row go to the four bytes of its lane.
                let from = _mm512_set1_epi32(0x0101_0101 * (i as i32 / 2));
                let bytes = _mm512_shuffle_epi8(bits, _mm512_add_epi8(dwords, from));
                let bit = _mm512_set1_epi32(0x0804_0201 << (i % 2 * 4));
                let set = _mm512_test_epi8_mask(bytes, bit);
                let fifth = _mm512_maskz_set1_epi8(set, 16);
                q[i] = _mm512_or_si512(q[i], fifth);
            }
        }
        IQ4_NL => {
            for i in 0..8 {
                q[i] = _mm512_shuffle_epi8(iq4_nl_table(), q[i]);
            }
        }
        _ => {}
    }
    q
}

/// The values of IQ4_NL with 128 added.
#[target_feature(enable = "avx512f,avx2")]
#[inline]
fn iq4_nl_table() -> __m512i {
    const VALUES: [u8; 16] = {
        let mut values = [0; 16];
        let mut i = 0;
        while i < 16 {
            values[i] = (IQ4_NL_VALUES[i] as i8).cast_unsigned() ^ 0x80;
            i += 1;
        }
        values
    };
    _mm512_broadcast_i32x4(crate::x86_64::vector::load_16(&VALUES))
}

/// The low halves of bytes, and the high ones.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn nibbles(bytes: __m512i) -> [__m512i; 2] {
    let mask = _mm512_set1_epi8(15);
    [
        _mm512_and_si512(bytes, mask),
        _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), mask),
    ]
}

#[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
#[inline]
pub(super) fn unpack_super<const ID: u32, const BYTES: usize>(
    blocks: [&[u8; BYTES]; PANEL_ROWS],
    panel: &mut SuperPanel,
) {
    let high = High::new::<ID, BYTES>(blocks);
    for i in 0..lows(ID) {
        let low = low::<ID, BYTES>(blocks, i);
        for k in 0..8 / lows(ID) {
            let g = group(ID, i, k);
            let q = high.with::<ID>(low, k, g);
            for c in 0..8 {
                store(q[c], &mut panel.q[g][c]);
            }
        }
    }
    unpack_factors::<ID, BYTES>(blocks, &mut panel.factors);
}

/// How many of the [stored](stored_at) vectors hold the low bits of weights, each those of as many groups
/// of 32.
pub(super) const fn lows(id: u32) -> usize {
    match id {
        Q2_K | Q3_K => 2,
        _ => 4,
    }
}

/// The group whose low bits are the `k`th ones of stored vector `i`.
pub(super) const fn group(id: u32, i: usize, k: usize) -> usize {
    match id {
        Q6_K => i / 2 * 4 + i % 2 + 2 * k,
        _ => i * (8 / lows(id)) + k,
    }
}

/// Stored vector `i` of low bits, by four weights of each row.
#[target_feature(enable = "avx512f,avx2")]
#[inline]
pub(super) fn low<const ID: u32, const BYTES: usize>(
    blocks: [&[u8; BYTES]; PANEL_ROWS],
    i: usize,
) -> [__m512i; 8] {
    eights(blocks, stored_at(ID)[i])
}

/// The stored vectors of high bits, by four weights of each row.
pub(super) struct High([[__m512i; 8]; 2]);

impl High {
    #[target_feature(enable = "avx512f,avx2")]
    #[inline]
    pub(super) fn new<const ID: u32, const BYTES: usize>(
        blocks: [&[u8; BYTES]; PANEL_ROWS],
    ) -> Self {
        let mut high = [[_mm512_setzero_si512(); 8]; 2];
        for i in lows(ID)..stored_at(ID).len() {
            high[i - lows(ID)] = eights(blocks, stored_at(ID)[i]);
        }
        Self(high)
    }

    /// The weight bytes of group `g`, whose low bits are the `k`th of `low`.
    #[target_feature(enable = "avx512f,avx512bw")]
    #[inline]
    pub(super) fn with<const ID: u32>(
        &self,
        low: [__m512i; 8],
        k: usize,
        g: usize,
    ) -> [__m512i; 8] {
        let bits = lows(ID);
        let mut q = low;
        for c in 0..8 {
            q[c] = _mm512_and_si512(right(low[c], bits * k), _mm512_set1_epi8((1 << bits) - 1));
            let (high, from, to, mask) = match ID {
                Q5_K => (self.0[0][c], g, 4, 16),
                Q6_K => (self.0[g / 4][c], 2 * (g % 4), 4, 48),
                Q3_K => (self.0[0][c], g, 2, 4),
                _ => continue,
            };
            let high = _mm512_sll_epi16(right(high, from), _mm_cvtsi32_si128(to));
            q[c] = or_masked(q[c], high, _mm512_set1_epi8(mask));
        }
        q
    }
}

/// Words shifted; bits of one byte get into the other.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn right(words: __m512i, bits: usize) -> __m512i {
    _mm512_srl_epi16(words, _mm_cvtsi32_si128(bits as i32))
}

#[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
#[inline]
pub(super) fn unpack_factors<const ID: u32, const BYTES: usize>(
    blocks: [&[u8; BYTES]; PANEL_ROWS],
    factors: &mut Factors,
) {
    let (d, dmin) = sixteen_factors::<ID, BYTES>(blocks);
    store_f32(d, &mut factors.d);
    store_f32(dmin, &mut factors.dmin);
    // Four scales to a dword, and four minima.
    let mut scales = [_mm512_setzero_si512(); 4];
    let mut minima = scales;
    match ID {
        Q4_K | Q5_K => {
            // Behind both factors lie twelve bytes: of the first eight 6 bits are a scale or a
            // minimum, the others are the upper bits of the second four of each.
            let [_, low, mins, high] = fours(blocks, 0);
            [scales[0], scales[1]] = six_bits(low, high);
            [minima[0], minima[1]] = six_bits(mins, _mm512_srli_epi32::<4>(high));
        }
        Q2_K => {
            let packed = fours(blocks, 0);
            for i in 0..4 {
                [scales[i], minima[i]] = nibbles(packed[i]);
            }
        }
        Q3_K => {
            let mut unpacked = [[0; 16]; PANEL_ROWS];
            for i in 0..PANEL_ROWS {
                unpacked[i] = q3_k_scales(array(blocks[i], 96)).map(i8::cast_unsigned);
            }
            scales = transpose(unpacked.each_ref());
        }
        Q6_K => scales = fours(blocks, 192),
        _ => scales = [_mm512_set1_epi8(1); 4],
    }
    let count = if groups_of_32(ID) { 8 } else { 16 };
    for g in 0..count {
        // Signed bytes, or smaller than 64.
        let left = _mm_cvtsi32_si128(24 - 8 * (g % 4) as i32);
        let scale = _mm512_srai_epi32::<24>(_mm512_sll_epi32(scales[g / 4], left));
        store(scale, &mut factors.scales[g]);
    }
    for pair in 0..count / 2 {
        let bytes = if offset_shift(ID).is_some() {
            scales[pair / 2]
        } else {
            minima[pair / 2]
        };
        // Bytes 0 and 1, or 2 and 3, of a lane to the upper halves of its words.
        let first = 0x0100_0000 * (2 * (pair % 2) as i32 + 1) + 0x0100 * (2 * (pair % 2) as i32);
        let dwords = _mm512_set4_epi32(0x0c00_0c00, 0x0800_0800, 0x0400_0400, 0);
        let from = _mm512_or_si512(
            _mm512_add_epi8(dwords, _mm512_set1_epi32(first)),
            _mm512_set1_epi32(0x0080_0080),
        );
        let words = _mm512_shuffle_epi8(bytes, from);
        let words = _mm512_srai_epi16::<8>(words);
        let words = match offset_shift(ID) {
            Some(shift) => {
                let offset = _mm512_sll_epi16(words, _mm_cvtsi32_si128(shift));
                _mm512_sub_epi16(_mm512_setzero_si512(), offset)
            }
            None => words,
        };
        store(words, &mut factors.minima[pair]);
    }
}

/// Eight numbers of six bits: four as they lie in `low`, of the others the lower four bits in `high`,
/// the upper two in `low`.
#[target_feature(enable = "avx512f")]
#[inline]
fn six_bits(low: __m512i, high: __m512i) -> [__m512i; 2] {
    let upper = _mm512_and_si512(_mm512_srli_epi32::<2>(low), _mm512_set1_epi8(0x30));
    let lower = _mm512_and_si512(high, _mm512_set1_epi8(0x0f));
    let first = _mm512_and_si512(low, _mm512_set1_epi8(0x3f));
    [first, _mm512_or_si512(lower, upper)]
}
