//! Why a model cannot be quantized.

use std::path::PathBuf;

use phi3_kernels::BlockType;

use crate::gguf;

/// Why a model cannot be quantized or written. Messages name the tensor, field or file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A model that no GGUF file written here can hold.
    #[error("config.json: {0}")]
    Config(String),
    /// A tokenizer that GGUF has no form for.
    #[error(
        "the tokenizer cannot be stored in a GGUF file: {0}; leave it out (--no-tokenizer) to write \
         the weights alone"
    )]
    Tokenizer(String),
    /// An image tower that shall be quantized, of a model without one.
    #[error(
        "{origin} has no image tower that could be quantized; models of model_type phi3_v have one"
    )]
    NoTower {
        /// The checkpoint.
        origin: String,
    },
    /// A tensor that Phi-3 has no place for.
    #[error(
        "tensor {tensor:?} of {origin} has no place in a phi3 GGUF file, and leaving it out could \
         change the results"
    )]
    UnexpectedTensor {
        /// The tensor.
        tensor: String,
        /// The checkpoint.
        origin: String,
    },
    /// A tensor that the configuration promises.
    #[error("tensor {tensor:?} is missing in {origin}")]
    MissingTensor {
        /// The tensor.
        tensor: String,
        /// The checkpoint.
        origin: String,
    },
    /// A tensor that cannot be read.
    #[error("tensor {tensor:?}: {detail}")]
    Tensor {
        /// The tensor.
        tensor: String,
        /// What is wrong.
        detail: String,
    },
    /// A weight that the type cannot hold.
    #[error(
        "tensor {tensor:?} holds {found} in row {row}, column {column}, which {block_type} cannot \
         hold; the checkpoint is damaged, or needs F32 or BF16"
    )]
    Weight {
        /// The tensor.
        tensor: String,
        /// Row of the weight, from 0.
        row: usize,
        /// Column of the weight, from 0.
        column: usize,
        /// The weight.
        found: f32,
        /// The type it was to be stored as.
        block_type: BlockType,
    },
    /// The file to write is there already.
    #[error("{} exists already: give another name, or --force to replace it", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The file to write is one that is being read.
    #[error("{} is the model that is being read: give another name", path.display())]
    SameFile {
        /// The file.
        path: PathBuf,
    },
    /// The caller did not want to go on.
    #[error("interrupted; nothing was written")]
    Interrupted,
    /// The file cannot be written.
    #[error(transparent)]
    Gguf(#[from] gguf::Error),
}

/// Result with this module's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
