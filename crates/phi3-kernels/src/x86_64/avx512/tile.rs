//! The register tile of AVX-512: twelve rows, a sum of sixteen lanes each.
//!
//! Each step is a load of lanes and twelve multiply-adds, each with a number of a row from memory: what
//! the multipliers of Zen 4, one vector of 512 bits a cycle, can do.

use std::arch::x86_64::*;

use super::vector::{load_f32, store_f32};
use crate::x86_64::tile::{Lanes, RegisterTile};

/// The tile of AVX-512F.
pub(in crate::x86_64) struct TwelveRows;

impl RegisterTile for TwelveRows {
    const ROWS: usize = 12;

    #[inline(always)]
    unsafe fn multiply(panel: &[Lanes], x: &[f32], stride: usize, sums: &mut [Lanes]) {
        // SAFETY: the caller vouches for the instructions.
        unsafe {
            match sums.len() {
                12 => multiply::<12>(panel, x, stride, sums),
                11 => multiply::<11>(panel, x, stride, sums),
                10 => multiply::<10>(panel, x, stride, sums),
                9 => multiply::<9>(panel, x, stride, sums),
                8 => multiply::<8>(panel, x, stride, sums),
                7 => multiply::<7>(panel, x, stride, sums),
                6 => multiply::<6>(panel, x, stride, sums),
                5 => multiply::<5>(panel, x, stride, sums),
                4 => multiply::<4>(panel, x, stride, sums),
                3 => multiply::<3>(panel, x, stride, sums),
                2 => multiply::<2>(panel, x, stride, sums),
                _ => multiply::<1>(panel, x, stride, sums),
            }
        }
    }
}

/// [`RegisterTile::multiply`] of `R` rows.
#[target_feature(enable = "avx512f")]
fn multiply<const R: usize>(panel: &[Lanes], x: &[f32], stride: usize, sums: &mut [Lanes]) {
    // Slices of one length, so that the loop needs no check.
    let mut rows = [&[][..]; R];
    let mut registers = [_mm512_setzero_ps(); R];
    for r in 0..R {
        rows[r] = &x[r * stride..][..panel.len()];
        registers[r] = load_f32(&sums[r].0);
    }
    for c in 0..panel.len() {
        let lanes = load_f32(&panel[c].0);
        for r in 0..R {
            registers[r] = _mm512_fmadd_ps(lanes, _mm512_set1_ps(rows[r][c]), registers[r]);
        }
    }
    for r in 0..R {
        store_f32(registers[r], &mut sums[r].0);
    }
}
