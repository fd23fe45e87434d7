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
        let gate_up = packed.linear(&self.gate_up_proj, x)?; // [n, 2I]
        let inner = silu_mul(&gate_up)?; // [n, I]
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
