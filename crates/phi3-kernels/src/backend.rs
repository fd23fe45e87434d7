//! What a backend is: the operations that it may do better than the one it builds on.

use std::fmt::Debug;

use crate::activations::Quantized;
use crate::{BlockType, MatrixRef};

/// Keys or values of one head, `[n, d]`, contiguous.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Rows<'a> {
    F32(&'a [f32]),
    F16(&'a [u16]),
}

impl<'a> Rows<'a> {
    /// The rows `start..end` of width `d`.
    pub(crate) fn part(self, start: usize, end: usize, d: usize) -> Self {
        match self {
            Self::F32(rows) => Self::F32(&rows[start * d..end * d]),
            Self::F16(rows) => Self::F16(&rows[start * d..end * d]),
        }
    }

    /// How many rows of width `d` these are.
    pub(crate) fn count(self, d: usize) -> usize {
        match self {
            Self::F32(rows) => rows.len() / d,
            Self::F16(rows) => rows.len() / d,
        }
    }
}

/// Rows that follow one another but lie in several places, of one type: each part with the number
/// of rows before it.
pub(crate) fn numbered<'a>(
    parts: &[Rows<'a>],
    d: usize,
) -> impl Iterator<Item = (usize, Rows<'a>)> {
    parts.iter().scan(0, move |next, part| {
        let first = *next;
        *next += part.count(d);
        Some((first, *part))
    })
}

/// Tokens of f32 that a matrix multiplies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tokens<'a> {
    /// `[n, cols]`.
    pub(crate) values: &'a [f32],
    /// The same once more in blocks of [`Kernels::column_block`] columns, `[blocks, n, block]`, the
    /// last block's tokens filled up with zeros.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(dead_code, reason = "no other backend asks for them")
    )]
    pub(crate) blocks: Option<&'a [f32]>,
}

/// The operations of a backend: the part of each that one thread does. A backend gives its name,
/// the backend that it builds on, and those operations that it does better than that one;
/// [`scalar`](crate::scalar) builds on nothing and gives them all.
///
/// Implementations are tokens: a value exists only where its instructions were detected, so that
/// having one is the proof which its unsafe code needs.
///
/// All compute what scalar computes: products with eight-bit activations and quantization to the
/// last bit, the rest within f32 rounding. An element of an output is computed by the same
/// operations in the same order whatever else the call computes; products with f32 activations may
/// have another order for many tokens than for few. Entry points have checked the
/// lengths.
pub(crate) trait Kernels: Debug + Send + Sync {
    /// As `PHI3_KERNELS` takes it.
    fn name(&self) -> &'static str;

    /// Does what this backend does not do itself.
    fn base(&self) -> &dyn Kernels;

    /// How many columns of `n` tokens [`matmul_rows`](Self::matmul_rows) wants together in memory
    /// ([`Tokens::blocks`]) for weights of a type, if any.
    fn column_block(&self, n: usize, block_type: BlockType) -> Option<usize> {
        self.base().column_block(n, block_type)
    }

    /// `out[t][i] = x[t] · w[first_row + i]` with sums in f32.
    fn matmul_rows(
        &self,
        x: &Tokens<'_>,
        w: MatrixRef<'_>,
        first_row: usize,
        out: &mut [&mut [f32]],
    ) {
        self.base().matmul_rows(x, w, first_row, out);
    }

    /// `x * sigmoid(1.702 x)` of each element.
    fn quick_gelu(&self, x: &mut [f32]) {
        self.base().quick_gelu(x);
    }

    /// `up * silu(gate)` of each pair of elements.
    fn silu_mul(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        self.base().silu_mul(gate, up, out);
    }

    /// `a * sigmoid(1.702 a) * (b + 1)` of pairs that lie side by side, within `limit`
    /// ([`gegelu`](crate::gegelu)).
    fn gegelu(&self, up: &[f32], limit: f32, out: &mut [f32]) {
        self.base().gegelu(up, limit, out);
    }

    /// Rounds groups of `group` activations to eight bits: [`scalar::quantize`](crate::scalar).
    fn quantize(
        &self,
        x: &[f32],
        group: usize,
        values: &mut [i8],
        scales: &mut [f32],
        sums: &mut [i16],
    ) {
        self.base().quantize(x, group, values, scales, sums);
    }

    /// `out[t][i] = x[t] · w[first_row + i]` for quantized weights.
    fn int8_rows(&self, x: &Quantized, w: MatrixRef<'_>, first_row: usize, out: &mut [&mut [f32]]) {
        self.base().int8_rows(x, w, first_row, out);
    }

    /// Makes what all calls of [`int8_rows`](Self::int8_rows) for `x` and matrices of this type read, if
    /// that is not made yet: outside of tasks, where all threads take part.
    fn prepare(&self, x: &Quantized, w: MatrixRef<'_>) {
        let mut no_rows: Vec<&mut [f32]> = Vec::new();
        no_rows.resize_with(x.n, Default::default);
        self.int8_rows(x, w, 0, &mut no_rows);
    }

    /// `out[r * stride + j] = q[r] · keys[j]` for the rows r of `q` and j of `keys`. Rows here and
    /// in [`weighted_sum`](Self::weighted_sum) have `d` elements, a multiple of 8; keys and values
    /// come in [parts](numbered).
    fn scores(&self, q: &[f32], keys: &[Rows<'_>], d: usize, out: &mut [f32], stride: usize) {
        self.base().scores(q, keys, d, out, stride);
    }

    /// Replaces scores, a multiple of 8 in number, by `exp(score - max)`; returns the largest
    /// score and the sum of the exponentials. Scores of -inf give 0, also when all are; the
    /// largest is then -inf and the sum 0. NaN gives a sum that is NaN.
    fn exponentials(&self, scores: &mut [f32]) -> (f32, f32) {
        self.base().exponentials(scores)
    }

    /// `acc[r] += sum_j weights[r * stride + j] * values[j]` for the rows r of `acc`, `[rows, d]`,
    /// and j of `values`, in the order of j.
    fn weighted_sum(
        &self,
        weights: &[f32],
        stride: usize,
        values: &[Rows<'_>],
        d: usize,
        acc: &mut [f32],
    ) {
        self.base().weighted_sum(weights, stride, values, d, acc);
    }

    /// A hint that `rows`, some few, are read next.
    fn prefetch(&self, rows: Rows<'_>) {
        self.base().prefetch(rows);
    }

    /// Half precision to f32, exactly; slices of the same length.
    fn widen(&self, halves: &[u16], out: &mut [f32]) {
        self.base().widen(halves, out);
    }

    /// A row of [`crate::f32_to_q8_0`] to f32: each number times its group's scale.
    fn widen_q8_0(&self, row: &[u8], out: &mut [f32]) {
        self.base().widen_q8_0(row, out);
    }

    /// f32 to half precision, rounded to nearest even, finite values kept finite; slices of the
    /// same length.
    fn narrow(&self, values: &[f32], out: &mut [u16]) {
        self.base().narrow(values, out);
    }
}
