//! Keys and values of one sequence.
//!
//! Per layer the cache holds keys and values head-major, keys already rotated: in pages that clones
//! share (`kv_pages`), or as tensors `[k, s, d]` for candle. It also keeps the inputs of the
//! sequence where the model may have to compute its history again: when the sequence passes the
//! LongRoPE limit (deeper layers change with the factors, so the keys of every layer do), when it
//! is truncated back below it, or when a truncation, or a call that failed half way, needs keys
//! that a sliding window or a block-sparse layer has freed.

use candle_core::Tensor;

use crate::attention::AttentionPattern;
use crate::cache_type::CacheStore;
use crate::error::{Error, Result};
use crate::kv_pages::{LayerPages, PageShape};
use crate::layer_cache::LayerCache;
use crate::rope::Regime;

/// What happens to keys computed in another LongRoPE regime than the sequence's length asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recompute {
    /// The whole history is computed again: as if every step started from scratch. What
    /// `generate()` of transformers does for phi3 and phimoe.
    #[default]
    Always,
    /// Cached keys keep their rotation, new ones use the factors of the current length. What
    /// Phi-3-small's code and the first Phi-3 releases do.
    Never,
}

/// The model's side of a cache: geometry and rules, the same for every sequence.
#[derive(Clone, Debug)]
pub struct CacheSpec {
    /// Which keys a query sees, one entry per layer.
    pub patterns: Vec<AttentionPattern>,
    /// Key/value heads per layer.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Length up to which the short factors hold, if the model has two sets.
    pub rope_limit: Option<usize>,
    /// The model's own rule at the limit.
    pub recompute: Recompute,
    /// Longest sequence, in tokens.
    pub max_len: usize,
    /// Who holds keys and values, and in which form.
    pub store: CacheStore,
}

impl CacheSpec {
    /// Bytes of keys and values that a sequence of `len` tokens holds: exactly those of its pages,
    /// or at most those of its tensors; the largest `usize` where a configuration without weights
    /// to it asks for more.
    pub fn bytes_at(&self, len: usize) -> usize {
        let heads = self.num_key_value_heads;
        let rows = |pattern: &AttentionPattern| match self.store {
            CacheStore::Pages(_) => PageShape::of(*pattern, heads).rows_held(*pattern, heads, len),
            CacheStore::Tensors(_) => {
                let window = pattern.window();
                let kept = window.map(|window| (window - 1).saturating_add(window_slack(window)));
                len.min(kept.unwrap_or(len)).saturating_mul(heads)
            }
        };
        self.bytes_of(self.patterns.iter().map(rows))
    }

    /// Bytes of keys and values that the next token reads of a sequence of `len` tokens.
    pub fn bytes_read_at(&self, len: usize) -> usize {
        let heads = self.num_key_value_heads;
        let rows = |pattern: &AttentionPattern| match pattern {
            AttentionPattern::BlockSparse(layout) => {
                // What can still be reached is what the heads see together.
                let held = PageShape::of(*pattern, heads).rows_held(*pattern, heads, len);
                let blocks = len.div_ceil(layout.block_size());
                let free = blocks.saturating_mul(layout.block_size()) - len;
                held.saturating_sub(free.saturating_mul(heads))
            }
            _ => (len - pattern.first_reachable(len)).saturating_mul(heads),
        };
        self.bytes_of(self.patterns.iter().map(rows))
    }

    /// Bytes of so many keys of one head, and as many values.
    fn bytes_of(&self, rows: impl Iterator<Item = usize>) -> usize {
        let row_bytes = match self.store {
            CacheStore::Pages(cache_type) => cache_type.row_bytes(self.head_dim),
            CacheStore::Tensors(dtype) => self.head_dim.saturating_mul(dtype.size_in_bytes()),
        };
        rows.fold(0, usize::saturating_add)
            .saturating_mul(row_bytes.saturating_mul(2))
    }

    /// How many of a sequence's first inputs the cache must keep to be able to rebuild itself.
    fn inputs_kept(&self) -> usize {
        let frees = |pattern: &AttentionPattern| *pattern != AttentionPattern::Causal;
        if self.patterns.iter().any(frees) {
            usize::MAX
        } else {
            self.rope_limit.unwrap_or(0)
        }
    }
}

/// Positions that the tensors of a window layer may hold beyond its window before the rest moves
/// forward: moving at every token would cost more than attention itself.
pub(crate) fn window_slack(window: usize) -> usize {
    (window / 8).max(16)
}

/// Some consecutive inputs of a sequence.
#[derive(Clone, Debug)]
pub(crate) enum InputSegment {
    Ids(Vec<u32>),
    /// `[rows, hidden_size]`, shared with whoever made it.
    Rows(Tensor),
}

impl InputSegment {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Ids(ids) => ids.len(),
            Self::Rows(rows) => rows.dims().first().copied().unwrap_or(0),
        }
    }

    /// The first `len` rows of it.
    fn head(&self, len: usize) -> Result<Self> {
        Ok(match self {
            Self::Ids(ids) => Self::Ids(ids.get(..len).unwrap_or(ids).to_vec()),
            Self::Rows(rows) => Self::Rows(rows.narrow(0, 0, len)?),
        })
    }
}

/// The keys and values of one sequence. Made by [`crate::CausalLm::new_cache`].
///
/// A clone shares nothing that changes: clone and truncate to reuse a common prefix, whose pages
/// then lie in memory once.
#[derive(Clone, Debug)]
pub struct KvCache {
    spec: std::sync::Arc<CacheSpec>,
    layers: Vec<LayerCache>,
    inputs: Vec<InputSegment>,
    inputs_len: usize,
    len: usize,
    /// Tokens whose keys are held and may be used: `len`, or 0 where they must be computed again.
    built: usize,
    reaches: usize,
    regime: Regime,
    /// First positions of runs of tokens computed with the same factors.
    runs: Vec<(usize, Regime)>,
    recompute: Recompute,
}

impl KvCache {
    /// An empty cache.
    pub fn new(spec: std::sync::Arc<CacheSpec>) -> Self {
        let layers = spec
            .patterns
            .iter()
            .map(|pattern| LayerCache::new(&spec, *pattern))
            .collect();
        let recompute = spec.recompute;
        Self {
            spec,
            layers,
            inputs: Vec::new(),
            inputs_len: 0,
            len: 0,
            built: 0,
            reaches: 0,
            regime: Regime::Short,
            runs: Vec::new(),
            recompute,
        }
    }

    /// The same cache under another rule than its model's at the LongRoPE limit.
    pub fn with_recompute(mut self, recompute: Recompute) -> Self {
        self.recompute = recompute;
        self
    }

    /// The same cache in memory of its own, also where a clone would share it.
    pub fn unshared(&self) -> Self {
        let mut copy = self.clone();
        for layer in &mut copy.layers {
            if let LayerCache::Pages(pages) = layer {
                *pages = pages.unshared();
            }
        }
        copy
    }

    /// Tokens in the sequence; the next one has this position.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the sequence has no token yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of keys and values held right now, those that are shared with clones included.
    pub fn size_in_bytes(&self) -> usize {
        self.layers.iter().map(LayerCache::size_in_bytes).sum()
    }

    /// Forgets everything behind the first `len` tokens; a longer `len` changes nothing.
    ///
    /// Where the remaining keys cannot be used as they are (computed with long factors although
    /// the sequence is short again, or already freed by a sliding window or a block-sparse layer),
    /// the next forward call computes the history again.
    ///
    /// # Errors
    /// [`Error::Candle`] if a device tensor cannot be narrowed.
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        if len >= self.len {
            return Ok(());
        }
        self.len = len;
        self.reaches = len;
        self.truncate_inputs(len)?;
        self.runs.retain(|(start, _)| *start < len);
        if self.lacks_keys() || self.built < len {
            self.clear_keys();
            return Ok(());
        }
        self.built = len;
        for layer in &mut self.layers {
            layer.truncate(len);
        }
        Ok(())
    }

    /// Whether the next token reaches keys that were freed.
    fn lacks_keys(&self) -> bool {
        let mut layers = self.layers.iter().zip(&self.spec.patterns);
        layers.any(|(layer, pattern)| layer.lacks(*pattern, self.len))
    }

    /// LongRoPE factors with which the history's token at `position` is computed again under
    /// `plan`.
    pub(crate) fn regime_of(&self, position: usize, plan: &SpanPlan) -> Regime {
        if self.recompute == Recompute::Always {
            return plan.regime;
        }
        let run = self.runs.partition_point(|(start, _)| *start <= position);
        let run = run.checked_sub(1).and_then(|run| self.runs.get(run));
        run.map_or(plan.regime, |(_, regime)| *regime)
    }

    /// Decides how a span of `new` tokens runs: its regime, and whether history runs with it.
    ///
    /// # Errors
    /// [`Error::Batch`] if the sequence would exceed the model's maximum length.
    pub(crate) fn plan(&self, new: usize, reaches: Option<usize>) -> Result<SpanPlan> {
        let total = self.len.saturating_add(new);
        if total > self.spec.max_len {
            return Err(Error::Batch(format!(
                "a sequence of {} tokens and {new} more exceeds the model's context of {} tokens",
                self.len, self.spec.max_len
            )));
        }
        let reaches = total.max(reaches.unwrap_or(0)).max(self.reaches);
        let regime = match self.spec.rope_limit {
            Some(limit) if reaches > limit => Regime::Long,
            _ => Regime::Short,
        };
        let stale = self.built < self.len
            || self.lacks_keys()
            || (regime != self.regime && self.recompute == Recompute::Always && self.len > 0);
        Ok(SpanPlan {
            start: if stale { 0 } else { self.len },
            history: if stale { self.len } else { 0 },
            regime,
            reaches,
        })
    }

    /// The inputs of the first `len` tokens, for a rebuild.
    pub(crate) fn history(&self, len: usize) -> Result<&[InputSegment]> {
        if self.inputs_len < len {
            return Err(Error::Batch(format!(
                "the history of {len} tokens must be computed again, but only {} inputs were kept",
                self.inputs_len
            )));
        }
        Ok(&self.inputs)
    }

    /// Makes room for a rebuild from position 0.
    pub(crate) fn clear_keys(&mut self) {
        self.built = 0;
        for (layer, pattern) in self.layers.iter_mut().zip(&self.spec.patterns) {
            *layer = LayerCache::new(&self.spec, *pattern);
        }
    }

    /// The layer's keys and values.
    pub(crate) fn layer_mut(&mut self, layer_idx: usize) -> Result<&mut LayerCache> {
        self.layers.get_mut(layer_idx).ok_or_else(|| {
            Error::Batch(format!(
                "this cache has no layer {layer_idx}; it belongs to another model"
            ))
        })
    }

    /// Whether the kernels read this cache.
    pub(crate) fn is_paged(&self) -> bool {
        matches!(self.spec.store, CacheStore::Pages(_))
    }

    /// The layer's pages.
    pub(crate) fn pages_mut(&mut self, layer_idx: usize) -> Result<&mut LayerPages> {
        match self.layer_mut(layer_idx)? {
            LayerCache::Pages(pages) => Ok(pages),
            LayerCache::Tensors(_) => Err(not_paged()),
        }
    }

    /// The layer's pages.
    pub(crate) fn pages(&self, layer_idx: usize) -> Result<&LayerPages> {
        match self.layers.get(layer_idx) {
            Some(LayerCache::Pages(pages)) => Ok(pages),
            _ => Err(not_paged()),
        }
    }

    /// Ends a successful forward call that brought `input`.
    pub(crate) fn commit(&mut self, input: InputSegment, plan: &SpanPlan) -> Result<()> {
        if plan.history > 0 && self.recompute == Recompute::Always {
            self.runs = vec![(0, plan.regime)];
        } else if self
            .runs
            .last()
            .is_none_or(|(_, last)| *last != plan.regime)
        {
            self.runs.push((self.len, plan.regime));
        }
        self.len += input.len();
        self.built = self.len;
        self.regime = plan.regime;
        self.reaches = plan.reaches;
        self.keep_input(input)?;
        for (layer, pattern) in self.layers.iter_mut().zip(&self.spec.patterns) {
            layer.drop_unreachable(*pattern, self.len)?;
        }
        Ok(())
    }

    fn keep_input(&mut self, input: InputSegment) -> Result<()> {
        let room = self.spec.inputs_kept().saturating_sub(self.inputs_len);
        let input = if input.len() > room {
            input.head(room)?
        } else {
            input
        };
        if input.len() == 0 {
            return Ok(());
        }
        self.inputs_len += input.len();
        match (self.inputs.last_mut(), input) {
            (Some(InputSegment::Ids(kept)), InputSegment::Ids(new)) => kept.extend(new),
            (_, input) => self.inputs.push(input),
        }
        Ok(())
    }

    fn truncate_inputs(&mut self, len: usize) -> Result<()> {
        let mut kept = 0;
        let mut inputs = Vec::new();
        for segment in &self.inputs {
            if kept >= len {
                break;
            }
            let segment = segment.head(segment.len().min(len - kept))?;
            kept += segment.len();
            inputs.push(segment);
        }
        self.inputs = inputs;
        self.inputs_len = kept;
        Ok(())
    }
}

fn not_paged() -> Error {
    Error::Batch("this cache is candle's and holds no pages".to_owned())
}

/// How one span of a forward call runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SpanPlan {
    /// Position of the first row that runs.
    pub(crate) start: usize,
    /// Rows of history that run before the span's own.
    pub(crate) history: usize,
    /// LongRoPE factors of all its rows.
    pub(crate) regime: Regime,
    /// Length that the sequence is now known to reach.
    reaches: usize,
}
