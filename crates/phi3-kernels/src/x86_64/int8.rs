//! Which product of quantized weights is taken.

use super::{blocks, gemm, gemv, wide};
use crate::activations::Quantized;
use crate::{BlockType, MatrixRef, scalar};

/// [`scalar::int8_rows`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn int8_rows(x: &Quantized, w: MatrixRef<'_>, first_row: usize, out: &mut [&mut [f32]]) {
    macro_rules! rows {
        ($id:ident, $bytes:literal, $gemm:ident::$rows:ident) => {
            if x.n <= gemv::max_tokens(blocks::$id) {
                gemv::$rows::<{ blocks::$id }, $bytes>(x, w, first_row, out)
            } else {
                $gemm::$rows::<{ blocks::$id }, $bytes>(x, w, first_row, out)
            }
        };
    }
    match w.block_type() {
        BlockType::F32 | BlockType::F16 | BlockType::BF16 => {
            scalar::int8_rows(x, w, first_row, out);
        }
        BlockType::Q4_0 => rows!(Q4_0, 18, gemm::rows),
        BlockType::Q4_1 => rows!(Q4_1, 20, gemm::rows),
        BlockType::Q5_0 => rows!(Q5_0, 22, gemm::rows),
        BlockType::Q5_1 => rows!(Q5_1, 24, gemm::rows),
        BlockType::Q8_0 => rows!(Q8_0, 34, wide::rows),
        BlockType::IQ4NL => rows!(IQ4_NL, 18, wide::rows),
        BlockType::Q2K => rows!(Q2_K, 84, gemm::super_rows),
        BlockType::Q3K => rows!(Q3_K, 110, gemm::super_rows),
        BlockType::Q4K => rows!(Q4_K, 144, gemm::super_rows),
        BlockType::Q5K => rows!(Q5_K, 176, gemm::super_rows),
        BlockType::Int4 => rows!(INT4, 130, gemm::super_rows),
        BlockType::Q6K => rows!(Q6_K, 210, gemm::super_rows),
    }
}
