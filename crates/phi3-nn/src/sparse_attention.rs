//! Block-sparse attention on the pages of a cache: only the blocks that a query sees are touched.
//!
//! The pages of a block-sparse layer hold one block of one key/value head. The blocks that a block of
//! queries sees, in order, are handed to the kernels as if they followed one another: the last one
//! is the queries' own, all others lie before it, so that causal attention over this shorter
//! sequence sees exactly what the layout shows. Work and memory grow with the visible blocks.

use phi3_kernels::{AttentionJob, AttentionShape, BlockSparseLayout, KvPage, KvPages};

use crate::kv_pages::PageViews;

/// Queries of one sequence of a packed batch, and where their results go: `[l, h, d]` each.
pub(crate) struct SparseQueries<'a> {
    pub(crate) q: &'a [f32],
    pub(crate) out: &'a mut [f32],
    /// Position of the first query.
    pub(crate) start: usize,
    pub(crate) num_heads: usize,
    pub(crate) num_kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) scale: f32,
}

/// The queries of one block and one head.
struct Tile {
    head: usize,
    /// Rows among the sequence's queries.
    rows: std::ops::Range<usize>,
    /// Position of the first of them in its block.
    offset: usize,
    /// Entries of the page table, in order; the last holds the queries' own keys.
    entries: Vec<usize>,
}

/// Attention of all `queries` to the pages of a layer with this layout.
pub(crate) fn attend_block_sparse(
    queries: &mut SparseQueries<'_>,
    view: &PageViews<'_>,
    layout: BlockSparseLayout,
) {
    let tiles = tiles(queries, layout);
    match view {
        PageViews::F32(pages) => {
            attend_tiles(queries, &tiles, pages, layout, |pages| KvPages::F32(pages));
        }
        PageViews::F16(pages) => {
            attend_tiles(queries, &tiles, pages, layout, |pages| KvPages::F16(pages));
        }
    }
}

fn tiles(queries: &SparseQueries<'_>, layout: BlockSparseLayout) -> Vec<Tile> {
    let block_size = layout.block_size();
    let width = queries.num_heads * queries.head_dim;
    let len = queries.q.len() / width;
    let group = queries.num_heads / queries.num_kv_heads;
    let mut tiles = Vec::new();
    let mut row = 0;
    while row < len {
        let position = queries.start + row;
        let (block, offset) = (position / block_size, position % block_size);
        let rows = row..row + (block_size - offset).min(len - row);
        for head in 0..queries.num_heads {
            let entry = |block: usize| block * queries.num_kv_heads + head / group;
            let first_local = layout.first_local(block);
            let far = (layout.first_vertical(head)..first_local).step_by(layout.vert_stride());
            tiles.push(Tile {
                head,
                rows: rows.clone(),
                offset,
                entries: far.chain(first_local..=block).map(entry).collect(),
            });
        }
        row = rows.end;
    }
    tiles
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
    let columns = |tile: &Tile| tile.head * d..(tile.head + 1) * d;
    // A head's queries one after another, as a job takes them.
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
        let (q, q_after) = q_rest.split_at(tile.rows.len() * d);
        let (out, out_after) = std::mem::take(&mut out_rest).split_at_mut(tile.rows.len() * d);
        (q_rest, out_rest) = (q_after, out_after);
        let before = (visible.len() - 1) * block_size;
        jobs.push(AttentionJob {
            q,
            out,
            pages: wrap(visible),
            page_heads: 1,
            page_len: block_size,
            len: before + tile.offset + tile.rows.len(),
            num_heads: 1,
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
            let (found, after) = rest.split_at(d);
            queries.out[row * width..][columns(tile)].copy_from_slice(found);
            rest = after;
        }
    }
}
