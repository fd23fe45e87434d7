//! Products of weights in half precision with few tokens: a lane is a column.
//!
//! Some rows are multiplied with some tokens at a time, a vector of sums for each pair, so that no weight
//! has to be moved to another lane and a vector of either serves several sums. Sum i of a pair goes
//! through the columns whose number modulo the lanes is i, one by one, by fused multiply-adds from
//! zero on, and in the end the lanes are added.
//!
//! Up to a tile of tokens take the rows as they come from memory. Of more tokens a tile at a time takes
//! as many rows as stay in the second-level cache, by columns of which the tokens stay in the first.
//! Tokens come copied into blocks of columns ([`Tokens`]): rows whose width is a multiple of 1024 would
//! all lie in the same few places of the first-level cache.

use std::arch::x86_64::*;

use super::float::BLOCK;
use super::vector::store_f32;
use crate::backend::Tokens;
use crate::{BlockType, MatrixRef};

mod kernels;

/// Bytes of rows that many tokens go through, tile by tile.
const CHUNK_BYTES: usize = 192 << 10;

/// Blocks of columns that a tile of many tokens goes through before the next rows.
const BLOCKS_AT_ONCE: usize = 2;

/// How far ahead of their use weights of few tokens are asked for, in bytes of a row and, at its end, of the
/// rows of the next tile: into the second-level cache, for in the first they are in the tokens' way.
const AHEAD: usize = 2048;

/// The largest tile, in rows times tokens.
const MAX_SUMS: usize = 24;

/// A line of the cache, of sums: as many as a vector has lanes, from its start on.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Sums([[f32; 8]; 2]);

const NO_SUMS: Sums = Sums([[0.0; 8]; 2]);

/// Rows and tokens of a tile, and the columns that they are multiplied in.
struct Tile {
    /// The first weight of the first row.
    w: *const u8,
    /// Bytes from one row to the next.
    stride: usize,
    /// The same columns of the first token, those of the others [`BLOCK`] behind one another.
    x: *const f32,
    /// Bytes from one block of the first token to the next.
    block_stride: usize,
    /// How many blocks, of how many vectors each.
    blocks: usize,
    steps: usize,
    ahead: Ahead,
}

/// What a tile asks for while it multiplies, into the second-level cache: weights so many bytes behind those of
/// its rows.
#[derive(Clone, Copy)]
enum Ahead {
    OfAllRows(usize),
    OfTwoRows(usize),
    Nothing,
}

impl Ahead {
    fn bytes(self) -> usize {
        match self {
            Self::OfAllRows(bytes) | Self::OfTwoRows(bytes) => bytes,
            Self::Nothing => 0,
        }
    }
}

/// What an instruction set multiplies with.
trait Kernel {
    /// Lanes of a vector.
    const LANES: usize;
    /// Rows and tokens of the largest tile.
    const ROWS: usize;
    const TOKENS: usize;

    /// Adds the products of [`ROWS`](Self::ROWS) rows and `tokens` tokens to the sums of each token,
    /// those of its rows behind one another.
    ///
    /// # Safety
    /// The processor has the instructions; the rows, and as many tokens as `tokens`, have the blocks of
    /// the tile, at least one and of at least one vector; `sums` are `ROWS` times `tokens`.
    unsafe fn multiply(block_type: BlockType, tile: &Tile, tokens: usize, sums: &mut [Sums]);

    /// The lanes of a sum, the upper half of them added to the lower one where they are sixteen.
    ///
    /// # Safety
    /// The processor has the instructions.
    unsafe fn eight(sums: &Sums) -> __m256;
}

/// The most tokens that are multiplied here. More of them pay for turning the weights: each number of
/// a token then serves sixteen rows ([`float`](super::float)).
const MAX_TOKENS: usize = 32;

/// Whether so many tokens are multiplied with weights of a type here: weights of two bytes alone, since
/// f32 models are those whose numbers are compared, one token beside many.
pub(super) const fn covers(n: usize, block_type: BlockType) -> bool {
    n <= MAX_TOKENS && matches!(block_type, BlockType::F16 | BlockType::BF16)
}

/// `out[t][i] = x[t] · w[first_row + i]` for what is [covered](covers), with AVX2.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn avx2_rows(
    x: &Tokens<'_>,
    w: MatrixRef<'_>,
    first_row: usize,
    out: &mut [&mut [f32]],
) {
    // SAFETY: this function is compiled with the features.
    unsafe { products::<kernels::Avx2>(x, w, first_row, out) }
}

/// [`avx2_rows`] with AVX-512.
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
pub(super) fn avx512_rows(
    x: &Tokens<'_>,
    w: MatrixRef<'_>,
    first_row: usize,
    out: &mut [&mut [f32]],
) {
    // SAFETY: this function is compiled with the features.
    unsafe { products::<kernels::Avx512>(x, w, first_row, out) }
}

/// # Safety
/// The processor has the instructions of `K`.
unsafe fn products<K: Kernel>(
    x: &Tokens<'_>,
    w: MatrixRef<'_>,
    first_row: usize,
    out: &mut [&mut [f32]],
) {
    let (n, cols) = (out.len(), w.cols());
    let rows = out.first().map_or(0, |out| out.len());
    let x = x.blocks.expect("`column_block` asks for them");
    let (x, blocks) = (x.as_chunks::<BLOCK>().0, cols.div_ceil(BLOCK));
    assert!(x.len() == n * blocks, "blocks of every token");
    let streams = n <= K::TOKENS;
    let (chunk, at_once) = if streams {
        (K::ROWS, blocks)
    } else {
        let rows = CHUNK_BYTES * w.rows() / w.bytes().len().max(1);
        ((rows / K::ROWS).max(2) * K::ROWS, BLOCKS_AT_ONCE)
    };
    let mut sums = vec![NO_SUMS; chunk * K::TOKENS];
    for start in (0..rows).step_by(chunk) {
        let end = rows.min(start + chunk);
        let tiles = n.div_ceil(K::TOKENS);
        for tile in 0..tiles {
            let tokens = tile * n / tiles..(tile + 1) * n / tiles;
            let each = K::ROWS * tokens.len();
            let sums = &mut sums[..(end - start).div_ceil(K::ROWS) * each];
            sums.fill(NO_SUMS);
            // Of many tokens the first two tiles ask for the rows behind this chunk, two rows of each tile.
            let ahead = match tile {
                _ if streams => Ahead::OfAllRows(AHEAD),
                0 | 1 => Ahead::OfTwoRows((chunk + 2 * tile) * w.row(0).len()),
                _ => Ahead::Nothing,
            };
            for first in (0..blocks).step_by(at_once.max(1)) {
                let columns = first * BLOCK..cols.min((first + at_once) * BLOCK);
                let x = Values {
                    blocks: &x[first * n + tokens.start..],
                    n,
                    tokens: tokens.len(),
                };
                for (i, sums) in sums.chunks_exact_mut(each).enumerate() {
                    // Rows before these once more where there are too few behind.
                    let row = first_row + start + i * K::ROWS;
                    let row = row.min(w.rows().saturating_sub(K::ROWS));
                    // SAFETY: the caller vouches for the instructions.
                    unsafe {
                        add_tile::<K>(w, row, x, columns.clone(), ahead, sums);
                    }
                }
            }
            for (i, sums) in sums.chunks_exact(each).enumerate() {
                let rows = start + i * K::ROWS..end.min(start + (i + 1) * K::ROWS);
                let shift = (first_row + rows.start + K::ROWS).saturating_sub(w.rows());
                let shift = if w.rows() < K::ROWS {
                    first_row + rows.start
                } else {
                    shift
                };
                for (out, sums) in out[tokens.clone()].iter_mut().zip(sums.chunks(K::ROWS)) {
                    // SAFETY: the caller vouches for the instructions.
                    let sums = unsafe { all_lanes::<K>(sums) };
                    for (out, sum) in out[rows.clone()].iter_mut().zip(&sums[shift..]) {
                        *out = *sum;
                    }
                }
            }
        }
    }
}

/// All lanes of up to four sums added: the upper half to the lower one, and so on.
///
/// # Safety
/// The processor has the instructions of `K`, and AVX2.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn all_lanes<K: Kernel>(sums: &[Sums]) -> [f32; 4] {
    let mut eights = [_mm256_setzero_ps(); 4];
    for (eight, sums) in eights.iter_mut().zip(sums) {
        // SAFETY: the caller vouches for the instructions.
        *eight = unsafe { K::eight(sums) };
    }
    let mut fours = [_mm256_setzero_pd(); 2];
    for (i, four) in fours.iter_mut().enumerate() {
        let (a, b) = (eights[2 * i], eights[2 * i + 1]);
        let low = _mm256_permute2f128_ps::<0x20>(a, b);
        let high = _mm256_permute2f128_ps::<0x31>(a, b);
        *four = _mm256_castps_pd(_mm256_add_ps(low, high));
    }
    let low = _mm256_castpd_ps(_mm256_unpacklo_pd(fours[0], fours[1]));
    let high = _mm256_castpd_ps(_mm256_unpackhi_pd(fours[0], fours[1]));
    let twos = _mm256_add_ps(low, high);
    let [a, _, c, _, b, _, d, _] = store_f32(_mm256_add_ps(twos, _mm256_movehdup_ps(twos)));
    [a, b, c, d]
}

/// Some blocks of columns of some tokens: a block of all `n` tokens behind that of the columns before.
#[derive(Clone, Copy)]
struct Values<'a> {
    /// From the first of the tokens on.
    blocks: &'a [[f32; BLOCK]],
    n: usize,
    tokens: usize,
}

/// Adds the products of some rows from `row` on with some tokens, in `columns`, which begin with a block.
///
/// # Safety
/// The processor has the instructions of `K`.
unsafe fn add_tile<K: Kernel>(
    w: MatrixRef<'_>,
    row: usize,
    x: Values<'_>,
    columns: std::ops::Range<usize>,
    ahead: Ahead,
    sums: &mut [Sums],
) {
    assert!(
        sums.len() == K::ROWS * x.tokens && sums.len() <= MAX_SUMS,
        "sums of a tile"
    );
    let last = (columns.len().div_ceil(BLOCK) - 1) * x.n + x.tokens;
    assert!(last <= x.blocks.len(), "blocks of all tokens");
    let block_type = w.block_type();
    let bytes = block_type.block_bytes();
    let mut done = 0;
    if w.rows() >= K::ROWS {
        let rows = w.row(row)[columns.start * bytes..columns.end * bytes].as_ptr();
        // Checks that the last row is there.
        let stride = w.row(row + K::ROWS - 1).len();
        let whole = columns.len() / BLOCK;
        let near_end = whole.min((AHEAD / bytes).div_ceil(BLOCK));
        // Whole blocks, the last of them where the next rows are asked for, then what is whole vectors of
        // the last block.
        for (blocks, steps) in [
            (whole - near_end, BLOCK / K::LANES),
            (near_end, BLOCK / K::LANES),
            (1, columns.len() % BLOCK / K::LANES),
        ] {
            if blocks == 0 || steps == 0 {
                continue;
            }
            let to_next = (K::ROWS - 1) * stride;
            let near_end = (done + blocks * BLOCK) * bytes + AHEAD > stride;
            let tile = Tile {
                w: rows.wrapping_add(done * bytes),
                stride,
                x: x.blocks[done / BLOCK * x.n].as_ptr(),
                block_stride: x.n * size_of::<[f32; BLOCK]>(),
                blocks,
                steps,
                ahead: match ahead {
                    Ahead::OfAllRows(bytes) if near_end => Ahead::OfAllRows(bytes + to_next),
                    ahead => ahead,
                },
            };
            // SAFETY: the caller vouches for the instructions. The rows are rows of `w`, whose
            // columns from `done` on are at least as many as are multiplied, and of the tokens all
            // blocks are there, as was checked above.
            unsafe {
                K::multiply(block_type, &tile, x.tokens, sums);
            }
            done += blocks * steps * K::LANES;
        }
    }
    // What is less than a vector, and matrices of less than a tile.
    for c in done..columns.len() {
        for (t, sums) in sums.chunks_exact_mut(K::ROWS).enumerate() {
            let x = x.blocks[c / BLOCK * x.n + t][c % BLOCK];
            for (r, Sums(lanes)) in sums.iter_mut().enumerate().take(w.rows() - row) {
                let weight = weight(block_type, w.row(row + r), columns.start + c);
                let lane = &mut lanes.as_flattened_mut()[c % K::LANES];
                *lane = weight.mul_add(x, *lane);
            }
        }
    }
}

/// Weight `c` of a row of a type that is [covered](covers).
fn weight(block_type: BlockType, row: &[u8], c: usize) -> f32 {
    let bits = u16::from_le_bytes([row[2 * c], row[2 * c + 1]]);
    match block_type {
        BlockType::F16 => crate::scalar::f16_to_f32(bits),
        _ => f32::from_bits(u32::from(bits) << 16),
    }
}
