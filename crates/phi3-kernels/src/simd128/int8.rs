//! Products of quantized weights with eight-bit activations, bit by bit those of
//! [`scalar::int8_rows`](crate::scalar::int8_rows).
//!
//! Some rows are unpacked to signed bytes in the first-level cache and multiplied with all tokens,
//! two rows and two tokens at a time. Four blocks' integers become a vector with a lane for each,
//! and so do their factors.

#![expect(
    clippy::needless_range_loop,
    reason = "one index into several arrays; closures in iterators would lose the instructions"
)]

use std::borrow::Cow;

use super::Vectors;
use crate::activations::{BLOCK_GROUP, Quantized, SUM_GROUP};
use crate::scalar::{Factors, INT8_LANES, Unit, unpack_row};
use crate::{BlockType, MatrixRef, scalar};

pub(super) const LANES: usize = 4;

/// Rows unpacked at once: 24 KiB at a width of 3072.
pub(super) const PANEL_ROWS: usize = 8;

/// Rows and tokens of the register block: its sixteen sums of integers and eight of floats leave
/// eight of the 32 registers of 64-bit ARM.
const BLOCK_ROWS: usize = 2;
const BLOCK_TOKENS: usize = 2;

/// Sums of sixteen in a block of 256.
pub(super) const SUMS: usize = 16;

/// Vectors of integers, beside those of four f32.
pub(crate) trait IntegerVectors: Vectors {
    /// Sixteen i8.
    type I8: Copy;
    /// Four i32.
    type I32: Copy;

    fn load_i8(self, sixteen: &[i8; 16]) -> Self::I8;
    fn zero(self) -> Self::I32;

    /// Adds eight products to the lanes of `sum`, each to any of them.
    fn dot_i16(self, sum: Self::I32, w: &[i16; 8], x: &[i16; 8]) -> Self::I32;
    /// `sum + v * factor`.
    fn add_scaled(self, sum: Self::I32, v: Self::I32, factor: i16) -> Self::I32;

    /// Lane i is the sum of the lanes of vector i.
    fn sum_each_i32(self, v: [Self::I32; 4]) -> Self::I32;
    /// Lane i is the sum of numbers 2 i and 2 i + 1.
    fn sum_pairs(self, eight: &[i16; 8]) -> Self::I32;

    /// The nearest f32.
    fn to_f32(self, v: Self::I32) -> Self::F32;
    /// `a * b + c`, rounded once.
    fn fused(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
}

/// The instructions for products of bytes, of which a processor may have several kinds.
pub(crate) trait Dot<V: IntegerVectors>: Copy {
    /// Adds sixteen products to the lanes of `sum`, each to any of them. No activation in `x` is
    /// -128.
    fn dot(self, sum: V::I32, w: V::I8, x: V::I8) -> V::I32;
}

#[inline(always)]
pub(crate) fn int8_rows<V: IntegerVectors, D: Dot<V>>(
    v: V,
    dot: D,
    x: &Quantized,
    w: MatrixRef<'_>,
    first_row: usize,
    out: &mut [&mut [f32]],
) {
    if w.block_type().block_len() != x.group {
        return scalar::int8_rows(x, w, first_row, out);
    }
    let rows = out.first().map_or(0, |out| out.len());
    let x = Tokens::new(x);
    let mut panel = Panel::new(w, x.groups);
    for start in (0..rows).step_by(PANEL_ROWS) {
        let panel_rows = PANEL_ROWS.min(rows - start);
        for i in 0..panel_rows {
            panel.unpack(i, w, first_row + start + i);
        }
        let mut t = 0;
        while t < x.n {
            let tokens = BLOCK_TOKENS.min(x.n - t);
            let mut r = 0;
            while r < panel_rows {
                let block_rows = BLOCK_ROWS.min(panel_rows - r);
                let out = &mut out[t..t + tokens];
                match (block_rows, tokens) {
                    (2, 2) => block::<V, D, 2, 2>(v, dot, &panel, r, &x, t, out, start + r),
                    (2, _) => block::<V, D, 2, 1>(v, dot, &panel, r, &x, t, out, start + r),
                    (_, 2) => block::<V, D, 1, 2>(v, dot, &panel, r, &x, t, out, start + r),
                    _ => block::<V, D, 1, 1>(v, dot, &panel, r, &x, t, out, start + r),
                }
                r += block_rows;
            }
            t += tokens;
        }
    }
}

/// Tokens whose groups fill whole vectors, zeros behind the last.
pub(super) struct Tokens<'a> {
    pub(super) n: usize,
    /// Groups of a token, a multiple of [`LANES`].
    pub(super) groups: usize,
    /// Elements of a group.
    pub(super) group: usize,
    /// `[n, groups, group]`.
    pub(super) values: Cow<'a, [i8]>,
    /// `[n, groups]`.
    pub(super) scales: Cow<'a, [f32]>,
    /// `[n, groups, group / 16]`.
    pub(super) sums: Cow<'a, [i16]>,
}

impl<'a> Tokens<'a> {
    pub(super) fn new(x: &'a Quantized) -> Self {
        let groups = x.groups().next_multiple_of(LANES);
        Self {
            n: x.n,
            groups,
            group: x.group,
            values: filled_up(&x.values, x.cols, groups * x.group),
            scales: filled_up(&x.scales, x.groups(), groups),
            sums: filled_up(&x.sums, x.cols / SUM_GROUP, groups * x.group / SUM_GROUP),
        }
    }
}

/// Items of `len` elements made `filled` elements long.
fn filled_up<T: Copy + Default>(items: &[T], len: usize, filled: usize) -> Cow<'_, [T]> {
    if len == filled {
        return Cow::Borrowed(items);
    }
    let mut out = vec![T::default(); items.len() / len * filled];
    for (item, out) in items.chunks_exact(len).zip(out.chunks_exact_mut(filled)) {
        out[..len].copy_from_slice(item);
    }
    Cow::Owned(out)
}

/// Unpacked rows: as in [`Unit`], with zeros behind the last block of a row.
pub(super) struct Panel {
    /// Blocks of a row, a multiple of [`LANES`].
    pub(super) groups: usize,
    /// `[rows, groups, weights of a block]`.
    pub(super) q: Vec<i8>,
    /// Half-precision factors, `[rows, groups]`.
    d: Vec<u16>,
    /// The factors of the minima, of opposite sign; empty for types without.
    minus_dmin: Vec<u16>,
    /// `[rows, groups]` for blocks of 256, else empty.
    pub(super) scales: Vec<[i16; SUMS]>,
    pub(super) mins: Vec<[i16; SUMS]>,
}

impl Panel {
    pub(super) fn new(w: MatrixRef<'_>, groups: usize) -> Self {
        let (block_len, has_minimum) = (w.block_type().block_len(), has_minimum(w.block_type()));
        let blocks = PANEL_ROWS * groups;
        let (supers, minima) = (block_len > BLOCK_GROUP, has_minimum);
        Self {
            groups,
            q: vec![0; blocks * block_len],
            d: vec![0; blocks],
            minus_dmin: vec![0; if minima { blocks } else { 0 }],
            scales: vec![[0; SUMS]; if supers { blocks } else { 0 }],
            mins: vec![[0; SUMS]; if supers && minima { blocks } else { 0 }],
        }
    }

    pub(super) fn unpack(&mut self, i: usize, w: MatrixRef<'_>, row: usize) {
        let len = self.q.len() / PANEL_ROWS;
        let blocks = i * self.groups..(i + 1) * self.groups;
        let mut factors = RowFactors {
            d: &mut self.d[blocks.clone()],
            minus_dmin: self.minus_dmin.get_mut(blocks.clone()).unwrap_or_default(),
            scales: self.scales.get_mut(blocks.clone()).unwrap_or_default(),
            mins: self.mins.get_mut(blocks).unwrap_or_default(),
        };
        let q = &mut self.q[i * len..][..len];
        unpack_row(w.block_type(), w.row(row), q, &mut factors);
    }
}

/// The factors of one row of a [`Panel`].
struct RowFactors<'a> {
    d: &'a mut [u16],
    minus_dmin: &'a mut [u16],
    pub(super) scales: &'a mut [[i16; SUMS]],
    pub(super) mins: &'a mut [[i16; SUMS]],
}

impl Factors for RowFactors<'_> {
    #[inline(always)]
    fn put(&mut self, i: usize, unit: Unit) {
        self.d[i] = unit.d;
        if let (Some(to), Some(dmin)) = (self.minus_dmin.get_mut(i), unit.minus_dmin) {
            *to = dmin;
        }
        if let Some(scales) = self.scales.get_mut(i) {
            *scales = unit.scales;
        }
        if let Some(mins) = self.mins.get_mut(i) {
            *mins = unit.mins;
        }
    }
}

/// Whether blocks of a type have minima.
fn has_minimum(block_type: BlockType) -> bool {
    matches!(
        block_type,
        BlockType::Q4_1 | BlockType::Q5_1 | BlockType::Q2K | BlockType::Q4K | BlockType::Q5K
    )
}

/// `R` rows of the panel from `r` on times `T` tokens from `t` on: `out[t][at + r]`.
#[inline(always)]
fn block<V: IntegerVectors, D: Dot<V>, const R: usize, const T: usize>(
    v: V,
    dot: D,
    panel: &Panel,
    r: usize,
    x: &Tokens<'_>,
    t: usize,
    out: &mut [&mut [f32]],
    at: usize,
) {
    let lanes = if x.group == BLOCK_GROUP {
        blocks_of_32::<V, D, R, T>(v, dot, panel, r, x, t)
    } else {
        blocks_of_256::<V, D, R, T>(v, dot, panel, r, x, t)
    };
    for r in 0..R {
        for t in 0..T {
            out[t][at + r] = in_order(v, lanes[r][t]);
        }
    }
}

/// The sum of eight partial sums.
#[inline(always)]
pub(super) fn in_order<V: Vectors>(v: V, [low, high]: [V::F32; 2]) -> f32 {
    let mut sum = 0.0;
    for lane in v.store(low) {
        sum += lane;
    }
    for lane in v.store(high) {
        sum += lane;
    }
    sum
}

/// The eight partial sums of each row and token.
pub(super) type Sums<V, const R: usize, const T: usize> =
    [[[<V as Vectors>::F32; INT8_LANES / LANES]; T]; R];

#[inline(always)]
fn blocks_of_32<V: IntegerVectors, D: Dot<V>, const R: usize, const T: usize>(
    v: V,
    dot: D,
    panel: &Panel,
    r: usize,
    x: &Tokens<'_>,
    t: usize,
) -> Sums<V, R, T> {
    let quads = x.groups / LANES;
    let rows = Rows::<R>::new(panel, r);
    let tokens = Columns::<T>::new(x, t);
    // Slices of `quads` elements each, so that the loop needs no check.
    let mut q = [&[][..]; R];
    for r in 0..R {
        q[r] = &rows.q[r].as_chunks::<2>().0.as_chunks::<LANES>().0[..quads];
    }
    let (mut values, mut sums) = ([&[][..]; T], [&[][..]; T]);
    for t in 0..T {
        values[t] = &tokens.values[t].as_chunks::<2>().0.as_chunks::<LANES>().0[..quads];
        sums[t] = &tokens.sums[t].as_chunks::<{ 2 * LANES }>().0[..quads];
    }
    let mut lanes = [[[v.splat(0.0); 2]; T]; R];
    for pair in 0..quads.div_ceil(2) {
        for half in 0..2 {
            let k = 2 * pair + half;
            if k == quads {
                break;
            }
            let mut a = [[[v.zero(); LANES]; T]; R];
            for i in 0..LANES {
                for side in 0..2 {
                    let mut x = [v.load_i8(&[0; 16]); T];
                    for t in 0..T {
                        x[t] = v.load_i8(&values[t][k][i][side]);
                    }
                    for r in 0..R {
                        let w = v.load_i8(&q[r][k][i][side]);
                        for t in 0..T {
                            a[r][t][i] = dot.dot(a[r][t][i], w, x[t]);
                        }
                    }
                }
            }
            let (mut sums_of, mut x_sums) = ([[v.zero(); T]; R], [v.zero(); T]);
            for t in 0..T {
                x_sums[t] = v.sum_pairs(&sums[t][k]);
            }
            for r in 0..R {
                for t in 0..T {
                    sums_of[r][t] = v.sum_each_i32(a[r][t]);
                }
            }
            add_factors(v, &rows, &tokens, k, sums_of, [x_sums; R], half, &mut lanes);
        }
    }
    lanes
}

#[inline(always)]
fn blocks_of_256<V: IntegerVectors, D: Dot<V>, const R: usize, const T: usize>(
    v: V,
    dot: D,
    panel: &Panel,
    r: usize,
    x: &Tokens<'_>,
    t: usize,
) -> Sums<V, R, T> {
    let rows = Rows::<R>::new(panel, r);
    let tokens = Columns::<T>::new(x, t);
    let (mut q, mut scales) = ([&[][..]; R], [&[][..]; R]);
    for i in 0..R {
        let first = (r + i) * x.groups;
        q[i] = &rows.q[i].as_chunks::<SUMS>().0[..x.groups];
        scales[i] = &panel.scales[first..][..x.groups];
    }
    let mut values = [&[][..]; T];
    for t in 0..T {
        values[t] = &tokens.values[t].as_chunks::<SUMS>().0[..x.groups];
    }
    let mut lanes = [[[v.splat(0.0); 2]; T]; R];
    let quads = x.groups / LANES;
    for pair in 0..quads.div_ceil(2) {
        for half in 0..2 {
            let k = 2 * pair + half;
            if k == quads {
                break;
            }
            let mut a = [[[v.zero(); LANES]; T]; R];
            for i in 0..LANES {
                let block = LANES * k + i;
                for g in 0..SUMS {
                    let mut x = [v.load_i8(&[0; 16]); T];
                    for t in 0..T {
                        x[t] = v.load_i8(&values[t][block][g]);
                    }
                    for r in 0..R {
                        let w = v.load_i8(&q[r][block][g]);
                        for t in 0..T {
                            let products = dot.dot(v.zero(), w, x[t]);
                            a[r][t][i] = v.add_scaled(a[r][t][i], products, scales[r][block][g]);
                        }
                    }
                }
            }
            let mut sums_of = [[v.zero(); T]; R];
            for r in 0..R {
                for t in 0..T {
                    sums_of[r][t] = v.sum_each_i32(a[r][t]);
                }
            }
            let b = minima(v, panel, r, &tokens, k);
            add_factors(v, &rows, &tokens, k, sums_of, b, half, &mut lanes);
        }
    }
    lanes
}

/// What the minima of quad k of blocks of 256 are multiplied with, a block to a lane; zeros for
/// types without minima.
#[inline(always)]
pub(super) fn minima<V: IntegerVectors, const R: usize, const T: usize>(
    v: V,
    panel: &Panel,
    r: usize,
    tokens: &Columns<'_, T>,
    k: usize,
) -> [[V::I32; T]; R] {
    let mut out = [[v.zero(); T]; R];
    if panel.mins.is_empty() {
        return out;
    }
    for i in 0..R {
        let mins = &panel.mins[(r + i) * panel.groups + LANES * k..][..LANES];
        for t in 0..T {
            let sums = &tokens.sums[t][SUMS * LANES * k..][..SUMS * LANES];
            let sums = sums.as_chunks::<SUMS>().0;
            let mut b = [v.zero(); LANES];
            for j in 0..LANES {
                let ([low, high], [x_low, x_high]) = (halves(&mins[j]), halves(&sums[j]));
                b[j] = v.dot_i16(v.dot_i16(v.zero(), low, x_low), high, x_high);
            }
            out[i][t] = v.sum_each_i32(b);
        }
    }
    out
}

/// Adds quad k of blocks, whose integers are `a` and, for the minima, `b`, to `lanes`.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "two operands and their products")]
pub(super) fn add_factors<V: IntegerVectors, const R: usize, const T: usize>(
    v: V,
    rows: &Rows<'_, R>,
    tokens: &Columns<'_, T>,
    k: usize,
    a: [[V::I32; T]; R],
    b: [[V::I32; T]; R],
    half: usize,
    lanes: &mut Sums<V, R, T>,
) {
    for r in 0..R {
        let d = v.load_f16(&rows.d[r][k]);
        for t in 0..T {
            let scales = v.load(&tokens.scales[t][k]);
            let lane = &mut lanes[r][t][half];
            *lane = v.fused(v.mul(d, scales), v.to_f32(a[r][t]), *lane);
            if let Some(minus_dmin) = rows.minus_dmin[r].get(k) {
                let factor = v.mul(v.load_f16(minus_dmin), scales);
                *lane = v.fused(factor, v.to_f32(b[r][t]), *lane);
            }
        }
    }
}

#[inline(always)]
fn halves(sixteen: &[i16; 16]) -> [&[i16; 8]; 2] {
    let [low, high] = sixteen.as_chunks::<8>().0 else {
        return [&[0; 8]; 2];
    };
    [low, high]
}

/// What both kinds of blocks read of `R` rows: bytes by sixteen, factors by four.
pub(super) struct Rows<'a, const R: usize> {
    pub(super) q: [&'a [[i8; 16]]; R],
    pub(super) d: [&'a [[u16; LANES]]; R],
    /// Empty for types without minima.
    pub(super) minus_dmin: [&'a [[u16; LANES]]; R],
}

impl<'a, const R: usize> Rows<'a, R> {
    #[inline(always)]
    pub(super) fn new(panel: &'a Panel, r: usize) -> Self {
        let mut rows = Self {
            q: [&[]; R],
            d: [&[]; R],
            minus_dmin: [&[]; R],
        };
        let (len, groups) = (panel.q.len() / PANEL_ROWS, panel.groups);
        for i in 0..R {
            let first = (r + i) * groups;
            rows.q[i] = panel.q[(r + i) * len..][..len].as_chunks().0;
            rows.d[i] = panel.d[first..][..groups].as_chunks().0;
            let minus_dmin = panel.minus_dmin.get(first..first + groups);
            rows.minus_dmin[i] = minus_dmin.unwrap_or_default().as_chunks().0;
        }
        rows
    }
}

/// The same of `T` tokens; behind the last comes the last again.
pub(super) struct Columns<'a, const T: usize> {
    pub(super) values: [&'a [[i8; 16]]; T],
    pub(super) scales: [&'a [[f32; LANES]]; T],
    pub(super) sums: [&'a [i16]; T],
}

impl<'a, const T: usize> Columns<'a, T> {
    #[inline(always)]
    pub(super) fn new(x: &'a Tokens<'_>, t: usize) -> Self {
        let mut columns = Self {
            values: [&[]; T],
            scales: [&[]; T],
            sums: [&[]; T],
        };
        let (len, groups) = (x.groups * x.group, x.groups);
        for i in 0..T {
            let (t, sums) = ((t + i).min(x.n - 1), len / SUM_GROUP);
            columns.values[i] = x.values[t * len..][..len].as_chunks().0;
            columns.scales[i] = x.scales[t * groups..][..groups].as_chunks().0;
            columns.sums[i] = &x.sums[t * sums..][..sums];
        }
        columns
    }
}
