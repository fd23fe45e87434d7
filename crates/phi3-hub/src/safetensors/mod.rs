//! safetensors files: a reader over mapped files, strict about every byte of the header, and a
//! writer.
//!
//! A file is eight bytes of header length (little endian), the header (a JSON object from tensor
//! names to dtype, shape and offsets), and the tensors' bytes. The reader accepts what the reference
//! implementation accepts, and types unknown to it; tensors of types that no kernel computes with
//! are listed, and are an error only when asked for. Alignment does not matter: weights are read as bytes.

mod error;
mod header;
mod index;
mod source;
mod writer;

pub use error::SafetensorsError;
pub use header::{Header, TensorInfo};
pub use index::parse_weight_map;
pub use source::SafetensorsSource;
pub use writer::{SafetensorsWriter, TensorData, TensorSpec, TensorToWrite, write_safetensors};

pub(crate) use index::read_weight_map;

/// The file of unsharded weights.
pub const SINGLE: &str = "model.safetensors";
/// The index of sharded weights.
pub const INDEX: &str = "model.safetensors.index.json";
