//! Blocks of stored weights as integers and their factors.

use super::decode::{
    IQ4_NL_VALUES, array, f16, fifth_bits, nibbles, q3_k_scales, scales_and_minima,
};
use crate::BlockType;

/// A block: weight c is `d * scales[c / 16] * q[c] - dmin * mins[c / 16]`, the same numbers as
/// [`dequantize`](crate::dequantize) gives but for rounding.
pub(super) struct Unit {
    /// As many as the block has weights count, here and in groups of sixteen below.
    pub(super) q: [i8; 256],
    pub(super) scales: [i16; 16],
    pub(super) mins: [i16; 16],
    pub(super) d: f32,
    /// `None` for types without minima.
    pub(super) dmin: Option<f32>,
}

impl Unit {
    /// # Panics
    /// When `block` is shorter than a block, or of a float type.
    pub(super) fn unpack(block_type: BlockType, block: &[u8]) -> Self {
        let mut unit = Unit {
            q: [0; 256],
            scales: [1; 16],
            mins: [1; 16],
            d: 0.0,
            dmin: None,
        };
        match block_type {
            BlockType::F32 | BlockType::F16 | BlockType::BF16 => {
                debug_assert!(false, "{block_type} has no blocks");
            }
            BlockType::Q4_0 => {
                unit.d = f16(block, 0);
                unit.set_q(0, nibbles(array(block, 2)).map(|q| q as i8 - 8));
            }
            BlockType::Q4_1 => {
                unit.d = f16(block, 0);
                unit.dmin = Some(-f16(block, 2));
                unit.set_q(0, nibbles(array(block, 4)).map(|q| q as i8));
            }
            BlockType::Q5_0 => {
                unit.d = f16(block, 0);
                let q = with_fifth(array(block, 6), array(block, 2));
                unit.set_q(0, q.map(|q| q as i8 - 16));
            }
            BlockType::Q5_1 => {
                unit.d = f16(block, 0);
                unit.dmin = Some(-f16(block, 2));
                let q = with_fifth(array(block, 8), array(block, 4));
                unit.set_q(0, q.map(|q| q as i8));
            }
            BlockType::Q8_0 => {
                unit.d = f16(block, 0);
                unit.set_q(0, array::<32>(block, 2).map(|q| q as i8));
            }
            BlockType::IQ4NL => {
                unit.d = f16(block, 0);
                let q = nibbles(array(block, 2));
                unit.set_q(0, q.map(|q| IQ4_NL_VALUES[usize::from(q)] as i8));
            }
            BlockType::Int4 => {
                unit.d = f16(block, 0);
                for i in 0..4 {
                    let q = array::<32>(block, 2 + 32 * i);
                    unit.set_q(64 * i, q.map(|q| (q & 15) as i8 - 8));
                    unit.set_q(64 * i + 32, q.map(|q| (q >> 4) as i8 - 8));
                }
            }
            BlockType::Q2K => {
                (unit.d, unit.dmin) = (f16(block, 80), Some(f16(block, 82)));
                let factors = array::<16>(block, 0);
                unit.scales = factors.map(|f| i16::from(f & 15));
                unit.mins = factors.map(|f| i16::from(f >> 4));
                for g in 0..8 {
                    let q = array::<32>(block, 16 + 32 * (g / 4));
                    unit.set_q(32 * g, q.map(|q| (q >> (2 * (g % 4)) & 3) as i8));
                }
            }
            BlockType::Q3K => {
                unit.d = f16(block, 108);
                unit.scales = q3_k_scales(array(block, 96)).map(i16::from);
                let third = array::<32>(block, 0);
                for g in 0..8 {
                    let low = array::<32>(block, 32 + 32 * (g / 4));
                    let q = |l: usize| low[l] >> (2 * (g % 4)) & 3 | (third[l] >> g & 1) << 2;
                    unit.set_q(32 * g, std::array::from_fn(|l| q(l) as i8 - 4));
                }
            }
            BlockType::Q4K => {
                (unit.d, unit.dmin) = (f16(block, 0), Some(f16(block, 2)));
                unit.set_scales_and_minima(array(block, 4));
                for i in 0..4 {
                    let q = array::<32>(block, 16 + 32 * i);
                    unit.set_q(64 * i, q.map(|q| (q & 15) as i8));
                    unit.set_q(64 * i + 32, q.map(|q| (q >> 4) as i8));
                }
            }
            BlockType::Q5K => {
                (unit.d, unit.dmin) = (f16(block, 0), Some(f16(block, 2)));
                unit.set_scales_and_minima(array(block, 4));
                let fifth = array::<32>(block, 16);
                for g in 0..8 {
                    let q = array::<32>(block, 48 + 32 * (g / 2));
                    let q = |l: usize| q[l] >> (4 * (g % 2)) & 15 | (fifth[l] >> g & 1) << 4;
                    unit.set_q(32 * g, std::array::from_fn(|l| q(l) as i8));
                }
            }
            BlockType::Q6K => {
                unit.d = f16(block, 208);
                unit.scales = array::<16>(block, 192).map(|s| i16::from(s as i8));
                for g in 0..8 {
                    let low = array::<32>(block, 64 * (g / 4) + 32 * (g % 2));
                    let high = array::<32>(block, 128 + 32 * (g / 4));
                    let q = |l: usize| {
                        low[l] >> (4 * (g % 4 / 2)) & 15 | (high[l] >> (2 * (g % 4)) & 3) << 4
                    };
                    unit.set_q(32 * g, std::array::from_fn(|l| q(l) as i8 - 32));
                }
            }
        }
        unit
    }

    fn set_q(&mut self, at: usize, q: [i8; 32]) {
        self.q[at..at + 32].copy_from_slice(&q);
    }

    /// Those of Q4_K and Q5_K, which hold for 32 weights.
    fn set_scales_and_minima(&mut self, packed: &[u8; 12]) {
        for (g, (scale, min)) in scales_and_minima(packed).into_iter().enumerate() {
            self.scales[2 * g..2 * g + 2].fill(i16::from(scale));
            self.mins[2 * g..2 * g + 2].fill(i16::from(min));
        }
    }
}

fn with_fifth(low: &[u8; 16], fifth: &[u8; 4]) -> [u8; 32] {
    let (low, fifth) = (nibbles(low), fifth_bits(fifth));
    std::array::from_fn(|j| low[j] | fifth[j])
}
