//! Blocks of sixteen rows, unpacked to bytes with a row to a lane.

#![expect(
    clippy::needless_range_loop,
    reason = "one index into several arrays; closures in iterators would lose the target features"
)]

use std::arch::x86_64::*;

use super::vector::{load, store, transpose};
use crate::scalar::{IQ4_NL_VALUES, q3_k_scales};
use crate::x86_64::blocks::{
    INT4, IQ4_NL, Q2_K, Q3_K, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0, array, eight_factors,
    has_minimum, is_signed, offset_shift, quants_at, stored_at,
};
use crate::x86_64::panel::groups_of_32;
use crate::x86_64::vector::store_f32 as store_eight;

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
    pub(super) d: [[f32; 8]; 2],
    pub(super) m: [[f32; 8]; 2],
}

pub(super) const EMPTY_PANEL: Panel = Panel {
    q: [[0; 64]; 8],
    d: [[0.0; 8]; 2],
    m: [[0.0; 8]; 2],
};

/// One block of 256 of sixteen rows.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct SuperPanel {
    pub(super) q: [[Weights; 8]; 8],
    /// The scale of each group of sixteen; of groups of 32 eight scales.
    pub(super) scales: [[i32; 16]; 16],
    /// What the sums of activations are multiplied with, two successive groups to a lane: minima, or
    /// what is to be added for the offset of the bytes.
    pub(super) minima: [[i16; 32]; 8],
    pub(super) d: [[f32; 8]; 2],
    pub(super) dmin: [[f32; 8]; 2],
}

pub(super) const EMPTY_SUPER_PANEL: SuperPanel = SuperPanel {
    q: [[[0; 64]; 8]; 8],
    scales: [[0; 16]; 16],
    minima: [[0; 32]; 8],
    d: [[0.0; 8]; 2],
    dmin: [[0.0; 8]; 2],
};

/// Base-2 logarithm of what is to be subtracted from the bytes of a panel, if anything.
pub(super) const fn shift(id: u32) -> Option<u32> {
    match (is_signed(id), offset_shift(id)) {
        (true, _) => Some(7),
        (false, Some(shift)) => Some(shift as u32),
        (false, None) => None,
    }
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
    unpack_factors::<ID, BYTES>(blocks, &mut panel.d, &mut panel.m);
}

/// The factors of blocks, and those of their minima where they have any.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn unpack_factors<const ID: u32, const BYTES: usize>(
    blocks: [&[u8; BYTES]; PANEL_ROWS],
    d: &mut [[f32; 8]; 2],
    m: &mut [[f32; 8]; 2],
) {
    for half in 0..2 {
        let mut eight = [blocks[0]; 8];
        eight.copy_from_slice(&blocks[8 * half..][..8]);
        let (of_d, of_m) = eight_factors::<ID, BYTES>(eight);
        d[half] = store_eight(of_d);
        if has_minimum(ID) {
            m[half] = store_eight(of_m);
        }
    }
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
fn columns<const ID: u32, const BYTES: usize>(blocks: [&[u8; BYTES]; PANEL_ROWS]) -> [__m512i; 8] {
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
    // Turned as they are stored, which are fewer vectors.
    let mut columns = [[_mm512_setzero_si512(); 6]; 8];
    for s in 0..stored_at(ID).len() {
        let turned = eights(blocks, stored_at(ID)[s]);
        for c in 0..8 {
            columns[c][s] = turned[c];
        }
    }
    for c in 0..8 {
        let q = spread::<ID>(&columns[c]);
        for g in 0..8 {
            store(q[g], &mut panel.q[g][c]);
        }
    }
    unpack_scales::<ID, BYTES>(blocks, panel);
    unpack_factors::<ID, BYTES>(blocks, &mut panel.d, &mut panel.dmin);
}

/// [`blocks::spread`](crate::x86_64::blocks::spread) of twice as many rows.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn spread<const ID: u32>(stored: &[__m512i; 6]) -> [__m512i; 8] {
    let mut q = [_mm512_setzero_si512(); 8];
    for g in 0..8 {
        q[g] = match ID {
            Q4_K | Q5_K | INT4 => nibbles(stored[g / 2])[g % 2],
            Q6_K => nibbles(stored[g / 4 * 2 + g % 2])[g % 4 / 2],
            _ => moved(stored[g / 4], 2 * (g % 4), 0, 3),
        };
        let high = match ID {
            Q5_K => moved(stored[4], g, 4, 16),
            Q6_K => moved(stored[4 + g / 4], 2 * (g % 4), 4, 48),
            Q3_K => moved(stored[2], g, 2, 4),
            _ => continue,
        };
        q[g] = _mm512_or_si512(q[g], high);
    }
    q
}

/// The bits from bit `from` of each byte on, at bit `to`; `mask` takes the wanted ones, all of which
/// stay in their byte.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn moved(bytes: __m512i, from: usize, to: usize, mask: i8) -> __m512i {
    let moved = if from > to {
        _mm512_srl_epi16(bytes, _mm_cvtsi32_si128((from - to) as i32))
    } else {
        _mm512_sll_epi16(bytes, _mm_cvtsi32_si128((to - from) as i32))
    };
    _mm512_and_si512(moved, _mm512_set1_epi8(mask))
}

/// The scales and minima of blocks of 256.
#[target_feature(enable = "avx512f,avx512bw,avx2")]
#[inline]
fn unpack_scales<const ID: u32, const BYTES: usize>(
    blocks: [&[u8; BYTES]; PANEL_ROWS],
    panel: &mut SuperPanel,
) {
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
        store(scale, &mut panel.scales[g]);
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
        store(words, &mut panel.minima[pair]);
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
