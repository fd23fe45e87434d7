//! The keys that some rows of queries go through, and which of them each query sees.

use std::ops::Range;

use super::{AttentionJob, AttentionShape, KvPages, Rows, q8_0_row_bytes};

/// Positions of a tile: softmax is joined at its multiples.
pub(super) const TILE: usize = 256;

/// Keys that are multiplied at once where some queries see only some of them.
const COARSE_PART: usize = 64;
/// The same where some queries see only some of those.
const PART: usize = 16;

/// Keys or values as they are stored: those that a backend reads as they are, or Q8_0 rows.
#[derive(Clone, Copy)]
pub(super) enum Stored<'a> {
    Rows(Rows<'a>),
    Q8_0(&'a [u8]),
}

/// Keys of one key/value head, one after another, and the queries `[l, g]` that see some of them.
pub(super) struct Pass<'a> {
    pages: KvPages<'a>,
    /// Which rows of the page table hold the keys, in order; all where there is no such list.
    listed: Option<Vec<usize>>,
    page_heads: usize,
    page_len: usize,
    num_kv_heads: usize,
    head: usize,
    /// Keys.
    pub(super) len: usize,
    /// Of these queries and keys: where keys are listed, as if the list were a whole sequence.
    pub(super) shape: AttentionShape,
    pub(super) queries: Range<usize>,
    /// Rows of a query: g.
    pub(super) group: usize,
    /// The rows `[l, g]` among those of the unit that this is a pass of.
    pub(super) rows: Range<usize>,
    /// The tiles with keys that a query sees.
    pub(super) tiles: Range<usize>,
}

impl<'a> Pass<'a> {
    /// All keys of a job, for the queries of all query heads of a key/value head.
    pub(super) fn whole(job: &AttentionJob<'a>, head: usize, queries: Range<usize>) -> Self {
        let rows = 0..queries.len() * job.group();
        Self::with_rows(job, head, queries, rows).with_tiles()
    }

    /// All keys of a job, for some rows, before it is known which tiles they see.
    fn with_rows(
        job: &AttentionJob<'a>,
        head: usize,
        queries: Range<usize>,
        rows: Range<usize>,
    ) -> Self {
        Self {
            pages: job.pages,
            listed: None,
            page_heads: job.page_heads,
            page_len: job.page_len,
            num_kv_heads: job.num_kv_heads,
            head,
            len: job.len,
            shape: job.shape,
            queries,
            group: job.group(),
            rows,
            tiles: 0..0,
        }
    }

    /// The first `len` keys of some rows of a job's page table, for `rows` that are a query each.
    /// The first of these has the position `q_start` where that of the first key is 0.
    pub(super) fn listed(
        job: &AttentionJob<'a>,
        head: usize,
        listed: Vec<usize>,
        len: usize,
        q_start: usize,
        rows: Range<usize>,
    ) -> Self {
        let shape = AttentionShape {
            q_start,
            k_start: 0,
            window: None,
            ..job.shape
        };
        Self {
            listed: Some(listed),
            len,
            shape,
            group: 1,
            ..Self::with_rows(job, head, 0..rows.len(), rows)
        }
        .with_tiles()
    }

    pub(super) fn is_q8_0(&self) -> bool {
        matches!(self.pages, KvPages::Q8_0(_))
    }

    /// The keys of `within` that query `i` sees.
    pub(super) fn visible(&self, i: usize, within: &Range<usize>) -> Range<usize> {
        let all = self.shape.visible_keys(i, self.len);
        let end = all.end.min(within.end);
        all.start.max(within.start).min(end)..end
    }

    /// The queries that see some of `keys`, and those that see all of them; for a window that is
    /// not 0. What a later query sees starts and ends no earlier, so these follow one another.
    pub(super) fn seeing(&self, keys: &Range<usize>) -> (Range<usize>, Range<usize>) {
        let seen = |i: usize| self.shape.visible_keys(i, self.len);
        let first = |wanted: &dyn Fn(Range<usize>) -> bool| {
            let (mut start, mut end) = (self.queries.start, self.queries.end);
            while start < end {
                let middle = start.midpoint(end);
                if wanted(seen(middle)) {
                    end = middle;
                } else {
                    start = middle + 1;
                }
            }
            start
        };
        let some = first(&|seen| seen.end > keys.start)..first(&|seen| seen.start >= keys.end);
        let all = first(&|seen| seen.end >= keys.end)..first(&|seen| seen.start > keys.start);
        (some, all)
    }

    /// The smallest range that holds all keys of `within` that a query sees.
    pub(super) fn seen(&self, within: &Range<usize>) -> Range<usize> {
        let (some, _) = self.seeing(within);
        if some.is_empty() || self.shape.window == Some(0) {
            return 0..0;
        }
        self.visible(some.start, within).start..self.visible(some.end - 1, within).end
    }

    fn with_tiles(mut self) -> Self {
        let seen = self.seen(&(0..self.len));
        if !seen.is_empty() {
            let k_start = self.shape.k_start;
            self.tiles = (k_start + seen.start) / TILE..(k_start + seen.end - 1) / TILE + 1;
        }
        self
    }

    /// The keys of a tile.
    pub(super) fn in_tile(&self, tile: usize) -> Range<usize> {
        let key = |position: usize| position.saturating_sub(self.shape.k_start).min(self.len);
        key(tile * TILE)..key((tile + 1) * TILE)
    }

    /// Cuts `keys` at the multiples of `block` in absolute positions and at page ends.
    pub(super) fn blocks(
        &self,
        keys: Range<usize>,
        block: usize,
    ) -> impl Iterator<Item = Range<usize>> {
        let mut next = keys.start;
        let (k_start, page_len) = (self.shape.k_start, self.page_len);
        std::iter::from_fn(move || {
            let start = next;
            let to_block = block - (k_start + start) % block;
            let to_page = page_len - start % page_len;
            next = keys.end.min(start + to_block.min(to_page));
            (start < keys.end).then_some(start..next)
        })
    }

    /// Cuts `block` where not all queries see all of it: at every 64th key and, if need be, at
    /// every 16th, so that few products of hidden keys are made.
    fn parts(&self, block: &Range<usize>) -> Vec<Range<usize>> {
        let cut = |range: Range<usize>, step: usize| -> Vec<Range<usize>> {
            if self.seeing(&range).1 == self.queries {
                return vec![range];
            }
            let end = range.end;
            let firsts = range.step_by(step);
            firsts.map(|first| first..end.min(first + step)).collect()
        };
        let coarse = cut(block.clone(), COARSE_PART);
        coarse
            .into_iter()
            .flat_map(|part| cut(part, PART))
            .collect()
    }

    /// Cuts `keys` into what is multiplied at once: within blocks of `block` keys and, where all
    /// queries see all of them, as many blocks as there are if `whole`.
    pub(super) fn runs(&self, keys: Range<usize>, block: usize, whole: bool) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        let mut last_is_seen = false;
        for part in self.blocks(keys, block).flat_map(|b| self.parts(&b)) {
            let is_seen = whole && self.seeing(&part).1 == self.queries;
            match runs.last_mut() {
                Some(last) if is_seen && last_is_seen => last.end = part.end,
                _ => runs.push(part),
            }
            last_is_seen = is_seen;
        }
        runs
    }

    /// The keys of a block that no page end cuts, or its values.
    pub(super) fn stored(&self, block: &Range<usize>, of_keys: bool) -> Stored<'a> {
        let (row, first) = (block.start / self.page_len, block.start % self.page_len);
        let row = self.listed.as_ref().map_or(row, |rows| rows[row]);
        let page = row * (self.num_kv_heads / self.page_heads) + self.head / self.page_heads;
        let start = self.head % self.page_heads * self.page_len + first;
        let d = self.shape.head_dim;
        let rows = match self.pages {
            KvPages::F32(pages) if of_keys => Rows::F32(pages[page].keys),
            KvPages::F32(pages) => Rows::F32(pages[page].values),
            KvPages::F16(pages) if of_keys => Rows::F16(pages[page].keys),
            KvPages::F16(pages) => Rows::F16(pages[page].values),
            KvPages::Q8_0(pages) => {
                let page = &pages[page];
                let rows = if of_keys { page.keys } else { page.values };
                let row = q8_0_row_bytes(d);
                return Stored::Q8_0(&rows[start * row..(start + block.len()) * row]);
            }
        };
        Stored::Rows(rows.part(start, start + block.len(), d))
    }
}
