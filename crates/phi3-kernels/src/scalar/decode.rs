//! Blocks of stored weights to f32.
//!
//! Every product and sum is rounded once to f32, in ggml's order, so that the values equal
//! those of ggml's reference decoders bit for bit. Loops run over arrays of constant length:
//! the compiler drops the bounds checks and vectorizes them.

use crate::BlockType;

/// Decodes as many whole blocks as both slices hold.
///
/// A function of its own, because the compiler knows of its arguments, but not of the same
/// slices inside a larger function, that they do not overlap, and vectorizes accordingly.
#[inline(never)]
pub(crate) fn decode(block_type: BlockType, bytes: &[u8], out: &mut [f32]) {
    decode_inline(block_type, bytes, out);
}

/// [`decode`], to be compiled once more inside a function with other target features.
#[inline(always)]
pub(crate) fn decode_inline(block_type: BlockType, bytes: &[u8], out: &mut [f32]) {
    match block_type {
        BlockType::F32 => each(bytes, out, |b: &[u8; 4], o| *o = [f32::from_le_bytes(*b)]),
        BlockType::F16 => each(bytes, out, |b, o| *o = [f16_to_f32(u16::from_le_bytes(*b))]),
        BlockType::BF16 => each(bytes, out, |b, o| *o = [bf16(b)]),
        BlockType::Q4_0 => each(bytes, out, q4_0),
        BlockType::Q4_1 => each(bytes, out, q4_1),
        BlockType::Q5_0 => each(bytes, out, q5_0),
        BlockType::Q5_1 => each(bytes, out, q5_1),
        BlockType::Q8_0 => each(bytes, out, q8_0),
        BlockType::Q2K => each(bytes, out, q2_k),
        BlockType::Q3K => each(bytes, out, q3_k),
        BlockType::Q4K => each(bytes, out, q4_k),
        BlockType::Q5K => each(bytes, out, q5_k),
        BlockType::Q6K => each(bytes, out, q6_k),
        BlockType::IQ4NL => each(bytes, out, iq4_nl),
        BlockType::Int4 => each(bytes, out, int4),
    }
}

#[inline(always)]
fn each<const BYTES: usize, const LEN: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; LEN]),
) {
    let (blocks, _) = bytes.as_chunks();
    let (outs, _) = out.as_chunks_mut();
    for (block, out) in blocks.iter().zip(outs) {
        decode(block, out);
    }
}

/// Block: d f16, 16 bytes; byte j holds weight j low and weight j + 16 high.
#[inline(always)]
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = f16(block, 0);
    let q = nibbles(array(block, 2));
    for j in 0..32 {
        out[j] = d * (i32::from(q[j]) - 8) as f32;
    }
}

/// Block: d f16, m f16, 16 bytes as in Q4_0.
#[inline(always)]
fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (f16(block, 0), f16(block, 2));
    let q = nibbles(array(block, 4));
    for j in 0..32 {
        out[j] = d * f32::from(q[j]) + m;
    }
}

/// Block: d f16, 32 fifth bits (bit j of weight j), 16 bytes as in Q4_0.
#[inline(always)]
fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = f16(block, 0);
    let (high, q) = (fifth_bits(array(block, 2)), nibbles(array(block, 6)));
    for j in 0..32 {
        out[j] = d * (i32::from(q[j] | high[j]) - 16) as f32;
    }
}

/// Block: d f16, m f16, 32 fifth bits, 16 bytes as in Q4_0.
#[inline(always)]
fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (f16(block, 0), f16(block, 2));
    let (high, q) = (fifth_bits(array(block, 4)), nibbles(array(block, 8)));
    for j in 0..32 {
        out[j] = d * f32::from(q[j] | high[j]) + m;
    }
}

/// The low halves of sixteen bytes, then the high ones.
#[inline(always)]
pub(super) fn nibbles(bytes: &[u8; 16]) -> [u8; 32] {
    let mut nibbles = [0; 32];
    for j in 0..16 {
        nibbles[j] = bytes[j] & 15;
        nibbles[j + 16] = bytes[j] >> 4;
    }
    nibbles
}

/// Bit j of the input moved to bit 4 of byte j. A comparison with a mask a byte vectorizes
/// where a shift by a different amount in every lane does not.
#[inline(always)]
pub(super) fn fifth_bits(bits: &[u8; 4]) -> [u8; 32] {
    let mut high = [0; 32];
    for (j, high) in high.iter_mut().enumerate() {
        *high = if bits[j / 8] & (1 << (j % 8)) == 0 {
            0
        } else {
            16
        };
    }
    high
}

/// Block: d f16, 32 signed bytes.
#[inline(always)]
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = f16(block, 0);
    for j in 0..32 {
        out[j] = d * f32::from(block[2 + j] as i8);
    }
}

/// Block: d f16, 16 bytes as in Q4_0, each 4 bits an index into [`IQ4_NL_VALUES`].
#[inline(always)]
fn iq4_nl(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = f16(block, 0);
    let q = nibbles(array(block, 2));
    for j in 0..32 {
        out[j] = d * IQ4_NL_VALUES[usize::from(q[j])];
    }
}

/// Block: d f16, 128 bytes. Of each 64 weights, byte l of 32 holds weight l low and weight l + 32
/// high, which is Q4_K's order: a vector of 32 bytes gives 32 successive weights twice.
#[inline(always)]
fn int4(block: &[u8; 130], out: &mut [f32; 256]) {
    let d = f16(block, 0);
    let (pairs, _) = out.as_chunks_mut::<64>();
    for (i, out) in pairs.iter_mut().enumerate() {
        let q = array::<32>(block, 2 + 32 * i);
        for l in 0..32 {
            out[l] = d * (i32::from(q[l] & 15) - 8) as f32;
            out[l + 32] = d * (i32::from(q[l] >> 4) - 8) as f32;
        }
    }
}

/// `kvalues_iq4nl` of ggml-common.h.
pub(crate) const IQ4_NL_VALUES: [f32; 16] = [
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0,
    89.0, 113.0,
];

/// Block: 16 bytes of scale (low 4 bits) and minimum (high), 64 bytes of 2-bit weights, d f16,
/// dmin f16. Of each 128 weights, byte l holds weights l, l + 32, l + 64 and l + 96.
#[inline(always)]
fn q2_k(block: &[u8; 84], out: &mut [f32; 256]) {
    let (d, dmin) = (f16(block, 80), f16(block, 82));
    let factors = array::<16>(block, 0);
    let scales = factors.map(|f| d * f32::from(f & 15));
    let mins = factors.map(|f| dmin * f32::from(f >> 4));
    let (groups, _) = out.as_chunks_mut::<32>();
    for (g, out) in groups.iter_mut().enumerate() {
        let q = array::<32>(block, 16 + 32 * (g / 4));
        for l in 0..32 {
            let q = q[l] >> (2 * (g % 4)) & 3;
            out[l] = scales[2 * g + l / 16] * f32::from(q) - mins[2 * g + l / 16];
        }
    }
}

/// Block: 32 bytes of third bits, 64 bytes of two low bits as in Q2_K, 12 bytes of 6-bit
/// scales, d f16. A clear third bit subtracts 4; byte l holds those of weights l + 32 * bit.
#[inline(always)]
fn q3_k(block: &[u8; 110], out: &mut [f32; 256]) {
    let d = f16(block, 108);
    let scales = q3_k_scales(array(block, 96)).map(|s| d * f32::from(s));
    let third = array::<32>(block, 0);
    let (groups, _) = out.as_chunks_mut::<32>();
    for (g, out) in groups.iter_mut().enumerate() {
        let low = array::<32>(block, 32 + 32 * (g / 4));
        for l in 0..32 {
            let q = low[l] >> (2 * (g % 4)) & 3 | (third[l] >> g & 1) << 2;
            out[l] = scales[2 * g + l / 16] * (i32::from(q) - 4) as f32;
        }
    }
}

/// Sixteen scales less 32. Low 4 bits: those of scale k in byte k % 8, the first eight in the
/// low half. High 2 bits: in byte 8 + k % 4, from bit 2 * (k / 4).
#[inline(always)]
pub(crate) fn q3_k_scales(packed: &[u8; 12]) -> [i8; 16] {
    let mut scales = [0; 16];
    for (k, scale) in scales.iter_mut().enumerate() {
        let low = packed[k % 8] >> (4 * (k / 8)) & 15;
        let high = packed[8 + k % 4] >> (2 * (k / 4)) & 3;
        *scale = (low | high << 4) as i8 - 32;
    }
    scales
}

/// Block: d f16, dmin f16, 12 bytes of 6-bit scales and minima, 128 bytes of 4-bit weights. Of
/// each 64 weights, byte l holds weight l low and weight l + 32 high.
#[inline(always)]
fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let groups = scaled_groups(block);
    let (pairs, _) = out.as_chunks_mut::<64>();
    for (i, out) in pairs.iter_mut().enumerate() {
        let q = array::<32>(block, 16 + 32 * i);
        let [low, high] = [groups[2 * i], groups[2 * i + 1]];
        for l in 0..32 {
            out[l] = low.0 * f32::from(q[l] & 15) - low.1;
            out[l + 32] = high.0 * f32::from(q[l] >> 4) - high.1;
        }
    }
}

/// Block: as Q4_K, with 32 bytes of fifth bits before the weights. Byte l holds those of
/// weights l + 32 * bit.
#[inline(always)]
fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let groups = scaled_groups(block);
    let fifth = array::<32>(block, 16);
    let (pairs, _) = out.as_chunks_mut::<64>();
    for (i, out) in pairs.iter_mut().enumerate() {
        let q = array::<32>(block, 48 + 32 * i);
        let [low, high] = [groups[2 * i], groups[2 * i + 1]];
        for l in 0..32 {
            let fifth = fifth[l] >> (2 * i);
            out[l] = low.0 * f32::from(q[l] & 15 | (fifth & 1) << 4) - low.1;
            out[l + 32] = high.0 * f32::from(q[l] >> 4 | (fifth & 2) << 3) - high.1;
        }
    }
}

/// Factors of the eight groups of a Q4_K or Q5_K block: scale and minimum.
#[inline(always)]
fn scaled_groups(block: &[u8]) -> [(f32, f32); 8] {
    let (d, dmin) = (f16(block, 0), f16(block, 2));
    let integers = scales_and_minima(array(block, 4));
    integers.map(|(scale, min)| (d * f32::from(scale), dmin * f32::from(min)))
}

/// Scale and minimum of the eight groups of a Q4_K or Q5_K block. The first four lie in the low
/// 6 bits of bytes 0-3 and 4-7; of the others the low 4 bits lie in bytes 8-11 (scale low,
/// minimum high) and the high 2 bits on top of bytes 0-3 and 4-7.
#[inline(always)]
pub(super) fn scales_and_minima(s: &[u8; 12]) -> [(u8, u8); 8] {
    let mut groups = [(0, 0); 8];
    for j in 0..4 {
        groups[j] = (s[j] & 63, s[j + 4] & 63);
        groups[j + 4] = (
            s[j + 8] & 15 | s[j] >> 6 << 4,
            s[j + 8] >> 4 | s[j + 4] >> 6 << 4,
        );
    }
    groups
}

/// Block: 128 bytes of four low bits, 64 bytes of two high bits, 16 signed scales, d f16. Of
/// each 128 weights, low byte l of 64 holds weights l and l + 64, high byte l of 32 holds
/// weights l, l + 32, l + 64 and l + 96.
#[inline(always)]
fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let d = f16(block, 208);
    let (halves, _) = out.as_chunks_mut::<128>();
    for (i, out) in halves.iter_mut().enumerate() {
        let low = array::<64>(block, 64 * i);
        let high = array::<32>(block, 128 + 32 * i);
        let scales = array::<8>(block, 192 + 8 * i).map(|s| d * f32::from(s as i8));
        for l in 0..32 {
            let weight = |group: usize, low: u8, high: u8| {
                scales[group + l / 16] * (i32::from(low & 15 | (high & 3) << 4) - 32) as f32
            };
            out[l] = weight(0, low[l], high[l]);
            out[l + 32] = weight(2, low[l + 32], high[l] >> 2);
            out[l + 64] = weight(4, low[l] >> 4, high[l] >> 4);
            out[l + 96] = weight(6, low[l + 32] >> 4, high[l] >> 6);
        }
    }
}

#[inline(always)]
pub(super) fn array<const N: usize>(block: &[u8], at: usize) -> &[u8; N] {
    block[at..]
        .first_chunk()
        .expect("every caller's offset leaves N bytes in its block")
}

#[inline(always)]
pub(super) fn f16(block: &[u8], at: usize) -> f32 {
    f16_to_f32(u16::from_le_bytes(*array(block, at)))
}

#[inline(always)]
fn bf16(b: &[u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16)
}

/// Half precision to single, exactly, infinities and NaN included.
///
/// Free of branches and calls, so that it vectorizes; and free of f32 subnormals, which some
/// cores process slowly and which the scales of the K types often are in half precision.
#[inline(always)]
pub(crate) fn f16_to_f32(h: u16) -> f32 {
    let sign = u32::from(h & 0x8000) << 16;
    let magnitude = u32::from(h & 0x7fff);
    // Exponent rebased from 15 to 127; once more for infinities and NaN.
    let rebase = if magnitude < 0x7c00 {
        112 << 23
    } else {
        224 << 23
    };
    let normal = (magnitude << 13) + rebase;
    // A subnormal counts units of 2^-24, which is the last place of a single in [0.5, 1).
    let subnormal = (f32::from_bits((126 << 23) | magnitude) - 0.5).to_bits();
    let bits = if magnitude < 0x0400 {
        subnormal
    } else {
        normal
    };
    f32::from_bits(bits | sign)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_converts_exactly() {
        for h in 0..=u16::MAX {
            let (ours, theirs) = (f16_to_f32(h), half::f16::from_bits(h).to_f32());
            if theirs.is_nan() {
                assert!(ours.is_nan(), "{h:#06x}");
            } else {
                assert_eq!(ours.to_bits(), theirs.to_bits(), "{h:#06x}");
            }
        }
    }

    /// Infinite and NaN scales reach the weights, and nothing panics, whatever the bytes.
    #[test]
    fn non_finite_scales_propagate() {
        for t in BlockType::ALL {
            for byte in [0xffu8, 0x7c, 0x00, 0x80] {
                let bytes = vec![byte; t.block_bytes()];
                let mut out = vec![0.0; t.block_len()];
                decode(t, &bytes, &mut out);
                // 0xffff is a NaN in every float format here, also as a scale.
                if byte == 0xff {
                    assert!(out.iter().all(|v| v.is_nan()), "{t}");
                }
            }
        }
    }
}
