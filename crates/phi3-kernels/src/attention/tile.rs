//! One tile of keys for the queries of one key/value head.

use std::cell::RefCell;
use std::ops::Range;

use super::{AttentionJob, AttentionShape, KvPages, Rows, q8_0_row_bytes};
use crate::dispatch::Backend;

/// Positions of a tile: softmax is joined at its multiples.
pub(super) const TILE: usize = 256;

/// Keys that are widened before they are multiplied, where a backend does not read them as they
/// are.
const BLOCK: usize = 64;

/// Keys that are multiplied at once where some queries see only some of them.
const COARSE_PART: usize = 64;
/// The same where some queries see only some of those.
const PART: usize = 16;

/// Elements from one row of scores to the next: not a power of two, so that rows do not compete
/// for the same lines of the cache.
const STRIDE: usize = TILE + 16;

/// Rows up to which keys and values come faster through the processor than from memory.
const STREAMED_ROWS: usize = 4;

/// Rows of keys or values that are asked for ahead where the next ones lie elsewhere: about as many
/// lines as a core can wait for.
const PREFETCH_ROWS: usize = 8;

/// Widths of vectors that backends need not care about: rows are padded to a multiple.
const LANES: usize = 8;

/// Queries, or their results, that are asked for ahead.
const AHEAD: usize = 8;

thread_local! {
    /// The scores of the last [`Queries`] of this thread, so that the next ones need no new memory.
    static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Keys or values as they are stored: those that a backend reads as they are, or Q8_0 rows.
#[derive(Clone, Copy)]
enum Stored<'a> {
    Rows(Rows<'a>),
    Q8_0(&'a [u8]),
}

/// An [`AttentionJob`] without its output.
#[derive(Clone, Copy)]
pub(super) struct Sequence<'a> {
    pub(super) q: &'a [f32],
    pages: KvPages<'a>,
    page_heads: usize,
    page_len: usize,
    len: usize,
    pub(super) num_heads: usize,
    num_kv_heads: usize,
    pub(super) group: usize,
    pub(super) shape: AttentionShape,
}

impl<'a> Sequence<'a> {
    pub(super) fn new(job: &AttentionJob<'a>) -> Self {
        Self {
            q: job.q,
            pages: job.pages,
            page_heads: job.page_heads,
            page_len: job.page_len,
            len: job.len,
            num_heads: job.num_heads,
            num_kv_heads: job.num_kv_heads,
            group: job.group(),
            shape: job.shape,
        }
    }

    /// The keys of `within` that query `i` sees. A layout in which heads see different blocks
    /// would ask for the head too: its blocks are not smaller than [`BLOCK`], inside of which
    /// visible keys must be consecutive.
    fn visible(&self, i: usize, within: &Range<usize>) -> Range<usize> {
        let all = self.shape.visible_keys(i, self.len);
        let end = all.end.min(within.end);
        all.start.max(within.start).min(end)..end
    }

    /// Those of `queries` that see some of `keys`, and those that see all of them; for a window
    /// that is not 0. What a later query sees starts and ends no earlier, so these follow one
    /// another.
    fn seeing(&self, queries: &Range<usize>, keys: &Range<usize>) -> (Range<usize>, Range<usize>) {
        let seen = |i: usize| self.shape.visible_keys(i, self.len);
        let first = |wanted: &dyn Fn(Range<usize>) -> bool| {
            let (mut start, mut end) = (queries.start, queries.end);
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

    /// The smallest range that holds all keys of `within` that a query of `queries` sees.
    fn seen(&self, queries: &Range<usize>, within: &Range<usize>) -> Range<usize> {
        let (some, _) = self.seeing(queries, within);
        if some.is_empty() || self.shape.window == Some(0) {
            return 0..0;
        }
        self.visible(some.start, within).start..self.visible(some.end - 1, within).end
    }

    /// The tiles with keys that a query of `queries` sees.
    pub(super) fn tiles(&self, queries: Range<usize>) -> Range<usize> {
        let seen = self.seen(&queries, &(0..self.len));
        if seen.is_empty() {
            return 0..0;
        }
        let k_start = self.shape.k_start;
        (k_start + seen.start) / TILE..(k_start + seen.end - 1) / TILE + 1
    }

    /// Cuts `keys` at the multiples of `block` in absolute positions and at page ends.
    fn blocks(self, keys: Range<usize>, block: usize) -> impl Iterator<Item = Range<usize>> {
        let mut next = keys.start;
        std::iter::from_fn(move || {
            let start = next;
            let to_block = block - (self.shape.k_start + start) % block;
            let to_page = self.page_len - start % self.page_len;
            next = keys.end.min(start + to_block.min(to_page));
            (start < keys.end).then_some(start..next)
        })
    }

    /// Cuts `block` where not all `queries` see all of it: at every 64th key and, if need be, at
    /// every 16th, so that few products of hidden keys are made.
    fn parts(self, queries: &Range<usize>, block: &Range<usize>) -> Vec<Range<usize>> {
        let cut = |range: Range<usize>, step: usize| -> Vec<Range<usize>> {
            if self.seeing(queries, &range).1 == *queries {
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

    /// The keys of a block, or its values.
    fn rows(&self, head: usize, block: &Range<usize>, of_keys: bool) -> Stored<'a> {
        let (row, first) = (block.start / self.page_len, block.start % self.page_len);
        let page = row * (self.num_kv_heads / self.page_heads) + head / self.page_heads;
        let start = head % self.page_heads * self.page_len + first;
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

/// The queries `[l, g]` of one key/value head, and memory to work in.
pub(super) struct Queries<'a> {
    backend: Backend,
    sequence: Sequence<'a>,
    head: usize,
    queries: Range<usize>,
    /// Queries times group.
    rows: usize,
    /// head_dim, padded.
    width: usize,
    /// Scaled, `[rows, width]`.
    q: Vec<f32>,
    /// Scores, then weights, `[rows, STRIDE]` or longer.
    scores: Vec<f32>,
    /// A block of keys or values, widened and padded, `[BLOCK, width]`.
    wide: Vec<f32>,
}

impl<'a> Queries<'a> {
    pub(super) fn new(
        backend: Backend,
        sequence: Sequence<'a>,
        head: usize,
        queries: Range<usize>,
    ) -> Self {
        let (d, group) = (sequence.shape.head_dim, sequence.group);
        let width = d.next_multiple_of(LANES);
        let rows = queries.len() * group;
        let mut q = vec![0.0; rows * width];
        let given = |i: usize| {
            let start = (i * sequence.num_heads + head * group) * d;
            &sequence.q[start..start + group * d]
        };
        for (i, q) in queries.clone().zip(q.chunks_exact_mut(group * width)) {
            // The next queries lie far away: a row of all heads lies between.
            if i + AHEAD < queries.end {
                backend.prefetch(Rows::F32(given(i + AHEAD)));
            }
            for (q, given) in q.chunks_exact_mut(width).zip(given(i).chunks_exact(d)) {
                for (q, given) in q.iter_mut().zip(given) {
                    *q = given * sequence.shape.scale;
                }
            }
        }
        let mut scores = SCORES.take();
        scores.resize(scores.len().max(rows * STRIDE), 0.0);
        let converts = match sequence.pages {
            KvPages::F32(_) | KvPages::F16(_) => width != d,
            KvPages::Q8_0(_) => true,
        };
        Self {
            backend,
            sequence,
            head,
            queries,
            rows,
            width,
            q,
            scores,
            wide: vec![0.0; if converts { BLOCK * width } else { 0 }],
        }
    }

    /// Attends to the keys of one tile; overwrites `sums`.
    pub(super) fn tile(&mut self, tile: usize, sums: &mut [f32]) {
        let (sequence, group, width) = (self.sequence, self.sequence.group, self.width);
        let sums = Sums::split(sums, self.rows);
        sums.acc.fill(0.0);
        sums.max.fill(f32::NEG_INFINITY);
        sums.sum.fill(0.0);

        let k_start = sequence.shape.k_start;
        let key = |position: usize| position.saturating_sub(k_start).min(sequence.len);
        let in_tile = key(tile * TILE)..key((tile + 1) * TILE);
        let seen = sequence.seen(&self.queries, &in_tile);
        if seen.is_empty() {
            return;
        }
        let column = |key: usize| k_start + key - tile * TILE;
        let block_len = if self.wide.is_empty() { TILE } else { BLOCK };
        let first_row = |query: usize| (query - self.queries.start) * group;

        for block in sequence.blocks(seen.clone(), block_len) {
            let keys = sequence.rows(self.head, &block, true);
            let keys = widened(self.backend, keys, &mut self.wide, &sequence, width);
            for part in sequence.parts(&self.queries, &block) {
                let (some, _) = sequence.seeing(&self.queries, &part);
                if some.is_empty() {
                    continue;
                }
                let (first, end) = (first_row(some.start), first_row(some.end));
                let keys = keys.part(part.start - block.start, part.end - block.start, width);
                let q = &self.q[first * width..end * width];
                let scores = &mut self.scores[first * STRIDE + column(part.start)..];
                self.backend.scores(q, keys, width, scores, STRIDE);
            }
        }

        // While exponentials are made memory would rest.
        let streams = self.rows <= STREAMED_ROWS;
        if streams {
            self.prefetch(seen.start, false);
        }
        for (r, scores) in self
            .scores
            .chunks_exact_mut(STRIDE)
            .take(self.rows)
            .enumerate()
        {
            let own = sequence.visible(self.queries.start + r / group, &in_tile);
            if own.is_empty() {
                continue;
            }
            // Whole vectors; other scores than the row's own have no meaning.
            let own = column(own.start)..column(own.end);
            let (start, end) = (own.start / LANES * LANES, own.end.next_multiple_of(LANES));
            scores[start..own.start].fill(f32::NEG_INFINITY);
            scores[own.end..end].fill(f32::NEG_INFINITY);
            (sums.max[r], sums.sum[r]) = self.backend.exponentials(&mut scores[start..end]);
        }

        for block in sequence.blocks(seen.clone(), block_len) {
            if streams && block.end == seen.end {
                self.prefetch(seen.end, true);
            }
            let values = sequence.rows(self.head, &block, false);
            let values = widened(self.backend, values, &mut self.wide, &sequence, width);
            let mut add = |queries: Range<usize>, keys: Range<usize>| {
                if queries.is_empty() || keys.is_empty() {
                    return;
                }
                let (first, end) = (first_row(queries.start), first_row(queries.end));
                let weights = &self.scores[first * STRIDE + column(keys.start)..];
                let values = values.part(keys.start - block.start, keys.end - block.start, width);
                let acc = &mut sums.acc[first * width..end * width];
                self.backend
                    .weighted_sum(weights, STRIDE, values, width, acc);
            };
            for part in sequence.parts(&self.queries, &block) {
                // Queries go together where all of them see the whole part, and alone where they
                // do not: a weight of 0 would carry over what is not finite.
                let (some, all) = sequence.seeing(&self.queries, &part);
                for i in some.filter(|i| !all.contains(i)) {
                    add(i..i + 1, sequence.visible(i, &part));
                }
                add(all, part);
            }
        }
    }

    /// Asks for the keys from position `first` on, or the values, if there are any.
    fn prefetch(&self, first: usize, of_keys: bool) {
        let sequence = self.sequence;
        if let Some(block) = sequence.blocks(first..sequence.len, BLOCK).next() {
            let rows = first..block.end.min(first + PREFETCH_ROWS);
            if let Stored::Rows(rows) = sequence.rows(self.head, &rows, of_keys) {
                self.backend.prefetch(rows);
            }
        }
    }

    /// Joins the sums of a tile to those of the tiles before it.
    pub(super) fn join(&self, sums: &mut [f32], tile: &[f32]) {
        let (rows, width) = (self.rows, self.width);
        let sums = Sums::split(sums, rows);
        let (tile_acc, rest) = tile.split_at(rows * width);
        let (tile_max, tile_sum) = rest.split_at(rows);
        for r in 0..rows {
            if tile_sum[r] == 0.0 {
                continue;
            }
            let max = sums.max[r].max(tile_max[r]);
            let (old, new) = (factor(sums.max[r], max), factor(tile_max[r], max));
            sums.max[r] = max;
            sums.sum[r] = sums.sum[r] * old + tile_sum[r] * new;
            let acc = &mut sums.acc[r * width..][..width];
            for (acc, tile) in acc.iter_mut().zip(&tile_acc[r * width..]) {
                *acc = *acc * old + tile * new;
            }
        }
    }

    /// Sums of no tile at all.
    pub(super) fn no_sums(&self) -> Vec<f32> {
        let mut sums = vec![0.0; sums_len(&self.sequence, &self.queries)];
        Sums::split(&mut sums, self.rows)
            .max
            .fill(f32::NEG_INFINITY);
        sums
    }

    /// Divides by the sum of the weights: `out` is `[g, head_dim]` for each query.
    pub(super) fn finish(&self, sums: &mut [f32], out: &mut [&mut [f32]]) {
        let sums = Sums::split(sums, self.rows);
        let d = self.sequence.shape.head_dim;
        let mut of_rows = sums.acc.chunks_exact(self.width).zip(sums.sum);
        for i in 0..out.len() {
            if let Some(ahead) = out.get(i + AHEAD) {
                self.backend.prefetch(Rows::F32(ahead));
            }
            let out = out[i].chunks_exact_mut(d);
            for (out, (acc, sum)) in out.zip(&mut of_rows) {
                for (out, acc) in out.iter_mut().zip(acc) {
                    *out = if *sum == 0.0 { 0.0 } else { acc / *sum };
                }
            }
        }
    }
}

impl Drop for Queries<'_> {
    fn drop(&mut self) {
        SCORES.set(std::mem::take(&mut self.scores));
    }
}

/// What is known of some rows after some tiles, in one slice: `sum_j e_j v_j` `[rows, width]`,
/// the largest score, and `sum_j e_j` with `e_j = exp(score_j - max)`.
struct Sums<'a> {
    acc: &'a mut [f32],
    max: &'a mut [f32],
    sum: &'a mut [f32],
}

impl<'a> Sums<'a> {
    fn split(sums: &'a mut [f32], rows: usize) -> Self {
        let (acc, rest) = sums.split_at_mut(sums.len() - 2 * rows);
        let (max, sum) = rest.split_at_mut(rows);
        Self { acc, max, sum }
    }
}

/// Elements of [`Sums`].
pub(super) fn sums_len(sequence: &Sequence<'_>, queries: &Range<usize>) -> usize {
    let width = sequence.shape.head_dim.next_multiple_of(LANES);
    queries.len() * sequence.group * (width + 2)
}

/// `exp(from - to)`, 0 where there was nothing before.
fn factor(from: f32, to: f32) -> f32 {
    if from == to { 1.0 } else { (from - to).exp() }
}

/// `rows` as the backend shall have them: as they are, or in `wide` if that has been given room.
fn widened<'r>(
    backend: Backend,
    stored: Stored<'r>,
    wide: &'r mut [f32],
    sequence: &Sequence<'_>,
    width: usize,
) -> Rows<'r> {
    let d = sequence.shape.head_dim;
    let rows = match stored {
        Stored::Rows(rows) if wide.is_empty() => return rows,
        Stored::Rows(rows) => rows,
        Stored::Q8_0(rows) => {
            let row = q8_0_row_bytes(d);
            let wide = &mut wide[..rows.len() / row * width];
            for (wide, row) in wide.chunks_exact_mut(width).zip(rows.chunks_exact(row)) {
                backend.widen_q8_0(row, &mut wide[..d]);
            }
            return Rows::F32(wide);
        }
    };
    let count = match rows {
        Rows::F32(rows) => rows.len() / d,
        Rows::F16(rows) => rows.len() / d,
    };
    let wide = &mut wide[..count * width];
    match rows {
        Rows::F16(rows) if d == width => backend.widen(rows, wide),
        Rows::F16(rows) => {
            for (wide, row) in wide.chunks_exact_mut(width).zip(rows.chunks_exact(d)) {
                backend.widen(row, &mut wide[..d]);
            }
        }
        Rows::F32(rows) => {
            for (wide, row) in wide.chunks_exact_mut(width).zip(rows.chunks_exact(d)) {
                wide[..d].copy_from_slice(row);
            }
        }
    }
    Rows::F32(wide)
}
