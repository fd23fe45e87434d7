//! Blocks of 32 quantized weights with f32 activations, which narrow models keep: decoded where they
//! are already turned, a row to a lane.

use std::arch::x86_64::*;
use std::ops::Range;

use super::blocks::{self, columns, eight_factors, has_minimum, is_signed, offset_shift};
use super::panel::PanelRows;
use super::tile::Lanes;
use super::vector::store_f32;
use crate::{BlockType, MatrixRef};

/// Calls `$f::<ID, BYTES>` for a type with blocks of 32; `None` for the others.
macro_rules! with_blocks_of_32 {
    ($w:ident, $f:ident, $($arg:expr),* $(,)?) => {
        match $w.block_type() {
            BlockType::Q4_0 => Some($f::<{ blocks::Q4_0 }, 18>($w, $($arg),*)),
            BlockType::Q4_1 => Some($f::<{ blocks::Q4_1 }, 20>($w, $($arg),*)),
            BlockType::Q5_0 => Some($f::<{ blocks::Q5_0 }, 22>($w, $($arg),*)),
            BlockType::Q5_1 => Some($f::<{ blocks::Q5_1 }, 24>($w, $($arg),*)),
            BlockType::Q8_0 => Some($f::<{ blocks::Q8_0 }, 34>($w, $($arg),*)),
            BlockType::IQ4NL => Some($f::<{ blocks::IQ4_NL }, 18>($w, $($arg),*)),
            _ => None,
        }
    };
}

/// Whether a type has blocks of 32.
pub(super) fn covers(block_type: BlockType) -> bool {
    block_type.block_len() == 32
}

/// Decodes columns `cols` of `rows` rows from row `first` on to `panel`, `[column][row]`; behind the last
/// row comes the last row again. `None`, and nothing done, for types without blocks of 32.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn turn(
    w: MatrixRef<'_>,
    first: usize,
    rows: usize,
    cols: Range<usize>,
    panel: &mut [Lanes],
) -> Option<()> {
    with_blocks_of_32!(w, turn_blocks, first, rows, cols, panel)
}

/// The sums of columns `cols` of up to sixteen rows from row `first` on, times `x`, one column after
/// another. `None` for types without blocks of 32.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn one_token(
    w: MatrixRef<'_>,
    first: usize,
    rows: usize,
    cols: Range<usize>,
    x: &[f32],
) -> Option<[__m256; 2]> {
    with_blocks_of_32!(w, one_token_blocks, first, rows, cols, x)
}

#[target_feature(enable = "avx2,fma,f16c")]
fn turn_blocks<const ID: u32, const BYTES: usize>(
    w: MatrixRef<'_>,
    first: usize,
    rows: usize,
    cols: Range<usize>,
    panel: &mut [Lanes],
) {
    let rows = PanelRows::<BYTES>::new(w, first, rows);
    let panel = panel.as_chunks_mut::<32>().0;
    for (block, panel) in (cols.start / 32..cols.end / 32).zip(panel) {
        for half in 0..2 {
            let weights = Eight::new::<ID, BYTES>(&rows, half, block);
            for i in 0..8 {
                for k in 0..4 {
                    panel[4 * i + k].0[half] = store_f32(weights.column::<ID>(i, k));
                }
            }
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn one_token_blocks<const ID: u32, const BYTES: usize>(
    w: MatrixRef<'_>,
    first: usize,
    rows: usize,
    cols: Range<usize>,
    x: &[f32],
) -> [__m256; 2] {
    let rows = PanelRows::<BYTES>::new(w, first, rows);
    let x = x.as_chunks::<32>().0;
    let mut sums = [_mm256_setzero_ps(); 2];
    for (block, x) in (cols.start / 32..cols.end / 32).zip(x) {
        let weights = [
            Eight::new::<ID, BYTES>(&rows, 0, block),
            Eight::new::<ID, BYTES>(&rows, 1, block),
        ];
        for i in 0..8 {
            for k in 0..4 {
                let x = _mm256_set1_ps(x[4 * i + k]);
                for half in 0..2 {
                    let weights = weights[half].column::<ID>(i, k);
                    sums[half] = _mm256_fmadd_ps(weights, x, sums[half]);
                }
            }
        }
    }
    sums
}

/// A block of eight rows.
struct Eight {
    /// Four columns to a vector.
    q: [__m256i; 8],
    d: __m256,
    m: __m256,
}

impl Eight {
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn new<const ID: u32, const BYTES: usize>(
        rows: &PanelRows<'_, BYTES>,
        half: usize,
        block: usize,
    ) -> Self {
        let blocks = rows.eight(half, block);
        let (d, m) = eight_factors::<ID, BYTES>(blocks);
        let q = columns::<ID, BYTES>(blocks);
        Self { q, d, m }
    }

    /// Column `4 * i + k`, decoded as [`scalar::decode`](crate::scalar::decode) does, to the bit.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn column<const ID: u32>(&self, i: usize, k: usize) -> __m256 {
        let left = _mm_cvtsi32_si128(24 - 8 * k as i32);
        let q = _mm256_sll_epi32(self.q[i], left);
        let q = match (is_signed(ID), offset_shift(ID)) {
            (true, _) => _mm256_srai_epi32::<24>(q),
            (false, None) => _mm256_srli_epi32::<24>(q),
            (false, Some(shift)) => {
                _mm256_sub_epi32(_mm256_srli_epi32::<24>(q), _mm256_set1_epi32(1 << shift))
            }
        };
        let scaled = _mm256_mul_ps(self.d, _mm256_cvtepi32_ps(q));
        match has_minimum(ID) {
            true => _mm256_add_ps(scaled, self.m),
            false => scaled,
        }
    }
}
