//! Attention's products for many queries at once, as in a prompt.
//!
//! Sixteen keys are turned, so that a lane is a key, and all queries go through them in tiles of
//! six; of the values, sixteen columns of a block of keys lie together, and a lane is a column.
//! Either way half precision is widened once for all rows. A sum goes through its products one by
//! one, as in [`attention`](super::attention), which does the same for few queries.

use super::tile::{self, Element, LANES, Lanes, load_lanes, multiply, store_lanes};
use super::vector::store_f32;

/// Keys of a panel.
const PANEL_KEYS: usize = 16;

/// Columns of a panel of values.
const PANEL_COLUMNS: usize = 16;

/// Keys whose values are multiplied before the next ones: their panel takes half of the first-level
/// cache.
const VALUE_KEYS: usize = 256;

/// `out[r * stride + j] = q[r] · keys[j]`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn scores<E: Element>(q: &[f32], keys: &[E], d: usize, out: &mut [f32], stride: usize) {
    let (rows, n) = (q.len() / d, keys.len() / d);
    let mut panel = vec![Lanes::ZERO; d];
    for j in (0..n).step_by(PANEL_KEYS) {
        let wanted = PANEL_KEYS.min(n - j);
        turn(&keys[j * d..(j + wanted) * d], d, &mut panel);
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
    for r in 0..R {
        store_lanes(&mut out[r * stride..], wanted, sums[r]);
    }
}

/// `acc[r] += sum_j weights[r * stride + j] * values[j]`, in the order of j.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn weighted_sum<E: Element>(
    weights: &[f32],
    stride: usize,
    values: &[E],
    d: usize,
    acc: &mut [f32],
) {
    // A large panel would take its time even where it stays empty.
    match values.len() / d {
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
    values: &[E],
    d: usize,
    acc: &mut [f32],
) {
    let (rows, n) = (acc.len() / d, values.len() / d);
    let mut panel = [Lanes::ZERO; KEYS];
    for j in (0..n).step_by(KEYS) {
        let panel = &mut panel[..KEYS.min(n - j)];
        let values = &values[j * d..];
        for first in (0..d).step_by(PANEL_COLUMNS) {
            gather(values, d, first, panel);
            for (start, end) in tile::cuts(rows) {
                let weights = &weights[start * stride + j..];
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
}

/// Sixteen columns from column `first` on of the rows of values, or the eight that are left.
#[target_feature(enable = "avx2,fma,f16c")]
fn gather<E: Element>(values: &[E], d: usize, first: usize, panel: &mut [Lanes]) {
    for (row, lanes) in values.chunks_exact(d).zip(panel) {
        for (eight, lanes) in row[first..].as_chunks::<LANES>().0.iter().zip(&mut lanes.0) {
            // SAFETY: this function is compiled with the features.
            *lanes = store_f32(unsafe { E::load(eight) });
        }
    }
}

/// The columns of a panel, of `R` rows: `acc` starts with that of the first of them.
#[target_feature(enable = "avx2,fma,f16c")]
fn sum_tile<const R: usize>(
    panel: &[Lanes],
    weights: &[f32],
    stride: usize,
    acc: &mut [f32],
    d: usize,
    first: usize,
) {
    let columns = PANEL_COLUMNS.min(d - first);
    let mut rows = [&[][..]; R];
    let mut sums = tile::zeros::<R>();
    for r in 0..R {
        rows[r] = &weights[r * stride..][..panel.len()];
        sums[r] = load_lanes(&acc[r * d..], columns);
    }
    let sums = multiply(panel, rows, sums);
    for r in 0..R {
        store_lanes(&mut acc[r * d..], columns, sums[r]);
    }
}
