//! What can go wrong between stored weights and logits.

use std::fmt;

use crate::weights::LayoutError;

/// Errors of this crate; each names the noun that failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor the model needs is not in the checkpoint.
    #[error(
        "tensor `{name}` is missing from {origin}; the checkpoint is incomplete or of another model type"
    )]
    MissingTensor {
        /// Full tensor name.
        name: String,
        /// Where the tensors come from (a folder or a file).
        origin: String,
    },
    /// A tensor has another shape than the configuration asks for.
    #[error(
        "tensor `{name}` in {origin} has shape {found:?}, but the configuration asks for {expected:?}"
    )]
    TensorShape {
        /// Full tensor name.
        name: String,
        /// Where the tensor was found.
        origin: String,
        /// Shape that the configuration asks for.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },
    /// The bytes of a tensor do not fit its shape.
    #[error("tensor `{name}` does not fit its shape")]
    TensorBytes {
        /// Full tensor name.
        name: String,
        /// What does not fit.
        source: LayoutError,
    },
    /// The source of the tensors failed.
    #[error("cannot read tensor `{name}`")]
    Source {
        /// Full tensor name.
        name: String,
        /// The error of the source.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A configuration value that no model can be built from.
    #[error("config: {0}")]
    Config(String),
    /// The caller's batch is not well-formed.
    #[error("batch: {0}")]
    Batch(String),
    /// Every sequence of the batch was interrupted ([`crate::Span::interrupted_by`]).
    #[error("interrupted")]
    Interrupted,
    /// A token id outside the vocabulary.
    #[error("token id {id} is outside the vocabulary of {vocab_size}")]
    TokenId {
        /// The offending id.
        id: u32,
        /// Rows of the embedding.
        vocab_size: usize,
    },
    /// The requested device cannot be used.
    #[error("device `{device}`: {reason}")]
    Device {
        /// The device as the caller wrote it.
        device: String,
        /// Why not, and what to do.
        reason: String,
    },
    /// A candle operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    /// A configuration error from anything printable.
    pub fn config(message: impl fmt::Display) -> Self {
        Self::Config(message.to_string())
    }
}

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
