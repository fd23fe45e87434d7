//! Backends for 64-bit ARM.

mod i8mm;
mod integers;
mod neon;

pub(crate) use i8mm::I8mm;
pub(crate) use integers::{Dotprod, sdot};
pub(crate) use neon::Neon;

use crate::MatrixRef;
use crate::activations::Quantized;
use crate::backend::{Kernels, Rows, Tokens, numbered};
use crate::scalar::Scalar;
use crate::simd128::{attention, int8, rows};

/// What a backend gives, by the kernels for vectors of 128 bits.
impl Kernels for Neon {
    fn name(&self) -> &'static str {
        "neon"
    }

    fn base(&self) -> &dyn Kernels {
        &Scalar
    }

    fn matmul_rows(
        &self,
        x: &Tokens<'_>,
        w: MatrixRef<'_>,
        first_row: usize,
        out: &mut [&mut [f32]],
    ) {
        rows::matmul_rows(*self, x.values, w, first_row, out);
    }

    fn int8_rows(&self, x: &Quantized, w: MatrixRef<'_>, first_row: usize, out: &mut [&mut [f32]]) {
        int8::int8_rows(*self, *self, x, w, first_row, out);
    }

    fn scores(&self, q: &[f32], keys: &[Rows<'_>], d: usize, out: &mut [f32], stride: usize) {
        for (first, keys) in numbered(keys, d) {
            attention::scores(*self, q, keys, d, &mut out[first..], stride);
        }
    }

    fn exponentials(&self, scores: &mut [f32]) -> (f32, f32) {
        attention::exponentials(*self, scores)
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
            attention::weighted_sum(*self, &weights[first..], stride, values, d, acc);
        }
    }

    fn widen(&self, halves: &[u16], out: &mut [f32]) {
        attention::widen(*self, halves, out);
    }

    fn narrow(&self, values: &[f32], out: &mut [u16]) {
        attention::narrow(*self, values, out);
    }
}

/// NEON, and products of bytes by the dot-product instructions.
impl Kernels for Dotprod {
    fn name(&self) -> &'static str {
        "neon-dotprod"
    }

    fn base(&self) -> &dyn Kernels {
        &self.neon
    }

    fn int8_rows(&self, x: &Quantized, w: MatrixRef<'_>, first_row: usize, out: &mut [&mut [f32]]) {
        Dotprod::int8_rows(*self, x, w, first_row, out);
    }
}

/// NEON, and products of bytes by the matrix products where there are several tokens.
impl Kernels for I8mm {
    fn name(&self) -> &'static str {
        "neon-i8mm"
    }

    fn base(&self) -> &dyn Kernels {
        &self.dotprod
    }

    fn int8_rows(&self, x: &Quantized, w: MatrixRef<'_>, first_row: usize, out: &mut [&mut [f32]]) {
        if x.n == 1 {
            return self.base().int8_rows(x, w, first_row, out);
        }
        I8mm::int8_rows(*self, x, w, first_row, out);
    }
}
