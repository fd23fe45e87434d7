//! Normalization of rows: by their root mean square, or by mean and deviation.

use candle_core::{DType, Tensor};

use crate::error::{Error, Result};
use crate::host;
use crate::weights::Weights;

/// x · 1/√(mean(x²) + eps) in f32, rounded to the dtype of x, then times the weight.
///
/// ```
/// use candle_core::{Device, Tensor};
/// let norm = phi3_nn::RmsNorm::from_weight(Tensor::new(&[1f32, 2.], &Device::Cpu)?, 0.0);
/// let y = norm.forward(&Tensor::new(&[[3f32, 3.]], &Device::Cpu)?)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[1., 2.]]);
/// # Ok::<(), phi3_nn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct RmsNorm {
    weight: Tensor, // [hidden]
    eps: f64,
}

impl RmsNorm {
    /// Loads `weight` `[size]` below the prefix of `weights`.
    ///
    /// # Errors
    /// As [`Weights::stored`].
    pub fn load(weights: Weights, size: usize, eps: f64) -> Result<Self> {
        let weight = weights
            .tensor_f32("weight", &[size])?
            .to_dtype(weights.dtype())?;
        Ok(Self::from_weight(weight, eps))
    }

    /// A norm with the given weight `[size]`.
    pub fn from_weight(weight: Tensor, eps: f64) -> Self {
        Self { weight, eps }
    }

    /// x `[n, size]` to `[n, size]`.
    ///
    /// # Errors
    /// [`Error::Candle`] if the shapes do not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if x.device().is_cpu() && !x.track_op() && !self.weight.track_op() {
            let (rows, size) = x.dims2()?;
            if self.weight.dims() != [size] {
                return Err(Error::Batch(format!(
                    "a norm of {:?} was given rows of {size}",
                    self.weight.dims()
                )));
            }
            let mut out = vec![0f32; rows * size];
            host::with_f32(x, |x| {
                host::with_f32(&self.weight, |weight| {
                    phi3_kernels::rms_norm(x, weight, self.eps as f32, &mut out);
                })
            })??;
            return Ok(Tensor::from_vec(out, (rows, size), x.device())?);
        }
        self.forward_with_candle(x)
    }

    /// [`RmsNorm::forward`] in candle operations: any device, differentiable.
    fn forward_with_candle(&self, x: &Tensor) -> Result<Tensor> {
        let wide = x.to_dtype(DType::F32)?;
        let mean_square = wide.sqr()?.mean_keepdim(1)?;
        let scaled = wide.broadcast_div(&(mean_square + self.eps)?.sqrt()?)?;
        Ok(scaled.to_dtype(x.dtype())?.broadcast_mul(&self.weight)?)
    }
}

/// (x - mean) · 1/√(variance + eps) in f32, rounded to the dtype of x, times the weight, plus the
/// bias. The variance is the population's.
///
/// ```
/// use candle_core::{Device, Tensor};
/// let parameter = |values: [f32; 2]| Tensor::new(&values, &Device::Cpu);
/// let norm = phi3_nn::LayerNorm::from_tensors(parameter([1., 2.])?, parameter([0., 5.])?, 0.0);
/// let y = norm.forward(&Tensor::new(&[[3f32, 7.]], &Device::Cpu)?)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[-1., 7.]]);
/// # Ok::<(), phi3_nn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct LayerNorm {
    weight: Tensor, // [hidden]
    bias: Tensor,   // [hidden]
    eps: f64,
}

impl LayerNorm {
    /// Loads `weight` and `bias` `[size]` below the prefix of `weights`.
    ///
    /// # Errors
    /// As [`Weights::stored`].
    pub fn load(weights: Weights, size: usize, eps: f64) -> Result<Self> {
        let load = |name| -> Result<Tensor> {
            Ok(weights
                .tensor_f32(name, &[size])?
                .to_dtype(weights.dtype())?)
        };
        Ok(Self::from_tensors(load("weight")?, load("bias")?, eps))
    }

    /// A norm with the given weight and bias `[size]`.
    pub fn from_tensors(weight: Tensor, bias: Tensor, eps: f64) -> Self {
        Self { weight, bias, eps }
    }

    /// x `[n, size]` to `[n, size]`.
    ///
    /// # Errors
    /// [`Error::Batch`] or [`Error::Candle`] if the shapes do not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let parameters = [&self.weight, &self.bias];
        if !x.device().is_cpu() || [x].iter().chain(&parameters).any(|t| t.track_op()) {
            return self.forward_with_candle(x);
        }
        let (rows, size) = x.dims2()?;
        if parameters
            .iter()
            .any(|parameter| parameter.dims() != [size])
        {
            return Err(Error::Batch(format!(
                "a norm of {:?} was given rows of {size}",
                self.weight.dims()
            )));
        }
        let mut out = vec![0f32; rows * size];
        host::with_f32(x, |x| {
            host::with_f32(&self.weight, |weight| {
                host::with_f32(&self.bias, |bias| {
                    phi3_kernels::layer_norm(x, weight, bias, self.eps as f32, &mut out);
                })
            })
        })???;
        Ok(Tensor::from_vec(out, (rows, size), x.device())?)
    }

    /// [`LayerNorm::forward`] in candle operations: any device, differentiable.
    fn forward_with_candle(&self, x: &Tensor) -> Result<Tensor> {
        let wide = x.to_dtype(DType::F32)?;
        let centered = wide.broadcast_sub(&wide.mean_keepdim(1)?)?;
        let variance = centered.sqr()?.mean_keepdim(1)?;
        let scaled = centered.broadcast_div(&(variance + self.eps)?.sqrt()?)?;
        Ok(scaled
            .to_dtype(x.dtype())?
            .broadcast_mul(&self.weight)?
            .broadcast_add(&self.bias)?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    #[test]
    fn both_forms_agree_and_the_tracked_one_has_gradients() -> Result<()> {
        let x = Tensor::randn(0f32, 2.0, (5, 48), &Device::Cpu)?;
        let weight = Tensor::randn(1f32, 0.3, 48, &Device::Cpu)?;
        let norm = RmsNorm::from_weight(weight, 1e-5);
        let fast = norm.forward(&x)?;
        let tracked = Var::from_tensor(&x)?;
        let slow = norm.forward(&tracked)?;
        let difference = (fast - &slow)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(difference < 1e-5, "{difference}");
        let grads = slow.sum_all()?.backward()?;
        assert!(grads.get(&tracked).is_some());
        Ok(())
    }

    #[test]
    fn both_forms_of_layer_norm_agree_also_far_from_zero() -> Result<()> {
        let x = (Tensor::randn(0f32, 2.0, (5, 51), &Device::Cpu)? + 100.0)?;
        let parameter = |mean| Tensor::randn(mean, 0.3, 51, &Device::Cpu);
        let norm = LayerNorm::from_tensors(parameter(1f32)?, parameter(0f32)?, 1e-5);
        let fast = norm.forward(&x)?;
        let tracked = Var::from_tensor(&x)?;
        let slow = norm.forward(&tracked)?;
        let difference = (fast - &slow)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(difference < 3e-5, "{difference}");
        assert!(slow.sum_all()?.backward()?.get(&tracked).is_some());
        Ok(())
    }
}
