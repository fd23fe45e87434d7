//! Products of quantized weights with many tokens by AVX-VNNI, the form of client processors in 256
//! bits, which adds four products of bytes to a dword at once. [`avx512`](super::avx512) has that of
//! AVX-512.
//!
//! As in [`gemm`](super::gemm), sixteen rows are unpacked to bytes, one partial sum's blocks at a
//! time, and multiplied with four tokens at a time. Few tokens are left to AVX2
//! ([`AVX2_TOKENS`]).
//!
//! No machine with these instructions has run this file. Its tests run it with portable code in
//! place of the instructions (`emulated`), so that only the lines of `lanes` that name instructions
//! have never been executed.

#![expect(
    clippy::needless_range_loop,
    reason = "one index into several arrays; closures in iterators would lose the target features"
)]

#[cfg(test)]
mod emulated;
mod lanes;

#[cfg(test)]
pub(crate) use emulated::Emulated;
pub(crate) use lanes::AvxVnni;

use std::arch::x86_64::*;

use self::lanes::Vnni;
use super::blocks::{
    self, eight_factors, factors, has_minimum, is_signed, offset_shift, single, superblock,
};
use super::layouts::{LANES, Layouts, SuperTile, TILE, Tile, class_len, groups_of};
use super::panel::{PanelRows, put_rows};
use super::vector::{load, load_f32, store, store_f32, store_i16, transpose};
use crate::activations::Quantized;
use crate::backend::Kernels;
use crate::{BlockType, MatrixRef};

/// Tokens up to which AVX2 is taken: on a processor with AVX-512, whose VNNI this file used before, it
/// multiplied 4 to 32 tokens faster.
pub(super) const AVX2_TOKENS: usize = 32;

/// Rows of a panel: the lanes of a product.
const PANEL_ROWS: usize = 16;

/// Four successive columns of the rows of a panel.
type Weights = [[u8; 32]; 2];

/// An integer for each token and row.
type Integers = [[[i32; 8]; 2]; TILE];

/// A float for each token and row.
type Floats = [[[f32; 8]; 2]; TILE];

/// 32 columns of the rows of a panel.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(in crate::x86_64) struct Part {
    /// The stored weights, or signed ones with 128 added.
    q: [Weights; 8],
    /// Those of the first sixteen columns and of the others.
    scales: [[[i32; 8]; 2]; 2],
}

/// A block of the rows of a panel, of 32 or of 256 columns.
#[derive(Clone, Copy)]
struct Panel<const PARTS: usize> {
    parts: [Part; PARTS],
    /// What the sums of activations are multiplied with, two successive sums to a row.
    minima: [[[i16; 16]; 2]; PARTS],
    d: [[f32; 8]; 2],
    dmin: [[f32; 8]; 2],
}

/// A group of activations of four tokens.
trait Columns {
    fn parts(&self) -> &[[[i32; TILE]; 8]];
    fn scales(&self) -> &[f32; TILE];
    /// Two sums of activations to a dword.
    fn sums(&self) -> &[[i32; TILE]];
}

impl Columns for Tile {
    fn parts(&self) -> &[[[i32; TILE]; 8]] {
        std::slice::from_ref(&self.values)
    }

    fn scales(&self) -> &[f32; TILE] {
        &self.scales
    }

    /// One sum, which fits i16.
    fn sums(&self) -> &[[i32; TILE]] {
        std::slice::from_ref(&self.sums)
    }
}

impl Columns for SuperTile {
    fn parts(&self) -> &[[[i32; TILE]; 8]] {
        &self.values
    }

    fn scales(&self) -> &[f32; TILE] {
        &self.scales
    }

    fn sums(&self) -> &[[i32; TILE]] {
        &self.sums_16
    }
}

/// [`scalar::int8_rows`](crate::scalar::int8_rows), the same to the last bit.
pub(super) fn int8_rows<V: Vnni>(
    v: V,
    x: &Quantized,
    w: MatrixRef<'_>,
    first_row: usize,
    out: &mut [&mut [f32]],
) {
    macro_rules! rows {
        ($id:ident, $bytes:literal, $tiles:ident, $parts:literal) => {
            // SAFETY: the token that `v` holds exists only where the features were detected.
            unsafe {
                rows::<V, _, { blocks::$id }, $bytes, $parts>(
                    v,
                    x,
                    Layouts::$tiles(x),
                    w,
                    first_row,
                    out,
                )
            }
        };
    }
    if x.n < TILE {
        return Kernels::int8_rows(&v.avx2(), x, w, first_row, out);
    }
    match w.block_type() {
        BlockType::F32 | BlockType::F16 | BlockType::BF16 => {
            Kernels::int8_rows(&v.avx2(), x, w, first_row, out);
        }
        BlockType::Q4_0 => rows!(Q4_0, 18, tiles, 1),
        BlockType::Q4_1 => rows!(Q4_1, 20, tiles, 1),
        BlockType::Q5_0 => rows!(Q5_0, 22, tiles, 1),
        BlockType::Q5_1 => rows!(Q5_1, 24, tiles, 1),
        BlockType::Q8_0 => rows!(Q8_0, 34, tiles, 1),
        BlockType::IQ4NL => rows!(IQ4_NL, 18, tiles, 1),
        BlockType::Q2K => rows!(Q2_K, 84, supertiles, 8),
        BlockType::Q3K => rows!(Q3_K, 110, supertiles, 8),
        BlockType::Q4K => rows!(Q4_K, 144, supertiles, 8),
        BlockType::Q5K => rows!(Q5_K, 176, supertiles, 8),
        BlockType::Int4 => rows!(INT4, 130, supertiles, 8),
        BlockType::Q6K => rows!(Q6_K, 210, supertiles, 8),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn rows<V: Vnni, T: Columns, const ID: u32, const BYTES: usize, const PARTS: usize>(
    v: V,
    x: &Quantized,
    tiles: &[T],
    w: MatrixRef<'_>,
    first_row: usize,
    out: &mut [&mut [f32]],
) {
    let groups = x.groups();
    let rows = out.first().map_or(0, |out| out.len());
    let empty = Panel::<PARTS> {
        parts: [Part {
            q: [[[0; 32]; 2]; 8],
            scales: [[[1; 8]; 2]; 2],
        }; PARTS],
        minima: [[[0; 16]; 2]; PARTS],
        d: [[0.0; 8]; 2],
        dmin: [[0.0; 8]; 2],
    };
    let mut panel = vec![empty; groups.div_ceil(LANES)];
    let mut sums: Vec<Floats> = vec![[[[0.0; 8]; 2]; TILE]; x.n.div_ceil(TILE)];
    for start in (0..rows).step_by(PANEL_ROWS) {
        let panel_rows = PanelRows::<BYTES>::new(w, first_row + start, rows - start);
        sums.fill([[[0.0; 8]; 2]; TILE]);
        for class in 0..LANES.min(groups) {
            let len = class_len(groups, class);
            for (i, panel) in panel.iter_mut().enumerate().take(len) {
                unpack::<ID, BYTES, PARTS>(&panel_rows, class + i * LANES, panel);
            }
            let num_tiles = sums.len();
            for (tile, sums) in sums.iter_mut().enumerate() {
                let x = groups_of(tiles, num_tiles, tile, class);
                multiply::<V, T, ID, PARTS>(v, &panel[..len], x, sums);
            }
        }
        for (t, out) in out.iter_mut().enumerate() {
            put_rows(sums[t / TILE][t % TILE].as_flattened(), start, out);
        }
    }
}

/// What is to be subtracted from the bytes of a panel, as a power of two.
const fn shift(id: u32) -> Option<i32> {
    if is_signed(id) {
        Some(7)
    } else {
        offset_shift(id)
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn unpack<const ID: u32, const BYTES: usize, const PARTS: usize>(
    rows: &PanelRows<'_, BYTES>,
    block: usize,
    panel: &mut Panel<PARTS>,
) {
    for half in 0..2 {
        let mut q = [[_mm256_setzero_si256(); 8]; PARTS];
        let blocks = rows.eight(half, block);
        for i in 0..8 {
            let block = blocks[i];
            if PARTS == 1 {
                q[0][i] = single::<ID, BYTES>(block);
                if is_signed(ID) {
                    q[0][i] = _mm256_xor_si256(q[0][i], _mm256_set1_epi8(-128));
                }
                let factor = match shift(ID) {
                    Some(shift) => 1 << shift,
                    None => 1,
                };
                panel.minima[0][half][2 * i] = factor;
                continue;
            }
            let of_row = superblock::<ID, BYTES>(block);
            let (scales, minima) = factors::<ID, BYTES>(block);
            let minima = match shift(ID) {
                Some(shift) => _mm256_sll_epi16(scales, _mm_cvtsi32_si128(shift)),
                None => minima,
            };
            let (scales, minima) = (store_i16(scales), store_i16(minima));
            for g in 0..PARTS {
                q[g][i] = of_row[g];
                panel.parts[g].scales[0][half][i] = i32::from(scales[g]);
                panel.parts[g].scales[1][half][i] = i32::from(scales[g + 8]);
                panel.minima[g][half][2 * i] = minima[g];
                panel.minima[g][half][2 * i + 1] = minima[g + 8];
            }
        }
        for g in 0..PARTS {
            let columns = transpose(q[g]);
            for c in 0..8 {
                panel.parts[g].q[c][half] = store(columns[c]);
            }
        }
        let (d, mut dmin) = eight_factors::<ID, BYTES>(blocks);
        if PARTS == 1 {
            // Blocks of 32 add their minimum.
            dmin = _mm256_xor_ps(dmin, _mm256_set1_ps(-0.0));
        }
        panel.d[half] = store_f32(d);
        panel.dmin[half] = store_f32(dmin);
    }
}

/// Adds the blocks of a partial sum, in order, to `sums`.
#[target_feature(enable = "avx2,fma,f16c")]
fn multiply<'a, V: Vnni, T: Columns + 'a, const ID: u32, const PARTS: usize>(
    v: V,
    w: &[Panel<PARTS>],
    x: impl Iterator<Item = &'a T>,
    sums: &mut Floats,
) {
    let mut lanes = [[[0.0; 8]; 2]; TILE];
    for (w, x) in w.iter().zip(x) {
        let a = if PARTS == 1 {
            v.products::<false>(&w.parts, x.parts())
        } else {
            v.products::<true>(&w.parts, x.parts())
        };
        for t in 0..TILE {
            let scale = _mm256_set1_ps(x.scales()[t]);
            for half in 0..2 {
                let mut b = _mm256_setzero_si256();
                if shift(ID).is_some() || has_minimum(ID) {
                    for (minima, sums) in w.minima.iter().zip(x.sums()) {
                        let minima = load(&minima[half]);
                        let products = _mm256_madd_epi16(minima, _mm256_set1_epi32(sums[t]));
                        b = _mm256_add_epi32(b, products);
                    }
                }
                let mut a = load(&a[t][half]);
                if shift(ID).is_some() {
                    a = _mm256_sub_epi32(a, b);
                }
                let d = _mm256_mul_ps(load_f32(&w.d[half]), scale);
                let mut sum = load_f32(&lanes[t][half]);
                sum = _mm256_fmadd_ps(d, _mm256_cvtepi32_ps(a), sum);
                if has_minimum(ID) {
                    let dmin = _mm256_mul_ps(load_f32(&w.dmin[half]), scale);
                    sum = _mm256_fnmadd_ps(dmin, _mm256_cvtepi32_ps(b), sum);
                }
                lanes[t][half] = store_f32(sum);
            }
        }
    }
    for t in 0..TILE {
        for half in 0..2 {
            let sum = _mm256_add_ps(load_f32(&sums[t][half]), load_f32(&lanes[t][half]));
            sums[t][half] = store_f32(sum);
        }
    }
}
