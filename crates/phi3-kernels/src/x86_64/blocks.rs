//! Blocks of stored weights as vectors of bytes. The type is a constant parameter, ggml's id,
//! so that each function compiled for a type holds that type's code alone.

#![expect(
    clippy::needless_range_loop,
    reason = "one index into several arrays; closures in iterators would lose the target features"
)]

use std::arch::x86_64::*;

use super::vector::{halves, load, load_16, transpose, transpose_halves};
use crate::BlockType;
use crate::scalar::{IQ4_NL_VALUES, q3_k_scales};

pub(super) const Q4_0: u32 = 2;
pub(super) const Q4_1: u32 = 3;
pub(super) const Q5_0: u32 = 6;
pub(super) const Q5_1: u32 = 7;
pub(super) const Q8_0: u32 = 8;
pub(super) const Q2_K: u32 = 10;
pub(super) const Q3_K: u32 = 11;
pub(super) const Q4_K: u32 = 12;
pub(super) const Q5_K: u32 = 13;
pub(super) const Q6_K: u32 = 14;
pub(super) const IQ4_NL: u32 = 20;
pub(super) const INT4: u32 = BlockType::Int4.ggml_id();

/// Whether the bytes of a type are signed weights; else they are not negative, and the weight
/// is the byte less [`offset`].
pub(super) const fn is_signed(id: u32) -> bool {
    matches!(id, Q8_0 | IQ4_NL)
}

/// Base-2 logarithm of the offset of the bytes of a type; `None` without offset.
pub(super) const fn offset_shift(id: u32) -> Option<i32> {
    match id {
        Q4_0 | INT4 => Some(3),
        Q5_0 => Some(4),
        Q3_K => Some(2),
        Q6_K => Some(5),
        _ => None,
    }
}

/// Whether weights have a minimum.
pub(super) const fn has_minimum(id: u32) -> bool {
    matches!(id, Q4_1 | Q5_1 | Q2_K | Q4_K | Q5_K)
}

/// How many sums of two products of a weight byte and an activation fit one i16. Products with
/// a signed byte fit only one by one.
pub(super) const fn sums_in_i16(id: u32) -> usize {
    match id {
        // 15 * 127 * 2 * 8 = 30,480.
        Q4_0 | Q4_1 | Q4_K | INT4 => 8,
        // At most 31 * 127 * 2 * 4 = 31,496; for Q2_K and Q3_K the scale changes after four.
        Q5_0 | Q5_1 | Q5_K | Q2_K | Q3_K => 4,
        // 63 * 127 * 2 * 2 = 32,004.
        Q6_K => 2,
        _ => 1,
    }
}

/// Where the quantized weights of a block of 32 begin.
pub(super) const fn quants_at(id: u32) -> usize {
    match id {
        Q4_1 => 4,
        Q5_0 => 6,
        Q5_1 => 8,
        _ => 2,
    }
}

/// The weight bytes of two blocks of 32: the first sixteen of `a` and of `b`, then the others.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn pair<const ID: u32, const BYTES: usize>(
    a: &[u8; BYTES],
    b: &[u8; BYTES],
) -> [__m256i; 2] {
    let at = quants_at(ID);
    let packed = halves(array(a, at), array(b, at));
    if ID == Q8_0 {
        return [packed, halves(array(a, at + 16), array(b, at + 16))];
    }
    let [low, high] = nibbles(packed);
    match ID {
        Q5_0 | Q5_1 => {
            let a_bits = _mm_set1_epi32(i32::from_le_bytes(*array(a, at - 4)));
            let b_bits = _mm_set1_epi32(i32::from_le_bytes(*array(b, at - 4)));
            let bits = _mm256_set_m128i(b_bits, a_bits);
            let [from_low, from_high] = [bit_bytes(0), bit_bytes(2)];
            [
                _mm256_or_si256(low, fifth_bits(_mm256_shuffle_epi8(bits, from_low))),
                _mm256_or_si256(high, fifth_bits(_mm256_shuffle_epi8(bits, from_high))),
            ]
        }
        IQ4_NL => {
            let table = iq4_nl_table();
            [
                _mm256_shuffle_epi8(table, low),
                _mm256_shuffle_epi8(table, high),
            ]
        }
        _ => [low, high],
    }
}

/// The weight bytes of a block of 32, in order.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn single<const ID: u32, const BYTES: usize>(block: &[u8; BYTES]) -> __m256i {
    let at = quants_at(ID);
    if ID == Q8_0 {
        return halves(array(block, at), array(block, at + 16));
    }
    let packed = load_16(array(block, at));
    let packed = _mm256_set_m128i(_mm_srli_epi16::<4>(packed), packed);
    let q = _mm256_and_si256(packed, _mm256_set1_epi8(15));
    match ID {
        Q5_0 | Q5_1 => {
            let bits = _mm256_set1_epi32(i32::from_le_bytes(*array(block, at - 4)));
            let spread = _mm256_blend_epi32::<0xf0>(bit_bytes(0), bit_bytes(2));
            _mm256_or_si256(q, fifth_bits(_mm256_shuffle_epi8(bits, spread)))
        }
        IQ4_NL => _mm256_shuffle_epi8(iq4_nl_table(), q),
        _ => q,
    }
}

/// Blocks of 32 of eight rows, a row to a lane: four successive weight bytes of each row to a vector.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn columns<const ID: u32, const BYTES: usize>(rows: [&[u8; BYTES]; 8]) -> [__m256i; 8] {
    let mut q = [_mm256_setzero_si256(); 8];
    if ID == Q8_0 {
        for i in 0..8 {
            q[i] = single::<ID, BYTES>(rows[i]);
        }
        return transpose(q);
    }
    let at = quants_at(ID);
    let mut packed = [_mm256_setzero_si256(); 4];
    for i in 0..4 {
        packed[i] = halves(array(rows[i], at), array(rows[i + 4], at));
    }
    let packed = transpose_halves(packed);
    for i in 0..4 {
        [q[i], q[i + 4]] = nibbles(packed[i]);
    }
    match ID {
        Q5_0 | Q5_1 => {
            let mut bits = [0; 8];
            for i in 0..8 {
                bits[i] = i32::from_le_bytes(*array(rows[i], at - 4));
            }
            let bits = load(&bits);
            for i in 0..8 {
                // Bits 4i to 4i + 3 of a row go to the four bytes of its lane.
                let from = _mm256_set1_epi32(0x0101_0101 * (i as i32 / 2));
                let each = _mm256_setr_epi32(
                    0,
                    0x0404_0404,
                    0x0808_0808,
                    0x0c0c_0c0c,
                    0,
                    0x0404_0404,
                    0x0808_0808,
                    0x0c0c_0c0c,
                );
                let bytes = _mm256_shuffle_epi8(bits, _mm256_add_epi8(each, from));
                let bit = _mm256_set1_epi32(0x0804_0201 << (i % 2 * 4));
                let set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
                q[i] = _mm256_or_si256(q[i], _mm256_and_si256(set, _mm256_set1_epi8(16)));
            }
        }
        IQ4_NL => {
            for q in &mut q {
                *q = _mm256_shuffle_epi8(iq4_nl_table(), *q);
            }
        }
        _ => {}
    }
    q
}

/// The vectors that hold the weights of a block of 256: those of their low bits, then those of the
/// others.
type Stored = [__m256i; 6];

/// Where they are.
pub(super) const fn stored_at(id: u32) -> &'static [usize] {
    match id {
        Q4_K => &[16, 48, 80, 112],
        Q5_K => &[48, 80, 112, 144, 16],
        Q6_K => &[0, 32, 64, 96, 128, 160],
        Q2_K => &[16, 48],
        Q3_K => &[32, 64, 0],
        INT4 => &[2, 34, 66, 98],
        _ => &[],
    }
}

/// Vector `i` of those [`stored_at`].
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn stored<const ID: u32, const BYTES: usize>(block: &[u8; BYTES], i: usize) -> __m256i {
    load(array::<32>(block, stored_at(ID)[i]))
}

/// The weight bytes of a block of 256, in order.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn superblock<const ID: u32, const BYTES: usize>(block: &[u8; BYTES]) -> [__m256i; 8] {
    let mut vectors = [_mm256_setzero_si256(); 6];
    for i in 0..stored_at(ID).len() {
        vectors[i] = stored::<ID, BYTES>(block, i);
    }
    spread::<ID>(&vectors)
}

/// The weights that are stored in the bytes of vectors: at each place the eight weights of a block
/// that are stored there, and so for 32 weights of eight groups, or for the same weights of several
/// rows.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn spread<const ID: u32>(stored: &Stored) -> [__m256i; 8] {
    let mut q = [_mm256_setzero_si256(); 8];
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
        q[g] = _mm256_or_si256(q[g], high);
    }
    q
}

/// The bits from bit `from` of each byte on, at bit `to`; `mask` takes the wanted ones, all of which
/// stay in their byte.
#[target_feature(enable = "avx2")]
#[inline]
fn moved(bytes: __m256i, from: usize, to: usize, mask: i8) -> __m256i {
    let moved = if from > to {
        _mm256_srl_epi16(bytes, _mm_cvtsi32_si128((from - to) as i32))
    } else {
        _mm256_sll_epi16(bytes, _mm_cvtsi32_si128((to - from) as i32))
    };
    _mm256_and_si256(moved, _mm256_set1_epi8(mask))
}

/// The sixteen scales and the sixteen minima of a block of 256, as i16: those of the even groups
/// in the lower half, of the odd ones in the upper, which is how the groups lie in
/// [`superblock`]'s vectors. Minima are zero for types without.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn factors<const ID: u32, const BYTES: usize>(
    block: &[u8; BYTES],
) -> (__m256i, __m256i) {
    let evens_then_odds = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    match ID {
        Q4_K | Q5_K => {
            let low = u32::from_le_bytes(*array(block, 4));
            let mins = u32::from_le_bytes(*array(block, 8));
            let high = u32::from_le_bytes(*array(block, 12));
            let [six, four, two] = [0x3f3f_3f3f, 0x0f0f_0f0f, 0x3030_3030];
            (
                wide(low & six, high & four | low >> 2 & two),
                wide(mins & six, high >> 4 & four | mins >> 2 & two),
            )
        }
        INT4 => (_mm256_set1_epi16(1), _mm256_setzero_si256()),
        Q2_K => {
            let packed = _mm_shuffle_epi8(load_16(array(block, 0)), evens_then_odds);
            let four = _mm_set1_epi8(15);
            let minima = _mm_and_si128(_mm_srli_epi16::<4>(packed), four);
            (
                _mm256_cvtepu8_epi16(_mm_and_si128(packed, four)),
                _mm256_cvtepu8_epi16(minima),
            )
        }
        _ => {
            let scales = if ID == Q3_K {
                load_16(&q3_k_scales(array(block, 96)).map(i8::cast_unsigned))
            } else {
                load_16(array(block, BYTES - 18))
            };
            let scales = _mm_shuffle_epi8(scales, evens_then_odds);
            (_mm256_cvtepi8_epi16(scales), _mm256_setzero_si256())
        }
    }
}

/// Eight bytes as i16 in both halves.
#[target_feature(enable = "avx2")]
#[inline]
fn wide(first: u32, second: u32) -> __m256i {
    let bytes = u64::from(first) | u64::from(second) << 32;
    let words = _mm_cvtepu8_epi16(_mm_cvtsi64_si128(bytes.cast_signed()));
    _mm256_broadcastsi128_si256(words)
}

/// Where the four bytes of a block of `bytes` bytes are that hold d and then the factor of the minimum,
/// or d as the second of both.
pub(super) const fn factors_at(id: u32, bytes: usize) -> (usize, bool) {
    match id {
        Q2_K => (80, false),
        Q3_K | Q6_K => (bytes - 4, true),
        _ => (0, false),
    }
}

/// The factors d of eight blocks, and those of their minima, which mean nothing for types without.
#[target_feature(enable = "avx2,f16c")]
#[inline]
pub(super) fn eight_factors<const ID: u32, const BYTES: usize>(
    blocks: [&[u8; BYTES]; 8],
) -> (__m256, __m256) {
    let (at, d_is_second) = factors_at(ID, BYTES);
    // Interleaving whole registers takes fewer steps than inserting numbers one by one.
    let mut both = [_mm_setzero_si128(); 8];
    for i in 0..8 {
        both[i] = _mm_cvtsi32_si128(i32::from_le_bytes(*array(blocks[i], at)));
    }
    let mut fours = [_mm_setzero_si128(); 2];
    for i in 0..2 {
        let [a, b, c, d] = [
            both[4 * i],
            both[4 * i + 1],
            both[4 * i + 2],
            both[4 * i + 3],
        ];
        fours[i] = _mm_unpacklo_epi32(_mm_unpacklo_epi16(a, b), _mm_unpacklo_epi16(c, d));
    }
    let first = _mm256_cvtph_ps(_mm_unpacklo_epi64(fours[0], fours[1]));
    let second = _mm256_cvtph_ps(_mm_unpackhi_epi64(fours[0], fours[1]));
    if d_is_second {
        (second, first)
    } else {
        (first, second)
    }
}

/// The low halves of bytes, and the high ones.
#[target_feature(enable = "avx2")]
#[inline]
fn nibbles(bytes: __m256i) -> [__m256i; 2] {
    let mask = _mm256_set1_epi8(15);
    [
        _mm256_and_si256(bytes, mask),
        _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), mask),
    ]
}

/// Indices of the byte that holds bit i, and of the next for bit i + 8, in both halves.
#[target_feature(enable = "avx2")]
#[inline]
fn bit_bytes(first: i64) -> __m256i {
    let each = 0x0101_0101_0101_0101;
    _mm256_set_epi64x(
        (first + 1) * each,
        first * each,
        (first + 1) * each,
        first * each,
    )
}

/// 16 in byte i where its bit i % 8 is set, else 0.
#[target_feature(enable = "avx2")]
#[inline]
fn fifth_bits(bytes: __m256i) -> __m256i {
    let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64.cast_signed());
    let set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
    _mm256_and_si256(set, _mm256_set1_epi8(16))
}

#[target_feature(enable = "avx2")]
#[inline]
fn iq4_nl_table() -> __m256i {
    const VALUES: [u8; 16] = {
        let mut values = [0; 16];
        let mut i = 0;
        while i < 16 {
            values[i] = (IQ4_NL_VALUES[i] as i8).cast_unsigned();
            i += 1;
        }
        values
    };
    _mm256_broadcastsi128_si256(load_16(&VALUES))
}

#[inline(always)]
pub(super) fn array<const N: usize>(block: &[u8], at: usize) -> &[u8; N] {
    block[at..]
        .first_chunk()
        .expect("every caller's offset leaves N bytes in its block")
}

const _: () = {
    let ids = [
        (Q4_0, BlockType::Q4_0),
        (Q4_1, BlockType::Q4_1),
        (Q5_0, BlockType::Q5_0),
        (Q5_1, BlockType::Q5_1),
        (Q8_0, BlockType::Q8_0),
        (Q2_K, BlockType::Q2K),
        (Q3_K, BlockType::Q3K),
        (Q4_K, BlockType::Q4K),
        (Q5_K, BlockType::Q5K),
        (Q6_K, BlockType::Q6K),
        (IQ4_NL, BlockType::IQ4NL),
        (INT4, BlockType::Int4),
    ];
    let mut i = 0;
    while i < ids.len() {
        assert!(ids[i].0 == ids[i].1.ggml_id());
        i += 1;
    }
};
