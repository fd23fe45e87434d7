//! Products of weights that are signed bytes with many tokens.
//!
//! Otherwise as [`gemm`](super::gemm). A product of two bytes leaves no room in sixteen bits to add
//! another one, so that it has to be widened at once; one instruction multiplies pairs of sixteen
//! bits and adds them in 32.

#![expect(
    clippy::needless_range_loop,
    reason = "one index into several arrays; closures in iterators would lose the target features"
)]

use std::arch::x86_64::*;

use super::blocks::{columns, eight_factors};
use super::gemm::{Ahead, NO_LANES, add, bring_home, panels};
use super::layouts::{LANES, Layouts, TILE, WideTile, class_len, few_tiles};
use super::micro::{self, Lanes, Pairs};
use super::panel::{PANEL_ROWS, PanelRows};
use super::vector::{load_f32, store_f32, store_i16};
use crate::MatrixRef;
use crate::activations::Quantized;

/// Blocks of 32 that are unpacked at once: 16 KiB.
const AT_ONCE: usize = 16;

/// One block of 32 of sixteen rows.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
struct Panel {
    q: [Pairs; 16],
    d: [[f32; 8]; 2],
}

const EMPTY_PANEL: Panel = Panel {
    q: [[[0; 16]; 2]; 16],
    d: [[0.0; 8]; 2],
};

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
        wide_tiles,
        EMPTY_PANEL,
        AT_ONCE,
        LANES,
        unpack::<ID, BYTES>,
        multiply,
    );
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn unpack<const ID: u32, const BYTES: usize>(
    blocks: [&[u8; BYTES]; 8],
    half: usize,
    panel: &mut Panel,
) {
    let q = columns::<ID, BYTES>(blocks);
    for i in 0..8 {
        let [even, odd] = widened(q[i]);
        panel.q[2 * i][half] = store_i16(even);
        panel.q[2 * i + 1][half] = store_i16(odd);
    }
    let (d, _) = eight_factors::<ID, BYTES>(blocks);
    panel.d[half] = store_f32(d);
}

/// Signed bytes in sixteen bits: those at even places, and those at odd ones.
#[target_feature(enable = "avx2")]
#[inline]
fn widened(bytes: __m256i) -> [__m256i; 2] {
    [
        _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(bytes)),
        _mm256_srai_epi16::<8>(bytes),
    ]
}

#[target_feature(enable = "avx2,fma,f16c")]
fn multiply(w: &[Panel], x: &[WideTile], lanes: &mut Lanes) {
    let x = &x[..w.len()];
    for i in 0..w.len() {
        let (w, x) = (&w[i], &x[i]);
        let a = micro::wide(&w.q, &x.values);
        for t in 0..TILE {
            let scale = _mm256_set1_ps(x.scales[t]);
            for half in 0..2 {
                let d = _mm256_mul_ps(load_f32(&w.d[half]), scale);
                let a = _mm256_cvtepi32_ps(a[t][half]);
                let sum = _mm256_fmadd_ps(d, a, load_f32(&lanes.0[t][half]));
                lanes.0[t][half] = store_f32(sum);
            }
        }
    }
}
