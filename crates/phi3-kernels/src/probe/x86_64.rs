//! The loops with x86-64's vector instructions.
//!
//! Unsafe code is confined to the calls that enter a function with target features, which the
//! backends' tokens vouch for, and to the change from arrays to vectors of the same size.

use std::arch::x86_64::*;
use std::hint::black_box;
use std::mem::transmute;

use super::{Loops, portable};
use crate::backend::Kernels;
use crate::x86_64::{Avx2, Avx512Vnni, AvxVnni};

const STEPS: usize = 2048;

/// Vectors of 8-bit weights that the int8 loops go through; they stay in the first-level cache.
const VECTORS: usize = 64;
const PASSES: usize = 32;

/// Tokens that each vector of weights is multiplied with, as in a kernel for prompts.
const TOKENS: usize = 2;

pub(super) fn all_loops() -> Vec<Loops> {
    let avx2 = Avx2::new().map(|token| Loops {
        name: token.name(),
        // SAFETY: the token exists only where its instructions were detected.
        f32: Box::new(|| unsafe { multiply_add_avx2() }),
        // SAFETY: the same.
        int8: Box::new(|| unsafe { dot_avx2() }),
    });
    let avx_vnni = AvxVnni::new().map(|token| Loops {
        name: token.name(),
        // SAFETY: the token exists only where its instructions and AVX2's were detected.
        f32: Box::new(|| unsafe { multiply_add_avx2() }),
        // SAFETY: the same.
        int8: Box::new(|| unsafe { dot_avx_vnni() }),
    });
    let avx512_vnni = Avx512Vnni::new().map(|token| Loops {
        name: token.name(),
        // SAFETY: the token exists only where its instructions were detected.
        f32: Box::new(|| unsafe { multiply_add_avx512() }),
        // SAFETY: the same.
        int8: Box::new(|| unsafe { dot_avx512_vnni() }),
    });
    [avx2, avx_vnni, avx512_vnni]
        .into_iter()
        .flatten()
        .collect()
}

/// [`portable::read`], compiled for AVX2 where that is there.
pub(super) fn read(part: &[u64]) -> u64 {
    match Avx2::new() {
        // SAFETY: the token exists only where its instructions were detected.
        Some(_) => unsafe { read_avx2(part) },
        None => portable::read(part),
    }
}

#[target_feature(enable = "avx2")]
fn read_avx2(part: &[u64]) -> u64 {
    portable::read(part)
}

#[target_feature(enable = "avx2,fma")]
fn multiply_add_avx2() -> u64 {
    // Twelve sums: two units of a latency of four to six cycles never wait, and all stay in
    // registers.
    const SUMS: usize = 12;
    let mut sums = [_mm256_set1_ps(black_box(1.0)); SUMS];
    let factor = _mm256_set1_ps(black_box(0.999));
    let summand = _mm256_set1_ps(black_box(0.001));
    for _ in 0..STEPS {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(*sum, factor, summand);
        }
    }
    black_box(sums);
    (2 * 8 * SUMS * STEPS) as u64
}

/// Four vectors of weights an inner step, whose products are added in 16 bits before they are
/// widened: the least work without VNNI.
#[target_feature(enable = "avx2")]
fn dot_avx2() -> u64 {
    let weights = black_box([[1u8; 32]; VECTORS]);
    let tokens = black_box([[[2u8; 32]; 4]; TOKENS]);
    let tokens = tokens.map(|token| token.map(|part| load_256(&part)));
    let ones = _mm256_set1_epi16(1);
    let mut sums = [_mm256_setzero_si256(); TOKENS];
    for _ in 0..PASSES {
        let weights = black_box(&weights);
        for weights in weights.as_chunks::<4>().0 {
            for (sum, token) in sums.iter_mut().zip(&tokens) {
                let product = |i: usize| _mm256_maddubs_epi16(load_256(&weights[i]), token[i]);
                let pairs = _mm256_add_epi16(
                    _mm256_add_epi16(product(0), product(1)),
                    _mm256_add_epi16(product(2), product(3)),
                );
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
            }
        }
    }
    black_box(sums);
    (2 * 32 * VECTORS * TOKENS * PASSES) as u64
}

#[target_feature(enable = "avx2,avxvnni")]
fn dot_avx_vnni() -> u64 {
    let weights = black_box([[1u8; 32]; VECTORS]);
    let tokens = black_box([[2u8; 32]; TOKENS]);
    let tokens = tokens.map(|token| load_256(&token));
    let mut sums = [[_mm256_setzero_si256(); 4]; TOKENS];
    for _ in 0..PASSES {
        let weights = black_box(&weights);
        for weights in weights.as_chunks::<4>().0 {
            for (sums, token) in sums.iter_mut().zip(tokens) {
                for (sum, weights) in sums.iter_mut().zip(weights) {
                    *sum = _mm256_dpbusd_avx_epi32(*sum, load_256(weights), token);
                }
            }
        }
    }
    black_box(sums);
    (2 * 32 * VECTORS * TOKENS * PASSES) as u64
}

#[target_feature(enable = "avx512f")]
fn multiply_add_avx512() -> u64 {
    const SUMS: usize = 12;
    let mut sums = [_mm512_set1_ps(black_box(1.0)); SUMS];
    let factor = _mm512_set1_ps(black_box(0.999));
    let summand = _mm512_set1_ps(black_box(0.001));
    for _ in 0..STEPS {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(*sum, factor, summand);
        }
    }
    black_box(sums);
    (2 * 16 * SUMS * STEPS) as u64
}

#[target_feature(enable = "avx512f,avx512vnni")]
fn dot_avx512_vnni() -> u64 {
    let weights = black_box([[1u8; 64]; VECTORS]);
    let tokens = black_box([[2u8; 64]; TOKENS]);
    let tokens = tokens.map(|token| load_512(&token));
    let mut sums = [[_mm512_setzero_si512(); 4]; TOKENS];
    for _ in 0..PASSES {
        let weights = black_box(&weights);
        for weights in weights.as_chunks::<4>().0 {
            for (sums, token) in sums.iter_mut().zip(tokens) {
                for (sum, weights) in sums.iter_mut().zip(weights) {
                    *sum = _mm512_dpbusd_epi32(*sum, load_512(weights), token);
                }
            }
        }
    }
    black_box(sums);
    (2 * 64 * VECTORS * TOKENS * PASSES) as u64
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_256(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: both types are 32 bytes, and any bits are valid in them.
    unsafe { transmute::<[u8; 32], __m256i>(*bytes) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_512(bytes: &[u8; 64]) -> __m512i {
    // SAFETY: both types are 64 bytes, and any bits are valid in them.
    unsafe { transmute::<[u8; 64], __m512i>(*bytes) }
}
