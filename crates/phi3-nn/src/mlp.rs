//! The gated feed-forward block of the family.

use candle_core::Tensor;

use crate::error::Result;
use crate::host;
use crate::linear::Linear;
use crate::packed::Packed;
use crate::weights::Weights;

/// down(up · silu(gate)), with gate and up in one matrix whose rows are `[gate (I) | up (I)]`.
#[derive(Clone, Debug)]
pub struct GatedMlp {
    gate_up_proj: Linear,
    down_proj: Linear,
}

impl GatedMlp {
    /// Loads `gate_up_proj` `[2I, H]` and `down_proj` `[H, I]`.
    ///
    /// # Errors
    /// As [`Weights::stored`].
    pub fn load(weights: Weights, hidden_size: usize, intermediate_size: usize) -> Result<Self> {
        let (hidden, inner) = (hidden_size, intermediate_size);
        Ok(Self {
            gate_up_proj: Linear::load(weights.pp("gate_up_proj"), hidden, 2 * inner, false)?,
            down_proj: Linear::load(weights.pp("down_proj"), inner, hidden, false)?,
        })
    }

    /// x `[n, H]` to `[n, H]`.
    ///
    /// # Errors
    /// Those of the linear layers.
    pub fn forward(&self, x: &Tensor, packed: &mut Packed<'_, '_>) -> Result<Tensor> {
        let inner = packed.linear_silu_mul(&self.gate_up_proj, x)?; // [n, I]
        packed.linear(&self.down_proj, &inner)
    }
}

/// `[n, 2I]` rows `[gate | up]` to up · silu(gate), `[n, I]`.
///
/// # Errors
/// [`crate::Error::Candle`] if the shape does not fit.
pub fn silu_mul(gate_up: &Tensor) -> Result<Tensor> {
    let (rows, width) = gate_up.dims2()?;
    let inner = width / 2;
    if gate_up.device().is_cpu() && !gate_up.track_op() {
        let mut out = vec![0f32; rows * inner];
        host::with_f32(gate_up, |gate_up| {
            phi3_kernels::silu_mul(gate_up, inner, &mut out)
        })?;
        return Ok(Tensor::from_vec(out, (rows, inner), gate_up.device())?);
    }
    let gate = gate_up.narrow(1, 0, inner)?;
    let up = gate_up.narrow(1, inner, inner)?;
    Ok((up * gate.silu()?)?)
}

/// CLIP's activation: x · sigmoid(1.702 x), elementwise.
///
/// ```
/// use candle_core::{Device, Tensor};
/// let x = Tensor::new(&[0f32, 2., -40.], &Device::Cpu)?;
/// let y = phi3_nn::quick_gelu(&x)?.to_vec1::<f32>()?;
/// assert_eq!(y[0], 0.0);
/// assert!((y[1] - 2.0 * 0.967829).abs() < 1e-5 && y[2].abs() < 1e-20);
/// # Ok::<(), phi3_nn::Error>(())
/// ```
///
/// # Errors
/// [`crate::Error::Candle`] if a tensor operation fails.
pub fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    if x.device().is_cpu() && !x.track_op() {
        let mut out = vec![0f32; x.elem_count()];
        host::with_f32(x, |x| phi3_kernels::quick_gelu(x, &mut out))?;
        return Ok(Tensor::from_vec(out, x.shape(), x.device())?);
    }
    // x · sigmoid(1.702 x) is silu(1.702 x) / 1.702.
    Ok(((x * 1.702)?.silu()? / 1.702)?)
}

/// Phi-3-small's gated activation: `[n, 2I]` rows of interleaved pairs (a, b) to
/// a · sigmoid(1.702 a) · (b + 1), `[n, I]`, with a at most `limit` and b within `limit` on both
/// sides; infinite values pass the limit.
///
/// ```
/// use candle_core::{Device, Tensor};
/// let up = Tensor::new(&[[0f32, 3., 30., 30., -1., -30.]], &Device::Cpu)?;
/// let out = phi3_nn::mlp::gegelu(&up, 20.0)?.to_vec2::<f32>()?;
/// assert_eq!(out[0][..2], [0.0, 420.0]);
/// assert!((out[0][2] - 19.0 * 0.15420).abs() < 1e-3);
/// # Ok::<(), phi3_nn::Error>(())
/// ```
///
/// # Errors
/// [`crate::Error::Candle`] if the shape does not fit.
pub fn gegelu(up: &Tensor, limit: f64) -> Result<Tensor> {
    let (rows, width) = up.dims2()?;
    let inner = width / 2;
    if up.device().is_cpu() && !up.track_op() {
        let mut out = vec![0f32; rows * inner];
        host::with_f32(up, |up| phi3_kernels::gegelu(up, limit as f32, &mut out))?;
        return Ok(Tensor::from_vec(out, (rows, inner), up.device())?);
    }
    gegelu_with_candle(up, limit)
}

/// [`gegelu`] in candle operations: any device, differentiable.
fn gegelu_with_candle(up: &Tensor, limit: f64) -> Result<Tensor> {
    let (rows, width) = up.dims2()?;
    let pairs = up.reshape((rows, width / 2, 2))?;
    let (a, b) = (pairs.narrow(2, 0, 1)?, pairs.narrow(2, 1, 1)?);
    let limited = |x: &Tensor, lowest: f64| -> Result<Tensor> {
        let clamped = x.minimum(limit)?.maximum(lowest)?;
        Ok(x.abs()?.eq(f64::INFINITY)?.where_cond(x, &clamped)?)
    };
    let a = limited(&a, f64::from(f32::MIN))?;
    let b = limited(&b, -limit)?;
    // x · sigmoid(1.702 x) is silu(1.702 x) / 1.702.
    let gelu = ((a * 1.702)?.silu()? / 1.702)?;
    Ok((gelu * (b + 1.0)?)?.reshape((rows, width / 2))?)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    #[test]
    fn both_forms_of_gegelu_agree_and_the_tracked_one_has_gradients() -> Result<()> {
        let up = (Tensor::randn(0f32, 15.0, (7, 96), &Device::Cpu)?).slice_assign(
            &[0..1, 0..2],
            &Tensor::new(&[[f32::INFINITY, 0.5]], &Device::Cpu)?,
        )?;
        let fast = gegelu(&up, 20.0)?.flatten_all()?.to_vec1::<f32>()?;
        let tracked = Var::from_tensor(&up)?;
        let slow = gegelu(&tracked, 20.0)?;
        let values = slow.flatten_all()?.to_vec1::<f32>()?;
        assert_eq!((fast[0], values[0]), (f32::INFINITY, f32::INFINITY));
        for (fast, slow) in fast.iter().zip(&values).skip(1) {
            assert!(
                (fast - slow).abs() <= 1e-5 * slow.abs().max(1.0),
                "{fast} {slow}"
            );
        }
        let limited = fast.iter().skip(1).all(|x| x.abs() <= 420.0);
        assert!(limited, "the limit holds");
        let grads = slow.narrow(0, 1, 6)?.sum_all()?.backward()?;
        assert!(grads.get(&tracked).is_some());
        Ok(())
    }
}
