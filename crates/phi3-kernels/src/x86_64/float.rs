//! Products with f32 activations: of float weights, and of any type where rows are narrow. Few tokens
//! with weights in half precision are the business of [`dots`](super::dots).
//!
//! A lane is a row. 512 columns of sixteen rows are decoded and turned, so that sixteen weights
//! of a column lie side by side, and multiplied with the tokens of a
//! [register tile](RegisterTile) at a time. A sum goes through the columns of a block one by
//! one, by fused multiply-adds from zero on, and the blocks are added in order: the same for one
//! token and for many. One token takes the weights from the registers in which they were turned.
//!
//! Tokens come copied into blocks of columns ([`Tokens`]): rows whose width is a multiple of 1024
//! would all lie in the same few places of the first-level cache and push out one another and the
//! panel.

#![expect(
    clippy::needless_range_loop,
    reason = "one index into several arrays; closures in iterators would lose the target features"
)]

use std::arch::x86_64::*;

use super::avx2::decode;
use super::narrow;
use super::tile::{self, Lanes, RegisterTile};
use super::vector::{ask_for_rows, halves, load, prefetch, store_f32, transpose, transpose_words};
use crate::backend::Tokens;
use crate::{BlockType, MatrixRef};

/// Columns of a block. Whole blocks of every type; a panel of so many fills the first-level cache,
/// into which it streams from the second-level one as fast as it is used.
pub(super) const BLOCK: usize = 512;
/// Rows of a panel, in two vectors.
const PANEL_ROWS: usize = 16;
/// Panels that a chunk of tokens goes through, one after another: 512 KiB, in the second-level
/// cache beside this chunk and the next.
const PANELS: usize = 16;
/// Tokens of a chunk: 48 KiB of a block of columns.
const CHUNK: usize = 24;
/// Tokens up to which weights are better read in one stream, a panel at a time.
const FEW_TOKENS: usize = 6;

/// Weights of a block, a row to a lane.
type Panel = [Lanes; BLOCK];

/// `out[t][i] = x[t] · w[first_row + i]`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn matmul_rows<T: RegisterTile>(
    x: &Tokens<'_>,
    w: MatrixRef<'_>,
    first_row: usize,
    out: &mut [&mut [f32]],
) {
    match w.block_type() {
        BlockType::F32 => products::<T, Single, 32>(x, w, first_row, out),
        BlockType::F16 => products::<T, Half, 16>(x, w, first_row, out),
        BlockType::BF16 => products::<T, Brain, 16>(x, w, first_row, out),
        // Decoded before.
        _ => products::<T, Single, 32>(x, w, first_row, out),
    }
}

/// A float type, eight weights of which are `BYTES` bytes.
trait Eight<const BYTES: usize> {
    const TYPE: BlockType;

    /// A weight of each of sixteen rows, as stored.
    type Column: Copy;

    /// Eights `at` of sixteen rows, turned.
    ///
    /// # Safety
    /// The processor has AVX2.
    unsafe fn turn(rows: &Rows<'_, BYTES>, at: usize) -> [Self::Column; 8];

    /// As f32, a row to a lane.
    ///
    /// # Safety
    /// The processor has AVX2 and F16C.
    unsafe fn lanes(column: Self::Column) -> [__m256; 2];
}

struct Single;
struct Half;
struct Brain;

impl Eight<32> for Single {
    const TYPE: BlockType = BlockType::F32;

    type Column = [__m256i; 2];

    #[inline(always)]
    unsafe fn turn(rows: &Rows<'_, 32>, at: usize) -> [Self::Column; 8] {
        // SAFETY: the caller vouches for the instructions.
        unsafe { turn_dwords(rows, at) }
    }

    #[inline(always)]
    unsafe fn lanes(column: Self::Column) -> [__m256; 2] {
        // SAFETY: the caller vouches for the instructions.
        column.map(|half| unsafe { _mm256_castsi256_ps(half) })
    }
}

impl Eight<16> for Half {
    const TYPE: BlockType = BlockType::F16;

    type Column = __m256i;

    #[inline(always)]
    unsafe fn turn(rows: &Rows<'_, 16>, at: usize) -> [Self::Column; 8] {
        // SAFETY: the caller vouches for the instructions.
        unsafe { turn_words(rows, at) }
    }

    #[inline(always)]
    unsafe fn lanes(column: Self::Column) -> [__m256; 2] {
        // SAFETY: the caller vouches for the instructions.
        unsafe { tile::widen_f16(column) }
    }
}

impl Eight<16> for Brain {
    const TYPE: BlockType = BlockType::BF16;

    type Column = __m256i;

    #[inline(always)]
    unsafe fn turn(rows: &Rows<'_, 16>, at: usize) -> [Self::Column; 8] {
        // SAFETY: the caller vouches for the instructions.
        unsafe { turn_words(rows, at) }
    }

    #[inline(always)]
    unsafe fn lanes(column: Self::Column) -> [__m256; 2] {
        // SAFETY: the caller vouches for the instructions.
        unsafe {
            [
                _mm256_castsi256_si128(column),
                _mm256_extracti128_si256::<1>(column),
            ]
            .map(|words| {
                let upper = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(words));
                _mm256_castsi256_ps(upper)
            })
        }
    }
}

/// Eights `at` of sixteen rows of dwords, turned.
#[target_feature(enable = "avx2")]
#[inline]
fn turn_dwords(rows: &Rows<'_, 32>, at: usize) -> [[__m256i; 2]; 8] {
    let mut turned = [[_mm256_setzero_si256(); 2]; 8];
    for half in 0..2 {
        let mut eight = [_mm256_setzero_si256(); 8];
        for i in 0..8 {
            eight[i] = load(&rows[8 * half + i][at]);
        }
        let eight = transpose(eight);
        for i in 0..8 {
            turned[i][half] = eight[i];
        }
    }
    turned
}

/// Eights `at` of sixteen rows of words, turned.
#[target_feature(enable = "avx2")]
#[inline]
fn turn_words(rows: &Rows<'_, 16>, at: usize) -> [__m256i; 8] {
    let mut both = [_mm256_setzero_si256(); 8];
    for i in 0..8 {
        both[i] = halves(&rows[i][at], &rows[i + 8][at]);
    }
    transpose_words(both)
}

#[target_feature(enable = "avx2,fma,f16c")]
fn products<T: RegisterTile, E: Eight<BYTES>, const BYTES: usize>(
    x: &Tokens<'_>,
    w: MatrixRef<'_>,
    first_row: usize,
    out: &mut [&mut [f32]],
) {
    let (n, cols) = (out.len(), w.cols());
    let rows = out.first().map_or(0, |out| out.len());
    if cols == 0 {
        out.iter_mut().for_each(|out| out.fill(0.0));
        return;
    }
    let panels = if n <= FEW_TOKENS { 1 } else { PANELS };
    let panels = panels.min(rows.div_ceil(PANEL_ROWS));
    let mut turned = match n {
        1 => Vec::new(),
        _ => vec![[Lanes::ZERO; BLOCK]; panels],
    };
    let mut decoded = Decoded::<E, BYTES>::new(w);
    for start in (0..rows).step_by(panels * PANEL_ROWS) {
        let end = rows.min(start + panels * PANEL_ROWS);
        for first_col in (0..cols).step_by(BLOCK) {
            let row_bytes = cols / 8 * BYTES;
            let ahead = if panels > 1 {
                // The same columns of the next panel, since the next block's would be gone again
                // when all tokens have passed.
                PANEL_ROWS * row_bytes
            } else if first_col + BLOCK < cols {
                // The next block, or below the first one of the next panel.
                BLOCK / 8 * BYTES
            } else {
                (PANEL_ROWS - 1) * row_bytes + (cols - first_col) / 8 * BYTES
            };
            let cols = first_col..cols.min(first_col + BLOCK);
            if let [out] = out {
                let (first, x) = (first_row + start, &x.values[cols.clone()]);
                let sums = match narrow::one_token(w, first, end - start, cols.clone(), x) {
                    Some(sums) => sums,
                    None => {
                        let weights = decoded.rows(w, first, end - start, cols);
                        one_token::<E, BYTES>(&weights, ahead, x)
                    }
                };
                tile::add(sums, first_col == 0, &mut out[start..end]);
                continue;
            }
            for (i, panel) in turned.iter_mut().enumerate() {
                let start = start + i * PANEL_ROWS;
                if start < end {
                    let (first, rows) = (first_row + start, PANEL_ROWS.min(end - start));
                    if narrow::turn(w, first, rows, cols.clone(), panel).is_none() {
                        let weights = decoded.rows(w, first, rows, cols.clone());
                        turn::<E, BYTES>(&weights, ahead, panel);
                    }
                }
            }
            let x = &x.blocks.expect("`column_block` asks for them")[first_col * n..];
            let (x, after) = x.as_chunks::<BLOCK>().0.split_at(n);
            let tiles = n.div_ceil(T::ROWS);
            // Tiles of nearly the same size; behind them come those of the next block.
            let tokens = |tile: usize| tile * n / tiles..(tile + 1) * n / tiles;
            let tokens_ahead = |tile: usize| match tile.checked_sub(tiles) {
                None => &x[tokens(tile)],
                Some(tile) => after.get(tokens(tile)).unwrap_or_default(),
            };
            let in_chunk = CHUNK / T::ROWS;
            for chunk in (0..tiles).step_by(in_chunk) {
                for (p, panel) in turned.iter().enumerate() {
                    let start = start + p * PANEL_ROWS;
                    let rows = start..end.min(start + PANEL_ROWS);
                    if rows.is_empty() {
                        break;
                    }
                    let panel = &panel[..cols.len()];
                    for tile in chunk..tiles.min(chunk + in_chunk) {
                        ask_for_share(tokens_ahead(tile + in_chunk), p, panels);
                        let (x, out) = (&x[tokens(tile)], &mut out[tokens(tile)]);
                        ask_for_rows(out, &rows);
                        // SAFETY: this is called where the processor has the instructions of the tile.
                        unsafe {
                            T::add_products(panel, x, first_col == 0, out, rows.clone());
                        };
                    }
                }
            }
        }
    }
}

/// Asks for share `i` of `shares` of the tokens that a tile of the next chunk reads: they come from the
/// third-level cache, and the loads of a tile alone would wait for most of their lines.
#[target_feature(enable = "avx2")]
#[inline]
fn ask_for_share(x: &[[f32; BLOCK]], i: usize, shares: usize) {
    let x = x.as_flattened();
    let share = i * x.len() / shares..(i + 1) * x.len() / shares;
    prefetch::<_MM_HINT_T1>(&x[share], 0);
}

/// The weights of a block of columns of sixteen rows, by eights.
type Rows<'a, const BYTES: usize> = [&'a [[u8; BYTES]]; PANEL_ROWS];

/// Where rows lie decoded that cannot be read as they are: those of block types, and the last
/// columns where they are no eight.
struct Decoded<E, const BYTES: usize> {
    bytes: Vec<[u8; BYTES]>,
    values: Vec<f32>,
    kind: std::marker::PhantomData<E>,
}

impl<E: Eight<BYTES>, const BYTES: usize> Decoded<E, BYTES> {
    fn new(w: MatrixRef<'_>) -> Self {
        let needed = w.block_type() != E::TYPE && !narrow::covers(w.block_type())
            || !w.cols().is_multiple_of(8);
        Self {
            bytes: vec![[0; BYTES]; if needed { PANEL_ROWS * BLOCK / 8 } else { 0 }],
            values: vec![0.0; if needed { BLOCK } else { 0 }],
            kind: std::marker::PhantomData,
        }
    }

    /// Columns `cols` of `rows` rows from row `first` on; behind the last row comes the last row
    /// again, behind the last column zeros.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn rows<'a>(
        &'a mut self,
        w: MatrixRef<'a>,
        first: usize,
        rows: usize,
        cols: std::ops::Range<usize>,
    ) -> Rows<'a, BYTES> {
        let block_type = w.block_type();
        let bytes_of = |cols: usize| cols / block_type.block_len() * block_type.block_bytes();
        let (start, end) = (bytes_of(cols.start), bytes_of(cols.end));
        let mut of_rows = [&[][..]; PANEL_ROWS];
        if block_type == E::TYPE && cols.len().is_multiple_of(8) {
            for (i, of_row) in of_rows.iter_mut().enumerate() {
                let row = w.row(first + i.min(rows - 1));
                *of_row = row[start..end].as_chunks().0;
            }
            return of_rows;
        }
        let eights = cols.len().div_ceil(8);
        let each = self.bytes.chunks_exact_mut(eights);
        for (i, bytes) in each.take(rows).enumerate() {
            let row = &w.row(first + i)[start..end];
            if block_type == E::TYPE {
                bytes.fill([0; BYTES]);
                bytes.as_flattened_mut()[..row.len()].copy_from_slice(row);
            } else {
                self.values.fill(0.0);
                decode(block_type, row, &mut self.values[..cols.len()]);
                let to = bytes.as_flattened_mut().as_chunks_mut::<4>().0;
                for (to, value) in to.iter_mut().zip(&self.values) {
                    *to = value.to_le_bytes();
                }
            }
        }
        for (i, of_row) in of_rows.iter_mut().enumerate() {
            *of_row = &self.bytes[i.min(rows - 1) * eights..][..eights];
        }
        of_rows
    }
}

/// Asks for as many weights as the eights at `at` are, `distance` bytes further on: whole lines of
/// some of the rows, so that those of all rows have been asked for by the line's end.
#[target_feature(enable = "avx2")]
#[inline]
fn look_ahead<const BYTES: usize>(rows: &Rows<'_, BYTES>, at: usize, distance: usize) {
    let eights = 64 / BYTES;
    let some = PANEL_ROWS / eights;
    for i in 0..some {
        prefetch::<_MM_HINT_T0>(
            &rows[at % eights * some + i][at / eights * eights],
            distance,
        );
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn turn<E: Eight<BYTES>, const BYTES: usize>(
    rows: &Rows<'_, BYTES>,
    ahead: usize,
    panel: &mut Panel,
) {
    let mut rows = *rows;
    let eights = rows[0].len().min(BLOCK / 8);
    for row in &mut rows {
        *row = &row[..eights];
    }
    let panel = panel.as_chunks_mut::<8>().0;
    for c in 0..eights {
        look_ahead(&rows, c, ahead);
        // SAFETY: this function is compiled with the features.
        let columns = unsafe { E::turn(&rows, c) };
        for i in 0..8 {
            // SAFETY: as above.
            let [low, high] = unsafe { E::lanes(columns[i]) };
            panel[c][i] = Lanes([store_f32(low), store_f32(high)]);
        }
    }
}

/// A block of one token.
#[target_feature(enable = "avx2,fma,f16c")]
fn one_token<E: Eight<BYTES>, const BYTES: usize>(
    rows: &Rows<'_, BYTES>,
    ahead: usize,
    x: &[f32],
) -> [__m256; 2] {
    let (x, tail) = x.as_chunks::<8>();
    let mut rows = *rows;
    for row in &mut rows {
        *row = &row[..x.len() + usize::from(!tail.is_empty())];
    }
    let mut sums = [_mm256_setzero_ps(); 2];
    for c in 0..x.len() {
        look_ahead(&rows, c, ahead);
        // SAFETY: this function is compiled with the features.
        let columns = unsafe { E::turn(&rows, c) };
        for i in 0..8 {
            // SAFETY: as above.
            let lanes = unsafe { E::lanes(columns[i]) };
            sums = add_column(lanes, x[c][i], sums);
        }
    }
    if !tail.is_empty() {
        // SAFETY: as above.
        let columns = unsafe { E::turn(&rows, x.len()) };
        for i in 0..tail.len() {
            // SAFETY: as above.
            let lanes = unsafe { E::lanes(columns[i]) };
            sums = add_column(lanes, tail[i], sums);
        }
    }
    sums
}

#[target_feature(enable = "avx2,fma")]
#[inline]
fn add_column(lanes: [__m256; 2], x: f32, sums: [__m256; 2]) -> [__m256; 2] {
    let x = _mm256_set1_ps(x);
    [
        _mm256_fmadd_ps(lanes[0], x, sums[0]),
        _mm256_fmadd_ps(lanes[1], x, sums[1]),
    ]
}
