//! Block-sparse attention on the pages of a cache: only the blocks that a query sees are touched.
//!
//! The pages of a block-sparse layer hold one block of one key/value head. The blocks that a block of
//! queries sees, in order, are handed to the kernels as if they followed one another: the last one
//! is the queries' own, all others lie before it, so that causal attention over this shorter
//! sequence sees exactly what the layout shows. Heads of a key/value head that see the same blocks go
//! together and read each of them once: all heads at the start of a sequence or where the pattern
//! is the same for all, else those whose far blocks are the same. Work and memory grow with the
//! visible blocks.
//!
//! A long span goes through in steps, and what no later query reaches is freed after each.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use phi3_kernels::{AttentionJob, AttentionShape, BlockSparseLayout, KvPage, KvPages};

use crate::attention::AttentionParams;
use crate::error::Result;
use crate::host;
use crate::kv_pages::PageViews;
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
                let mut queries = SparseQueries {
                    q: &q[of_q.clone()],
                    out: &mut out[of_q],
                    start,
                    num_heads,
                    num_kv_heads,
                    head_dim,
                    scale: params.scale,
                };
                attend(&mut queries, &pages.view(), layout);
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

/// Queries that follow one another, and where their results go: `[l, h, d]` each.
struct SparseQueries<'a> {
    q: &'a [f32],
    out: &'a mut [f32],
    /// Position of the first query.
    start: usize,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    scale: f32,
}

/// The queries of one block and of heads that see the same.
struct Tile {
    heads: Range<usize>,
    /// Rows among the queries.
    rows: Range<usize>,
    /// Position of the first of them in its block.
    offset: usize,
    /// Entries of the page table, in order; the last holds the queries' own keys.
    entries: Vec<usize>,
}

/// Attention of `queries` to the pages of a layer.
fn attend(queries: &mut SparseQueries<'_>, view: &PageViews<'_>, layout: BlockSparseLayout) {
    let tiles = tiles(queries, layout);
    match view {
        PageViews::F32(pages) => {
            attend_tiles(queries, &tiles, pages, layout, |pages| KvPages::F32(pages));
        }
        PageViews::F16(pages) => {
            attend_tiles(queries, &tiles, pages, layout, |pages| KvPages::F16(pages));
        }
        PageViews::Q8_0(pages) => {
            attend_tiles(queries, &tiles, pages, layout, |pages| KvPages::Q8_0(pages));
        }
    }
}

fn tiles(queries: &SparseQueries<'_>, layout: BlockSparseLayout) -> Vec<Tile> {
    let block_size = layout.block_size();
    let width = queries.num_heads * queries.head_dim;
    let len = queries.q.len() / width;
    let group = queries.num_heads / queries.num_kv_heads;
    let mut tiles: Vec<Tile> = Vec::new();
    let mut row = 0;
    while row < len {
        let position = queries.start + row;
        let (block, offset) = (position / block_size, position % block_size);
        let rows = row..row + (block_size - offset).min(len - row);
        for head in 0..queries.num_heads {
            let entry = |block: usize| block * queries.num_kv_heads + head / group;
            let entries: Vec<_> = visible(layout, head, block).map(entry).collect();
            match tiles.last_mut() {
                Some(tile) if tile.rows == rows && tile.entries == entries => {
                    tile.heads.end = head + 1;
                }
                _ => tiles.push(Tile {
                    heads: head..head + 1,
                    rows: rows.clone(),
                    offset,
                    entries,
                }),
            }
        }
        row = rows.end;
    }
    tiles
}

/// The blocks that a block of queries sees, in order; the last one is its own.
fn visible(layout: BlockSparseLayout, head: usize, block: usize) -> impl Iterator<Item = usize> {
    let first_local = layout.first_local(block);
    let far = (layout.first_vertical(head)..first_local).step_by(layout.vert_stride());
    far.chain(first_local..=block)
}

fn attend_tiles<'p, T: Copy + 'p>(
    queries: &mut SparseQueries<'_>,
    tiles: &[Tile],
    pages: &[KvPage<'p, T>],
    layout: BlockSparseLayout,
    wrap: impl for<'b> Fn(&'b [KvPage<'b, T>]) -> KvPages<'b>,
) {
    let (d, block_size) = (queries.head_dim, layout.block_size());
    let width = queries.num_heads * d;
    let columns = |tile: &Tile| tile.heads.start * d..tile.heads.end * d;
    // The queries of a tile's heads alone, as a job takes them.
    let mut q = Vec::with_capacity(queries.q.len());
    for tile in tiles {
        for row in queries.q[tile.rows.start * width..tile.rows.end * width].chunks_exact(width) {
            q.extend_from_slice(&row[columns(tile)]);
        }
    }
    let absent = KvPage {
        keys: &[][..],
        values: &[][..],
    };
    let visible: Vec<Vec<KvPage<'_, T>>> = tiles
        .iter()
        .map(|tile| {
            let page = |entry: &usize| pages.get(*entry).copied().unwrap_or(absent);
            tile.entries.iter().map(page).collect()
        })
        .collect();
    let mut out = vec![0f32; q.len()];
    let (mut q_rest, mut out_rest) = (q.as_slice(), out.as_mut_slice());
    let mut jobs = Vec::with_capacity(tiles.len());
    for (tile, visible) in tiles.iter().zip(&visible) {
        let (q, q_after) = q_rest.split_at(tile.rows.len() * tile.heads.len() * d);
        let (out, out_after) = std::mem::take(&mut out_rest).split_at_mut(q.len());
        (q_rest, out_rest) = (q_after, out_after);
        let before = (visible.len() - 1) * block_size;
        jobs.push(AttentionJob {
            q,
            out,
            pages: wrap(visible),
            page_heads: 1,
            page_len: block_size,
            len: before + tile.offset + tile.rows.len(),
            num_heads: tile.heads.len(),
            num_kv_heads: 1,
            shape: AttentionShape {
                head_dim: d,
                q_start: before + tile.offset,
                k_start: 0,
                window: None,
                scale: queries.scale,
            },
        });
    }
    phi3_kernels::attend_packed(&mut jobs);
    drop(jobs);
    let mut rest = out.as_slice();
    for tile in tiles {
        for row in tile.rows.clone() {
            let (found, after) = rest.split_at(tile.heads.len() * d);
            queries.out[row * width..][columns(tile)].copy_from_slice(found);
            rest = after;
        }
    }
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
