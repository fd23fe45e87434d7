//! The work of a mixture of experts: gated blocks, each over the rows that chose it, and the weighted
//! sum of what they give.

use candle_core::Tensor;
use phi3_kernels::{Activations, MatrixRef, Product};

use crate::error::{Error, Result};
use crate::host;
use crate::linear::{Linear, matrix};
use crate::mlp::silu_mul;

/// An expert, and the rows of a batch that it computes.
#[derive(Clone, Copy, Debug)]
pub struct ExpertRows<'a> {
    /// Gate over up, `[2I, H]`.
    pub gate_up: &'a Linear,
    /// `[H, I]`.
    pub down: &'a Linear,
    /// Which rows of the batch.
    pub rows: &'a [u32],
}

/// Rows whose gate and up are in memory at once, where the kernels compute: some thousand of them would
/// be hundreds of megabytes, and a few are already work for all threads.
const WAVE_ROWS: usize = 256;

/// down(up · silu(gate)) of every expert over its rows of x `[n, H]`: one expert's rows after the other's,
/// `[sum of rows, H]`. On the CPU the experts share the eight-bit form of x, and their products run in
/// one go.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use phi3_nn::mixture::{ExpertRows, experts};
/// use phi3_nn::Linear;
///
/// let (gate_up, down) = (Tensor::new(&[[0f32], [1.]], &Device::Cpu)?, Tensor::new(&[[2f32]], &Device::Cpu)?);
/// let gate_up = Linear::from_tensors("gate_up", gate_up, None)?;
/// let down = Linear::from_tensors("down", down, None)?;
/// let x = Tensor::new(&[[1f32], [5.]], &Device::Cpu)?;
/// let rows = &[1];
/// // silu(0) is 0.
/// let y = experts(&x, &[ExpertRows { gate_up: &gate_up, down: &down, rows }])?;
/// assert_eq!(y.to_vec2::<f32>()?, [[0.0]]);
/// # Ok::<(), phi3_nn::Error>(())
/// ```
///
/// # Errors
/// [`Error::Batch`] if there is no expert or one has no such row, and those of the linear layers.
pub fn experts(x: &Tensor, experts: &[ExpertRows<'_>]) -> Result<Tensor> {
    let (n, hidden) = x.dims2()?;
    let in_batch = |expert: &ExpertRows<'_>| expert.rows.iter().all(|&row| (row as usize) < n);
    if experts.is_empty() || !experts.iter().all(in_batch) {
        return Err(Error::Batch(format!(
            "{} experts with rows of a batch of {n}",
            experts.len()
        )));
    }
    if let Some(plans) = plans(x, experts)? {
        let y = host::with_f32(x, |x| {
            let x = Activations::new(x, n, hidden);
            with_kernels(&x, &plans)
        })?;
        let rows = y.len() / hidden.max(1);
        return Ok(Tensor::from_vec(y, (rows, hidden), x.device())?);
    }
    let outputs = experts.iter().map(|expert| {
        let input = match is_all(expert.rows, n) {
            true => x.clone(),
            false => x.index_select(&Tensor::new(expert.rows, x.device())?, 0)?,
        };
        expert
            .down
            .forward(&silu_mul(&expert.gate_up.forward(&input)?)?)
    });
    Ok(Tensor::cat(&outputs.collect::<Result<Vec<_>>>()?, 0)?)
}

/// [`ExpertRows`] as the kernels take it.
struct Plan<'a> {
    gate_up: Vec<MatrixRef<'a>>,
    down: Vec<MatrixRef<'a>>,
    rows: &'a [u32],
}

/// `None` unless the kernels read all of these weights and nobody asks for gradients.
fn plans<'a>(x: &Tensor, experts: &[ExpertRows<'a>]) -> Result<Option<Vec<Plan<'a>>>> {
    if !x.device().is_cpu() || x.track_op() {
        return Ok(None);
    }
    let hidden = x.dim(1)?;
    let mut plans = Vec::with_capacity(experts.len());
    for ExpertRows {
        gate_up,
        down,
        rows,
    } in experts
    {
        let (Some(stored), Some(stored_down)) = (gate_up.stored(), down.stored()) else {
            return Ok(None);
        };
        let fits = gate_up.in_features() == hidden
            && down.out_features() == hidden
            && gate_up.out_features() == 2 * down.in_features();
        if !fits {
            return Err(Error::Batch(format!(
                "layers `{}` and `{}` do not make an expert for rows of {hidden}",
                gate_up.name(),
                down.name()
            )));
        }
        let matrices = |linear: &Linear, stored: &'a crate::StoredTensor| {
            let parts = stored.parts().iter();
            parts
                .map(|part| matrix(linear.name(), part, stored.columns()))
                .collect::<Result<Vec<_>>>()
        };
        plans.push(Plan {
            gate_up: matrices(gate_up, stored)?,
            down: matrices(down, stored_down)?,
            rows,
        });
    }
    Ok(Some(plans))
}

fn with_kernels(x: &Activations<'_>, plans: &[Plan<'_>]) -> Vec<f32> {
    let (n, hidden) = (x.len(), x.cols());
    let rows: usize = plans.iter().map(|plan| plan.rows.len()).sum();
    let mut y = vec![0f32; rows * hidden];
    let mut rest = y.as_mut_slice();
    let mut left = plans;
    while !left.is_empty() {
        let mut in_wave = 0;
        let fits = |plan: &&Plan<'_>| {
            in_wave += plan.rows.len();
            in_wave <= WAVE_ROWS
        };
        let (wave, later) = left.split_at(left.iter().take_while(fits).count().max(1));
        left = later;
        let taken = wave.iter().map(|plan| plan.rows.len() * hidden).sum();
        let (head, tail) = rest.split_at_mut(taken);
        rest = tail;
        run_wave(x, n, wave, head);
    }
    y
}

/// The experts of `wave`, whose outputs lie in `y` one after the other.
fn run_wave(x: &Activations<'_>, n: usize, wave: &[Plan<'_>], mut y: &mut [f32]) {
    let selected: Vec<Option<Activations<'static>>> = wave
        .iter()
        .map(|plan| match is_all(plan.rows, n) {
            true => None,
            false => Some(x.select(plan.rows, plan.gate_up.iter().map(MatrixRef::block_type))),
        })
        .collect();
    let mut gates: Vec<Vec<f32>> = wave
        .iter()
        .map(|plan| vec![0f32; plan.rows.len() * height(&plan.gate_up)])
        .collect();
    let mut products: Vec<Product<'_>> = wave
        .iter()
        .zip(&selected)
        .zip(&mut gates)
        .map(|((plan, selected), out)| Product {
            x: selected.as_ref().unwrap_or(x),
            matrices: &plan.gate_up,
            out,
        })
        .collect();
    phi3_kernels::linear_all(&mut products);
    let inner: Vec<Vec<f32>> = wave
        .iter()
        .zip(gates)
        .map(|(plan, gate_up)| {
            let width = height(&plan.gate_up) / 2;
            let mut inner = vec![0f32; plan.rows.len() * width];
            phi3_kernels::silu_mul(&gate_up, width, &mut inner);
            inner
        })
        .collect();
    let inner: Vec<Activations<'_>> = wave
        .iter()
        .zip(&inner)
        .map(|(plan, inner)| Activations::new(inner, plan.rows.len(), height(&plan.gate_up) / 2))
        .collect();
    let mut products = Vec::with_capacity(wave.len());
    for (plan, inner) in wave.iter().zip(&inner) {
        let (out, rest) = y.split_at_mut(plan.rows.len() * height(&plan.down));
        y = rest;
        products.push(Product {
            x: inner,
            matrices: &plan.down,
            out,
        });
    }
    phi3_kernels::linear_all(&mut products);
}

/// Whether `rows` are a whole batch of `n` in its order: decode, mostly.
fn is_all(rows: &[u32], n: usize) -> bool {
    rows.len() == n && (0u32..).zip(rows).all(|(at, row)| at == *row)
}

/// Rows of all `matrices`.
fn height(matrices: &[MatrixRef<'_>]) -> usize {
    matrices.iter().map(MatrixRef::rows).sum()
}

/// Adds up the choices of each row: y `[m, H]`, `places` `[n · K]` rows of it, `weights` `[n, K]`, to
/// `[n, H]`, in the order of the choices.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use phi3_nn::mixture::weighted_sum;
///
/// let y = Tensor::new(&[[1f32], [10.], [100.]], &Device::Cpu)?;
/// let weights = Tensor::new(&[[0.5f32, 1.], [2., 0.]], &Device::Cpu)?;
/// let sum = weighted_sum(&y, &[2, 0, 1, 1], &weights)?;
/// assert_eq!(sum.to_vec2::<f32>()?, [[51.], [20.]]);
/// # Ok::<(), phi3_nn::Error>(())
/// ```
///
/// # Errors
/// [`Error::Batch`] if there are not as many places as weights, or a place is no row of y.
pub fn weighted_sum(y: &Tensor, places: &[u32], weights: &Tensor) -> Result<Tensor> {
    let ((rows, hidden), (n, choices)) = (y.dims2()?, weights.dims2()?);
    let in_y = |place: &u32| (*place as usize) < rows;
    if places.len() != n * choices || choices == 0 || !places.iter().all(in_y) {
        return Err(Error::Batch(format!(
            "{} places among {rows} rows for {n} times {choices} choices",
            places.len()
        )));
    }
    if y.device().is_cpu() && !y.track_op() && !weights.track_op() {
        let mut out = vec![0f32; n * hidden];
        host::with_f32(y, |y| {
            host::with_f32(weights, |weights| {
                phi3_kernels::combine_rows(y, hidden, places, weights, choices, &mut out);
            })
        })??;
        return Ok(Tensor::from_vec(out, (n, hidden), y.device())?);
    }
    let picked = y.index_select(&Tensor::new(places, y.device())?, 0)?;
    let picked = picked.reshape((n, choices, hidden))?;
    let weights = weights.to_dtype(y.dtype())?.unsqueeze(2)?;
    Ok(picked.broadcast_mul(&weights)?.sum(1)?)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::weights::{MemorySource, StoredTensor, Weights};
    use phi3_kernels::BlockType;

    const HIDDEN: usize = 4;
    const INNER: usize = 3;

    fn weights() -> Result<Weights> {
        let mut source = MemorySource::new();
        let mut add = |name: &str, rows: usize, cols: usize, seed: usize| -> Result<()> {
            let value = |i: usize| ((i * 37 + seed * 101) % 61) as f32 / 30.0 - 1.0;
            let values: Vec<u8> = (0..rows * cols)
                .flat_map(|i| value(i).to_le_bytes())
                .collect();
            let stored = StoredTensor::new(vec![rows, cols], BlockType::F32, values.into());
            source.insert(name, stored.map_err(Error::config)?);
            Ok(())
        };
        for expert in 0..3 {
            add(&format!("{expert}.up.weight"), 2 * INNER, HIDDEN, expert)?;
            add(&format!("{expert}.down.weight"), HIDDEN, INNER, expert + 7)?;
        }
        Ok(Weights::new(Arc::new(source), Device::Cpu, DType::F32))
    }

    fn layers(weights: &Weights) -> Result<Vec<[Linear; 2]>> {
        let layer = |expert: usize| {
            let weights = weights.pp(expert);
            Ok([
                Linear::load(weights.pp("up"), HIDDEN, 2 * INNER, false)?,
                Linear::load(weights.pp("down"), INNER, HIDDEN, false)?,
            ])
        };
        (0..3).map(layer).collect()
    }

    fn run(layers: &[[Linear; 2]], x: &Tensor, rows: &[Vec<u32>]) -> Result<Tensor> {
        let chosen: Vec<ExpertRows<'_>> = layers
            .iter()
            .zip(rows)
            .map(|([gate_up, down], rows)| ExpertRows {
                gate_up,
                down,
                rows,
            })
            .collect();
        experts(x, &chosen)
    }

    fn difference(a: &Tensor, b: &Tensor) -> Result<f32> {
        Ok((a - b)?.abs()?.max_all()?.to_scalar::<f32>()?)
    }

    #[test]
    fn kernels_and_candle_agree_in_one_wave_and_in_several() -> Result<()> {
        let weights = weights()?;
        let kernels = layers(&weights)?;
        let candle = layers(&weights.with_candle_operations())?;
        for n in [1, 5, WAVE_ROWS + 50] {
            let x = Tensor::randn(0f32, 1.0, (n, HIDDEN), &Device::Cpu)?;
            let all: Vec<u32> = (0..n as u32).collect();
            let some: Vec<u32> = all.iter().copied().filter(|row| row % 3 == 0).collect();
            let back: Vec<u32> = all.iter().copied().rev().collect();
            let rows = [all, some, back];
            let found = run(&kernels, &x, &rows)?;
            assert_eq!(found.dim(0)?, rows.iter().map(Vec::len).sum::<usize>());
            assert!(difference(&found, &run(&candle, &x, &rows)?)? < 1e-5);
            // Reversed, and by itself: the same numbers.
            let last = run(&kernels[2..], &x, &rows[2..])?;
            let start = rows[0].len() + rows[1].len();
            assert_eq!(difference(&last, &found.narrow(0, start, n)?)?, 0.0);
        }
        Ok(())
    }

    #[test]
    fn a_row_outside_the_batch_is_refused() -> Result<()> {
        let layers = layers(&weights()?)?;
        let x = Tensor::zeros((2, HIDDEN), DType::F32, &Device::Cpu)?;
        assert!(run(&layers, &x, &[vec![0, 2]]).is_err());
        assert!(run(&layers, &x, &[]).is_err());
        assert!(run(&layers, &x.narrow(1, 0, 3)?, &[vec![0]]).is_err());
        Ok(())
    }

    #[test]
    fn both_forms_of_the_sum_agree_and_the_tracked_one_has_gradients() -> Result<()> {
        let y = Var::from_tensor(&Tensor::randn(0f32, 1.0, (6, HIDDEN), &Device::Cpu)?)?;
        let weights = Tensor::randn(0f32, 1.0, (3, 2), &Device::Cpu)?;
        let places = [5, 0, 1, 1, 2, 4];
        let tracked = weighted_sum(&y, &places, &weights)?;
        let plain = weighted_sum(&y.as_tensor().detach(), &places, &weights)?;
        assert!(difference(&tracked, &plain)? < 1e-6);
        assert!(tracked.sum_all()?.backward()?.get(&y).is_some());
        for wrong in [&places[..5], &[6, 0, 1, 1, 2, 4]] {
            assert!(weighted_sum(&plain, wrong, &weights).is_err());
        }
        Ok(())
    }
}
