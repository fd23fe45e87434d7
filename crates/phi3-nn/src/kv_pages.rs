//! Keys and values of one layer in host memory, in pages.
//!
//! A page holds keys and values of [`PageShape::len`] consecutive positions, from a multiple of
//! that on, for [`PageShape::heads`] consecutive key/value heads: `[heads, len, d]` each,
//! head-major. The pages of a layer form a table, by position and among those of the same
//! positions by head, which [`PageTable`] alone looks after. An entry may be absent: nothing has
//! been written there yet, or no query can reach it any more. Attention gets an absent page as two
//! empty slices and must not look into it.
//!
//! Pages are shared between clones of a cache and copied when one of them writes (copy on write):
//! a common prefix costs its memory once, but for the page in which the clones part.
//!
//! What to free is the pattern's affair. A window drops whole rows of the table
//! ([`PageTable::drop_before`]). A layer in which heads see different blocks takes pages of
//! one head and one block ([`PageShape::of`]) and empties single entries
//! ([`PageTable::drop_unreachable`]). Whether what a sequence needs is still there, as after a
//! truncation, is asked of the entries themselves ([`PageTable::lacks`]).

use std::sync::Arc;

use phi3_kernels::{BlockSparseLayout, KvPage, KvPages};

use crate::attention::AttentionPattern;
use crate::cache_type::CacheType;
use crate::error::{Error, Result};
use crate::kv_cache::CacheSpec;

/// Positions of a page: what attention multiplies and exponentiates at once.
const PAGE_LEN: usize = 256;

/// Extent of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageShape {
    /// Key/value heads, a divisor of the layer's.
    pub(crate) heads: usize,
    /// Positions.
    pub(crate) len: usize,
}

impl PageShape {
    /// The pages of a layer: what is freed together lies together.
    pub(crate) fn of(pattern: AttentionPattern, num_kv_heads: usize) -> Self {
        match pattern {
            AttentionPattern::Causal | AttentionPattern::SlidingWindow(_) => Self {
                heads: num_kv_heads,
                len: PAGE_LEN,
            },
            // Heads see different blocks.
            AttentionPattern::BlockSparse(layout) => Self {
                heads: 1,
                len: layout.block_size(),
            },
        }
    }

    /// Rows of keys, one for each position and head, for which a layer holds pages once a sequence
    /// has `len` tokens.
    pub(crate) fn rows_held(
        self,
        pattern: AttentionPattern,
        num_kv_heads: usize,
        len: usize,
    ) -> usize {
        let pages = match pattern {
            AttentionPattern::Causal | AttentionPattern::SlidingWindow(_) => {
                let first = pattern.first_reachable(len) / self.len;
                (len.div_ceil(self.len) - first).saturating_mul(num_kv_heads / self.heads)
            }
            AttentionPattern::BlockSparse(layout) => {
                let first_local = layout.first_local(len / self.len);
                let near = len.div_ceil(self.len).saturating_sub(first_local);
                near.saturating_mul(num_kv_heads).saturating_add(far_pages(
                    layout,
                    num_kv_heads,
                    first_local,
                ))
            }
        };
        pages.saturating_mul(self.len).saturating_mul(self.heads)
    }
}

/// Heads up to which [`far_pages`] counts: no model has more, and a damaged configuration may name
/// any number.
const MAX_HEADS: usize = 1 << 16;

/// Pages that stay of the first `end` blocks, out of which no query is near: those of the blocks
/// that some query head of the page's key/value head sees from however far.
fn far_pages(layout: BlockSparseLayout, num_kv_heads: usize, end: usize) -> usize {
    if layout.num_heads() > MAX_HEADS {
        return end.saturating_mul(num_kv_heads);
    }
    let pages = (0..num_kv_heads).map(|kv_head| {
        let mut first: Vec<_> = group(layout, num_kv_heads, kv_head)
            .map(|head| layout.first_vertical(head))
            .collect();
        first.sort_unstable();
        first.dedup();
        let of_stride = |first: usize| end.saturating_sub(first).div_ceil(layout.vert_stride());
        first.into_iter().map(of_stride).sum::<usize>()
    });
    pages.fold(0, usize::saturating_add)
}

/// The query heads that read a key/value head.
fn group(layout: BlockSparseLayout, num_kv_heads: usize, kv_head: usize) -> std::ops::Range<usize> {
    let len = layout.num_heads() / num_kv_heads;
    kv_head * len..(kv_head + 1) * len
}

/// The pages of one layer of one sequence.
#[derive(Clone, Debug)]
pub(crate) enum LayerPages {
    F32(PageTable<f32>),
    F16(PageTable<u16>),
    Q8_0(PageTable<u8>),
}

/// The same of every kind of table.
macro_rules! each {
    ($pages:expr, $table:ident => $of_table:expr) => {
        match $pages {
            Self::F32($table) => $of_table,
            Self::F16($table) => $of_table,
            Self::Q8_0($table) => $of_table,
        }
    };
}

/// What attention reads of a layer.
pub(crate) enum PageViews<'c> {
    F32(Vec<KvPage<'c, f32>>),
    F16(Vec<KvPage<'c, u16>>),
    Q8_0(Vec<KvPage<'c, u8>>),
}

impl LayerPages {
    pub(crate) fn new(spec: &CacheSpec, pattern: AttentionPattern, cache_type: CacheType) -> Self {
        match cache_type {
            CacheType::F32 => Self::F32(PageTable::new(spec, pattern)),
            CacheType::F16 => Self::F16(PageTable::new(spec, pattern)),
            CacheType::Q8_0 => Self::Q8_0(PageTable::new(spec, pattern)),
        }
    }

    pub(crate) fn shape(&self) -> PageShape {
        each!(self, table => table.shape)
    }

    /// Whether keys of so many heads of so many numbers are this layer's.
    pub(crate) fn check(&self, num_kv_heads: usize, head_dim: usize) -> Result<()> {
        let own = each!(self, table => (table.num_kv_heads, table.head_dim));
        if own == (num_kv_heads, head_dim) {
            return Ok(());
        }
        Err(Error::Batch(format!(
            "keys of {num_kv_heads} heads of {head_dim} do not fit a cache of {} heads of {}",
            own.0, own.1
        )))
    }

    /// See [`PageTable::append`].
    pub(crate) fn append(&mut self, start: usize, keys: &[f32], values: &[f32]) -> Result<()> {
        each!(self, table => table.append(start, keys, values))
    }

    /// Frees what no query of the layer reaches any more now that the sequence has `len` tokens.
    pub(crate) fn drop_unreachable(&mut self, pattern: AttentionPattern, len: usize) {
        each!(self, table => table.drop_unreachable(pattern, len))
    }

    /// See [`PageTable::lacks`].
    pub(crate) fn lacks(&self, pattern: AttentionPattern, len: usize) -> bool {
        each!(self, table => table.lacks(pattern, len))
    }

    /// See [`PageTable::truncate`].
    pub(crate) fn truncate(&mut self, len: usize) {
        each!(self, table => table.truncate(len))
    }

    pub(crate) fn size_in_bytes(&self) -> usize {
        each!(self, table => table.size_in_bytes())
    }

    /// The same pages in memory of their own.
    pub(crate) fn unshared(&self) -> Self {
        match self {
            Self::F32(table) => Self::F32(table.unshared()),
            Self::F16(table) => Self::F16(table.unshared()),
            Self::Q8_0(table) => Self::Q8_0(table.unshared()),
        }
    }

    pub(crate) fn view(&self) -> PageViews<'_> {
        match self {
            Self::F32(table) => PageViews::F32(table.view()),
            Self::F16(table) => PageViews::F16(table.view()),
            Self::Q8_0(table) => PageViews::Q8_0(table.view()),
        }
    }
}

impl PageViews<'_> {
    pub(crate) fn pages(&self) -> KvPages<'_> {
        match self {
            Self::F32(pages) => KvPages::F32(pages),
            Self::F16(pages) => KvPages::F16(pages),
            Self::Q8_0(pages) => KvPages::Q8_0(pages),
        }
    }
}

/// How a key or value is stored.
pub(crate) trait Element: Copy + bytemuck::Zeroable {
    /// Elements of a row of `d` numbers.
    fn row_len(d: usize) -> usize;

    /// Stores one row.
    fn store(row: &[f32], stored: &mut [Self]);
}

impl Element for f32 {
    fn row_len(d: usize) -> usize {
        d
    }

    fn store(row: &[f32], stored: &mut [Self]) {
        stored.copy_from_slice(row);
    }
}

impl Element for u8 {
    fn row_len(d: usize) -> usize {
        phi3_kernels::q8_0_row_bytes(d)
    }

    fn store(row: &[f32], stored: &mut [Self]) {
        phi3_kernels::f32_to_q8_0(row, stored);
    }
}

impl Element for u16 {
    fn row_len(d: usize) -> usize {
        d
    }

    fn store(row: &[f32], stored: &mut [Self]) {
        phi3_kernels::f32_to_f16(row, stored);
    }
}

#[derive(Clone, Debug)]
struct Page<T> {
    keys: Vec<T>,
    values: Vec<T>,
}

/// Which pages a layer has. Everything about a page's place, life and absence is here.
#[derive(Clone, Debug)]
pub(crate) struct PageTable<T> {
    shape: PageShape,
    num_kv_heads: usize,
    head_dim: usize,
    /// Entry `position / shape.len * (num_kv_heads / shape.heads) + head / shape.heads`.
    pages: Vec<Option<Arc<Page<T>>>>,
    /// Position before which nothing is kept.
    first: usize,
    /// Blocks before which none is left that could be freed.
    swept: usize,
    /// Positions written: those before `first` too.
    len: usize,
}

impl<T: Element> PageTable<T> {
    fn new(spec: &CacheSpec, pattern: AttentionPattern) -> Self {
        Self {
            shape: PageShape::of(pattern, spec.num_key_value_heads),
            num_kv_heads: spec.num_key_value_heads,
            head_dim: spec.head_dim,
            pages: Vec::new(),
            first: 0,
            swept: 0,
            len: 0,
        }
    }

    /// Stores keys and values `[l, k, d]` of the positions from `start` on; what was there, as
    /// after a call that failed, is overwritten.
    fn append(&mut self, start: usize, keys: &[f32], values: &[f32]) -> Result<()> {
        let (heads, d) = (self.shape.heads, self.head_dim);
        if start > self.len || start < self.first {
            return Err(Error::Batch(format!(
                "the cache holds keys of the positions {} to {}, none right before {start}; a pass \
                 that tracks gradients stores none",
                self.first, self.len
            )));
        }
        let width = self.num_kv_heads * d;
        let rows = keys.len() / width;
        let per_row = self.num_kv_heads / heads;
        let mut row = 0;
        while row < rows {
            let position = start + row;
            let (page_row, offset) = (position / self.shape.len, position % self.shape.len);
            let count = (self.shape.len - offset).min(rows - row);
            let new_rows = row * width..(row + count) * width;
            for group in 0..per_row {
                let (shape, columns) = (self.shape, (width, group * heads * d, d));
                let page = self.page_mut(page_row * per_row + group)?;
                for (new, stored) in [(keys, &mut page.keys), (values, &mut page.values)] {
                    store_rows(&new[new_rows.clone()], columns, stored, shape, offset);
                }
            }
            row += count;
        }
        self.truncate(start + rows);
        self.len = start + rows;
        Ok(())
    }

    /// The page of an entry, this table's own; made if it is absent.
    fn page_mut(&mut self, entry: usize) -> Result<&mut Page<T>> {
        if self.pages.len() <= entry {
            self.pages.resize_with(entry + 1, || None);
        }
        let len = self.shape.heads * self.shape.len * T::row_len(self.head_dim);
        let slot = &mut self.pages[entry];
        let page = match slot.take() {
            Some(page) => page,
            None => Arc::new(Page {
                keys: zeros(len)?,
                values: zeros(len)?,
            }),
        };
        Ok(Arc::make_mut(slot.insert(page)))
    }

    fn drop_unreachable(&mut self, pattern: AttentionPattern, len: usize) {
        match pattern {
            AttentionPattern::Causal | AttentionPattern::SlidingWindow(_) => {
                self.drop_before(pattern.first_reachable(len));
            }
            AttentionPattern::BlockSparse(layout) => {
                let end = layout.first_local(len / self.shape.len);
                for block in self.swept..end {
                    for kv_head in 0..self.num_kv_heads {
                        let mut heads = group(layout, self.num_kv_heads, kv_head);
                        if !heads.any(|head| layout.is_vertical(head, block))
                            && let Some(page) =
                                self.pages.get_mut(block * self.num_kv_heads + kv_head)
                        {
                            *page = None;
                        }
                    }
                }
                self.swept = self.swept.max(end);
            }
        }
    }

    /// Whether a query at `len`, or one behind it, reaches a key before it that is no longer there.
    fn lacks(&self, pattern: AttentionPattern, len: usize) -> bool {
        match pattern {
            AttentionPattern::Causal | AttentionPattern::SlidingWindow(_) => {
                self.first > pattern.first_reachable(len)
            }
            // Blocks that are seen from far are never freed.
            AttentionPattern::BlockSparse(layout) => {
                let near = layout.first_local(len / self.shape.len)..len.div_ceil(self.shape.len);
                let entries = near.start * self.num_kv_heads..near.end * self.num_kv_heads;
                let near = self.pages.get(entries);
                near.is_none_or(|pages| pages.iter().any(Option::is_none))
            }
        }
    }

    /// Frees the pages that lie wholly before position `first`.
    fn drop_before(&mut self, first: usize) {
        let per_row = self.num_kv_heads / self.shape.heads;
        let (old, new) = (self.first / self.shape.len, first / self.shape.len);
        for entry in old * per_row..(new * per_row).min(self.pages.len()) {
            self.pages[entry] = None;
        }
        self.first = self.first.max(new * self.shape.len);
    }

    /// Frees the pages behind the first `len` positions.
    fn truncate(&mut self, len: usize) {
        let per_row = self.num_kv_heads / self.shape.heads;
        self.pages.truncate(len.div_ceil(self.shape.len) * per_row);
        self.swept = self.swept.min(len / self.shape.len);
        self.len = self.len.min(len);
    }

    fn unshared(&self) -> Self {
        let copy = |page: &Arc<Page<T>>| Arc::new((**page).clone());
        Self {
            pages: self
                .pages
                .iter()
                .map(|page| page.as_ref().map(copy))
                .collect(),
            ..*self
        }
    }

    fn size_in_bytes(&self) -> usize {
        let pages = self.pages.iter().flatten();
        let held = pages.map(|page| page.keys.len() + page.values.len());
        held.sum::<usize>() * size_of::<T>()
    }

    fn view(&self) -> Vec<KvPage<'_, T>> {
        let absent = KvPage {
            keys: &[][..],
            values: &[][..],
        };
        let views = self.pages.iter().map(|page| match page {
            Some(page) => KvPage {
                keys: &page.keys[..],
                values: &page.values[..],
            },
            None => absent,
        });
        views.collect()
    }
}

/// Stores the rows of `new` `[l, width]` in a page from position `offset` on: of each row the
/// heads of `d` numbers from column `first` on, as many as a page has.
fn store_rows<T: Element>(
    new: &[f32],
    (width, first, d): (usize, usize, usize),
    stored: &mut [T],
    shape: PageShape,
    offset: usize,
) {
    let row_len = T::row_len(d);
    for (head, stored) in stored.chunks_exact_mut(shape.len * row_len).enumerate() {
        let stored = stored.chunks_exact_mut(row_len).skip(offset);
        let column = first + head * d;
        for (row, stored) in new.chunks_exact(width).zip(stored) {
            T::store(&row[column..column + d], stored);
        }
    }
}

/// Zeros, or an error where the memory is not there: a page of a hostile model may be of any size. They are
/// the system's, not written here: of a page that is never filled only what is used becomes real memory.
fn zeros<T: Element>(len: usize) -> Result<Vec<T>> {
    bytemuck::allocation::try_zeroed_vec(len).map_err(|()| {
        Error::Batch(format!(
            "there is no memory for a page of {len} keys in the cache"
        ))
    })
}

#[cfg(test)]
mod tests;
