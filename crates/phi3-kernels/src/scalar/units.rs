//! Blocks of stored weights as integers and their factors.

use super::decode::{IQ4_NL_VALUES, array, fifth_bits, nibbles, q3_k_scales, scales_and_minima};
use crate::BlockType;

/// The factors of a block, whose weight c is `d * scales[c / 16] * q[c] - dmin * mins[c / 16]`,
/// the same number as [`dequantize`](crate::dequantize) gives but for rounding.
pub(crate) struct Unit {
    /// As many as the block has groups of sixteen weights count, here and in `mins`.
    pub(crate) scales: [i16; 16],
    pub(crate) mins: [i16; 16],
    /// Half precision.
    pub(crate) d: u16,
    /// `-dmin`, half precision; `None` for types without minima.
    pub(crate) minus_dmin: Option<u16>,
}

/// Where the factors of a row's blocks go.
pub(crate) trait Factors {
    /// Takes those of block i; blocks come in order.
    fn put(&mut self, i: usize, unit: Unit);
}

impl Factors for Vec<Unit> {
    fn put(&mut self, _: usize, unit: Unit) {
        self.push(unit);
    }
}

/// Unpacks a row: the integers q of all weights, and the factors of its blocks. Nothing for float
/// types, which have no blocks.
#[inline(always)]
pub(crate) fn unpack_row(
    block_type: BlockType,
    row: &[u8],
    q: &mut [i8],
    factors: &mut impl Factors,
) {
    // A loop for each type, so that each knows the type's layout.
    macro_rules! each {
        ($($block_type:ident)*) => {
            match block_type {
                BlockType::F32 | BlockType::F16 | BlockType::BF16 => {
                    debug_assert!(false, "{block_type} has no blocks");
                }
                $(BlockType::$block_type => {
                    let blocks = row.chunks_exact(BlockType::$block_type.block_bytes());
                    let q = q.chunks_exact_mut(BlockType::$block_type.block_len());
                    for (i, (block, q)) in blocks.zip(q).enumerate() {
                        factors.put(i, Unit::unpack(BlockType::$block_type, block, q));
                    }
                })*
            }
        };
    }
    each!(Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 IQ4NL Int4 Q2K Q3K Q4K Q5K Q6K);
}

/// The other sign of a number of half precision.
const fn minus(half: u16) -> u16 {
    half ^ 0x8000
}

impl Unit {
    /// # Panics
    /// When `block` or `q` is shorter than a block.
    #[inline(always)]
    fn unpack(block_type: BlockType, block: &[u8], q_out: &mut [i8]) -> Self {
        let mut set_q = |at: usize, q: [i8; 32]| q_out[at..at + 32].copy_from_slice(&q);
        let mut unit = Unit {
            scales: [1; 16],
            mins: [1; 16],
            d: 0,
            minus_dmin: None,
        };
        match block_type {
            BlockType::F32 | BlockType::F16 | BlockType::BF16 => {}
            BlockType::Q4_0 => {
                unit.d = half(block, 0);
                set_q(0, each(&nibbles(array(block, 2)), |q| q as i8 - 8));
            }
            BlockType::Q4_1 => {
                unit.d = half(block, 0);
                unit.minus_dmin = Some(half(block, 2));
                set_q(0, each(&nibbles(array(block, 4)), |q| q as i8));
            }
            BlockType::Q5_0 => {
                unit.d = half(block, 0);
                let q = with_fifth(array(block, 6), array(block, 2));
                set_q(0, each(&q, |q| q as i8 - 16));
            }
            BlockType::Q5_1 => {
                unit.d = half(block, 0);
                unit.minus_dmin = Some(half(block, 2));
                let q = with_fifth(array(block, 8), array(block, 4));
                set_q(0, each(&q, |q| q as i8));
            }
            BlockType::Q8_0 => {
                unit.d = half(block, 0);
                set_q(0, each(array::<32>(block, 2), |q| q as i8));
            }
            BlockType::IQ4NL => {
                unit.d = half(block, 0);
                let q = nibbles(array(block, 2));
                set_q(0, each(&q, |q| IQ4_NL_VALUES[usize::from(q)] as i8));
            }
            BlockType::Int4 => {
                unit.d = half(block, 0);
                for i in 0..4 {
                    let q = array::<32>(block, 2 + 32 * i);
                    set_q(64 * i, each(q, |q| (q & 15) as i8 - 8));
                    set_q(64 * i + 32, each(q, |q| (q >> 4) as i8 - 8));
                }
            }
            BlockType::Q2K => {
                (unit.d, unit.minus_dmin) = (half(block, 80), Some(minus(half(block, 82))));
                let factors = array::<16>(block, 0);
                unit.scales = each(factors, |f| i16::from(f & 15));
                unit.mins = each(factors, |f| i16::from(f >> 4));
                for g in 0..8 {
                    let q = array::<32>(block, 16 + 32 * (g / 4));
                    set_q(32 * g, each(q, |q| (q >> (2 * (g % 4)) & 3) as i8));
                }
            }
            BlockType::Q3K => {
                unit.d = half(block, 108);
                unit.scales = each(&q3_k_scales(array(block, 96)), i16::from);
                let third = array::<32>(block, 0);
                for g in 0..8 {
                    let low = array::<32>(block, 32 + 32 * (g / 4));
                    let q = |l: usize| low[l] >> (2 * (g % 4)) & 3 | (third[l] >> g & 1) << 2;
                    set_q(32 * g, std::array::from_fn(|l| q(l) as i8 - 4));
                }
            }
            BlockType::Q4K => {
                (unit.d, unit.minus_dmin) = (half(block, 0), Some(minus(half(block, 2))));
                unit.set_scales_and_minima(array(block, 4));
                for i in 0..4 {
                    let q = array::<32>(block, 16 + 32 * i);
                    set_q(64 * i, each(q, |q| (q & 15) as i8));
                    set_q(64 * i + 32, each(q, |q| (q >> 4) as i8));
                }
            }
            BlockType::Q5K => {
                (unit.d, unit.minus_dmin) = (half(block, 0), Some(minus(half(block, 2))));
                unit.set_scales_and_minima(array(block, 4));
                let fifth = array::<32>(block, 16);
                for g in 0..8 {
                    let q = array::<32>(block, 48 + 32 * (g / 2));
                    let q = |l: usize| q[l] >> (4 * (g % 2)) & 15 | (fifth[l] >> g & 1) << 4;
                    set_q(32 * g, std::array::from_fn(|l| q(l) as i8));
                }
            }
            BlockType::Q6K => {
                unit.d = half(block, 208);
                unit.scales = each(array::<16>(block, 192), |s| i16::from(s as i8));
                for g in 0..8 {
                    let low = array::<32>(block, 64 * (g / 4) + 32 * (g % 2));
                    let high = array::<32>(block, 128 + 32 * (g / 4));
                    let q = |l: usize| {
                        low[l] >> (4 * (g % 4 / 2)) & 15 | (high[l] >> (2 * (g % 4)) & 3) << 4
                    };
                    set_q(32 * g, std::array::from_fn(|l| q(l) as i8 - 32));
                }
            }
        }
        unit
    }

    /// Those of Q4_K and Q5_K, which hold for 32 weights.
    #[inline(always)]
    fn set_scales_and_minima(&mut self, packed: &[u8; 12]) {
        for (g, (scale, min)) in scales_and_minima(packed).into_iter().enumerate() {
            self.scales[2 * g..2 * g + 2].fill(i16::from(scale));
            self.mins[2 * g..2 * g + 2].fill(i16::from(min));
        }
    }
}

/// `map` as a loop that is always inlined, and so vectorized where it stands.
#[inline(always)]
fn each<T: Copy, U: Copy + Default, const N: usize>(of: &[T; N], f: impl Fn(T) -> U) -> [U; N] {
    let mut out = [U::default(); N];
    for i in 0..N {
        out[i] = f(of[i]);
    }
    out
}

#[inline(always)]
fn half(block: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(*array(block, at))
}

#[inline(always)]
fn with_fifth(low: &[u8; 16], fifth: &[u8; 4]) -> [u8; 32] {
    let (low, fifth) = (nibbles(low), fifth_bits(fifth));
    std::array::from_fn(|j| low[j] | fifth[j])
}
