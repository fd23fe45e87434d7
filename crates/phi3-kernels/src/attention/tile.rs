//! One tile of keys for the queries of one key/value head.

use std::ops::Range;

use super::{AttentionJob, AttentionShape, KvPages, Rows, q8_0_row_bytes};
use crate::dispatch::Backend;

/// Positions of a tile: softmax is joined at its multiples.
pub(super) const TILE: usize = 256;

/// Keys that are multiplied with all queries before the next ones: as f32 they stay in the
/// first-level cache.
const BLOCK: usize = 64;

/// Rows that a backend gets at once. Each sees a few more keys than the one before, so a group
/// is small; it is a multiple of what register blocks take.
const ROW_GROUP: usize = 12;

/// Elements from one row of scores to the next: not a power of two, so that rows do not compete
/// for the same lines of the cache.
const STRIDE: usize = TILE + 16;

/// Rows up to which a backend widens half-precision keys while it multiplies: more would widen
/// them again and again.
const DIRECT_ROWS: usize = 4;

/// Rows of keys or values that are asked for ahead where the next ones lie elsewhere: about as many
/// lines as a core can wait for.
const PREFETCH_ROWS: usize = 8;

/// Widths of vectors that backends need not care about: rows are padded to a multiple.
const LANES: usize = 8;

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

    /// The smallest range that holds all keys of `within` that a query of `queries` sees, and the
    /// largest that holds only keys that each of them sees.
    fn visible_to(
        &self,
        queries: Range<usize>,
        within: &Range<usize>,
    ) -> (Range<usize>, Range<usize>) {
        let (mut some, mut all) = (within.end..within.start, within.clone());
        for i in queries {
            let seen = self.visible(i, within);
            if seen.is_empty() {
                all = 0..0;
            } else {
                some = some.start.min(seen.start)..some.end.max(seen.end);
                all = all.start.max(seen.start)..all.end.min(seen.end);
            }
        }
        (some, all)
    }

    /// The tiles with keys that a query of `queries` sees.
    pub(super) fn tiles(&self, queries: Range<usize>) -> Range<usize> {
        let (seen, _) = self.visible_to(queries, &(0..self.len));
        if seen.is_empty() {
            return 0..0;
        }
        let k_start = self.shape.k_start;
        (k_start + seen.start) / TILE..(k_start + seen.end - 1) / TILE + 1
    }

    /// Cuts `keys` at the multiples of [`BLOCK`] in absolute positions and at page ends.
    fn blocks(self, keys: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let mut next = keys.start;
        std::iter::from_fn(move || {
            let start = next;
            let to_block = BLOCK - (self.shape.k_start + start) % BLOCK;
            let to_page = self.page_len - start % self.page_len;
            next = keys.end.min(start + to_block.min(to_page));
            (start < keys.end).then_some(start..next)
        })
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
    /// Scores, then weights, `[rows, STRIDE]`.
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
        for (r, q) in q.chunks_exact_mut(width).enumerate() {
            let i = queries.start + r / group;
            let start = (i * sequence.num_heads + head * group + r % group) * d;
            for (q, given) in q.iter_mut().zip(&sequence.q[start..start + d]) {
                *q = given * sequence.shape.scale;
            }
        }
        let converts = match sequence.pages {
            KvPages::F32(_) => width != d,
            KvPages::F16(_) => width != d || rows > DIRECT_ROWS,
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
            scores: vec![0.0; rows * STRIDE],
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
        let (seen, _) = sequence.visible_to(self.queries.clone(), &in_tile);
        if seen.is_empty() {
            return;
        }
        let column = |key: usize| k_start + key - tile * TILE;
        let of_group = |first: usize, end: usize| {
            let start = self.queries.start;
            start + first / group..start + (end - 1) / group + 1
        };
        let groups = || {
            let ends = |first: usize| (first, (first + ROW_GROUP).min(self.rows));
            (0..self.rows).step_by(ROW_GROUP).map(ends)
        };

        self.scores.fill(f32::NEG_INFINITY);
        for block in sequence.blocks(seen.clone()) {
            let keys = sequence.rows(self.head, &block, true);
            let keys = widened(self.backend, keys, &mut self.wide, &sequence, width);
            for (first, end) in groups() {
                let (some, all) = sequence.visible_to(of_group(first, end), &block);
                if some.is_empty() {
                    continue;
                }
                let keys = keys.part(some.start - block.start, some.end - block.start, width);
                let q = &self.q[first * width..end * width];
                let scores = &mut self.scores[first * STRIDE + column(some.start)..];
                self.backend.scores(q, keys, width, scores, STRIDE);
                if some == all {
                    continue;
                }
                for r in first..end {
                    let own = sequence.visible(self.queries.start + r / group, &block);
                    let scores = &mut self.scores[r * STRIDE..][..TILE];
                    let (before, after) = if own.is_empty() {
                        (some.clone(), 0..0)
                    } else {
                        (some.start..own.start, own.end..some.end)
                    };
                    for hidden in [before, after] {
                        let columns = column(hidden.start.max(some.start))
                            ..column(hidden.end.max(some.start));
                        scores[columns].fill(f32::NEG_INFINITY);
                    }
                }
            }
        }

        // While exponentials are made memory would rest.
        let streams = self.rows <= DIRECT_ROWS;
        if streams {
            self.prefetch(seen.start, false);
        }
        let first_column = column(seen.start) / LANES * LANES;
        let end_column = column(seen.end).next_multiple_of(LANES);
        for (r, scores) in self.scores.chunks_exact_mut(STRIDE).enumerate() {
            let scores = &mut scores[first_column..end_column];
            (sums.max[r], sums.sum[r]) = self.backend.exponentials(scores);
        }

        for block in sequence.blocks(seen.clone()) {
            if streams && block.end == seen.end {
                self.prefetch(seen.end, true);
            }
            let values = sequence.rows(self.head, &block, false);
            let values = widened(self.backend, values, &mut self.wide, &sequence, width);
            let mut add = |first: usize, end: usize, keys: Range<usize>| {
                if keys.is_empty() {
                    return;
                }
                let weights = &self.scores[first * STRIDE + column(keys.start)..];
                let values = values.part(keys.start - block.start, keys.end - block.start, width);
                let acc = &mut sums.acc[first * width..end * width];
                self.backend
                    .weighted_sum(weights, STRIDE, values, width, acc);
            };
            for (first, end) in groups() {
                // Rows go together through the keys that all of them see, and alone through the
                // rest: a weight of 0 would carry over what is not finite.
                let (some, all) = sequence.visible_to(of_group(first, end), &block);
                if some == all {
                    add(first, end, all);
                    continue;
                }
                let own = |r: usize| sequence.visible(self.queries.start + r / group, &block);
                if all.is_empty() {
                    (first..end).for_each(|r| add(r, r + 1, own(r)));
                    continue;
                }
                (first..end).for_each(|r| add(r, r + 1, own(r).start..all.start));
                add(first, end, all.clone());
                (first..end).for_each(|r| add(r, r + 1, all.end..own(r).end));
            }
        }
    }

    /// Asks for the keys from position `first` on, or the values, if there are any.
    fn prefetch(&self, first: usize, of_keys: bool) {
        let sequence = self.sequence;
        if let Some(block) = sequence.blocks(first..sequence.len).next() {
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

    /// Divides by the sum of the weights: `out` is `[rows, head_dim]`.
    pub(super) fn finish(&self, sums: &mut [f32], out: &mut [f32]) {
        let sums = Sums::split(sums, self.rows);
        let out = out.chunks_exact_mut(self.sequence.shape.head_dim);
        let acc = sums.acc.chunks_exact(self.width);
        for ((out, acc), sum) in out.zip(acc).zip(sums.sum) {
            for (out, acc) in out.iter_mut().zip(acc) {
                *out = if *sum == 0.0 { 0.0 } else { acc / *sum };
            }
        }
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
