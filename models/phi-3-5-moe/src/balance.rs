//! The load-balance loss of the report.

use candle_core::Tensor;
use phi3_nn::{Error, Result};

use crate::router::Routing;

/// α·CV(f) + β·CV(P), a scalar: f the share of choices that fell on each expert, P the mean router
/// probability `softmax(scores)` of each expert, CV the coefficient of variation, the standard
/// deviation (of the population) by the mean. 0 where every expert is used alike, √(E - 1) per term
/// where one takes everything.
///
/// `scores` `[n, E]` are the router logits that `routing` was made from. f counts and has no
/// gradient; P passes it on to the scores. Where P is exactly even, its gradient is taken as 0.
///
/// # Errors
/// [`Error::Batch`] if `scores` and `routing` do not belong together or are empty.
pub fn balance_loss(scores: &Tensor, routing: &Routing, alpha: f64, beta: f64) -> Result<Tensor> {
    let (rows, experts) = scores.dims2()?;
    if rows == 0 || rows != routing.rows() || experts != routing.num_experts() {
        return Err(Error::Batch(format!(
            "{rows} rows of {experts} scores do not belong to {} choices of {} experts",
            routing.rows(),
            routing.num_experts()
        )));
    }
    let load: Vec<f32> = routing
        .load()
        .into_iter()
        .map(|count| count as f32)
        .collect();
    let load = Tensor::from_vec(load, experts, scores.device())?.to_dtype(scores.dtype())?;
    let max = scores.detach().max_keepdim(1)?;
    let exp = scores.broadcast_sub(&max)?.exp()?;
    let probabilities = exp.broadcast_div(&exp.sum_keepdim(1)?)?; // [n, E]
    let mean = probabilities.mean(0)?; // [E]
    let (uneven_load, uneven_mean) = (variation(&load)?, variation(&mean)?);
    Ok(((uneven_load * alpha)? + (uneven_mean * beta)?)?)
}

/// Standard deviation by mean of a vector.
fn variation(values: &Tensor) -> Result<Tensor> {
    let mean = values.mean(0)?;
    let variance = values.broadcast_sub(&mean)?.sqr()?.mean(0)?;
    // The root has no slope at 0; an even load is the minimum, where 0 is the right one.
    if variance
        .to_dtype(candle_core::DType::F32)?
        .to_scalar::<f32>()?
        == 0.0
    {
        return Ok(variance);
    }
    Ok((variance.sqrt()? / mean)?)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::router::RouterKind;

    fn loss(scores: &[f32], experts: usize, top_k: usize, alpha: f64, beta: f64) -> Result<f32> {
        let rows = scores.len() / experts;
        let routing = Routing::of(RouterKind::SparseMixer, scores, experts, top_k, 0.01);
        let scores = Tensor::from_vec(scores.to_vec(), (rows, experts), &Device::Cpu)?;
        Ok(balance_loss(&scores, &routing, alpha, beta)?.to_scalar::<f32>()?)
    }

    #[test]
    fn closed_forms() -> Result<()> {
        // Every expert once and every probability alike: no loss.
        let mut even = vec![0f32; 16];
        (0..4).for_each(|i| even[i * 4 + i] = 3.0);
        assert!(loss(&even, 4, 1, 1.0, 1.0)?.abs() < 1e-6);
        // Everything on expert 2 of 5, with certainty: √(E - 1) in both terms.
        let one: Vec<f32> = (0..10)
            .map(|i| if i % 5 == 2 { 100.0 } else { 0.0 })
            .collect();
        assert!((loss(&one, 5, 1, 1.0, 0.0)? - 2.0).abs() < 1e-5);
        assert!((loss(&one, 5, 1, 0.0, 1.0)? - 2.0).abs() < 1e-5);
        assert!((loss(&one, 5, 1, 0.25, 0.5)? - 1.5).abs() < 1e-5);
        // All scores alike: ties go to experts 0 and 1 of 4, so f = (½, ½, 0, 0) and P is even.
        assert!((loss(&[1.0; 12], 4, 2, 3.0, 7.0)? - 3.0).abs() < 1e-5);
        // Two experts with probabilities 3/4 and 1/4: CV(P) = (1/4) / (1/2).
        let scores = [3f32.ln(), 0.0];
        assert!((loss(&scores, 2, 1, 0.0, 1.0)? - 0.5).abs() < 1e-6);
        // They do not belong together.
        let scores = Tensor::zeros((3, 4), DType::F32, &Device::Cpu)?;
        let other = Routing::of(RouterKind::SparseMixer, &[0.0; 8], 4, 2, 0.01);
        assert!(balance_loss(&scores, &other, 1.0, 1.0).is_err());
        Ok(())
    }

    #[test]
    fn gradients_are_those_of_finite_differences() -> Result<()> {
        let (rows, experts) = (7, 5);
        let host: Vec<f64> = (0..rows * experts)
            .map(|i| ((i * i * 37 + i * 11) % 101) as f64 / 40.0 - 1.2)
            .collect();
        let narrow: Vec<f32> = host.iter().map(|v| *v as f32).collect();
        let routing = Routing::of(RouterKind::SparseMixer, &narrow, experts, 2, 0.01);
        let value = |host: &[f64]| -> Result<f64> {
            let scores = Tensor::from_vec(host.to_vec(), (rows, experts), &Device::Cpu)?;
            Ok(balance_loss(&scores, &routing, 0.3, 0.7)?.to_scalar::<f64>()?)
        };
        let scores = Var::from_tensor(&Tensor::from_vec(
            host.clone(),
            (rows, experts),
            &Device::Cpu,
        )?)?;
        let grads = balance_loss(&scores, &routing, 0.3, 0.7)?.backward()?;
        let grad = grads
            .get(&scores)
            .ok_or_else(|| Error::config("no gradient"))?;
        let grad = grad.flatten_all()?.to_vec1::<f64>()?;
        let mut largest = 0f64;
        for (i, found) in grad.iter().enumerate() {
            let at = |delta: f64| {
                let mut moved = host.clone();
                moved[i] += delta;
                value(&moved)
            };
            let numeric = (at(1e-5)? - at(-1e-5)?) / 2e-5;
            assert!((numeric - found).abs() < 1e-8, "{i}: {numeric} {found}");
            largest = largest.max(found.abs());
        }
        assert!(largest > 1e-3, "the gradient vanishes: {largest}");
        Ok(())
    }

    #[test]
    fn an_even_router_has_a_gradient_of_zero() -> Result<()> {
        let scores = Var::from_tensor(&Tensor::zeros((4, 4), DType::F32, &Device::Cpu)?)?;
        let routing = Routing::of(RouterKind::SparseMixer, &[0.0; 16], 4, 2, 0.01);
        let grads = balance_loss(&scores, &routing, 1.0, 1.0)?.backward()?;
        if let Some(grad) = grads.get(&scores) {
            let grad = grad.flatten_all()?.to_vec1::<f32>()?;
            assert!(grad.iter().all(|g| *g == 0.0), "{grad:?}");
        }
        Ok(())
    }
}
