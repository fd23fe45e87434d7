//! Attention's products for many queries at once, as in a prompt.
//!
//! Sixteen keys are turned, so that a lane is a key, and all queries go through them in
//! [tiles](RegisterTile); of the values, sixteen columns of a block of keys lie together, and a lane is a column.
//! Either way half precision is widened once for all rows. A sum goes through its products one by
//! one, as in [`attention`](super::attention), which does the same for few queries.

use super::tile::{self, Element, LANES, Lanes, MAX_ROWS, RegisterTile};
use super::vector::store_f32;
use crate::backend::Rows;

/// Keys of a panel.
const PANEL_KEYS: usize = 16;

/// Columns of a panel of values.
const PANEL_COLUMNS: usize = 16;

/// Keys whose values are multiplied before the next ones: their panel takes half of the first-level
/// cache.
const VALUE_KEYS: usize = 256;

/// `out[r * stride + j] = q[r] · keys[j]`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn scores<T: RegisterTile, E: Element>(
    q: &[f32],
    keys: &[Rows<'_>],
    d: usize,
    out: &mut [f32],
    stride: usize,
) {
    let rows = q.len() / d;
    let mut panel = vec![Lanes::ZERO; d];
    let panels = keys
        .iter()
        .flat_map(|part| E::of(*part).chunks(PANEL_KEYS * d));
    let mut j = 0;
    for keys in panels {
        let wanted = keys.len() / d;
        turn(keys, d, &mut panel);
        for (start, end) in tile::cuts::<T>(rows) {
            let q = &q[start * d..end * d];
            let out = &mut out[start * stride + j..];
            score_tile::<T>(&panel, q, out, stride, wanted);
        }
        j += wanted;
    }
}

/// Up to sixteen keys as lanes; behind the last key comes the last key again.
#[target_feature(enable = "avx2,fma,f16c")]
fn turn<E: Element>(keys: &[E], d: usize, panel: &mut [Lanes]) {
    let rows = tile::eights(keys, d);
    for (c, panel) in panel.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
        // SAFETY: this function is compiled with the features.
        let columns = unsafe { E::turn(&rows, c) };
        for i in 0..LANES {
            // SAFETY: this function is compiled with the features.
            let [low, high] = unsafe { E::lanes(columns[i]) };
            panel[i] = Lanes([store_f32(low), store_f32(high)]);
        }
    }
}

/// The products of the queries of a tile with the keys of a panel, of which `wanted` are kept.
#[target_feature(enable = "avx2,fma,f16c")]
fn score_tile<T: RegisterTile>(
    panel: &[Lanes],
    q: &[f32],
    out: &mut [f32],
    stride: usize,
    wanted: usize,
) {
    let d = panel.len();
    let mut sums = [Lanes::ZERO; MAX_ROWS];
    let sums = &mut sums[..q.len() / d];
    // SAFETY: `scores` is called where the processor has the instructions of the tile.
    unsafe { T::multiply(panel, q, d, sums) };
    if wanted == PANEL_KEYS {
        for (r, Lanes(sums)) in sums.iter().enumerate() {
            *tile::lanes_mut(out, r * stride) = *sums;
        }
    } else {
        for (r, Lanes(sums)) in sums.iter().enumerate() {
            out[r * stride..][..wanted].copy_from_slice(&sums.as_flattened()[..wanted]);
        }
    }
}

/// `acc[r] += sum_j weights[r * stride + j] * values[j]`, in the order of j.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn weighted_sum<T: RegisterTile, E: Element>(
    weights: &[f32],
    stride: usize,
    values: &[Rows<'_>],
    d: usize,
    acc: &mut [f32],
) {
    // A large panel would take its time even where it stays empty.
    match values.iter().map(|part| part.count(d)).sum() {
        ..=16 => weighted_sum_by::<T, E, 16>(weights, stride, values, d, acc),
        17..=64 => weighted_sum_by::<T, E, 64>(weights, stride, values, d, acc),
        _ => weighted_sum_by::<T, E, VALUE_KEYS>(weights, stride, values, d, acc),
    }
}

/// [`weighted_sum`] by so many keys at once.
#[target_feature(enable = "avx2,fma,f16c")]
fn weighted_sum_by<T: RegisterTile, E: Element, const KEYS: usize>(
    weights: &[f32],
    stride: usize,
    values: &[Rows<'_>],
    d: usize,
    acc: &mut [f32],
) {
    let mut panel = [Lanes::ZERO; KEYS];
    // What goes together: pieces of parts, of KEYS keys in all.
    let mut pieces: Vec<&[E]> = Vec::with_capacity(values.len());
    let (mut first_key, mut keys) = (0, 0);
    for part in values {
        let mut rest = E::of(*part);
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(rest.len().min((KEYS - keys) * d));
            pieces.push(piece);
            (rest, keys) = (after, keys + piece.len() / d);
            if keys == KEYS {
                add_pieces::<T, E>(&weights[first_key..], stride, &pieces, d, &mut panel, acc);
                pieces.clear();
                (first_key, keys) = (first_key + KEYS, 0);
            }
        }
    }
    if keys > 0 {
        let panel = &mut panel[..keys];
        add_pieces::<T, E>(&weights[first_key..], stride, &pieces, d, panel, acc);
    }
}

/// [`weighted_sum`] of the values of a panel.
#[target_feature(enable = "avx2,fma,f16c")]
fn add_pieces<T: RegisterTile, E: Element>(
    weights: &[f32],
    stride: usize,
    values: &[&[E]],
    d: usize,
    panel: &mut [Lanes],
    acc: &mut [f32],
) {
    let rows = acc.len() / d;
    for first in (0..d).step_by(PANEL_COLUMNS) {
        let mut panel_rows = &mut *panel;
        for piece in values {
            let (own, after) = panel_rows.split_at_mut(piece.len() / d);
            gather(piece, d, first, own);
            panel_rows = after;
        }
        for (start, end) in tile::cuts::<T>(rows) {
            let weights = &weights[start * stride..];
            let acc = &mut acc[start * d..end * d];
            sum_tile::<T>(panel, weights, stride, acc, d, first);
        }
    }
}

/// Sixteen columns from column `first` on of the rows of values, or the eight that are left.
#[target_feature(enable = "avx2,fma,f16c")]
fn gather<E: Element>(values: &[E], d: usize, first: usize, panel: &mut [Lanes]) {
    for (row, Lanes([low, high])) in values.chunks_exact(d).zip(panel) {
        // One by one: a loop over f32 would become a call that copies sixty-four bytes.
        match row[first..].as_chunks::<LANES>().0 {
            // SAFETY: this function is compiled with the features.
            [a, b, ..] => unsafe {
                *low = store_f32(E::load(a));
                *high = store_f32(E::load(b));
            },
            // SAFETY: as above.
            [a] => *low = store_f32(unsafe { E::load(a) }),
            [] => {}
        }
    }
}

/// The columns of a panel, those from column `first` of `acc` on, for the rows of a tile.
#[target_feature(enable = "avx2,fma,f16c")]
fn sum_tile<T: RegisterTile>(
    panel: &[Lanes],
    weights: &[f32],
    stride: usize,
    acc: &mut [f32],
    d: usize,
    first: usize,
) {
    let mut sums = [Lanes::ZERO; MAX_ROWS];
    let sums = &mut sums[..acc.len() / d];
    let columns = PANEL_COLUMNS.min(d - first);
    if columns == PANEL_COLUMNS {
        for (r, Lanes(sums)) in sums.iter_mut().enumerate() {
            *sums = *tile::lanes_mut(acc, r * d + first);
        }
    } else {
        for (r, Lanes(sums)) in sums.iter_mut().enumerate() {
            let acc = &acc[r * d + first..][..columns];
            sums.as_flattened_mut()[..columns].copy_from_slice(acc);
        }
    }
    // SAFETY: `weighted_sum` is called where the processor has the instructions of the tile.
    unsafe { T::multiply(panel, weights, stride, sums) };
    if columns == PANEL_COLUMNS {
        for (r, Lanes(sums)) in sums.iter().enumerate() {
            *tile::lanes_mut(acc, r * d + first) = *sums;
        }
    } else {
        for (r, Lanes(sums)) in sums.iter().enumerate() {
            let acc = &mut acc[r * d + first..][..columns];
            acc.copy_from_slice(&sums.as_flattened()[..columns]);
        }
    }
}
