//! Blocks of sixteen rows, unpacked to bytes with a row to a lane.

#![expect(
    clippy::needless_range_loop,
    reason = "one index into several arrays; closures in iterators would lose the target features"
)]

use std::arch::x86_64::*;

use super::blocks::{
    columns, eight_factors, factors, has_minimum, offset_shift, spread, stored, stored_at,
};
use super::micro::Scales;
use super::vector::{load, store, store_f32, store_i16, transpose};
use crate::MatrixRef;

/// Rows of a panel, in two vectors.
pub(super) const PANEL_ROWS: usize = 16;

/// Copies a token's sums with the rows of a panel to the elements of its output from `start` on, as many
/// as there are.
#[inline(always)]
pub(super) fn put_rows(sums: &[f32], start: usize, out: &mut [f32]) {
    let out = &mut out[start..];
    match (out.first_chunk_mut::<PANEL_ROWS>(), sums.first_chunk()) {
        (Some(out), Some(sums)) => *out = *sums,
        _ => out.copy_from_slice(&sums[..out.len()]),
    }
}

/// One block of 32 of sixteen rows, eight rows to a vector.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub(super) struct Panel {
    pub(super) q: [[[u8; 32]; 2]; 8],
    pub(super) d: [[f32; 8]; 2],
    pub(super) m: [[f32; 8]; 2],
}

pub(super) const EMPTY_PANEL: Panel = Panel {
    q: [[[0; 32]; 2]; 8],
    d: [[0.0; 8]; 2],
    m: [[0.0; 8]; 2],
};

/// One block of 256 of sixteen rows.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub(super) struct SuperPanel {
    pub(super) q: [[[[u8; 32]; 2]; 8]; 8],
    /// The scale of each group of sixteen, twice for each row.
    pub(super) scales: [Scales; 16],
    /// What the sums of activations are multiplied with, two successive groups for each row.
    pub(super) minima: [Scales; 8],
    pub(super) d: [[f32; 8]; 2],
    pub(super) dmin: [[f32; 8]; 2],
}

pub(super) const EMPTY_SUPER_PANEL: SuperPanel = SuperPanel {
    q: [[[[0; 32]; 2]; 8]; 8],
    scales: [[[0; 16]; 2]; 16],
    minima: [[[0; 16]; 2]; 8],
    d: [[0.0; 8]; 2],
    dmin: [[0.0; 8]; 2],
};

/// The blocks of the rows of a panel.
pub(super) struct PanelRows<'a, const BYTES: usize> {
    rows: [&'a [[u8; BYTES]]; PANEL_ROWS],
    blocks: usize,
}

impl<'a, const BYTES: usize> PanelRows<'a, BYTES> {
    /// `rows` rows from row `first` on; the last one again where there are fewer than sixteen.
    pub(super) fn new(w: MatrixRef<'a>, first: usize, rows: usize) -> Self {
        let rows = std::array::from_fn(|i| w.row(first + i.min(rows - 1)).as_chunks().0);
        let blocks = rows.iter().map(|row| row.len()).min().unwrap_or(0);
        Self { rows, blocks }
    }

    /// Block `block` of the eight rows of a half.
    #[inline(always)]
    pub(super) fn eight(&self, half: usize, block: usize) -> [&'a [u8; BYTES]; 8] {
        assert!(half < 2, "a half of the rows");
        self.some(8 * half, block)
    }

    /// Block `block` of all rows.
    #[inline(always)]
    pub(super) fn sixteen(&self, block: usize) -> [&'a [u8; BYTES]; PANEL_ROWS] {
        self.some(0, block)
    }

    /// Block `block` of `N` rows from row `first` of the panel on.
    #[inline(always)]
    fn some<const N: usize>(&self, first: usize, block: usize) -> [&'a [u8; BYTES]; N] {
        assert!(block < self.blocks, "a block of the rows");
        std::array::from_fn(|i| {
            let row = self.rows[first + i];
            // SAFETY: no row has fewer than `blocks` blocks, and `block` was checked above: once
            // for all rows, because a check for each takes as long as unpacking.
            unsafe { row.get_unchecked(block) }
        })
    }
}

/// Blocks of the rows of a half.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn unpack<const ID: u32, const BYTES: usize>(
    blocks: [&[u8; BYTES]; 8],
    half: usize,
    panel: &mut Panel,
) {
    let q = columns::<ID, BYTES>(blocks);
    for i in 0..8 {
        panel.q[i][half] = store(q[i]);
    }
    let (d, m) = eight_factors::<ID, BYTES>(blocks);
    panel.d[half] = store_f32(d);
    if has_minimum(ID) {
        panel.m[half] = store_f32(m);
    }
}

/// Whether a scale and a minimum hold for 32 weights rather than sixteen.
pub(super) const fn groups_of_32(id: u32) -> bool {
    matches!(
        id,
        super::blocks::Q4_K | super::blocks::Q5_K | super::blocks::INT4
    )
}

/// [`unpack`] for blocks of 256.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn unpack_super<const ID: u32, const BYTES: usize>(
    blocks: [&[u8; BYTES]; 8],
    half: usize,
    panel: &mut SuperPanel,
) {
    // Turned as they are stored, which are fewer vectors.
    let mut columns = [[_mm256_setzero_si256(); 6]; 8];
    for s in 0..stored_at(ID).len() {
        let mut of_rows = [_mm256_setzero_si256(); 8];
        for i in 0..8 {
            of_rows[i] = stored::<ID, BYTES>(blocks[i], s);
        }
        let of_rows = transpose(of_rows);
        for c in 0..8 {
            columns[c][s] = of_rows[c];
        }
    }
    for c in 0..8 {
        let q = spread::<ID>(&columns[c]);
        for g in 0..8 {
            panel.q[g][c][half] = store(q[g]);
        }
    }
    unpack_factors::<ID, BYTES>(blocks, half, panel);
    let (d, dmin) = eight_factors::<ID, BYTES>(blocks);
    panel.d[half] = store_f32(d);
    if has_minimum(ID) {
        panel.dmin[half] = store_f32(dmin);
    }
}

/// The scales and minima of eight rows.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn unpack_factors<const ID: u32, const BYTES: usize>(
    blocks: [&[u8; BYTES]; 8],
    half: usize,
    panel: &mut SuperPanel,
) {
    let mut scales = [_mm256_setzero_si256(); 8];
    let mut minima = [_mm256_setzero_si256(); 8];
    for i in 0..8 {
        (scales[i], minima[i]) = factors::<ID, BYTES>(blocks[i]);
        if groups_of_32(ID) {
            // Eight of each, which are together in one vector what sixteen are.
            minima[i] = offsets::<ID>(scales[i], minima[i]);
            scales[i] = _mm256_blend_epi32::<0xf0>(scales[i], minima[i]);
        } else {
            scales[i] = in_turn(scales[i]);
            minima[i] = in_turn(minima[i]);
        }
    }
    // Two successive ones of each row.
    let scales = transpose(scales);
    let minima = if groups_of_32(ID) || !has_minimum(ID) {
        scales
    } else {
        transpose(minima)
    };
    for k in 0..8 {
        let first = store_i16(_mm256_shuffle_epi8(scales[k], load(&twice(0))));
        let second = store_i16(_mm256_shuffle_epi8(scales[k], load(&twice(2))));
        if !groups_of_32(ID) {
            panel.scales[2 * k][half] = first;
            panel.scales[2 * k + 1][half] = second;
            panel.minima[k][half] = store_i16(offsets::<ID>(scales[k], minima[k]));
        } else if k < 4 {
            for same in 0..2 {
                panel.scales[4 * k + same][half] = first;
                panel.scales[4 * k + 2 + same][half] = second;
            }
            panel.minima[k][half] = store_i16(scales[k + 4]);
        }
    }
}

/// Where a shuffle finds the two bytes from byte `at` of each lane on, twice.
const fn twice(at: u8) -> [u8; 32] {
    let mut from = [0; 32];
    let mut i = 0;
    while i < 32 {
        from[i] = i as u8 % 16 / 4 * 4 + at + i as u8 % 2;
        i += 1;
    }
    from
}

/// What the sums of activations are multiplied with: minima, or scales times the offset of the bytes.
#[target_feature(enable = "avx2")]
#[inline]
fn offsets<const ID: u32>(scales: __m256i, minima: __m256i) -> __m256i {
    match offset_shift(ID) {
        Some(shift) => _mm256_sll_epi16(scales, _mm_cvtsi32_si128(shift)),
        None => minima,
    }
}

/// Sixteen i16, of which the even ones lie in the lower half and the odd ones in the upper, in order.
#[target_feature(enable = "avx2")]
#[inline]
fn in_turn(evens_then_odds: __m256i) -> __m256i {
    let evens = _mm256_castsi256_si128(evens_then_odds);
    let odds = _mm256_extracti128_si256::<1>(evens_then_odds);
    _mm256_set_m128i(
        _mm_unpackhi_epi16(evens, odds),
        _mm_unpacklo_epi16(evens, odds),
    )
}
