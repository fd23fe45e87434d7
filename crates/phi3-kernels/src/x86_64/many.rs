//! Attention's products for many queries at once, as in a prompt.
//!
//! Sixteen keys are turned, so that a lane is a key, and all queries go through them in tiles of
//! six; of the values, sixteen columns of a block of keys lie together, and a lane is a column.
//! Either way half precision is widened once for all rows. A sum goes through its products one by
//! one, as in [`attention`](super::attention), which does the same for few queries.

#![expect(
    clippy::needless_range_loop,
    reason = "one index into several arrays; closures in iterators would lose the target features"
)]

use super::tile::{self, Element, LANES, Lanes, load_lanes, multiply, store_lanes};
use super::vector::{load_f32, store_f32};
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
pub(super) fn scores<E: Element>(
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
        for (start, end) in tile::cuts(rows) {
            let q = &q[start * d..end * d];
            let out = &mut out[start * stride + j..];
            match end - start {
                6 => score_tile::<6>(&panel, q, out, stride, wanted),
                5 => score_tile::<5>(&panel, q, out, stride, wanted),
                4 => score_tile::<4>(&panel, q, out, stride, wanted),
                3 => score_tile::<3>(&panel, q, out, stride, wanted),
                2 => score_tile::<2>(&panel, q, out, stride, wanted),
                _ => score_tile::<1>(&panel, q, out, stride, wanted),
            }
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

/// The products of `R` queries with the keys of a panel, of which `wanted` are kept.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline(never)]
fn score_tile<const R: usize>(
    panel: &[Lanes],
    q: &[f32],
    out: &mut [f32],
    stride: usize,
    wanted: usize,
) {
    let d = panel.len();
    let mut rows = [&[][..]; R];
    for r in 0..R {
        rows[r] = &q[r * d..][..d];
    }
    let sums = multiply(panel, rows, tile::zeros());
    if wanted == PANEL_KEYS {
        for r in 0..R {
            let out = tile::lanes_mut(out, r * stride);
            *out = [store_f32(sums[r][0]), store_f32(sums[r][1])];
        }
    } else {
        for r in 0..R {
            store_lanes(&mut out[r * stride..], wanted, sums[r]);
        }
    }
}

/// `acc[r] += sum_j weights[r * stride + j] * values[j]`, in the order of j.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn weighted_sum<E: Element>(
    weights: &[f32],
    stride: usize,
    values: &[Rows<'_>],
    d: usize,
    acc: &mut [f32],
) {
    // A large panel would take its time even where it stays empty.
    match values.iter().map(|part| part.count(d)).sum() {
        ..=16 => weighted_sum_by::<E, 16>(weights, stride, values, d, acc),
        17..=64 => weighted_sum_by::<E, 64>(weights, stride, values, d, acc),
        _ => weighted_sum_by::<E, VALUE_KEYS>(weights, stride, values, d, acc),
    }
}

/// [`weighted_sum`] by so many keys at once.
#[target_feature(enable = "avx2,fma,f16c")]
fn weighted_sum_by<E: Element, const KEYS: usize>(
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
                add_pieces(&weights[first_key..], stride, &pieces, d, &mut panel, acc);
                pieces.clear();
                (first_key, keys) = (first_key + KEYS, 0);
            }
        }
    }
    if keys > 0 {
        let panel = &mut panel[..keys];
        add_pieces(&weights[first_key..], stride, &pieces, d, panel, acc);
    }
}

/// [`weighted_sum`] of the values of a panel.
#[target_feature(enable = "avx2,fma,f16c")]
fn add_pieces<E: Element>(
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
        for (start, end) in tile::cuts(rows) {
            let weights = &weights[start * stride..];
            let acc = &mut acc[start * d + first..];
            match end - start {
                6 => sum_tile::<6>(panel, weights, stride, acc, d, first),
                5 => sum_tile::<5>(panel, weights, stride, acc, d, first),
                4 => sum_tile::<4>(panel, weights, stride, acc, d, first),
                3 => sum_tile::<3>(panel, weights, stride, acc, d, first),
                2 => sum_tile::<2>(panel, weights, stride, acc, d, first),
                _ => sum_tile::<1>(panel, weights, stride, acc, d, first),
            }
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

/// The columns of a panel, of `R` rows: `acc` starts with that of the first of them.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline(never)]
fn sum_tile<const R: usize>(
    panel: &[Lanes],
    weights: &[f32],
    stride: usize,
    acc: &mut [f32],
    d: usize,
    first: usize,
) {
    let mut rows = [&[][..]; R];
    for r in 0..R {
        rows[r] = &weights[r * stride..][..panel.len()];
    }
    let mut sums = tile::zeros::<R>();
    if d - first >= PANEL_COLUMNS {
        for r in 0..R {
            let [low, high] = tile::lanes_mut(acc, r * d);
            sums[r] = [load_f32(low), load_f32(high)];
        }
        sums = multiply(panel, rows, sums);
        for r in 0..R {
            let acc = tile::lanes_mut(acc, r * d);
            *acc = [store_f32(sums[r][0]), store_f32(sums[r][1])];
        }
    } else {
        let columns = d - first;
        for r in 0..R {
            sums[r] = load_lanes(&acc[r * d..], columns);
        }
        sums = multiply(panel, rows, sums);
        for r in 0..R {
            store_lanes(&mut acc[r * d..], columns, sums[r]);
        }
    }
}
