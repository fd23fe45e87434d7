//! Fused attention: softmax of `q · kᵀ` times v without a matrix of scores.
//!
//! Scores of a tile of 256 positions are made, exponentiated and multiplied with the values
//! while they lie in the cache, and tiles are joined by their maxima (online softmax; Milakov
//! and Gimelshein, 2018; Dao et al., 2022). Tiles are cut at multiples of 256 of the absolute
//! position and joined in order, so that a query's result has the same bits in whatever call,
//! with whatever neighbors and on however many threads it is computed, and whichever keys out
//! of its sight are held.
//!
//! Under a block-sparse layout the blocks that a head sees are cut into tiles in the same way, as if
//! they followed one another: first the near ones, then the far ones and the queries' own.
//!
//! [`tile`] goes through the tiles, [`pass`] says which keys they hold and who sees them, [`sparse`]
//! finds these for a block-sparse layout, [`schedule`] spreads them over threads, and [`Kernels`]
//! names the few operations that a backend has to give.
//!
//! [`Kernels`]: crate::backend::Kernels

mod pass;
mod q8_0;
mod schedule;
mod sparse;
mod tile;

use std::ops::Range;

use crate::BlockSparseLayout;
use crate::backend::Rows;

pub(crate) use q8_0::{GROUP, GROUP_BYTES};
pub use q8_0::{f32_to_q8_0, q8_0_row_bytes};

/// What the slices of an [`AttentionJob`] mean.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Elements of a query, key or value: d.
    pub head_dim: usize,
    /// Absolute position of the first query, in tokens; the others follow one by one.
    pub q_start: usize,
    /// Absolute position of the first key, in tokens; the others follow one by one.
    pub k_start: usize,
    /// A query sees itself and the `window - 1` positions before it; `None`: all before it.
    pub window: Option<usize>,
    /// Factor on `q · k`, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
}

impl AttentionShape {
    /// Which of `s` keys query row `i` sees: key j is visible when it is not later than the
    /// query and less than `window` positions earlier.
    pub(crate) fn visible_keys(&self, i: usize, s: usize) -> Range<usize> {
        // One past the query; the entry point checked that positions do not overflow.
        let end = self.q_start + i + 1;
        let start = self.window.map_or(0, |w| end.saturating_sub(w));
        let end = end.saturating_sub(self.k_start).min(s);
        start.saturating_sub(self.k_start).min(end)..end
    }
}

/// Keys and values of some consecutive positions, `[page_heads, page_len, d]` each, head-major:
/// the positions of one head lie behind each other. A page that nobody sees any more may be
/// absent: both slices are empty.
#[derive(Clone, Copy, Debug)]
pub struct KvPage<'a, T> {
    /// Rotated keys.
    pub keys: &'a [T],
    /// Values.
    pub values: &'a [T],
}

/// The pages of a sequence, all of the same type: by position, and among those of the same
/// positions by head.
#[derive(Clone, Copy, Debug)]
pub enum KvPages<'a> {
    /// As computed.
    F32(&'a [KvPage<'a, f32>]),
    /// Rounded to half precision, as bits: [`crate::f32_to_f16`].
    F16(&'a [KvPage<'a, u16>]),
    /// Rounded to eight bits: rows of [`q8_0_row_bytes`] bytes as [`f32_to_q8_0`] makes them.
    Q8_0(&'a [KvPage<'a, u8>]),
}

/// One sequence of [`attend_packed`]: its queries, its keys and values, and the output.
#[derive(Debug)]
pub struct AttentionJob<'a> {
    /// `[l, h, d]`, contiguous.
    pub q: &'a [f32],
    /// `[l, h, d]`, contiguous: overwritten.
    pub out: &'a mut [f32],
    /// Where keys and values lie. The last page may have room for more.
    pub pages: KvPages<'a>,
    /// Key/value heads of a page; divides `num_kv_heads`.
    pub page_heads: usize,
    /// Positions of a page.
    pub page_len: usize,
    /// Keys to be seen, from the first row of the first page on: s.
    pub len: usize,
    /// Query heads: h.
    pub num_heads: usize,
    /// Key/value heads: k. Query head i reads key/value head `i / (h / k)`.
    pub num_kv_heads: usize,
    /// Width, positions, window and scale.
    pub shape: AttentionShape,
    /// Which of the keys that are not after it a query sees, if not all: blocks of keys, whose pages
    /// are a block each. There is no window then, and the first key has position 0.
    pub layout: Option<BlockSparseLayout>,
}

/// Causal attention of several sequences, each against its own keys:
/// `out[i, h] = sum_j softmax_j(scale * q[i, h] · keys[h / g, j]) * values[h / g, j]` with
/// `g = num_heads / num_kv_heads`, over the visible keys j: key j is visible to query i iff its
/// position `k_start + j` is not after `q_start + i` and, with a window, less than `window`
/// positions before it, and, with a layout, head h sees the block of `k_start + j` from that of
/// `q_start + i`. The time that a layout takes grows with the blocks that are seen.
///
/// Scores, softmax and sums are f32. A query that sees no key gets zeros. A query's result does
/// not depend, to the last bit, on the other queries and jobs, on keys that it does not see, on
/// how keys are cut into pages, or on the number of threads.
///
/// # Panics
/// When a width or a number of heads is 0, query heads are not a multiple of key/value heads, a
/// slice is not as long as the numbers say, a query sees a key of an absent page, a position is
/// larger than `usize::MAX - 1`, or a layout is not one of these heads, pages and positions.
pub fn attend_packed(jobs: &mut [AttentionJob<'_>]) {
    jobs.iter().for_each(AttentionJob::check);
    schedule::run(jobs, crate::dispatch::backend());
}

/// [`attend_packed`] for one head of one sequence whose keys and values are f32 and lie in one
/// piece: `q` and `out` are `[l, head_dim]`, `keys` and `values` `[s, head_dim]`.
///
/// # Panics
/// As [`attend_packed`], or when a slice is not a whole number of rows.
pub fn attend(q: &[f32], keys: &[f32], values: &[f32], shape: AttentionShape, out: &mut [f32]) {
    let d = shape.head_dim;
    assert!(d > 0, "attend: head_dim is 0");
    assert!(
        keys.len() == values.len() && keys.len().is_multiple_of(d),
        "attend: keys have {} elements, values {}; expected the same multiple of head_dim {d}",
        keys.len(),
        values.len()
    );
    let len = keys.len() / d;
    let pages = [KvPage { keys, values }];
    attend_packed(&mut [AttentionJob {
        q,
        out,
        pages: KvPages::F32(if len == 0 { &[] } else { &pages }),
        page_heads: 1,
        page_len: len,
        len,
        num_heads: 1,
        num_kv_heads: 1,
        shape,
        layout: None,
    }]);
}

/// Half precision, as bits, to f32: exact. NaN stays NaN.
///
/// # Panics
/// When the slices differ in length.
pub fn f16_to_f32(halves: &[u16], out: &mut [f32]) {
    assert_eq!(halves.len(), out.len(), "f16_to_f32: lengths differ");
    crate::dispatch::backend().widen(halves, out);
}

/// f32 to half precision, as bits: rounded to nearest, ties to even. What is finite stays finite:
/// larger values than the largest half, 65504, become that.
///
/// # Panics
/// When the slices differ in length.
pub fn f32_to_f16(values: &[f32], out: &mut [u16]) {
    assert_eq!(values.len(), out.len(), "f32_to_f16: lengths differ");
    crate::dispatch::backend().narrow(values, out);
}

impl AttentionJob<'_> {
    fn check(&self) {
        let (h, k, d) = (self.num_heads, self.num_kv_heads, self.shape.head_dim);
        assert!(d > 0, "attend: head_dim is 0");
        assert!(
            h > 0 && k > 0 && h.is_multiple_of(k),
            "attend: {h} query heads cannot share {k} key/value heads"
        );
        let width = h.checked_mul(d);
        assert!(
            self.q.len() == self.out.len() && width.is_some_and(|w| self.q.len().is_multiple_of(w)),
            "attend: q has {} elements, out {}; expected the same multiple of {h} heads of {d}",
            self.q.len(),
            self.out.len()
        );
        let heads = self.page_heads;
        assert!(
            heads > 0 && k.is_multiple_of(heads),
            "attend: pages of {heads} heads do not divide {k} key/value heads"
        );
        let row = match self.pages {
            KvPages::F32(_) | KvPages::F16(_) => d,
            KvPages::Q8_0(_) => q8_0_row_bytes(d),
        };
        let page = heads
            .checked_mul(self.page_len)
            .and_then(|n| n.checked_mul(row));
        let fits = |keys: usize, values: usize| keys == values && (Some(keys) == page || keys == 0);
        let (pages, fit) = match self.pages {
            KvPages::F32(pages) => (
                pages.len(),
                pages.iter().all(|p| fits(p.keys.len(), p.values.len())),
            ),
            KvPages::F16(pages) => (
                pages.len(),
                pages.iter().all(|p| fits(p.keys.len(), p.values.len())),
            ),
            KvPages::Q8_0(pages) => (
                pages.len(),
                pages.iter().all(|p| fits(p.keys.len(), p.values.len())),
            ),
        };
        assert!(
            fit,
            "attend: a page does not hold {heads} heads of {} positions of {d}",
            self.page_len
        );
        assert!(
            (pages / (k / heads))
                .checked_mul(self.page_len)
                .is_none_or(|room| self.len <= room),
            "attend: {} keys in {pages} pages of {heads} of {k} heads and {} positions",
            self.len,
            self.page_len
        );
        let (q_start, k_start) = (self.shape.q_start, self.shape.k_start);
        assert!(
            q_start.checked_add(self.q.len() + 1).is_some()
                && k_start.checked_add(self.len + pass::TILE + 1).is_some(),
            "attend: positions from {q_start} or {k_start} overflow"
        );
        if let Some(layout) = self.layout {
            assert!(
                layout.num_heads() == h
                    && layout.block_size() == self.page_len
                    && (k_start, self.shape.window) == (0, None),
                "attend: {layout:?} does not fit {h} heads, pages of {} positions from {k_start} on \
                 and a window of {:?}",
                self.page_len,
                self.shape.window
            );
        }
    }

    /// Queries: l.
    fn queries(&self) -> usize {
        self.q.len() / (self.num_heads * self.shape.head_dim)
    }

    /// Query heads of a key/value head: g.
    fn group(&self) -> usize {
        self.num_heads / self.num_kv_heads
    }
}

#[cfg(test)]
mod tests;
