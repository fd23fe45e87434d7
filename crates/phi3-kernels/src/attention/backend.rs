//! What attention asks of a backend.

use crate::dispatch::Backend;
use crate::scalar::attention as scalar;

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
}

/// Operations on rows of `d` elements, a multiple of 8. An element of an output is computed by
/// the same operations in the same order whatever else the call computes.
impl Backend {
    /// `out[r * stride + j] = q[r] · keys[j]` for the rows r of `q` and j of `keys`.
    pub(super) fn scores(
        self,
        q: &[f32],
        keys: Rows<'_>,
        d: usize,
        out: &mut [f32],
        stride: usize,
    ) {
        match self {
            Backend::Scalar => scalar::scores(q, keys, d, out, stride),
            #[cfg(target_arch = "x86_64")]
            Backend::Avx2(avx2) => avx2.scores(q, keys, d, out, stride),
            #[cfg(target_arch = "aarch64")]
            Backend::Neon(neon) => neon.scores(q, keys, d, out, stride),
        }
    }

    /// Replaces scores, a multiple of 8 in number, by `exp(score - max)`; returns the largest
    /// score and the sum of the exponentials. Scores of -inf give 0, also when all are; the
    /// largest is then -inf and the sum 0. NaN gives a sum that is NaN.
    pub(super) fn exponentials(self, scores: &mut [f32]) -> (f32, f32) {
        match self {
            Backend::Scalar => scalar::exponentials(scores),
            #[cfg(target_arch = "x86_64")]
            Backend::Avx2(avx2) => avx2.exponentials(scores),
            #[cfg(target_arch = "aarch64")]
            Backend::Neon(neon) => neon.exponentials(scores),
        }
    }

    /// `acc[r] += sum_j weights[r * stride + j] * values[j]` for the rows r of `acc`, `[rows, d]`,
    /// and j of `values`, in the order of j.
    pub(super) fn weighted_sum(
        self,
        weights: &[f32],
        stride: usize,
        values: Rows<'_>,
        d: usize,
        acc: &mut [f32],
    ) {
        match self {
            Backend::Scalar => scalar::weighted_sum(weights, stride, values, d, acc),
            #[cfg(target_arch = "x86_64")]
            Backend::Avx2(avx2) => avx2.weighted_sum(weights, stride, values, d, acc),
            #[cfg(target_arch = "aarch64")]
            Backend::Neon(neon) => neon.weighted_sum(weights, stride, values, d, acc),
        }
    }

    /// A hint that `rows`, some few, are read next. A backend without one does nothing.
    pub(super) fn prefetch(self, rows: Rows<'_>) {
        #[cfg(target_arch = "x86_64")]
        if let Backend::Avx2(avx2) = self {
            avx2.prefetch(rows);
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = rows;
    }

    /// Half precision to f32, exactly; slices of the same length.
    pub(crate) fn widen(self, halves: &[u16], out: &mut [f32]) {
        match self {
            Backend::Scalar => scalar::widen(halves, out),
            #[cfg(target_arch = "x86_64")]
            Backend::Avx2(avx2) => avx2.widen(halves, out),
            #[cfg(target_arch = "aarch64")]
            Backend::Neon(neon) => neon.widen(halves, out),
        }
    }

    /// f32 to half precision, rounded to nearest even, finite values kept finite; slices of the
    /// same length.
    pub(crate) fn narrow(self, values: &[f32], out: &mut [u16]) {
        match self {
            Backend::Scalar => scalar::narrow(values, out),
            #[cfg(target_arch = "x86_64")]
            Backend::Avx2(avx2) => avx2.narrow(values, out),
            #[cfg(target_arch = "aarch64")]
            Backend::Neon(neon) => neon.narrow(values, out),
        }
    }
}
