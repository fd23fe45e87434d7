//! The loops with 64-bit ARM's vector instructions.
//!
//! Unsafe code is confined to the calls that enter a function with target features, which the
//! backends' tokens vouch for, and to the change from arrays to vectors of the same size.

use std::arch::aarch64::*;
use std::hint::black_box;
use std::mem::transmute;

use super::Loops;
pub(super) use super::portable::read;
use crate::aarch64::{Dotprod, Neon, sdot};
use crate::backend::Kernels;

const STEPS: usize = 2048;

/// Vectors of 8-bit weights that the int8 loops go through; they stay in the first-level cache.
const VECTORS: usize = 64;
const PASSES: usize = 32;

/// Tokens that each vector of weights is multiplied with, as in a kernel for prompts.
const TOKENS: usize = 2;

pub(super) fn all_loops() -> Vec<Loops> {
    let neon = Neon::new().map(|token| Loops {
        name: token.name(),
        // SAFETY: the token exists only where its instructions were detected.
        f32: Box::new(|| unsafe { multiply_add_neon() }),
        // SAFETY: the same.
        int8: Box::new(|| unsafe { dot_neon() }),
    });
    let dotprod = Dotprod::new().map(|token| Loops {
        name: token.name(),
        // SAFETY: the token exists only where its instructions and NEON's were detected.
        f32: Box::new(|| unsafe { multiply_add_neon() }),
        // SAFETY: the same.
        int8: Box::new(|| unsafe { dot_dotprod() }),
    });
    neon.into_iter().chain(dotprod).collect()
}

#[target_feature(enable = "neon")]
fn multiply_add_neon() -> u64 {
    const SUMS: usize = 16;
    let mut sums = [vdupq_n_f32(black_box(1.0)); SUMS];
    let factor = vdupq_n_f32(black_box(0.001));
    let summand = vdupq_n_f32(black_box(0.999));
    for _ in 0..STEPS {
        for sum in &mut sums {
            *sum = vfmaq_f32(*sum, factor, summand);
        }
    }
    black_box(sums);
    (2 * 4 * SUMS * STEPS) as u64
}

/// Two products in 16 bits before they are widened: the least work without dot products.
#[target_feature(enable = "neon")]
fn dot_neon() -> u64 {
    let weights = black_box([[1u8; 16]; VECTORS]);
    let tokens = black_box([[[2u8; 16]; 2]; TOKENS]);
    let tokens = tokens.map(|token| token.map(|part| load(&part)));
    let mut sums = [[vdupq_n_s32(0); 2]; TOKENS];
    for _ in 0..PASSES {
        let weights = black_box(&weights);
        for weights in weights.as_chunks::<2>().0 {
            for (sums, token) in sums.iter_mut().zip(&tokens) {
                let (a, b) = (load(&weights[0]), load(&weights[1]));
                let low = vmull_s8(vget_low_s8(a), vget_low_s8(token[0]));
                let low = vmlal_s8(low, vget_low_s8(b), vget_low_s8(token[1]));
                let high = vmull_high_s8(a, token[0]);
                let high = vmlal_high_s8(high, b, token[1]);
                sums[0] = vpadalq_s16(sums[0], low);
                sums[1] = vpadalq_s16(sums[1], high);
            }
        }
    }
    black_box(sums);
    (2 * 16 * VECTORS * TOKENS * PASSES) as u64
}

#[target_feature(enable = "neon,dotprod")]
fn dot_dotprod() -> u64 {
    let weights = black_box([[1u8; 16]; VECTORS]);
    let tokens = black_box([[2u8; 16]; TOKENS]);
    let tokens = tokens.map(|token| load(&token));
    let mut sums = [[vdupq_n_s32(0); 4]; TOKENS];
    for _ in 0..PASSES {
        let weights = black_box(&weights);
        for weights in weights.as_chunks::<4>().0 {
            for (sums, token) in sums.iter_mut().zip(tokens) {
                for (sum, weights) in sums.iter_mut().zip(weights) {
                    *sum = sdot(*sum, load(weights), token);
                }
            }
        }
    }
    black_box(sums);
    (2 * 16 * VECTORS * TOKENS * PASSES) as u64
}

#[inline]
#[target_feature(enable = "neon")]
fn load(bytes: &[u8; 16]) -> int8x16_t {
    // SAFETY: both types are sixteen bytes, and any bits are valid in them.
    unsafe { transmute::<[u8; 16], int8x16_t>(*bytes) }
}
