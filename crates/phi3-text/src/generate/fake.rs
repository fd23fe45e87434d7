//! A model whose answers a test knows: logits depend on the last id and its position alone.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Tensor};
use phi3_nn::{CacheSpec, CacheStore, CausalLm, Input, KvCache, LogitRows, ModelInfo};
use phi3_nn::{Observer, Packed, Recompute, Span};

use super::CancelToken;

/// What one span of a call brought: start, ids, known length, whether it wanted logits.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct SeenSpan {
    pub(super) start: usize,
    pub(super) ids: Vec<u32>,
    pub(super) reaches: usize,
    pub(super) wants_logits: bool,
}

/// How the fake model answers at a position that follows `id`.
pub(super) enum Rule {
    /// Logits that look random but depend on id and position alone.
    Mixed,
    /// The highest logit is that of the script's entry for the next position.
    Script(Vec<u32>),
    /// Every logit is this.
    Constant(f32),
}

pub(super) struct FakeModel {
    info: ModelInfo,
    spec: Arc<CacheSpec>,
    rule: Rule,
    calls: Mutex<Vec<Vec<SeenSpan>>>,
    /// The call that fails.
    pub(super) fails_at: Option<usize>,
    /// The call during which somebody cancels.
    pub(super) cancelled_at: Option<(usize, CancelToken)>,
}

impl FakeModel {
    pub(super) fn new(vocab_size: usize, context: usize, rule: Rule) -> Self {
        let info = ModelInfo {
            model_type: "fake".to_owned(),
            vocab_size,
            hidden_size: 1,
            num_hidden_layers: 0,
            max_position_embeddings: context,
            original_max_position_embeddings: None,
        };
        let spec = Arc::new(CacheSpec {
            patterns: Vec::new(),
            num_key_value_heads: 1,
            head_dim: 1,
            rope_limit: None,
            recompute: Recompute::default(),
            max_len: context,
            store: CacheStore::Tensors(DType::F32),
        });
        Self {
            info,
            spec,
            rule,
            calls: Mutex::default(),
            fails_at: None,
            cancelled_at: None,
        }
    }

    pub(super) fn calls(&self) -> Vec<Vec<SeenSpan>> {
        self.calls.lock().unwrap().clone()
    }

    fn logits(&self, id: u32, position: usize) -> Vec<f32> {
        let next = match &self.rule {
            Rule::Script(script) => script.get(position + 1).copied(),
            _ => None,
        };
        (0..self.info.vocab_size as u32)
            .map(|token| match &self.rule {
                Rule::Constant(logit) => *logit,
                Rule::Script(_) => f32::from(u8::from(Some(token) == next)),
                Rule::Mixed => {
                    let mixed = (u64::from(token) << 40 | u64::from(id) << 20 | position as u64)
                        .wrapping_mul(0x9E37_79B9_7F4A_7C15);
                    ((mixed ^ mixed >> 29) % 1000) as f32 / 200.0
                }
            })
            .collect()
    }
}

impl CausalLm for FakeModel {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn new_cache(&self) -> KvCache {
        KvCache::new(Arc::clone(&self.spec))
    }

    fn embed(&self, ids: &[u32]) -> phi3_nn::Result<Tensor> {
        let rows = ids.iter().map(|id| *id as f32).collect();
        Ok(Tensor::from_vec(rows, (ids.len(), 1), &Device::Cpu)?)
    }

    fn forward(
        &self,
        input: Input<'_>,
        spans: &mut [Span<'_>],
        _: Option<&mut dyn Observer>,
    ) -> phi3_nn::Result<Tensor> {
        let ids: Vec<u32> = match input {
            Input::Ids(ids) => ids.to_vec(),
            Input::Embeddings(rows) => {
                let rows = rows.flatten_all()?.to_vec1::<f32>()?;
                rows.into_iter().map(|id| id as u32).collect()
            }
        };
        let mut calls = self.calls.lock().unwrap();
        if self.fails_at == Some(calls.len()) {
            return Err(phi3_nn::Error::config("the device is gone"));
        }
        if let Some((_, token)) = self.cancelled_at.as_ref().filter(|it| it.0 == calls.len()) {
            token.cancel();
        }
        let raised = |span: &Span<'_>| span.interrupt.is_some_and(|it| it.load(Ordering::Relaxed));
        if spans.iter().all(raised) {
            return Err(phi3_nn::Error::Interrupted);
        }
        let (mut seen, mut rows) = (Vec::new(), Vec::new());
        let mut rest = ids.as_slice();
        for span in spans.iter() {
            let (own, behind) = rest.split_at(span.len);
            rest = behind;
            let start = span.cache.len();
            let wants_logits = span.logits == LogitRows::Last;
            if wants_logits {
                rows.extend(self.logits(*own.last().unwrap(), start + own.len() - 1));
            }
            seen.push(SeenSpan {
                start,
                ids: own.to_vec(),
                reaches: span.reaches.unwrap_or(0),
                wants_logits,
            });
        }
        calls.push(seen);
        Packed::begin(input, spans, None)?.finish()?;
        let count = rows.len() / self.info.vocab_size;
        Ok(Tensor::from_vec(
            rows,
            (count, self.info.vocab_size),
            &Device::Cpu,
        )?)
    }
}
