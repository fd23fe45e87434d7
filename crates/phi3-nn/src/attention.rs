//! The one attention function: softmax(q·kᵀ·scale)·v over what a pattern lets a query see.
//!
//! Queries of a packed batch attend per sequence to that sequence's own cache. On the CPU this runs
//! in `phi3-kernels`, elsewhere in candle operations; both give the same numbers.

use candle_core::{DType, Device, Tensor};
use phi3_kernels::AttentionShape;

use crate::error::{Error, Result};
use crate::host;
use crate::layer_cache::LayerView;
use crate::packed::Packed;

/// Which keys a query sees. A query at position i always sees itself and never what comes after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionPattern {
    /// Every key at j <= i.
    Causal,
    /// The `w` keys at i - w < j <= i, itself included; `w` is at least 1. The cache of such a
    /// layer keeps only the window.
    SlidingWindow(usize),
}

impl AttentionPattern {
    /// The window, if there is one.
    pub fn window(self) -> Option<usize> {
        match self {
            Self::Causal => None,
            Self::SlidingWindow(window) => Some(window.max(1)),
        }
    }
}

/// What distinguishes one layer's attention from another's.
#[derive(Clone, Copy, Debug)]
pub struct AttentionParams {
    /// The layer, as its cache counts it.
    pub layer_idx: usize,
    /// What a query sees.
    pub pattern: AttentionPattern,
    /// Multiplies q·k: 1/√d in most models.
    pub scale: f32,
}

/// Attention of a packed batch: appends `keys` and `values` to the caches and lets every query
/// attend to its sequence.
///
/// `queries` `[n, h, d]`, `keys` and `values` `[n, k, d]`, already rotated; query head i reads
/// key/value head i / (h/k). Returns `[n, h*d]`. Softmax runs in f32.
///
/// # Errors
/// [`Error::Batch`] if the tensors do not fit the batch or its caches, [`Error::Candle`] if a
/// tensor operation fails.
pub fn attention(
    queries: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    params: AttentionParams,
    packed: &mut Packed<'_, '_>,
) -> Result<Tensor> {
    let (rows, num_heads, head_dim) = queries.dims3()?;
    let (_, num_kv_heads, _) = keys.dims3()?;
    if num_kv_heads == 0 || num_heads % num_kv_heads != 0 {
        return Err(Error::Batch(format!(
            "{num_heads} query heads cannot share {num_kv_heads} key/value heads"
        )));
    }
    let mut outputs = Vec::new();
    for sequence in packed.sequences_mut() {
        let (start, len) = (sequence.rows.start, sequence.rows.len());
        let q = queries.narrow(0, start, len)?;
        let k = keys.narrow(0, start, len)?;
        let v = values.narrow(0, start, len)?;
        let tracked = q.track_op() || k.track_op() || v.track_op();
        let out = if tracked {
            // Training: one pass over whole sequences, with gradients and without a cache.
            if sequence.start > 0 {
                return Err(Error::Batch(
                    "a pass that tracks gradients must hold its sequences from their first token"
                        .to_owned(),
                ));
            }
            let (k, v) = (k.transpose(0, 1)?, v.transpose(0, 1)?);
            attend_with_candle(&q, &k, &v, 0, 0, params)?
        } else {
            let q_start = sequence.start;
            let cache = sequence.cache.append(params.layer_idx, q_start, &k, &v)?;
            let k_start = cache.first();
            match cache.view()? {
                LayerView::Host { keys, values } => {
                    attend_on_host(&q, keys, values, q_start, k_start, params)?
                }
                LayerView::Device { keys, values } => {
                    attend_with_candle(&q, keys, values, q_start, k_start, params)?
                }
            }
        };
        outputs.push(out);
    }
    match outputs.as_slice() {
        [] => Ok(queries.reshape((rows, num_heads * head_dim))?),
        [one] => Ok(one.clone()),
        several => Ok(Tensor::cat(several, 0)?),
    }
}

/// One sequence in `phi3-kernels`: q `[l, h, d]`, per key/value head `[s, d]`, to `[l, h*d]`.
fn attend_on_host(
    q: &Tensor,
    keys: &[Vec<f32>],
    values: &[Vec<f32>],
    q_start: usize,
    k_start: usize,
    params: AttentionParams,
) -> Result<Tensor> {
    let (len, num_heads, head_dim) = q.dims3()?;
    let group = num_heads / keys.len().max(1);
    let shape = AttentionShape {
        head_dim,
        q_start,
        k_start,
        window: params.pattern.window(),
        scale: params.scale,
    };
    let out = host::with_f32(q, |q| {
        let mut out = vec![0f32; len * num_heads * head_dim];
        let mut head_q = vec![0f32; len * head_dim];
        let mut head_out = vec![0f32; len * head_dim];
        for head in 0..num_heads {
            let columns = head * head_dim..(head + 1) * head_dim;
            let rows = q.chunks_exact(num_heads * head_dim);
            for (row, packed) in rows.zip(head_q.chunks_exact_mut(head_dim)) {
                packed.copy_from_slice(&row[columns.clone()]);
            }
            let kv_head = head / group;
            phi3_kernels::attend(
                &head_q,
                &keys[kv_head],
                &values[kv_head],
                shape,
                &mut head_out,
            );
            let rows = out.chunks_exact_mut(num_heads * head_dim);
            for (row, packed) in rows.zip(head_out.chunks_exact(head_dim)) {
                row[columns.clone()].copy_from_slice(packed);
            }
        }
        out
    })?;
    Ok(Tensor::from_vec(
        out,
        (len, num_heads * head_dim),
        &Device::Cpu,
    )?)
}

/// One sequence in candle operations: q `[l, h, d]`, k and v `[k, s, d]` to `[l, h*d]`. Any device,
/// differentiable; the oracle of the kernels.
fn attend_with_candle(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    q_start: usize,
    k_start: usize,
    params: AttentionParams,
) -> Result<Tensor> {
    let (len, num_heads, head_dim) = q.dims3()?;
    let (num_kv_heads, num_keys, _) = k.dims3()?;
    let group = num_heads / num_kv_heads;
    // The queries that share a key/value head are rows of one product: no key is repeated.
    let q = q
        .transpose(0, 1)? // [h, l, d]
        .contiguous()?
        .reshape((num_kv_heads, group * len, head_dim))?;
    let k = k.to_dtype(q.dtype())?.contiguous()?;
    let v = v.to_dtype(q.dtype())?.contiguous()?;
    let scores = q.matmul(&k.transpose(1, 2)?.contiguous()?)?; // [k, g*l, s]
    let scores = (scores.to_dtype(DType::F32)? * f64::from(params.scale))?;
    let mask = additive_mask(len, num_keys, q_start, k_start, params.pattern, q.device())?;
    let scores = scores
        .reshape((num_kv_heads * group, len, num_keys))?
        .broadcast_add(&mask)?;
    let weights = candle_nn::ops::softmax(&scores, 2)?; // has a backward, unlike softmax_last_dim
    let out = weights
        .to_dtype(q.dtype())?
        .reshape((num_kv_heads, group * len, num_keys))?
        .matmul(&v)? // [k, g*l, d]
        .reshape((num_heads, len, head_dim))?;
    Ok(out
        .transpose(0, 1)?
        .contiguous()?
        .reshape((len, num_heads * head_dim))?)
}

/// `[l, s]`: 0 where a query sees a key, -inf where it does not.
fn additive_mask(
    len: usize,
    num_keys: usize,
    q_start: usize,
    k_start: usize,
    pattern: AttentionPattern,
    device: &Device,
) -> Result<Tensor> {
    let window = pattern.window().unwrap_or(usize::MAX);
    let mut mask = Vec::with_capacity(len * num_keys);
    for i in q_start..q_start + len {
        for j in k_start..k_start + num_keys {
            let visible = j <= i && i - j < window;
            mask.push(if visible { 0f32 } else { f32::NEG_INFINITY });
        }
    }
    Ok(Tensor::from_vec(mask, (len, num_keys), device)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both forms on random queries of a chunk that continues a longer sequence.
    #[test]
    fn kernels_equal_the_candle_oracle() -> Result<()> {
        for (num_heads, num_kv_heads, head_dim) in [(4, 4, 16), (6, 2, 24), (5, 1, 8)] {
            for pattern in [AttentionPattern::Causal, AttentionPattern::SlidingWindow(3)] {
                let (q_start, k_start, len) = (9, 4, 5);
                let num_keys = q_start + len - k_start;
                let random = |shape| Tensor::randn(0f32, 1.0, shape, &Device::Cpu);
                let q = random((len, num_heads, head_dim))?;
                let k = random((num_kv_heads, num_keys, head_dim))?;
                let v = random((num_kv_heads, num_keys, head_dim))?;
                let params = AttentionParams {
                    layer_idx: 0,
                    pattern,
                    scale: 0.3,
                };
                let heads = |x: &Tensor| -> Result<Vec<Vec<f32>>> {
                    (0..num_kv_heads)
                        .map(|head| host::to_vec_f32(&x.get(head)?))
                        .collect()
                };
                let fast = attend_on_host(&q, &heads(&k)?, &heads(&v)?, q_start, k_start, params)?;
                let slow = attend_with_candle(&q, &k, &v, q_start, k_start, params)?;
                let difference = (fast - slow)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(
                    difference < 1e-5,
                    "{num_heads} heads, {pattern:?}: {difference}"
                );
            }
        }
        Ok(())
    }
}
