//! Quantized activations in the orders that the products read them in.

use std::sync::OnceLock;

use crate::activations::{Quantized, SUM_GROUP};

/// Partial sums of a row, and so blocks that are summed at once: those of the specification.
pub(super) const LANES: usize = crate::scalar::INT8_LANES;
/// Tokens of a tile.
pub(super) const TILE: usize = 4;

/// The layouts of one [`Quantized`], each made when it is first needed.
#[derive(Debug, Default)]
pub(crate) struct Layouts {
    octets: OnceLock<Vec<Octet>>,
    superblocks: OnceLock<Vec<Superblock>>,
    tiles: OnceLock<Vec<Tile>>,
    supertiles: OnceLock<Vec<SuperTile>>,
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
#[repr(C, align(32))]
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
}

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

impl Layouts {
    /// `[n, groups / 8 rounded up]`.
    pub(super) fn octets(x: &Quantized) -> &[Octet] {
        x.avx2.octets.get_or_init(|| octets(x))
    }

    /// `[n, groups]`.
    pub(super) fn superblocks(x: &Quantized) -> &[Superblock] {
        x.avx2.superblocks.get_or_init(|| superblocks(x))
    }

    /// In the order of [`class_order`].
    pub(super) fn tiles(x: &Quantized) -> &[Tile] {
        x.avx2.tiles.get_or_init(|| {
            let tile = |t, i| {
                let (values, scales, _) = group::<1>(x, t, i);
                let sums = std::array::from_fn(|k| {
                    let (low, high) = two_sums(x, t + k, 2 * i, 1);
                    i32::from(low) + i32::from(high)
                });
                let [values] = values;
                Tile {
                    values,
                    scales,
                    sums,
                }
            };
            class_order(x, tile)
        })
    }

    /// In the order of [`class_order`].
    pub(super) fn supertiles(x: &Quantized) -> &[SuperTile] {
        x.avx2.supertiles.get_or_init(|| {
            let tile = |t, i| {
                let (values, scales, _) = group::<8>(x, t, i);
                let pair = |(low, high): (i16, i16)| {
                    i32::from(high) << 16 | i32::from(low.cast_unsigned())
                };
                let sums = |width, j: usize| {
                    let first = 16 * i + 2 * width * j;
                    std::array::from_fn(|k| pair(two_sums(x, t + k, first, width)))
                };
                SuperTile {
                    values,
                    sums_16: std::array::from_fn(|j| sums(1, j)),
                    sums_32: std::array::from_fn(|j| sums(2, j)),
                    scales,
                }
            };
            class_order(x, tile)
        })
    }
}

/// The groups of a token whose products go to partial sum `class`, of `groups`.
pub(super) fn class_len(groups: usize, class: usize) -> usize {
    (groups + LANES - 1 - class) / LANES
}

/// Groups class by class: within a class tile by tile of four tokens, within a tile by column.
fn class_order<T>(x: &Quantized, mut tile: impl FnMut(usize, usize) -> T) -> Vec<T> {
    let groups = x.groups();
    let mut tiles = Vec::with_capacity(x.n.div_ceil(TILE) * groups);
    for class in 0..LANES {
        for t in (0..x.n).step_by(TILE) {
            tiles.extend((class..groups).step_by(LANES).map(|i| tile(t, i)));
        }
    }
    tiles
}

/// Values (`N` times 32) and scales of group `i` of the tokens from `t` on.
fn group<const N: usize>(
    x: &Quantized,
    t: usize,
    i: usize,
) -> ([[[i32; TILE]; 8]; N], [f32; TILE], usize) {
    let mut values = [[[0; TILE]; 8]; N];
    let mut scales = [0.0; TILE];
    let tokens = TILE.min(x.n - t);
    for k in 0..tokens {
        let token = &x.values[(t + k) * x.cols + i * x.group..][..x.group];
        let dwords = token.as_chunks::<4>().0.iter();
        for (to, from) in values.as_flattened_mut().iter_mut().zip(dwords) {
            to[k] = i32::from_le_bytes(from.map(i8::cast_unsigned));
        }
        scales[k] = x.scales[(t + k) * x.groups() + i];
    }
    (values, scales, tokens)
}

/// Sums of `width` successive sums each, from sum `first` of token `t` on; zeros for a token that
/// is not there.
fn two_sums(x: &Quantized, t: usize, first: usize, width: usize) -> (i16, i16) {
    if t >= x.n {
        return (0, 0);
    }
    let sums = &x.sums[t * x.cols / SUM_GROUP + first..][..2 * width];
    let (low, high) = sums.split_at(width);
    (low.iter().sum(), high.iter().sum())
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
            let (low, high) = two_sums(x, t, 2 * i, 1);
            octet.sums[i % LANES] = i32::from(low) + i32::from(high);
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
