//! The register tile of AVX-512: twelve rows, a sum of sixteen lanes each.
//!
//! Each step is a load of lanes and twelve multiply-adds, each with a number of a row from memory: what
//! the multipliers of Zen 4, one vector of 512 bits a cycle, can do.

use std::arch::x86_64::*;
use std::ops::Range;

use super::vector::{load_f32, store_f32};
use crate::x86_64::tile::{Lanes, RegisterTile};

/// The tile of AVX-512F.
pub(in crate::x86_64) struct TwelveRows;

/// A function of so many rows, called for a number of rows that is known at run time.
macro_rules! of_rows {
    ($count:expr, $function:ident::<_ $(, $constant:ident)?>($($argument:expr),*)) => {
        match $count {
            12 => $function::<12$(, $constant)?>($($argument),*),
            11 => $function::<11$(, $constant)?>($($argument),*),
            10 => $function::<10$(, $constant)?>($($argument),*),
            9 => $function::<9$(, $constant)?>($($argument),*),
            8 => $function::<8$(, $constant)?>($($argument),*),
            7 => $function::<7$(, $constant)?>($($argument),*),
            6 => $function::<6$(, $constant)?>($($argument),*),
            5 => $function::<5$(, $constant)?>($($argument),*),
            4 => $function::<4$(, $constant)?>($($argument),*),
            3 => $function::<3$(, $constant)?>($($argument),*),
            2 => $function::<2$(, $constant)?>($($argument),*),
            _ => $function::<1$(, $constant)?>($($argument),*),
        }
    };
}

impl RegisterTile for TwelveRows {
    const ROWS: usize = 12;

    #[inline(always)]
    unsafe fn multiply(panel: &[Lanes], x: &[f32], stride: usize, sums: &mut [Lanes]) {
        // SAFETY: the caller vouches for the instructions.
        unsafe { of_rows!(sums.len(), multiply::<_>(panel, x, stride, sums)) }
    }

    #[inline(always)]
    unsafe fn add_products<const BLOCK: usize>(
        panel: &[Lanes],
        x: &[[f32; BLOCK]],
        first: bool,
        out: &mut [&mut [f32]],
        columns: Range<usize>,
    ) {
        // SAFETY: the caller vouches for the instructions.
        unsafe {
            of_rows!(
                out.len(),
                add_products::<_, BLOCK>(panel, x, first, out, columns)
            )
        }
    }
}

/// [`RegisterTile::multiply`] of `R` rows.
#[target_feature(enable = "avx512f")]
fn multiply<const R: usize>(panel: &[Lanes], x: &[f32], stride: usize, sums: &mut [Lanes]) {
    let mut registers = [_mm512_setzero_ps(); R];
    for r in 0..R {
        registers[r] = load_f32(&sums[r].0);
    }
    registers = products(panel, x, stride, registers);
    for r in 0..R {
        store_f32(registers[r], &mut sums[r].0);
    }
}

/// [`RegisterTile::add_products`] of `R` rows.
#[target_feature(enable = "avx512f")]
fn add_products<const R: usize, const BLOCK: usize>(
    panel: &[Lanes],
    x: &[[f32; BLOCK]],
    first: bool,
    out: &mut [&mut [f32]],
    columns: Range<usize>,
) {
    let mut sums = products(panel, x.as_flattened(), BLOCK, [_mm512_setzero_ps(); R]);
    if !first {
        for r in 0..R {
            sums[r] = _mm512_add_ps(load_lanes(&out[r][columns.clone()]), sums[r]);
        }
    }
    for r in 0..R {
        store_lanes(sums[r], &mut out[r][columns.clone()]);
    }
}

/// `sums` and the products of `panel` with `R` rows.
#[target_feature(enable = "avx512f")]
#[inline]
fn products<const R: usize>(
    panel: &[Lanes],
    x: &[f32],
    stride: usize,
    mut sums: [__m512; R],
) -> [__m512; R] {
    // Slices of one length, so that the loop needs no check.
    let mut rows = [&[][..]; R];
    for r in 0..R {
        rows[r] = &x[r * stride..][..panel.len()];
    }
    for c in 0..panel.len() {
        let lanes = load_f32(&panel[c].0);
        for r in 0..R {
            sums[r] = _mm512_fmadd_ps(lanes, _mm512_set1_ps(rows[r][c]), sums[r]);
        }
    }
    sums
}

/// Up to sixteen numbers, and zeros.
#[target_feature(enable = "avx512f")]
#[inline]
fn load_lanes(numbers: &[f32]) -> __m512 {
    if let Some(all) = numbers.first_chunk::<16>() {
        return load_f32(all);
    }
    let mut lanes = [0.0; 16];
    lanes[..numbers.len()].copy_from_slice(numbers);
    load_f32(&lanes)
}

/// The first lanes, as many as there are numbers.
#[target_feature(enable = "avx512f")]
#[inline]
fn store_lanes(lanes: __m512, numbers: &mut [f32]) {
    if let Some(all) = numbers.first_chunk_mut::<16>() {
        return store_f32(lanes, all);
    }
    let mut some = [0.0; 16];
    store_f32(lanes, &mut some);
    numbers.copy_from_slice(&some[..numbers.len()]);
}
