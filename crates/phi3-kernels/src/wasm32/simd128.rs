//! WebAssembly's vectors of 128 bits. A module that uses them is refused by a machine without, so
//! there is nothing to detect: this file is compiled where the target has the feature.
//!
//! Unsafe code is confined to the change between arrays and vectors of the same size.

use std::arch::wasm32::*;
use std::mem::transmute;

use crate::simd128::Vectors;
use crate::simd128::int8::{Dot, IntegerVectors};

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

impl IntegerVectors for Simd128 {
    type I8 = v128;
    type I32 = v128;

    #[inline(always)]
    fn load_i8(self, sixteen: &[i8; 16]) -> v128 {
        // SAFETY: both types are sixteen bytes in the same order, and any bits are valid in them.
        unsafe { transmute::<[i8; 16], v128>(*sixteen) }
    }

    #[inline(always)]
    fn zero(self) -> v128 {
        i32x4_splat(0)
    }

    #[inline(always)]
    fn dot_i16(self, sum: v128, w: &[i16; 8], x: &[i16; 8]) -> v128 {
        i32x4_add(sum, i32x4_dot_i16x8(load_i16(w), load_i16(x)))
    }

    #[inline(always)]
    fn add_scaled(self, sum: v128, v: v128, factor: i16) -> v128 {
        i32x4_add(sum, i32x4_mul(v, i32x4_splat(i32::from(factor))))
    }

    #[inline(always)]
    fn sum_each_i32(self, [a, b, c, d]: [v128; 4]) -> v128 {
        add_pairs_i32(add_pairs_i32(a, b), add_pairs_i32(c, d))
    }

    #[inline(always)]
    fn sum_pairs(self, eight: &[i16; 8]) -> v128 {
        i32x4_extadd_pairwise_i16x8(load_i16(eight))
    }

    #[inline(always)]
    fn to_f32(self, v: v128) -> v128 {
        f32x4_convert_i32x4(v)
    }

    #[inline(always)]
    fn fused(self, a: v128, b: v128, c: v128) -> v128 {
        let low = fused_in_f64(low_f64(a), low_f64(b), low_f64(c));
        let high = |v| low_f64(i64x2_shuffle::<1, 1>(v, v));
        let high = fused_in_f64(high(a), high(b), high(c));
        i64x2_shuffle::<0, 2>(f32x4_demote_f64x2_zero(low), f32x4_demote_f64x2_zero(high))
    }
}

impl Dot<Simd128> for Simd128 {
    /// Two products fit i16: `2 * 128 * 127`.
    #[inline(always)]
    fn dot(self, sum: v128, w: v128, x: v128) -> v128 {
        let both = i16x8_add(i16x8_extmul_low_i8x16(w, x), i16x8_extmul_high_i8x16(w, x));
        i32x4_add(sum, i32x4_extadd_pairwise_i16x8(both))
    }
}

#[inline(always)]
fn load_i16(eight: &[i16; 8]) -> v128 {
    // SAFETY: both types are sixteen bytes in the same order, and any bits are valid in them.
    unsafe { transmute::<[i16; 8], v128>(*eight) }
}

#[inline(always)]
fn add_pairs_i32(a: v128, b: v128) -> v128 {
    let even = i32x4_shuffle::<0, 2, 4, 6>(a, b);
    let odd = i32x4_shuffle::<1, 3, 5, 7>(a, b);
    i32x4_add(even, odd)
}

/// The lower two f32.
#[inline(always)]
fn low_f64(v: v128) -> v128 {
    f64x2_promote_low_f32x4(v)
}

/// `a * b + c` of numbers that were f32, rounded so that rounding once more to f32 gives what
/// rounding once would have: to a neighbor whose last bit is 1 where it is not exact (Boldo and
/// Melquiond, 2008).
#[inline(always)]
fn fused_in_f64(a: v128, b: v128, c: v128) -> v128 {
    // Twice 24 bits fit the 53 of f64: exact.
    let product = f64x2_mul(a, b);
    let sum = f64x2_add(product, c);
    // What the sum lacks, exactly (Knuth).
    let c_part = f64x2_sub(sum, product);
    let product_part = f64x2_sub(sum, c_part);
    let error = f64x2_add(f64x2_sub(product, product_part), f64x2_sub(c, c_part));
    // An even sum that is too small in magnitude goes up to the next number, one that is too
    // large down. Infinities and NaN have the error NaN and stay.
    let zero = f64x2_splat(0.0);
    let too_small = v128_or(
        v128_and(f64x2_gt(sum, zero), f64x2_gt(error, zero)),
        v128_and(f64x2_lt(sum, zero), f64x2_lt(error, zero)),
    );
    let too_large = v128_or(
        v128_and(f64x2_gt(sum, zero), f64x2_lt(error, zero)),
        v128_and(f64x2_lt(sum, zero), f64x2_gt(error, zero)),
    );
    let is_even = i64x2_eq(v128_and(sum, i64x2_splat(1)), i64x2_splat(0));
    // As integers, masks are -1.
    let up = v128_and(too_small, is_even);
    let down = v128_and(too_large, is_even);
    i64x2_add(i64x2_sub(sum, up), down)
}
