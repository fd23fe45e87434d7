//! The sum of the residual stream and what a block adds to it.

use candle_core::{DType, Tensor};

use crate::error::{Error, Result};
use crate::host;

/// `x + branch`, both of one shape.
///
/// On the CPU candle would add large tensors by threads of its own, which wait for each other, and
/// for work, without sleeping: beside the kernels' threads there is no core for them.
///
/// ```
/// use candle_core::{Device, Tensor};
/// let x = Tensor::new(&[[1f32, 2.]], &Device::Cpu)?;
/// let sum = phi3_nn::residual(&x, &Tensor::new(&[[10f32, 20.]], &Device::Cpu)?)?;
/// assert_eq!(sum.to_vec2::<f32>()?, [[11., 22.]]);
/// # Ok::<(), phi3_nn::Error>(())
/// ```
///
/// # Errors
/// [`Error::Candle`] if the shapes differ.
pub fn residual(x: &Tensor, branch: &Tensor) -> Result<Tensor> {
    let by_candle =
        |it: &Tensor| !it.device().is_cpu() || it.track_op() || it.dtype() != DType::F32;
    if x.dims() != branch.dims() || by_candle(x) || by_candle(branch) {
        return (x + branch).map_err(Error::from);
    }
    let mut sum = vec![0f32; x.elem_count()];
    host::with_f32(x, |x| {
        host::with_f32(branch, |branch| phi3_kernels::add(x, branch, &mut sum))
    })??;
    Ok(Tensor::from_vec(sum, x.shape(), x.device())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn equals_candle_s_sum() {
        let cpu = &Device::Cpu;
        for (rows, cols) in [(0, 3), (1, 5), (40, 2000)] {
            let x = Tensor::randn(0f32, 1.0, (rows, cols), cpu).unwrap();
            let turned = Tensor::randn(0f32, 1.0, (cols, rows), cpu).unwrap();
            for branch in [turned.t().unwrap(), x.affine(2.0, 1.0).unwrap()] {
                let sum = residual(&x, &branch).unwrap();
                let expected = (&x + &branch).unwrap();
                assert_eq!(sum.dims(), [rows, cols]);
                let bits = |it: &Tensor| host::to_vec_f32(it).unwrap();
                assert!(bits(&sum) == bits(&expected), "{rows} rows");
            }
        }
    }

    #[test]
    fn other_tensors_are_left_to_candle() {
        let cpu = &Device::Cpu;
        let half = Tensor::ones((2, 3), DType::BF16, cpu).unwrap();
        assert_eq!(residual(&half, &half).unwrap().dtype(), DType::BF16);
        let ones = Tensor::ones((2, 3), DType::F32, cpu).unwrap();
        assert!(residual(&ones, &ones.narrow(0, 0, 1).unwrap()).is_err());
        let variable = candle_core::Var::from_tensor(&ones).unwrap();
        let sum = residual(&ones, variable.as_tensor()).unwrap();
        let gradients = sum.sum_all().unwrap().backward().unwrap();
        assert!(gradients.get(variable.as_tensor()).is_some());
    }
}
