//! The one attention function: softmax(q·kᵀ·scale)·v over what a pattern lets a query see.
//!
//! Queries of a packed batch attend per sequence to that sequence's own cache. On the CPU this runs
//! in `phi3-kernels`, elsewhere in candle operations; both give the same numbers.

use candle_core::{DType, Device, Tensor};
use phi3_kernels::{AttentionJob, AttentionShape, BlockSparseLayout};

use crate::error::{Error, Result};
use crate::host;
use crate::layer_cache::LayerCache;
use crate::packed::{Packed, Sequence};
use crate::sparse_attention::{attend_block_sparse, attend_gathered};

/// Which keys a query sees. A query at position i always sees itself and never what comes after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionPattern {
    /// Every key at j <= i.
    Causal,
    /// The `w` keys at i - w < j <= i, itself included; `w` is at least 1. The cache of such a
    /// layer keeps only the window.
    SlidingWindow(usize),
    /// The keys at j <= i in the blocks that the layout shows to the query's block and head.
    BlockSparse(BlockSparseLayout),
}

impl AttentionPattern {
    /// The pattern that `sliding_window` of a config.json means.
    ///
    /// # Errors
    /// [`Error::Config`] for a window of 0.
    pub fn from_sliding_window(
        sliding_window: Option<usize>,
        max_position_embeddings: usize,
    ) -> Result<Self> {
        match sliding_window {
            Some(0) => Err(Error::config(
                "sliding_window is 0; a query sees at least itself",
            )),
            // A window that no sequence can outgrow hides nothing.
            Some(window) if window < max_position_embeddings => Ok(Self::SlidingWindow(window)),
            _ => Ok(Self::Causal),
        }
    }

    /// Whether the query at position `i` of query head `head` sees the key at position `j`.
    pub fn sees(self, head: usize, i: usize, j: usize) -> bool {
        j <= i
            && match self {
                Self::Causal => true,
                Self::SlidingWindow(window) => i - j < window.max(1),
                Self::BlockSparse(layout) => {
                    layout.sees(head, i / layout.block_size(), j / layout.block_size())
                }
            }
    }

    /// The window, if there is one.
    pub fn window(self) -> Option<usize> {
        match self {
            Self::Causal | Self::BlockSparse(_) => None,
            Self::SlidingWindow(window) => Some(window.max(1)),
        }
    }

    /// The first position that the query at `len`, or one behind it, sees.
    pub(crate) fn first_reachable(self, len: usize) -> usize {
        let window = self.window().unwrap_or(usize::MAX);
        len.saturating_add(1).saturating_sub(window)
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
    let tracked = queries.track_op() || keys.track_op() || values.track_op();
    let mut sequences: Vec<_> = packed.sequences_mut().collect();
    if !tracked && sequences.iter().all(|s| s.cache.is_paged()) {
        return attend_with_kernels(queries, keys, values, params, &mut sequences);
    }
    let mut outputs = Vec::new();
    for sequence in sequences {
        let (start, len) = (sequence.rows.start, sequence.rows.len());
        let q = queries.narrow(0, start, len)?;
        let k = keys.narrow(0, start, len)?;
        let v = values.narrow(0, start, len)?;
        let q_start = sequence.start;
        outputs.push(if tracked {
            // Training: one pass over whole sequences, with gradients and without a cache.
            if q_start > 0 {
                return Err(Error::Batch(
                    "a pass that tracks gradients must hold its sequences from their first token"
                        .to_owned(),
                ));
            }
            let (k, v) = (k.transpose(0, 1)?, v.transpose(0, 1)?);
            attend_with_candle(&q, &k, &v, 0, 0, params)?
        } else {
            let LayerCache::Tensors(cache) = sequence.cache.layer_mut(params.layer_idx)? else {
                return Err(Error::Batch(
                    "it mixes caches of the kernels with those of candle".to_owned(),
                ));
            };
            let k_start = cache.first();
            let (k, v) = cache.append(q_start, &k, &v)?;
            match params.pattern {
                // On the CPU the mask stays: the oracle of everything else.
                AttentionPattern::BlockSparse(layout) if !q.device().is_cpu() => {
                    attend_gathered(&q, k, v, q_start, params.scale, layout)?
                }
                _ => attend_with_candle(&q, k, v, q_start, k_start, params)?,
            }
        });
    }
    match outputs.as_slice() {
        [] => Ok(queries.reshape((rows, num_heads * head_dim))?),
        [one] => Ok(one.clone()),
        several => Ok(Tensor::cat(several, 0)?),
    }
}

/// All sequences of a batch in one call of `phi3-kernels`.
fn attend_with_kernels(
    queries: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    params: AttentionParams,
    sequences: &mut [Sequence<'_>],
) -> Result<Tensor> {
    if let AttentionPattern::BlockSparse(layout) = params.pattern {
        return attend_block_sparse(queries, keys, values, params, layout, sequences);
    }
    let (rows, num_heads, head_dim) = queries.dims3()?;
    let (_, num_kv_heads, _) = keys.dims3()?;
    let kv_width = num_kv_heads * head_dim;
    let mut appended: Vec<_> = sequences.iter_mut().map(|it| (it, Ok(()))).collect();
    host::with_f32(keys, |keys| {
        host::with_f32(values, |values| {
            // The places of a token's heads lie far apart, and waiting for them is most of the time.
            phi3_kernels::for_each(&mut appended, |_, (sequence, result)| {
                let own = sequence.rows.start * kv_width..sequence.rows.end * kv_width;
                let pages = sequence.cache.pages_mut(params.layer_idx);
                *result = pages.and_then(|pages| {
                    pages.check(num_kv_heads, head_dim)?;
                    pages.append(sequence.start, &keys[own.clone()], &values[own])
                });
            });
        })
    })??;
    appended.into_iter().try_for_each(|(_, result)| result)?;
    let layers: Vec<_> = sequences
        .iter()
        .map(|sequence| sequence.cache.pages(params.layer_idx))
        .collect::<Result<_>>()?;
    let views: Vec<_> = layers.iter().map(|pages| pages.view()).collect();

    let width = num_heads * head_dim;
    let mut out = vec![0f32; rows * width];
    host::with_f32(queries, |q| {
        let mut rest = out.as_mut_slice();
        let mut jobs = Vec::with_capacity(sequences.len());
        for ((sequence, pages), view) in sequences.iter().zip(&layers).zip(&views) {
            let len = sequence.rows.len();
            let (out, after) = std::mem::take(&mut rest).split_at_mut(len * width);
            rest = after;
            let q = &q[sequence.rows.start * width..sequence.rows.end * width];
            jobs.push(AttentionJob {
                q,
                out,
                pages: view.pages(),
                page_heads: pages.shape().heads,
                page_len: pages.shape().len,
                len: sequence.start + len,
                num_heads,
                num_kv_heads,
                layout: None,
                shape: AttentionShape {
                    head_dim,
                    q_start: sequence.start,
                    k_start: 0,
                    window: params.pattern.window(),
                    scale: params.scale,
                },
            });
        }
        phi3_kernels::attend_packed(&mut jobs);
    })?;
    Ok(Tensor::from_vec(out, (rows, width), &Device::Cpu)?)
}

/// One sequence in candle operations: q `[l, h, d]`, k and v `[k, s, d]` to `[l, h*d]`. Any device,
/// differentiable; the oracle of the kernels.
pub(crate) fn attend_with_candle(
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
    let mask = additive_mask(
        (num_heads, len, num_keys),
        q_start,
        k_start,
        params.pattern,
        q.device(),
    )?;
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

/// 0 where a query sees a key, -inf where it does not: `[h, l, s]` where heads differ, else
/// `[1, l, s]`.
fn additive_mask(
    (num_heads, len, num_keys): (usize, usize, usize),
    q_start: usize,
    k_start: usize,
    pattern: AttentionPattern,
    device: &Device,
) -> Result<Tensor> {
    let heads = match pattern {
        AttentionPattern::BlockSparse(_) => num_heads,
        _ => 1,
    };
    let mut mask = Vec::with_capacity(heads * len * num_keys);
    for head in 0..heads {
        for i in q_start..q_start + len {
            for j in k_start..k_start + num_keys {
                let visible = pattern.sees(head, i, j);
                mask.push(if visible { 0f32 } else { f32::NEG_INFINITY });
            }
        }
    }
    Ok(Tensor::from_vec(mask, (heads, len, num_keys), device)?)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::cache_type::{CacheStore, CacheType};
    use crate::kv_cache::{CacheSpec, KvCache, Recompute};

    /// Largest difference that an f16 cache makes to values of deviation 1. Measured: 1.1e-3.
    const F16_CACHE_TOLERANCE: f32 = 5e-3;

    /// The same of a q8_0 cache. Measured: 2.2e-2.
    const Q8_0_CACHE_TOLERANCE: f32 = 5e-2;

    /// Both forms on random queries of a chunk that continues a longer sequence, beside another
    /// sequence.
    #[test]
    fn kernels_equal_the_candle_oracle() -> Result<()> {
        for (cache_type, tolerance) in [
            (CacheType::F32, 1e-5),
            (CacheType::F16, F16_CACHE_TOLERANCE),
            (CacheType::Q8_0, Q8_0_CACHE_TOLERANCE),
        ] {
            let mut largest = 0f32;
            for (num_heads, num_kv_heads, head_dim) in [(4, 4, 16), (6, 2, 24), (5, 1, 8)] {
                for pattern in [AttentionPattern::Causal, AttentionPattern::SlidingWindow(3)] {
                    let heads = (num_heads, num_kv_heads, head_dim);
                    // Pages end at 256.
                    let spans = [(9, 5), (250, 20)];
                    let difference = difference_to_candle(heads, pattern, cache_type, &spans)?;
                    assert!(
                        difference < tolerance,
                        "{num_heads} heads, {pattern:?}, {cache_type}: {difference}"
                    );
                    largest = largest.max(difference);
                }
            }
            println!("{cache_type}: {largest:e}");
            assert!(largest > tolerance / 1000.0, "{cache_type}: {largest}");
        }
        Ok(())
    }

    /// Layouts, head counts, chunks and lengths of every kind: touching the visible blocks alone
    /// gives what a mask over all keys gives.
    #[test]
    fn block_sparse_kernels_equal_the_dense_oracle() -> Result<()> {
        let mut state = 1u64;
        let mut pick = |first: usize, last: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
            first + (state >> 33) as usize % (last - first + 1)
        };
        for case in 0..200 {
            let (num_kv_heads, group) = (pick(1, 3), pick(1, 4));
            let num_heads = num_kv_heads * group;
            let layout = BlockSparseLayout::new(
                num_heads,
                [1, 4, 16, 64][pick(0, 3)],
                pick(1, 5),
                pick(1, 9),
                pick(0, 3) == 0,
            );
            let pattern = AttentionPattern::BlockSparse(
                layout
                    .ok_or_else(|| Error::Batch("a layout of such numbers is valid".to_owned()))?,
            );
            let spans: Vec<_> = (0..pick(1, 3))
                .map(|_| (pick(0, 300), [1, pick(1, 9), pick(1, 150)][pick(0, 2)]))
                .collect();
            let heads = (num_heads, num_kv_heads, 8);
            let difference = difference_to_candle(heads, pattern, CacheType::F32, &spans)?;
            assert!(
                difference < 1e-5,
                "case {case}, {heads:?}, {pattern:?}, {spans:?}: {difference}"
            );
        }
        Ok(())
    }

    /// `spans`: positions before, and of, the chunk of each sequence.
    fn difference_to_candle(
        (num_heads, num_kv_heads, head_dim): (usize, usize, usize),
        pattern: AttentionPattern,
        cache_type: CacheType,
        spans: &[(usize, usize)],
    ) -> Result<f32> {
        let spec = Arc::new(CacheSpec {
            patterns: vec![pattern],
            num_key_value_heads: num_kv_heads,
            head_dim,
            rope_limit: None,
            recompute: Recompute::Always,
            max_len: usize::MAX,
            store: CacheStore::Pages(cache_type),
        });
        let params = AttentionParams {
            layer_idx: 0,
            pattern,
            scale: 0.3,
        };
        // The same numbers in every run, since the largest error of any has no bound. A sum of twelve
        // uniform numbers has a variance of 1.
        let mut state = 1u64;
        let mut normal = || -> f32 {
            let uniform = |_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
                (state >> 40) as f32 / (1u32 << 24) as f32
            };
            (0..12).map(uniform).sum::<f32>() - 6.0
        };
        let mut random = |shape: (usize, usize, usize)| {
            let values = (0..shape.0 * shape.1 * shape.2).map(|_| normal());
            Tensor::from_vec(values.collect::<Vec<_>>(), shape, &Device::Cpu)
        };
        let (mut caches, mut all) = (Vec::new(), Vec::new());
        let (mut batch, mut expected) = (vec![Vec::new(); 3], Vec::new());
        for &(before, len) in spans {
            let q = random((len, num_heads, head_dim))?;
            let k = random((before + len, num_kv_heads, head_dim))?;
            let v = random((before + len, num_kv_heads, head_dim))?;
            let mut cache = KvCache::new(Arc::clone(&spec));
            let (old_k, old_v) = (k.narrow(0, 0, before)?, v.narrow(0, 0, before)?);
            cache.pages_mut(0)?.append(
                0,
                &host::to_vec_f32(&old_k)?,
                &host::to_vec_f32(&old_v)?,
            )?;
            caches.push(cache);
            all.push((before, len));
            batch[0].push(q.clone());
            batch[1].push(k.narrow(0, before, len)?);
            batch[2].push(v.narrow(0, before, len)?);
            let (k, v) = (k.transpose(0, 1)?, v.transpose(0, 1)?);
            expected.push(attend_with_candle(&q, &k, &v, before, 0, params)?);
        }
        let mut rows = 0;
        let mut sequences: Vec<_> = caches
            .iter_mut()
            .zip(&all)
            .map(|(cache, (start, len))| {
                rows += len;
                Sequence {
                    rows: rows - len..rows,
                    start: *start,
                    cache,
                }
            })
            .collect();
        let [q, k, v] = [&batch[0], &batch[1], &batch[2]].map(|part| Tensor::cat(part, 0));
        let found = attend_with_kernels(&q?, &k?, &v?, params, &mut sequences)?;
        let difference = (found - Tensor::cat(&expected, 0)?)?.abs()?.max_all()?;
        Ok(difference.to_scalar::<f32>()?)
    }
}
