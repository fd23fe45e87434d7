//! f32 rows to stored blocks: the inverse of [`dequantize`](crate::dequantize), as near as the
//! format allows.
//!
//! Every scale is searched for, not computed from the largest weight: a handful of candidates
//! around that value are rounded to, each gets the least-squares scale (and minimum) of its
//! rounding, and the one with the smallest weighted squared error stays. In the K types the
//! scales of the groups are then rounded to their few bits by the same search, each weighted by
//! what a deviation of it costs, and factors and weights are refined in turn.
//!
//! The error of a weight counts by the importance of its column, where that is known
//! (`importance`: mean squares of the activations that meet it), times `sqrt(mean x² + x²)`,
//! which is how llama.cpp weighs it; without importance every weight counts the same.

mod affine;
mod block32;
mod float;
mod int4;
mod k_affine;
mod k_symmetric;
mod symmetric;

use crate::{BlockType, ShapeError, threads};

/// Magnitude to which weights of quantized types are clipped: the largest half, so that every
/// factor of a block is finite.
const LARGEST: f32 = 65504.0;

/// Weights of at most this magnitude are zero in every quantized type, whose factors are halves.
const SMALLEST: f32 = 1e-15;

/// Encodes rows of `cols` weights each, row after row, into `out`.
///
/// `importance`, one number per column, says how much the error of a column matters; only ratios
/// count. It is ignored by the float types. NaN is stored as such by the float types and as 0
/// by the quantized ones, which also clip to ±65504. The result does not depend on the number of
/// threads nor on the processor.
///
/// # Errors
/// [`ShapeError`] when `cols` is no whole number of blocks, `x` is no whole number of rows, or
/// `out` is not as long as the rows when stored.
///
/// ```
/// use phi3_kernels::{BlockType, dequantize, quantize};
///
/// let x: Vec<f32> = (0..32).map(|i| i as f32 - 8.0).collect();
/// let mut stored = [0; 34];
/// quantize(BlockType::Q8_0, &x, 32, None, &mut stored)?;
/// let mut back = [0.0; 32];
/// dequantize(BlockType::Q8_0, &stored, &mut back)?;
/// assert!(x.iter().zip(back).all(|(x, y)| (x - y).abs() < 0.1));
/// # Ok::<(), phi3_kernels::ShapeError>(())
/// ```
pub fn quantize(
    block_type: BlockType,
    x: &[f32],
    cols: usize,
    importance: Option<&[f32]>,
    out: &mut [u8],
) -> Result<(), ShapeError> {
    let row_bytes = block_type.row_bytes(cols).ok_or(ShapeError::PartialBlock {
        block_type,
        found: cols,
    })?;
    let length = |what, expected, found| ShapeError::Length {
        what,
        block_type,
        expected,
        found,
    };
    let rows = x.len().checked_div(cols).unwrap_or(0);
    if rows * cols != x.len() {
        return Err(length("weights to quantize", rows * cols, x.len()));
    }
    if out.len() != rows * row_bytes {
        return Err(length("bytes to write", rows * row_bytes, out.len()));
    }
    let importance = match importance {
        Some(importance) if importance.len() != cols => {
            return Err(length("importance of columns", cols, importance.len()));
        }
        Some(importance) => Some(normalized(importance)),
        None => None,
    };
    if x.is_empty() {
        return Ok(());
    }
    // Enough weights that a task is worth its start.
    let rows_per_task = ((1 << 14) / cols).max(1);
    let tasks = x
        .chunks(rows_per_task * cols)
        .zip(out.chunks_mut(rows_per_task * row_bytes));
    threads::for_each(&mut tasks.collect::<Vec<_>>(), |_, (x, out)| {
        for (x, out) in x.chunks(cols).zip(out.chunks_mut(row_bytes)) {
            row(block_type, x, importance.as_deref(), out);
        }
    });
    Ok(())
}

/// Importance between 0 and 1, never all zero: a column that no activation ever met still gets
/// its weights.
fn normalized(importance: &[f32]) -> Vec<f32> {
    let valid = |v: f32| if v.is_finite() { v.max(0.0) } else { 0.0 };
    let largest = importance.iter().fold(0f32, |m, v| m.max(valid(*v)));
    if largest == 0.0 {
        return vec![1.0; importance.len()];
    }
    let scaled = |v: &f32| (valid(*v) / largest).max(1e-6);
    importance.iter().map(scaled).collect()
}

fn row(block_type: BlockType, x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2, as was just found.
        return unsafe { row_avx2(block_type, x, importance, out) };
    }
    row_inline(block_type, x, importance, out);
}

/// [`row_inline`] with wider registers. Every operation is the same, without fused ones, so that
/// the bits are too.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn row_avx2(block_type: BlockType, x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    row_inline(block_type, x, importance, out);
}

#[inline(always)]
fn row_inline(block_type: BlockType, x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    let row = Row { x, importance };
    match block_type {
        BlockType::F32 => float::f32(x, out),
        BlockType::F16 => float::f16(x, out),
        BlockType::BF16 => float::bf16(x, out),
        BlockType::Q4_0 => row.blocks(out, block32::q4_0),
        BlockType::Q4_1 => row.blocks(out, block32::q4_1),
        BlockType::Q5_0 => row.blocks(out, block32::q5_0),
        BlockType::Q5_1 => row.blocks(out, block32::q5_1),
        BlockType::Q8_0 => row.blocks(out, block32::q8_0),
        BlockType::IQ4NL => row.blocks(out, block32::iq4_nl),
        BlockType::Int4 => row.blocks(out, int4::int4),
        BlockType::Q2K => row.blocks(out, k_affine::q2_k),
        BlockType::Q3K => row.blocks(out, k_symmetric::q3_k),
        BlockType::Q4K => row.blocks(out, k_affine::q4_k),
        BlockType::Q5K => row.blocks(out, k_affine::q5_k),
        BlockType::Q6K => row.blocks(out, k_symmetric::q6_k),
    }
}

/// A row and how much its columns matter.
struct Row<'a> {
    x: &'a [f32],
    importance: Option<&'a [f32]>,
}

impl Row<'_> {
    /// Calls `encode(weights, how much each counts, block)` for every block of the row.
    #[inline(always)]
    fn blocks<const LEN: usize, const BYTES: usize>(
        &self,
        out: &mut [u8],
        encode: impl Fn(&[f32; LEN], &[f32; LEN], &mut [u8; BYTES]),
    ) {
        let (blocks, _) = self.x.as_chunks::<LEN>();
        let (outs, _) = out.as_chunks_mut::<BYTES>();
        for (i, (x, out)) in blocks.iter().zip(outs).enumerate() {
            let x = x.map(valid);
            let mut counts = [1.0; LEN];
            if let Some(importance) = self.importance {
                let mean = x.iter().map(|x| x * x).sum::<f32>() / LEN as f32;
                for ((count, x), importance) in
                    counts.iter_mut().zip(&x).zip(&importance[i * LEN..])
                {
                    *count = importance * (mean + x * x).sqrt();
                }
            }
            encode(&x, &counts, out);
        }
    }
}

#[inline(always)]
fn valid(x: f32) -> f32 {
    if x.is_nan() {
        0.0
    } else {
        x.clamp(-LARGEST, LARGEST)
    }
}

/// To the nearest integer, for magnitudes below 2^22; ties to even. Unlike `f32::round` it is two
/// additions on every processor.
#[inline(always)]
fn round(v: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0; // 1.5 · 2^23
    (v + SHIFT) - SHIFT
}

#[cfg(test)]
mod tests;
