//! The tensors of a GGUF file by their Hugging Face names, straight from its bytes.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use phi3_kernels::BlockType;
use phi3_nn::{Bytes, StoredTensor, TensorPart, TensorSource};

use super::container::{Container, TensorInfo};
use super::error::{Error, Result};
use super::names::{Recipe, RecipePart};

/// A GGUF file's tensors under Hugging Face names. Only the q and k rows of architecture `llama`
/// are copied, because their order differs; everything else shares the file's bytes.
pub(super) struct GgufSource {
    pub container: Arc<Container>,
    pub recipes: BTreeMap<String, Recipe>,
    pub head_dim: usize,
    pub origin: String,
}

impl TensorSource for GgufSource {
    fn tensor(
        &self,
        name: &str,
    ) -> std::result::Result<Option<StoredTensor>, Box<dyn std::error::Error + Send + Sync>> {
        match self.recipes.get(name) {
            Some(recipe) => match self.assemble(name, recipe) {
                Ok(tensor) => Ok(Some(tensor)),
                Err(source) => Err(Box::new(crate::Error::Gguf {
                    path: PathBuf::from(&self.origin),
                    source: source.into(),
                })),
            },
            None => Ok(None),
        }
    }

    fn names(&self) -> Vec<String> {
        self.recipes.keys().cloned().collect()
    }

    fn origin(&self) -> String {
        self.origin.clone()
    }
}

impl GgufSource {
    fn assemble(&self, name: &str, recipe: &Recipe) -> Result<StoredTensor> {
        let parts = recipe
            .parts
            .iter()
            .map(|part| self.part(part))
            .collect::<Result<Vec<_>>>()?;
        StoredTensor::stacked(recipe.shape.clone(), parts).map_err(|error| Error::TensorBytes {
            tensor: name.to_owned(),
            message: error.to_string(),
        })
    }

    fn part(&self, part: &RecipePart) -> Result<TensorPart> {
        let Some(tensor) = self.container.tensor(&part.tensor) else {
            return Err(Error::TensorBytes {
                tensor: part.tensor.clone(),
                message: "it is not in the file".to_owned(),
            });
        };
        let (block_type, bytes) = stored(&self.container, tensor)?;
        if let Some(expert) = part.expert {
            return self.expert(tensor, block_type, bytes, expert);
        }
        let rows = tensor.shape.first().copied().unwrap_or(1);
        let bytes = if part.interleaved_heads > 0 && rows > 0 {
            let row_bytes = bytes.len() / rows;
            separate_pairs(&bytes, row_bytes, part.interleaved_heads, self.head_dim).into()
        } else {
            bytes
        };
        Ok(TensorPart {
            block_type,
            rows,
            bytes,
        })
    }
}

impl GgufSource {
    /// One matrix of a stack, where it lies.
    fn expert(
        &self,
        tensor: &TensorInfo,
        block_type: BlockType,
        bytes: Bytes,
        expert: usize,
    ) -> Result<TensorPart> {
        StoredTensor::new(tensor.shape.clone(), block_type, bytes)
            .and_then(|stack| stack.at(expert))
            .map_err(|error| error.to_string())
            .and_then(|one| one.parts().first().cloned().ok_or("it is empty".to_owned()))
            .map_err(|message| Error::TensorBytes {
                tensor: tensor.name.clone(),
                message,
            })
    }
}

/// A tensor's block type and bytes, if the type can be decoded.
pub(super) fn stored(container: &Container, tensor: &TensorInfo) -> Result<(BlockType, Bytes)> {
    let block_type = tensor
        .tensor_type
        .block_type()
        .ok_or_else(|| tensor.unsupported())?;
    if block_type == BlockType::Int4 {
        super::int4::check(container)?;
    }
    Ok((block_type, container.data(tensor)?))
}

/// All weights of a small tensor as f32, for the rope factors.
pub(super) fn values(container: &Container, tensor: &TensorInfo) -> Result<Vec<f32>> {
    let (block_type, bytes) = stored(container, tensor)?;
    StoredTensor::new(tensor.shape.clone(), block_type, bytes)
        .and_then(|stored| stored.to_f32())
        .map_err(|error| Error::TensorBytes {
            tensor: tensor.name.clone(),
            message: error.to_string(),
        })
}

/// Puts the rows of the first `heads` heads, stored as `0, d/2, 1, d/2 + 1, …`, back into the
/// order `0, 1, 2, …`; rows after those heads stay. A row is whole blocks, so that nothing is
/// decoded.
fn separate_pairs(bytes: &[u8], row_bytes: usize, heads: usize, head_dim: usize) -> Vec<u8> {
    let head_bytes = head_dim * row_bytes;
    let (moved, kept) = bytes.split_at((heads * head_bytes).min(bytes.len()));
    let mut out = Vec::with_capacity(bytes.len());
    if head_bytes > 0 {
        for head in moved.chunks(head_bytes) {
            let rows = || head.chunks(row_bytes);
            rows().step_by(2).for_each(|row| out.extend_from_slice(row));
            rows()
                .skip(1)
                .step_by(2)
                .for_each(|row| out.extend_from_slice(row));
        }
    }
    out.extend_from_slice(kept);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_separated_within_each_head() {
        // Two heads of four rows, then two rows that stay; a row is two bytes.
        let stored = [0, 2, 1, 3, 4, 6, 5, 7, 8, 9].map(|row: u8| [row, row | 0x80]);
        let restored = separate_pairs(stored.as_flattened(), 2, 2, 4);
        let expected: Vec<u8> = (0..10).flat_map(|row| [row, row | 0x80]).collect();
        assert_eq!(restored, expected);
    }
}
