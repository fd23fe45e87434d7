//! Keys and values rounded to eight bits.

use crate::scalar::attention::f32_to_f16;
use crate::scalar::f16_to_f32;

/// Numbers that share a scale.
pub(crate) const GROUP: usize = 32;

/// Bytes of a group: its scale as half precision, then one signed byte for each number. These are
/// GGUF's Q8_0 blocks.
pub(crate) const GROUP_BYTES: usize = 2 + GROUP;

/// Bytes of a key or value of `d` numbers in [`KvPages::Q8_0`](crate::KvPages::Q8_0); the last
/// group is filled up with zeros.
pub fn q8_0_row_bytes(d: usize) -> usize {
    d.div_ceil(GROUP).saturating_mul(GROUP_BYTES)
}

/// One key or value to eight bits: each group of 32 numbers is scaled by its largest magnitude
/// over 127 and rounded to nearest. A group with a number that is not finite becomes NaN, so that
/// it is not lost.
///
/// # Panics
/// When `out` is not [`q8_0_row_bytes`] of `row` long.
///
/// ```
/// use phi3_kernels::{f32_to_q8_0, q8_0_row_bytes};
///
/// let mut stored = [0; 34];
/// assert_eq!(q8_0_row_bytes(2), stored.len());
/// f32_to_q8_0(&[127.0, -63.5], &mut stored);
/// // A half of 1.0, then the numbers in units of it.
/// assert_eq!(stored[..4], [0x00, 0x3c, 127, (-64i8) as u8]);
/// ```
pub fn f32_to_q8_0(row: &[f32], out: &mut [u8]) {
    assert_eq!(
        out.len(),
        q8_0_row_bytes(row.len()),
        "f32_to_q8_0: bytes of a row of {}",
        row.len()
    );
    let (out, _) = out.as_chunks_mut::<GROUP_BYTES>();
    for (group, out) in row.chunks(GROUP).zip(out) {
        let largest = group.iter().fold(0f32, |largest, v| largest.max(v.abs()));
        let scale = if group.iter().all(|v| v.is_finite()) {
            f32_to_f16(largest / 127.0)
        } else {
            f32_to_f16(f32::NAN)
        };
        // By the scale as it is stored.
        let scale_back = f16_to_f32(scale);
        let inverse = if scale_back > 0.0 {
            scale_back.recip()
        } else {
            0.0
        };
        out[..2].copy_from_slice(&scale.to_le_bytes());
        for (i, q) in out[2..].iter_mut().enumerate() {
            let value = group.get(i).map_or(0.0, |v| v * inverse);
            *q = value.round().clamp(-127.0, 127.0) as i8 as u8;
        }
    }
}
