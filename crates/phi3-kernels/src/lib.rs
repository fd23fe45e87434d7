//! CPU kernels of the Phi-3 model zoo, on plain slices.
//!
//! The crate knows no tensors, models or files. It multiplies f32 activations with matrices that
//! stay as they lie in a mapped file ([`MatrixRef`]; plain floats or ggml blocks,
//! [`BlockType`]), attends ([`attend_packed`]), and does the small operations between.
//!
//! `scalar` is the specification, in portable Rust. Other backends, chosen once at run time by
//! what the processor has ([`backend_name`]; `PHI3_KERNELS=scalar` overrides it), compute the
//! same within f32 rounding. Products with quantized weights ([`linear`]) take the activations
//! ([`Activations`]) as eight-bit integers. Large operations are spread over a thread pool
//! ([`set_num_threads`]; `PHI3_THREADS`).
//!
//! A token's result never depends on which other tokens a call has nor on the number of threads, to the
//! last bit: each output is summed in one order, which depends on the number of columns and, where
//! weights in half precision are multiplied on x86-64, on whether there are more than 32 tokens.
//!
//! # Example
//! A matrix of two rows and two columns times one token:
//! ```
//! use phi3_kernels::{BlockType, MatrixRef, matmul};
//!
//! let bytes: Vec<u8> = [1.0f32, 2.0, 3.0, 4.0].iter().flat_map(|w| w.to_le_bytes()).collect();
//! let w = MatrixRef::new(BlockType::F32, 2, 2, &bytes)?;
//! let mut out = [0.0; 2];
//! matmul(&[10.0, 1.0], 1, w, &mut out, 2, 0);
//! assert_eq!(out, [12.0, 34.0]);
//! # Ok::<(), phi3_kernels::ShapeError>(())
//! ```

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod activations;
mod attention;
mod backend;
mod block;
mod block_sparse;
mod dispatch;
mod environment;
mod finish;
mod heads;
#[cfg(test)]
mod int8_tests;
mod ops;
mod probe;
mod products;
mod quantize;
mod scalar;
#[cfg(any(
    target_arch = "aarch64",
    all(target_arch = "wasm32", target_feature = "simd128")
))]
mod simd128;
#[doc(hidden)]
pub mod testing;
mod threads;
#[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
mod wasm32;
#[cfg(target_arch = "x86_64")]
mod x86_64;

pub use activations::{Activations, MIN_INT8_COLS};
pub use attention::{
    AttentionJob, AttentionShape, KvPage, KvPages, attend, attend_packed, f16_to_f32, f32_to_f16,
    f32_to_q8_0, q8_0_row_bytes,
};
pub use block::{BlockType, MatrixRef, ParseBlockTypeError, ShapeError};
pub use block_sparse::BlockSparseLayout;
pub use environment::{EnvironmentError, check_environment};
pub use finish::{Finish, finish_rows};
pub use heads::{Heads, Rotation, take_heads};
pub use ops::{
    add, argmax, dequantize, gather_rows, gegelu, layer_norm, linear, matmul, quick_gelu, rms_norm,
    silu_mul,
};
pub use probe::{InstructionSet, Probe, probe};
pub use products::{Product, combine_rows, linear_all};
pub use quantize::quantize;
pub use threads::{OccupiedThread, for_each, num_threads, occupy_thread, set_num_threads};

/// The name of the backend in use, as `PHI3_KERNELS` takes it: `scalar` (every processor),
/// `avx2` (x86-64 with AVX2, FMA and F16C), `avx-vnni` and `avx512-vnni` (with VNNI besides, in
/// vectors of 256 or 512 bits), `neon` (64-bit ARM), `neon-dotprod` (with dot products besides),
/// `neon-i8mm` (with matrix products besides) or `simd128` (WebAssembly that was compiled with
/// vectors of 128 bits, since a module cannot ask for them).
pub fn backend_name() -> &'static str {
    dispatch::backend().name()
}
