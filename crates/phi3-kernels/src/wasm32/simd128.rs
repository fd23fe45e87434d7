//! WebAssembly's vectors of 128 bits. A module that uses them is refused by a machine without, so
//! there is nothing to detect: this file is compiled where the target has the feature.
//!
//! Unsafe code is confined to the change between arrays and vectors of the same size.

use std::arch::wasm32::*;
use std::mem::transmute;

use crate::simd128::Vectors;

/// The instructions that this file was compiled for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Simd128;

impl Vectors for Simd128 {
    type F32 = v128;

    #[inline(always)]
    fn load(self, four: &[f32; 4]) -> v128 {
        // SAFETY: both types are sixteen bytes in the same order, and any bits are valid in them.
        unsafe { transmute::<[f32; 4], v128>(*four) }
    }

    #[inline(always)]
    fn store(self, v: v128) -> [f32; 4] {
        // SAFETY: both types are sixteen bytes in the same order, and any bits are valid in them.
        unsafe { transmute::<v128, [f32; 4]>(v) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> v128 {
        f32x4_splat(x)
    }

    #[inline(always)]
    fn load_f16(self, four: &[u16; 4]) -> v128 {
        let [a, b, c, d] = four.map(u32::from);
        let halves = u32x4(a, b, c, d);
        let magnitude = v128_and(halves, u32x4_splat(0x7fff));
        let sign = u32x4_shl(v128_xor(halves, magnitude), 16);
        // The exponent, rebased from 15 to 127 by a factor, which also normalizes subnormals; that
        // of infinities and NaN is the largest.
        let bits = u32x4_shl(magnitude, 13);
        let finite = f32x4_mul(bits, f32x4_splat(f32::from_bits((127 + 112) << 23)));
        let infinite = v128_or(bits, u32x4_splat(0x7f80_0000));
        let is_finite = u32x4_lt(magnitude, u32x4_splat(0x7c00));
        v128_or(sign, v128_bitselect(finite, infinite, is_finite))
    }

    #[inline(always)]
    fn to_f16(self, v: v128) -> [u16; 4] {
        const MAX: f32 = crate::scalar::attention::F16_MAX;
        let magnitude = f32x4_abs(v);
        let sign = u32x4_shr(v128_xor(v, magnitude), 16);
        let finite = f32x4_pmin(magnitude, f32x4_splat(MAX));
        // Added to a subnormal half, 0.5 rounds it to units of 2^-24, its last place.
        let half = f32x4_splat(0.5);
        let subnormal = u32x4_sub(f32x4_add(finite, half), half);
        // Half a unit of the half's last place, less one unit of the single's where the place is
        // even, carries exactly if the nearest half, or the even one of two, is above.
        let odd = v128_and(u32x4_shr(finite, 13), u32x4_splat(1));
        let rounded = u32x4_add(u32x4_add(finite, u32x4_splat(0x0fff)), odd);
        let normal = u32x4_shr(u32x4_sub(rounded, u32x4_splat(112 << 23)), 13);
        let is_subnormal = f32x4_lt(magnitude, f32x4_splat(f32::from_bits((127 - 14) << 23)));
        let half = v128_bitselect(subnormal, normal, is_subnormal);
        let is_infinite = f32x4_eq(magnitude, f32x4_splat(f32::INFINITY));
        let half = v128_bitselect(u32x4_splat(0x7c00), half, is_infinite);
        let half = v128_bitselect(half, u32x4_splat(0x7e00), f32x4_eq(v, v));
        let half = v128_or(half, sign);
        [
            u32x4_extract_lane::<0>(half) as u16,
            u32x4_extract_lane::<1>(half) as u16,
            u32x4_extract_lane::<2>(half) as u16,
            u32x4_extract_lane::<3>(half) as u16,
        ]
    }

    #[inline(always)]
    fn add(self, a: v128, b: v128) -> v128 {
        f32x4_add(a, b)
    }

    #[inline(always)]
    fn sub(self, a: v128, b: v128) -> v128 {
        f32x4_sub(a, b)
    }

    #[inline(always)]
    fn mul(self, a: v128, b: v128) -> v128 {
        f32x4_mul(a, b)
    }

    /// Rounded twice: a fused one is among the relaxed instructions, which may differ from machine
    /// to machine.
    #[inline(always)]
    fn mul_add(self, a: v128, b: v128, c: v128) -> v128 {
        f32x4_add(f32x4_mul(a, b), c)
    }

    #[inline(always)]
    fn larger(self, a: v128, b: v128) -> v128 {
        f32x4_pmax(b, a)
    }

    #[inline(always)]
    fn max(self, a: v128, b: v128) -> v128 {
        f32x4_max(a, b)
    }

    #[inline(always)]
    fn zero_where_less(self, v: v128, x: v128, limit: v128) -> v128 {
        v128_andnot(v, f32x4_lt(x, limit))
    }

    #[inline(always)]
    fn round(self, v: v128) -> v128 {
        f32x4_nearest(v)
    }

    #[inline(always)]
    fn power_of_2(self, integers: v128) -> v128 {
        let exponent = i32x4_add(i32x4_trunc_sat_f32x4(integers), i32x4_splat(127));
        i32x4_shl(exponent, 23)
    }

    #[inline(always)]
    fn sum_each(self, [a, b, c, d]: [v128; 4]) -> v128 {
        add_pairs(add_pairs(a, b), add_pairs(c, d))
    }
}

/// The sums of the two neighbors in `a`, then in `b`.
#[inline(always)]
fn add_pairs(a: v128, b: v128) -> v128 {
    let even = i32x4_shuffle::<0, 2, 4, 6>(a, b);
    let odd = i32x4_shuffle::<1, 3, 5, 7>(a, b);
    f32x4_add(even, odd)
}
