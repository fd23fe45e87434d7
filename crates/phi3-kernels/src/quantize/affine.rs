//! Weights as `d * q + m` with integers q from 0.

use super::{SMALLEST, round};

/// Scale, minimum and the rounded weights that go with them.
#[derive(Clone, Copy)]
pub(super) struct Affine<const N: usize> {
    pub d: f32,
    pub m: f32,
    /// Whole numbers from 0 to `top`.
    pub q: [f32; N],
}

/// Sums over a group, with the weights' counts w.
#[derive(Clone, Copy, Default)]
pub(super) struct Sums {
    pub w: f32,
    pub x: f32,
    pub q: f32,
    pub qq: f32,
    pub xq: f32,
}

/// Candidates for the number of steps between the smallest and the largest weight: from
/// `top - 1.5`, so that both ends may be cut, to `top + 1.5`.
const CANDIDATES: i32 = 31;

/// Scale and minimum that minimize `sum w (x - d q - m)²` for q from 0 to `top`, and those q.
/// `below_zero` keeps m at or below 0.
#[inline(always)]
pub(super) fn fit<const N: usize>(
    x: &[f32; N],
    w: &[f32; N],
    top: f32,
    below_zero: bool,
) -> Affine<N> {
    let (mut low, high) = x
        .iter()
        .fold((x[0], x[0]), |(low, high), x| (low.min(*x), high.max(*x)));
    if below_zero {
        low = low.min(0.0);
    }
    let mut best = Affine {
        d: 0.0,
        m: low,
        q: [0.0; N],
    };
    if high - low <= SMALLEST {
        if !below_zero {
            best.m = high;
        }
        return best;
    }
    let mut least = f32::INFINITY;
    let mut consider = |inverse: f32, offset: f32| {
        let q = rounded(x, inverse, offset, top);
        let s = sums(x, w, &q);
        let (d, m) = s.solve(below_zero);
        // The squared error without sum w x², which no choice changes.
        let error = d * (d * s.qq - 2.0 * s.xq + 2.0 * m * s.q) + m * (m * s.w - 2.0 * s.x);
        if error < least {
            least = error;
            best = Affine { d, m, q };
        }
        (best.d, best.m)
    };
    let mut found = (0.0, low);
    for i in 0..CANDIDATES {
        let steps = top - 1.5 + 0.1 * i as f32;
        if steps > 0.0 {
            found = consider(steps / (high - low), low);
        }
    }
    for _ in 0..4 {
        if found.0 > 0.0 {
            found = consider(1.0 / found.0, found.1);
        }
    }
    best
}

/// The whole numbers nearest to `(x - offset) * inverse`, from 0 to `top`.
#[inline(always)]
pub(super) fn rounded<const N: usize>(
    x: &[f32; N],
    inverse: f32,
    offset: f32,
    top: f32,
) -> [f32; N] {
    let mut q = [0.0; N];
    for (q, x) in q.iter_mut().zip(x) {
        *q = round(((x - offset) * inverse).max(0.0).min(top));
    }
    q
}

#[inline(always)]
pub(super) fn sums<const N: usize>(x: &[f32; N], w: &[f32; N], q: &[f32; N]) -> Sums {
    let mut sums = [[0f32; 8]; 5];
    let (xs, ws, qs) = (
        x.as_chunks::<8>().0,
        w.as_chunks::<8>().0,
        q.as_chunks::<8>().0,
    );
    for ((x, w), q) in xs.iter().zip(ws).zip(qs) {
        for l in 0..8 {
            let wq = w[l] * q[l];
            sums[0][l] += w[l];
            sums[1][l] += w[l] * x[l];
            sums[2][l] += wq;
            sums[3][l] += wq * q[l];
            sums[4][l] += wq * x[l];
        }
    }
    let [w, x, q, qq, xq] = sums.map(|lanes| lanes.iter().sum());
    Sums { w, x, q, qq, xq }
}

impl Sums {
    /// The least-squares d ≥ 0 and m.
    #[inline(always)]
    pub fn solve(&self, below_zero: bool) -> (f32, f32) {
        let determinant = self.w * self.qq - self.q * self.q;
        let (mut d, mut m) = (0.0, 0.0);
        if determinant > 0.0 {
            d = (self.w * self.xq - self.x * self.q) / determinant;
            m = (self.qq * self.x - self.q * self.xq) / determinant;
        }
        if determinant <= 0.0 || !d.is_finite() || !m.is_finite() || d < 0.0 {
            (d, m) = (0.0, if self.w > 0.0 { self.x / self.w } else { 0.0 });
        }
        if below_zero && m > 0.0 {
            m = 0.0;
            d = if self.qq > 0.0 {
                (self.xq / self.qq).max(0.0)
            } else {
                0.0
            };
        }
        (d, m)
    }
}
