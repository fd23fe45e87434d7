//! Changes between arrays and vectors of 512 bits, and the order of lanes: by value, as in
//! [`vector`](crate::x86_64::vector).

use std::arch::x86_64::*;

use crate::x86_64::vector::load_16;

/// What a vector may be made of and turned into: arrays of 64 bytes that any bits are valid in.
pub(super) trait Bytes64: Copy {}
impl Bytes64 for __m512i {}
impl Bytes64 for [u8; 64] {}
impl Bytes64 for [i8; 64] {}
impl Bytes64 for [i16; 32] {}
impl Bytes64 for [i32; 16] {}
impl Bytes64 for [f32; 16] {}
impl Bytes64 for [[f32; 8]; 2] {}

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn load<T: Bytes64>(array: &T) -> __m512i {
    const { assert!(size_of::<T>() == 64) };
    // SAFETY: the constant above has checked the size, `Bytes64` promises that any bits are
    // valid, and the read is of a reference to plain data, at any alignment.
    unsafe { std::ptr::from_ref(array).cast::<__m512i>().read_unaligned() }
}

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn store<T: Bytes64>(vector: __m512i, array: &mut T) {
    const { assert!(size_of::<T>() == 64) };
    // SAFETY: the constant above has checked the size, `Bytes64` promises that any bits are
    // valid, and the write is to a reference to plain data, at any alignment.
    unsafe {
        std::ptr::from_mut(array)
            .cast::<__m512i>()
            .write_unaligned(vector);
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn load_f32<T: Bytes64>(array: &T) -> __m512 {
    _mm512_castsi512_ps(load(array))
}

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn store_f32<T: Bytes64>(vector: __m512, array: &mut T) {
    store(_mm512_castps_si512(vector), array);
}

/// A vector of two.
#[target_feature(enable = "avx512f,avx2")]
#[inline]
pub(super) fn both_halves([low, high]: [__m256; 2]) -> __m512 {
    let low = _mm512_castsi256_si512(_mm256_castps_si256(low));
    _mm512_castsi512_ps(_mm512_inserti64x4::<1>(low, _mm256_castps_si256(high)))
}

/// `a | b & mask`.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn or_masked(a: __m512i, b: __m512i, mask: __m512i) -> __m512i {
    _mm512_ternarylogic_epi32::<0xf8>(a, b, mask)
}

/// Sixteen rows of four dwords to columns, a row to a lane.
#[target_feature(enable = "avx512f,avx2")]
#[inline]
pub(super) fn transpose(rows: [&[u8; 16]; 16]) -> [__m512i; 4] {
    // The four rows of a vector end up in lanes of their own: those of the others come between.
    let mut fours = [_mm512_setzero_si512(); 4];
    for (i, four) in fours.iter_mut().enumerate() {
        let first = _mm512_castsi128_si512(load_16(rows[i]));
        let second = _mm512_inserti32x4::<1>(first, load_16(rows[i + 4]));
        let third = _mm512_inserti32x4::<2>(second, load_16(rows[i + 8]));
        *four = _mm512_inserti32x4::<3>(third, load_16(rows[i + 12]));
    }
    let [a, b, c, d] = fours;
    let low = [_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d)];
    let high = [_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d)];
    [
        _mm512_unpacklo_epi64(low[0], low[1]),
        _mm512_unpackhi_epi64(low[0], low[1]),
        _mm512_unpacklo_epi64(high[0], high[1]),
        _mm512_unpackhi_epi64(high[0], high[1]),
    ]
}
