//! Q3_K and Q6_K: 256 weights `d * scale * q` in groups of 16, q around 0. `scalar::decode` states
//! the layouts.

use super::float::factor;
use super::symmetric::{fit, products, rounded};
use super::{LARGEST, round};

type Weights = [f32; 256];

/// Groups of a block, and weights of a group.
const GROUP: usize = 16;

#[inline(always)]
pub(super) fn q3_k(x: &Weights, w: &Weights, out: &mut [u8; 110]) {
    let block = Block::encode(x, w, 4.0, 32.0);
    let q = block.q.map(|q| (q + 4.0) as u8);
    let scales = block.scales.map(|s| (s + 32.0) as u8);
    out.fill(0);
    for (i, q) in q.iter().enumerate() {
        let (group, l) = (i / 32, i % 32);
        out[l] |= (q >> 2) << group;
        out[32 + 32 * (group / 4) + l] |= (q & 3) << (2 * (group % 4));
    }
    for (k, scale) in scales.iter().enumerate() {
        out[96 + k % 8] |= (scale & 15) << (4 * (k / 8));
        out[104 + k % 4] |= (scale >> 4) << (2 * (k / 4));
    }
    out[108..].copy_from_slice(&block.d.to_le_bytes());
}

#[inline(always)]
pub(super) fn q6_k(x: &Weights, w: &Weights, out: &mut [u8; 210]) {
    let block = Block::encode(x, w, 32.0, 128.0);
    let q = block.q.map(|q| (q + 32.0) as u8);
    for half in 0..2 {
        let q = &q[128 * half..];
        for l in 0..64 {
            out[64 * half + l] = q[l] & 15 | (q[l + 64] & 15) << 4;
        }
        for l in 0..32 {
            out[128 + 32 * half + l] =
                q[l] >> 4 | q[l + 32] >> 4 << 2 | q[l + 64] >> 4 << 4 | q[l + 96] >> 4 << 6;
        }
    }
    for (out, scale) in out[192..208].iter_mut().zip(block.scales) {
        *out = scale as i8 as u8;
    }
    out[208..].copy_from_slice(&block.d.to_le_bytes());
}

struct Block {
    /// The factor, a half.
    d: u16,
    scales: [f32; GROUP],
    q: Weights,
    error: f32,
}

/// Rounds of refining factor, scales and weights in turn; the error hardly falls after the second.
const ROUNDS: usize = 4;

impl Block {
    /// q from `-half` to `half - 1`, scales from `-scale_half` to `scale_half - 1`.
    #[inline(always)]
    fn encode(x: &Weights, w: &Weights, half: f32, scale_half: f32) -> Self {
        let (groups, _) = x.as_chunks::<GROUP>();
        let (counts, _) = w.as_chunks::<GROUP>();
        let (mut scales, mut curvatures) = ([0.0; GROUP], [0.0; GROUP]);
        for (g, (x, w)) in groups.iter().zip(counts).enumerate() {
            let found = fit(x, w, half);
            (scales[g], curvatures[g]) = (found.d, found.curvature);
        }
        let found = fit(&scales, &curvatures, scale_half);
        let (mut d, mut scales) = (found.d, found.q);
        let mut best = Block {
            d: 0,
            scales: [0.0; GROUP],
            q: [0.0; 256],
            error: f32::INFINITY,
        };
        for _ in 0..ROUNDS {
            let (stored, rounded_d) = factor(d.clamp(-LARGEST, LARGEST));
            let mut candidate = Block {
                d: stored,
                scales,
                q: [0.0; 256],
                error: 0.0,
            };
            let (mut all_xq, mut all_qq) = (0.0, 0.0);
            let mut wanted = [0.0; GROUP];
            let (qs, _) = candidate.q.as_chunks_mut::<GROUP>();
            for (g, ((x, w), q)) in groups.iter().zip(counts).zip(qs).enumerate() {
                let scale = rounded_d * scales[g];
                if scale != 0.0 {
                    *q = rounded(x, 1.0 / scale, half);
                }
                candidate.error += squared_error(x, w, q, scale);
                let (xq, qq) = products(x, w, q);
                all_xq += scales[g] * xq;
                all_qq += scales[g] * scales[g] * qq;
                wanted[g] = if qq > 0.0 { xq / qq } else { 0.0 };
            }
            if candidate.error < best.error {
                best = candidate;
            }
            if all_qq == 0.0 || all_xq == 0.0 {
                break;
            }
            d = all_xq / all_qq;
            scales = wanted.map(|s| round((s / d).clamp(-scale_half, scale_half - 1.0)));
        }
        best
    }
}

#[inline(always)]
fn squared_error<const N: usize>(x: &[f32; N], w: &[f32; N], q: &[f32; N], scale: f32) -> f32 {
    let mut sums = [0f32; 8];
    let (xs, ws, qs) = (
        x.as_chunks::<8>().0,
        w.as_chunks::<8>().0,
        q.as_chunks::<8>().0,
    );
    for ((x, w), q) in xs.iter().zip(ws).zip(qs) {
        for l in 0..8 {
            let e = x[l] - scale * q[l];
            sums[l] += w[l] * e * e;
        }
    }
    sums.iter().sum()
}
