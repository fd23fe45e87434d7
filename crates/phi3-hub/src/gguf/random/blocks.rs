//! Random weights as stored blocks.
//!
//! The quantized numbers of a block are random bits; its factors are chosen such that the weights
//! have mean 0 and the standard deviation [`DEVIATION`]. Formats without an offset of their own
//! have a mean of half a step, which factors of random sign undo from block to block.

use half::{bf16, f16};
use phi3_kernels::BlockType;

/// Standard deviation of the weights, Phi-3's `initializer_range`.
pub(super) const DEVIATION: f32 = 0.02;

/// Standard deviation of numbers spread evenly over a range of 4, 8, 16, 32, 64 steps.
const STEPS_4: f32 = 1.118;
const STEPS_8: f32 = 2.291;
const STEPS_16: f32 = 4.610;
const STEPS_32: f32 = 9.233;
const STEPS_64: f32 = 18.47;
/// Root mean square of 8-bit numbers spread evenly.
const STEPS_256: f32 = 73.9;
/// Root mean square of IQ4_NL's table.
const TABLE: f32 = 67.4;
/// Root mean square of the scales 8 to 15 and 32 to 63.
const SCALES_Q2: f32 = 11.73;
const SCALES_K: f32 = 48.4;

/// SplitMix64: small, seedable, the same on every machine.
pub(super) struct Random(u64);

impl Random {
    /// A stream of its own for each tensor of each seed.
    pub fn new(seed: u64, tensor: &str) -> Self {
        // FNV-1a.
        let start = 0xcbf2_9ce4_8422_2325 ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mix = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        Self(tensor.bytes().fold(start, mix))
    }

    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [0.75, 1.25), of either sign: how factors differ between blocks.
    fn factor(&mut self) -> f32 {
        let bits = self.bits();
        let size = 0.75 + (bits >> 41) as f32 / (1u64 << 24) as f32;
        if bits & 1 == 0 { size } else { -size }
    }

    /// Nearly normal with deviation 1: the sum of four uniform 16-bit numbers.
    fn normal(&mut self) -> f32 {
        let bits = self.bits();
        let sum = (0..4).map(|i| (bits >> (16 * i)) & 0xffff).sum::<u64>();
        (sum as f32 - 2.0 * 65535.0) / 65536.0 * 1.732
    }

    fn fill(&mut self, out: &mut [u8]) {
        for word in out.chunks_mut(8) {
            let bytes = self.bits().to_le_bytes();
            word.copy_from_slice(&bytes[..word.len()]);
        }
    }
}

/// The weights of a norm, f32 around 1.
pub(super) fn fill_norm(random: &mut Random, out: &mut [u8]) {
    for weight in out.as_chunks_mut().0 {
        *weight = (1.0 + 0.05 * random.normal()).to_le_bytes();
    }
}

/// Fills `out` with whole blocks of random weights.
pub(super) fn fill(block_type: BlockType, random: &mut Random, out: &mut [u8]) {
    match block_type {
        BlockType::F32 => floats(random, out, f32::to_le_bytes),
        BlockType::F16 => floats(random, out, |weight| f16::from_f32(weight).to_le_bytes()),
        BlockType::BF16 => floats(random, out, |weight| bf16::from_f32(weight).to_le_bytes()),
        BlockType::Q4_0 => each(random, out, |block: &mut [u8; 18], d| {
            put(block, 0, d / STEPS_16)
        }),
        BlockType::Q4_1 => each(random, out, |block: &mut [u8; 20], d| {
            put(block, 0, d / STEPS_16);
            put(block, 2, -7.5 * d / STEPS_16);
        }),
        BlockType::Q5_0 => each(random, out, |block: &mut [u8; 22], d| {
            put(block, 0, d / STEPS_32)
        }),
        BlockType::Q5_1 => each(random, out, |block: &mut [u8; 24], d| {
            put(block, 0, d / STEPS_32);
            put(block, 2, -15.5 * d / STEPS_32);
        }),
        BlockType::Q8_0 => each(random, out, |block: &mut [u8; 34], d| {
            put(block, 0, d / STEPS_256);
            for q in block.iter_mut().skip(2) {
                // Quantizers make no -128.
                *q = if *q == 0x80 { 0x81 } else { *q };
            }
        }),
        BlockType::Q2K => each(random, out, |block: &mut [u8; 84], d| {
            let d = d / (STEPS_4 * SCALES_Q2);
            put(block, 80, d);
            put(block, 82, 1.5 * d);
            for scale in block.iter_mut().take(16) {
                let nibble = (*scale & 7) | 8;
                *scale = nibble | (nibble << 4);
            }
        }),
        // The scales -32 to 31 have the deviation of 64 steps.
        BlockType::Q3K => each(random, out, |block: &mut [u8; 110], d| {
            put(block, 108, d / (STEPS_8 * STEPS_64));
        }),
        BlockType::Q4K => each(random, out, |block: &mut [u8; 144], d| {
            k_factors(block, d / (STEPS_16 * SCALES_K), 7.5);
        }),
        BlockType::Q5K => each(random, out, |block: &mut [u8; 176], d| {
            k_factors(block, d / (STEPS_32 * SCALES_K), 15.5);
        }),
        BlockType::Q6K => each(random, out, |block: &mut [u8; 210], d| {
            put(block, 208, d / (STEPS_64 * STEPS_256));
        }),
        BlockType::Int4 => each(random, out, |block: &mut [u8; 130], d| {
            put(block, 0, d / STEPS_16)
        }),
        BlockType::IQ4NL => each(random, out, |block: &mut [u8; 18], d| {
            put(block, 0, d / TABLE)
        }),
    }
}

fn floats<const BYTES: usize>(
    random: &mut Random,
    out: &mut [u8],
    bytes: impl Fn(f32) -> [u8; BYTES],
) {
    for weight in out.as_chunks_mut().0 {
        *weight = bytes(random.normal() * DEVIATION);
    }
}

/// Fills each block with random bits and lets `finish(block, deviation)` put its factors.
fn each<const BYTES: usize>(
    random: &mut Random,
    out: &mut [u8],
    finish: impl Fn(&mut [u8; BYTES], f32),
) {
    random.fill(out);
    for block in out.as_chunks_mut().0 {
        finish(block, random.factor() * DEVIATION);
    }
}

/// Q4_K and Q5_K: eight 6-bit scales, each with a minimum of the same size, so that `middle` steps
/// up from the minimum are 0.
fn k_factors<const BYTES: usize>(block: &mut [u8; BYTES], d: f32, middle: f32) {
    put(block, 0, d);
    put(block, 2, middle * d);
    // Bytes 4 to 7 hold four scales in their lower six bits, bytes 8 to 11 those minima. The other
    // four lie in bytes 12 to 15, scale low and minimum high, with their upper two bits in the
    // upper bits of the former.
    for i in 4..8 {
        // Both numbers get their highest bit, so that all are from 32 to 63.
        block[i] |= 0xa0;
        block[i + 4] = block[i];
        let low = block[i + 8] & 0xf0;
        block[i + 8] = low | (low >> 4);
    }
}

fn put<const BYTES: usize>(block: &mut [u8; BYTES], at: usize, factor: f32) {
    block[at..at + 2].copy_from_slice(&f16::from_f32(factor).to_le_bytes());
}
