//! Attention's operations: see `backend::Kernels` for what each has to give.

use super::{dot, f16_to_f32};
use crate::attention::{GROUP, GROUP_BYTES};
use crate::backend::Rows;

pub(crate) fn scores(q: &[f32], keys: Rows<'_>, d: usize, out: &mut [f32], stride: usize) {
    let mut wide = Vec::new();
    let keys = wide_rows(keys, &mut wide);
    for (q, out) in q.chunks_exact(d).zip(out.chunks_mut(stride)) {
        for (key, out) in keys.chunks_exact(d).zip(out) {
            *out = dot(q, key);
        }
    }
}

pub(crate) fn exponentials(scores: &mut [f32]) -> (f32, f32) {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for score in scores {
        // The first test is for rows in which all scores are -inf.
        *score = if *score == f32::NEG_INFINITY {
            0.0
        } else {
            (*score - max).exp()
        };
        sum += *score;
    }
    (max, sum)
}

pub(crate) fn weighted_sum(
    weights: &[f32],
    stride: usize,
    values: Rows<'_>,
    d: usize,
    acc: &mut [f32],
) {
    let mut wide = Vec::new();
    let values = wide_rows(values, &mut wide);
    for (acc, weights) in acc.chunks_exact_mut(d).zip(weights.chunks(stride)) {
        for (value, weight) in values.chunks_exact(d).zip(weights) {
            for (acc, v) in acc.iter_mut().zip(value) {
                *acc += weight * v;
            }
        }
    }
}

pub(crate) fn widen(halves: &[u16], out: &mut [f32]) {
    for (half, out) in halves.iter().zip(out) {
        *out = f16_to_f32(*half);
    }
}

pub(crate) fn widen_q8_0(row: &[u8], out: &mut [f32]) {
    let (groups, _) = row.as_chunks::<GROUP_BYTES>();
    for ([low, high, q @ ..], out) in groups.iter().zip(out.chunks_mut(GROUP)) {
        let scale = f16_to_f32(u16::from_le_bytes([*low, *high]));
        for (q, out) in q.iter().zip(out) {
            *out = scale * f32::from(*q as i8);
        }
    }
}

pub(crate) fn narrow(values: &[f32], out: &mut [u16]) {
    for (value, out) in values.iter().zip(out) {
        *out = f32_to_f16(*value);
    }
}

fn wide_rows<'a>(rows: Rows<'a>, wide: &'a mut Vec<f32>) -> &'a [f32] {
    match rows {
        Rows::F32(rows) => rows,
        Rows::F16(halves) => {
            wide.resize(halves.len(), 0.0);
            widen(halves, wide);
            wide
        }
    }
}

/// Largest finite half.
pub(crate) const F16_MAX: f32 = 65504.0;

pub(crate) fn f32_to_f16(value: f32) -> u16 {
    let sign = ((value.to_bits() >> 16) & 0x8000) as u16;
    let magnitude = value.abs();
    if magnitude.is_nan() {
        return sign | 0x7e00;
    }
    if magnitude.is_infinite() {
        return sign | 0x7c00;
    }
    let magnitude = magnitude.min(F16_MAX);
    // Adding a power of two whose last place is that of the half rounds to it, to nearest even:
    // 2^13 times the value's own power of two, or for subnormal halves 2^-24 times 2^23.
    let exponent = (magnitude.to_bits() >> 23).max(127 - 14);
    let magic = f32::from_bits((exponent + 13) << 23);
    let rounded = (magnitude + magic).to_bits() - magic.to_bits();
    // `rounded` counts units of the half's last place, the implicit 1 among them.
    sign | (((exponent - (127 - 14)) << 10) as u16 + rounded as u16)
}
