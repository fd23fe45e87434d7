//! Weights as `d * q` with integers q around 0.

use super::{SMALLEST, round};

/// A scale and the rounded weights that go with it.
#[derive(Clone, Copy)]
pub(super) struct Scaled<const N: usize> {
    pub d: f32,
    /// Whole numbers from `-half` to `half - 1`.
    pub q: [f32; N],
    /// `sum w q²`: how much a change of the scale costs.
    pub curvature: f32,
}

/// Candidates on each side of the scale that maps the largest weight to the end of the range.
const STEPS: i32 = 14;

/// The scale that minimizes `sum w (x - d q)²` for q from `-half` to `half - 1`, and those q.
#[inline(always)]
pub(super) fn fit<const N: usize>(x: &[f32; N], w: &[f32; N], half: f32) -> Scaled<N> {
    let mut best = Scaled {
        d: 0.0,
        q: [0.0; N],
        curvature: 0.0,
    };
    let largest = signed_largest(x);
    if largest.abs() <= SMALLEST {
        return best;
    }
    let mut gain = 0.0;
    let mut consider = |inverse: f32| {
        let q = rounded(x, inverse, half);
        let (xq, qq) = products(x, w, &q);
        // The least-squares scale xq / qq lowers the error by xq² / qq.
        if qq > 0.0 && xq * xq > gain * qq {
            gain = xq * xq / qq;
            best = Scaled {
                d: xq / qq,
                q,
                curvature: qq,
            };
        }
        best.d
    };
    // Candidates lie closer together where the levels do.
    let step = 0.05 + 0.01 * half.min(16.0);
    let mut d = 0.0;
    for i in -STEPS..=STEPS {
        d = consider(-(half + step * i as f32) / largest);
    }
    for _ in 0..3 {
        if d != 0.0 {
            d = consider(1.0 / d);
        }
    }
    best
}

/// The whole numbers nearest to `x * inverse`, from `-half` to `half - 1`.
#[inline(always)]
pub(super) fn rounded<const N: usize>(x: &[f32; N], inverse: f32, half: f32) -> [f32; N] {
    let mut q = [0.0; N];
    for (q, x) in q.iter_mut().zip(x) {
        *q = round((x * inverse).max(-half).min(half - 1.0));
    }
    q
}

/// `sum w x q` and `sum w q²`, in eight partial sums.
#[inline(always)]
pub(super) fn products<const N: usize>(x: &[f32; N], w: &[f32; N], q: &[f32; N]) -> (f32, f32) {
    let (mut xq, mut qq) = ([0f32; 8], [0f32; 8]);
    let (xs, ws, qs) = (
        x.as_chunks::<8>().0,
        w.as_chunks::<8>().0,
        q.as_chunks::<8>().0,
    );
    for ((x, w), q) in xs.iter().zip(ws).zip(qs) {
        for l in 0..8 {
            let wq = w[l] * q[l];
            xq[l] += wq * x[l];
            qq[l] += wq * q[l];
        }
    }
    (xq.iter().sum(), qq.iter().sum())
}

/// The weight of the largest magnitude, with its sign; the first of several.
#[inline(always)]
pub(super) fn signed_largest(x: &[f32]) -> f32 {
    x.iter()
        .fold(0f32, |m, x| if x.abs() > m.abs() { *x } else { m })
}
