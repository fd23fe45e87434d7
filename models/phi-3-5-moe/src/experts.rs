//! The experts: tokens grouped by the expert they take, one product per expert over its tokens.

use std::sync::Arc;

use candle_core::Tensor;
use phi3_nn::mixture::{ExpertRows, experts, weighted_sum};
use phi3_nn::mlp::silu_mul;
use phi3_nn::{Error, Linear, Packed, Residency, Result, StoredTensor, Weights};

use crate::config::Config;
use crate::router::Routing;

/// w2·(silu(w1·x) · w3·x).
#[derive(Debug)]
struct Expert {
    /// w1 over w3: `[2I, H]`, rows `[gate | up]`.
    gate_up: Linear,
    /// w2: `[H, I]`.
    down: Linear,
    /// Names of w1 and w3, which see the same input.
    inputs: [String; 2],
    /// Its number with [`Experts::residency`].
    group: usize,
}

/// All experts of a layer.
#[derive(Debug)]
pub(crate) struct Experts {
    experts: Vec<Expert>,
    /// Hears which experts are read next.
    residency: Option<Arc<dyn Residency>>,
}

/// Where the rows of a batch go: what [`Experts::forward`] follows.
#[derive(Debug, PartialEq, Eq)]
struct Groups {
    /// Per expert that has any, its rows in ascending order.
    experts: Vec<(usize, Vec<u32>)>,
    /// Where each choice of each row lies among all grouped rows: `[n · top_k]`.
    places: Vec<u32>,
}

impl Groups {
    fn of(routing: &Routing) -> Self {
        let top_k = routing.top_k();
        let mut experts: Vec<(usize, Vec<u32>)> = (0..routing.num_experts())
            .map(|expert| (expert, Vec::new()))
            .collect();
        // Rows are counted by a batch, far below 2^32.
        for (choice, &expert) in routing.experts().iter().enumerate() {
            if let Some((_, rows)) = experts.get_mut(expert as usize) {
                rows.push((choice / top_k.max(1)) as u32);
            }
        }
        let mut next = Vec::with_capacity(experts.len());
        let mut start = 0;
        for (_, rows) in &experts {
            next.push(start);
            start += rows.len() as u32;
        }
        let mut places = Vec::with_capacity(routing.experts().len());
        for &expert in routing.experts() {
            if let Some(next) = next.get_mut(expert as usize) {
                places.push(*next);
                *next += 1;
            }
        }
        experts.retain(|(_, rows)| !rows.is_empty());
        Self { experts, places }
    }
}

impl Experts {
    /// Loads the experts of a layer, in the spelling that the checkpoint has; names are reported as
    /// the hub spells them.
    ///
    /// # Errors
    /// As [`Weights::stored`].
    pub(crate) fn new(config: &Config, layer: &Weights) -> Result<Self> {
        let (count, hidden, inner) = (
            config.num_local_experts,
            config.hidden_size,
            config.intermediate_size,
        );
        let hub = layer.pp("block_sparse_moe.experts");
        let fused = layer.pp("mlp.experts");
        let stacked = match fused.find("gate_up_proj")? {
            Some(_) => Some((
                fused.stored("gate_up_proj", &[count, 2 * inner, hidden])?,
                fused.stored("down_proj", &[count, hidden, inner])?,
            )),
            None => None,
        };
        let expert = |idx: usize| {
            let hub = hub.pp(idx);
            let (gate_up, down) = match &stacked {
                Some((gate_up, down)) => (
                    expert_of(gate_up, idx, &fused, "gate_up_proj")?,
                    expert_of(down, idx, &fused, "down_proj")?,
                ),
                None => {
                    let [w1, w3] = [
                        hub.stored("w1.weight", &[inner, hidden])?,
                        hub.stored("w3.weight", &[inner, hidden])?,
                    ];
                    let parts = [w1.parts(), w3.parts()].concat();
                    let gate_up = StoredTensor::stacked(vec![2 * inner, hidden], parts).map_err(
                        |source| Error::TensorBytes {
                            name: hub.full_name("w1.weight"),
                            source,
                        },
                    )?;
                    (gate_up, hub.stored("w2.weight", &[hidden, inner])?)
                }
            };
            let group = layer.residency().map_or(0, |residency| {
                let parts = gate_up.parts().iter().chain(down.parts());
                residency.register(parts.map(|part| part.bytes.clone()).collect())
            });
            let inputs = [hub.full_name("w1"), hub.full_name("w3")];
            Ok(Expert {
                gate_up: Linear::from_stored(hub.full_name("w1"), gate_up, None, layer)?,
                down: Linear::from_stored(hub.full_name("w2"), down, None, layer)?,
                inputs,
                group,
            })
        };
        Ok(Self {
            experts: (0..count).map(expert).collect::<Result<_>>()?,
            residency: layer.residency().cloned(),
        })
    }

    /// x `[n, H]` through the experts that `routing` chose, summed with `weights` `[n, K]` in the
    /// order of choice: `[n, H]`. An expert computes the rows that chose it and no other.
    ///
    /// # Errors
    /// Those of the linear layers and of the observer.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        routing: &Routing,
        weights: &Tensor,
        packed: &mut Packed<'_, '_>,
    ) -> Result<Tensor> {
        let groups = Groups::of(routing);
        if let Some(residency) = &self.residency {
            let chosen = groups.experts.iter();
            let chosen = chosen.filter_map(|(idx, _)| Some(self.experts.get(*idx)?.group));
            residency.announce(&chosen.collect::<Vec<_>>());
        }
        let y = match packed.is_observed() {
            true => self.observed(x, &groups, packed)?,
            false => self.unobserved(x, &groups)?,
        }; // [n·K, H], grouped
        weighted_sum(&y, &groups.places, weights)
    }

    /// All experts in one go: `[n·K, H]`, grouped.
    fn unobserved(&self, x: &Tensor, groups: &Groups) -> Result<Tensor> {
        let mut chosen = Vec::with_capacity(groups.experts.len());
        for (idx, rows) in &groups.experts {
            let Expert { gate_up, down, .. } = self.get(*idx)?;
            chosen.push(ExpertRows {
                gate_up,
                down,
                rows,
            });
        }
        experts(x, &chosen)
    }

    /// The same numbers, expert by expert, with their inputs shown.
    fn observed(&self, x: &Tensor, groups: &Groups, packed: &mut Packed<'_, '_>) -> Result<Tensor> {
        let mut outputs = Vec::with_capacity(groups.experts.len());
        for (idx, rows) in &groups.experts {
            let input = x.index_select(&Tensor::new(rows.as_slice(), x.device())?, 0)?; // [rows, H]
            outputs.push(self.get(*idx)?.forward(&input, rows, packed)?);
        }
        Ok(Tensor::cat(&outputs, 0)?)
    }

    fn get(&self, idx: usize) -> Result<&Expert> {
        self.experts.get(idx).ok_or_else(|| {
            Error::Batch(format!("expert {idx} of {} was chosen", self.experts.len()))
        })
    }
}

fn expert_of(
    stacked: &StoredTensor,
    idx: usize,
    weights: &Weights,
    name: &str,
) -> Result<StoredTensor> {
    stacked.at(idx).map_err(|source| Error::TensorBytes {
        name: weights.full_name(name),
        source,
    })
}

impl Expert {
    fn forward(&self, x: &Tensor, rows: &[u32], packed: &mut Packed<'_, '_>) -> Result<Tensor> {
        for name in &self.inputs {
            packed.observe_rows(name, x, rows)?;
        }
        let inner = silu_mul(&self.gate_up.forward(x)?)?; // [rows, I]
        packed.observe_rows(self.down.name(), &inner, rows)?;
        self.down.forward(&inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_grouped_and_found_again() -> Result<()> {
        // Rows 0, 1, 2 take experts (2, 0), (0, 3), (2, 3).
        let routing = Routing::from_parts(vec![2, 0, 0, 3, 2, 3], vec![1.0; 6], 5, 2)?;
        let groups = Groups::of(&routing);
        let expected = [(0, vec![0, 1]), (2, vec![0, 2]), (3, vec![1, 2])];
        assert_eq!(groups.experts, expected);
        // Grouped, the rows are 0 1 | 0 2 | 1 2.
        assert_eq!(groups.places, [2, 0, 1, 4, 3, 5]);
        Ok(())
    }
}
