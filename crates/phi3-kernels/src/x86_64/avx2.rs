//! AVX2, FMA and F16C: f32 products like scalar's, eight at a time.
//!
//! Unsafe code is confined to the calls that enter a function with target features, which the
//! token [`Avx2`] vouches for, and to the change between arrays and vectors of the same size.

use std::arch::x86_64::*;
use std::mem::transmute;

use super::tile::SixRows;
use super::{dots, float, int8};
use crate::activations::Quantized;
use crate::backend::Tokens;
use crate::{BlockType, MatrixRef, scalar};

/// Lanes of a vector of f32.
const LANES: usize = 8;

/// Proof that this processor has AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// `None` on a processor that lacks one of them.
    pub(crate) fn new() -> Option<Self> {
        let detected = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        detected.then_some(Self(()))
    }

    /// [`scalar::matmul_rows`], with a lane for each row and fused multiply-adds.
    pub(crate) fn matmul_rows(
        self,
        x: &Tokens<'_>,
        w: MatrixRef<'_>,
        first_row: usize,
        out: &mut [&mut [f32]],
    ) {
        // SAFETY: `self` exists only where `new` detected the features.
        unsafe {
            if dots::covers(out.len(), w.block_type()) {
                dots::avx2_rows(x, w, first_row, out);
            } else {
                float::matmul_rows::<SixRows>(x, w, first_row, out);
            }
        }
    }

    /// [`scalar::quick_gelu`], compiled for wider vectors.
    pub(crate) fn quick_gelu(self, x: &mut [f32]) {
        #[target_feature(enable = "avx2")]
        fn wide(x: &mut [f32]) {
            scalar::quick_gelu(x);
        }
        // SAFETY: `self` exists only where `new` detected the features.
        unsafe { wide(x) }
    }

    /// [`scalar::silu_mul_row`], compiled for wider vectors.
    pub(crate) fn silu_mul(self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        #[target_feature(enable = "avx2")]
        fn wide(gate: &[f32], up: &[f32], out: &mut [f32]) {
            scalar::silu_mul_row(gate, up, out);
        }
        // SAFETY: `self` exists only where `new` detected the features.
        unsafe { wide(gate, up, out) }
    }

    /// [`scalar::gegelu_row`], compiled for wider vectors.
    pub(crate) fn gegelu(self, up: &[f32], limit: f32, out: &mut [f32]) {
        #[target_feature(enable = "avx2")]
        fn wide(up: &[f32], limit: f32, out: &mut [f32]) {
            scalar::gegelu_row(up, limit, out);
        }
        // SAFETY: `self` exists only where `new` detected the features.
        unsafe { wide(up, limit, out) }
    }

    /// [`scalar::quantize`], the same operations in wider vectors.
    pub(crate) fn quantize(
        self,
        x: &[f32],
        group: usize,
        values: &mut [i8],
        scales: &mut [f32],
        sums: &mut [i16],
    ) {
        // SAFETY: `self` exists only where `new` detected the features.
        unsafe { quantize(x, group, values, scales, sums) }
    }

    /// [`scalar::int8_rows`], the same to the last bit.
    pub(crate) fn int8_rows(
        self,
        x: &Quantized,
        w: MatrixRef<'_>,
        first_row: usize,
        out: &mut [&mut [f32]],
    ) {
        // SAFETY: `self` exists only where `new` detected the features.
        unsafe { int8::int8_rows(x, w, first_row, out) }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn quantize(x: &[f32], group: usize, values: &mut [i8], scales: &mut [f32], sums: &mut [i16]) {
    scalar::quantize(x, group, values, scales, sums);
}

/// [`scalar::decode`]: the same values bit for bit. By hand what the compiler does badly, from
/// the portable code the rest.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn decode(block_type: BlockType, bytes: &[u8], out: &mut [f32]) {
    match block_type {
        BlockType::F16 => {
            let (halves, tail) = bytes.as_chunks::<{ 2 * LANES }>();
            let (vectors, out_tail) = out.as_chunks_mut::<LANES>();
            for (halves, out) in halves.iter().zip(vectors) {
                *out = store(_mm256_cvtph_ps(load_bytes(*halves)));
            }
            scalar::decode_inline(block_type, tail, out_tail);
        }
        BlockType::Q4_0 => {
            for (block, out) in bytes.as_chunks::<18>().0.iter().zip(vectors_of_32(out)) {
                let [d0, d1, q @ ..] = *block;
                let (low, high) = nibbles(q);
                let eight = _mm_set1_epi8(8);
                let q = from_i8(_mm_sub_epi8(low, eight), _mm_sub_epi8(high, eight));
                for (out, q) in out.iter_mut().zip(q) {
                    *out = store(_mm256_mul_ps(factor(d0, d1), q));
                }
            }
        }
        BlockType::Q4_1 => {
            for (block, out) in bytes.as_chunks::<20>().0.iter().zip(vectors_of_32(out)) {
                let [d0, d1, m0, m1, q @ ..] = *block;
                let (low, high) = nibbles(q);
                let q = from_i8(low, high);
                for (out, q) in out.iter_mut().zip(q) {
                    let scaled = _mm256_mul_ps(factor(d0, d1), q);
                    *out = store(_mm256_add_ps(scaled, factor(m0, m1)));
                }
            }
        }
        BlockType::IQ4NL => {
            let table = load_bytes(scalar::IQ4_NL_VALUES.map(|v| v as i8 as u8));
            for (block, out) in bytes.as_chunks::<18>().0.iter().zip(vectors_of_32(out)) {
                let [d0, d1, q @ ..] = *block;
                let (low, high) = nibbles(q);
                let q = from_i8(_mm_shuffle_epi8(table, low), _mm_shuffle_epi8(table, high));
                for (out, q) in out.iter_mut().zip(q) {
                    *out = store(_mm256_mul_ps(factor(d0, d1), q));
                }
            }
        }
        BlockType::Int4 => {
            let (blocks, outs) = (bytes.as_chunks::<130>().0, vectors_of_32(out));
            for (block, out) in blocks.iter().zip(outs.as_chunks_mut::<8>().0) {
                let [d0, d1, q @ ..] = block;
                let (factor, eight) = (factor(*d0, *d1), _mm_set1_epi8(8));
                for (q, out) in q.as_chunks::<32>().0.iter().zip(out.as_chunks_mut::<2>().0) {
                    let (first, second) = q.split_at(16);
                    for (half, q) in [first, second].into_iter().enumerate() {
                        let (low, high) = nibbles(q.first_chunk().copied().unwrap_or_default());
                        let (low, high) = (_mm_sub_epi8(low, eight), _mm_sub_epi8(high, eight));
                        let [a, b, c, d] = from_i8(low, high);
                        out[0][2 * half] = store(_mm256_mul_ps(factor, a));
                        out[0][2 * half + 1] = store(_mm256_mul_ps(factor, b));
                        out[1][2 * half] = store(_mm256_mul_ps(factor, c));
                        out[1][2 * half + 1] = store(_mm256_mul_ps(factor, d));
                    }
                }
            }
        }
        _ => scalar::decode_inline(block_type, bytes, out),
    }
}

fn vectors_of_32(out: &mut [f32]) -> &mut [[[f32; LANES]; 4]] {
    out.as_chunks_mut::<LANES>().0.as_chunks_mut::<4>().0
}

/// A half-precision factor of a block in all lanes.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn factor(byte_0: u8, byte_1: u8) -> __m256 {
    let half = _mm_set1_epi16(i16::from_le_bytes([byte_0, byte_1]));
    _mm256_cvtph_ps(half)
}

/// The low halves of sixteen bytes, and the high ones.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn nibbles(bytes: [u8; 16]) -> (__m128i, __m128i) {
    let (bytes, mask) = (load_bytes(bytes), _mm_set1_epi8(15));
    let high = _mm_and_si128(_mm_srli_epi16::<4>(bytes), mask);
    (_mm_and_si128(bytes, mask), high)
}

/// Two times sixteen signed bytes as f32, in order.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn from_i8(low: __m128i, high: __m128i) -> [__m256; 4] {
    let eights = [
        low,
        _mm_unpackhi_epi64(low, low),
        high,
        _mm_unpackhi_epi64(high, high),
    ];
    let mut vectors = [_mm256_setzero_ps(); 4];
    for (vector, eight) in vectors.iter_mut().zip(eights) {
        *vector = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
    }
    vectors
}

// Loads and stores by value rather than by the intrinsics that take pointers: those check their
// pointers in a build with debug assertions, which makes this file's loops four times slower.

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn load_bytes(bytes: [u8; 16]) -> __m128i {
    // SAFETY: both types are sixteen bytes in the same order, and any bits are valid in them.
    unsafe { transmute::<[u8; 16], __m128i>(bytes) }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn store(vector: __m256) -> [f32; LANES] {
    // SAFETY: both types are eight f32 in the same order, and any bits are valid in them.
    unsafe { transmute::<__m256, [f32; LANES]>(vector) }
}
