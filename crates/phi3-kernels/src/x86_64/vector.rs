//! Changes between arrays and vectors of the same size, and the order of lanes.
//!
//! By value rather than by the intrinsics that take pointers: those check their pointers in a
//! build with debug assertions, which makes the loops four times slower.

use std::arch::x86_64::*;
use std::mem::transmute;
use std::ops::Range;

/// What a vector may be made of and turned into: arrays of 32 bytes that any bits are valid in.
pub(super) trait Bytes32: Copy {}
impl Bytes32 for [u8; 32] {}
impl Bytes32 for [i8; 32] {}
impl Bytes32 for [i16; 16] {}
impl Bytes32 for [i32; 8] {}

#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn load<T: Bytes32>(array: &T) -> __m256i {
    const { assert!(size_of::<T>() == 32) };
    // SAFETY: the constant above has checked the size, `Bytes32` promises that any bits are
    // valid, and the read is of a reference to plain data, at any alignment.
    unsafe { std::ptr::from_ref(array).cast::<__m256i>().read_unaligned() }
}

#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn load_16(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: both types are sixteen bytes in the same order, and any bits are valid in them.
    unsafe { transmute::<[u8; 16], __m128i>(*bytes) }
}

#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn load_f32(array: &[f32; 8]) -> __m256 {
    // SAFETY: both types are eight f32 in the same order, and any bits are valid in them.
    unsafe { transmute::<[f32; 8], __m256>(*array) }
}

#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn store(vector: __m256i) -> [u8; 32] {
    // SAFETY: both types are 32 bytes in the same order, and any bits are valid in them.
    unsafe { transmute::<__m256i, [u8; 32]>(vector) }
}

#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn store_i16(vector: __m256i) -> [i16; 16] {
    // SAFETY: both types are sixteen i16 in the same order, and any bits are valid in them.
    unsafe { transmute::<__m256i, [i16; 16]>(vector) }
}

#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn store_i32(vector: __m256i) -> [i32; 8] {
    // SAFETY: both types are eight i32 in the same order, and any bits are valid in them.
    unsafe { transmute::<__m256i, [i32; 8]>(vector) }
}

#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn store_f32(vector: __m256) -> [f32; 8] {
    // SAFETY: both types are eight f32 in the same order, and any bits are valid in them.
    unsafe { transmute::<__m256, [f32; 8]>(vector) }
}

/// `low` in the lower half, `high` in the upper.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn halves(low: &[u8; 16], high: &[u8; 16]) -> __m256i {
    _mm256_set_m128i(load_16(high), load_16(low))
}

/// Eight numbers of half precision in the lower half and eight in the upper.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn halves_f16(low: &[u16; 8], high: &[u16; 8]) -> __m256i {
    // SAFETY: both types are sixteen bytes in the same order, and any bits are valid in them.
    let [low, high] = [low, high].map(|h| unsafe { transmute::<[u16; 8], __m128i>(*h) });
    _mm256_set_m128i(high, low)
}

/// Eight half-precision numbers as f32.
#[target_feature(enable = "avx2,f16c")]
#[inline]
pub(super) fn from_f16(h: [u16; 8]) -> __m256 {
    // SAFETY: both types are sixteen bytes in the same order, and any bits are valid in them.
    _mm256_cvtph_ps(unsafe { transmute::<[u16; 8], __m128i>(h) })
}

/// Asks for as many cache lines as `items` fill, from `distance` bytes after their start, whether
/// or not anything lies there: into the first-level cache or, by `_MM_HINT_T1`, the second.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn prefetch<const HINT: i32>(items: &[impl Copy], distance: usize) {
    let mut at = 0;
    while at < size_of_val(items) {
        ask_for::<HINT>(items.as_ptr().cast::<u8>().wrapping_add(distance + at));
        at += 64;
    }
}

/// Asks for the cache line of an address, whether or not anything lies there.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn ask_for<const HINT: i32>(address: *const u8) {
    #[allow(unused_unsafe, reason = "newer compilers know that a prefetch is safe")]
    // SAFETY: a prefetch reads nothing and faults at no address.
    unsafe {
        _mm_prefetch::<HINT>(address.cast())
    };
}

/// Asks for `columns`, up to sixteen, of each row, which may lie in two lines.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn ask_for_rows(rows: &[&mut [f32]], columns: &Range<usize>) {
    for row in rows {
        let numbers = &row[columns.clone()];
        for number in [numbers.first(), numbers.last()].into_iter().flatten() {
            ask_for::<_MM_HINT_T0>(std::ptr::from_ref(number).cast());
        }
    }
}

/// Rows of eight dwords to columns.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn transpose(r: [__m256i; 8]) -> [__m256i; 8] {
    // Pairs of rows interleaved by one dword, then by two, then by four.
    let ab = (
        _mm256_unpacklo_epi32(r[0], r[1]),
        _mm256_unpackhi_epi32(r[0], r[1]),
    );
    let cd = (
        _mm256_unpacklo_epi32(r[2], r[3]),
        _mm256_unpackhi_epi32(r[2], r[3]),
    );
    let ef = (
        _mm256_unpacklo_epi32(r[4], r[5]),
        _mm256_unpackhi_epi32(r[4], r[5]),
    );
    let gh = (
        _mm256_unpacklo_epi32(r[6], r[7]),
        _mm256_unpackhi_epi32(r[6], r[7]),
    );
    let low = [
        _mm256_unpacklo_epi64(ab.0, cd.0),
        _mm256_unpackhi_epi64(ab.0, cd.0),
        _mm256_unpacklo_epi64(ab.1, cd.1),
        _mm256_unpackhi_epi64(ab.1, cd.1),
    ];
    let high = [
        _mm256_unpacklo_epi64(ef.0, gh.0),
        _mm256_unpackhi_epi64(ef.0, gh.0),
        _mm256_unpacklo_epi64(ef.1, gh.1),
        _mm256_unpackhi_epi64(ef.1, gh.1),
    ];
    [
        _mm256_permute2x128_si256::<0x20>(low[0], high[0]),
        _mm256_permute2x128_si256::<0x20>(low[1], high[1]),
        _mm256_permute2x128_si256::<0x20>(low[2], high[2]),
        _mm256_permute2x128_si256::<0x20>(low[3], high[3]),
        _mm256_permute2x128_si256::<0x31>(low[0], high[0]),
        _mm256_permute2x128_si256::<0x31>(low[1], high[1]),
        _mm256_permute2x128_si256::<0x31>(low[2], high[2]),
        _mm256_permute2x128_si256::<0x31>(low[3], high[3]),
    ]
}

/// Sixteen rows of eight words to columns: vector i holds row i and, in its upper half, row i + 8, so
/// that one shuffle moves words of both.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn transpose_words(r: [__m256i; 8]) -> [__m256i; 8] {
    // Pairs of rows interleaved by one word, then by two, then by four.
    let mut pairs = r;
    for i in 0..4 {
        pairs[2 * i] = _mm256_unpacklo_epi16(r[2 * i], r[2 * i + 1]);
        pairs[2 * i + 1] = _mm256_unpackhi_epi16(r[2 * i], r[2 * i + 1]);
    }
    let mut fours = pairs;
    for i in [0, 4] {
        for high in 0..2 {
            let (a, b) = (pairs[i + high], pairs[i + high + 2]);
            fours[i + 2 * high] = _mm256_unpacklo_epi32(a, b);
            fours[i + 2 * high + 1] = _mm256_unpackhi_epi32(a, b);
        }
    }
    let mut eights = fours;
    for i in 0..4 {
        eights[2 * i] = _mm256_unpacklo_epi64(fours[i], fours[i + 4]);
        eights[2 * i + 1] = _mm256_unpackhi_epi64(fours[i], fours[i + 4]);
    }
    eights
}

/// [`transpose`] of eight rows of four dwords, of which vector i holds row i and, in its upper half,
/// row i + 4.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn transpose_halves(r: [__m256i; 4]) -> [__m256i; 4] {
    let low = [
        _mm256_unpacklo_epi32(r[0], r[1]),
        _mm256_unpacklo_epi32(r[2], r[3]),
    ];
    let high = [
        _mm256_unpackhi_epi32(r[0], r[1]),
        _mm256_unpackhi_epi32(r[2], r[3]),
    ];
    [
        _mm256_unpacklo_epi64(low[0], low[1]),
        _mm256_unpackhi_epi64(low[0], low[1]),
        _mm256_unpacklo_epi64(high[0], high[1]),
        _mm256_unpackhi_epi64(high[0], high[1]),
    ]
}

/// The eight dwords of each of four vectors, summed by halves: lane i is the lower half of
/// vector i, lane i + 4 its upper half.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn sum_halves(v: [__m256i; 4]) -> __m256i {
    _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]))
}

/// Lane i is the sum of the eight dwords of vector i.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn sum_each(v: &[__m256i; 8]) -> __m256i {
    let low = sum_halves([v[0], v[1], v[2], v[3]]);
    let high = sum_halves([v[4], v[5], v[6], v[7]]);
    _mm256_add_epi32(
        _mm256_permute2x128_si256::<0x20>(low, high),
        _mm256_permute2x128_si256::<0x31>(low, high),
    )
}
