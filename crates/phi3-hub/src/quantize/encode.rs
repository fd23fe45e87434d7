//! One tensor from how it is stored to how it shall be, a few megabytes at a time.

use phi3_kernels::{BlockType, dequantize, quantize};
use phi3_nn::StoredTensor;

use super::error::{Error, Result};

/// Weights that are decoded at a time, rounded up to whole rows: 8 MiB.
const PIECE: usize = 1 << 21;

/// A tensor to encode.
pub(super) struct Job<'a> {
    /// Name, for messages.
    pub name: &'a str,
    pub tensor: &'a StoredTensor,
    pub to: BlockType,
    /// How much each column matters.
    pub importance: Option<&'a [f32]>,
}

impl Job<'_> {
    /// Writes the tensor's bytes to `out`, piece by piece. Parts that are stored as wanted are
    /// copied.
    ///
    /// # Errors
    /// A weight that is not finite or too large for the type, and whatever `out` returns.
    pub fn run<E: From<Error>>(
        &self,
        mut out: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let columns = match self.tensor.shape() {
            [] => 1,
            [length] => *length,
            _ => self.tensor.columns(),
        };
        let one_row = self.tensor.shape().len() < 2;
        let rows_at_once = (PIECE / columns.max(1)).max(1);
        let (mut weights, mut encoded) = (Vec::new(), Vec::new());
        let mut first_row = 0;
        for part in self.tensor.parts() {
            let rows = if one_row { 1 } else { part.rows };
            if rows == 0 || columns == 0 {
                continue;
            }
            let bytes_per_row = part.bytes.len() / rows;
            let stored = part.bytes.chunks(rows_at_once * bytes_per_row.max(1));
            for stored in stored {
                let rows = stored.len() / bytes_per_row.max(1);
                weights.resize(rows * columns, 0.0);
                dequantize(part.block_type, stored, &mut weights).map_err(|e| self.shape(&e))?;
                self.check(&weights, first_row, columns)?;
                if part.block_type == self.to {
                    out(stored)?;
                } else {
                    let row_bytes = self.to.row_bytes(columns).unwrap_or(0);
                    encoded.resize(rows * row_bytes, 0);
                    quantize(self.to, &weights, columns, self.importance, &mut encoded)
                        .map_err(|e| self.shape(&e))?;
                    out(&encoded)?;
                }
                first_row += rows;
            }
        }
        Ok(())
    }

    /// All bytes in memory.
    ///
    /// # Errors
    /// As [`Job::run`].
    pub fn to_vec(&self) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        self.run::<Error>(|bytes| {
            all.extend_from_slice(bytes);
            Ok(())
        })?;
        Ok(all)
    }

    fn check(&self, weights: &[f32], first_row: usize, columns: usize) -> Result<()> {
        let limit = match self.to {
            BlockType::F32 | BlockType::BF16 => f32::MAX,
            // The next number up rounds to infinity.
            BlockType::F16 => 65519.0,
            _ => 65504.0,
        };
        let holds = |w: &f32| w.abs() <= limit;
        match weights.iter().position(|w| !holds(w)) {
            None => Ok(()),
            Some(at) => Err(Error::Weight {
                tensor: self.name.to_owned(),
                row: first_row + at / columns,
                column: at % columns,
                found: weights.get(at).copied().unwrap_or(f32::NAN),
                block_type: self.to,
            }),
        }
    }

    fn shape(&self, error: &phi3_kernels::ShapeError) -> Error {
        Error::Tensor {
            tensor: self.name.to_owned(),
            detail: error.to_string(),
        }
    }
}
