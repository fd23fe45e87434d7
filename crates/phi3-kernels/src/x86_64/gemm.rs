//! Products of quantized weights with many tokens.
//!
//! Sixteen rows are unpacked to bytes, as many blocks at a time as stay in the first-level cache, and
//! multiplied with all tokens, four at a time. A lane is a row: four successive weights of eight rows
//! are a vector, and the same four activations of a token fill the other.

use std::arch::x86_64::*;

use super::blocks::{has_minimum, offset_shift, sums_in_i16};
use super::groups;
use super::layouts::{LANES, Layouts, SuperTile, TILE, Tile, class_len, few_tiles};
use super::micro::{self, Integers, Lanes, Sums, Weights};
use super::panel::{
    EMPTY_PANEL, EMPTY_SUPER_PANEL, PANEL_ROWS, Panel, PanelRows, SuperPanel, groups_of_32,
    put_rows, unpack, unpack_super,
};
use super::vector::{ask_for, load, load_f32, store_f32};
use crate::MatrixRef;
use crate::activations::Quantized;

/// Sums of nothing.
pub(super) const NO_LANES: Lanes = Sums([[[0.0; 8]; 2]; TILE]);

const NO_INTEGERS: Integers = Sums([[[0; 8]; 2]; TILE]);

/// Panel by panel: unpacks some blocks, and multiplies all tokens with them.
///
/// Many tokens take the blocks of one partial sum after those of the other, as many at once as stay
/// in the first-level cache. Few take them as they lie, because their partial sums stay there: at
/// most a block for each partial sum at once.
macro_rules! panels {
    (
        $x:ident, $w:ident, $first_row:ident, $out:ident, $bytes:ident,
        $tiles:ident, $empty:ident, $at_once:expr, $few_at_once:expr,
        $unpack:expr, $multiply:expr $(,)?
    ) => {
        let groups = $x.groups();
        let tiles = $x.n.div_ceil(TILE);
        let few = few_tiles(tiles);
        let x = Layouts::$tiles($x);
        let rows = $out.first().map_or(0, |out| out.len());
        let at_once = if few { $few_at_once } else { $at_once };
        let mut panel = vec![$empty; groups.div_ceil(if few { 1 } else { LANES }).min(at_once)];
        let mut sums: Vec<Lanes> = vec![NO_LANES; tiles];
        let mut lanes = vec![NO_LANES; if few { tiles * LANES } else { tiles }];
        for start in (0..rows).step_by(PANEL_ROWS) {
            let of_rows = PanelRows::<$bytes>::new($w, $first_row + start, rows - start);
            let steps = if few { 2 + tiles } else { 2 };
            let mut ahead = Ahead::new($w, $first_row + start, groups * steps);
            sums.fill(NO_LANES);
            if few {
                lanes.fill(NO_LANES);
                for first in (0..groups).step_by($few_at_once) {
                    let panel = &mut panel[..$few_at_once.min(groups - first)];
                    for (i, panel) in panel.iter_mut().enumerate() {
                        for half in 0..2 {
                            ahead.go_on();
                            $unpack(of_rows.eight(half, first + i), half, panel);
                        }
                    }
                    for tile in 0..tiles {
                        let x = &x[tile * groups + first..][..panel.len()];
                        let lanes = &mut lanes[tile * LANES + first % LANES..];
                        for ((w, x), lanes) in panel.chunks(1).zip(x.chunks(1)).zip(lanes) {
                            ahead.go_on();
                            $multiply(w, x, lanes);
                        }
                    }
                }
                for (sums, lanes) in sums.iter_mut().zip(lanes.chunks_exact(LANES)) {
                    for lanes in lanes {
                        add(lanes, sums);
                    }
                }
                bring_home(&sums, start, $out);
                continue;
            }
            let mut rest = x;
            for class in 0..LANES.min(groups) {
                let len = class_len(groups, class);
                let of_class;
                (of_class, rest) = rest.split_at(len * tiles);
                for first in (0..len).step_by($at_once) {
                    let end = len.min(first + $at_once);
                    for i in first..end {
                        for half in 0..2 {
                            ahead.go_on();
                            let blocks = of_rows.eight(half, class + i * LANES);
                            $unpack(blocks, half, &mut panel[i - first]);
                        }
                    }
                    let tiles = of_class.chunks_exact(len).zip(&mut lanes).zip(&mut sums);
                    for ((x, lanes), sums) in tiles {
                        let mut part = if first == 0 { NO_LANES } else { *lanes };
                        $multiply(&panel[..end - first], &x[first..end], &mut part);
                        if end == len {
                            add(&part, sums);
                        } else {
                            *lanes = part;
                        }
                    }
                }
            }
            bring_home(&sums, start, $out);
        }
    };
}
pub(super) use panels;

/// Bytes of a line of the cache.
const LINE: usize = 64;

/// Blocks of 32, or of 256, of a panel that are unpacked at once.
const AT_ONCE: usize = 32;
const SUPER_AT_ONCE: usize = 4;

/// [`scalar::int8_rows`](crate::scalar::int8_rows) for types with blocks of 32.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn rows<const ID: u32, const BYTES: usize>(
    x: &Quantized,
    w: MatrixRef<'_>,
    first_row: usize,
    out: &mut [&mut [f32]],
) {
    panels!(
        x,
        w,
        first_row,
        out,
        BYTES,
        tiles,
        EMPTY_PANEL,
        AT_ONCE,
        LANES,
        unpack::<ID, BYTES>,
        multiply::<ID>,
    );
}

/// Asks for the weights of the next rows, which lie behind these, piece by piece.
pub(super) struct Ahead {
    next: *const u8,
    /// Lines that are left.
    left: usize,
    /// Lines of a piece: the same number each time, so that the end of the loop is foreseen.
    piece: usize,
}

impl Ahead {
    /// For a panel that starts at row `first` and is used in `pieces` steps.
    pub(super) fn new(w: MatrixRef<'_>, first: usize, pieces: usize) -> Self {
        let row_bytes = w.row(first).len();
        let bytes = PANEL_ROWS.min(w.rows() - first) * row_bytes;
        let lines = bytes.div_ceil(LINE);
        Self {
            next: w.row(first).as_ptr().wrapping_add(bytes),
            left: lines,
            piece: lines.div_ceil(pieces.max(1)),
        }
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    pub(super) fn go_on(&mut self) {
        if self.left == 0 {
            return;
        }
        self.left = self.left.saturating_sub(self.piece);
        for _ in 0..self.piece {
            ask_for::<_MM_HINT_T1>(self.next);
            self.next = self.next.wrapping_add(LINE);
        }
    }
}

pub(super) fn bring_home(sums: &[Lanes], start: usize, out: &mut [&mut [f32]]) {
    for (t, out) in out.iter_mut().enumerate() {
        put_rows(sums[t / TILE].0[t % TILE].as_flattened(), start, out);
    }
}

/// Adds blocks of a partial sum, in order, to `lanes`.
#[target_feature(enable = "avx2,fma,f16c")]
fn multiply<const ID: u32>(w: &[Panel], x: &[Tile], lanes: &mut Lanes) {
    if ID == super::blocks::Q4_0 {
        return multiply_four_bit(w, x, lanes);
    }
    let x = &x[..w.len()];
    for i in 0..w.len() {
        let (w, x) = (&w[i], &x[i]);
        let a = products::<ID>(&w.q, &x.values);
        for t in 0..TILE {
            let scale = _mm256_set1_ps(x.scales[t]);
            let x_sum = _mm256_set1_epi32(x.sums[t]);
            for half in 0..2 {
                let mut a = load(&a.0[t][half]);
                if let Some(shift) = offset_shift(ID) {
                    let offset = _mm256_sll_epi32(x_sum, _mm_cvtsi32_si128(shift));
                    a = _mm256_sub_epi32(a, offset);
                }
                let d = _mm256_mul_ps(load_f32(&w.d[half]), scale);
                let mut sum = load_f32(&lanes.0[t][half]);
                sum = _mm256_fmadd_ps(d, _mm256_cvtepi32_ps(a), sum);
                if has_minimum(ID) {
                    let m = _mm256_mul_ps(load_f32(&w.m[half]), scale);
                    let b = _mm256_cvtepi32_ps(x_sum);
                    sum = _mm256_fmadd_ps(m, b, sum);
                }
                lanes.0[t][half] = store_f32(sum);
            }
        }
    }
}

/// [`multiply`] for Q4_0.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn multiply_four_bit(w: &[Panel], x: &[Tile], lanes: &mut Lanes) {
    let x = &x[..w.len()];
    for i in 0..w.len() {
        micro::add_four_bit::<3>(&w[i].q, &w[i].d, &x[i], lanes);
    }
}

/// Dot products of 32 columns, for sixteen rows and four tokens.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn products<const ID: u32>(w: &[Weights; 8], x: &[[i32; TILE]; 8]) -> Integers {
    let chain = sums_in_i16(ID);
    let mut a = NO_INTEGERS;
    let mut first = 0;
    while first < 8 {
        let columns = first..first + chain;
        micro::add_unsigned(&w[columns.clone()], &x[columns], &[[1; 16]; 2], &mut a);
        first += chain;
    }
    a
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn add(lanes: &Lanes, sums: &mut Lanes) {
    for t in 0..TILE {
        for half in 0..2 {
            let sum = _mm256_add_ps(load_f32(&sums.0[t][half]), load_f32(&lanes.0[t][half]));
            sums.0[t][half] = store_f32(sum);
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
    panels!(
        x,
        w,
        first_row,
        out,
        BYTES,
        supertiles,
        EMPTY_SUPER_PANEL,
        SUPER_AT_ONCE,
        1,
        unpack_super::<ID, BYTES>,
        multiply_super::<ID>,
    );
}

/// As [`multiply`].
#[target_feature(enable = "avx2,fma,f16c")]
fn multiply_super<const ID: u32>(w: &[SuperPanel], x: &[SuperTile], lanes: &mut Lanes) {
    let x = &x[..w.len()];
    for i in 0..w.len() {
        let (w, x) = (&w[i], &x[i]);
        let a = match sums_in_i16(ID) {
            8 => groups::block::<8>(&w.q, &x.values, &w.scales),
            4 => groups::block::<4>(&w.q, &x.values, &w.scales),
            _ => groups::block::<2>(&w.q, &x.values, &w.scales),
        };
        let b = if groups_of_32(ID) {
            micro::minima(&w.minima[..4], &x.sums_32)
        } else {
            micro::minima(&w.minima, &x.sums_16)
        };
        for t in 0..TILE {
            let scale = _mm256_set1_ps(x.scales[t]);
            for half in 0..2 {
                let mut a = a[t][half];
                if offset_shift(ID).is_some() {
                    a = _mm256_sub_epi32(a, b[t][half]);
                }
                let d = _mm256_mul_ps(load_f32(&w.d[half]), scale);
                let mut sum = load_f32(&lanes.0[t][half]);
                sum = _mm256_fmadd_ps(d, _mm256_cvtepi32_ps(a), sum);
                if has_minimum(ID) {
                    let m = _mm256_mul_ps(load_f32(&w.dmin[half]), scale);
                    sum = _mm256_fnmadd_ps(m, _mm256_cvtepi32_ps(b[t][half]), sum);
                }
                lanes.0[t][half] = store_f32(sum);
            }
        }
    }
}
