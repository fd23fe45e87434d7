//! Every stored type decodes as the `gguf` package does, bit for bit.

#![expect(
    clippy::unwrap_used,
    reason = "clippy's exception for tests covers only test functions"
)]

use std::path::Path;

use phi3_kernels::{BlockType, MatrixRef, dequantize, gather_rows, matmul};

const ROWS: usize = 2;
const COLS: usize = 512;

/// The bytes of a fixture's matrix and the weights that they stand for.
fn fixture(block_type: BlockType) -> (Vec<u8>, Vec<f32>) {
    let file = format!("{}.bin", block_type.name().to_lowercase());
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let mut bytes = std::fs::read(path.join(file)).unwrap();
    let weights = bytes.split_off(ROWS * block_type.row_bytes(COLS).unwrap());
    let (weights, rest) = weights.as_chunks();
    assert!(weights.len() == ROWS * COLS && rest.is_empty());
    let weights = weights.iter().map(|w| f32::from_le_bytes(*w)).collect();
    (bytes, weights)
}

fn types_with_fixtures() -> impl Iterator<Item = BlockType> {
    // F32 needs none: its bytes are its weights.
    let all = BlockType::ALL.into_iter();
    all.filter(|t| *t != BlockType::F32)
}

fn assert_same_bits(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len());
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        // 0 * -d and the like: the sign of a zero is not part of the format.
        let same = found.to_bits() == expected.to_bits() || (*found == 0.0 && *expected == 0.0);
        assert!(
            same,
            "{what}: weight {i} is {found:e}, expected {expected:e}"
        );
    }
}

#[test]
fn dequantize_equals_gguf() {
    for t in types_with_fixtures() {
        let (bytes, weights) = fixture(t);
        let mut out = vec![f32::NAN; weights.len()];
        dequantize(t, &bytes, &mut out).unwrap();
        assert_same_bits(&out, &weights, t.name());
    }
}

#[test]
fn f32_keeps_its_bits() {
    let weights = [1.5f32, -0.0, f32::INFINITY, 1e-42];
    let bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
    let mut out = [0.0; 4];
    dequantize(BlockType::F32, &bytes, &mut out).unwrap();
    assert_eq!(out.map(f32::to_bits), weights.map(f32::to_bits));
}

#[test]
fn gathered_rows_are_decoded_rows() {
    for t in types_with_fixtures() {
        let (bytes, weights) = fixture(t);
        // One byte further, so that nothing is aligned.
        let shifted = [&[0], &bytes[..]].concat();
        let w = MatrixRef::new(t, ROWS, COLS, &shifted[1..]).unwrap();
        let mut out = vec![f32::NAN; 3 * COLS];
        gather_rows(w, &[1, 0, 1], &mut out).unwrap();
        let (first, second) = weights.split_at(COLS);
        assert_same_bits(&out, &[second, first, second].concat(), t.name());
    }
}

/// A token with a single 1 picks one column of the matrix.
#[test]
fn matmul_decodes_the_same_weights() {
    for t in types_with_fixtures() {
        let (bytes, weights) = fixture(t);
        let w = MatrixRef::new(t, ROWS, COLS, &bytes).unwrap();
        let mut x = vec![0.0; COLS * COLS];
        (0..COLS).for_each(|i| x[i * COLS + i] = 1.0);
        let mut out = vec![f32::NAN; COLS * ROWS];
        matmul(&x, COLS, w, &mut out, ROWS, 0);
        let transposed: Vec<f32> = (0..COLS)
            .flat_map(|c| [weights[c], weights[COLS + c]])
            .collect();
        assert_same_bits(&out, &transposed, t.name());
    }
}
