//! Several linear layers at once, and what a mixture of experts does around them.

use crate::activations::Quantized;
use crate::{Activations, MatrixRef, dispatch, ops, threads};

/// One linear layer without bias among those of [`linear_all`].
#[derive(Debug)]
pub struct Product<'a> {
    /// The tokens, `[n, cols]`.
    pub x: &'a Activations<'a>,
    /// Matrices whose outputs lie side by side, each `[rows, cols]`.
    pub matrices: &'a [MatrixRef<'a>],
    /// `[n, sum of rows]`.
    pub out: &'a mut [f32],
}

/// What one thread does at a time: some rows of a matrix, for all tokens of its product.
struct Task<'a> {
    x: &'a Quantized,
    w: MatrixRef<'a>,
    first_row: usize,
    /// Of each token, the outputs of these rows.
    outs: Vec<&'a mut [f32]>,
}

/// All `products`, each as [`linear`](crate::linear) makes it, to the last bit, but in one go: a thread
/// that is done with one goes on with the next instead of waiting for the other threads. A mixture of
/// experts has many small products.
///
/// ```
/// use phi3_kernels::{Activations, BlockType, MatrixRef, Product, linear_all};
///
/// let bytes: Vec<u8> = [1.0f32, 2.0, 3.0, 4.0].iter().flat_map(|w| w.to_le_bytes()).collect();
/// let row = |r: usize| MatrixRef::new(BlockType::F32, 1, 2, &bytes[8 * r..8 * r + 8]);
/// let matrices = [row(0)?, row(1)?];
/// let (x, y) = ([10.0, 1.0], [0.0, 1.0]);
/// let (x, y) = (Activations::new(&x, 1, 2), Activations::new(&y, 1, 2));
/// let (mut both, mut second) = ([0.0; 2], [0.0; 1]);
/// linear_all(&mut [
///     Product { x: &x, matrices: &matrices, out: &mut both },
///     Product { x: &y, matrices: &matrices[1..], out: &mut second },
/// ]);
/// assert_eq!((both, second), ([12.0, 34.0], [4.0]));
/// # Ok::<(), phi3_kernels::ShapeError>(())
/// ```
///
/// # Panics
/// When the tokens' length is not the number of columns of a matrix, or an output has another length.
pub fn linear_all(products: &mut [Product<'_>]) {
    let backend = dispatch::backend();
    let mut tasks = Vec::new();
    for Product { x, matrices, out } in products {
        let (n, stride) = (x.len(), matrices.iter().map(MatrixRef::rows).sum::<usize>());
        assert!(
            n.checked_mul(stride) == Some(out.len()),
            "linear_all: out has {} elements; expected {n} rows of {stride}",
            out.len()
        );
        let mut offset = 0;
        for w in matrices.iter() {
            assert!(
                x.cols() == w.cols(),
                "linear_all: tokens of {} elements; expected {}",
                x.cols(),
                w.cols()
            );
            if x.quantized(w.block_type()).is_none() && n > 0 && w.rows() > 0 {
                ops::linear(x, *w, out, stride, offset);
            }
            offset += w.rows();
        }
        if n == 0 || stride == 0 {
            continue;
        }
        let mut outs: Vec<Vec<&mut [f32]>> = Vec::new();
        outs.resize_with(matrices.len(), || Vec::with_capacity(n));
        for mut rest in out.chunks_exact_mut(stride) {
            for (outs, w) in outs.iter_mut().zip(matrices.iter()) {
                let (head, tail) = rest.split_at_mut(w.rows());
                outs.push(head);
                rest = tail;
            }
        }
        for (outs, w) in outs.into_iter().zip(matrices.iter()) {
            if let Some(x) = x.quantized(w.block_type()) {
                backend.prepare(x, *w);
                tasks.extend(cut(x, *w, outs));
            }
        }
    }
    threads::for_each(&mut tasks, |_, task| {
        backend.int8_rows(task.x, task.w, task.first_row, &mut task.outs);
    });
}

/// The tasks of one matrix, whose output `outs` holds per token.
fn cut<'a>(x: &'a Quantized, w: MatrixRef<'a>, outs: Vec<&'a mut [f32]>) -> Vec<Task<'a>> {
    if w.rows() == 0 {
        return Vec::new();
    }
    let part_rows = ops::rows_of_a_part(outs.len(), w, 0);
    let mut tasks: Vec<Task<'a>> = (0..w.rows())
        .step_by(part_rows)
        .map(|first_row| Task {
            x,
            w,
            first_row,
            outs: Vec::with_capacity(outs.len()),
        })
        .collect();
    for out in outs {
        for (task, out) in tasks.iter_mut().zip(out.chunks_mut(part_rows)) {
            task.outs.push(out);
        }
    }
    tasks
}

/// Adds up weighted rows of `y` `[m, cols]`: with K choices to a row,
/// `out[r] = sum_k weights[r * K + k] * y[places[r * K + k]]`, in the order of k.
///
/// # Panics
/// When `places` and `weights` differ in length, `out` is not as many rows of `cols` as there are groups
/// of `choices` of them, or a place is not in `y`.
pub fn combine_rows(
    y: &[f32],
    cols: usize,
    places: &[u32],
    weights: &[f32],
    choices: usize,
    out: &mut [f32],
) {
    let rows = places.len() / choices.max(1);
    assert!(
        places.len() == weights.len() && places.len() == rows * choices,
        "combine_rows: {} places and {} weights are no {choices} to a row",
        places.len(),
        weights.len()
    );
    assert!(
        rows.checked_mul(cols) == Some(out.len()),
        "combine_rows: out has {} elements; expected {rows} rows of {cols}",
        out.len()
    );
    let work = cols.saturating_mul(places.len());
    threads::for_each_part(out, cols, work, |first, out| {
        let choices_of = |all: usize| (first + all) * choices..(first + all + 1) * choices;
        for (row, out) in out.chunks_exact_mut(cols).enumerate() {
            out.fill(0.0);
            let terms = places[choices_of(row)]
                .iter()
                .zip(&weights[choices_of(row)]);
            for (k, (&place, weight)) in terms.enumerate() {
                let start = place as usize * cols;
                let y = &y[start..start + cols];
                match k {
                    0 => (out.iter_mut().zip(y)).for_each(|(out, y)| *out = weight * y),
                    _ => (out.iter_mut().zip(y)).for_each(|(out, y)| *out += weight * y),
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, random_matrix};
    use crate::{BlockType, linear};

    #[test]
    fn many_at_once_are_the_same_as_one_by_one() {
        let mut random = Random(7);
        let types = [
            BlockType::Q4_0,
            BlockType::Q6K,
            BlockType::F16,
            BlockType::Q4K,
        ];
        for cols in [256, 2048] {
            let stored: Vec<(BlockType, usize, Vec<u8>)> = types
                .iter()
                .zip([48, 1, 33, 300])
                .map(|(&block_type, rows)| {
                    let bytes = random_matrix(block_type, rows, cols, random.bits());
                    (block_type, rows, bytes)
                })
                .collect();
            let matrices: Vec<MatrixRef<'_>> = stored
                .iter()
                .map(|(block_type, rows, bytes)| {
                    MatrixRef::new(*block_type, *rows, cols, bytes).unwrap()
                })
                .collect();
            let x = random.units(7 * cols);
            let x = Activations::new(&x, 7, cols);
            let picked = [vec![3], vec![], vec![6, 0, 2], vec![0, 1, 2, 3, 4, 5, 6]];
            let picked: Vec<Activations<'_>> =
                picked.iter().map(|rows| x.select(rows, types)).collect();
            let stacks = [
                &matrices[..],
                &matrices[..2],
                &matrices[1..],
                &matrices[3..],
            ];
            let mut outs: Vec<Vec<f32>> = Vec::new();
            for (x, stack) in picked.iter().zip(stacks) {
                let rows: usize = stack.iter().map(MatrixRef::rows).sum();
                outs.push(vec![f32::NAN; x.len() * rows]);
            }
            let mut products: Vec<Product<'_>> = picked
                .iter()
                .zip(stacks)
                .zip(&mut outs)
                .map(|((x, matrices), out)| Product { x, matrices, out })
                .collect();
            linear_all(&mut products);
            for ((x, stack), out) in picked.iter().zip(stacks).zip(&outs) {
                let rows: usize = stack.iter().map(MatrixRef::rows).sum();
                // Rounded again from the floats, not taken over.
                let fresh = Activations::new(x.values(), x.len(), cols);
                let mut expected = vec![0.0; x.len() * rows];
                let mut offset = 0;
                for w in stack {
                    linear(&fresh, *w, &mut expected, rows, offset);
                    offset += w.rows();
                }
                assert!(*out == expected, "{cols} columns, {} tokens", x.len());
            }
        }
        linear_all(&mut []);
    }

    #[test]
    fn choices_are_added_in_their_order() {
        let y = [1.0, 2.0, 10.0, 20.0, 100.0, 200.0];
        let mut out = [f32::NAN; 4];
        combine_rows(&y, 2, &[2, 0, 1, 1], &[0.5, 2.0, 1.0, -1.0], 2, &mut out);
        assert_eq!(out, [52.0, 104.0, 0.0, 0.0]);
        combine_rows(&y, 2, &[], &[], 2, &mut []);
    }

    #[test]
    #[should_panic(expected = "2 places and 1 weights")]
    fn every_choice_has_a_weight() {
        combine_rows(&[1.0], 1, &[0, 0], &[1.0], 2, &mut [0.0]);
    }
}
