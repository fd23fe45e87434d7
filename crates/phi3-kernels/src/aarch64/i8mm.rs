//! Products of bytes with the matrix products (FEAT_I8MM) that cores since about 2021 have.
//!
//! Unsafe code as in [`neon`](super::neon).

use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};

use super::{Dotprod, Neon};
use crate::MatrixRef;
use crate::activations::Quantized;
use crate::simd128::pairs::{self, PairDot};

/// Proof that this processor has NEON, the dot products and the matrix products.
#[derive(Clone, Copy, Debug)]
pub(crate) struct I8mm {
    pub(super) dotprod: Dotprod,
}

impl I8mm {
    /// `None` on a processor without.
    pub(crate) fn new() -> Option<Self> {
        let dotprod = Dotprod::new()?;
        is_aarch64_feature_detected!("i8mm").then_some(Self { dotprod })
    }

    /// [`pairs::int8_rows`] with those instructions turned on.
    pub(super) fn int8_rows(
        self,
        x: &Quantized,
        w: MatrixRef<'_>,
        first_row: usize,
        out: &mut [&mut [f32]],
    ) {
        #[target_feature(enable = "neon,i8mm")]
        fn with_i8mm(
            i8mm: I8mm,
            x: &Quantized,
            w: MatrixRef<'_>,
            first_row: usize,
            out: &mut [&mut [f32]],
        ) {
            pairs::int8_rows(i8mm.dotprod.neon, i8mm, x, w, first_row, out);
        }
        // SAFETY: `self` exists only where `new` detected the instructions.
        unsafe { with_i8mm(self, x, w, first_row, out) }
    }
}

impl PairDot<Neon> for I8mm {
    #[inline(always)]
    fn dot(self, sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
        // SAFETY: `self` exists only where `new` detected the instructions.
        unsafe { smmla(sum, w, x) }
    }

    #[inline(always)]
    fn add_scaled(self, sum: int32x4_t, v: int32x4_t, a: i16, b: i16) -> int32x4_t {
        // SAFETY: `self` exists only where `new` detected the instructions.
        unsafe {
            let scales = vcombine_s32(vdup_n_s32(a.into()), vdup_n_s32(b.into()));
            vmlaq_s32(sum, v, scales)
        }
    }

    #[inline(always)]
    fn transpose(self, [a, b, c, d]: [int32x4_t; 4]) -> [int32x4_t; 4] {
        // SAFETY: `self` exists only where `new` detected the instructions.
        unsafe {
            // Lanes 0 and 1 of two vectors side by side, then lanes 2 and 3.
            let (ab_low, ab_high) = (vzip1q_s32(a, b), vzip2q_s32(a, b));
            let (cd_low, cd_high) = (vzip1q_s32(c, d), vzip2q_s32(c, d));
            [
                vcombine_s32(vget_low_s32(ab_low), vget_low_s32(cd_low)),
                vcombine_s32(vget_high_s32(ab_low), vget_high_s32(cd_low)),
                vcombine_s32(vget_low_s32(ab_high), vget_low_s32(cd_high)),
                vcombine_s32(vget_high_s32(ab_high), vget_high_s32(cd_high)),
            ]
        }
    }
}

/// Two rows of `w` times two rows of `x`, added to a matrix by rows; `vmmlaq_s32` is not stable yet.
#[target_feature(enable = "neon,i8mm")]
#[inline]
fn smmla(sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    let mut out = sum;
    // SAFETY: the instruction, which the caller has, touches these three registers only.
    unsafe {
        asm!(
            "smmla {out:v}.4s, {w:v}.16b, {x:v}.16b",
            out = inout(vreg) out,
            w = in(vreg) w,
            x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    out
}
