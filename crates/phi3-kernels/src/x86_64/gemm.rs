//! Products of quantized weights with many tokens.
//!
//! Sixteen rows are unpacked to bytes, one partial sum's blocks at a time so that they stay in
//! the first-level cache, and multiplied with all tokens, four at a time. A lane is a row: four
//! successive weights of eight rows are a vector, and the same four activations of a token fill
//! the other.

#![expect(
    clippy::needless_range_loop,
    reason = "one index into several arrays; closures in iterators would lose the target features"
)]

use std::arch::x86_64::*;

use super::blocks::{
    factors, half_factors, has_minimum, is_signed, offset_shift, single, sums_in_i16, superblock,
};
use super::layouts::{LANES, Layouts, SuperTile, TILE, Tile, class_len};
use super::micro::{self, Sums, Weights};
use super::vector::{from_f16, load, load_f32, store, store_f32, store_i16, transpose};
use crate::MatrixRef;
use crate::activations::Quantized;

/// Rows of a panel, in two vectors.
pub(super) const PANEL_ROWS: usize = 16;

/// One output element for each row of a panel and each token of a tile.
type TileSums = [[[f32; 8]; 2]; TILE];

/// One block of 32 of sixteen rows, eight rows to a vector.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
struct Panel {
    q: [[[u8; 32]; 2]; 8],
    d: [[f32; 8]; 2],
    m: [[f32; 8]; 2],
}

const EMPTY_PANEL: Panel = Panel {
    q: [[[0; 32]; 2]; 8],
    d: [[0.0; 8]; 2],
    m: [[0.0; 8]; 2],
};

/// One block of 256 of sixteen rows.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
struct SuperPanel {
    q: [[[[u8; 32]; 2]; 8]; 8],
    /// The scale of each group of sixteen, twice for each row.
    scales: [[[[i16; 2]; 8]; 2]; 16],
    /// What the sums of activations are multiplied with, two successive groups for each row.
    minima: [[[[i16; 2]; 8]; 2]; 8],
    d: [[f32; 8]; 2],
    dmin: [[f32; 8]; 2],
}

const EMPTY_SUPER_PANEL: SuperPanel = SuperPanel {
    q: [[[[0; 32]; 2]; 8]; 8],
    scales: [[[[0; 2]; 8]; 2]; 16],
    minima: [[[[0; 2]; 8]; 2]; 8],
    d: [[0.0; 8]; 2],
    dmin: [[0.0; 8]; 2],
};

/// [`scalar::int8_rows`](crate::scalar::int8_rows) for types with blocks of 32.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn rows<const ID: u32, const BYTES: usize>(
    x: &Quantized,
    w: MatrixRef<'_>,
    first_row: usize,
    out: &mut [&mut [f32]],
) {
    let groups = x.groups();
    let tiles = x.n.div_ceil(TILE);
    let x = Layouts::tiles(x);
    let rows = out.first().map_or(0, |out| out.len());
    let mut panel = vec![EMPTY_PANEL; groups.div_ceil(LANES)];
    for start in (0..rows).step_by(PANEL_ROWS) {
        let panel_rows = panel_rows(w, first_row + start, rows - start);
        let mut sums: Vec<TileSums> = vec![[[[0.0; 8]; 2]; TILE]; tiles];
        let mut rest = x;
        for class in 0..LANES.min(groups) {
            let len = class_len(groups, class);
            for (i, panel) in panel.iter_mut().enumerate().take(len) {
                unpack::<ID, BYTES>(&panel_rows, class + i * LANES, panel);
            }
            let of_class;
            (of_class, rest) = rest.split_at(len * tiles);
            for (x, sums) in of_class.chunks_exact(len).zip(&mut sums) {
                multiply::<ID>(&panel[..len], x, sums);
            }
        }
        bring_home(&sums, start, out);
    }
}

/// The rows of a panel; the last one again where the matrix has no more.
fn panel_rows<'a>(w: MatrixRef<'a>, first: usize, rows: usize) -> [&'a [u8]; PANEL_ROWS] {
    std::array::from_fn(|i| w.row(first + i.min(rows - 1)))
}

fn bring_home(sums: &[TileSums], start: usize, out: &mut [&mut [f32]]) {
    for (sums, out) in sums.as_flattened().iter().zip(out) {
        for (sum, out) in sums.as_flattened().iter().zip(&mut out[start..]) {
            *out = *sum;
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn unpack<const ID: u32, const BYTES: usize>(
    rows: &[&[u8]; PANEL_ROWS],
    block: usize,
    panel: &mut Panel,
) {
    for half in 0..2 {
        let mut q = [_mm256_setzero_si256(); 8];
        let (mut d, mut m) = ([0; 8], [0; 8]);
        for i in 0..8 {
            let block = &rows[8 * half + i].as_chunks::<BYTES>().0[block];
            q[i] = single::<ID, BYTES>(block);
            (d[i], m[i]) = half_factors::<ID, BYTES>(block);
        }
        let q = transpose(q);
        for i in 0..8 {
            panel.q[i][half] = store(q[i]);
        }
        panel.d[half] = store_f32(from_f16(d));
        panel.m[half] = store_f32(from_f16(m));
    }
}

/// Adds the blocks of a partial sum, in order, to `sums`.
#[target_feature(enable = "avx2,fma,f16c")]
fn multiply<const ID: u32>(w: &[Panel], x: &[Tile], sums: &mut TileSums) {
    let mut lanes = [[_mm256_setzero_ps(); 2]; TILE];
    let x = &x[..w.len()];
    for i in 0..w.len() {
        let (w, x) = (&w[i], &x[i]);
        let a = products::<ID>(&w.q, &x.values);
        for t in 0..TILE {
            let scale = _mm256_set1_ps(x.scales[t]);
            let x_sum = _mm256_set1_epi32(x.sums[t]);
            for half in 0..2 {
                let mut a = a[t][half];
                if let Some(shift) = offset_shift(ID) {
                    let offset = _mm256_sll_epi32(x_sum, _mm_cvtsi32_si128(shift));
                    a = _mm256_sub_epi32(a, offset);
                }
                let d = _mm256_mul_ps(load_f32(&w.d[half]), scale);
                lanes[t][half] = _mm256_fmadd_ps(d, _mm256_cvtepi32_ps(a), lanes[t][half]);
                if has_minimum(ID) {
                    let m = _mm256_mul_ps(load_f32(&w.m[half]), scale);
                    let b = _mm256_cvtepi32_ps(x_sum);
                    lanes[t][half] = _mm256_fmadd_ps(m, b, lanes[t][half]);
                }
            }
        }
    }
    add(lanes, sums);
}

/// Dot products of 32 columns, for sixteen rows and four tokens.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn products<const ID: u32>(w: &[Weights; 8], x: &[[i32; TILE]; 8]) -> Sums {
    if is_signed(ID) {
        return micro::signed(w, x);
    }
    let ones = _mm256_set1_epi16(1);
    let chain = sums_in_i16(ID);
    let mut a = [[_mm256_setzero_si256(); 2]; TILE];
    let mut first = 0;
    while first < 8 {
        let sums = micro::unsigned(&w[first..first + chain], &x[first..first + chain]);
        for t in 0..TILE {
            for half in 0..2 {
                let sum = _mm256_madd_epi16(sums[t][half], ones);
                a[t][half] = _mm256_add_epi32(a[t][half], sum);
            }
        }
        first += chain;
    }
    a
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn add(lanes: [[__m256; 2]; TILE], sums: &mut TileSums) {
    for t in 0..TILE {
        for half in 0..2 {
            let sum = _mm256_add_ps(load_f32(&sums[t][half]), lanes[t][half]);
            sums[t][half] = store_f32(sum);
        }
    }
}

/// [`scalar::int8_rows`](crate::scalar::int8_rows) for types with blocks of 256.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn super_rows<const ID: u32, const BYTES: usize>(
    x: &Quantized,
    w: MatrixRef<'_>,
    first_row: usize,
    out: &mut [&mut [f32]],
) {
    let groups = x.groups();
    let tiles = x.n.div_ceil(TILE);
    let x = Layouts::supertiles(x);
    let rows = out.first().map_or(0, |out| out.len());
    let mut panel = vec![EMPTY_SUPER_PANEL; groups.div_ceil(LANES)];
    for start in (0..rows).step_by(PANEL_ROWS) {
        let panel_rows = panel_rows(w, first_row + start, rows - start);
        let mut sums: Vec<TileSums> = vec![[[[0.0; 8]; 2]; TILE]; tiles];
        let mut rest = x;
        for class in 0..LANES.min(groups) {
            let len = class_len(groups, class);
            for (i, panel) in panel.iter_mut().enumerate().take(len) {
                unpack_super::<ID, BYTES>(&panel_rows, class + i * LANES, panel);
            }
            let of_class;
            (of_class, rest) = rest.split_at(len * tiles);
            for (x, sums) in of_class.chunks_exact(len).zip(&mut sums) {
                multiply_super::<ID>(&panel[..len], x, sums);
            }
        }
        bring_home(&sums, start, out);
    }
}

/// Whether a scale and a minimum hold for 32 weights rather than sixteen.
const fn groups_of_32(id: u32) -> bool {
    matches!(id, super::blocks::Q4_K | super::blocks::Q5_K)
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn unpack_super<const ID: u32, const BYTES: usize>(
    rows: &[&[u8]; PANEL_ROWS],
    block: usize,
    panel: &mut SuperPanel,
) {
    for half in 0..2 {
        let mut q = [[_mm256_setzero_si256(); 8]; 8];
        let (mut d, mut dmin) = ([0; 8], [0; 8]);
        for i in 0..8 {
            let block = &rows[8 * half + i].as_chunks::<BYTES>().0[block];
            let of_row = superblock::<ID, BYTES>(block);
            for g in 0..8 {
                q[g][i] = of_row[g];
            }
            (d[i], dmin[i]) = half_factors::<ID, BYTES>(block);
            let (scales, minima) = factors::<ID, BYTES>(block);
            let minima = match offset_shift(ID) {
                Some(shift) => _mm256_sll_epi16(scales, _mm_cvtsi32_si128(shift)),
                None => minima,
            };
            let (scales, minima) = (store_i16(scales), store_i16(minima));
            for g in 0..8 {
                panel.scales[2 * g][half][i] = [scales[g]; 2];
                panel.scales[2 * g + 1][half][i] = [scales[g + 8]; 2];
            }
            if groups_of_32(ID) {
                for g in 0..4 {
                    panel.minima[g][half][i] = [minima[2 * g], minima[2 * g + 1]];
                }
            } else {
                for g in 0..8 {
                    panel.minima[g][half][i] = [minima[g], minima[g + 8]];
                }
            }
        }
        for g in 0..8 {
            let q = transpose(q[g]);
            for i in 0..8 {
                panel.q[g][i][half] = store(q[i]);
            }
        }
        panel.d[half] = store_f32(from_f16(d));
        panel.dmin[half] = store_f32(from_f16(dmin));
    }
}

/// As [`multiply`].
#[target_feature(enable = "avx2,fma,f16c")]
fn multiply_super<const ID: u32>(w: &[SuperPanel], x: &[SuperTile], sums: &mut TileSums) {
    let mut lanes = [[_mm256_setzero_ps(); 2]; TILE];
    let x = &x[..w.len()];
    for i in 0..w.len() {
        let (w, x) = (&w[i], &x[i]);
        let mut a = [[_mm256_setzero_si256(); 2]; TILE];
        for g in 0..8 {
            add_group::<ID>(&w.q[g], &x.values[g], &w.scales, g, &mut a);
        }
        for t in 0..TILE {
            let scale = _mm256_set1_ps(x.scales[t]);
            for half in 0..2 {
                let mut b = _mm256_setzero_si256();
                for i in 0..if groups_of_32(ID) { 4 } else { 8 } {
                    let x_sums = if groups_of_32(ID) {
                        x.sums_32[i][t]
                    } else {
                        x.sums_16[i][t]
                    };
                    let minima = load(flat(&w.minima[i][half]));
                    let products = _mm256_madd_epi16(minima, _mm256_set1_epi32(x_sums));
                    b = _mm256_add_epi32(b, products);
                }
                let mut a = a[t][half];
                if offset_shift(ID).is_some() {
                    a = _mm256_sub_epi32(a, b);
                }
                let d = _mm256_mul_ps(load_f32(&w.d[half]), scale);
                lanes[t][half] = _mm256_fmadd_ps(d, _mm256_cvtepi32_ps(a), lanes[t][half]);
                if has_minimum(ID) {
                    let m = _mm256_mul_ps(load_f32(&w.dmin[half]), scale);
                    lanes[t][half] = _mm256_fnmadd_ps(m, _mm256_cvtepi32_ps(b), lanes[t][half]);
                }
            }
        }
    }
    add(lanes, sums);
}

#[inline(always)]
fn flat(minima: &[[i16; 2]; 8]) -> &[i16; 16] {
    minima
        .as_flattened()
        .first_chunk()
        .expect("eight pairs are sixteen")
}

/// Adds 32 columns, times their scales.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn add_group<const ID: u32>(
    w: &[Weights; 8],
    x: &[[i32; TILE]; 8],
    scales: &[[[[i16; 2]; 8]; 2]; 16],
    g: usize,
    a: &mut Sums,
) {
    let chain = sums_in_i16(ID);
    let mut first = 0;
    while first < 8 {
        let sums = micro::unsigned(&w[first..first + chain], &x[first..first + chain]);
        let scales = &scales[2 * g + first / 4];
        let scales = [load(flat(&scales[0])), load(flat(&scales[1]))];
        for t in 0..TILE {
            for half in 0..2 {
                let sum = _mm256_madd_epi16(sums[t][half], scales[half]);
                a[t][half] = _mm256_add_epi32(a[t][half], sum);
            }
        }
        first += chain;
    }
}
