//! The work of all jobs of a call, cut into pieces for the threads.

use std::ops::Range;

use super::AttentionJob;
use super::tile::{Queries, Sequence};
use crate::dispatch::Backend;
use crate::threads;

/// Rows of queries that go through the keys together: a backend lays keys and values out once for
/// all of them, and their scores stay in the second-level cache. A multiple of a backend's
/// register block.
const MAX_ROWS: usize = 144;

/// Tiles that a piece has at least where a sequence's keys are split between threads.
const MIN_SPLIT_TILES: usize = 2;

/// The queries of one key/value head that go through its keys together.
struct Unit<'a> {
    sequence: Sequence<'a>,
    head: usize,
    queries: Range<usize>,
    tiles: Range<usize>,
}

/// Where the results of a unit go: `[g, d]` for each query.
type Out<'o> = Vec<&'o mut [f32]>;

/// What one thread does at a time.
enum Piece<'u, 'o, 'a> {
    /// All tiles of a unit, to its output.
    Whole(&'u Unit<'a>, &'u mut Out<'o>),
    /// Some tiles of a unit, to the sums of each.
    Tiles(&'u Unit<'a>, Range<usize>, &'u mut [f32]),
}

pub(super) fn run(jobs: &mut [AttentionJob<'_>], backend: Backend) {
    let mut units = Vec::new();
    let mut outs: Vec<Out<'_>> = Vec::new();
    let mut work = 0usize;
    for job in jobs {
        let sequence = Sequence::new(job);
        let (queries, kv_heads) = (job.queries(), job.num_kv_heads);
        let step = (MAX_ROWS / sequence.group).max(1);
        let first_out = outs.len();
        let steps = queries.div_ceil(step);
        for head in 0..kv_heads {
            for first in (0..queries).step_by(step) {
                let queries = first..(first + step).min(queries);
                let tiles = sequence.tiles(queries.clone());
                let rows = queries.len() * sequence.group;
                let products = 2 * rows * tiles.len() * super::tile::TILE;
                work = work.saturating_add(products.saturating_mul(sequence.shape.head_dim));
                outs.push(Vec::with_capacity(queries.len()));
                units.push(Unit {
                    sequence,
                    head,
                    queries,
                    tiles,
                });
            }
        }
        let out = job
            .out
            .chunks_exact_mut(sequence.group * sequence.shape.head_dim);
        for (i, out) in out.enumerate() {
            let (query, head) = (i / kv_heads, i % kv_heads);
            outs[first_out + head * steps + query / step].push(out);
        }
    }

    // The sums of every tile of a unit that is split, until they are joined.
    let tiles_per_piece = split(&units, work);
    let is_split = |unit: &Unit<'_>| tiles_per_piece.is_some_and(|n| unit.tiles.len() > n);
    let mut sums: Vec<Vec<f32>> = units
        .iter()
        .map(|unit| {
            let tiles = if is_split(unit) { unit.tiles.len() } else { 0 };
            vec![0.0; tiles * unit.sums_len()]
        })
        .collect();

    let mut pieces = Vec::new();
    for ((unit, out), sums) in units.iter().zip(&mut outs).zip(&mut sums) {
        match tiles_per_piece {
            Some(n) if is_split(unit) => {
                let firsts = unit.tiles.clone().step_by(n);
                let sums = sums.chunks_mut(n * unit.sums_len());
                for (first, sums) in firsts.zip(sums) {
                    let tiles = first..(first + n).min(unit.tiles.end);
                    pieces.push(Piece::Tiles(unit, tiles, sums));
                }
            }
            _ => pieces.push(Piece::Whole(unit, out)),
        }
    }
    if threads::chunk_len(pieces.len(), work) < pieces.len() {
        threads::for_each(&mut pieces, |piece| piece.run(backend));
    } else {
        pieces.iter_mut().for_each(|piece| piece.run(backend));
    }
    drop(pieces);

    for ((unit, out), sums) in units.iter().zip(&mut outs).zip(&sums) {
        if !sums.is_empty() {
            unit.join_all(backend, sums, out);
        }
    }
}

/// How many tiles a piece gets where units are too few for the threads: `None` where they are
/// not.
fn split(units: &[Unit<'_>], work: usize) -> Option<usize> {
    let threads = threads::num_threads();
    let longest = units.iter().map(|unit| unit.tiles.len()).max()?;
    if units.len() >= 2 * threads || threads::chunk_len(longest, work) == longest {
        return None;
    }
    let pieces = (4 * threads).div_ceil(units.len());
    Some(longest.div_ceil(pieces).max(MIN_SPLIT_TILES))
}

impl Unit<'_> {
    fn sums_len(&self) -> usize {
        super::tile::sums_len(&self.sequence, &self.queries)
    }

    fn queries(&self, backend: Backend) -> Queries<'_> {
        Queries::new(backend, self.sequence, self.head, self.queries.clone())
    }

    /// Joins the sums of all tiles, in order.
    fn join_all(&self, backend: Backend, sums: &[f32], out: &mut Out<'_>) {
        let queries = self.queries(backend);
        let mut joined = queries.no_sums();
        for sums in sums.chunks_exact(self.sums_len()) {
            queries.join(&mut joined, sums);
        }
        queries.finish(&mut joined, out);
    }
}

impl Piece<'_, '_, '_> {
    fn run(&mut self, backend: Backend) {
        match self {
            Self::Whole(unit, out) => {
                let mut queries = unit.queries(backend);
                let mut joined = queries.no_sums();
                let mut sums = vec![0.0; joined.len()];
                for tile in unit.tiles.clone() {
                    queries.tile(tile, &mut sums);
                    queries.join(&mut joined, &sums);
                }
                queries.finish(&mut joined, out);
            }
            Self::Tiles(unit, tiles, sums) => {
                let mut queries = unit.queries(backend);
                let sums = sums.chunks_exact_mut(unit.sums_len());
                for (tile, sums) in tiles.clone().zip(sums) {
                    queries.tile(tile, sums);
                }
            }
        }
    }
}
