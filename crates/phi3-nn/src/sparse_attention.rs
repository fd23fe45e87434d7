//! Block-sparse attention on the pages of a cache: only the blocks that a query sees are touched.
//!
//! The pages of a block-sparse layer hold one block of one key/value head, which is what the kernels
//! ask for; work and memory grow with the visible blocks.
//!
//! A long span goes through in steps, and what no later query reaches is freed after each.

use candle_core::{DType, Device, Tensor};
use phi3_kernels::{AttentionJob, AttentionShape, BlockSparseLayout};

use crate::attention::AttentionParams;
use crate::error::Result;
use crate::host;
use crate::packed::Sequence;

/// Positions of a step: enough tiles for any number of threads, and little memory beside the
/// blocks that stay.
const STEP: usize = 1024;

/// [`crate::attention::attention`] of a block-sparse layer in the kernels.
pub(crate) fn attend_block_sparse(
    queries: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    params: AttentionParams,
    layout: BlockSparseLayout,
    sequences: &mut [Sequence<'_>],
) -> Result<Tensor> {
    let (rows, num_heads, head_dim) = queries.dims3()?;
    let (_, num_kv_heads, _) = keys.dims3()?;
    let (width, kv_width) = (num_heads * head_dim, num_kv_heads * head_dim);
    let step = layout.block_size() * (STEP / layout.block_size()).max(1);
    let mut out = vec![0f32; rows * width];
    let mut run = |q: &[f32], keys: &[f32], values: &[f32]| -> Result<()> {
        for sequence in sequences.iter_mut() {
            let pages = sequence.cache.pages_mut(params.layer_idx)?;
            pages.check(num_kv_heads, head_dim)?;
            let mut row = sequence.rows.start;
            while row < sequence.rows.end {
                let start = sequence.start + row - sequence.rows.start;
                let len = (step - start % step).min(sequence.rows.end - row);
                let (of_q, of_k) = (
                    row * width..(row + len) * width,
                    row * kv_width..(row + len) * kv_width,
                );
                pages.append(start, &keys[of_k.clone()], &values[of_k])?;
                phi3_kernels::attend_packed(&mut [AttentionJob {
                    q: &q[of_q.clone()],
                    out: &mut out[of_q],
                    pages: pages.view().pages(),
                    page_heads: pages.shape().heads,
                    page_len: pages.shape().len,
                    len: start + len,
                    num_heads,
                    num_kv_heads,
                    shape: AttentionShape {
                        head_dim,
                        q_start: start,
                        k_start: 0,
                        window: None,
                        scale: params.scale,
                    },
                    layout: Some(layout),
                }]);
                pages.drop_unreachable(params.pattern, start + len);
                row += len;
            }
        }
        Ok(())
    };
    host::with_f32(queries, |q| {
        host::with_f32(keys, |keys| {
            host::with_f32(values, |values| run(q, keys, values))
        })
    })????;
    Ok(Tensor::from_vec(out, (rows, width), &Device::Cpu)?)
}

/// The same in candle operations, for a GPU: q `[l, h, d]` from position `q_start` on, k and v
/// `[k, s, d]` from 0 on, to `[l, h*d]`. For each block of queries the blocks that its heads see are
/// gathered, as many for each head as the one that sees most; nothing else of the cache is touched.
pub(crate) fn attend_gathered(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    q_start: usize,
    scale: f32,
    layout: BlockSparseLayout,
) -> Result<Tensor> {
    let (len, num_heads, d) = q.dims3()?;
    let (num_kv_heads, num_keys, _) = k.dims3()?;
    let (size, group) = (layout.block_size(), num_heads / num_kv_heads);
    let rows_of = |cache: &Tensor| -> Result<Tensor> {
        let cache = cache.to_dtype(q.dtype())?.contiguous()?;
        Ok(cache.reshape((num_kv_heads * num_keys, d))?)
    };
    let (k, v) = (rows_of(k)?, rows_of(v)?); // [k*s, d]
    let mut outputs = Vec::new();
    let mut row = 0;
    while row < len {
        let position = q_start + row;
        let (block, offset) = (position / size, position % size);
        let rows = (size - offset).min(len - row);
        let seen: Vec<Vec<usize>> = (0..num_heads)
            .map(|head| visible(layout, head, block).collect())
            .collect();
        let most = seen.iter().map(Vec::len).max().unwrap_or(0);
        let (mut index, mut hidden) = (Vec::new(), Vec::new());
        for (head, seen) in seen.iter().enumerate() {
            let first = (head / group) * num_keys;
            // What fills a head up comes first and is masked; the queries' own block is last.
            let fill = most - seen.len();
            hidden.resize(hidden.len() + fill * size, f32::NEG_INFINITY);
            hidden.resize(hidden.len() + seen.len() * size, 0.0);
            for block in std::iter::repeat_n(&block, fill).chain(seen) {
                let keys = (block * size..(block + 1) * size).map(|key| key.min(num_keys - 1));
                index.extend(keys.map(|key| (first + key) as u32));
            }
        }
        let own = (most - 1) * size;
        let later = (0..rows * most * size).map(|idx| {
            let (query, key) = (idx / (most * size), idx % (most * size));
            match key > own + offset + query {
                true => f32::NEG_INFINITY,
                false => 0.0,
            }
        });
        let later: Vec<f32> = later.collect();
        let later = Tensor::from_vec(later, (1, rows, most * size), q.device())?;
        let hidden = Tensor::from_vec(hidden, (num_heads, 1, most * size), q.device())?;
        let index = Tensor::from_vec(index, num_heads * most * size, q.device())?;
        let gathered = |cache: &Tensor| -> Result<Tensor> {
            let keys = cache.index_select(&index, 0)?;
            Ok(keys.reshape((num_heads, most * size, d))?)
        };
        let q = q.narrow(0, row, rows)?.transpose(0, 1)?.contiguous()?; // [h, rows, d]
        let scores = q.matmul(&gathered(&k)?.transpose(1, 2)?.contiguous()?)?; // [h, rows, keys]
        let scores = (scores.to_dtype(DType::F32)? * f64::from(scale))?;
        let scores = scores.broadcast_add(&later)?.broadcast_add(&hidden)?;
        let weights = candle_nn::ops::softmax(&scores, 2)?.to_dtype(q.dtype())?;
        let out = weights.matmul(&gathered(&v)?)?; // [h, rows, d]
        let out = out.transpose(0, 1)?.contiguous()?;
        outputs.push(out.reshape((rows, num_heads * d))?);
        row += rows;
    }
    match outputs.is_empty() {
        true => Ok(q.reshape((0, num_heads * d))?),
        false => Ok(Tensor::cat(&outputs, 0)?),
    }
}

/// The blocks that a block of queries sees, in order; the last one is its own.
fn visible(layout: BlockSparseLayout, head: usize, block: usize) -> impl Iterator<Item = usize> {
    let first_local = layout.first_local(block);
    let far = (layout.first_vertical(head)..first_local).step_by(layout.vert_stride());
    far.chain(first_local..=block)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{AttentionPattern, attend_with_candle};
    use crate::error::Error;

    #[test]
    fn gathered_blocks_equal_a_mask_over_all_keys() -> Result<()> {
        let random = |shape| Tensor::randn(0f32, 1.0, shape, &Device::Cpu);
        let mut state = 3u64;
        let mut pick = |first: usize, last: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
            first + (state >> 33) as usize % (last - first + 1)
        };
        for case in 0..200 {
            let (num_kv_heads, group, d) = (pick(1, 3), pick(1, 4), 8);
            let num_heads = num_kv_heads * group;
            let size = [1, 4, 16, 64][pick(0, 3)];
            let homogeneous = pick(0, 3) == 0;
            let layout =
                BlockSparseLayout::new(num_heads, size, pick(1, 5), pick(1, 9), homogeneous)
                    .ok_or_else(|| Error::Batch("a layout".to_owned()))?;
            let (before, len) = (pick(0, 200), [1, pick(1, 9), pick(1, 100)][pick(0, 2)]);
            let q = random((len, num_heads, d))?;
            let k = random((num_kv_heads, before + len, d))?;
            let v = random((num_kv_heads, before + len, d))?;
            let params = AttentionParams {
                layer_idx: 0,
                pattern: AttentionPattern::BlockSparse(layout),
                scale: 0.3,
            };
            let expected = attend_with_candle(&q, &k, &v, before, 0, params)?;
            let found = attend_gathered(&q, &k, &v, before, params.scale, layout)?;
            let difference = (found - expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(difference < 1e-5, "case {case}, {layout:?}: {difference}");
        }
        Ok(())
    }
}
