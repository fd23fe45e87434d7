//! Running a model like the reference ran, and comparing with what it gave.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use candle_core::Tensor;
use phi3_nn::{CausalLm, Input, KvCache, LogitRows, Observer, Span};

/// Largest difference to a golden, as a share of the standard deviation of the golden's logits,
/// where weights and activations are f32. Measured here: at most 2e-5.
pub const F32_TOLERANCE: f32 = 2e-4;

/// Keeps every intermediate that it is shown, as f32 rows.
#[derive(Default)]
pub struct Recorder {
    /// Values by name; later calls are appended.
    pub values: BTreeMap<String, Vec<f32>>,
}

impl Observer for Recorder {
    fn wants(&self, name: &str) -> bool {
        ["hidden_", "clip_", "img_"]
            .iter()
            .any(|prefix| name.starts_with(prefix))
    }

    fn observe(&mut self, name: &str, value: &Tensor) -> phi3_nn::Result<()> {
        let values = value
            .to_dtype(candle_core::DType::F32)?
            .flatten_all()?
            .to_vec1()?;
        self.values
            .entry(name.to_owned())
            .or_default()
            .extend::<Vec<f32>>(values);
        Ok(())
    }
}

/// One call for one sequence; logits of all its rows, `[ids.len(), vocab]`.
///
/// # Errors
/// Those of the model.
pub fn step(model: &dyn CausalLm, cache: &mut KvCache, ids: &[u32]) -> Result<Vec<f32>> {
    observed_step(model, cache, ids, None)
}

/// [`step`] with an observer.
///
/// # Errors
/// Those of the model.
pub fn observed_step(
    model: &dyn CausalLm,
    cache: &mut KvCache,
    ids: &[u32],
    observer: Option<&mut dyn Observer>,
) -> Result<Vec<f32>> {
    let span = Span::new(ids.len(), cache).with_logits(LogitRows::All);
    let logits = model.forward(Input::Ids(ids), &mut [span], observer)?;
    Ok(logits.flatten_all()?.to_vec1()?)
}

/// Feeds `ids` one at a time; logits of every step.
///
/// # Errors
/// Those of the model.
pub fn decode(model: &dyn CausalLm, cache: &mut KvCache, ids: &[u32]) -> Result<Vec<f32>> {
    let mut logits = Vec::new();
    for &id in ids {
        logits.extend(step(model, cache, &[id])?);
    }
    Ok(logits)
}

/// The largest id of each row.
pub fn argmax_rows(logits: &[f32], vocab_size: usize) -> Vec<u32> {
    let rows = logits.chunks_exact(vocab_size);
    rows.map(|row| phi3_kernels::argmax(row).unwrap_or(0) as u32)
        .collect()
}

/// Fails if `found` differs from `expected` by more than `tolerance` times its deviation.
///
/// # Errors
/// Names the first row that differs, and by how much.
pub fn assert_close(
    what: &str,
    found: &[f32],
    expected: &[f32],
    width: usize,
    tolerance: f32,
) -> Result<f32> {
    ensure!(
        found.len() == expected.len(),
        "{what}: {} values, {} expected",
        found.len(),
        expected.len()
    );
    let limit = tolerance * deviation(expected);
    let mut worst = 0f32;
    for (row, (f, e)) in found.chunks(width).zip(expected.chunks(width)).enumerate() {
        for (f, e) in f.iter().zip(e) {
            let difference = (f - e).abs();
            // Written so that a NaN fails.
            ensure!(
                difference <= limit,
                "{what}: row {row} differs by {difference:e} (limit {limit:e}): {f} instead of {e}"
            );
            worst = worst.max(difference);
        }
    }
    Ok(worst / deviation(expected))
}

/// Standard deviation, of all but the lowest f32: the logit of tokens that a model never chooses.
pub fn deviation(values: &[f32]) -> f32 {
    let values = || values.iter().filter(|v| **v > f32::MIN);
    let n = values().count().max(1) as f64;
    let mean = values().map(|&v| f64::from(v)).sum::<f64>() / n;
    let square = values()
        .map(|&v| (f64::from(v) - mean).powi(2))
        .sum::<f64>();
    (square / n).sqrt() as f32
}

/// The first intermediate that differs from its golden: where to look when logits do.
///
/// # Errors
/// Names that intermediate.
pub fn assert_hidden_states(
    recorder: &Recorder,
    goldens: &[(String, &[f32])],
    width: usize,
) -> Result<()> {
    for (name, expected) in goldens {
        let found = recorder
            .values
            .get(name)
            .with_context(|| format!("`{name}` was not shown"))?;
        assert_close(name, found, expected, width, F32_TOLERANCE)?;
    }
    Ok(())
}
