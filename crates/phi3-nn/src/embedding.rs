//! Token embeddings: rows of a matrix, decoded as they are asked for.

use candle_core::Tensor;
use phi3_kernels::{MatrixRef, gather_rows};

use crate::error::{Error, Result};
use crate::linear::Linear;
use crate::weights::{Backend, StoredTensor, Weights};

/// Rows `[vocab, hidden]`. A tied output head multiplies with the same matrix: [`Embedding::as_linear`].
#[derive(Clone)]
pub struct Embedding {
    weight: Weight,
    vocab_size: usize,
    hidden_size: usize,
    stored: StoredTensor,
    target: Weights,
}

#[derive(Clone, Debug)]
enum Weight {
    /// Read where it lies; only the rows asked for are decoded.
    Stored,
    /// Decoded on a device other than the CPU.
    Dense(Tensor),
}

impl Embedding {
    /// Loads `weight` `[vocab, hidden]` below the prefix of `weights`.
    ///
    /// # Errors
    /// As [`Weights::stored`].
    pub fn load(weights: Weights, vocab_size: usize, hidden_size: usize) -> Result<Self> {
        let stored = weights.stored("weight", &[vocab_size, hidden_size])?;
        let weight = if weights.backend() == Backend::Kernels {
            Weight::Stored
        } else {
            let dense = weights.tensor_f32("weight", &[vocab_size, hidden_size])?;
            Weight::Dense(dense.to_dtype(weights.dtype())?)
        };
        Ok(Self {
            weight,
            vocab_size,
            hidden_size,
            stored,
            target: weights,
        })
    }

    /// The rows of `ids`: `[ids.len(), hidden]`.
    ///
    /// # Errors
    /// [`Error::TokenId`] for an id outside the vocabulary.
    pub fn forward(&self, ids: &[u32]) -> Result<Tensor> {
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            return Err(Error::TokenId {
                id,
                vocab_size: self.vocab_size,
            });
        }
        if let Weight::Dense(rows) = &self.weight {
            return Ok(rows.index_select(&Tensor::new(ids, self.target.device())?, 0)?);
        }
        let mut out = vec![0f32; ids.len() * self.hidden_size];
        // Parts are stacked by rows: each serves the ids that fall into it.
        let mut first = 0;
        for part in self.stored.parts() {
            let bytes_error = |source: phi3_kernels::ShapeError| Error::TensorBytes {
                name: "embed_tokens".to_owned(),
                source: source.into(),
            };
            let matrix = MatrixRef::new(part.block_type, part.rows, self.hidden_size, &part.bytes)
                .map_err(bytes_error)?;
            for (id, row) in ids.iter().zip(out.chunks_exact_mut(self.hidden_size)) {
                if let Some(local) = (*id as usize)
                    .checked_sub(first)
                    .filter(|id| *id < part.rows)
                {
                    gather_rows(matrix, &[local as u32], row).map_err(bytes_error)?;
                }
            }
            first += part.rows;
        }
        Ok(Tensor::from_vec(
            out,
            (ids.len(), self.hidden_size),
            self.target.device(),
        )?)
    }

    /// The output head tied to these embeddings: y = x·Eᵀ.
    ///
    /// # Errors
    /// As [`Linear::from_stored`].
    pub fn as_linear(&self, name: impl Into<String>) -> Result<Linear> {
        match &self.weight {
            Weight::Dense(rows)
                if self
                    .stored
                    .parts()
                    .iter()
                    .all(|p| p.block_type.block_len() == 1) =>
            {
                Linear::from_tensors(name, rows.clone(), None)
            }
            _ => Linear::from_stored(name.into(), self.stored.clone(), None, &self.target),
        }
    }
}
