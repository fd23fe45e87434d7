//! Quantized activations in the orders that the products read them in.

use std::sync::OnceLock;

use crate::activations::{Quantized, SUM_GROUP};
use crate::threads;

/// Partial sums of a row, and so blocks that are summed at once: those of the specification.
pub(super) const LANES: usize = crate::scalar::INT8_LANES;
/// Tokens of a tile.
pub(super) const TILE: usize = 4;

/// What a number that is put in its place in a tile takes, in multiply-adds.
const WORK_OF_A_NUMBER: usize = 4;

/// The layouts of one [`Quantized`], each made when it is first needed.
#[derive(Debug, Default)]
pub(crate) struct Layouts {
    octets: OnceLock<Vec<Octet>>,
    superblocks: OnceLock<Vec<Superblock>>,
    tiles: OnceLock<Vec<Tile>>,
    supertiles: OnceLock<Vec<SuperTile>>,
    wide_tiles: OnceLock<Vec<WideTile>>,
}

/// Eight successive groups of 32 of one token, filled up with zeros at its end.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
pub(super) struct Octet {
    /// At `[i][0]` the first halves of the groups i and i + 4, at `[i][1]` the second halves.
    pub(super) values: [[[i8; 32]; 2]; 4],
    pub(super) scales: [f32; 8],
    pub(super) sums: [i32; 8],
}

/// A group of 256 of one token.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(super) struct Superblock {
    pub(super) values: [[i8; 32]; 8],
    /// Sums of sixteen values, the even ones before the odd ones.
    pub(super) sums: [i16; 16],
    pub(super) scale: f32,
}

/// One group of 32 of four tokens, with zeros for tokens that are not there.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
pub(super) struct Tile {
    /// Four successive values of a token to a dword: `[c / 4][token]`.
    pub(super) values: [[i32; TILE]; 8],
    pub(super) scales: [f32; TILE],
    pub(super) sums: [i32; TILE],
    /// What weight bytes with an offset add too much, to be added: of each [`OFFSETS`].
    pub(super) offsets: [[i32; TILE]; OFFSETS.len()],
}

/// The offsets of weight bytes in blocks of 32, as base-2 logarithms.
pub(super) const OFFSETS: [u32; 3] = [3, 4, 7];

/// One group of 256 of four tokens.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
pub(super) struct SuperTile {
    /// As in [`Tile`], for each 32 columns.
    pub(super) values: [[[i32; TILE]; 8]; 8],
    /// Sums of sixteen values, two successive ones to a dword.
    pub(super) sums_16: [[i32; TILE]; 8],
    /// The same of 32 values.
    pub(super) sums_32: [[i32; TILE]; 4],
    pub(super) scales: [f32; TILE],
}

/// [`Tile`] in sixteen bits.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
pub(super) struct WideTile {
    /// Two values of a token to a dword, as [`pairs`] chooses them: `[c / 2][token]`.
    pub(super) values: [[i32; TILE]; 16],
    pub(super) scales: [f32; TILE],
}

impl Layouts {
    /// `[n, groups / 8 rounded up]`.
    pub(super) fn octets(x: &Quantized) -> &[Octet] {
        x.avx2.octets.get_or_init(|| octets(x))
    }

    /// `[n, groups]`.
    pub(super) fn superblocks(x: &Quantized) -> &[Superblock] {
        x.avx2.superblocks.get_or_init(|| superblocks(x))
    }

    /// In the order of [`in_tiles`].
    pub(super) fn tiles(x: &Quantized) -> &[Tile] {
        x.avx2.tiles.get_or_init(|| {
            let empty = Tile {
                values: [[0; TILE]; 8],
                scales: [0.0; TILE],
                sums: [0; TILE],
                offsets: [[0; TILE]; OFFSETS.len()],
            };
            in_tiles(x, empty, |tile, token| {
                let k = token.lane;
                for (i, dword) in token.dwords.iter().enumerate() {
                    tile.values[i][k] = dword_of(dword);
                }
                tile.scales[k] = token.scale;
                tile.sums[k] = token.sums.iter().map(|s| i32::from(*s)).sum();
                for (to, shift) in tile.offsets.iter_mut().zip(OFFSETS) {
                    to[k] = -(tile.sums[k] << shift);
                }
            })
        })
    }

    /// In the order of [`in_tiles`].
    pub(super) fn supertiles(x: &Quantized) -> &[SuperTile] {
        x.avx2.supertiles.get_or_init(|| {
            let empty = SuperTile {
                values: [[[0; TILE]; 8]; 8],
                sums_16: [[0; TILE]; 8],
                sums_32: [[0; TILE]; 4],
                scales: [0.0; TILE],
            };
            in_tiles(x, empty, |tile, token| {
                let k = token.lane;
                for (i, dword) in token.dwords.iter().enumerate() {
                    tile.values[i / 8][i % 8][k] = dword_of(dword);
                }
                tile.scales[k] = token.scale;
                let (pairs, _) = token.sums.as_chunks::<2>();
                for (to, [a, b]) in tile.sums_16.iter_mut().zip(pairs) {
                    to[k] = pair(*a, *b);
                }
                let (fours, _) = token.sums.as_chunks::<4>();
                for (to, [a, b, c, d]) in tile.sums_32.iter_mut().zip(fours) {
                    to[k] = pair(a + b, c + d);
                }
            })
        })
    }

    /// In the order of [`in_tiles`].
    pub(super) fn wide_tiles(x: &Quantized) -> &[WideTile] {
        x.avx2.wide_tiles.get_or_init(|| {
            let empty = WideTile {
                values: [[0; TILE]; 16],
                scales: [0.0; TILE],
            };
            in_tiles(x, empty, |tile, token| {
                let to = tile.values.as_chunks_mut::<2>().0;
                for ([first, second], dword) in to.iter_mut().zip(token.dwords) {
                    [first[token.lane], second[token.lane]] = pairs(*dword);
                }
                tile.scales[token.lane] = token.scale;
            })
        })
    }
}

/// The tiles of wide layouts: columns 0 and 2, then 1 and 3 of each four, which is how shifts
/// take bytes apart.
fn pairs([a, b, c, d]: [i8; 4]) -> [i32; 2] {
    [pair(a.into(), c.into()), pair(b.into(), d.into())]
}

fn pair(low: i16, high: i16) -> i32 {
    i32::from(high) << 16 | i32::from(low.cast_unsigned())
}

/// The groups of a token whose products go to partial sum `class`, of `groups`.
pub(super) fn class_len(groups: usize, class: usize) -> usize {
    (groups + LANES - 1 - class) / LANES
}

/// Tiles whose partial sums, 2 KiB each, stay in the first-level cache beside a block of a panel.
const FEW_TILES: usize = 8;

/// Whether so many tiles keep all their partial sums at a time.
pub(super) fn few_tiles(tiles: usize) -> bool {
    tiles <= FEW_TILES
}

/// The groups of tile `tile` of `tiles` for partial sum `class`, in order.
pub(super) fn groups_of<T>(
    x: &[T],
    tiles: usize,
    tile: usize,
    class: usize,
) -> impl Iterator<Item = &T> {
    let groups = x.len() / tiles;
    if few_tiles(tiles) {
        return x[tile * groups..][..groups][class..].iter().step_by(LANES);
    }
    let len = class_len(groups, class);
    let before: usize = (0..class).map(|class| class_len(groups, class)).sum();
    x[before * tiles + tile * len..][..len].iter().step_by(1)
}

/// One group of one token, for lane `lane` of a tile.
struct Token<'a> {
    lane: usize,
    dwords: &'a [[i8; 4]],
    scale: f32,
    sums: &'a [i16],
}

/// Tile by tile of four tokens, within a tile by column; of many tiles so for the groups of one partial
/// sum after those of the other. `fill` writes one token into what begins as `empty`.
fn in_tiles<T: Copy + Send>(
    x: &Quantized,
    empty: T,
    fill: impl Fn(&mut T, Token<'_>) + Sync,
) -> Vec<T> {
    let groups = x.groups();
    let tiles = x.n.div_ceil(TILE);
    let mut out = vec![empty; tiles * groups];
    let mut rest = out.as_mut_slice();
    let classes = if few_tiles(tiles) { 1 } else { LANES };
    let fill_tile = |class: usize, tile: usize, out: &mut [T]| {
        for lane in 0..TILE.min(x.n - tile * TILE) {
            let t = tile * TILE + lane;
            for (k, out) in out.iter_mut().enumerate() {
                let i = t * groups + class + k * classes;
                let sums = x.group / SUM_GROUP;
                let token = Token {
                    lane,
                    dwords: x.values[i * x.group..][..x.group].as_chunks().0,
                    scale: x.scales[i],
                    sums: &x.sums[i * sums..][..sums],
                };
                fill(out, token);
            }
        }
    };
    for class in 0..classes.min(groups) {
        let len = match classes {
            1 => groups,
            _ => class_len(groups, class),
        };
        let of_class;
        (of_class, rest) = rest.split_at_mut(len * tiles);
        let work = WORK_OF_A_NUMBER * x.values.len() / classes;
        let at_once = threads::chunk_len(tiles, work);
        if at_once >= tiles {
            for (tile, out) in of_class.chunks_exact_mut(len).enumerate() {
                fill_tile(class, tile, out);
            }
        } else {
            let mut parts: Vec<&mut [T]> = of_class.chunks_mut(at_once * len).collect();
            threads::for_each(&mut parts, |i, part| {
                for (tile, out) in part.chunks_exact_mut(len).enumerate() {
                    fill_tile(class, i * at_once + tile, out);
                }
            });
        }
    }
    out
}

fn dword_of(bytes: &[i8; 4]) -> i32 {
    let [a, b, c, d] = *bytes;
    i32::from_le_bytes([
        a.cast_unsigned(),
        b.cast_unsigned(),
        c.cast_unsigned(),
        d.cast_unsigned(),
    ])
}

/// The sum of two successive sums, from sum `first` of token `t` on.
fn group_sum(x: &Quantized, t: usize, first: usize) -> i32 {
    let sums = &x.sums[t * x.cols / SUM_GROUP + first..][..2];
    i32::from(sums[0]) + i32::from(sums[1])
}

fn octets(x: &Quantized) -> Vec<Octet> {
    let empty = Octet {
        values: [[[0; 32]; 2]; 4],
        scales: [0.0; 8],
        sums: [0; 8],
    };
    let groups = x.groups();
    let mut octets = vec![empty; x.n * groups.div_ceil(LANES)];
    let tokens = octets.chunks_exact_mut(groups.div_ceil(LANES).max(1));
    for (t, octets) in tokens.enumerate() {
        let values = x.values[t * x.cols..][..x.cols].as_chunks::<16>().0;
        for i in 0..groups {
            let octet = &mut octets[i / LANES];
            let (pair, half) = (i % 4, i % LANES / 4);
            for side in 0..2 {
                octet.values[pair][side][16 * half..][..16].copy_from_slice(&values[2 * i + side]);
            }
            octet.scales[i % LANES] = x.scales[t * groups + i];
            octet.sums[i % LANES] = group_sum(x, t, 2 * i);
        }
    }
    octets
}

fn superblocks(x: &Quantized) -> Vec<Superblock> {
    let values = x.values.as_chunks::<32>().0.as_chunks::<8>().0;
    let sums = x.sums.as_chunks::<16>().0;
    let superblocks = values.iter().zip(sums).zip(&x.scales);
    superblocks
        .map(|((values, sums), scale)| Superblock {
            values: *values,
            sums: std::array::from_fn(|i| sums[2 * (i % 8) + i / 8]),
            scale: *scale,
        })
        .collect()
}
