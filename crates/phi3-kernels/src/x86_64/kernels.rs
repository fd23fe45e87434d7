//! What the backends for x86-64 give.

use super::avx512::{self, TwelveRows};
use super::float::{self, BLOCK};
use super::{Avx2, Avx512Vnni, AvxVnni, attention, dots, vnni};
use crate::activations::Quantized;
use crate::backend::{Kernels, Rows, Tokens};
use crate::scalar::Scalar;
use crate::{BlockType, MatrixRef};

impl Kernels for Avx2 {
    fn name(&self) -> &'static str {
        "avx2"
    }

    fn base(&self) -> &dyn Kernels {
        &Scalar
    }

    fn column_block(&self, n: usize, block_type: BlockType) -> Option<usize> {
        (n > 1 || dots::covers(n, block_type)).then_some(BLOCK)
    }

    fn matmul_rows(
        &self,
        x: &Tokens<'_>,
        w: MatrixRef<'_>,
        first_row: usize,
        out: &mut [&mut [f32]],
    ) {
        Avx2::matmul_rows(*self, x, w, first_row, out);
    }

    fn quick_gelu(&self, x: &mut [f32]) {
        Avx2::quick_gelu(*self, x);
    }

    fn silu_mul(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        Avx2::silu_mul(*self, gate, up, out);
    }

    fn gegelu(&self, up: &[f32], limit: f32, out: &mut [f32]) {
        Avx2::gegelu(*self, up, limit, out);
    }

    fn quantize(
        &self,
        x: &[f32],
        group: usize,
        values: &mut [i8],
        scales: &mut [f32],
        sums: &mut [i16],
    ) {
        Avx2::quantize(*self, x, group, values, scales, sums);
    }

    fn int8_rows(&self, x: &Quantized, w: MatrixRef<'_>, first_row: usize, out: &mut [&mut [f32]]) {
        Avx2::int8_rows(*self, x, w, first_row, out);
    }

    fn scores(&self, q: &[f32], keys: &[Rows<'_>], d: usize, out: &mut [f32], stride: usize) {
        Avx2::scores(*self, q, keys, d, out, stride);
    }

    fn exponentials(&self, scores: &mut [f32]) -> (f32, f32) {
        Avx2::exponentials(*self, scores)
    }

    fn weighted_sum(
        &self,
        weights: &[f32],
        stride: usize,
        values: &[Rows<'_>],
        d: usize,
        acc: &mut [f32],
    ) {
        Avx2::weighted_sum(*self, weights, stride, values, d, acc);
    }

    fn prefetch(&self, rows: Rows<'_>) {
        Avx2::prefetch(*self, rows);
    }

    fn widen(&self, halves: &[u16], out: &mut [f32]) {
        Avx2::widen(*self, halves, out);
    }

    fn widen_q8_0(&self, row: &[u8], out: &mut [f32]) {
        Avx2::widen_q8_0(*self, row, out);
    }

    fn narrow(&self, values: &[f32], out: &mut [u16]) {
        Avx2::narrow(*self, values, out);
    }
}

/// AVX2, and products with many tokens by VNNI.
impl Kernels for AvxVnni {
    fn name(&self) -> &'static str {
        "avx-vnni"
    }

    fn base(&self) -> &dyn Kernels {
        &self.avx2
    }

    fn int8_rows(&self, x: &Quantized, w: MatrixRef<'_>, first_row: usize, out: &mut [&mut [f32]]) {
        if x.n <= vnni::AVX2_TOKENS {
            self.avx2.int8_rows(x, w, first_row, out);
        } else {
            vnni::int8_rows(*self, x, w, first_row, out);
        }
    }
}

/// AVX2, and what vectors of 512 bits make faster.
impl Kernels for Avx512Vnni {
    fn name(&self) -> &'static str {
        "avx512-vnni"
    }

    fn base(&self) -> &dyn Kernels {
        &self.avx2
    }

    fn matmul_rows(
        &self,
        x: &Tokens<'_>,
        w: MatrixRef<'_>,
        first_row: usize,
        out: &mut [&mut [f32]],
    ) {
        // SAFETY: `self` exists only where `new` detected the features.
        unsafe {
            if dots::covers(out.len(), w.block_type()) {
                dots::avx512_rows(x, w, first_row, out);
            } else {
                float::matmul_rows::<TwelveRows>(x, w, first_row, out);
            }
        }
    }

    fn int8_rows(&self, x: &Quantized, w: MatrixRef<'_>, first_row: usize, out: &mut [&mut [f32]]) {
        avx512::int8_rows(*self, x, w, first_row, out);
    }

    fn scores(&self, q: &[f32], keys: &[Rows<'_>], d: usize, out: &mut [f32], stride: usize) {
        // SAFETY: `self` exists only where `new` detected the features.
        unsafe { attention::scores::<TwelveRows>(q, keys, d, out, stride) }
    }

    fn weighted_sum(
        &self,
        weights: &[f32],
        stride: usize,
        values: &[Rows<'_>],
        d: usize,
        acc: &mut [f32],
    ) {
        // SAFETY: `self` exists only where `new` detected the features.
        unsafe { attention::weighted_sum::<TwelveRows>(weights, stride, values, d, acc) }
    }
}
