//! Products of quantized weights as in [`int8`](super::int8), by instructions that multiply two
//! rows of eight weights with two tokens of eight activations.
//!
//! For them rows and tokens lie in pairs: eight elements of the first, eight of the second, and so
//! on. The second of an incomplete pair of tokens is the first again.

#![expect(
    clippy::needless_range_loop,
    reason = "one index into several arrays; closures in iterators would lose the instructions"
)]

use super::int8::{
    Columns, IntegerVectors, LANES, PANEL_ROWS, Panel, Rows, SUMS, Sums, Tokens, add_factors,
    in_order, minima,
};
use crate::MatrixRef;
use crate::activations::{BLOCK_GROUP, Quantized};

/// Elements of a row or a token that an instruction takes.
const WIDTH: usize = 8;

/// The instructions for pairs.
pub(crate) trait PairDot<V: IntegerVectors>: Copy {
    /// Adds the products of both rows of `w` with both tokens of `x`, `[w0 x0, w0 x1, w1 x0, w1 x1]`.
    fn dot(self, sum: V::I32, w: V::I8, x: V::I8) -> V::I32;
    /// `sum + v * [a, a, b, b]`.
    fn add_scaled(self, sum: V::I32, v: V::I32, a: i16, b: i16) -> V::I32;
    /// Lane i of vector j becomes lane j of vector i.
    fn transpose(self, v: [V::I32; 4]) -> [V::I32; 4];
}

#[inline(always)]
pub(crate) fn int8_rows<V: IntegerVectors, D: PairDot<V>>(
    v: V,
    dot: D,
    x: &Quantized,
    w: MatrixRef<'_>,
    first_row: usize,
    out: &mut [&mut [f32]],
) {
    let rows = out.first().map_or(0, |out| out.len());
    let x = Tokens::new(x);
    let len = x.groups * x.group;
    let steps = len / WIDTH;
    let mut x_pairs = vec![[0; 2 * WIDTH]; x.n.div_ceil(2) * steps];
    for (i, pairs) in x_pairs.chunks_exact_mut(steps.max(1)).enumerate() {
        let second = (2 * i + 1).min(x.n - 1);
        pair(
            &x.values[2 * i * len..][..len],
            &x.values[second * len..][..len],
            pairs,
        );
    }
    let mut panel = Panel::new(w, x.groups);
    let mut w_pairs = vec![[0; 2 * WIDTH]; PANEL_ROWS / 2 * steps];
    for start in (0..rows).step_by(PANEL_ROWS) {
        let panel_rows = PANEL_ROWS.min(rows - start);
        for i in 0..panel_rows {
            panel.unpack(i, w, first_row + start + i);
        }
        for (i, pairs) in w_pairs.chunks_exact_mut(steps.max(1)).enumerate() {
            let (first, second) = panel.q[2 * i * len..][..2 * len].split_at(len);
            pair(first, second, pairs);
        }
        for t in (0..x.n).step_by(2) {
            let x_pair = &x_pairs[t / 2 * steps..][..steps];
            for r in (0..panel_rows).step_by(2) {
                let w_pair = &w_pairs[r / 2 * steps..][..steps];
                let lanes = if x.group == BLOCK_GROUP {
                    blocks_of_32(v, dot, &panel, r, w_pair, &x, t, x_pair)
                } else {
                    blocks_of_256(v, dot, &panel, r, w_pair, &x, t, x_pair)
                };
                for i in 0..2.min(panel_rows - r) {
                    for j in 0..2.min(x.n - t) {
                        out[t + j][start + r + i] = in_order(v, lanes[i][j]);
                    }
                }
            }
        }
    }
}

/// Eight elements of `first`, eight of `second`, and so on.
fn pair(first: &[i8], second: &[i8], pairs: &mut [[i8; 2 * WIDTH]]) {
    let eights = first.as_chunks::<WIDTH>().0.iter();
    for ((a, b), pair) in eights.zip(second.as_chunks::<WIDTH>().0).zip(pairs) {
        pair[..WIDTH].copy_from_slice(a);
        pair[WIDTH..].copy_from_slice(b);
    }
}

/// The vectors of a block in a pair: 32 or 256 columns.
const STEPS_OF_32: usize = 32 / WIDTH;
const STEPS_OF_16: usize = 16 / WIDTH;

#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "two operands with their factors")]
fn blocks_of_32<V: IntegerVectors, D: PairDot<V>>(
    v: V,
    dot: D,
    panel: &Panel,
    r: usize,
    w: &[[i8; 2 * WIDTH]],
    x: &Tokens<'_>,
    t: usize,
    x_pair: &[[i8; 2 * WIDTH]],
) -> Sums<V, 2, 2> {
    let quads = x.groups / LANES;
    let rows = Rows::<2>::new(panel, r);
    let tokens = Columns::<2>::new(x, t);
    let w = &w.as_chunks::<STEPS_OF_32>().0.as_chunks::<LANES>().0[..quads];
    let x_pair = &x_pair.as_chunks::<STEPS_OF_32>().0.as_chunks::<LANES>().0[..quads];
    let mut lanes = [[[v.splat(0.0); 2]; 2]; 2];
    for pair in 0..quads.div_ceil(2) {
        for half in 0..2 {
            let k = 2 * pair + half;
            if k == quads {
                break;
            }
            let mut a = [v.zero(); LANES];
            for i in 0..LANES {
                for c in 0..STEPS_OF_32 {
                    let (w, x) = (v.load_i8(&w[k][i][c]), v.load_i8(&x_pair[k][i][c]));
                    a[i] = dot.dot(a[i], w, x);
                }
            }
            let [a, b, c, d] = dot.transpose(a);
            let mut sums = [[v.zero(); 2]; 2];
            for t in 0..2 {
                let of_token = v.sum_pairs(&tokens.sums[t].as_chunks::<8>().0[k]);
                (sums[0][t], sums[1][t]) = (of_token, of_token);
            }
            add_factors(
                v,
                &rows,
                &tokens,
                k,
                [[a, b], [c, d]],
                sums,
                half,
                &mut lanes,
            );
        }
    }
    lanes
}

#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "two operands with their factors")]
fn blocks_of_256<V: IntegerVectors, D: PairDot<V>>(
    v: V,
    dot: D,
    panel: &Panel,
    r: usize,
    w: &[[i8; 2 * WIDTH]],
    x: &Tokens<'_>,
    t: usize,
    x_pair: &[[i8; 2 * WIDTH]],
) -> Sums<V, 2, 2> {
    let groups = x.groups;
    let rows = Rows::<2>::new(panel, r);
    let tokens = Columns::<2>::new(x, t);
    let w = &w.as_chunks::<STEPS_OF_16>().0.as_chunks::<SUMS>().0[..groups];
    let x_pair = &x_pair.as_chunks::<STEPS_OF_16>().0.as_chunks::<SUMS>().0[..groups];
    let scales = [0, 1].map(|i| &panel.scales[(r + i) * groups..][..groups]);
    let quads = groups / LANES;
    let mut lanes = [[[v.splat(0.0); 2]; 2]; 2];
    for pair in 0..quads.div_ceil(2) {
        for half in 0..2 {
            let k = 2 * pair + half;
            if k == quads {
                break;
            }
            let mut a = [v.zero(); LANES];
            for i in 0..LANES {
                let block = LANES * k + i;
                for g in 0..SUMS {
                    let mut products = v.zero();
                    for c in 0..STEPS_OF_16 {
                        let w = v.load_i8(&w[block][g][c]);
                        products = dot.dot(products, w, v.load_i8(&x_pair[block][g][c]));
                    }
                    let (first, second) = (scales[0][block][g], scales[1][block][g]);
                    a[i] = dot.add_scaled(a[i], products, first, second);
                }
            }
            let b = minima(v, panel, r, &tokens, k);
            let [a0, a1, a2, a3] = dot.transpose(a);
            add_factors(
                v,
                &rows,
                &tokens,
                k,
                [[a0, a1], [a2, a3]],
                b,
                half,
                &mut lanes,
            );
        }
    }
    lanes
}
