//! One tile of keys for queries that go through them together.

use std::cell::RefCell;
use std::ops::Range;

use super::pass::{Pass, Stored, TILE};
use super::{AttentionShape, Rows, q8_0_row_bytes};
use crate::dispatch::Backend;

/// Keys that are widened before they are multiplied, where a backend does not read them as they
/// are.
const BLOCK: usize = 64;

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

/// The queries of some heads of one key/value head that go through its keys together.
pub(super) struct Unit<'a> {
    /// `[l, num_heads, d]` of the job.
    pub(super) q: &'a [f32],
    pub(super) num_heads: usize,
    pub(super) shape: AttentionShape,
    pub(super) heads: Range<usize>,
    pub(super) queries: Range<usize>,
    /// Whether rows are `[heads, l]` rather than `[l, heads]`.
    pub(super) heads_first: bool,
    pub(super) passes: Vec<Pass<'a>>,
}

impl Unit<'_> {
    /// The tiles of all passes, in order: each with the pass that it is of.
    pub(super) fn tiles(&self) -> impl Iterator<Item = (usize, usize)> {
        let passes = self.passes.iter().enumerate();
        passes.flat_map(|(i, pass)| pass.tiles.clone().map(move |tile| (i, tile)))
    }

    pub(super) fn num_tiles(&self) -> usize {
        self.passes.iter().map(|pass| pass.tiles.len()).sum()
    }

    fn rows(&self) -> usize {
        self.queries.len() * self.heads.len()
    }

    /// head_dim, padded.
    fn width(&self) -> usize {
        self.shape.head_dim.next_multiple_of(LANES)
    }

    /// Where the row of a query, the one at `i`, and of a head is.
    fn row(&self, i: usize, head: usize) -> usize {
        match self.heads_first {
            true => head * self.queries.len() + i,
            false => i * self.heads.len() + head,
        }
    }

    /// Elements of the [`Sums`] of all rows.
    pub(super) fn sums_len(&self) -> usize {
        self.rows() * (self.width() + 2)
    }

    /// Sums of no tile at all.
    pub(super) fn no_sums(&self) -> Vec<f32> {
        let mut sums = vec![0.0; self.sums_len()];
        Sums::split(&mut sums, self.rows(), self.width())
            .max
            .fill(f32::NEG_INFINITY);
        sums
    }
}

/// The queries of a unit, and memory to work in.
pub(super) struct Queries<'a> {
    backend: Backend,
    unit: &'a Unit<'a>,
    /// head_dim, padded.
    width: usize,
    /// Scaled, `[rows, width]`.
    q: Vec<f32>,
    /// Scores, then weights, `[rows, STRIDE]` or longer.
    scores: Vec<f32>,
    /// A block of keys or values, widened and padded, `[BLOCK, width]`; empty where the backend
    /// reads them as they are.
    wide: Vec<f32>,
}

impl<'a> Queries<'a> {
    pub(super) fn new(backend: Backend, unit: &'a Unit<'a>) -> Self {
        let (d, width, heads) = (unit.shape.head_dim, unit.width(), unit.heads.len());
        let mut q = vec![0.0; unit.rows() * width];
        let given = |i: usize| {
            let start = (i * unit.num_heads + unit.heads.start) * d;
            &unit.q[start..start + heads * d]
        };
        for (i, query) in unit.queries.clone().enumerate() {
            // The next queries lie far away: a row of all heads lies between.
            if query + AHEAD < unit.queries.end {
                backend.prefetch(Rows::F32(given(query + AHEAD)));
            }
            for (head, given) in given(query).chunks_exact(d).enumerate() {
                let q = &mut q[unit.row(i, head) * width..][..d];
                for (q, given) in q.iter_mut().zip(given) {
                    *q = given * unit.shape.scale;
                }
            }
        }
        let mut scores = SCORES.take();
        scores.resize(scores.len().max(unit.rows() * STRIDE), 0.0);
        let converts = unit.passes.iter().any(|pass| pass.is_q8_0()) || width != d;
        Self {
            backend,
            unit,
            width,
            q,
            scores,
            wide: vec![0.0; if converts { BLOCK * width } else { 0 }],
        }
    }

    /// Attends to the keys of one tile of a pass; overwrites `sums`, of the rows of the pass.
    pub(super) fn tile(&mut self, pass: usize, tile: usize, sums: &mut [f32]) {
        let (pass, width, backend) = (&self.unit.passes[pass], self.width, self.backend);
        let (rows, group) = (pass.rows.len(), pass.group);
        let sums = Sums::split(sums, rows, width);
        sums.acc.fill(0.0);
        sums.max.fill(f32::NEG_INFINITY);
        sums.sum.fill(0.0);

        let in_tile = pass.in_tile(tile);
        let seen = pass.seen(&in_tile);
        if seen.is_empty() {
            return;
        }
        let column = |key: usize| pass.shape.k_start + key - tile * TILE;
        let first_row = |query: usize| (query - pass.queries.start) * group;
        let converts = !self.wide.is_empty();
        let block_len = if converts { BLOCK } else { TILE };
        let runs = pass.runs(seen.clone(), block_len, !converts);
        let q = &self.q[pass.rows.start * width..pass.rows.end * width];

        for run in &runs {
            let (some, _) = pass.seeing(run);
            if some.is_empty() {
                continue;
            }
            let keys = stored(backend, pass, run, true, &mut self.wide, width);
            let (first, end) = (first_row(some.start), first_row(some.end));
            let scores = &mut self.scores[first * STRIDE + column(run.start)..];
            backend.scores(&q[first * width..end * width], &keys, width, scores, STRIDE);
        }

        // While exponentials are made memory would rest.
        let streams = rows <= STREAMED_ROWS;
        if streams {
            prefetch(backend, pass, seen.start, false);
        }
        let scores = self.scores.chunks_exact_mut(STRIDE).take(rows);
        for (r, scores) in scores.enumerate() {
            let own = pass.visible(pass.queries.start + r / group, &in_tile);
            if own.is_empty() {
                continue;
            }
            // Whole vectors; other scores than the row's own have no meaning.
            let own = column(own.start)..column(own.end);
            let (start, end) = (own.start / LANES * LANES, own.end.next_multiple_of(LANES));
            scores[start..own.start].fill(f32::NEG_INFINITY);
            scores[own.end..end].fill(f32::NEG_INFINITY);
            (sums.max[r], sums.sum[r]) = backend.exponentials(&mut scores[start..end]);
        }

        for run in &runs {
            if streams && run.end == seen.end {
                prefetch(backend, pass, seen.end, true);
            }
            let values = stored(backend, pass, run, false, &mut self.wide, width);
            let mut add = |queries: Range<usize>, values: &[Rows<'_>], first_key: usize| {
                let (first, end) = (first_row(queries.start), first_row(queries.end));
                let weights = &self.scores[first * STRIDE + column(first_key)..];
                let acc = &mut sums.acc[first * width..end * width];
                backend.weighted_sum(weights, STRIDE, values, width, acc);
            };
            // Queries go together where all of them see the whole run, and alone where they do
            // not: a weight of 0 would carry over what is not finite.
            let (some, all) = pass.seeing(run);
            for i in some.filter(|i| !all.contains(i)) {
                let keys = pass.visible(i, run);
                // Such a run lies in one block.
                let values = values
                    .iter()
                    .map(|values| values.part(keys.start - run.start, keys.end - run.start, width));
                let values: Vec<_> = values.collect();
                add(i..i + 1, &values, keys.start);
            }
            if !all.is_empty() {
                add(all, &values, run.start);
            }
        }
    }

    /// Joins the sums of a tile of a pass to those of the tiles before it.
    pub(super) fn join(&self, pass: usize, sums: &mut [f32], tile: &[f32]) {
        let (rows, width) = (&self.unit.passes[pass].rows, self.width);
        let sums = Sums::split(sums, self.unit.rows(), width);
        let (tile_acc, rest) = tile.split_at(rows.len() * width);
        let (tile_max, tile_sum) = rest.split_at(rows.len());
        for (tile, r) in rows.clone().enumerate() {
            if tile_sum[tile] == 0.0 {
                continue;
            }
            let max = sums.max[r].max(tile_max[tile]);
            let (old, new) = (factor(sums.max[r], max), factor(tile_max[tile], max));
            sums.max[r] = max;
            sums.sum[r] = sums.sum[r] * old + tile_sum[tile] * new;
            let acc = &mut sums.acc[r * width..][..width];
            for (acc, tile) in acc.iter_mut().zip(&tile_acc[tile * width..]) {
                *acc = *acc * old + tile * new;
            }
        }
    }

    /// Divides by the sum of the weights: `out` is `[heads, head_dim]` for each query.
    pub(super) fn finish(&self, sums: &mut [f32], out: &mut [&mut [f32]]) {
        let (unit, width) = (self.unit, self.width);
        let sums = Sums::split(sums, unit.rows(), width);
        for i in 0..out.len() {
            if let Some(ahead) = out.get(i + AHEAD) {
                self.backend.prefetch(Rows::F32(ahead));
            }
            let out = out[i].chunks_exact_mut(unit.shape.head_dim);
            for (head, out) in out.enumerate() {
                let row = unit.row(i, head);
                let (acc, sum) = (&sums.acc[row * width..], sums.sum[row]);
                for (out, acc) in out.iter_mut().zip(acc) {
                    *out = if sum == 0.0 { 0.0 } else { acc / sum };
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
    /// The sums of so many rows, at the start of `sums`.
    fn split(sums: &'a mut [f32], rows: usize, width: usize) -> Self {
        let (acc, rest) = sums[..rows * (width + 2)].split_at_mut(rows * width);
        let (max, sum) = rest.split_at_mut(rows);
        Self { acc, max, sum }
    }
}

/// `exp(from - to)`, 0 where there was nothing before.
fn factor(from: f32, to: f32) -> f32 {
    if from == to { 1.0 } else { (from - to).exp() }
}

/// The keys of a run, or its values, as the backend shall have them: as they are, by blocks, or in
/// `wide` if that has been given room.
fn stored<'r>(
    backend: Backend,
    pass: &Pass<'r>,
    run: &Range<usize>,
    of_keys: bool,
    wide: &'r mut [f32],
    width: usize,
) -> Vec<Rows<'r>> {
    let blocks = pass.blocks(run.clone(), if wide.is_empty() { TILE } else { BLOCK });
    let mut blocks = blocks.map(|block| pass.stored(&block, of_keys));
    if !wide.is_empty() {
        // A run of keys that are converted lies in one block.
        let block = blocks.next();
        let widened = block.map(|block| widened(backend, block, wide, pass.shape.head_dim, width));
        return widened.into_iter().collect();
    }
    let as_they_are = blocks.filter_map(|block| match block {
        Stored::Rows(rows) => Some(rows),
        Stored::Q8_0(_) => None,
    });
    as_they_are.collect()
}

/// Asks for the keys from position `first` on, or the values, if there are any.
fn prefetch(backend: Backend, pass: &Pass<'_>, first: usize, of_keys: bool) {
    if let Some(block) = pass.blocks(first..pass.len, BLOCK).next() {
        let rows = first..block.end.min(first + PREFETCH_ROWS);
        if let Stored::Rows(rows) = pass.stored(&rows, of_keys) {
            backend.prefetch(rows);
        }
    }
}

/// Rows as f32 of `width` elements, in `wide`.
fn widened<'r>(
    backend: Backend,
    stored: Stored<'r>,
    wide: &'r mut [f32],
    d: usize,
    width: usize,
) -> Rows<'r> {
    let rows = match stored {
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
