//! Which backend does the work: chosen once, by what the processor has.

use std::ops::Deref;
use std::sync::OnceLock;

#[cfg(target_arch = "aarch64")]
use crate::aarch64::{Dotprod, I8mm, Neon};
use crate::backend::Kernels;
use crate::scalar::Scalar;
#[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
use crate::wasm32::Simd128;
#[cfg(target_arch = "x86_64")]
use crate::x86_64::{Avx2, Avx512Vnni, AvxVnni};

/// A backend that this processor can run, with the operations of [`Kernels`].
#[derive(Clone, Copy, Debug)]
pub(crate) enum Backend {
    /// Portable Rust.
    Scalar,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// AVX2 beside stand-ins for the instructions of VNNI.
    #[cfg(all(target_arch = "x86_64", test))]
    EmulatedVnni(crate::x86_64::Emulated),
    /// AVX2 and AVX-VNNI.
    #[cfg(target_arch = "x86_64")]
    AvxVnni(AvxVnni),
    /// AVX2, AVX-512F and AVX-512 VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni(Avx512Vnni),
    /// NEON.
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
    /// NEON and dot products of bytes.
    #[cfg(target_arch = "aarch64")]
    Dotprod(Dotprod),
    /// NEON, dot products and matrix products of bytes.
    #[cfg(target_arch = "aarch64")]
    I8mm(I8mm),
    /// WebAssembly's vectors of 128 bits.
    #[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
    Simd128(Simd128),
}

/// The backend in use: the last of [`available`], or the one that `PHI3_KERNELS` names.
pub(crate) fn backend() -> Backend {
    static BACKEND: OnceLock<Backend> = OnceLock::new();
    *BACKEND.get_or_init(|| {
        let wanted = crate::environment::backend().ok().flatten();
        wanted.unwrap_or_else(|| available().pop().unwrap_or(Backend::Scalar))
    })
}

/// What this processor can run, from slow to fast.
pub(crate) fn available() -> Vec<Backend> {
    let all = [
        Some(Backend::Scalar),
        #[cfg(all(target_arch = "x86_64", test))]
        crate::x86_64::Emulated::new().map(Backend::EmulatedVnni),
        #[cfg(target_arch = "x86_64")]
        Avx2::new().map(Backend::Avx2),
        #[cfg(target_arch = "x86_64")]
        AvxVnni::new().map(Backend::AvxVnni),
        #[cfg(target_arch = "x86_64")]
        Avx512Vnni::new().map(Backend::Avx512Vnni),
        #[cfg(target_arch = "aarch64")]
        Neon::new().map(Backend::Neon),
        #[cfg(target_arch = "aarch64")]
        Dotprod::new().map(Backend::Dotprod),
        #[cfg(target_arch = "aarch64")]
        I8mm::new().map(Backend::I8mm),
        #[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
        Some(Backend::Simd128(Simd128)),
    ];
    all.into_iter().flatten().collect()
}

impl Deref for Backend {
    type Target = dyn Kernels;

    fn deref(&self) -> &Self::Target {
        match self {
            Backend::Scalar => &Scalar,
            #[cfg(target_arch = "x86_64")]
            Backend::Avx2(avx2) => avx2,
            #[cfg(all(target_arch = "x86_64", test))]
            Backend::EmulatedVnni(emulated) => emulated,
            #[cfg(target_arch = "x86_64")]
            Backend::AvxVnni(vnni) => vnni,
            #[cfg(target_arch = "x86_64")]
            Backend::Avx512Vnni(vnni) => vnni,
            #[cfg(target_arch = "aarch64")]
            Backend::Neon(neon) => neon,
            #[cfg(target_arch = "aarch64")]
            Backend::Dotprod(dotprod) => dotprod,
            #[cfg(target_arch = "aarch64")]
            Backend::I8mm(i8mm) => i8mm,
            #[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
            Backend::Simd128(simd128) => simd128,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, Random};
    use crate::{Activations, BlockType, MatrixRef};
    use proptest::prelude::*;
    use proptest::sample::select;

    /// Error of an f32 sum of products, relative to the sum of their magnitudes; measured 1.3e-7
    /// with either backend.
    const MATMUL_TOLERANCE: f64 = 5e-7;

    impl Backend {
        /// `out[t, i] = x[t] · w[first_row + i]`, `out` `[n, rows]`, with tokens as the entry points
        /// give them.
        fn matmul_rows(
            &self,
            x: &[f32],
            n: usize,
            w: MatrixRef<'_>,
            first_row: usize,
            out: &mut [f32],
        ) {
            let x = Activations::new(x, n, w.cols());
            let rows = out.len() / n;
            let mut out: Vec<&mut [f32]> = out.chunks_mut(rows).collect();
            (**self).matmul_rows(&x.tokens(&**self, w.block_type()), w, first_row, &mut out);
        }
    }

    /// Values of either sign from subnormal to huge, zeros among them.
    fn activations(random: &mut Random, len: usize) -> Vec<f32> {
        let value = |random: &mut Random| {
            let scale = [0.0, 1e-42, 1e-20, 1.0, 1.0, 1.0, 1e15][(random.bits() % 7) as usize];
            random.unit() * scale
        };
        (0..len).map(|_| value(random)).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Every backend against the oracle; and a token alone against the same among many.
        #[test]
        fn backends_multiply(
            block_type in select(BlockType::ALL.to_vec()),
            rows in 1usize..40,
            blocks in 0usize..4,
            tail in 0usize..40,
            n in 1usize..12,
            first_row in 0usize..3,
            misaligned in 0usize..4,
            seed: u64,
        ) {
            let cols = match block_type.block_len() {
                1 => 17 * blocks + tail,
                len => len * blocks,
            };
            let mut bytes = vec![0; misaligned];
            bytes.extend(testing::random_matrix(block_type, first_row + rows, cols, seed));
            let w = MatrixRef::new(block_type, first_row + rows, cols, &bytes[misaligned..]);
            let w = w.unwrap();
            let x = activations(&mut Random(seed), misaligned + n * cols);
            let x = &x[misaligned..];
            let expected = testing::matmul(x, n, w);
            for backend in available() {
                let name = backend.name();
                let mut out = vec![f32::NAN; n * rows];
                backend.matmul_rows(x, n, w, first_row, &mut out);
                for t in 0..n {
                    let out = &out[t * rows..][..rows];
                    for (r, found) in out.iter().enumerate() {
                        let (sum, scale) = expected[t * w.rows() + first_row + r];
                        prop_assert!(
                            (f64::from(*found) - sum).abs() <= MATMUL_TOLERANCE * scale + 1e-40,
                            "{name} {w:?} token {t} row {r}: {found}, expected {sum} of {scale}"
                        );
                    }
                    let mut alone = vec![f32::NAN; rows];
                    backend.matmul_rows(&x[t * cols..][..cols], 1, w, first_row, &mut alone);
                    prop_assert_eq!(&alone[..], out, "{} {:?} token {}", name, w, t);
                }
            }
        }
    }

    /// More tokens and rows than a backend takes at a time, and a last block of columns that is short:
    /// few tokens as each alone, many as fewer of them, and both what they should be.
    #[test]
    fn backends_multiply_many_tokens_as_each_alone() {
        for block_type in [BlockType::F32, BlockType::F16, BlockType::BF16] {
            let (n, rows, cols) = (151, 150, 1555);
            let bytes = testing::random_matrix(block_type, rows, cols, 9);
            let w = MatrixRef::new(block_type, rows, cols, &bytes).unwrap();
            let x = Random(10).units(n * cols);
            let expected = testing::matmul(&x, n, w);
            for backend in available() {
                let by = |n: usize| {
                    let products = x.chunks(n * cols).flat_map(|x| {
                        let mut out = vec![f32::NAN; x.len() / cols * rows];
                        backend.matmul_rows(x, x.len() / cols, w, 0, &mut out);
                        out
                    });
                    products.collect::<Vec<f32>>()
                };
                let (all, alone) = (by(n), by(1));
                let name = backend.name();
                assert_eq!(by(76), all, "{name} {block_type}");
                assert_eq!(by(26), alone, "{name} {block_type}");
                for ((sum, scale), found) in
                    expected.iter().zip(&all).chain(expected.iter().zip(&alone))
                {
                    assert!(
                        (f64::from(*found) - sum).abs() <= MATMUL_TOLERANCE * scale,
                        "{name} {block_type}: {found}, expected {sum} of {scale}"
                    );
                }
            }
        }
    }

    /// One 1 in a token picks a weight, which every backend decodes to the same bits.
    #[test]
    fn backends_decode_alike() {
        for block_type in BlockType::ALL {
            let (rows, cols) = (3, 256);
            let bytes = testing::random_matrix(block_type, rows, cols, 7);
            let w = MatrixRef::new(block_type, rows, cols, &bytes).unwrap();
            let mut x = vec![0.0; cols * cols];
            (0..cols).for_each(|i| x[i * cols + i] = 1.0);
            let run = |backend: Backend| {
                let mut out = vec![f32::NAN; cols * rows];
                backend.matmul_rows(&x, cols, w, 0, &mut out);
                out
            };
            let expected = run(Backend::Scalar);
            for backend in available() {
                assert_eq!(run(backend), expected, "{} {block_type}", backend.name());
            }
        }
    }

    /// Where a processor lacks a backend, the tests of every backend leave it out; this says so.
    #[test]
    fn backends_that_this_processor_lacks_are_named() {
        let compiled: &[&str] = if cfg!(target_arch = "x86_64") {
            &["avx2", "avx-vnni", "avx512-vnni"]
        } else if cfg!(target_arch = "aarch64") {
            &["neon", "neon-dotprod", "neon-i8mm"]
        } else if cfg!(all(target_arch = "wasm32", target_feature = "simd128")) {
            &["simd128"]
        } else {
            &[]
        };
        let available: Vec<&str> = available().iter().map(|b| b.name()).collect();
        for name in compiled {
            if !available.contains(name) {
                println!("skipped: this processor has no {name}");
            }
        }
        // Those that are there have names of their own, which choose them.
        for name in &available {
            assert_eq!(available.iter().filter(|n| n == &name).count(), 1);
            let known = ["scalar", "emulated-vnni"].contains(name) || compiled.contains(name);
            assert!(known, "{name} is missing above");
        }
    }

    #[test]
    fn backends_propagate_what_is_not_finite() {
        for backend in available() {
            for block_type in BlockType::ALL {
                let bytes = vec![0xff; block_type.row_bytes(256).unwrap()];
                let w = MatrixRef::new(block_type, 1, 256, &bytes).unwrap();
                let mut out = [0.0];
                backend.matmul_rows(&[1.0; 256], 1, w, 0, &mut out);
                assert!(out[0].is_nan(), "{} {block_type}", backend.name());
            }
            // Infinite activations, in a whole vector and in the tail of a row.
            let bytes = testing::random_matrix(BlockType::F32, 1, 21, 1);
            let w = MatrixRef::new(BlockType::F32, 1, 21, &bytes).unwrap();
            for i in 0..21 {
                let mut x = [1.0; 21];
                x[i] = f32::INFINITY;
                let mut out = [0.0];
                backend.matmul_rows(&x, 1, w, 0, &mut out);
                assert!(out[0].is_infinite(), "{} element {i}", backend.name());
            }
        }
    }
}
