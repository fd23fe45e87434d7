//! Naive oracles in f64 and inputs for tests, shared by the tests of this crate and of others.
//! Not part of the interface: no promise of stability.
#![allow(missing_docs)]

use crate::{AttentionShape, BlockType, MatrixRef, dequantize};

/// SplitMix64: small, seedable, the same on every machine.
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [-1, 1).
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn units(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.unit()).collect()
    }
}

/// Byte offsets of the half-precision factors in a block.
fn factor_offsets(block_type: BlockType) -> &'static [usize] {
    match block_type {
        BlockType::F32 | BlockType::F16 | BlockType::BF16 => &[],
        BlockType::Q4_0
        | BlockType::Q5_0
        | BlockType::Q8_0
        | BlockType::IQ4NL
        | BlockType::Int4 => &[0],
        BlockType::Q4_1 | BlockType::Q5_1 | BlockType::Q4K | BlockType::Q5K => &[0, 2],
        BlockType::Q2K => &[80, 82],
        BlockType::Q3K => &[108],
        BlockType::Q6K => &[208],
    }
}

/// The bytes of a matrix of random weights of moderate size: random quantized bits under
/// factors between 2^-11 and 2^-9 of either sign, or floats in [-1, 1).
///
/// # Panics
/// When `cols` is not a whole number of blocks.
pub fn random_matrix(block_type: BlockType, rows: usize, cols: usize, seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    match block_type {
        BlockType::F32 => {
            let weights = random.units(rows * cols);
            return weights.iter().flat_map(|w| w.to_le_bytes()).collect();
        }
        BlockType::BF16 => {
            let weights = random.units(rows * cols);
            let upper = |w: &f32| [w.to_le_bytes()[2], w.to_le_bytes()[3]];
            return weights.iter().flat_map(upper).collect();
        }
        BlockType::F16 => {
            // Any exponent up to that of 0.5, subnormals included.
            let half = |bits: u64| (bits as u16 & 0xbbff).to_le_bytes();
            return (0..rows * cols).flat_map(|_| half(random.bits())).collect();
        }
        _ => {}
    }
    let len = block_type.row_bytes(cols).map(|bytes| bytes * rows);
    let len = len.expect("the caller gives whole blocks");
    let mut bytes: Vec<u8> = (0..len).map(|_| random.bits() as u8).collect();
    tame_factors(block_type, &mut bytes, &mut random);
    bytes
}

/// Replaces the half-precision factors of blocks by random ones between 2^-11 and 2^-9 of either
/// sign.
pub fn tame_factors(block_type: BlockType, bytes: &mut [u8], random: &mut Random) {
    for block in bytes.chunks_exact_mut(block_type.block_bytes()) {
        for &at in factor_offsets(block_type) {
            // Exponents 4 and 5 of 15: 2^-11 and 2^-10.
            let factor = (random.bits() as u16 & 0x87ff) + 0x1000;
            block[at..at + 2].copy_from_slice(&factor.to_le_bytes());
        }
    }
}

/// `out[t, r]` as exact as f64, and `sum_c |x w|` beside it, which bounds the rounding error
/// of any order of summation.
///
/// # Panics
/// When `x` is not a whole number of tokens.
pub fn matmul(x: &[f32], n: usize, w: MatrixRef<'_>) -> Vec<(f64, f64)> {
    let (rows, cols) = (w.rows(), w.cols());
    let mut weights = vec![0.0; rows * cols];
    dequantize(w.block_type(), w.bytes(), &mut weights).expect("a matrix has whole blocks");
    let mut out = Vec::new();
    for t in 0..n {
        for r in 0..rows {
            let products = || {
                let pairs = x[t * cols..][..cols].iter().zip(&weights[r * cols..]);
                pairs.map(|(x, w)| f64::from(*x) * f64::from(*w))
            };
            out.push((products().sum(), products().map(f64::abs).sum()));
        }
    }
    out
}

pub fn attend(q: &[f32], keys: &[f32], values: &[f32], shape: AttentionShape) -> Vec<f64> {
    let d = shape.head_dim;
    let mut out = vec![0.0; q.len()];
    for (i, out) in out.chunks_mut(d).enumerate() {
        let q_position = shape.q_start + i;
        let mut scores = Vec::new();
        for j in 0..keys.len() / d {
            let k_position = shape.k_start + j;
            let inside = |w| k_position <= q_position && q_position - k_position < w;
            if inside(shape.window.unwrap_or(usize::MAX)) {
                let products = (0..d).map(|c| f64::from(q[i * d + c]) * f64::from(keys[j * d + c]));
                scores.push((j, products.sum::<f64>() * f64::from(shape.scale)));
            }
        }
        let max = scores.iter().fold(f64::NEG_INFINITY, |m, s| m.max(s.1));
        let sum: f64 = scores.iter().map(|s| (s.1 - max).exp()).sum();
        for (j, score) in scores {
            for (c, out) in out.iter_mut().enumerate() {
                *out += (score - max).exp() / sum * f64::from(values[j * d + c]);
            }
        }
    }
    out
}

pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f64> {
    let mut out = Vec::new();
    for x in x.chunks(weight.len()) {
        let squares: f64 = x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
        let root = (squares / x.len() as f64 + f64::from(eps)).sqrt();
        out.extend(
            x.iter()
                .zip(weight)
                .map(|(x, w)| f64::from(*x) / root * f64::from(*w)),
        );
    }
    out
}

pub fn silu_mul(gate_up: &[f32], intermediate: usize) -> Vec<f64> {
    let mut out = Vec::new();
    for row in gate_up.chunks(2 * intermediate) {
        let (gate, up) = row.split_at(intermediate);
        for (g, u) in gate.iter().zip(up) {
            out.push(f64::from(*u) * f64::from(*g) / (1.0 + (-f64::from(*g)).exp()));
        }
    }
    out
}

pub fn rope(
    x: &[f32],
    heads: usize,
    head_dim: usize,
    cos: &[f32],
    sin: &[f32],
    rotary_half: usize,
) -> Vec<f64> {
    let at = |i: usize| f64::from(x[i]);
    let mut out: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
    for head in 0..x.len() / head_dim.max(1) {
        for j in 0..rotary_half {
            let (low, high) = (head * head_dim + j, head * head_dim + j + rotary_half);
            let angle = head / heads * rotary_half + j;
            let (cos, sin) = (f64::from(cos[angle]), f64::from(sin[angle]));
            out[low] = at(low) * cos - at(high) * sin;
            out[high] = at(high) * cos + at(low) * sin;
        }
    }
    out
}
