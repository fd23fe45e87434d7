//! The innermost loops of products with many tokens, in assembly.
//!
//! Sixteen rows times four tokens need eight sums, two vectors of weights, one of activations and
//! two of products at a time. Compilers order the same loads and products token by token, keep
//! the weights on the stack, and take twice as long.

use std::arch::asm;
use std::arch::x86_64::*;

use super::layouts::TILE;

/// For each token of a tile and each eight rows of a panel, one vector.
pub(super) type Sums = [[__m256i; 2]; TILE];

/// Four successive columns: of sixteen rows, eight to a vector.
pub(super) type Weights = [[u8; 32]; 2];

/// Two vectors of weights.
macro_rules! weights {
    ($c:literal) => {
        concat!(
            "vmovdqu {w0}, [{w} + 64*",
            $c,
            "]\n",
            "vmovdqu {w1}, [{w} + 64*",
            $c,
            " + 32]\n",
        )
    };
}

/// The same columns of token `$t`, in every lane.
macro_rules! token {
    ($c:literal, $t:literal) => {
        concat!("vpbroadcastd {b}, [{x} + 16*", $c, " + 4*", $t, "]\n")
    };
}

/// Unsigned weights times one token, begun.
macro_rules! begin {
    ($c:literal, $t:literal, $a:literal, $b:literal) => {
        concat!(
            token!($c, $t),
            "vpmaddubsw ",
            $a,
            ", {w0}, {b}\n",
            "vpmaddubsw ",
            $b,
            ", {w1}, {b}\n",
        )
    };
}

/// Unsigned weights times one token, added in 16 bits.
macro_rules! go_on {
    ($c:literal, $t:literal, $a:literal, $b:literal) => {
        concat!(
            token!($c, $t),
            "vpmaddubsw {p0}, {w0}, {b}\n",
            "vpmaddubsw {p1}, {w1}, {b}\n",
            "vpaddw ",
            $a,
            ", ",
            $a,
            ", {p0}\n",
            "vpaddw ",
            $b,
            ", ",
            $b,
            ", {p1}\n",
        )
    };
}

/// Signed weights times one token, widened and added in 32 bits.
macro_rules! signed {
    ($c:literal, $t:literal, $a:literal, $b:literal) => {
        concat!(
            token!($c, $t),
            "vpsignb {p0}, {b}, {w0}\n",
            "vpsignb {b}, {b}, {w1}\n",
            "vpmaddubsw {p0}, {p1}, {p0}\n",
            "vpmaddubsw {b}, {p2}, {b}\n",
            "vpmaddwd {p0}, {p0}, {ones}\n",
            "vpmaddwd {b}, {b}, {ones}\n",
            "vpaddd ",
            $a,
            ", ",
            $a,
            ", {p0}\n",
            "vpaddd ",
            $b,
            ", ",
            $b,
            ", {b}\n",
        )
    };
}

/// Four columns times four tokens.
macro_rules! columns {
    ($c:literal, $step:ident) => {
        concat!(
            $step!($c, "0", "{a0}", "{a1}"),
            $step!($c, "1", "{a2}", "{a3}"),
            $step!($c, "2", "{a4}", "{a5}"),
            $step!($c, "3", "{a6}", "{a7}"),
        )
    };
}

macro_rules! chain {
    ($w:ident, $x:ident, $($c:literal)*) => {{
        let (a0, a1, a2, a3, a4, a5, a6, a7);
        // SAFETY: the code reads 64 bytes of `w` and 16 of `x` for each of its steps, as many as
        // the lengths checked by the caller; it writes the named registers alone.
        unsafe {
            asm!(
                weights!("0"),
                columns!("0", begin),
                $(weights!($c), columns!($c, go_on),)*
                w = in(reg) $w.as_ptr(),
                x = in(reg) $x.as_ptr(),
                w0 = out(ymm_reg) _,
                w1 = out(ymm_reg) _,
                b = out(ymm_reg) _,
                p0 = out(ymm_reg) _,
                p1 = out(ymm_reg) _,
                a0 = out(ymm_reg) a0,
                a1 = out(ymm_reg) a1,
                a2 = out(ymm_reg) a2,
                a3 = out(ymm_reg) a3,
                a4 = out(ymm_reg) a4,
                a5 = out(ymm_reg) a5,
                a6 = out(ymm_reg) a6,
                a7 = out(ymm_reg) a7,
                options(pure, readonly, nostack, preserves_flags),
            );
        }
        [[a0, a1], [a2, a3], [a4, a5], [a6, a7]]
    }};
}

/// Products of unsigned weight bytes and activations, summed in i16 over `2 * w.len()` columns to
/// a lane: two, four or eight times four columns. The caller knows that no sum overflows.
///
/// # Panics
/// When `w` and `x` differ in length or have another one.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn unsigned(w: &[Weights], x: &[[i32; TILE]]) -> Sums {
    assert!(w.len() == x.len(), "as many columns of both");
    match w.len() {
        8 => chain!(w, x, "1" "2" "3" "4" "5" "6" "7"),
        4 => chain!(w, x, "1" "2" "3"),
        len => {
            assert!(len == 2, "two, four or eight times four columns");
            chain!(w, x, "1")
        }
    }
}

/// Products of signed weight bytes and activations, none of those -128, summed over 32 columns.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn signed(w: &[Weights; 8], x: &[[i32; TILE]; 8]) -> Sums {
    let ones = _mm256_set1_epi16(1);
    let zero = _mm256_setzero_si256();
    let [
        mut a0,
        mut a1,
        mut a2,
        mut a3,
        mut a4,
        mut a5,
        mut a6,
        mut a7,
    ] = [zero; 8];
    for (w, x) in w.iter().zip(x) {
        // SAFETY: the code reads 64 bytes of `w` and 16 of `x`, which the types have; it writes
        // the named registers alone.
        unsafe {
            asm!(
                weights!("0"),
                "vpabsb {p1}, {w0}",
                "vpabsb {p2}, {w1}",
                columns!("0", signed),
                w = in(reg) w.as_ptr(),
                x = in(reg) x.as_ptr(),
                ones = in(ymm_reg) ones,
                w0 = out(ymm_reg) _,
                w1 = out(ymm_reg) _,
                b = out(ymm_reg) _,
                p0 = out(ymm_reg) _,
                p1 = out(ymm_reg) _,
                p2 = out(ymm_reg) _,
                a0 = inout(ymm_reg) a0,
                a1 = inout(ymm_reg) a1,
                a2 = inout(ymm_reg) a2,
                a3 = inout(ymm_reg) a3,
                a4 = inout(ymm_reg) a4,
                a5 = inout(ymm_reg) a5,
                a6 = inout(ymm_reg) a6,
                a7 = inout(ymm_reg) a7,
                options(pure, readonly, nostack, preserves_flags),
            );
        }
    }
    [[a0, a1], [a2, a3], [a4, a5], [a6, a7]]
}
