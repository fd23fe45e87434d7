//! What one block of sixteen rows, unpacked to bytes, gives with the tokens of one to three tiles.

#![expect(
    clippy::needless_range_loop,
    reason = "one index into several arrays; closures in iterators would lose the target features"
)]

use std::arch::x86_64::*;

use super::panel::{Factors, PANEL_ROWS, offset};
use super::vector::{Bytes64, load, load_f32, store_f32};
use crate::x86_64::blocks::{INT4, has_minimum, offset_shift};
use crate::x86_64::layouts::{SuperTile, TILE, Tile};
use crate::x86_64::panel::groups_of_32;

/// Sums of a panel and a tile: a lane to a row.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Lanes(pub(super) [[f32; PANEL_ROWS]; TILE]);

/// Sums of nothing.
pub(super) const NO_LANES: Lanes = Lanes([[0.0; PANEL_ROWS]; TILE]);

/// The same of `G` tiles in registers.
pub(super) type Sums<const G: usize> = [[__m512; TILE]; G];

/// Adds partial sums.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn add(lanes: &[Lanes], sums: &mut [Lanes]) {
    for (sums, lanes) in sums.iter_mut().zip(lanes) {
        for t in 0..TILE {
            let sum = _mm512_add_ps(load_f32(&sums.0[t]), load_f32(&lanes.0[t]));
            store_f32(sum, &mut sums.0[t]);
        }
    }
}

/// Adds the products of one block of sixteen rows, whose factors are `d` and `m`, to `sums`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
#[inline]
pub(super) fn add_block<const ID: u32, const G: usize>(
    q: &[impl Bytes64; 8],
    (d, m): (__m512, __m512),
    x: [&Tile; G],
    sums: &mut Sums<G>,
) {
    let mut a = [[_mm512_setzero_si512(); TILE]; G];
    if let Some(offset) = offset(ID) {
        for g in 0..G {
            for t in 0..TILE {
                a[g][t] = _mm512_set1_epi32(x[g].offsets[offset][t]);
            }
        }
    }
    for c in 0..8 {
        let q = load(&q[c]);
        for g in 0..G {
            for t in 0..TILE {
                let x = _mm512_set1_epi32(x[g].values[c][t]);
                a[g][t] = _mm512_dpbusd_epi32(a[g][t], q, x);
            }
        }
    }
    for g in 0..G {
        for t in 0..TILE {
            let scale = _mm512_set1_ps(x[g].scales[t]);
            let a = _mm512_cvtepi32_ps(a[g][t]);
            let factor = _mm512_mul_ps(d, scale);
            sums[g][t] = _mm512_fmadd_ps(factor, a, sums[g][t]);
            if has_minimum(ID) {
                let factor = _mm512_mul_ps(m, scale);
                let x_sum = _mm512_cvtepi32_ps(_mm512_set1_epi32(x[g].sums[t]));
                sums[g][t] = _mm512_fmadd_ps(factor, x_sum, sums[g][t]);
            }
        }
    }
}

/// What the offset of the weight bytes of sixteen rows adds too much, to be added; else zeros.
#[target_feature(enable = "avx512f,avx512vnni")]
#[inline]
pub(super) fn offsets<const ID: u32, const G: usize>(
    factors: &Factors,
    x: [&SuperTile; G],
) -> Integers<G> {
    let mut a = [[_mm512_setzero_si512(); TILE]; G];
    if offset_shift(ID).is_some() {
        add_minima::<ID, G>(factors, x, &mut a);
    }
    a
}

/// Integers of the rows of a panel and the tokens of tiles.
pub(super) type Integers<const G: usize> = [[__m512i; TILE]; G];

/// Adds the products of the 32 columns `s`, times their scales.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
pub(super) fn add_group<const ID: u32, const G: usize>(
    q: &[impl Bytes64; 8],
    factors: &Factors,
    x: [&SuperTile; G],
    s: usize,
    a: &mut Integers<G>,
) {
    if ID == INT4 {
        for c in 0..8 {
            add_columns(&q[c], x, (s, c), a);
        }
        return;
    }
    let columns = if groups_of_32(ID) { 8 } else { 4 };
    for part in 0..8 / columns {
        let mut products = [[_mm512_setzero_si512(); TILE]; G];
        for c in part * columns..(part + 1) * columns {
            add_columns(&q[c], x, (s, c), &mut products);
        }
        let scales = load(&factors.scales[s * 8 / columns + part]);
        for g in 0..G {
            for t in 0..TILE {
                let scaled = _mm512_mullo_epi32(products[g][t], scales);
                a[g][t] = _mm512_add_epi32(a[g][t], scaled);
            }
        }
    }
}

/// Adds the integers `a` of a block, times its factors, to `sums`.
#[target_feature(enable = "avx512f,avx512vnni")]
#[inline]
pub(super) fn scale<const ID: u32, const G: usize>(
    a: Integers<G>,
    factors: &Factors,
    x: [&SuperTile; G],
    sums: &mut Sums<G>,
) {
    let mut b = [[_mm512_setzero_si512(); TILE]; G];
    if has_minimum(ID) {
        add_minima::<ID, G>(factors, x, &mut b);
    }
    let (d, dmin) = (load_f32(&factors.d), load_f32(&factors.dmin));
    for g in 0..G {
        for t in 0..TILE {
            let scale = _mm512_set1_ps(x[g].scales[t]);
            let mut sum = sums[g][t];
            let factor = _mm512_mul_ps(d, scale);
            sum = _mm512_fmadd_ps(factor, _mm512_cvtepi32_ps(a[g][t]), sum);
            if has_minimum(ID) {
                let factor = _mm512_mul_ps(dmin, scale);
                sum = _mm512_fnmadd_ps(factor, _mm512_cvtepi32_ps(b[g][t]), sum);
            }
            sums[g][t] = sum;
        }
    }
}

/// Adds the products of columns `c` of the 32 columns `s`.
#[target_feature(enable = "avx512f,avx512vnni")]
#[inline]
fn add_columns<const G: usize>(
    q: &impl Bytes64,
    x: [&SuperTile; G],
    (s, c): (usize, usize),
    sums: &mut Integers<G>,
) {
    let q = load(q);
    for g in 0..G {
        for t in 0..TILE {
            let x = _mm512_set1_epi32(x[g].values[s][c][t]);
            sums[g][t] = _mm512_dpbusd_epi32(sums[g][t], q, x);
        }
    }
}

/// Adds the products of minima and the sums of activations that they belong to.
#[target_feature(enable = "avx512f,avx512vnni")]
#[inline]
fn add_minima<const ID: u32, const G: usize>(
    factors: &Factors,
    x: [&SuperTile; G],
    sums: &mut Integers<G>,
) {
    let pairs = if groups_of_32(ID) { 4 } else { 8 };
    for pair in 0..pairs {
        let minima = load(&factors.minima[pair]);
        for g in 0..G {
            for t in 0..TILE {
                let x = if groups_of_32(ID) {
                    x[g].sums_32[pair][t]
                } else {
                    x[g].sums_16[pair][t]
                };
                sums[g][t] = _mm512_dpwssd_epi32(sums[g][t], minima, _mm512_set1_epi32(x));
            }
        }
    }
}

/// Slices of `len` elements, so that loops need no check.
#[inline(always)]
pub(super) fn of_one_length<T, const G: usize>(x: [&[T]; G], len: usize) -> [&[T]; G] {
    x.map(|x| &x[..len])
}

/// Adds `partial` sums to `sums`.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn add_lanes<const G: usize>(partial: &Sums<G>, sums: &mut [Lanes]) {
    for (sums, partial) in sums.iter_mut().zip(partial) {
        for t in 0..TILE {
            let sum = _mm512_add_ps(load_f32(&sums.0[t]), partial[t]);
            store_f32(sum, &mut sums.0[t]);
        }
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn load_lanes<const G: usize>(lanes: &[Lanes; G]) -> Sums<G> {
    let mut sums = [[_mm512_setzero_ps(); TILE]; G];
    for g in 0..G {
        for t in 0..TILE {
            sums[g][t] = load_f32(&lanes[g].0[t]);
        }
    }
    sums
}

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn store_lanes<const G: usize>(sums: Sums<G>, lanes: &mut [Lanes; G]) {
    for g in 0..G {
        for t in 0..TILE {
            store_f32(sums[g][t], &mut lanes[g].0[t]);
        }
    }
}
