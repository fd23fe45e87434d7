//! The register tile of f32 products: some rows of one operand times sixteen lanes of the other.
//!
//! With AVX2 six rows: twelve sums, two vectors of lanes and one number of a row are fifteen of sixteen
//! registers; each step does twelve multiply-adds with eight loads, which leaves the two
//! multipliers as the limit.

use std::arch::x86_64::*;
use std::ops::Range;

use crate::backend::Rows;

use super::vector::{from_f16, halves_f16, load_f32, store_f32, transpose, transpose_words};

/// Lanes of a vector of f32.
pub(super) const LANES: usize = 8;

/// The register tile of an instruction set.
pub(super) trait RegisterTile {
    /// Rows of a full tile, at most [`MAX_ROWS`].
    const ROWS: usize;

    /// `sums[r] += sum_c x[r * stride + c] * panel[c]`, by fused multiply-adds in the order of c, for
    /// as many rows as there are sums, at most [`ROWS`](Self::ROWS).
    ///
    /// # Safety
    /// The processor has the instructions of the tile.
    unsafe fn multiply(panel: &[Lanes], x: &[f32], stride: usize, sums: &mut [Lanes]);

    /// Adds the products of `panel` with the rows of `x`, as [`multiply`](Self::multiply) sums them, to
    /// `columns`, at most sixteen, of each of `out`; `first`: overwrites them.
    ///
    /// All is loaded before the first store: rows of outputs often lie a multiple of 4 KiB apart, and a
    /// load waits for a store before it whose address has the same lower twelve bits.
    ///
    /// # Safety
    /// The processor has the instructions of the tile, and AVX2.
    #[inline(always)]
    unsafe fn add_products<const BLOCK: usize>(
        panel: &[Lanes],
        x: &[[f32; BLOCK]],
        first: bool,
        out: &mut [&mut [f32]],
        columns: Range<usize>,
    ) {
        // SAFETY: the caller vouches for the instructions.
        unsafe { add_products::<Self, BLOCK>(panel, x, first, out, columns) }
    }
}

/// [`RegisterTile::add_products`] by way of sums in memory.
///
/// # Safety
/// As there.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn add_products<T: RegisterTile + ?Sized, const BLOCK: usize>(
    panel: &[Lanes],
    x: &[[f32; BLOCK]],
    first: bool,
    out: &mut [&mut [f32]],
    columns: Range<usize>,
) {
    let mut sums = [Lanes::ZERO; MAX_ROWS];
    let sums = &mut sums[..x.len()];
    // SAFETY: the caller vouches for the instructions.
    unsafe { T::multiply(panel, x.as_flattened(), BLOCK, sums) };
    if !first {
        for (out, Lanes([low, high])) in out.iter().zip(&mut *sums) {
            let sums = plus([load_f32(low), load_f32(high)], &out[columns.clone()]);
            (*low, *high) = (store_f32(sums[0]), store_f32(sums[1]));
        }
    }
    for (out, Lanes([low, high])) in out.iter_mut().zip(sums) {
        let sums = [load_f32(low), load_f32(high)];
        store_lanes(&mut out[columns.clone()], columns.len(), sums);
    }
}

/// Adds up to sixteen sums of a block to `out`; `first`: overwrites it.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn add(sums: [__m256; 2], first: bool, out: &mut [f32]) {
    let sums = if first { sums } else { plus(sums, out) };
    let count = out.len();
    store_lanes(out, count, sums);
}

/// Sums and up to sixteen numbers.
#[target_feature(enable = "avx2")]
#[inline]
fn plus(mut sums: [__m256; 2], numbers: &[f32]) -> [__m256; 2] {
    let mut some = [[0.0; LANES]; 2];
    let numbers = match numbers.as_chunks() {
        ([low, high], []) => [low, high],
        _ => {
            some.as_flattened_mut()[..numbers.len()].copy_from_slice(numbers);
            some.each_ref()
        }
    };
    for half in 0..2 {
        sums[half] = _mm256_add_ps(load_f32(numbers[half]), sums[half]);
    }
    sums
}

/// Rows of the largest tile.
pub(super) const MAX_ROWS: usize = 12;

/// The tile of AVX2 and FMA.
pub(super) struct SixRows;

impl RegisterTile for SixRows {
    const ROWS: usize = 6;

    #[inline(always)]
    unsafe fn multiply(panel: &[Lanes], x: &[f32], stride: usize, sums: &mut [Lanes]) {
        // SAFETY: the caller vouches for the instructions.
        unsafe {
            match sums.len() {
                6 => multiply_rows::<6>(panel, x, stride, sums),
                5 => multiply_rows::<5>(panel, x, stride, sums),
                4 => multiply_rows::<4>(panel, x, stride, sums),
                3 => multiply_rows::<3>(panel, x, stride, sums),
                2 => multiply_rows::<2>(panel, x, stride, sums),
                _ => multiply_rows::<1>(panel, x, stride, sums),
            }
        }
    }
}

/// [`RegisterTile::multiply`] of `R` rows.
#[target_feature(enable = "avx2,fma")]
fn multiply_rows<const R: usize>(panel: &[Lanes], x: &[f32], stride: usize, sums: &mut [Lanes]) {
    let mut rows = [&[][..]; R];
    let mut registers = [[_mm256_setzero_ps(); 2]; R];
    for r in 0..R {
        rows[r] = &x[r * stride..][..panel.len()];
        let Lanes([low, high]) = &sums[r];
        registers[r] = [load_f32(low), load_f32(high)];
    }
    let registers = multiply(panel, rows, registers);
    for r in 0..R {
        sums[r] = Lanes([store_f32(registers[r][0]), store_f32(registers[r][1])]);
    }
}

/// Sixteen rows by eights of elements.
pub(super) type Eights<'a, E> = [&'a [[E; LANES]]; 2 * LANES];

/// An element of keys and values.
pub(super) trait Element: Copy {
    /// An element of each of sixteen rows.
    type Column: Copy;

    /// Rows of this type; none where they are of the other.
    fn of(rows: Rows<'_>) -> &[Self];

    /// Eight elements as f32.
    ///
    /// # Safety
    /// The processor has AVX2 and F16C.
    unsafe fn load(eight: &[Self; LANES]) -> __m256;

    /// Eights `c` of sixteen rows, turned.
    ///
    /// # Safety
    /// The processor has AVX2 and F16C.
    unsafe fn turn(rows: &Eights<'_, Self>, c: usize) -> [Self::Column; LANES];

    /// As f32, a row to a lane.
    ///
    /// # Safety
    /// The processor has AVX2 and F16C.
    unsafe fn lanes(column: Self::Column) -> [__m256; 2];
}

impl Element for f32 {
    type Column = [__m256; 2];

    fn of(rows: Rows<'_>) -> &[Self] {
        match rows {
            Rows::F32(rows) => rows,
            Rows::F16(_) => &[],
        }
    }

    #[inline(always)]
    unsafe fn load(eight: &[Self; LANES]) -> __m256 {
        // SAFETY: the caller vouches for the instructions.
        unsafe { load_f32(eight) }
    }

    #[inline(always)]
    unsafe fn turn(rows: &Eights<'_, Self>, c: usize) -> [Self::Column; LANES] {
        // SAFETY: the caller vouches for the instructions.
        unsafe { turn_f32(rows, c) }
    }

    #[inline(always)]
    unsafe fn lanes(column: Self::Column) -> [__m256; 2] {
        column
    }
}

impl Element for u16 {
    type Column = __m256i;

    fn of(rows: Rows<'_>) -> &[Self] {
        match rows {
            Rows::F16(rows) => rows,
            Rows::F32(_) => &[],
        }
    }

    #[inline(always)]
    unsafe fn load(eight: &[Self; LANES]) -> __m256 {
        // SAFETY: the caller vouches for the instructions.
        unsafe { from_f16(*eight) }
    }

    #[inline(always)]
    unsafe fn turn(rows: &Eights<'_, Self>, c: usize) -> [Self::Column; LANES] {
        // SAFETY: the caller vouches for the instructions.
        unsafe { turn_f16(rows, c) }
    }

    #[inline(always)]
    unsafe fn lanes(column: Self::Column) -> [__m256; 2] {
        // SAFETY: the caller vouches for the instructions.
        unsafe { widen_f16(column) }
    }
}

/// Sixteen numbers of half precision as f32.
#[target_feature(enable = "avx2,f16c")]
#[inline]
pub(super) fn widen_f16(halves: __m256i) -> [__m256; 2] {
    [
        _mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
        _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(halves)),
    ]
}

#[target_feature(enable = "avx2")]
#[inline]
fn turn_f32(rows: &Eights<'_, f32>, c: usize) -> [[__m256; 2]; LANES] {
    let mut turned = [[_mm256_setzero_ps(); 2]; LANES];
    for half in 0..2 {
        let mut eight = [_mm256_setzero_si256(); LANES];
        for i in 0..LANES {
            eight[i] = _mm256_castps_si256(load_f32(&rows[LANES * half + i][c]));
        }
        let eight = transpose(eight);
        for i in 0..LANES {
            turned[i][half] = _mm256_castsi256_ps(eight[i]);
        }
    }
    turned
}

#[target_feature(enable = "avx2")]
#[inline]
fn turn_f16(rows: &Eights<'_, u16>, c: usize) -> [__m256i; LANES] {
    let mut r = [_mm256_setzero_si256(); LANES];
    for i in 0..LANES {
        r[i] = halves_f16(&rows[i][c], &rows[i + LANES][c]);
    }
    transpose_words(r)
}

/// What the sixteen lanes hold at one step: a line of the cache.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Lanes(pub(super) [[f32; 8]; 2]);

impl Lanes {
    pub(super) const ZERO: Self = Self([[0.0; 8]; 2]);
}

/// The sums of `R` rows.
pub(super) type Sums<const R: usize> = [[__m256; 2]; R];

/// [`RegisterTile::multiply`] of rows as long as the panel.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn multiply<const R: usize>(panel: &[Lanes], rows: [&[f32]; R], mut sums: Sums<R>) -> Sums<R> {
    let steps = panel.len();
    let whole = steps - steps % UNROLLED;
    let done = if let (Ok(rows), Some(sums)) = (rows.as_slice().try_into(), same(&mut sums)) {
        multiply_6(&panel[..whole], rows, sums);
        whole
    } else if let (Ok(rows), Some(sums)) = (rows.as_slice().try_into(), same(&mut sums)) {
        multiply_5(&panel[..whole], rows, sums);
        whole
    } else {
        0
    };
    for c in done..steps {
        let Lanes([low, high]) = &panel[c];
        let (low, high) = (load_f32(low), load_f32(high));
        for r in 0..R {
            let x = _mm256_set1_ps(rows[r][c]);
            sums[r][0] = _mm256_fmadd_ps(low, x, sums[r][0]);
            sums[r][1] = _mm256_fmadd_ps(high, x, sums[r][1]);
        }
    }
    sums
}

/// The sums of `R` rows, if that is `S` rows.
#[inline(always)]
fn same<const R: usize, const S: usize>(sums: &mut Sums<R>) -> Option<&mut Sums<S>> {
    sums.as_mut_slice().try_into().ok()
}

/// Columns that a round of the loop in assembly takes.
const UNROLLED: usize = 4;

/// The instructions of one column `c` of the round: both vectors of lanes, then a number of each row,
/// by turns in two registers.
macro_rules! column {
    ($c:literal: $($row:literal $x:literal),*) => {
        concat!(
            "vmovaps {low}, [{panel} + 64 * ", $c, "]\n",
            "vmovaps {high}, [{panel} + 64 * ", $c, " + 32]\n",
            $(
                "vbroadcastss {x", $x, "}, [{row", $row, "} + 4 * {c} + 4 * ", $c, "]\n",
                "vfmadd231ps {low", $row, "}, {low}, {x", $x, "}\n",
                "vfmadd231ps {high", $row, "}, {high}, {x", $x, "}\n",
            )*
        )
    };
}

/// [`multiply`] for one number of rows, in assembly, because compilers keep some of the sums in memory or load
/// too late: gcc's form of the same loop, in C, reached 65 % of what the multipliers can do, this one 97.
macro_rules! in_assembly {
    ($name:ident, $rows:literal: $($row:literal $x:literal $pointer:ident $low:ident $high:ident),*) => {
        #[target_feature(enable = "avx2,fma")]
        #[inline]
        fn $name(panel: &[Lanes], x: &[&[f32]; $rows], sums: &mut Sums<$rows>) {
            let steps = panel.len();
            assert!(
                steps.is_multiple_of(UNROLLED) && x.iter().all(|x| x.len() >= steps),
                "rows as long as the panel, in whole rounds"
            );
            if steps == 0 {
                return;
            }
            // SAFETY: the registers and instructions are there, as this function is compiled with
            // their features. Each round reads `UNROLLED` elements of the panel, which its type
            // aligns to 64 bytes, and as many of each row; `c` stops at `steps`, which is a multiple
            // of that, not 0, and no more than the length of either, as checked above. Nothing is
            // written but the registers named.
            unsafe {
                std::arch::asm!(
                    "2:",
                    column!(0: $($row $x),*),
                    column!(1: $($row $x),*),
                    column!(2: $($row $x),*),
                    column!(3: $($row $x),*),
                    "add {panel}, 64 * 4",
                    "add {c}, 4",
                    "cmp {c}, {steps}",
                    "jb 2b",
                    panel = inout(reg) panel.as_ptr() => _,
                    c = inout(reg) 0usize => _,
                    steps = in(reg) steps,
                    $($pointer = in(reg) x[$row].as_ptr(),)*
                    $($low = inout(ymm_reg) sums[$row][0],)*
                    $($high = inout(ymm_reg) sums[$row][1],)*
                    low = out(ymm_reg) _,
                    high = out(ymm_reg) _,
                    x0 = out(ymm_reg) _,
                    x1 = out(ymm_reg) _,
                    options(nostack, readonly),
                );
            }
        }
    };
}

in_assembly!(multiply_6, 6:
    0 0 row0 low0 high0, 1 1 row1 low1 high1, 2 0 row2 low2 high2,
    3 1 row3 low3 high3, 4 0 row4 low4 high4, 5 1 row5 low5 high5);
in_assembly!(multiply_5, 5:
    0 0 row0 low0 high0, 1 1 row1 low1 high1, 2 0 row2 low2 high2,
    3 1 row3 low3 high3, 4 0 row4 low4 high4);

#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn zeros<const R: usize>() -> Sums<R> {
    [[_mm256_setzero_ps(); 2]; R]
}

/// Sixteen rows of `d` elements; behind the last row comes the last row again.
pub(super) fn eights<E>(of: &[E], d: usize) -> Eights<'_, E> {
    let last = of.len() / d - 1;
    let mut rows = [&[][..]; 2 * LANES];
    for (i, row) in rows.iter_mut().enumerate() {
        *row = &of[i.min(last) * d..][..d].as_chunks().0[..d / LANES];
    }
    rows
}

/// The first `count` lanes, up to sixteen, to the start of `row`.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn store_lanes(row: &mut [f32], count: usize, [low, high]: [__m256; 2]) {
    let lanes = [store_f32(low), store_f32(high)];
    if count == 2 * LANES
        && let Some(row) = row.as_chunks_mut().0.first_chunk_mut()
    {
        *row = lanes;
        return;
    }
    row[..count].copy_from_slice(&lanes.as_flattened()[..count]);
}

/// Where `n` rows are cut into the fewest tiles, of nearly the same size: the first row of each and
/// the one behind its last.
pub(super) fn cuts<T: RegisterTile>(n: usize) -> impl Iterator<Item = (usize, usize)> {
    let tiles = n.div_ceil(T::ROWS);
    (0..tiles).map(move |i| (i * n / tiles, (i + 1) * n / tiles))
}

/// The sixteen elements of `row` from `first` on.
///
/// # Panics
/// When there are not so many.
#[inline(always)]
pub(super) fn lanes_mut(row: &mut [f32], first: usize) -> &mut [[f32; LANES]; 2] {
    let lanes = row[first..].as_chunks_mut().0.first_chunk_mut();
    lanes.expect("a caller that takes whole lanes has sixteen elements")
}
