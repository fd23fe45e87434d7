//! The work of all jobs of a call, cut into pieces for the threads.

use std::ops::Range;

use super::AttentionJob;
use super::tile::{Queries, Sequence};
use crate::dispatch::Backend;
use crate::threads;

/// Rows of queries that go through the keys together: half-precision keys are widened once for
/// all of them, and their scores stay in the second-level cache. A multiple of a backend's
/// register block.
const MAX_ROWS: usize = 96;

/// Tiles that a piece has at least where a sequence's keys are split between threads.
const MIN_SPLIT_TILES: usize = 2;

/// The queries of one key/value head that go through its keys together.
#[derive(Clone)]
struct Unit<'a> {
    sequence: Sequence<'a>,
    head: usize,
    queries: Range<usize>,
    tiles: Range<usize>,
}

/// What one thread does at a time.
enum Piece<'u, 'a> {
    /// All tiles of a unit, to its output `[l, g, d]`.
    Whole(&'u Unit<'a>, &'u mut [f32]),
    /// Some tiles of a unit, to the sums of each.
    Tiles(&'u Unit<'a>, Range<usize>, &'u mut [f32]),
}

pub(super) fn run(jobs: &mut [AttentionJob<'_>], backend: Backend) {
    let mut units = Vec::new();
    let mut work = 0usize;
    for job in jobs.iter() {
        let sequence = Sequence::new(job);
        let step = (MAX_ROWS / sequence.group).max(1);
        for head in 0..job.num_kv_heads {
            for first in (0..job.queries()).step_by(step) {
                let queries = first..(first + step).min(job.queries());
                let tiles = sequence.tiles(queries.clone());
                let rows = queries.len() * sequence.group;
                let products = 2 * rows * tiles.len() * super::tile::TILE;
                work = work.saturating_add(products.saturating_mul(sequence.shape.head_dim));
                units.push(Unit {
                    sequence,
                    head,
                    queries,
                    tiles,
                });
            }
        }
    }

    let total = units.iter().map(Unit::out_len).sum();
    let mut out = vec![0.0; total];
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
    let mut rest = &mut out[..];
    for (unit, sums) in units.iter().zip(&mut sums) {
        let (part, after) = std::mem::take(&mut rest).split_at_mut(unit.out_len());
        rest = after;
        match tiles_per_piece {
            Some(n) if is_split(unit) => {
                let firsts = unit.tiles.clone().step_by(n);
                let sums = sums.chunks_mut(n * unit.sums_len());
                for (first, sums) in firsts.zip(sums) {
                    let tiles = first..(first + n).min(unit.tiles.end);
                    pieces.push(Piece::Tiles(unit, tiles, sums));
                }
            }
            _ => pieces.push(Piece::Whole(unit, part)),
        }
    }
    if threads::chunk_len(pieces.len(), work) < pieces.len() {
        threads::for_each(&mut pieces, |piece| piece.run(backend));
    } else {
        pieces.iter_mut().for_each(|piece| piece.run(backend));
    }
    drop(pieces);

    let mut rest = &mut out[..];
    let mut done = units.iter().zip(&sums);
    for job in jobs {
        let (h, d, group) = (job.num_heads, job.shape.head_dim, job.group());
        let mut left = job.out.len();
        while left > 0 {
            let Some((unit, sums)) = done.next() else {
                return;
            };
            let (part, after) = std::mem::take(&mut rest).split_at_mut(unit.out_len());
            rest = after;
            left -= part.len();
            if !sums.is_empty() {
                unit.join_all(backend, sums, part);
            }
            for (i, part) in unit.queries.clone().zip(part.chunks_exact(group * d)) {
                let start = (i * h + unit.head * group) * d;
                job.out[start..start + group * d].copy_from_slice(part);
            }
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
    fn out_len(&self) -> usize {
        self.queries.len() * self.sequence.group * self.sequence.shape.head_dim
    }

    fn sums_len(&self) -> usize {
        super::tile::sums_len(&self.sequence, &self.queries)
    }

    fn queries(&self, backend: Backend) -> Queries<'_> {
        Queries::new(backend, self.sequence, self.head, self.queries.clone())
    }

    /// Joins the sums of all tiles, in order.
    fn join_all(&self, backend: Backend, sums: &[f32], out: &mut [f32]) {
        let queries = self.queries(backend);
        let mut joined = queries.no_sums();
        for sums in sums.chunks_exact(self.sums_len()) {
            queries.join(&mut joined, sums);
        }
        queries.finish(&mut joined, out);
    }
}

impl Piece<'_, '_> {
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
