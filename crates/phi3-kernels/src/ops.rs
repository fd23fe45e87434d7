//! The entry points other than attention: they check lengths and spread the work.

use crate::{Activations, BlockType, MatrixRef, ShapeError, dispatch, scalar, threads};

/// Work of one weight decoded, in multiply-adds.
const DECODE_WORK: usize = 2;
/// Work of one exponential and what surrounds it, in multiply-adds.
const EXP_WORK: usize = 16;
/// Rows that a thread takes are a multiple of this, so that no backend's register block is cut.
const ROW_MULTIPLE: usize = 16;

/// Decodes whole blocks of `bytes` to `out.len()` weights.
///
/// With d (and m, dmin) the block's half-precision factors, q the stored weight, s and z the
/// scale and minimum of a group: Q4_0 `d (q - 8)`, Q5_0 `d (q - 16)`, Q4_1 and Q5_1 `d q + m`,
/// Q8_0 `d q`, IQ4_NL `d table[q]`, Q2_K, Q4_K and Q5_K `(d s) q - dmin z`, Q3_K
/// `(d (s - 32)) (q - 4)`, Q6_K `(d s) (q - 32)`, INT4 `d (q - 8)`; rounded to f32 after every
/// operation. Layouts and formulas are those of `dequantize_row_*` in ggml's `ggml-quants.c`. A
/// block of INT4, which ggml does not have, is d and 128 bytes: of each 64 weights, byte l of 32
/// holds q of weight l in its low half and of weight l + 32 in its high half. Infinite and NaN
/// factors give infinite and NaN weights.
///
/// # Errors
/// When `out` is not a whole number of blocks, or `bytes` does not hold exactly those blocks.
pub fn dequantize(block_type: BlockType, bytes: &[u8], out: &mut [f32]) -> Result<(), ShapeError> {
    let found = out.len();
    let expected = block_type
        .row_bytes(found)
        .ok_or(ShapeError::PartialBlock { block_type, found })?;
    if bytes.len() != expected {
        return Err(ShapeError::Length {
            what: "bytes to decode",
            block_type,
            expected,
            found: bytes.len(),
        });
    }
    scalar::decode(block_type, bytes, out);
    Ok(())
}

/// Decodes the rows `ids` of `w`, an embedding lookup: `out` is `[ids.len(), cols]`.
///
/// # Errors
/// When `out` has another length, or an id is not less than the number of rows; `out` is then
/// unchanged.
pub fn gather_rows(w: MatrixRef<'_>, ids: &[u32], out: &mut [f32]) -> Result<(), ShapeError> {
    let cols = w.cols();
    if ids.len().checked_mul(cols) != Some(out.len()) {
        return Err(ShapeError::Length {
            what: "weights of gathered rows",
            block_type: w.block_type(),
            expected: ids.len().saturating_mul(cols),
            found: out.len(),
        });
    }
    let row = |id: u32| usize::try_from(id).unwrap_or(usize::MAX);
    if let Some(found) = ids.iter().map(|id| row(*id)).find(|id| *id >= w.rows()) {
        let rows = w.rows();
        return Err(ShapeError::Row { found, rows });
    }
    let work = out.len().saturating_mul(DECODE_WORK);
    threads::for_each_part(out, cols, work, |first, out| {
        for (id, out) in ids[first..].iter().zip(out.chunks_exact_mut(cols)) {
            scalar::decode(w.block_type(), w.row(row(*id)), out);
        }
    });
    Ok(())
}

/// Multiplies `n` tokens with the rows of a matrix, a linear layer without bias:
/// `out[t * out_stride + out_offset + r] = sum_c x[t * cols + c] * w[r, c]`.
///
/// `x` is `[n, cols]`. The stride and the offset let several matrices, stacked by rows, write
/// one output; elements of `out` between are left alone. Weights are decoded to f32 exactly as
/// by [`dequantize`]; products and sums are f32. A token's result is the same to the last bit with any
/// number of threads, and alone or among others; of F16 and BF16 weights on x86-64 alone or among up to
/// 32, and among any larger number.
///
/// # Panics
/// When `x` is not `n * cols` long, `out_offset + rows` is larger than `out_stride`, or `out`
/// ends before the last element to be written.
pub fn matmul(
    x: &[f32],
    n: usize,
    w: MatrixRef<'_>,
    out: &mut [f32],
    out_stride: usize,
    out_offset: usize,
) {
    let (rows, cols) = (w.rows(), w.cols());
    assert!(
        n.checked_mul(cols) == Some(x.len()),
        "matmul: x has {} elements; expected {n} tokens of {cols}",
        x.len()
    );
    check_output(n, rows, out.len(), out_stride, out_offset);
    if n == 0 || rows == 0 {
        return;
    }

    float_products(
        &Activations::new(x, n, cols),
        w,
        out,
        out_stride,
        out_offset,
    );
}

/// [`matmul`], of lengths that were checked.
fn float_products(
    x: &Activations<'_>,
    w: MatrixRef<'_>,
    out: &mut [f32],
    out_stride: usize,
    out_offset: usize,
) {
    let (n, rows) = (x.len(), w.rows());
    let backend = dispatch::backend();
    let part_rows = rows_of_a_part(n, w, DECODE_WORK);
    let x = x.tokens(&*backend, w.block_type());
    if n == 1 {
        let out = &mut out[out_offset..][..rows];
        threads::for_each_chunk(out, part_rows, |i, out| {
            backend.matmul_rows(&x, w, i * part_rows, &mut [out]);
        });
        return;
    }
    let mut parts = in_parts(out, n, rows, part_rows, out_stride, out_offset);
    threads::for_each(&mut parts, |i, part| {
        backend.matmul_rows(&x, w, i * part_rows, part);
    });
}

/// A thread has some rows of the matrix and so some columns of the output: of each part, its piece of
/// each token's row.
fn in_parts(
    out: &mut [f32],
    n: usize,
    rows: usize,
    part_rows: usize,
    out_stride: usize,
    out_offset: usize,
) -> Vec<Vec<&mut [f32]>> {
    let mut parts = Vec::new();
    parts.resize_with(rows.div_ceil(part_rows), || Vec::with_capacity(n));
    for out in out.chunks_mut(out_stride).take(n) {
        let out = &mut out[out_offset..][..rows];
        for (part, out) in parts.iter_mut().zip(out.chunks_mut(part_rows)) {
            part.push(out);
        }
    }
    parts
}

/// Multiplies tokens with the rows of a matrix as [`matmul`] does, as fast as the types allow:
/// float weights exactly as there, quantized weights with activations rounded to eight bits where
/// rows are at least [`MIN_INT8_COLS`](crate::MIN_INT8_COLS) long.
///
/// Activations are scaled by the largest magnitude of each group of 32 (types with blocks of 32
/// weights) or 256 (the K types) over 127. Products of a block are summed as integers; block i
/// goes by fused multiply-adds to partial f32 sum `i % 8`, and these are added in order. So every
/// backend gives the same bits, and so does a token alone, among others, and with any number of
/// threads. A group of activations with an element that is not finite makes its token's
/// results NaN.
///
/// # Panics
/// When the tokens' length is not the number of columns, `out_offset + rows` is larger than
/// `out_stride`, or `out` ends before the last element to be written.
pub fn linear(
    x: &Activations<'_>,
    w: MatrixRef<'_>,
    out: &mut [f32],
    out_stride: usize,
    out_offset: usize,
) {
    let (n, rows, cols) = (x.len(), w.rows(), w.cols());
    assert!(
        x.cols() == cols,
        "matmul: tokens of {} elements; expected {cols}",
        x.cols()
    );
    check_output(n, rows, out.len(), out_stride, out_offset);
    if n == 0 || rows == 0 {
        return;
    }
    let Some(quantized) = x.quantized(w.block_type()) else {
        return float_products(x, w, out, out_stride, out_offset);
    };

    let part_rows = rows_of_a_part(n, w, 0);
    let backend = dispatch::backend();
    backend.prepare(quantized, w);
    let mut parts = in_parts(out, n, rows, part_rows, out_stride, out_offset);
    threads::for_each(&mut parts, |i, part| {
        backend.int8_rows(quantized, w, i * part_rows, part);
    });
}

/// Rows that share the tokens where these do not stay in a cache, more than [`FEW_TOKENS`], unless there are
/// fewer than [`TASKS_WITH_MANY`] times as many for each thread.
const MANY_ROWS: usize = 256;
const FEW_TOKENS: usize = 32;
const TASKS_WITH_MANY: usize = 4;

/// Rows of `w` that a thread takes at a time for `n` tokens, where a weight itself takes as much as
/// `decode_work` tokens.
pub(crate) fn rows_of_a_part(n: usize, w: MatrixRef<'_>, decode_work: usize) -> usize {
    let weights = w.rows().saturating_mul(w.cols());
    let work = weights.saturating_mul(n + decode_work);
    let multiple = match n > FEW_TOKENS {
        true => MANY_ROWS.min(w.rows() / (TASKS_WITH_MANY * threads::num_threads())),
        false => ROW_MULTIPLE,
    };
    let multiple = multiple.next_multiple_of(ROW_MULTIPLE).max(ROW_MULTIPLE);
    threads::chunk_len(w.rows(), work).next_multiple_of(multiple)
}

/// Whether `n` output rows of `rows` elements fit `len` elements at this stride and offset.
fn check_output(n: usize, rows: usize, len: usize, out_stride: usize, out_offset: usize) {
    let row_end = out_offset.checked_add(rows);
    assert!(
        row_end.is_some_and(|end| end <= out_stride),
        "matmul: {rows} rows at offset {out_offset} do not fit a stride of {out_stride}"
    );
    if n == 0 || rows == 0 {
        return;
    }
    let end = (n - 1)
        .checked_mul(out_stride)
        .and_then(|start| start.checked_add(out_offset + rows));
    assert!(
        end.is_some_and(|end| end <= len),
        "matmul: out has {len} elements; expected {n} rows with a stride of {out_stride}"
    );
}

/// Root-mean-square norm of rows: `out = x / sqrt(mean(x²) + eps) * weight`, each row as long
/// as `weight`; `x` and `out` are `[n, weight.len()]`. Statistics are f32 (Zhang and Sennrich,
/// 2019, and `Phi3RMSNorm`).
///
/// # Panics
/// When `x` and `out` differ in length or are not a whole number of rows.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    check_rows("rms_norm: x", x.len(), width, out.len() / width.max(1));
    check_rows("rms_norm: out", out.len(), width, x.len() / width.max(1));
    threads::for_each_part(out, width, x.len().saturating_mul(2), |first, out| {
        let x = x[first * width..].chunks_exact(width);
        for (x, out) in x.zip(out.chunks_exact_mut(width)) {
            scalar::rms_norm_row(x, weight, eps, out);
        }
    });
}

/// Layer norm of rows: `out = (x - mean) / sqrt(mean((x - mean)²) + eps) * weight + bias`, each row
/// as long as `weight` and `bias`; `x` and `out` are `[n, weight.len()]`. Statistics are f32, the
/// variance from the differences, so that a large mean costs no digits.
///
/// # Panics
/// When `x` and `out`, or `weight` and `bias`, differ in length, or rows are not whole.
pub fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    check_rows("layer_norm: bias", bias.len(), width, 1);
    check_rows("layer_norm: x", x.len(), width, out.len() / width.max(1));
    check_rows("layer_norm: out", out.len(), width, x.len() / width.max(1));
    threads::for_each_part(out, width, x.len().saturating_mul(3), |first, out| {
        let x = x[first * width..].chunks_exact(width);
        for (x, out) in x.zip(out.chunks_exact_mut(width)) {
            scalar::layer_norm_row(x, weight, bias, eps, out);
        }
    });
}

/// CLIP's activation, `out = x * sigmoid(1.702 x)`: within 2e-7 of the largest of 1 and its
/// magnitude.
///
/// # Panics
/// When `x` and `out` differ in length.
pub fn quick_gelu(x: &[f32], out: &mut [f32]) {
    check_rows("quick_gelu: x", x.len(), 1, out.len());
    let work = out.len().saturating_mul(EXP_WORK);
    let backend = dispatch::backend();
    threads::for_each_part(out, 1, work, |first, out| {
        out.copy_from_slice(&x[first..][..out.len()]);
        backend.quick_gelu(out);
    });
}

/// `out = x + y`.
///
/// # Panics
/// When the lengths differ.
pub fn add(x: &[f32], y: &[f32], out: &mut [f32]) {
    check_rows("add: x", x.len(), 1, out.len());
    check_rows("add: y", y.len(), 1, out.len());
    threads::for_each_part(out, 1, x.len(), |first, out| {
        let both = x[first..].iter().zip(&y[first..]);
        for (out, (x, y)) in out.iter_mut().zip(both) {
            *out = x + y;
        }
    });
}

/// The gated activation of Phi-3's MLP: `out = up * silu(gate)`, `silu(g) = g / (1 + exp(-g))`.
/// Rows of `gate_up` are `[gate | up]`, each half `intermediate` long; `out` is
/// `[n, intermediate]`.
///
/// # Panics
/// When `gate_up` is not twice as long as `out`, or `out` not a whole number of rows.
pub fn silu_mul(gate_up: &[f32], intermediate: usize, out: &mut [f32]) {
    let n = out.len() / intermediate.max(1);
    check_rows("silu_mul: out", out.len(), intermediate, n);
    check_rows(
        "silu_mul: gate_up halves",
        gate_up.len(),
        intermediate,
        2 * n,
    );
    let work = out.len().saturating_mul(EXP_WORK);
    let backend = dispatch::backend();
    threads::for_each_part(out, intermediate, work, |first, out| {
        let gate_up = gate_up[2 * first * intermediate..].chunks_exact(2 * intermediate);
        for (gate_up, out) in gate_up.zip(out.chunks_exact_mut(intermediate)) {
            let (gate, up) = gate_up.split_at(intermediate);
            backend.silu_mul(gate, up, out);
        }
    });
}

/// The gated activation of Phi-3-small's MLP: pairs `(a, b)` of `up`, interleaved, become
/// `a * sigmoid(1.702 a) * (b + 1)`, with `a` at most `limit` and `b` within it on both sides
/// before that. Infinite values pass the limit, as in the reference.
///
/// # Panics
/// When `up` is not twice as long as `out`.
pub fn gegelu(up: &[f32], limit: f32, out: &mut [f32]) {
    check_rows("gegelu: up", up.len(), 2, out.len());
    let work = out.len().saturating_mul(EXP_WORK);
    let backend = dispatch::backend();
    threads::for_each_part(out, 1, work, |first, out| {
        backend.gegelu(&up[2 * first..][..2 * out.len()], limit, out);
    });
}

/// The index of the largest value, the first of equals. NaN never wins; `None` when nothing
/// else is there.
pub fn argmax(x: &[f32]) -> Option<usize> {
    scalar::argmax(x)
}

fn check_rows(what: &str, found: usize, width: usize, n: usize) {
    assert!(
        width.checked_mul(n) == Some(found),
        "{what} has {found} elements; expected {n} rows of {width}"
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Finish, finish_rows};

    #[test]
    fn argmax_takes_the_first_of_equals_and_never_nan() {
        assert_eq!(argmax(&[]), None);
        assert_eq!(argmax(&[f32::NAN]), None);
        assert_eq!(argmax(&[f32::NAN, f32::NEG_INFINITY, f32::NAN]), Some(1));
        assert_eq!(argmax(&[1.0, 3.0, f32::NAN, 3.0]), Some(1));
        assert_eq!(argmax(&[-0.0, 0.0]), Some(0));
    }

    #[test]
    fn quick_gelu_is_what_its_formula_says() {
        let x: Vec<f32> = (-60_000..60_000).map(|i| i as f32 / 500.0).collect();
        let mut out = vec![f32::NAN; x.len()];
        quick_gelu(&x, &mut out);
        for (x, out) in x.iter().zip(out) {
            let wide = f64::from(*x);
            let expected = wide / (1.0 + (-1.702 * wide).exp());
            let error = (f64::from(out) - expected).abs();
            assert!(
                error <= 2e-7 * wide.abs().max(1.0),
                "{x}: {out}, {expected}"
            );
        }
        let mut out = [0.0; 3];
        quick_gelu(&[f32::INFINITY, f32::NEG_INFINITY, f32::NAN], &mut out);
        assert_eq!(out[0], f32::INFINITY);
        assert!(out[2].is_nan(), "{out:?}");
    }

    #[test]
    fn layer_norm_and_bias_by_hand() {
        let mut out = [0.0; 4];
        layer_norm(
            &[3.0, 7.0, 1.0, 1.0],
            &[1.0, 2.0],
            &[0.0, 5.0],
            1e-9,
            &mut out,
        );
        assert_eq!(out, [-1.0, 7.0, 0.0, 5.0]);
        finish_rows(&mut out, 2, Some(&[1.0, -5.0]), Finish::Nothing);
        assert_eq!(out, [0.0, 2.0, 1.0, 0.0]);
        layer_norm(&[], &[], &[], 1e-5, &mut []);
        finish_rows(&mut [], 0, Some(&[]), Finish::Nothing);
    }

    #[test]
    fn sums_are_of_the_same_places() {
        // Enough for several threads.
        let x: Vec<f32> = (0..100_003).map(|i| i as f32).collect();
        let y: Vec<f32> = x.iter().map(|x| 0.25 - x).collect();
        let mut out = vec![f32::NAN; x.len()];
        add(&x, &y, &mut out);
        assert!(out.iter().all(|sum| *sum == 0.25));
        add(&[], &[], &mut []);
    }

    #[test]
    #[should_panic(expected = "add: y has 1 elements; expected 2 rows of 1")]
    fn sums_are_of_as_many_numbers() {
        add(&[1.0, 2.0], &[1.0], &mut [0.0; 2]);
    }

    #[test]
    fn lengths_that_do_not_fit_are_errors() {
        let error = dequantize(BlockType::Q8_0, &[0; 34], &mut [0.0; 64]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "bytes to decode (Q8_0): expected 68, found 34"
        );
        assert!(dequantize(BlockType::Q8_0, &[0; 34], &mut [0.0; 31]).is_err());

        let bytes = [0; 34 * 3];
        let w = MatrixRef::new(BlockType::Q8_0, 3, 32, &bytes).unwrap();
        let error = gather_rows(w, &[0, 3], &mut [0.0; 64]).unwrap_err();
        assert_eq!(error.to_string(), "row 3 of a matrix: expected less than 3");
        assert!(gather_rows(w, &[0, 2], &mut [0.0; 63]).is_err());
        assert!(gather_rows(w, &[], &mut []).is_ok());
    }

    #[test]
    fn empty_operands_are_no_panic() {
        let w = MatrixRef::new(BlockType::F32, 2, 0, &[]).unwrap();
        let mut out = [7.0; 2];
        matmul(&[], 1, w, &mut out, 2, 0);
        assert_eq!(out, [0.0, 0.0]);
        matmul(&[], 0, w, &mut [], 2, 0);
        gather_rows(w, &[1, 0], &mut []).unwrap();
        rms_norm(&[], &[], 1e-5, &mut []);
        silu_mul(&[], 0, &mut []);
    }

    #[test]
    fn the_gap_between_matrices_is_left_alone() {
        let bytes: Vec<u8> = [1.0f32, 2.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        let w = MatrixRef::new(BlockType::F32, 2, 1, &bytes).unwrap();
        let mut out = [9.0; 8];
        matmul(&[10.0, 20.0], 2, w, &mut out, 4, 1);
        assert_eq!(out, [9.0, 10.0, 20.0, 9.0, 9.0, 20.0, 40.0, 9.0]);
    }

    #[test]
    #[should_panic(expected = "matmul: 2 rows at offset 1 do not fit a stride of 2")]
    fn an_overlapping_stride_panics() {
        let w = MatrixRef::new(BlockType::F16, 2, 1, &[0; 4]).unwrap();
        matmul(&[1.0], 1, w, &mut [0.0; 3], 2, 1);
    }
}
