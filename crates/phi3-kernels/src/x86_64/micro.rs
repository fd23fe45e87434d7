//! The innermost loops of products with many tokens, in assembly.
//!
//! Sixteen rows times four tokens need eight sums, two vectors of weights, one of activations and
//! two of products at a time. Compilers order the same loads and products token by token, keep
//! the weights on the stack, and take twice as long.

use std::arch::asm;
use std::arch::x86_64::*;

use super::layouts::{TILE, Tile};

/// Sums of a panel and a tile: for each token those of eight rows and of eight more. They are
/// aligned, because they are read soon after they are written, and a vector that lies in two lines
/// of the cache takes several times as long.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub(super) struct Sums<T>(pub(super) [[[T; 8]; 2]; TILE]);

/// Partial sums.
pub(super) type Lanes = Sums<f32>;

/// Sums inside a block.
pub(super) type Integers = Sums<i32>;

/// A scale of each row of a panel, twice.
pub(super) type Scales = [[i16; 16]; 2];

/// Four successive columns: of sixteen rows, eight to a vector.
pub(super) type Weights = [[u8; 32]; 2];

/// Two columns in sixteen bits: of sixteen rows, eight to a vector.
pub(super) type Pairs = [[i16; 16]; 2];

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

/// Pairs of i16 times those of one token, begun.
macro_rules! begin_pairs {
    ($c:literal, $t:literal, $a:literal, $b:literal) => {
        concat!(
            token!($c, $t),
            "vpmaddwd ",
            $a,
            ", {w0}, {b}\n",
            "vpmaddwd ",
            $b,
            ", {w1}, {b}\n",
        )
    };
}

/// Pairs of i16 times those of one token, added.
macro_rules! go_on_pairs {
    ($c:literal, $t:literal, $a:literal, $b:literal) => {
        concat!(
            token!($c, $t),
            "vpmaddwd {p0}, {w0}, {b}\n",
            "vpmaddwd {b}, {w1}, {b}\n",
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

pub(super) use {begin, columns, go_on, token, weights};

/// Sums of one token, widened with their scales and added to its integers.
macro_rules! widened {
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
            ", [{integers} + 64*",
            $t,
            "]\n",
            "vpaddd ",
            $b,
            ", ",
            $b,
            ", [{integers} + 64*",
            $t,
            " + 32]\n",
            "vmovdqu [{integers} + 64*",
            $t,
            "], ",
            $a,
            "\n",
            "vmovdqu [{integers} + 64*",
            $t,
            " + 32], ",
            $b,
            "\n",
        )
    };
}

macro_rules! chain {
    ($w:ident, $x:ident, $scales:ident, $integers:ident, $($c:literal)*) => {
        // SAFETY: the code reads 64 bytes of `w` and 16 of `x` for each of its steps, as many as
        // the lengths checked before, and the 64 of `scales`; it reads and writes the 256 of
        // `integers`, and else writes the named registers alone.
        unsafe {
            asm!(
                weights!("0"),
                columns!("0", begin),
                $(weights!($c), columns!($c, go_on),)*
                "vmovdqu {w0}, [{scales}]",
                "vmovdqu {w1}, [{scales} + 32]",
                widened!("0", "{a0}", "{a1}"),
                widened!("1", "{a2}", "{a3}"),
                widened!("2", "{a4}", "{a5}"),
                widened!("3", "{a6}", "{a7}"),
                w = in(reg) $w.as_ptr(),
                x = in(reg) $x.as_ptr(),
                scales = in(reg) $scales.as_ptr(),
                integers = in(reg) $integers.0.as_mut_ptr(),
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
                options(nostack, preserves_flags),
            )
        }
    };
}

/// What follows the products of a block of 32, for one token: widened sums less the offset, times
/// both scales, added to the token's lanes.
macro_rules! scaled {
    ($t:literal, $a:literal, $b:literal) => {
        concat!(
            "vpmaddwd ",
            $a,
            ", ",
            $a,
            ", {ones}\n",
            "vpmaddwd ",
            $b,
            ", ",
            $b,
            ", {ones}\n",
            "vpbroadcastd {b}, [{sums} + 4*",
            $t,
            "]\n",
            "vpslld {b}, {b}, {shift}\n",
            "vbroadcastss {w0}, [{scales} + 4*",
            $t,
            "]\n",
            "vpsubd ",
            $a,
            ", ",
            $a,
            ", {b}\n",
            "vpsubd ",
            $b,
            ", ",
            $b,
            ", {b}\n",
            "vmulps {p0}, {w0}, [{d}]\n",
            "vmulps {p1}, {w0}, [{d} + 32]\n",
            "vcvtdq2ps ",
            $a,
            ", ",
            $a,
            "\n",
            "vcvtdq2ps ",
            $b,
            ", ",
            $b,
            "\n",
            "vfmadd213ps {p0}, ",
            $a,
            ", [{lanes} + 64*",
            $t,
            "]\n",
            "vfmadd213ps {p1}, ",
            $b,
            ", [{lanes} + 64*",
            $t,
            " + 32]\n",
            "vmovups [{lanes} + 64*",
            $t,
            "], {p0}\n",
            "vmovups [{lanes} + 64*",
            $t,
            " + 32], {p1}\n",
        )
    };
}

/// Adds a block of 32 four-bit weights with an offset of `2^SHIFT` to `lanes`: for each token and
/// each row `(d * scale) * (sum of products - offset * sum of activations)` by one fused
/// multiply-add.
#[target_feature(enable = "avx2,fma")]
#[inline]
pub(super) fn add_four_bit<const SHIFT: i32>(
    w: &[Weights; 8],
    d: &[[f32; 8]; 2],
    x: &Tile,
    lanes: &mut Lanes,
) {
    let ones = _mm256_set1_epi16(1);
    // SAFETY: the code reads the 512 bytes of `w`, the 64 of `d`, the 128 of `x.values` and the 16
    // of its scales and of its sums, and reads and writes the 256 of `lanes`; else it writes the
    // named registers alone.
    unsafe {
        asm!(
            weights!("0"),
            columns!("0", begin),
            weights!("1"), columns!("1", go_on),
            weights!("2"), columns!("2", go_on),
            weights!("3"), columns!("3", go_on),
            weights!("4"), columns!("4", go_on),
            weights!("5"), columns!("5", go_on),
            weights!("6"), columns!("6", go_on),
            weights!("7"), columns!("7", go_on),
            scaled!("0", "{a0}", "{a1}"),
            scaled!("1", "{a2}", "{a3}"),
            scaled!("2", "{a4}", "{a5}"),
            scaled!("3", "{a6}", "{a7}"),
            shift = const SHIFT,
            ones = in(ymm_reg) ones,
            w = in(reg) w.as_ptr(),
            d = in(reg) d.as_ptr(),
            x = in(reg) x.values.as_ptr(),
            scales = in(reg) x.scales.as_ptr(),
            sums = in(reg) x.sums.as_ptr(),
            lanes = in(reg) lanes.0.as_mut_ptr(),
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
            options(nostack, preserves_flags),
        );
    }
}

/// Adds products of unsigned weight bytes and activations, times the scales of the rows, to
/// `integers`: two, four or eight times four columns. The caller knows that sums of so many
/// products fit i16.
///
/// # Panics
/// When `w` and `x` differ in length or have another one.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn add_unsigned(
    w: &[Weights],
    x: &[[i32; TILE]],
    scales: &Scales,
    integers: &mut Integers,
) {
    assert!(w.len() == x.len(), "as many columns of both");
    match w.len() {
        8 => chain!(w, x, scales, integers, "1" "2" "3" "4" "5" "6" "7"),
        4 => chain!(w, x, scales, integers, "1" "2" "3"),
        len => {
            assert!(len == 2, "two, four or eight times four columns");
            chain!(w, x, scales, integers, "1");
        }
    }
}

macro_rules! pairs {
    ($w:ident, $x:ident, $($c:literal)*) => {{
        let (a0, a1, a2, a3, a4, a5, a6, a7);
        // SAFETY: the code reads 64 bytes of `w` and 16 of `x` for each of its steps, as many as
        // the lengths checked before; it writes the named registers alone.
        unsafe {
            asm!(
                weights!("0"),
                columns!("0", begin_pairs),
                $(weights!($c), columns!($c, go_on_pairs),)*
                w = in(reg) $w.as_ptr(),
                x = in(reg) $x.as_ptr(),
                w0 = out(ymm_reg) _,
                w1 = out(ymm_reg) _,
                b = out(ymm_reg) _,
                p0 = out(ymm_reg) _,
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

/// Products of the minima of rows and the sums of activations they belong to, two groups to a
/// lane, four or eight lanes after each other.
///
/// # Panics
/// When `w` and `x` differ in length or have another one.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn minima(w: &[Scales], x: &[[i32; TILE]]) -> [[__m256i; 2]; TILE] {
    assert!(w.len() == x.len(), "as many groups of both");
    if w.len() == 8 {
        pairs!(w, x, "1" "2" "3" "4" "5" "6" "7")
    } else {
        assert!(w.len() == 4, "four or eight pairs of groups");
        pairs!(w, x, "1" "2" "3")
    }
}

/// Products of weights and activations of sixteen bits, two columns to a lane.
///
/// # Panics
/// When `w` and `x` differ in length, are empty, or are not whole fours of pairs.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn wide(w: &[Pairs], x: &[[i32; TILE]]) -> [[__m256i; 2]; TILE] {
    assert!(w.len() == x.len(), "as many columns of both");
    assert!(!w.is_empty() && w.len().is_multiple_of(4), "fours of pairs");
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
    // SAFETY: each round of the loop reads 256 bytes of `w` and 64 of `x`, four elements of both,
    // and there are as many rounds as fours; the code writes the named registers alone.
    unsafe {
        asm!(
            "2:",
            weights!("0"), columns!("0", go_on_pairs),
            weights!("1"), columns!("1", go_on_pairs),
            weights!("2"), columns!("2", go_on_pairs),
            weights!("3"), columns!("3", go_on_pairs),
            "add {w}, 256",
            "add {x}, 64",
            "dec {fours}",
            "jnz 2b",
            w = inout(reg) w.as_ptr() => _,
            x = inout(reg) x.as_ptr() => _,
            fours = inout(reg) w.len() / 4 => _,
            w0 = out(ymm_reg) _,
            w1 = out(ymm_reg) _,
            b = out(ymm_reg) _,
            p0 = out(ymm_reg) _,
            a0 = inout(ymm_reg) a0,
            a1 = inout(ymm_reg) a1,
            a2 = inout(ymm_reg) a2,
            a3 = inout(ymm_reg) a3,
            a4 = inout(ymm_reg) a4,
            a5 = inout(ymm_reg) a5,
            a6 = inout(ymm_reg) a6,
            a7 = inout(ymm_reg) a7,
            options(pure, readonly, nostack),
        );
    }
    [[a0, a1], [a2, a3], [a4, a5], [a6, a7]]
}
