//! The specification as a backend.

use super::attention;
use crate::activations::Quantized;
use crate::backend::{Kernels, Rows, Tokens, numbered};
use crate::{BlockType, MatrixRef};

/// Portable Rust, which every processor runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scalar;

/// Gives every operation, since there is nothing below it.
impl Kernels for Scalar {
    fn name(&self) -> &'static str {
        "scalar"
    }

    fn base(&self) -> &dyn Kernels {
        self
    }

    fn column_block(&self, _: usize, _: BlockType) -> Option<usize> {
        None
    }

    fn matmul_rows(
        &self,
        x: &Tokens<'_>,
        w: MatrixRef<'_>,
        first_row: usize,
        out: &mut [&mut [f32]],
    ) {
        super::matmul_rows(x.values, w, first_row, out);
    }

    fn quick_gelu(&self, x: &mut [f32]) {
        super::quick_gelu(x);
    }

    fn silu_mul(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        super::silu_mul_row(gate, up, out);
    }

    fn gegelu(&self, up: &[f32], limit: f32, out: &mut [f32]) {
        super::gegelu_row(up, limit, out);
    }

    fn quantize(
        &self,
        x: &[f32],
        group: usize,
        values: &mut [i8],
        scales: &mut [f32],
        sums: &mut [i16],
    ) {
        super::quantize(x, group, values, scales, sums);
    }

    fn int8_rows(&self, x: &Quantized, w: MatrixRef<'_>, first_row: usize, out: &mut [&mut [f32]]) {
        super::int8_rows(x, w, first_row, out);
    }

    fn scores(&self, q: &[f32], keys: &[Rows<'_>], d: usize, out: &mut [f32], stride: usize) {
        for (first, keys) in numbered(keys, d) {
            attention::scores(q, keys, d, &mut out[first..], stride);
        }
    }

    fn exponentials(&self, scores: &mut [f32]) -> (f32, f32) {
        attention::exponentials(scores)
    }

    fn weighted_sum(
        &self,
        weights: &[f32],
        stride: usize,
        values: &[Rows<'_>],
        d: usize,
        acc: &mut [f32],
    ) {
        for (first, values) in numbered(values, d) {
            attention::weighted_sum(&weights[first..], stride, values, d, acc);
        }
    }

    fn prefetch(&self, _: Rows<'_>) {}

    fn widen(&self, halves: &[u16], out: &mut [f32]) {
        attention::widen(halves, out);
    }

    fn widen_q8_0(&self, row: &[u8], out: &mut [f32]) {
        attention::widen_q8_0(row, out);
    }

    fn narrow(&self, values: &[f32], out: &mut [u16]) {
        attention::narrow(values, out);
    }
}
