//! The passes of queries that see what a block-sparse layout shows: only those blocks are touched.
//!
//! The blocks near the queries are the same for all heads, which go through them together, so that
//! they are read and laid out once; every head then goes through its own far blocks and, last,
//! through the queries' own block, of which a query sees what is not after it. To a pass its
//! blocks are a sequence in which one follows the other.

use std::ops::Range;

use super::AttentionJob;
use super::pass::Pass;
use crate::BlockSparseLayout;

/// The passes of the queries of one block and of some heads of a key/value head, whose rows are
/// `[heads, l]`.
pub(super) fn passes<'a>(
    job: &AttentionJob<'a>,
    layout: BlockSparseLayout,
    heads: Range<usize>,
    queries: Range<usize>,
) -> Vec<Pass<'a>> {
    let size = layout.block_size();
    let position = job.shape.q_start + queries.start;
    let (own, offset) = (position / size, position % size);
    let first_local = layout.first_local(own);
    let kv_head = heads.start / job.group();
    let (l, held) = (queries.len(), job.len.div_ceil(size));
    // The keys of so many blocks, of which only the last of all may be held in part.
    let keys = |listed: &[usize]| {
        let hidden = |last: usize| ((last + 1) * size).saturating_sub(job.len);
        listed.len() * size - listed.last().copied().map_or(0, hidden)
    };
    let mut passes = Vec::new();

    let near: Vec<usize> = (first_local..own.min(held)).collect();
    if !near.is_empty() {
        let len = keys(&near);
        let rows = 0..heads.len() * l;
        // Queries behind the last key see all.
        passes.push(Pass::listed(job, kv_head, near, len, len, rows));
    }
    for (i, head) in heads.enumerate() {
        let far = (layout.first_vertical(head)..first_local).step_by(layout.vert_stride());
        let mut listed: Vec<usize> = far.filter(|block| *block < held).collect();
        let before = listed.len() * size;
        let mut q_start = before;
        if own < held {
            listed.push(own);
            q_start += offset;
        }
        if !listed.is_empty() {
            let len = keys(&listed);
            let rows = i * l..(i + 1) * l;
            passes.push(Pass::listed(job, kv_head, listed, len, q_start, rows));
        }
    }
    passes
}
