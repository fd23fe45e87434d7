//! Which columns of a model's matrices matter, measured on a text.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use candle_core::Tensor;
use phi3_hub::quantize::Importance;
use phi3_nn::{CausalLm, Input, LogitRows, Observer, Span};

use crate::error::{Error, Result};

/// Runs the text of `ids` through `model`, `window` tokens at a time, and returns the mean square of
/// every input of every linear layer: what an error of a weight in that column is multiplied by.
/// `on_progress` hears the number of tokens done and of all, and says whether to go on; after a
/// break the result covers what was done.
///
/// # Errors
/// [`Error::Evaluation`] if the text is empty or the window longer than the model allows; whatever
/// a forward call returns.
pub fn importance(
    model: &dyn CausalLm,
    ids: &[u32],
    window: usize,
    mut on_progress: impl FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Importance> {
    let longest = model.info().max_position_embeddings;
    if ids.is_empty() || window == 0 || window > longest {
        return Err(Error::Evaluation {
            reason: format!(
                "importance needs a text and a window of 1 to {longest} tokens, found {} tokens and a \
                 window of {window}",
                ids.len()
            ),
        });
    }
    let mut sums = Sums::default();
    for (i, window_ids) in ids.chunks(window).enumerate() {
        if on_progress(i * window, ids.len()).is_break() && i > 0 {
            break;
        }
        let mut cache = model.new_cache();
        // All logits: the head sees as many inputs as the other layers.
        let spans = &mut [Span::new(window_ids.len(), &mut cache).with_logits(LogitRows::All)];
        model.forward(Input::Ids(window_ids), spans, Some(&mut sums))?;
    }
    let mut importance = Importance::new();
    for (layer, (rows, sums)) in sums.layers {
        let mean = |sum: f64| (sum / rows as f64) as f32;
        importance.insert(layer, sums.into_iter().map(mean).collect());
    }
    Ok(importance)
}

/// Rows seen and sums of squares of each column, by layer.
#[derive(Default)]
struct Sums {
    layers: BTreeMap<String, (usize, Vec<f64>)>,
}

impl Observer for Sums {
    fn wants(&self, name: &str) -> bool {
        !name.starts_with("hidden_")
    }

    fn observe(&mut self, name: &str, value: &Tensor) -> phi3_nn::Result<()> {
        let columns = value.dims().last().copied().unwrap_or(0);
        let values = value.flatten_all()?.to_vec1::<f32>()?;
        let (rows, sums) = self.layers.entry(name.to_owned()).or_default();
        sums.resize(columns, 0.0);
        for row in values.chunks_exact(columns.max(1)) {
            *rows += 1;
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += f64::from(*value) * f64::from(*value);
            }
        }
        Ok(())
    }
}
