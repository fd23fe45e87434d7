//! The float types.

use crate::scalar::f16_to_f32;

#[inline(always)]
pub(super) fn f32(x: &[f32], out: &mut [u8]) {
    let (outs, _) = out.as_chunks_mut();
    for (x, out) in x.iter().zip(outs) {
        *out = x.to_le_bytes();
    }
}

#[inline(always)]
pub(super) fn f16(x: &[f32], out: &mut [u8]) {
    let (outs, _) = out.as_chunks_mut();
    for (x, out) in x.iter().zip(outs) {
        *out = to_f16(*x).to_le_bytes();
    }
}

#[inline(always)]
pub(super) fn bf16(x: &[f32], out: &mut [u8]) {
    let (outs, _) = out.as_chunks_mut();
    for (x, out) in x.iter().zip(outs) {
        *out = to_bf16(*x).to_le_bytes();
    }
}

/// A factor as it will be read: rounded to half precision. `d` is finite and at most [`super::LARGEST`].
#[inline(always)]
pub(super) fn factor(d: f32) -> (u16, f32) {
    let half = to_f16(d);
    (half, f16_to_f32(half))
}

/// Single precision to half, to nearest, ties to even; too large becomes infinite.
#[inline(always)]
fn to_f16(x: f32) -> u16 {
    let bits = x.to_bits();
    let sign = (bits >> 16) as u16 & 0x8000;
    let magnitude = bits & 0x7fff_ffff;
    let half = if magnitude > 0x7f80_0000 {
        0x7e00
    } else if magnitude >= 0x4780_0000 {
        // 65536 and more, infinity included.
        0x7c00
    } else if magnitude >= 0x3880_0000 {
        // Normal halves. The carry of rounding up may reach the exponent, which is right.
        let odd = magnitude >> 13 & 1;
        ((magnitude - (112 << 23) + 0xfff + odd) >> 13) as u16
    } else {
        // Subnormal halves count units of 2^-24; adding 0.5, whose last place is that, rounds.
        let shifted = f32::from_bits(magnitude) + 0.5;
        (shifted.to_bits() - 0.5f32.to_bits()) as u16
    };
    half | sign
}

/// Single precision to its upper half, to nearest, ties to even.
#[inline(always)]
fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        // Rounding could carry a NaN into infinity.
        return (bits >> 16) as u16 | 0x0040;
    }
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_round_as_the_half_crate_does() {
        let check = |x: f32| {
            let (f, b) = (half::f16::from_f32(x), half::bf16::from_f32(x));
            if x.is_nan() {
                assert!(half::f16::from_bits(to_f16(x)).is_nan());
                assert!(half::bf16::from_bits(to_bf16(x)).is_nan());
            } else {
                assert_eq!(to_f16(x), f.to_bits(), "{x:e}");
                assert_eq!(to_bf16(x), b.to_bits(), "{x:e}");
            }
        };
        // Every half, and the singles around it and around the middle to the next.
        for h in 0..=u16::MAX {
            let x = f16_to_f32(h).to_bits();
            for bits in [x, x ^ 1, x | 0x0fff, x | 0x1000, x | 0x1001, x | 0x1fff] {
                check(f32::from_bits(bits));
            }
        }
        let mut random = crate::testing::Random(1);
        for _ in 0..100_000 {
            check(f32::from_bits(random.bits() as u32));
        }
    }
}
