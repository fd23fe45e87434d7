//! Which backend does the work: chosen once, by what the processor has.

use std::sync::OnceLock;

use crate::{AttentionShape, MatrixRef, scalar};

/// A backend that this processor can run. Backends other than scalar hold a token that only
/// detection of their instructions creates.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Backend {
    /// Portable Rust.
    Scalar,
}

/// The backend in use: the last of [`available`], or the one that `PHI3_KERNELS` names.
pub(crate) fn backend() -> Backend {
    static BACKEND: OnceLock<Backend> = OnceLock::new();
    *BACKEND.get_or_init(|| {
        let wanted = crate::environment::backend().ok().flatten();
        wanted.unwrap_or_else(|| available().pop().unwrap_or(Backend::Scalar))
    })
}

/// What this processor can run, from slow to fast.
pub(crate) fn available() -> Vec<Backend> {
    vec![Backend::Scalar]
}

impl Backend {
    /// The name that `PHI3_KERNELS` takes.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Backend::Scalar => "scalar",
        }
    }

    /// [`scalar::matmul_rows`].
    pub(crate) fn matmul_rows(
        self,
        x: &[f32],
        n: usize,
        w: MatrixRef<'_>,
        first_row: usize,
        out: &mut [f32],
    ) {
        match self {
            Backend::Scalar => scalar::matmul_rows(x, n, w, first_row, out),
        }
    }

    /// [`scalar::attend_rows`].
    pub(crate) fn attend_rows(
        self,
        q: &[f32],
        keys: &[f32],
        values: &[f32],
        shape: AttentionShape,
        first_row: usize,
        out: &mut [f32],
    ) {
        match self {
            Backend::Scalar => scalar::attend_rows(q, keys, values, shape, first_row, out),
        }
    }
}
