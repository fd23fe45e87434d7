//! Attention without a mask and without a cache: every row of a sequence sees every other, as in
//! an image tower.

use candle_core::{D, DType, Device, Tensor};
use phi3_kernels::{AttentionJob, AttentionShape, KvPage, KvPages};

use crate::error::{Error, Result};
use crate::host;

/// softmax(q·kᵀ·scale)·v within each sequence of `len` rows.
///
/// `qkv` is `[b·len, 3·h·d]`, rows of all queries, all keys and all values of a position, each in
/// order of the heads; the result `[b·len, h·d]`. Softmax runs in f32.
///
/// ```
/// use candle_core::{Device, Tensor};
/// // Two rows that see each other with equal weights, one head of one element.
/// let qkv = Tensor::new(&[[0f32, 1., 10.], [0., 2., 20.]], &Device::Cpu)?;
/// let out = phi3_nn::full_attention(&qkv, 1, 2, 1.0)?;
/// assert_eq!(out.to_vec2::<f32>()?, [[15.], [15.]]);
/// # Ok::<(), phi3_nn::Error>(())
/// ```
///
/// # Errors
/// [`Error::Batch`] if the shape is not whole sequences or heads, [`Error::Candle`] if a tensor
/// operation fails.
pub fn full_attention(qkv: &Tensor, num_heads: usize, len: usize, scale: f32) -> Result<Tensor> {
    let (rows, columns) = qkv.dims2()?;
    let whole = |n: usize, of: usize| of > 0 && n > 0 && n.is_multiple_of(of);
    if !whole(rows, len) || !whole(columns, num_heads.saturating_mul(3)) {
        return Err(Error::Batch(format!(
            "{rows} rows of {columns} are not sequences of {len} with {num_heads} heads"
        )));
    }
    if qkv.device().is_cpu() && !qkv.track_op() {
        attend_with_kernels(qkv, num_heads, len, scale)
    } else {
        attend_with_candle(qkv, num_heads, len, scale)
    }
}

fn attend_with_kernels(qkv: &Tensor, num_heads: usize, len: usize, scale: f32) -> Result<Tensor> {
    let (rows, columns) = qkv.dims2()?;
    let width = columns / 3;
    let head_dim = width / num_heads;
    // Keys and values lie head-major, as the kernels read them.
    let mut q = vec![0f32; rows * width];
    let (mut keys, mut values) = (vec![0f32; rows * width], vec![0f32; rows * width]);
    host::with_f32(qkv, |qkv| {
        let sequence = len * width;
        let parts = (q
            .chunks_exact_mut(sequence)
            .zip(qkv.chunks_exact(3 * sequence)))
        .zip(keys.chunks_exact_mut(sequence))
        .zip(values.chunks_exact_mut(sequence));
        for (((q, qkv), keys), values) in parts {
            for (row, (q, qkv)) in (q.chunks_exact_mut(width))
                .zip(qkv.chunks_exact(columns))
                .enumerate()
            {
                let (own_q, kv) = qkv.split_at(width);
                let (own_keys, own_values) = kv.split_at(width);
                q.copy_from_slice(own_q);
                for (all, own) in [(&mut *keys, own_keys), (&mut *values, own_values)] {
                    let heads = all.chunks_exact_mut(len * head_dim);
                    for (head, own) in heads.zip(own.chunks_exact(head_dim)) {
                        head[row * head_dim..][..head_dim].copy_from_slice(own);
                    }
                }
            }
        }
    })?;
    let mut out = vec![0f32; rows * width];
    let pages: Vec<_> = keys
        .chunks_exact(len * width)
        .zip(values.chunks_exact(len * width))
        .map(|(keys, values)| [KvPage { keys, values }])
        .collect();
    let mut jobs: Vec<_> = (q.chunks_exact(len * width))
        .zip(out.chunks_exact_mut(len * width))
        .zip(&pages)
        .map(|((q, out), pages)| AttentionJob {
            q,
            out,
            pages: KvPages::F32(pages),
            page_heads: num_heads,
            page_len: len,
            len,
            num_heads,
            num_kv_heads: num_heads,
            layout: None,
            shape: AttentionShape {
                head_dim,
                // Queries that all come after the last key see all of them.
                q_start: len,
                k_start: 0,
                window: None,
                scale,
            },
        })
        .collect();
    phi3_kernels::attend_packed(&mut jobs);
    Ok(Tensor::from_vec(out, (rows, width), &Device::Cpu)?)
}

/// The same in candle operations: any device, differentiable; the oracle of the kernels.
fn attend_with_candle(qkv: &Tensor, num_heads: usize, len: usize, scale: f32) -> Result<Tensor> {
    let (rows, columns) = qkv.dims2()?;
    let (b, d) = (rows / len, columns / 3 / num_heads);
    let heads = qkv
        .reshape((b, len, 3, num_heads, d))?
        .permute((2, 0, 3, 1, 4))? // [3, b, h, len, d]
        .contiguous()?;
    let (q, k, v) = (heads.get(0)?, heads.get(1)?, heads.get(2)?);
    let scores = q.matmul(&k.transpose(2, 3)?.contiguous()?)?; // [b, h, len, len]
    let scores = (scores.to_dtype(DType::F32)? * f64::from(scale))?;
    let weights = candle_nn::ops::softmax(&scores, D::Minus1)?; // has a backward
    let out = weights.to_dtype(qkv.dtype())?.matmul(&v)?; // [b, h, len, d]
    Ok(out
        .transpose(1, 2)?
        .contiguous()?
        .reshape((rows, num_heads * d))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lengths around the kernels' tiles of 256 keys, and CLIP's own.
    #[test]
    fn kernels_equal_the_candle_oracle() -> Result<()> {
        for (num_heads, head_dim, len, b) in [
            (2, 64, 577, 2),
            (3, 8, 1, 4),
            (1, 20, 256, 1),
            (4, 16, 257, 3),
        ] {
            let shape = (b * len, 3 * num_heads * head_dim);
            let qkv = Tensor::randn(0f32, 1.0, shape, &Device::Cpu)?;
            let fast = attend_with_kernels(&qkv, num_heads, len, 0.3)?;
            let slow = attend_with_candle(&qkv, num_heads, len, 0.3)?;
            let difference = (fast - slow)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(
                difference < 1e-5,
                "{num_heads} {head_dim} {len}: {difference}"
            );
        }
        Ok(())
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() -> Result<()> {
        let qkv = Tensor::zeros((6, 12), DType::F32, &Device::Cpu)?;
        for (num_heads, len) in [(3, 6), (0, 6), (2, 4), (2, 0)] {
            assert!(full_attention(&qkv, num_heads, len, 1.0).is_err());
        }
        Ok(())
    }
}
