//! The loops of [`dots`](super), in assembly: compilers load more of a step than registers are left, and
//! keep sums in memory.

use std::arch::asm;
use std::arch::x86_64::*;

use super::{Ahead, BLOCK, Kernel, Sums, Tile};
use crate::BlockType;
use crate::x86_64::vector::load_f32;

/// AVX2, FMA and F16C: three rows and four tokens are twelve sums, with three vectors of weights and one
/// of a token all sixteen registers.
pub(super) struct Avx2;

/// AVX-512F: four rows and six tokens are 24 sums of 32 registers.
pub(super) struct Avx512;

/// Weights of some rows to registers, by the instructions of a type.
macro_rules! load_f16 {
    ($register:literal, $from:literal) => {
        concat!("vcvtph2ps ", $register, ", ", $from, "\n")
    };
}

macro_rules! load_bf16 {
    ($register:literal, $from:literal) => {
        concat!(
            "vpmovzxwd ",
            $register,
            ", ",
            $from,
            "\n",
            "vpslld ",
            $register,
            ", ",
            $register,
            ", 16\n",
        )
    };
}

/// A line of each row asked for ahead, of the first two, or none.
macro_rules! ahead {
    (all, $($from:literal),*) => {
        concat!($("prefetcht1 ", $from, "\n",)*)
    };
    (two, $first:literal, $second:literal, $($from:literal),*) => {
        ahead!(all, $first, $second)
    };
    (none, $($from:literal),*) => {
        ""
    };
}

/// The loop over blocks and steps; `$bytes` of a row and `$line` of a token are a step.
macro_rules! steps {
    ($bytes:literal, $line:literal, [$($begin:expr),* $(,)?], [$($step:expr),* $(,)?], [$($end:expr),* $(,)?] $(,)?) => {
        concat!(
            $($begin,)*
            "2:\n",
            "mov {c}, {steps}\n",
            "3:\n",
            $($step,)*
            "add {w}, ", $bytes, "\n",
            "add {v}, ", $bytes, "\n",
            "add {p}, ", $bytes, "\n",
            "add {q}, ", $bytes, "\n",
            "add {x}, ", $line, "\n",
            "dec {c}\n",
            "jnz 3b\n",
            "add {x}, {to_block}\n",
            "dec {blocks}\n",
            "jnz 2b\n",
            $($end,)*
        )
    };
}

macro_rules! run {
    ($tile:ident, $sums:ident, $line:literal, $code:expr, [$($register:tt),*]) => {
        // SAFETY: `Kernel::multiply` says what the caller vouches for: that the rows and tokens are
        // there, whose vectors of the blocks and steps the code reads and no others, and that as many
        // sums as it reads at its start and writes at its end are. Else it writes the registers named.
        unsafe {
            asm!(
                $code,
                w = inout(reg) $tile.w => _,
                // The last of four rows; of three rows not used.
                v = inout(reg) $tile.w.wrapping_add(3 * $tile.stride) => _,
                // The same two rows where they are asked for.
                p = inout(reg) $tile.w.wrapping_add($tile.ahead.bytes()) => _,
                q = inout(reg) $tile.w.wrapping_add($tile.ahead.bytes() + 3 * $tile.stride) => _,
                s = in(reg) $tile.stride,
                x = inout(reg) $tile.x => _,
                token = const size_of::<[f32; BLOCK]>(),
                to_block = in(reg) $tile.block_stride.wrapping_sub($tile.steps * $line),
                blocks = inout(reg) $tile.blocks => _,
                steps = in(reg) $tile.steps,
                sums = in(reg) $sums.as_mut_ptr(),
                c = out(reg) _,
                $(out($register) _,)*
                options(nostack),
            );
        }
    };
}

/// A step of one token with the weights of four rows.
macro_rules! token_512 {
    ($t:literal $a:literal $b:literal $c:literal $d:literal) => {
        concat!(
            "vmovups zmm28, [{x} + {token}*",
            $t,
            "]\n",
            "vfmadd231ps zmm",
            $a,
            ", zmm24, zmm28\n",
            "vfmadd231ps zmm",
            $b,
            ", zmm25, zmm28\n",
            "vfmadd231ps zmm",
            $c,
            ", zmm26, zmm28\n",
            "vfmadd231ps zmm",
            $d,
            ", zmm27, zmm28\n",
        )
    };
}

/// Sum `$i` from memory, or to it.
macro_rules! sum_512 {
    (load $i:literal) => {
        concat!("vmovaps zmm", $i, ", [{sums} + 64*", $i, "]\n")
    };
    (store $i:literal) => {
        concat!("vmovaps [{sums} + 64*", $i, "], zmm", $i, "\n")
    };
}

macro_rules! tile_512 {
    ($tile:ident, $sums:ident, $load:ident, $bytes:literal, $ahead:tt, $($t:literal $a:literal $b:literal $c:literal $d:literal),*) => {
        run!(
            $tile,
            $sums,
            64,
            steps!(
                $bytes,
                "64",
                [$(sum_512!(load $a), sum_512!(load $b), sum_512!(load $c), sum_512!(load $d),)*],
                [
                    ahead!($ahead, "[{p}]", "[{p} + {s}]", "[{p} + 2*{s}]", "[{q}]"),
                    $load!("zmm24", "[{w}]"),
                    $load!("zmm25", "[{w} + {s}]"),
                    $load!("zmm26", "[{w} + 2*{s}]"),
                    $load!("zmm27", "[{v}]"),
                    $(token_512!($t $a $b $c $d),)*
                ],
                [$(sum_512!(store $a), sum_512!(store $b), sum_512!(store $c), sum_512!(store $d),)*],
            ),
            [
                "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10",
                "zmm11", "zmm12", "zmm13", "zmm14", "zmm15", "zmm16", "zmm17", "zmm18", "zmm19", "zmm20",
                "zmm21", "zmm22", "zmm23", "zmm24", "zmm25", "zmm26", "zmm27", "zmm28"
            ]
        )
    };
}

/// The tile of so many tokens.
macro_rules! tiles_512 {
    ($tile:ident, $tokens:ident, $sums:ident, $load:ident, $bytes:literal, $ahead:tt) => {
        match $tokens {
            6 => tile_512!($tile, $sums, $load, $bytes, $ahead, 0 0 1 2 3, 1 4 5 6 7, 2 8 9 10 11, 3 12 13 14 15, 4 16 17 18 19, 5 20 21 22 23),
            5 => tile_512!($tile, $sums, $load, $bytes, $ahead, 0 0 1 2 3, 1 4 5 6 7, 2 8 9 10 11, 3 12 13 14 15, 4 16 17 18 19),
            4 => tile_512!($tile, $sums, $load, $bytes, $ahead, 0 0 1 2 3, 1 4 5 6 7, 2 8 9 10 11, 3 12 13 14 15),
            3 => tile_512!($tile, $sums, $load, $bytes, $ahead, 0 0 1 2 3, 1 4 5 6 7, 2 8 9 10 11),
            2 => tile_512!($tile, $sums, $load, $bytes, $ahead, 0 0 1 2 3, 1 4 5 6 7),
            _ => tile_512!($tile, $sums, $load, $bytes, $ahead, 0 0 1 2 3),
        }
    };
}

impl Kernel for Avx512 {
    const LANES: usize = 16;
    const ROWS: usize = 4;
    const TOKENS: usize = 6;

    unsafe fn multiply(block_type: BlockType, tile: &Tile, tokens: usize, sums: &mut [Sums]) {
        debug_assert!(sums.len() == Self::ROWS * tokens, "sums of all pairs");
        match (block_type, tile.ahead) {
            (BlockType::F16, Ahead::OfAllRows(_)) => {
                tiles_512!(tile, tokens, sums, load_f16, "32", all)
            }
            (BlockType::F16, Ahead::OfTwoRows(_)) => {
                tiles_512!(tile, tokens, sums, load_f16, "32", two)
            }
            (BlockType::F16, Ahead::Nothing) => {
                tiles_512!(tile, tokens, sums, load_f16, "32", none)
            }
            (_, Ahead::OfAllRows(_)) => tiles_512!(tile, tokens, sums, load_bf16, "32", all),
            (_, Ahead::OfTwoRows(_)) => tiles_512!(tile, tokens, sums, load_bf16, "32", two),
            (_, Ahead::Nothing) => tiles_512!(tile, tokens, sums, load_bf16, "32", none),
        }
    }

    #[inline(always)]
    unsafe fn eight(Sums(lanes): &Sums) -> __m256 {
        // SAFETY: the caller vouches for the instructions.
        unsafe { _mm256_add_ps(load_f32(&lanes[0]), load_f32(&lanes[1])) }
    }
}

/// A step of one token with the weights of three rows.
macro_rules! token_256 {
    ($t:literal $a:literal $b:literal $c:literal) => {
        concat!(
            "vmovups ymm15, [{x} + {token}*",
            $t,
            "]\n",
            "vfmadd231ps ymm",
            $a,
            ", ymm12, ymm15\n",
            "vfmadd231ps ymm",
            $b,
            ", ymm13, ymm15\n",
            "vfmadd231ps ymm",
            $c,
            ", ymm14, ymm15\n",
        )
    };
}

/// Sum `$i` from memory, or to it.
macro_rules! sum_256 {
    (load $i:literal) => {
        concat!("vmovaps ymm", $i, ", [{sums} + 64*", $i, "]\n")
    };
    (store $i:literal) => {
        concat!("vmovaps [{sums} + 64*", $i, "], ymm", $i, "\n")
    };
}

macro_rules! tile_256 {
    ($tile:ident, $sums:ident, $load:ident, $bytes:literal, $ahead:tt, $($t:literal $a:literal $b:literal $c:literal),*) => {
        run!(
            $tile,
            $sums,
            32,
            steps!(
                $bytes,
                "32",
                [$(sum_256!(load $a), sum_256!(load $b), sum_256!(load $c),)*],
                [
                    ahead!($ahead, "[{p}]", "[{p} + {s}]", "[{p} + 2*{s}]"),
                    $load!("ymm12", "[{w}]"),
                    $load!("ymm13", "[{w} + {s}]"),
                    $load!("ymm14", "[{w} + 2*{s}]"),
                    $(token_256!($t $a $b $c),)*
                ],
                [$(sum_256!(store $a), sum_256!(store $b), sum_256!(store $c),)*],
            ),
            [
                "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10",
                "ymm11", "ymm12", "ymm13", "ymm14", "ymm15"
            ]
        )
    };
}

/// The tile of so many tokens.
macro_rules! tiles_256 {
    ($tile:ident, $tokens:ident, $sums:ident, $load:ident, $bytes:literal, $ahead:tt) => {
        match $tokens {
            4 => tile_256!($tile, $sums, $load, $bytes, $ahead, 0 0 1 2, 1 3 4 5, 2 6 7 8, 3 9 10 11),
            3 => tile_256!($tile, $sums, $load, $bytes, $ahead, 0 0 1 2, 1 3 4 5, 2 6 7 8),
            2 => tile_256!($tile, $sums, $load, $bytes, $ahead, 0 0 1 2, 1 3 4 5),
            _ => tile_256!($tile, $sums, $load, $bytes, $ahead, 0 0 1 2),
        }
    };
}

impl Kernel for Avx2 {
    const LANES: usize = 8;
    const ROWS: usize = 3;
    const TOKENS: usize = 4;

    unsafe fn multiply(block_type: BlockType, tile: &Tile, tokens: usize, sums: &mut [Sums]) {
        debug_assert!(sums.len() == Self::ROWS * tokens, "sums of all pairs");
        match (block_type, tile.ahead) {
            (BlockType::F16, Ahead::OfAllRows(_)) => {
                tiles_256!(tile, tokens, sums, load_f16, "16", all)
            }
            (BlockType::F16, Ahead::OfTwoRows(_)) => {
                tiles_256!(tile, tokens, sums, load_f16, "16", two)
            }
            (BlockType::F16, Ahead::Nothing) => {
                tiles_256!(tile, tokens, sums, load_f16, "16", none)
            }
            (_, Ahead::OfAllRows(_)) => tiles_256!(tile, tokens, sums, load_bf16, "16", all),
            (_, Ahead::OfTwoRows(_)) => tiles_256!(tile, tokens, sums, load_bf16, "16", two),
            (_, Ahead::Nothing) => tiles_256!(tile, tokens, sums, load_bf16, "16", none),
        }
    }

    #[inline(always)]
    unsafe fn eight(Sums(lanes): &Sums) -> __m256 {
        // SAFETY: the caller vouches for the instructions.
        unsafe { load_f32(&lanes[0]) }
    }
}
