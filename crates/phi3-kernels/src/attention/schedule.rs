//! The work of all jobs of a call, cut into pieces for the threads.

use std::ops::Range;

use super::pass::{Pass, TILE};
use super::tile::{Queries, Unit};
use super::{AttentionJob, sparse};
use crate::dispatch::Backend;
use crate::threads;

/// Rows of queries that go through the keys together: a backend lays keys and values out once for
/// all of them, and their scores stay in the second-level cache. A multiple of a backend's
/// register block.
const MAX_ROWS: usize = 144;

/// The same where keys are blocks of a sparse layout, whose queries are those of one block: all
/// heads of a group.
const MAX_SPARSE_ROWS: usize = 256;

/// Tiles that a piece has at least where a sequence's keys are split between threads.
const MIN_SPLIT_TILES: usize = 2;

/// What one thread does at a time.
enum Piece<'u, 'o, 'a> {
    /// All tiles of a unit, to its output.
    Whole(&'u Unit<'a>, &'u mut [&'o mut [f32]]),
    /// Some tiles of a unit, to the sums of each.
    Tiles(&'u Unit<'a>, Range<usize>, &'u mut [f32]),
}

pub(super) fn run(jobs: &mut [AttentionJob<'_>], backend: Backend) {
    let mut units = Vec::new();
    // Where the results go: `[heads, d]` for each query of a unit, after those of the units before.
    let mut outs: Vec<&mut [f32]> = Vec::new();
    for job in jobs {
        let d = job.shape.head_dim;
        let heads = unit_heads(job);
        let spans = spans(job, heads);
        for head in (0..job.num_heads).step_by(heads) {
            for queries in &spans {
                units.push(unit(job, head..head + heads, queries.clone()));
            }
        }
        let (first_out, queries) = (outs.len(), job.queries());
        let in_query = job.num_heads / heads;
        outs.resize_with(first_out + in_query * queries, Default::default);
        for (i, out) in job.out.chunks_exact_mut(heads * d).enumerate() {
            outs[first_out + i % in_query * queries + i / in_query] = out;
        }
    }
    let work = units.iter().map(Unit::work).fold(0, usize::saturating_add);

    // The sums of every tile of a unit that is split, until they are joined.
    let tiles_per_piece = split(&units, work);
    let is_split = |unit: &Unit<'_>| tiles_per_piece.is_some_and(|n| unit.num_tiles() > n);
    let mut sums: Vec<Vec<f32>> = units
        .iter()
        .map(|unit| {
            let tiles = if is_split(unit) { unit.num_tiles() } else { 0 };
            vec![0.0; tiles * unit.sums_len()]
        })
        .collect();

    let mut pieces = Vec::new();
    let mut rest = outs.as_mut_slice();
    for (unit, sums) in units.iter().zip(&mut sums) {
        let out;
        (out, rest) = rest.split_at_mut(unit.queries.len());
        match tiles_per_piece {
            Some(n) if is_split(unit) => {
                let firsts = (0..unit.num_tiles()).step_by(n);
                let sums = sums.chunks_mut(n * unit.sums_len());
                for (first, sums) in firsts.zip(sums) {
                    let tiles = first..(first + n).min(unit.num_tiles());
                    pieces.push(Piece::Tiles(unit, tiles, sums));
                }
            }
            _ => pieces.push(Piece::Whole(unit, out)),
        }
    }
    if threads::chunk_len(pieces.len(), work) < pieces.len() {
        threads::for_each(&mut pieces, |_, piece| piece.run(backend));
    } else {
        pieces.iter_mut().for_each(|piece| piece.run(backend));
    }
    drop(pieces);

    let mut rest = outs.as_mut_slice();
    for (unit, sums) in units.iter().zip(&sums) {
        let out;
        (out, rest) = rest.split_at_mut(unit.queries.len());
        if !sums.is_empty() {
            unit.join_all(backend, sums, out);
        }
    }
}

/// Heads whose queries go together: those of a key/value head or, where they become too many rows,
/// an equal part of them.
fn unit_heads(job: &AttentionJob<'_>) -> usize {
    let Some(layout) = job.layout else {
        return job.group();
    };
    let queries = layout.block_size().min(job.queries());
    let fits = |heads: &usize| {
        job.group().is_multiple_of(*heads) && heads.saturating_mul(queries) <= MAX_SPARSE_ROWS
    };
    (1..=job.group()).rev().find(fits).unwrap_or(1)
}

/// The queries of a job in pieces that go together, none of which goes beyond a block of a sparse
/// layout.
fn spans(job: &AttentionJob<'_>, heads: usize) -> Vec<Range<usize>> {
    let rows = job.layout.map_or(MAX_ROWS, |_| MAX_SPARSE_ROWS);
    let step = (rows / heads).max(1);
    let mut spans = Vec::new();
    let mut first = 0;
    while first < job.queries() {
        let to_block = |size: usize| size - (job.shape.q_start + first) % size;
        let block = job.layout.map_or(step, |l| to_block(l.block_size()));
        let end = job.queries().min(first + step.min(block));
        spans.push(first..end);
        first = end;
    }
    spans
}

fn unit<'a>(job: &AttentionJob<'a>, heads: Range<usize>, queries: Range<usize>) -> Unit<'a> {
    let passes = match job.layout {
        Some(layout) => sparse::passes(job, layout, heads.clone(), queries.clone()),
        None => vec![Pass::whole(job, heads.start / job.group(), queries.clone())],
    };
    Unit {
        q: job.q,
        num_heads: job.num_heads,
        shape: job.shape,
        heads,
        queries,
        heads_first: job.layout.is_some(),
        passes,
    }
}

/// How many tiles a piece gets where units are too few for the threads: `None` where they are
/// not.
fn split(units: &[Unit<'_>], work: usize) -> Option<usize> {
    let threads = threads::num_threads();
    let longest = units.iter().map(|unit| unit.num_tiles()).max()?;
    if units.len() >= 2 * threads || threads::chunk_len(longest, work) == longest {
        return None;
    }
    let pieces = (4 * threads).div_ceil(units.len());
    Some(longest.div_ceil(pieces).max(MIN_SPLIT_TILES))
}

impl Unit<'_> {
    /// Multiply-adds.
    fn work(&self) -> usize {
        let passes = self.passes.iter();
        let rows = passes.map(|pass| pass.tiles.len().saturating_mul(pass.rows.len()));
        let products = (2 * TILE).saturating_mul(rows.fold(0, usize::saturating_add));
        products.saturating_mul(self.shape.head_dim)
    }

    /// Joins the sums of all tiles, in order.
    fn join_all(&self, backend: Backend, sums: &[f32], out: &mut [&mut [f32]]) {
        let queries = Queries::new(backend, self);
        let mut joined = self.no_sums();
        for ((pass, _), sums) in self.tiles().zip(sums.chunks_exact(self.sums_len())) {
            queries.join(pass, &mut joined, sums);
        }
        queries.finish(&mut joined, out);
    }
}

impl Piece<'_, '_, '_> {
    fn run(&mut self, backend: Backend) {
        match self {
            Self::Whole(unit, out) => {
                let mut queries = Queries::new(backend, unit);
                let mut joined = unit.no_sums();
                let mut sums = vec![0.0; joined.len()];
                for (pass, tile) in unit.tiles() {
                    queries.tile(pass, tile, &mut sums);
                    queries.join(pass, &mut joined, &sums);
                }
                queries.finish(&mut joined, out);
            }
            Self::Tiles(unit, tiles, sums) => {
                let mut queries = Queries::new(backend, unit);
                let sums = sums.chunks_exact_mut(unit.sums_len());
                let of_piece = unit.tiles().skip(tiles.start).take(tiles.len());
                for ((pass, tile), sums) in of_piece.zip(sums) {
                    queries.tile(pass, tile, sums);
                }
            }
        }
    }
}
