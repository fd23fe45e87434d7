//! Which experts a token takes, and with what weight.
//!
//! [`RouterKind::SparseMixer`] is the reference at inference (`sparsemixer` of
//! `modeling_phimoe.py`, without noise and sampling). With scores s and the jitter ε:
//! ```text
//! i₁ = argmax s,  m₁ = s[i₁];  j is kept unless (m₁ - s_j) / max(|s_j|, m₁) > 2ε
//! w₁ = softmax over the kept scores, at i₁
//! i₂ = argmax of s without i₁, m₂ = s[i₂];  j ≠ i₁ is kept unless (m₂ - s_j) / max(|s_j|, m₂) > 2ε
//! w₂ = softmax over the kept scores, at i₂
//! ```
//! The weights are not normalized: each is 1 unless another score lies within 2ε of its maximum, so
//! they mostly add up to the number of choices. Among equal scores the lowest index wins; 0/0 is no
//! reason to drop a score.

use candle_core::{DType, Tensor};
use phi3_nn::{Error, Linear, Observer, Packed, Result, Weights};

use crate::config::Config;

/// A rule that turns router scores into a choice of experts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RouterKind {
    /// What Phi-3.5-MoE was trained for, named `sparsemixer`.
    #[default]
    SparseMixer,
    /// `TopK(softmax(s))` as the report prints it, named `topk_softmax`: the largest scores, weighted
    /// by the softmax over all of them.
    TopKSoftmax,
}

impl RouterKind {
    /// Both names.
    pub const NAMES: [&'static str; 2] = ["sparsemixer", "topk_softmax"];

    /// The rule of that name.
    ///
    /// # Errors
    /// [`Error::Config`] naming the rules that there are.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "sparsemixer" => Ok(Self::SparseMixer),
            "topk_softmax" => Ok(Self::TopKSoftmax),
            other => Err(Error::config(format!(
                "router_type `{other}` is not known; known are {}",
                Self::NAMES.join(", ")
            ))),
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::SparseMixer => "sparsemixer",
            Self::TopKSoftmax => "topk_softmax",
        }
    }

    /// Chooses `top_k` experts by the `scores` of one token: pairs of expert and weight, in the order
    /// of choice.
    ///
    /// ```
    /// use phi_3_5_moe::RouterKind;
    /// // 2 is far ahead, 1 and 3 are within 2 % of each other.
    /// let chosen = RouterKind::SparseMixer.choose(&[-1.0, 1.0, 3.0, 0.99], 2, 0.01);
    /// assert_eq!((chosen[0].0, chosen[0].1), (2, 1.0));
    /// assert_eq!(chosen[1].0, 1);
    /// assert!((chosen[1].1 - 1.0 / (1.0 + f32::exp(-0.01))).abs() < 1e-6);
    /// ```
    pub fn choose(self, scores: &[f32], top_k: usize, jitter: f32) -> Vec<(usize, f32)> {
        let mut open = vec![true; scores.len()]; // not chosen yet
        let mut chosen = Vec::with_capacity(top_k);
        let everything = vec![true; scores.len()];
        for _ in 0..top_k.min(scores.len()) {
            let Some((expert, max)) = largest(scores, &open) else {
                break;
            };
            let weight = match self {
                Self::SparseMixer => {
                    let kept: Vec<bool> = scores
                        .iter()
                        .zip(&open)
                        .map(|(&s, &open)| open && kept(s, max, jitter))
                        .collect();
                    softmax_at(scores, &kept, expert)
                }
                Self::TopKSoftmax => softmax_at(scores, &everything, expert),
            };
            chosen.push((expert, weight));
            if let Some(open) = open.get_mut(expert) {
                *open = false;
            }
        }
        chosen
    }
}

/// Whether score `s` stays in the softmax around the maximum `max`. Written as the negation so that
/// 0/0 keeps it, as in the reference.
fn kept(s: f32, max: f32, jitter: f32) -> bool {
    let dropped = (max - s) / s.abs().max(max) > 2.0 * jitter;
    !dropped
}

/// The largest open score and its index; the lowest index among equals.
fn largest(scores: &[f32], open: &[bool]) -> Option<(usize, f32)> {
    let mut best: Option<(usize, f32)> = None;
    for (idx, (&score, _)) in scores
        .iter()
        .zip(open)
        .enumerate()
        .filter(|(_, (_, o))| **o)
    {
        if best.is_none_or(|(_, max)| score > max) {
            best = Some((idx, score));
        }
    }
    best
}

/// The softmax over the kept scores, at `at`.
fn softmax_at(scores: &[f32], kept: &[bool], at: usize) -> f32 {
    let kept_scores = || {
        scores
            .iter()
            .zip(kept)
            .filter(|(_, k)| **k)
            .map(|(s, _)| *s)
    };
    let max = kept_scores().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = kept_scores().map(|s| (s - max).exp()).sum();
    scores.get(at).map_or(0.0, |s| (s - max).exp() / sum)
}

/// The choices of all rows of a batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Routing {
    num_experts: usize,
    top_k: usize,
    experts: Vec<u32>, // [n, K]
    weights: Vec<f32>, // [n, K]
}

impl Routing {
    /// Chooses for every row of `scores` `[n, num_experts]`.
    pub fn of(
        kind: RouterKind,
        scores: &[f32],
        num_experts: usize,
        top_k: usize,
        jitter: f32,
    ) -> Self {
        let mut routing = Self {
            num_experts,
            top_k,
            ..Self::default()
        };
        for row in scores.chunks_exact(num_experts.max(1)) {
            for (expert, weight) in kind.choose(row, top_k, jitter) {
                // Experts are counted by the configuration, far below 2^32.
                routing.experts.push(expert as u32);
                routing.weights.push(weight);
            }
        }
        routing
    }

    /// Choices from elsewhere: `experts` and `weights` are `[n, top_k]`.
    ///
    /// # Errors
    /// [`Error::Batch`] if their lengths differ or are no multiple of `top_k`, or an expert is none
    /// of `num_experts`.
    pub fn from_parts(
        experts: Vec<u32>,
        weights: Vec<f32>,
        num_experts: usize,
        top_k: usize,
    ) -> Result<Self> {
        let whole = experts.len() == weights.len() && experts.len().is_multiple_of(top_k.max(1));
        if !whole || experts.iter().any(|&expert| expert as usize >= num_experts) {
            return Err(Error::Batch(format!(
                "{} experts and {} weights are no choices of {top_k} of {num_experts}",
                experts.len(),
                weights.len()
            )));
        }
        Ok(Self {
            num_experts,
            top_k,
            experts,
            weights,
        })
    }

    /// Number of experts to choose from.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// Choices per row.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.experts.len() / self.top_k.max(1)
    }

    /// The expert of each choice, `[n, top_k]`.
    pub fn experts(&self) -> &[u32] {
        &self.experts
    }

    /// The weight of each choice, `[n, top_k]`.
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// How many choices fell on each expert, `[num_experts]`.
    pub fn load(&self) -> Vec<usize> {
        let mut load = vec![0; self.num_experts];
        for &expert in &self.experts {
            if let Some(count) = load.get_mut(expert as usize) {
                *count += 1;
            }
        }
        load
    }
}

/// The router of one layer.
#[derive(Debug)]
pub struct Router {
    gate: Linear,
    kind: RouterKind,
    num_experts: usize,
    top_k: usize,
    jitter: f32,
    layer_idx: usize,
}

impl Router {
    /// Loads the `weight` `[E, H]` of `gate`.
    ///
    /// # Errors
    /// As [`Weights::stored`].
    pub(crate) fn new(config: &Config, layer_idx: usize, gate: Weights) -> Result<Self> {
        Ok(Self {
            gate: Linear::load(gate, config.hidden_size, config.num_local_experts, false)?,
            kind: config.router,
            num_experts: config.num_local_experts,
            top_k: config.num_experts_per_tok,
            // The reference compares an f32 ratio with this number rounded to f32.
            jitter: config.router_jitter_noise as f32,
            layer_idx,
        })
    }

    /// Chooses for every row of x `[n, H]`. Shows `layerN.router_logits` `[n, E]`,
    /// `layerN.experts` and `layerN.weights` `[n, K]` to the observer.
    ///
    /// # Errors
    /// Those of the gate and of the observer.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        packed: &mut Packed<'_, '_>,
    ) -> Result<(Routing, Tensor)> {
        let scores = packed.linear(&self.gate, x)?.to_dtype(DType::F32)?; // [n, E]
        let host = scores.flatten_all()?.to_vec1::<f32>()?;
        let (experts, top_k) = (self.num_experts, self.top_k);
        let routing = Routing::of(self.kind, &host, experts, top_k, self.jitter);
        let layer = self.layer_idx;
        packed.observe(format_args!("layer{layer}.router_logits"), &scores)?;
        let shape = (routing.rows(), top_k);
        let weights = if scores.track_op() {
            self.tracked_weights(&scores, &host, &routing)?
        } else {
            Tensor::from_vec(routing.weights.clone(), shape, scores.device())?
        }; // [n, K]
        if packed.is_observed() {
            let experts = Tensor::from_vec(routing.experts.clone(), shape, scores.device())?;
            packed.observe(format_args!("layer{layer}.experts"), &experts)?;
            packed.observe(format_args!("layer{layer}.weights"), &weights)?;
        }
        Ok((routing, weights))
    }

    /// The weights of `routing` as functions of the scores, for gradients: which scores take part is
    /// a constant.
    fn tracked_weights(&self, scores: &Tensor, host: &[f32], routing: &Routing) -> Result<Tensor> {
        let (rows, experts) = scores.dims2()?;
        let max = scores.detach().max_keepdim(1)?;
        let exp = scores.broadcast_sub(&max)?.exp()?; // [n, E]
        let mut columns = Vec::with_capacity(self.top_k);
        for slot in 0..self.top_k {
            let mut mask = vec![0f32; rows * experts];
            let mut index = Vec::with_capacity(rows);
            for (row, chosen) in routing.experts.chunks_exact(self.top_k).enumerate() {
                let (earlier, rest) = chosen.split_at(slot);
                let expert = rest.first().copied().unwrap_or(0);
                let scores = host
                    .get(row * experts..(row + 1) * experts)
                    .unwrap_or_default();
                let max = scores.get(expert as usize).copied().unwrap_or(0.0);
                for (j, (mask, &s)) in mask.iter_mut().skip(row * experts).zip(scores).enumerate() {
                    let takes_part = match self.kind {
                        RouterKind::SparseMixer => {
                            !earlier.contains(&(j as u32)) && kept(s, max, self.jitter)
                        }
                        RouterKind::TopKSoftmax => true,
                    };
                    *mask = f32::from(u8::from(takes_part));
                }
                index.push(expert);
            }
            let mask = Tensor::from_vec(mask, (rows, experts), scores.device())?;
            let index = Tensor::from_vec(index, (rows, 1), scores.device())?;
            let sum = (&exp * mask)?.sum_keepdim(1)?;
            columns.push((exp.gather(&index, 1)? / sum)?);
        }
        Ok(Tensor::cat(&columns, 1)?)
    }
}

/// An observer that keeps every choice: layers in order, rows as they came.
#[derive(Debug, Default)]
pub struct RouterTrace {
    layers: Vec<Routing>,
    num_experts: usize,
}

impl RouterTrace {
    /// An empty trace of a model with so many experts.
    pub fn new(num_experts: usize) -> Self {
        Self {
            layers: Vec::new(),
            num_experts,
        }
    }

    /// The choices of each layer.
    pub fn layers(&self) -> &[Routing] {
        &self.layers
    }

    /// The layer of a name such as `layer3.experts`, and what is shown of it.
    fn parse(name: &str) -> Option<(usize, &str)> {
        let (layer, what) = name.strip_prefix("layer")?.split_once('.')?;
        let known = ["experts", "weights"].contains(&what);
        Some((layer.parse().ok().filter(|_| known)?, what))
    }
}

impl Observer for RouterTrace {
    fn wants(&self, name: &str) -> bool {
        Self::parse(name).is_some()
    }

    fn observe(&mut self, name: &str, value: &Tensor) -> Result<()> {
        let Some((layer, what)) = Self::parse(name) else {
            return Ok(());
        };
        // Layers come in order, so this adds one at most.
        while self.layers.len() <= layer {
            self.layers.push(Routing {
                num_experts: self.num_experts,
                ..Routing::default()
            });
        }
        if let Some(routing) = self.layers.get_mut(layer) {
            routing.top_k = value.dim(1)?;
            let flat = value.flatten_all()?;
            match what {
                "experts" => routing.experts.extend(flat.to_vec1::<u32>()?),
                _ => routing.weights.extend(flat.to_vec1::<f32>()?),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    fn choose(scores: &[f32], jitter: f32) -> Vec<(usize, f32)> {
        RouterKind::SparseMixer.choose(scores, 2, jitter)
    }

    #[test]
    fn edge_cases_of_sparsemixer() {
        // All zero: 0/0 drops nobody, so the second softmax runs over the rest.
        assert_eq!(choose(&[0.0; 4], 0.01), [(0, 0.25), (1, 1.0 / 3.0)]);
        // Ties take the lowest index.
        assert_eq!(
            choose(&[1.0, 2.0, 2.0, 2.0], 0.0),
            [(1, 1.0 / 3.0), (2, 0.5)]
        );
        // Negative maxima: the factor is |s_j|, the larger of the two.
        let found = choose(&[-1.0, -1.005, -3.0], 0.01);
        assert_eq!((found[0].0, found[1].0), (0, 1));
        assert!(found[0].1 < 0.51 && found[1].1 == 1.0, "{found:?}");
        // The smaller of |s_j| and the maximum as factor would drop score 1 here.
        let found = choose(&[1.0, 0.5], 0.3)[0];
        assert!(
            (found.1 - 1.0 / (1.0 + f32::exp(-0.5))).abs() < 1e-6,
            "{found:?}"
        );
        // One expert is all there is.
        assert_eq!(choose(&[3.0], 0.01), [(0, 1.0)]);
        assert_eq!(choose(&[], 0.01), []);
    }

    #[test]
    fn numbers_that_are_none_do_not_break_the_choice() {
        for scores in [[f32::NAN; 4], [f32::INFINITY; 4], [f32::NEG_INFINITY; 4]] {
            for kind in [RouterKind::SparseMixer, RouterKind::TopKSoftmax] {
                let chosen = kind.choose(&scores, 2, 0.01);
                assert_eq!(chosen.iter().map(|c| c.0).collect::<Vec<_>>(), [0, 1]);
            }
        }
    }

    #[test]
    fn the_plain_router_weighs_by_the_softmax_over_all() {
        let scores = [1.0f32, 3.0, 2.0];
        let sum: f32 = scores.iter().map(|s| s.exp()).sum();
        let chosen = RouterKind::TopKSoftmax.choose(&scores, 2, 0.01);
        for ((expert, weight), expected) in chosen.iter().zip([1, 2]) {
            assert_eq!(*expert, expected);
            assert!((weight - scores[expected].exp() / sum).abs() < 1e-6);
        }
        for name in RouterKind::NAMES {
            assert_eq!(
                RouterKind::from_name(name).map(RouterKind::name).ok(),
                Some(name)
            );
        }
        assert!(RouterKind::from_name("noisy").is_err());
    }

    #[test]
    fn tracked_weights_are_the_weights_and_have_their_gradients() -> Result<()> {
        let gate = Tensor::randn(0f32, 1.0, (6, 4), &Device::Cpu)?;
        for (kind, jitter) in [
            (RouterKind::SparseMixer, 0.01),
            (RouterKind::SparseMixer, 0.4),
            (RouterKind::TopKSoftmax, 0.0),
        ] {
            let router = Router {
                gate: Linear::from_tensors("gate", gate.clone(), None)?,
                kind,
                num_experts: 6,
                top_k: 2,
                jitter,
                layer_idx: 0,
            };
            let rows = 5;
            let scores = Var::randn(0f32, 1.0, (rows, 6), &Device::Cpu)?;
            let values = |scores: &Tensor| -> Result<(Vec<f32>, Vec<f32>)> {
                let host = scores.flatten_all()?.to_vec1::<f32>()?;
                let routing = Routing::of(kind, &host, 6, 2, jitter);
                let tracked = router.tracked_weights(scores, &host, &routing)?;
                Ok((routing.weights, tracked.flatten_all()?.to_vec1()?))
            };
            let (plain, tracked) = values(&scores)?;
            for (a, b) in plain.iter().zip(&tracked) {
                assert!((a - b).abs() < 1e-6, "{a} {b}");
            }
            // Against central differences with the same scores kept.
            let host = scores.flatten_all()?.to_vec1::<f32>()?;
            let routing = Routing::of(kind, &host, 6, 2, jitter);
            let loss = |scores: &Tensor| -> Result<Tensor> {
                let weights = router.tracked_weights(scores, &host, &routing)?;
                let scale = Tensor::arange(1f32, 1.0 + 2.0 * rows as f32, &Device::Cpu)?;
                Ok((weights.flatten_all()? * scale)?.sum_all()?)
            };
            let grads = loss(&scores)?.backward()?;
            let grad = grads
                .get(&scores)
                .ok_or_else(|| Error::config("no gradient"))?;
            let grad = grad.flatten_all()?.to_vec1::<f32>()?;
            for i in 0..host.len() {
                let at = |delta: f32| -> Result<f32> {
                    let mut moved = host.clone();
                    moved[i] += delta;
                    let moved = Tensor::from_vec(moved, (rows, 6), &Device::Cpu)?;
                    Ok(loss(&moved)?.to_scalar::<f32>()?)
                };
                let numeric = (at(1e-2)? - at(-1e-2)?) / 2e-2;
                assert!(
                    (numeric - grad[i]).abs() < 5e-3,
                    "{i}: {numeric} {}",
                    grad[i]
                );
            }
        }
        Ok(())
    }
}
