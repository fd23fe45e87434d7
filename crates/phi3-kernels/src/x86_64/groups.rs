//! The innermost loops of products of blocks of 256 with many tokens, in assembly, as those of
//! [`micro`](super::micro).
//!
//! They are loops, not long sequences: unrolled over a block they have thousands of instructions,
//! more than the processor keeps decoded.

use std::arch::asm;
use std::arch::x86_64::*;

use super::layouts::TILE;
use super::micro::{Scales, Weights, begin, columns, go_on, token, weights};

/// Two vectors of weights times two tokens.
macro_rules! two_tokens {
    ($c:literal, $step:ident) => {
        concat!(
            $step!($c, "0", "{a0}", "{a1}"),
            $step!($c, "1", "{a2}", "{a3}"),
        )
    };
}

/// Sums in 16 bits times the scales of the rows, added to the integers.
macro_rules! scaled {
    ($($a:literal $i:literal $scales:literal,)*) => {
        concat!($(
            "vpmaddwd ", $a, ", ", $a, ", ", $scales, "\n",
            "vpaddd ", $i, ", ", $i, ", ", $a, "\n",
        )*)
    };
}

/// [`scaled`] for two tokens.
macro_rules! scaled_two {
    () => {
        scaled!(
            "{a0}" "{i0}" "{s0}",
            "{a1}" "{i1}" "{s1}",
            "{a2}" "{i2}" "{s0}",
            "{a3}" "{i3}" "{s1}",
        )
    };
}

/// All groups of sixteen columns of a block times two tokens: their integers stay in registers,
/// which those of four tokens have no room in.
macro_rules! sixteens {
    ($w:ident, $x:expr, $scales:ident, $($group:expr),* $(,)?) => {{
        let zero = _mm256_setzero_si256();
        let [mut i0, mut i1, mut i2, mut i3] = [zero; 4];
        // SAFETY: each of the sixteen rounds reads 256 bytes of `w`, 64 of `scales`, and of `x`
        // the 8 bytes at its start and at 16, 32 and 48: all of the types' bytes and no others,
        // for the second two tokens of a tile begin 8 bytes behind the first. It writes the named
        // registers alone.
        unsafe {
            asm!(
                "2:",
                "vmovdqu {s0}, [{scales}]",
                "vmovdqu {s1}, [{scales} + 32]",
                $($group,)*
                "add {w}, 256",
                "add {x}, 64",
                "add {scales}, 64",
                "dec {rounds}",
                "jnz 2b",
                w = inout(reg) $w.as_ptr() => _,
                x = inout(reg) $x => _,
                scales = inout(reg) $scales.as_ptr() => _,
                rounds = inout(reg) 16usize => _,
                w0 = out(ymm_reg) _,
                w1 = out(ymm_reg) _,
                b = out(ymm_reg) _,
                p0 = out(ymm_reg) _,
                p1 = out(ymm_reg) _,
                s0 = out(ymm_reg) _,
                s1 = out(ymm_reg) _,
                a0 = out(ymm_reg) _,
                a1 = out(ymm_reg) _,
                a2 = out(ymm_reg) _,
                a3 = out(ymm_reg) _,
                i0 = inout(ymm_reg) i0,
                i1 = inout(ymm_reg) i1,
                i2 = inout(ymm_reg) i2,
                i3 = inout(ymm_reg) i3,
                options(pure, readonly, nostack),
            );
        }
        [[i0, i1], [i2, i3]]
    }};
}

/// Sums of 256 products of weight bytes, none negative, and activations, times the scales of the
/// groups of sixteen, for sixteen rows and four tokens. `CHAIN` is how many times four columns may
/// be added in 16 bits: two, four or eight; by eight both scales of 32 columns are the same.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn block<const CHAIN: usize>(
    w: &[[Weights; 8]; 8],
    x: &[[[i32; TILE]; 8]; 8],
    scales: &[Scales; 16],
) -> [[__m256i; 2]; TILE] {
    const { assert!(matches!(CHAIN, 2 | 4 | 8)) };
    if CHAIN == 8 {
        return in_memory(w, x, scales);
    }
    let mut sums = [[_mm256_setzero_si256(); 2]; TILE];
    for first in [0, 2] {
        let x = x.as_ptr().cast::<i32>().wrapping_add(first);
        let two = if CHAIN == 4 {
            sixteens!(
                w,
                x,
                scales,
                weights!("0"),
                two_tokens!("0", begin),
                weights!("1"),
                two_tokens!("1", go_on),
                weights!("2"),
                two_tokens!("2", go_on),
                weights!("3"),
                two_tokens!("3", go_on),
                scaled_two!(),
            )
        } else {
            sixteens!(
                w,
                x,
                scales,
                weights!("0"),
                two_tokens!("0", begin),
                weights!("1"),
                two_tokens!("1", go_on),
                scaled_two!(),
                weights!("2"),
                two_tokens!("2", begin),
                weights!("3"),
                two_tokens!("3", go_on),
                scaled_two!(),
            )
        };
        sums[first..first + 2].copy_from_slice(&two);
    }
    sums
}

/// Sums of one token in 16 bits times the scales, added to its integers.
macro_rules! scaled_in_memory {
    ($t:literal, $a:literal, $b:literal) => {
        concat!(
            "vpmaddwd ",
            $a,
            ", ",
            $a,
            ", {w0}\n",
            "vpmaddwd ",
            $b,
            ", ",
            $b,
            ", {w1}\n",
            "vpaddd ",
            $a,
            ", ",
            $a,
            ", [{sums} + 64*",
            $t,
            "]\n",
            "vpaddd ",
            $b,
            ", ",
            $b,
            ", [{sums} + 64*",
            $t,
            " + 32]\n",
            "vmovdqa [{sums} + 64*",
            $t,
            "], ",
            $a,
            "\n",
            "vmovdqa [{sums} + 64*",
            $t,
            " + 32], ",
            $b,
            "\n",
        )
    };
}

/// [`block`] for 32 columns to a sum in 16 bits: so many for a load and a store of the integers
/// that all four tokens are better taken at once.
#[target_feature(enable = "avx2")]
#[inline]
fn in_memory(
    w: &[[Weights; 8]; 8],
    x: &[[[i32; TILE]; 8]; 8],
    scales: &[Scales; 16],
) -> [[__m256i; 2]; TILE] {
    let mut sums = [[_mm256_setzero_si256(); 2]; TILE];
    // SAFETY: each of the eight rounds reads 512 bytes of `w`, 128 of `x`, and the first 64 of 128
    // of `scales`, all of them types' own; it reads and writes the 256 of `sums`, which are
    // aligned as vectors are, and else writes the named registers alone.
    unsafe {
        asm!(
            "2:",
            weights!("0"), columns!("0", begin),
            weights!("1"), columns!("1", go_on),
            weights!("2"), columns!("2", go_on),
            weights!("3"), columns!("3", go_on),
            weights!("4"), columns!("4", go_on),
            weights!("5"), columns!("5", go_on),
            weights!("6"), columns!("6", go_on),
            weights!("7"), columns!("7", go_on),
            "vmovdqu {w0}, [{scales}]",
            "vmovdqu {w1}, [{scales} + 32]",
            scaled_in_memory!("0", "{a0}", "{a1}"),
            scaled_in_memory!("1", "{a2}", "{a3}"),
            scaled_in_memory!("2", "{a4}", "{a5}"),
            scaled_in_memory!("3", "{a6}", "{a7}"),
            "add {w}, 512",
            "add {x}, 128",
            "add {scales}, 128",
            "dec {rounds}",
            "jnz 2b",
            w = inout(reg) w.as_ptr() => _,
            x = inout(reg) x.as_ptr() => _,
            scales = inout(reg) scales.as_ptr() => _,
            rounds = inout(reg) 8usize => _,
            sums = in(reg) sums.as_mut_ptr(),
            w0 = out(ymm_reg) _,
            w1 = out(ymm_reg) _,
            b = out(ymm_reg) _,
            p0 = out(ymm_reg) _,
            p1 = out(ymm_reg) _,
            a0 = out(ymm_reg) _,
            a1 = out(ymm_reg) _,
            a2 = out(ymm_reg) _,
            a3 = out(ymm_reg) _,
            a4 = out(ymm_reg) _,
            a5 = out(ymm_reg) _,
            a6 = out(ymm_reg) _,
            a7 = out(ymm_reg) _,
            options(nostack),
        );
    }
    sums
}
