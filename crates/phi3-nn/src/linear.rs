//! y = x·Wᵀ + b for every way in which W can be stored.
//!
//! On the CPU a weight stays as it lies in its file (f32, f16, bf16 or ggml blocks) and is read by
//! `phi3-kernels`; ggml blocks of wide rows multiply activations rounded to eight bits
//! ([`phi3_kernels::MIN_INT8_COLS`]). On other devices floats become a dense tensor of the model's
//! dtype, ggml blocks a candle `QMatMul`. A weight in several parts, as a GGUF file may store a fused
//! projection, is as many matrices whose outputs lie side by side; they share the rounded
//! activations.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use phi3_nn::Linear;
//! let weight = Tensor::new(&[[1f32, 2.], [3., 4.], [5., 6.]], &Device::Cpu)?; // [out 3, in 2]
//! let linear = Linear::from_tensors("demo", weight, None)?;
//! let y = linear.forward(&Tensor::new(&[[10f32, 1.]], &Device::Cpu)?)?;
//! assert_eq!(y.to_vec2::<f32>()?, [[12., 34., 56.]]);
//! # Ok::<(), phi3_nn::Error>(())
//! ```

use std::borrow::Cow;
use std::cell::RefCell;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{DType, Device, Module, Tensor};
use phi3_kernels::{Activations, BlockType, Finish, MatrixRef};

use crate::error::{Error, Result};
use crate::host;
use crate::mlp::{quick_gelu, silu_mul};
use crate::weights::{Backend, StoredTensor, TensorPart, Weights};

/// A linear layer.
#[derive(Clone, Debug)]
pub struct Linear {
    name: String,
    in_features: usize,
    out_features: usize,
    weight: Weight,
    bias: Option<Tensor>,
}

#[derive(Clone, Debug)]
enum Weight {
    /// Blocks as stored, read by `phi3-kernels`.
    Stored(StoredTensor),
    /// One matrix `[rows, in]` or more, their outputs side by side.
    Device(Vec<DeviceMatrix>),
}

#[derive(Clone, Debug)]
enum DeviceMatrix {
    Dense(Tensor),
    Quantized(QMatMul),
}

impl Linear {
    /// Loads `weight` `[out, in]`, and `bias` `[out]` if `bias` is set, below the prefix of `weights`.
    ///
    /// # Errors
    /// As [`Weights::stored`].
    pub fn load(
        weights: Weights,
        in_features: usize,
        out_features: usize,
        bias: bool,
    ) -> Result<Self> {
        let stored = weights.stored("weight", &[out_features, in_features])?;
        let bias = match bias {
            true => Some(
                weights
                    .tensor_f32("bias", &[out_features])?
                    .to_dtype(weights.dtype())?,
            ),
            false => None,
        };
        let name = weights.full_name("").trim_end_matches('.').to_owned();
        Self::from_stored(name, stored, bias, &weights)
    }

    /// A layer over a stored weight `[out, in]`, for the device and backend of `target`.
    ///
    /// # Errors
    /// [`Error::TensorBytes`] if it does not decode, [`Error::Candle`] if the device refuses it.
    pub fn from_stored(
        name: String,
        stored: StoredTensor,
        bias: Option<Tensor>,
        target: &Weights,
    ) -> Result<Self> {
        let (in_features, out_features) = (
            stored.columns(),
            stored.elements() / stored.columns().max(1),
        );
        let weight = if target.backend() == Backend::Kernels {
            host::keep_freed_memory();
            Weight::Stored(stored)
        } else {
            let matrices = stored
                .parts()
                .iter()
                .map(|part| DeviceMatrix::new(&name, part, in_features, target));
            Weight::Device(matrices.collect::<Result<_>>()?)
        };
        Ok(Self {
            name,
            in_features,
            out_features,
            weight,
            bias,
        })
    }

    /// A layer over a dense tensor `[out, in]` on any device; gradients flow into it.
    ///
    /// # Errors
    /// [`Error::Candle`] if `weight` is not a matrix.
    pub fn from_tensors(
        name: impl Into<String>,
        weight: Tensor,
        bias: Option<Tensor>,
    ) -> Result<Self> {
        let (out_features, in_features) = weight.dims2()?;
        Ok(Self {
            name: name.into(),
            in_features,
            out_features,
            weight: Weight::Device(vec![DeviceMatrix::Dense(weight)]),
            bias,
        })
    }

    /// The layer's name in the checkpoint, without `.weight`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The weight, where the kernels read it and there is no bias.
    pub(crate) fn stored(&self) -> Option<&StoredTensor> {
        match (&self.weight, &self.bias) {
            (Weight::Stored(stored), None) => Some(stored),
            _ => None,
        }
    }

    /// Length of an input row.
    pub(crate) fn in_features(&self) -> usize {
        self.in_features
    }

    /// Length of an output row.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// x `[n, in]` to `[n, out]`.
    ///
    /// # Errors
    /// [`Error::Candle`] if the shapes do not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_and(x, After::Nothing)
    }

    /// [`quick_gelu`] of [`Linear::forward`], without a copy between them.
    ///
    /// # Errors
    /// As [`Linear::forward`].
    pub fn forward_quick_gelu(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_and(x, After::QuickGelu)
    }

    /// `residual` `[n, out]` plus [`Linear::forward`], without a copy between them.
    ///
    /// # Errors
    /// As [`Linear::forward`]; [`Error::Batch`] if the residual has another shape.
    pub fn forward_plus(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        let (rows, shape) = (x.dims2()?.0, residual.dims());
        if shape != [rows, self.out_features] {
            return Err(Error::Batch(format!(
                "layer `{}` gives {rows} rows of {}, to be added to {shape:?}",
                self.name, self.out_features
            )));
        }
        self.forward_and(x, After::Plus(residual))
    }

    /// [`silu_mul`] of [`Linear::forward`], without memory of its own for the widest rows of a model:
    /// that of a long prompt would be asked of the system, and cleared by it, for every layer.
    ///
    /// # Errors
    /// As [`Linear::forward`].
    pub fn forward_silu_mul(&self, x: &Tensor) -> Result<Tensor> {
        let (Weight::Stored(stored), None, false) = (&self.weight, &self.bias, x.track_op()) else {
            return silu_mul(&self.forward(x)?);
        };
        let (rows, inner) = (self.rows(x)?, self.out_features / 2);
        let mut out = vec![0f32; rows * inner];
        SCRATCH.with_borrow_mut(|scratch| {
            let wanted = rows * self.out_features;
            if scratch.len() < wanted {
                scratch.resize(wanted, 0.0);
            }
            let y = &mut scratch[..wanted];
            host::with_f32(x, |x| stored_matmul(&self.name, x, rows, stored, y))??;
            phi3_kernels::silu_mul(y, inner, &mut out);
            if wanted > SCRATCH_KEPT {
                *scratch = Vec::new();
            }
            Ok::<(), Error>(())
        })?;
        Ok(Tensor::from_vec(out, (rows, inner), x.device())?)
    }

    /// Rows of `x`, which must be `[n, in]`.
    fn rows(&self, x: &Tensor) -> Result<usize> {
        let (rows, columns) = x.dims2()?;
        if columns != self.in_features {
            return Err(Error::Batch(format!(
                "layer `{}` takes rows of {}, not of {columns}",
                self.name, self.in_features
            )));
        }
        Ok(rows)
    }

    fn forward_and(&self, x: &Tensor, after: After<'_>) -> Result<Tensor> {
        let rows = self.rows(x)?;
        let y = match &self.weight {
            Weight::Stored(stored) => {
                let mut y = vec![0f32; rows * self.out_features];
                host::with_f32(x, |x| stored_matmul(&self.name, x, rows, stored, &mut y))??;
                match &self.bias {
                    Some(bias) => host::with_f32(bias, |bias| {
                        after.finish(&mut y, self.out_features, Some(bias))
                    })?,
                    None => after.finish(&mut y, self.out_features, None),
                }?;
                return Ok(Tensor::from_vec(y, (rows, self.out_features), x.device())?);
            }
            Weight::Device(matrices) => {
                let parts = matrices.iter().map(|matrix| matrix.forward(x));
                match parts.collect::<Result<Vec<_>>>()?.as_slice() {
                    [one] => one.clone(),
                    several => Tensor::cat(several, 1)?,
                }
            }
        };
        let y = match &self.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        };
        match after {
            After::Nothing => Ok(y),
            After::QuickGelu => quick_gelu(&y),
            After::Plus(residual) => Ok((residual + y)?),
        }
    }
}

/// What follows the bias.
#[derive(Clone, Copy)]
enum After<'a> {
    Nothing,
    QuickGelu,
    Plus(&'a Tensor),
}

impl After<'_> {
    /// The bias, if there is one, and what follows it, on rows of `width`.
    fn finish(self, y: &mut [f32], width: usize, bias: Option<&[f32]>) -> Result<()> {
        let mut finish = |how: Finish<'_>| phi3_kernels::finish_rows(y, width, bias, how);
        match self {
            Self::Nothing => finish(Finish::Nothing),
            Self::QuickGelu => finish(Finish::QuickGelu),
            Self::Plus(terms) => return host::with_f32(terms, |x| finish(Finish::Add(x))),
        }
        Ok(())
    }
}

/// Elements of [`SCRATCH`] that a thread keeps: 80 MiB, enough for 512 tokens of any model of the family.
const SCRATCH_KEPT: usize = 20 << 20;

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Writes all of `y`, `[rows, out]`.
fn stored_matmul(
    name: &str,
    x: &[f32],
    rows: usize,
    stored: &StoredTensor,
    y: &mut [f32],
) -> Result<()> {
    let columns = stored.columns();
    let out_stride = stored.elements() / columns.max(1);
    let x = Activations::new(x, rows, columns);
    let mut offset = 0;
    for part in stored.parts() {
        let matrix = matrix(name, part, columns)?;
        phi3_kernels::linear(&x, matrix, y, out_stride, offset);
        offset += part.rows;
    }
    Ok(())
}

/// A part of the weight of layer `name`, as the kernels take it.
pub(crate) fn matrix<'a>(
    name: &str,
    part: &'a TensorPart,
    columns: usize,
) -> Result<MatrixRef<'a>> {
    MatrixRef::new(part.block_type, part.rows, columns, &part.bytes).map_err(|source| {
        Error::TensorBytes {
            name: name.to_owned(),
            source: source.into(),
        }
    })
}

impl DeviceMatrix {
    fn new(name: &str, part: &TensorPart, columns: usize, target: &Weights) -> Result<Self> {
        let device = target.device();
        if let Some(ggml) = candle_block_type(part.block_type) {
            let storage = QStorage::from_data(Cow::Borrowed(&*part.bytes), device, ggml)?;
            let tensor = QTensor::new(storage, (part.rows, columns))?;
            return Ok(Self::Quantized(QMatMul::from_arc(Arc::new(tensor))?));
        }
        let stored = StoredTensor::stacked(vec![part.rows, columns], vec![part.clone()])
            .and_then(|stored| stored.to_f32())
            .map_err(|source| Error::TensorBytes {
                name: name.to_owned(),
                source,
            })?;
        let dense = Tensor::from_vec(stored, (part.rows, columns), &Device::Cpu)?;
        Ok(Self::Dense(
            dense.to_dtype(target.dtype())?.to_device(device)?,
        ))
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(weight) => Ok(x.matmul(&weight.t()?)?),
            // candle's quantised products take and give f32.
            Self::Quantized(weight) => Ok(weight
                .forward(&x.to_dtype(DType::F32)?)?
                .to_dtype(x.dtype())?),
        }
    }
}

/// The block types that candle multiplies on a GPU as they are; the rest is decoded.
fn candle_block_type(block_type: BlockType) -> Option<GgmlDType> {
    Some(match block_type {
        BlockType::Q4_0 => GgmlDType::Q4_0,
        BlockType::Q4_1 => GgmlDType::Q4_1,
        BlockType::Q5_0 => GgmlDType::Q5_0,
        BlockType::Q5_1 => GgmlDType::Q5_1,
        BlockType::Q8_0 => GgmlDType::Q8_0,
        BlockType::Q2K => GgmlDType::Q2K,
        BlockType::Q3K => GgmlDType::Q3K,
        BlockType::Q4K => GgmlDType::Q4K,
        BlockType::Q5K => GgmlDType::Q5K,
        BlockType::Q6K => GgmlDType::Q6K,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::MemorySource;

    fn f32_bytes(values: &[f32]) -> crate::Bytes {
        values
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect::<Vec<_>>()
            .into()
    }

    /// A weight in two parts of different types gives what the whole gives, in either backend.
    #[test]
    fn parts_lie_side_by_side() -> Result<()> {
        let top: Vec<f32> = (0..8).map(|v| v as f32 / 4.0).collect(); // [2, 4]
        let bottom = [1f32, -2.0, 0.5, 4.0]; // [1, 4]
        let halves: Vec<u8> = bottom
            .iter()
            .flat_map(|v| half::f16::from_f32(*v).to_le_bytes())
            .collect();
        let part = |block_type, rows, bytes| TensorPart {
            block_type,
            rows,
            bytes,
        };
        let stacked = StoredTensor::stacked(
            vec![3, 4],
            vec![
                part(BlockType::F32, 2, f32_bytes(&top)),
                part(BlockType::F16, 1, halves.into()),
            ],
        );
        let mut source = MemorySource::new();
        source.insert("a.weight", stacked.map_err(Error::config)?);
        let bias = StoredTensor::new(vec![3], BlockType::F32, f32_bytes(&[1.0, 2.0, 3.0]));
        source.insert("a.bias", bias.map_err(Error::config)?);
        let weights = Weights::new(Arc::new(source), Device::Cpu, DType::F32);

        let whole: Vec<f32> = top.iter().chain(&bottom).copied().collect();
        let whole = Tensor::from_vec(whole, (3, 4), &Device::Cpu)?;
        let x = Tensor::randn(0f32, 1.0, (5, 4), &Device::Cpu)?;
        let bias = Tensor::new(&[1f32, 2.0, 3.0], &Device::Cpu)?;
        let expected = Linear::from_tensors("whole", whole, Some(bias))?.forward(&x)?;
        for weights in [weights.clone(), weights.with_candle_operations()] {
            let found = Linear::load(weights.pp("a"), 4, 3, true)?.forward(&x)?;
            let difference = (found - &expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(difference < 1e-6, "{:?}: {difference}", weights.backend());
            let wrong = Linear::load(weights.pp("a"), 5, 3, true)
                .err()
                .map(|e| e.to_string());
            assert!(wrong.is_some_and(|e| e.contains("a.weight") && e.contains("[3, 5]")));
        }
        Ok(())
    }

    #[test]
    fn what_follows_a_layer_is_the_same_in_one_pass() -> Result<()> {
        let mut source = MemorySource::new();
        let values: Vec<f32> = (0..12).map(|v| v as f32 / 8.0 - 0.7).collect(); // [3, 4]
        for (name, shape, values) in [
            ("weight", vec![3, 4], &values[..]),
            ("bias", vec![3], &[1.0, -2.0, 3.0]),
        ] {
            let stored = StoredTensor::new(shape, BlockType::F32, f32_bytes(values));
            source.insert(format!("a.{name}"), stored.map_err(Error::config)?);
        }
        let weights = Weights::new(Arc::new(source), Device::Cpu, DType::F32);
        let x = Tensor::randn(0f32, 1.0, (5, 4), &Device::Cpu)?;
        let residual = Tensor::randn(0f32, 1.0, (5, 3), &Device::Cpu)?;
        for weights in [weights.clone(), weights.with_candle_operations()] {
            for bias in [true, false] {
                let layer = Linear::load(weights.pp("a"), 4, 3, bias)?;
                let y = layer.forward(&x)?;
                let equal = |a: Tensor, b: Tensor| -> Result<bool> {
                    Ok(a.to_vec2::<f32>()? == b.to_vec2::<f32>()?)
                };
                assert!(equal(layer.forward_quick_gelu(&x)?, quick_gelu(&y)?)?);
                assert!(equal(layer.forward_plus(&x, &residual)?, (&residual + y)?)?);
                assert!(layer.forward_plus(&x, &x).is_err());
            }
        }
        Ok(())
    }
}
