//! NEON, which every 64-bit ARM processor but for some micro-controllers has.
//!
//! Unsafe code is confined to the calls of instructions and of functions that use them, which the
//! token [`Neon`] vouches for, to the instructions that the standard library does not offer, and to
//! the change between arrays and vectors of the same size.

use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};
use std::mem::transmute;

use crate::simd128::Vectors;

/// Proof that this processor has NEON.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neon(());

impl Neon {
    /// `None` on a processor without.
    pub(crate) fn new() -> Option<Self> {
        is_aarch64_feature_detected!("neon").then_some(Self(()))
    }
}

impl Vectors for Neon {
    type F32 = float32x4_t;

    #[inline(always)]
    fn load(self, four: &[f32; 4]) -> float32x4_t {
        // SAFETY: both types are four f32 in the same order, and any bits are valid in them.
        unsafe { transmute::<[f32; 4], float32x4_t>(*four) }
    }

    #[inline(always)]
    fn store(self, v: float32x4_t) -> [f32; 4] {
        // SAFETY: both types are four f32 in the same order, and any bits are valid in them.
        unsafe { transmute::<float32x4_t, [f32; 4]>(v) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> float32x4_t {
        self.load(&[x; 4])
    }

    #[inline(always)]
    fn load_f16(self, four: &[u16; 4]) -> float32x4_t {
        // SAFETY: `self` exists only where `new` detected the instructions; both types are eight
        // bytes, and any bits are valid in them.
        unsafe { from_f16(transmute::<[u16; 4], uint16x4_t>(*four)) }
    }

    #[inline(always)]
    fn to_f16(self, v: float32x4_t) -> [u16; 4] {
        // SAFETY: `self` exists only where `new` detected the instructions; both types are eight
        // bytes, and any bits are valid in them.
        unsafe { transmute::<uint16x4_t, [u16; 4]>(to_f16(v)) }
    }

    #[inline(always)]
    fn add(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: `self` exists only where `new` detected the instructions.
        unsafe { vaddq_f32(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: `self` exists only where `new` detected the instructions.
        unsafe { vsubq_f32(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: `self` exists only where `new` detected the instructions.
        unsafe { vmulq_f32(a, b) }
    }

    #[inline(always)]
    fn mul_add(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        // SAFETY: `self` exists only where `new` detected the instructions.
        unsafe { vfmaq_f32(c, a, b) }
    }

    #[inline(always)]
    fn larger(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: `self` exists only where `new` detected the instructions.
        unsafe { vmaxnmq_f32(a, b) }
    }

    #[inline(always)]
    fn max(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: `self` exists only where `new` detected the instructions.
        unsafe { vmaxq_f32(a, b) }
    }

    #[inline(always)]
    fn zero_where_less(self, v: float32x4_t, x: float32x4_t, limit: float32x4_t) -> float32x4_t {
        // SAFETY: `self` exists only where `new` detected the instructions.
        unsafe {
            let bits = vbicq_u32(vreinterpretq_u32_f32(v), vcltq_f32(x, limit));
            vreinterpretq_f32_u32(bits)
        }
    }

    #[inline(always)]
    fn round(self, v: float32x4_t) -> float32x4_t {
        // SAFETY: `self` exists only where `new` detected the instructions.
        unsafe { vrndnq_f32(v) }
    }

    #[inline(always)]
    fn power_of_2(self, integers: float32x4_t) -> float32x4_t {
        // SAFETY: `self` exists only where `new` detected the instructions.
        unsafe {
            let exponent = vaddq_s32(vcvtq_s32_f32(integers), vdupq_n_s32(127));
            vreinterpretq_f32_s32(vshlq_n_s32::<23>(exponent))
        }
    }

    #[inline(always)]
    fn sum_each(self, [a, b, c, d]: [float32x4_t; 4]) -> float32x4_t {
        // SAFETY: `self` exists only where `new` detected the instructions.
        unsafe { vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)) }
    }
}

/// Half precision to f32; `vcvt_f32_f16` is not stable yet.
#[target_feature(enable = "neon")]
#[inline]
fn from_f16(halves: uint16x4_t) -> float32x4_t {
    let out;
    // SAFETY: the instruction, part of NEON, touches these two registers only.
    unsafe {
        asm!(
            "fcvtl {out:v}.4s, {halves:v}.4h",
            out = lateout(vreg) out,
            halves = in(vreg) halves,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    out
}

/// f32 to half precision; what is finite stays so.
#[target_feature(enable = "neon")]
#[inline]
fn to_f16(v: float32x4_t) -> uint16x4_t {
    const MAX: f32 = crate::scalar::attention::F16_MAX;
    let clamped = vmaxq_f32(vminq_f32(v, vdupq_n_f32(MAX)), vdupq_n_f32(-MAX));
    let infinite = vceqq_f32(vabsq_f32(v), vdupq_n_f32(f32::INFINITY));
    let v = vbslq_f32(infinite, v, clamped);
    let out;
    // SAFETY: the instruction, part of NEON, touches these two registers only. It rounds as
    // Rust's floating-point environment says, to nearest even.
    unsafe {
        asm!(
            "fcvtn {out:v}.4h, {v:v}.4s",
            out = lateout(vreg) out,
            v = in(vreg) v,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    out
}
