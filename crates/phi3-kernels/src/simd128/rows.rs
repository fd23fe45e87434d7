//! Products of f32 activations with rows of weights.

#![expect(
    clippy::needless_range_loop,
    reason = "one index into several arrays; closures in iterators would lose the instructions"
)]

use super::Vectors;
use crate::{BlockType, MatrixRef, scalar};

/// Lanes of a vector, and how many vectors a step through the columns takes.
const LANES: usize = 4;
const STEP: usize = 2;
const STEP_COLS: usize = STEP * LANES;

/// Rows and tokens of the register block: 4 * 3 * 2 sums, six vectors of activations and two of
/// weights are the 32 registers of 64-bit ARM.
const BLOCK_ROWS: usize = 4;
const BLOCK_TOKENS: usize = 3;

/// Rows decoded at once when many tokens use them, so that tokens are read from memory once for
/// all of them.
const PANEL_ROWS: usize = 16;
/// Tokens from which on a panel pays; fewer find a block of rows in the first-level cache.
const PANEL_TOKENS: usize = 8;

/// [`scalar::matmul_rows`], with sums in eight lanes.
#[inline(always)]
pub(crate) fn matmul_rows<V: Vectors>(
    v: V,
    x: &[f32],
    w: MatrixRef<'_>,
    first_row: usize,
    out: &mut [&mut [f32]],
) {
    let (n, cols) = (out.len(), w.cols());
    let rows = out.first().map_or(0, |out| out.len());
    let panel_rows = if n < PANEL_TOKENS {
        BLOCK_ROWS
    } else {
        PANEL_ROWS
    };
    let mut panel = vec![0.0; panel_rows.min(rows) * cols];
    for start in (0..rows).step_by(panel_rows) {
        let panel_rows = panel_rows.min(rows - start);
        for i in 0..panel_rows {
            let row = w.row(first_row + start + i);
            decode(v, w.block_type(), row, &mut panel[i * cols..][..cols]);
        }
        let mut t = 0;
        while t < n {
            let tokens = BLOCK_TOKENS.min(n - t);
            let x = &x[t * cols..][..tokens * cols];
            let mut i = 0;
            while i < panel_rows {
                let block_rows = BLOCK_ROWS.min(panel_rows - i);
                let w = &panel[i * cols..][..block_rows * cols];
                let (out, at) = (&mut out[t..][..tokens], start + i);
                match (block_rows, tokens) {
                    (4, 3) => dots::<V, 4, 3>(v, w, x, cols, out, at),
                    (4, 2) => dots::<V, 4, 2>(v, w, x, cols, out, at),
                    (4, _) => dots::<V, 4, 1>(v, w, x, cols, out, at),
                    _ => {
                        for r in 0..block_rows {
                            for t in 0..tokens {
                                let (w, x) = (&w[r * cols..][..cols], &x[t * cols..][..cols]);
                                dots::<V, 1, 1>(v, w, x, cols, &mut out[t..], at + r);
                            }
                        }
                    }
                }
                i += block_rows;
            }
            t += tokens;
        }
    }
}

/// `out[t][at + r] = w[r] · x[t]` for `R` rows and `T` tokens of `cols` elements. Each sum
/// goes through the columns eight by eight, the last filled up with zeros, whatever `R` and `T`
/// are.
#[inline(always)]
fn dots<V: Vectors, const R: usize, const T: usize>(
    v: V,
    w: &[f32],
    x: &[f32],
    cols: usize,
    out: &mut [&mut [f32]],
    at: usize,
) {
    // Slices of `steps` elements each, so that the loop needs no check.
    let steps = cols / STEP_COLS;
    let (mut w_steps, mut w_tails) = ([&[][..]; R], [&[][..]; R]);
    for r in 0..R {
        let (all, tail) = w[r * cols..][..cols].as_chunks::<STEP_COLS>();
        (w_steps[r], w_tails[r]) = (&all[..steps], tail);
    }
    let (mut x_steps, mut x_tails) = ([&[][..]; T], [&[][..]; T]);
    for t in 0..T {
        let (all, tail) = x[t * cols..][..cols].as_chunks::<STEP_COLS>();
        (x_steps[t], x_tails[t]) = (&all[..steps], tail);
    }
    let mut sums = [[[v.splat(0.0); STEP]; T]; R];
    for c in 0..steps {
        let mut x = [[v.splat(0.0); STEP]; T];
        for t in 0..T {
            x[t] = load(v, &x_steps[t][c]);
        }
        for r in 0..R {
            let w = load(v, &w_steps[r][c]);
            for t in 0..T {
                for i in 0..STEP {
                    sums[r][t][i] = v.mul_add(w[i], x[t][i], sums[r][t][i]);
                }
            }
        }
    }
    if !cols.is_multiple_of(STEP_COLS) {
        for r in 0..R {
            let w = load(v, &filled_up(w_tails[r]));
            for t in 0..T {
                let x = load(v, &filled_up(x_tails[t]));
                for i in 0..STEP {
                    sums[r][t][i] = v.mul_add(w[i], x[i], sums[r][t][i]);
                }
            }
        }
    }
    for r in 0..R {
        for t in 0..T {
            let [a, b, c, d] = v.store(v.add(sums[r][t][0], sums[r][t][1]));
            out[t][at + r] = (a + c) + (b + d);
        }
    }
}

#[inline(always)]
fn load<V: Vectors>(v: V, step: &[f32; STEP_COLS]) -> [V::F32; STEP] {
    let [a, b, c, d, e, f, g, h] = *step;
    [v.load(&[a, b, c, d]), v.load(&[e, f, g, h])]
}

#[inline(always)]
fn filled_up(tail: &[f32]) -> [f32; STEP_COLS] {
    let mut step = [0.0; STEP_COLS];
    step[..tail.len()].copy_from_slice(tail);
    step
}

/// [`scalar::decode`]: the same values bit for bit. By hand what has an instruction of its own,
/// from the portable code the rest, which the compiler knows how to do with vectors of this size.
#[inline(always)]
fn decode<V: Vectors>(v: V, block_type: BlockType, bytes: &[u8], out: &mut [f32]) {
    if block_type != BlockType::F16 {
        return scalar::decode(block_type, bytes, out);
    }
    let (fours, tail) = bytes.as_chunks::<2>().0.as_chunks::<LANES>();
    let (vectors, out_tail) = out.as_chunks_mut::<LANES>();
    for (four, out) in fours.iter().zip(vectors) {
        let [a, b, c, d] = *four;
        let four = [
            u16::from_le_bytes(a),
            u16::from_le_bytes(b),
            u16::from_le_bytes(c),
            u16::from_le_bytes(d),
        ];
        *out = v.store(v.load_f16(&four));
    }
    scalar::decode(block_type, tail.as_flattened(), out_tail);
}
