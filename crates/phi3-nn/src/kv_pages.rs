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
//! one head and one block ([`PageShape::of`]) and could empty single entries, which it does not yet;
//! nothing else would have to change, since [`PageTable::size_in_bytes`] counts the entries and [`PageTable::append`] asks only for
//! the positions that it writes.

use std::sync::Arc;

use phi3_kernels::{KvPage, KvPages};

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

    /// Positions for which a layer holds pages once a sequence has `len` tokens.
    pub(crate) fn positions_held(self, pattern: AttentionPattern, len: usize) -> usize {
        let first = pattern.first_reachable(len) / self.len;
        (len.div_ceil(self.len) - first).saturating_mul(self.len)
    }
}

/// The pages of one layer of one sequence.
#[derive(Clone, Debug)]
pub(crate) enum LayerPages {
    F32(PageTable<f32>),
    F16(PageTable<u16>),
}

/// What attention reads of a layer.
pub(crate) enum PageViews<'c> {
    F32(Vec<KvPage<'c, f32>>),
    F16(Vec<KvPage<'c, u16>>),
}

impl LayerPages {
    pub(crate) fn new(spec: &CacheSpec, pattern: AttentionPattern, cache_type: CacheType) -> Self {
        match cache_type {
            CacheType::F32 => Self::F32(PageTable::new(spec, pattern)),
            CacheType::F16 => Self::F16(PageTable::new(spec, pattern)),
        }
    }

    pub(crate) fn shape(&self) -> PageShape {
        match self {
            Self::F32(table) => table.shape,
            Self::F16(table) => table.shape,
        }
    }

    /// Whether keys of so many heads of so many numbers are this layer's.
    pub(crate) fn check(&self, num_kv_heads: usize, head_dim: usize) -> Result<()> {
        let own = match self {
            Self::F32(table) => (table.num_kv_heads, table.head_dim),
            Self::F16(table) => (table.num_kv_heads, table.head_dim),
        };
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
        match self {
            Self::F32(table) => table.append(start, keys, values),
            Self::F16(table) => table.append(start, keys, values),
        }
    }

    /// See [`PageTable::drop_before`].
    pub(crate) fn drop_before(&mut self, first: usize) {
        match self {
            Self::F32(table) => table.drop_before(first),
            Self::F16(table) => table.drop_before(first),
        }
    }

    /// See [`PageTable::truncate`].
    pub(crate) fn truncate(&mut self, len: usize) {
        match self {
            Self::F32(table) => table.truncate(len),
            Self::F16(table) => table.truncate(len),
        }
    }

    /// Position of the first key kept.
    pub(crate) fn first(&self) -> usize {
        match self {
            Self::F32(table) => table.first,
            Self::F16(table) => table.first,
        }
    }

    pub(crate) fn size_in_bytes(&self) -> usize {
        match self {
            Self::F32(table) => table.size_in_bytes(),
            Self::F16(table) => table.size_in_bytes(),
        }
    }

    /// The same pages in memory of their own.
    pub(crate) fn unshared(&self) -> Self {
        match self {
            Self::F32(table) => Self::F32(table.unshared()),
            Self::F16(table) => Self::F16(table.unshared()),
        }
    }

    pub(crate) fn view(&self) -> PageViews<'_> {
        match self {
            Self::F32(table) => PageViews::F32(table.view()),
            Self::F16(table) => PageViews::F16(table.view()),
        }
    }
}

impl PageViews<'_> {
    pub(crate) fn pages(&self) -> KvPages<'_> {
        match self {
            Self::F32(pages) => KvPages::F32(pages),
            Self::F16(pages) => KvPages::F16(pages),
        }
    }
}

/// How a key or value is stored.
pub(crate) trait Element: Copy + Default {
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

/// Zeros, or an error where the memory is not there: a page of a hostile model may be of any size.
fn zeros<T: Element>(len: usize) -> Result<Vec<T>> {
    let mut zeros = Vec::new();
    zeros.try_reserve_exact(len).map_err(|_| {
        Error::Batch(format!(
            "there is no memory for a page of {len} keys in the cache"
        ))
    })?;
    zeros.resize(len, T::default());
    Ok(zeros)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache_type::CacheStore;
    use crate::kv_cache::Recompute;

    const HEADS: usize = 2;
    const D: usize = 3;

    fn layer(pattern: AttentionPattern) -> LayerPages {
        let spec = CacheSpec {
            patterns: vec![pattern],
            num_key_value_heads: HEADS,
            head_dim: D,
            rope_limit: None,
            recompute: Recompute::Always,
            max_len: usize::MAX,
            store: CacheStore::Pages(CacheType::F32),
        };
        LayerPages::new(&spec, pattern, CacheType::F32)
    }

    /// Rows that tell position, head and column.
    fn rows(positions: std::ops::Range<usize>, sign: f32) -> Vec<f32> {
        let row = |position| (0..HEADS * D).map(move |i| sign * (position * 10 + i) as f32);
        positions.flat_map(row).collect()
    }

    fn append(layer: &mut LayerPages, positions: std::ops::Range<usize>) -> Result<()> {
        let (keys, values) = (rows(positions.clone(), 1.0), rows(positions.clone(), -1.0));
        layer.append(positions.start, &keys, &values)
    }

    fn key(layer: &LayerPages, position: usize, head: usize) -> Option<Vec<f32>> {
        let PageViews::F32(pages) = layer.view() else {
            return None;
        };
        let page = pages.get(position / PAGE_LEN)?;
        let start = (head * PAGE_LEN + position % PAGE_LEN) * D;
        let (key, value) = (
            page.keys.get(start..start + D)?,
            page.values.get(start..start + D)?,
        );
        assert!(key.iter().zip(value).all(|(key, value)| *key == -value));
        Some(key.to_vec())
    }

    #[test]
    fn rows_lie_head_major_in_pages() -> Result<()> {
        let mut layer = layer(AttentionPattern::Causal);
        for range in [0..1, 1..300, 300..301, 301..1000] {
            append(&mut layer, range)?;
        }
        for position in 0..1000 {
            for head in 0..HEADS {
                let expected = &rows(position..position + 1, 1.0)[head * D..][..D];
                assert_eq!(key(&layer, position, head).as_deref(), Some(expected));
            }
        }
        Ok(())
    }

    #[test]
    fn clones_share_pages_until_they_write() -> Result<()> {
        let mut one = layer(AttentionPattern::Causal);
        append(&mut one, 0..300)?;
        let mut two = one.clone();
        let same = |a: &LayerPages, b: &LayerPages, page: usize| {
            let (PageViews::F32(a), PageViews::F32(b)) = (a.view(), b.view()) else {
                return false;
            };
            std::ptr::eq(a[page].keys, b[page].keys)
        };
        assert!(same(&one, &two, 0) && same(&one, &two, 1));
        assert!(!same(&one, &one.unshared(), 0));
        two.append(299, &[7.0; HEADS * D], &[-7.0; HEADS * D])?;
        assert!(same(&one, &two, 0) && !same(&one, &two, 1));
        assert_eq!(key(&two, 299, 1), Some(vec![7.0; D]));
        assert_eq!(
            key(&one, 299, 0).as_deref(),
            Some(&rows(299..300, 1.0)[..D])
        );
        assert_eq!(key(&two, 298, 0), key(&one, 298, 0));
        Ok(())
    }

    #[test]
    fn a_window_frees_whole_pages_and_keeps_what_it_reaches() -> Result<()> {
        let pattern = AttentionPattern::SlidingWindow(100);
        let mut layer = layer(pattern);
        for position in 0..1000 {
            append(&mut layer, position..position + 1)?;
            let len = position + 1;
            let first = pattern.first_reachable(len);
            layer.drop_before(first);
            let page_bytes = PAGE_LEN * HEADS * D * 2 * size_of::<f32>();
            let held = PageShape::of(pattern, HEADS).positions_held(pattern, len);
            assert_eq!(layer.size_in_bytes(), held / PAGE_LEN * page_bytes, "{len}");
            assert!(layer.first() <= first && first < layer.first() + PAGE_LEN);
            assert!((first..len).all(|position| key(&layer, position, 0).is_some()));
        }
        assert_eq!(key(&layer, 700, 0), None);
        // What is gone cannot be written again, nor behind a gap.
        assert!(append(&mut layer, 700..701).is_err());
        assert!(append(&mut layer, 1001..1002).is_err());
        Ok(())
    }

    #[test]
    fn truncation_frees_pages() -> Result<()> {
        let mut layer = layer(AttentionPattern::Causal);
        append(&mut layer, 0..600)?;
        let three = layer.size_in_bytes();
        layer.truncate(512);
        assert_eq!(layer.size_in_bytes() * 3, three * 2);
        assert!(append(&mut layer, 513..514).is_err());
        // Rows that a failed call left behind are overwritten, their pages freed.
        append(&mut layer, 512..1500)?;
        append(&mut layer, 10..11)?;
        assert_eq!(layer.size_in_bytes() * 3, three);
        Ok(())
    }
}
