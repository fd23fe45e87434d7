//! Q2_K, Q4_K and Q5_K: 256 weights `d * scale * q - dmin * min` in groups, everything but the
//! weight not below 0. `scalar::decode` states the layouts.

use super::affine::{Sums, fit, rounded, sums};
use super::float::factor;
use super::symmetric::products;
use super::{LARGEST, SMALLEST, round};

type Weights = [f32; 256];

#[inline(always)]
pub(super) fn q2_k(x: &Weights, w: &Weights, out: &mut [u8; 84]) {
    let block = Block::<16, 16>::encode(x, w, 3.0, 15.0);
    for (out, (scale, min)) in out.iter_mut().zip(block.scales.iter().zip(&block.mins)) {
        *out = *scale as u8 | (*min as u8) << 4;
    }
    out[16..80].fill(0);
    for (i, q) in block.q.as_flattened().iter().enumerate() {
        let (group, l) = (i / 32, i % 32);
        out[16 + 32 * (group / 4) + l] |= (*q as u8) << (2 * (group % 4));
    }
    out[80..82].copy_from_slice(&block.d.to_le_bytes());
    out[82..].copy_from_slice(&block.dmin.to_le_bytes());
}

#[inline(always)]
pub(super) fn q4_k(x: &Weights, w: &Weights, out: &mut [u8; 144]) {
    let block = Block::<32, 8>::encode(x, w, 15.0, 63.0);
    block.put_factors(&mut out[..16]);
    for pair in 0..4 {
        let [low, high] = [block.q[2 * pair], block.q[2 * pair + 1]];
        for l in 0..32 {
            out[16 + 32 * pair + l] = low[l] as u8 | (high[l] as u8) << 4;
        }
    }
}

#[inline(always)]
pub(super) fn q5_k(x: &Weights, w: &Weights, out: &mut [u8; 176]) {
    let block = Block::<32, 8>::encode(x, w, 31.0, 63.0);
    block.put_factors(&mut out[..16]);
    out[16..48].fill(0);
    for pair in 0..4 {
        for l in 0..32 {
            let [low, high] = [0, 1].map(|i| block.q[2 * pair + i][l] as u8);
            out[16 + l] |= (low >> 4) << (2 * pair) | (high >> 4) << (2 * pair + 1);
            out[48 + 32 * pair + l] = low & 15 | high << 4;
        }
    }
}

/// `GROUPS` groups of `LEN` weights.
struct Block<const LEN: usize, const GROUPS: usize> {
    /// The factors, halves.
    d: u16,
    dmin: u16,
    scales: [f32; GROUPS],
    mins: [f32; GROUPS],
    q: [[f32; LEN]; GROUPS],
    error: f32,
}

/// Rounds of refining factors, scales, minima and weights in turn.
const ROUNDS: usize = 4;

impl<const LEN: usize, const GROUPS: usize> Block<LEN, GROUPS> {
    /// q from 0 to `top`, scales and minima from 0 to `scale_top`.
    #[inline(always)]
    fn encode(x: &Weights, w: &Weights, top: f32, scale_top: f32) -> Self {
        let (groups, _) = x.as_chunks::<LEN>();
        let (counts, _) = w.as_chunks::<LEN>();
        let mut group_sums = [Sums::default(); GROUPS];
        let mut wanted = [0.0; GROUPS];
        for (g, (x, w)) in groups.iter().zip(counts).enumerate() {
            let found = fit(x, w, top, true);
            wanted[g] = found.d;
            group_sums[g] = sums(x, w, &found.q);
        }
        let (mut d, mut scales) = fit_unsigned(&wanted, &group_sums.map(|s| s.qq), scale_top);
        // The minima that suit the rounded scales.
        let mut offsets = [0.0; GROUPS];
        for (g, offset) in offsets.iter_mut().enumerate() {
            *offset = group_sums[g].offset(d * scales[g]);
        }
        let (mut dmin, mut mins) = fit_unsigned(&offsets, &group_sums.map(|s| s.w), scale_top);

        let mut best = Block {
            d: 0,
            dmin: 0,
            scales: [0.0; GROUPS],
            mins: [0.0; GROUPS],
            q: [[0.0; LEN]; GROUPS],
            error: f32::INFINITY,
        };
        for _ in 0..ROUNDS {
            let (stored_d, rounded_d) = factor(d.clamp(0.0, LARGEST));
            let (stored_dmin, rounded_dmin) = factor(dmin.clamp(0.0, LARGEST));
            let mut candidate = Block {
                d: stored_d,
                dmin: stored_dmin,
                scales,
                mins,
                q: [[0.0; LEN]; GROUPS],
                error: 0.0,
            };
            for (g, (x, w)) in groups.iter().zip(counts).enumerate() {
                let (scale, min) = (rounded_d * scales[g], rounded_dmin * mins[g]);
                if scale > 0.0 {
                    candidate.q[g] = rounded(x, 1.0 / scale, -min, top);
                }
                candidate.error += squared_error(x, w, &candidate.q[g], scale, min);
                group_sums[g] = sums(x, w, &candidate.q[g]);
            }
            if candidate.error < best.error {
                best = candidate;
            }
            (d, dmin) = factors(&group_sums, &scales, &mins);
            for (g, sums) in group_sums.iter().enumerate() {
                let (scale, _) = sums.solve(true);
                scales[g] = nearest(scale, d, scale_top);
                mins[g] = nearest(sums.offset(d * scales[g]), dmin, scale_top);
            }
        }
        best
    }

    /// The 16 bytes of factors, scales and minima that Q4_K and Q5_K begin with.
    #[inline(always)]
    fn put_factors(&self, out: &mut [u8]) {
        out[..2].copy_from_slice(&self.d.to_le_bytes());
        out[2..4].copy_from_slice(&self.dmin.to_le_bytes());
        for j in 0..4 {
            let byte = |values: &[f32; GROUPS], j: usize| values[j] as u8;
            let (scale, min) = (byte(&self.scales, j + 4), byte(&self.mins, j + 4));
            out[4 + j] = byte(&self.scales, j) | scale >> 4 << 6;
            out[8 + j] = byte(&self.mins, j) | min >> 4 << 6;
            out[12 + j] = scale & 15 | min << 4;
        }
    }
}

/// The factors that minimize the block's error, all else being given: least squares over
/// `x = d * (scale * q) - dmin * min`.
#[inline(always)]
fn factors<const GROUPS: usize>(
    sums: &[Sums; GROUPS],
    scales: &[f32; GROUPS],
    mins: &[f32; GROUPS],
) -> (f32, f32) {
    let (mut ss, mut sm, mut mm, mut xs, mut xm) = (0.0, 0.0, 0.0, 0.0, 0.0);
    for ((sums, s), m) in sums.iter().zip(scales).zip(mins) {
        ss += s * s * sums.qq;
        sm += s * m * sums.q;
        mm += m * m * sums.w;
        xs += s * sums.xq;
        xm += m * sums.x;
    }
    let determinant = ss * mm - sm * sm;
    if determinant > 1e-6 * ss * mm {
        let d = (xs * mm - xm * sm) / determinant;
        let dmin = (xs * sm - xm * ss) / determinant;
        if d >= 0.0 && dmin >= 0.0 {
            return (d, dmin);
        }
    }
    let alone = |numerator: f32, denominator: f32| {
        if denominator > 0.0 {
            (numerator / denominator).max(0.0)
        } else {
            0.0
        }
    };
    // One of the two is of no use.
    if ss > 0.0 {
        (alone(xs, ss), 0.0)
    } else {
        (0.0, alone(-xm, mm))
    }
}

impl Sums {
    /// The amount to subtract that suits a scale, at least 0.
    #[inline(always)]
    fn offset(&self, scale: f32) -> f32 {
        if self.w > 0.0 {
            ((scale * self.q - self.x) / self.w).max(0.0)
        } else {
            0.0
        }
    }
}

#[inline(always)]
fn nearest(value: f32, unit: f32, top: f32) -> f32 {
    if unit > 0.0 {
        round((value / unit).clamp(0.0, top))
    } else {
        0.0
    }
}

/// Candidates on each side of the unit that maps the largest value to `top`.
const STEPS: i32 = 10;

/// Values not below 0 as `d * q` with q from 0 to `top`, minimizing `sum w (value - d q)²`.
#[inline(always)]
fn fit_unsigned<const N: usize>(values: &[f32; N], w: &[f32; N], top: f32) -> (f32, [f32; N]) {
    let largest = values.iter().fold(0f32, |m, v| m.max(*v));
    let mut best = (0.0, [0.0; N]);
    if largest <= SMALLEST {
        return best;
    }
    let mut gain = 0.0;
    for i in -STEPS..=STEPS {
        let inverse = (top + 0.15 * i as f32) / largest;
        let q = rounded(values, inverse, 0.0, top);
        let (xq, qq) = products(values, w, &q);
        if qq > 0.0 && xq * xq > gain * qq {
            gain = xq * xq / qq;
            best = (xq / qq, q);
        }
    }
    best
}

#[inline(always)]
fn squared_error<const N: usize>(
    x: &[f32; N],
    w: &[f32; N],
    q: &[f32; N],
    scale: f32,
    min: f32,
) -> f32 {
    let mut sums = [0f32; 8];
    let (xs, ws, qs) = (
        x.as_chunks::<8>().0,
        w.as_chunks::<8>().0,
        q.as_chunks::<8>().0,
    );
    for ((x, w), q) in xs.iter().zip(ws).zip(qs) {
        for l in 0..8 {
            let e = x[l] - (scale * q[l] - min);
            sums[l] += w[l] * e * e;
        }
    }
    sums.iter().sum()
}
