//! Products of bytes with NEON, and with the dot-product instructions that cores since about 2018
//! have beside it.
//!
//! Unsafe code as in [`neon`](super::neon).

use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};
use std::mem::transmute;

use super::Neon;
use crate::MatrixRef;
use crate::activations::Quantized;
use crate::simd128::Vectors;
use crate::simd128::int8::{self, Dot, IntegerVectors};

/// Proof that this processor has NEON and the dot-product instructions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dotprod {
    pub(super) neon: Neon,
}

impl Dotprod {
    /// `None` on a processor without.
    pub(crate) fn new() -> Option<Self> {
        let neon = Neon::new()?;
        is_aarch64_feature_detected!("dotprod").then_some(Self { neon })
    }

    /// [`int8::int8_rows`] with those instructions turned on.
    pub(super) fn int8_rows(
        self,
        x: &Quantized,
        w: MatrixRef<'_>,
        first_row: usize,
        out: &mut [&mut [f32]],
    ) {
        #[target_feature(enable = "neon,dotprod")]
        fn with_dotprod(
            dotprod: Dotprod,
            x: &Quantized,
            w: MatrixRef<'_>,
            first_row: usize,
            out: &mut [&mut [f32]],
        ) {
            int8::int8_rows(dotprod.neon, dotprod, x, w, first_row, out);
        }
        // SAFETY: `self` exists only where `new` detected the instructions.
        unsafe { with_dotprod(self, x, w, first_row, out) }
    }
}

impl IntegerVectors for Neon {
    type I8 = int8x16_t;
    type I32 = int32x4_t;

    #[inline(always)]
    fn load_i8(self, sixteen: &[i8; 16]) -> int8x16_t {
        // SAFETY: both types are sixteen i8 in the same order, and any bits are valid in them.
        unsafe { transmute::<[i8; 16], int8x16_t>(*sixteen) }
    }

    #[inline(always)]
    fn zero(self) -> int32x4_t {
        // SAFETY: `self` exists only where `new` detected the instructions.
        unsafe { vdupq_n_s32(0) }
    }

    #[inline(always)]
    fn dot_i16(self, sum: int32x4_t, w: &[i16; 8], x: &[i16; 8]) -> int32x4_t {
        // SAFETY: `self` exists only where `new` detected the instructions; the changed types are
        // eight i16 in the same order, and any bits are valid in them.
        unsafe {
            let w = transmute::<[i16; 8], int16x8_t>(*w);
            let x = transmute::<[i16; 8], int16x8_t>(*x);
            let sum = vmlal_s16(sum, vget_low_s16(w), vget_low_s16(x));
            vmlal_high_s16(sum, w, x)
        }
    }

    #[inline(always)]
    fn add_scaled(self, sum: int32x4_t, v: int32x4_t, factor: i16) -> int32x4_t {
        // SAFETY: `self` exists only where `new` detected the instructions.
        unsafe { vmlaq_n_s32(sum, v, i32::from(factor)) }
    }

    #[inline(always)]
    fn sum_each_i32(self, [a, b, c, d]: [int32x4_t; 4]) -> int32x4_t {
        // SAFETY: `self` exists only where `new` detected the instructions.
        unsafe { vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d)) }
    }

    #[inline(always)]
    fn sum_pairs(self, eight: &[i16; 8]) -> int32x4_t {
        // SAFETY: `self` exists only where `new` detected the instructions; both types are eight
        // i16 in the same order, and any bits are valid in them.
        unsafe { vpaddlq_s16(transmute::<[i16; 8], int16x8_t>(*eight)) }
    }

    #[inline(always)]
    fn to_f32(self, v: int32x4_t) -> float32x4_t {
        // SAFETY: `self` exists only where `new` detected the instructions.
        unsafe { vcvtq_f32_s32(v) }
    }

    #[inline(always)]
    fn fused(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        self.mul_add(a, b, c)
    }
}

impl Dot<Neon> for Neon {
    /// Two products fit i16: `2 * 128 * 127`.
    #[inline(always)]
    fn dot(self, sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
        // SAFETY: `self` exists only where `new` detected the instructions.
        unsafe {
            let low = vmull_s8(vget_low_s8(w), vget_low_s8(x));
            let both = vmlal_high_s8(low, w, x);
            vpadalq_s16(sum, both)
        }
    }
}

impl Dot<Neon> for Dotprod {
    #[inline(always)]
    fn dot(self, sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
        // SAFETY: `self` exists only where `new` detected the instructions.
        unsafe { sdot(sum, w, x) }
    }
}

/// To each of four sums the products of four neighbors; `vdotq_s32` is not stable yet.
#[target_feature(enable = "neon,dotprod")]
#[inline]
pub(crate) fn sdot(sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    let mut out = sum;
    // SAFETY: the instruction, which the caller has, touches these three registers only.
    unsafe {
        asm!(
            "sdot {out:v}.4s, {w:v}.16b, {x:v}.16b",
            out = inout(vreg) out,
            w = in(vreg) w,
            x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    out
}
