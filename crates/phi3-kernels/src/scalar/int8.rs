//! Products of quantized weights with quantized activations.
//!
//! The dot product of a block is an integer, exact in any order. What the float arithmetic does
//! with it is fixed to the last bit, so that every backend gives the same result: see [`dot`].

use super::f16_to_f32;
use super::units::{Unit, unpack_row};
use crate::MatrixRef;
use crate::activations::{MAX_QUANTIZED, Quantized, SUM_GROUP};

/// Partial sums of a row: block i goes to sum `i % LANES`.
pub(crate) const LANES: usize = 8;

/// Groups of smaller magnitudes become zeros: the inverse of their scale would be infinite.
pub(crate) const SMALLEST_GROUP: f32 = 128.0 * f32::MIN_POSITIVE;

/// 1.5 * 2^23: added to a float of small magnitude it leaves the nearest integer, ties to even,
/// in the last bits. Faster than `round_ties_even` where that is a call.
const ROUNDING: f32 = 12_582_912.0;

/// Quantizes groups of `group` elements: the scale is the largest magnitude over 127, the values
/// are the nearest integers. A group with an element that is not finite has the scale NaN.
#[inline(always)]
pub(crate) fn quantize(
    x: &[f32],
    group: usize,
    values: &mut [i8],
    scales: &mut [f32],
    sums: &mut [i16],
) {
    let groups = x.chunks_exact(group).zip(values.chunks_exact_mut(group));
    for ((x, values), scale) in groups.zip(scales) {
        // The largest bits of a magnitude are those of the largest magnitude, infinity and NaN
        // above all others.
        let bits = x.iter().map(|x| x.to_bits() & 0x7fff_ffff);
        let max = f32::from_bits(bits.fold(0, u32::max));
        let inverse = if !max.is_finite() || max < SMALLEST_GROUP {
            0.0
        } else {
            MAX_QUANTIZED / max
        };
        *scale = if !max.is_finite() {
            f32::NAN
        } else if inverse == 0.0 {
            0.0
        } else {
            max / MAX_QUANTIZED
        };
        if max.is_finite() {
            for (value, x) in values.iter_mut().zip(x) {
                *value = (x * inverse + ROUNDING).to_bits() as i8;
            }
        } else {
            values.fill(0);
        }
    }
    for (values, sum) in values.chunks_exact(SUM_GROUP).zip(sums) {
        *sum = values.iter().map(|v| i16::from(*v)).sum();
    }
}

/// `out[t][i] = x[t] · w[first_row + i]`.
pub(crate) fn int8_rows(x: &Quantized, w: MatrixRef<'_>, first_row: usize, out: &mut [&mut [f32]]) {
    debug_assert_eq!(out.len(), x.n, "an output for every token");
    let rows = out.first().map_or(0, |out| out.len());
    let mut q = vec![0; w.cols()];
    for i in 0..rows {
        let mut units: Vec<Unit> = Vec::with_capacity(x.groups());
        let row = w.row(first_row + i);
        unpack_row(w.block_type(), row, &mut q, &mut units);
        for (t, out) in out.iter_mut().enumerate() {
            out[i] = dot(&units, &q, x, t);
        }
    }
}

/// A row times token t: `Σ_i (d_i x_i) a_i - (dmin_i x_i) b_i` over the blocks i, where x_i is the
/// scale of the activations, `a_i = Σ_g scale_g Σ_c q_c x_c` and `b_i = Σ_g min_g Σ_c x_c` over the
/// groups g of sixteen columns c.
///
/// Every product with `a_i` and `b_i` is a fused multiply-add onto partial sum `i % LANES`; the
/// partial sums are added in order.
fn dot(units: &[Unit], q: &[i8], x: &Quantized, t: usize) -> f32 {
    let q = q.chunks_exact(x.group);
    let values = x.values[t * x.cols..][..x.cols].chunks_exact(x.group);
    let scales = &x.scales[t * x.groups()..][..x.groups()];
    let sums = x.sums[t * x.cols / SUM_GROUP..].chunks_exact(x.group / SUM_GROUP);
    let mut lanes = [0.0f32; LANES];
    let blocks = units.iter().zip(q).zip(values).zip(scales).zip(sums);
    for (i, ((((unit, q), values), scale), sums)) in blocks.enumerate() {
        let (a, b) = integers(unit, q, values, sums);
        let lane = &mut lanes[i % LANES];
        *lane = (f16_to_f32(unit.d) * scale).mul_add(a as f32, *lane);
        if let Some(minus_dmin) = unit.minus_dmin {
            *lane = (f16_to_f32(minus_dmin) * scale).mul_add(b as f32, *lane);
        }
    }
    lanes.iter().fold(0.0, |sum, lane| sum + lane)
}

/// The integer parts of a block. The largest `|a|`, that of Q6_K, is 2^27.
fn integers(unit: &Unit, q: &[i8], values: &[i8], sums: &[i16]) -> (i32, i32) {
    let (mut a, mut b) = (0, 0);
    let groups = values.chunks_exact(SUM_GROUP).zip(sums);
    for (g, (values, sum)) in groups.enumerate() {
        let q = &q[g * SUM_GROUP..][..SUM_GROUP];
        let products = q
            .iter()
            .zip(values)
            .map(|(q, x)| i32::from(*q) * i32::from(*x));
        a += i32::from(unit.scales[g]) * products.sum::<i32>();
        b += i32::from(unit.mins[g]) * i32::from(*sum);
    }
    (a, b)
}
