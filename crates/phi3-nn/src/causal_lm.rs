//! The forward contract: one call for prefill, decode and everything in between.
//!
//! Tokens of several sequences lie packed, back to back, without padding. Each sequence brings a
//! [`Span`]: how many of the packed rows are its own, its [`KvCache`], the length it is known to
//! reach, and the rows it wants logits for. Linear layers see all rows at once; attention runs per
//! sequence against its own cache. A span starts where its cache ends, so its first position is
//! [`KvCache::len`].

use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::Tensor;

use crate::error::Result;
use crate::kv_cache::KvCache;

/// The packed input of a forward call.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// Token ids, `[n]`.
    Ids(&'a [u32]),
    /// Embeddings, `[n, hidden_size]`: what [`CausalLm::embed`] gives, or an image tower.
    Embeddings(&'a Tensor),
}

impl Input<'_> {
    /// Number of packed rows.
    pub fn len(&self) -> usize {
        match self {
            Self::Ids(ids) => ids.len(),
            Self::Embeddings(rows) => rows.dims().first().copied().unwrap_or(0),
        }
    }

    /// Whether there is no row at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The rows of a span whose logits the caller wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogitRows {
    /// None: a chunk of a prompt that is not its last.
    None,
    /// The last row only: what sampling needs.
    #[default]
    Last,
    /// The last `count` rows of the span (all of them if it is shorter): speculative verification.
    LastN(usize),
    /// Every row.
    All,
}

impl LogitRows {
    /// How many rows that is in a span of `len` rows.
    pub fn count(self, len: usize) -> usize {
        match self {
            Self::None => 0,
            Self::Last => len.min(1),
            Self::LastN(count) => count.min(len),
            Self::All => len,
        }
    }
}

/// One sequence's part of a packed batch.
#[derive(Debug)]
pub struct Span<'a> {
    /// Number of packed rows that belong to this sequence.
    pub len: usize,
    /// The sequence's cache; the first of the rows has position `cache.len()`.
    pub cache: &'a mut KvCache,
    /// Total length the sequence is known to reach, if that is more than this call brings: a prompt
    /// fed in chunks states its whole length with the first chunk, so that LongRoPE chooses the
    /// factors once.
    pub reaches: Option<usize>,
    /// Rows to compute logits for.
    pub logits: LogitRows,
    /// Raised by another thread when nobody waits for this sequence any more.
    pub interrupt: Option<&'a AtomicBool>,
}

impl<'a> Span<'a> {
    /// A span of `len` rows that wants the logits of its last row.
    pub fn new(len: usize, cache: &'a mut KvCache) -> Self {
        Self {
            len,
            cache,
            reaches: None,
            logits: LogitRows::Last,
            interrupt: None,
        }
    }

    /// The same span with other rows wanted.
    pub fn with_logits(mut self, logits: LogitRows) -> Self {
        self.logits = logits;
        self
    }

    /// The same span, of a sequence known to reach `total` tokens.
    pub fn reaching(mut self, total: usize) -> Self {
        self.reaches = Some(total);
        self
    }

    /// The same span, whose sequence `flag` interrupts: the call ends early, with
    /// [`crate::Error::Interrupted`], when that is true of every span.
    pub fn interrupted_by(mut self, flag: &'a AtomicBool) -> Self {
        self.interrupt = Some(flag);
        self
    }

    pub(crate) fn is_interrupted(&self) -> bool {
        let raised = |flag: &AtomicBool| flag.load(Ordering::Relaxed);
        self.interrupt.is_some_and(raised)
    }
}

/// Receives named intermediates of a forward call: `hidden_embed`, `hidden_layer0_attn`,
/// `hidden_layer0`, …, `hidden_layer_last`, `hidden_final_norm`, and the input of each linear layer
/// under that layer's tensor name without `.weight`.
///
/// A tensor's first axis counts the packed rows that the caller sent; rows that the model
/// recomputes on its own behalf are not shown. The linear layers of an expert see, and show, only
/// the rows that were routed to it. A router shows `layerN.router_logits` `[n, experts]`, and of
/// each choice `layerN.experts` (u32) and `layerN.weights`, `[n, choices]`.
pub trait Observer {
    /// Whether `name` is of interest; asked first, so that nothing is computed in vain.
    fn wants(&self, name: &str) -> bool;

    /// Takes the intermediate.
    ///
    /// # Errors
    /// An error ends the forward call.
    fn observe(&mut self, name: &str, value: &Tensor) -> Result<()>;
}

/// What a caller may want to know of a model without knowing its type.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelInfo {
    /// `model_type` of its configuration.
    pub model_type: String,
    /// Rows of the embedding, and length of a row of logits.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Longest sequence that the configuration allows, in tokens.
    pub max_position_embeddings: usize,
    /// Length up to which LongRoPE uses its short factors, if the model has two sets.
    pub original_max_position_embeddings: Option<usize>,
}

/// A decoder that gives logits for packed sequences.
///
/// Weights are immutable and shared: `forward` takes `&self`, and one model serves many sequences.
pub trait CausalLm: Send + Sync {
    /// What the model is.
    fn info(&self) -> &ModelInfo;

    /// An empty cache for one sequence of this model.
    fn new_cache(&self) -> KvCache;

    /// Rows of the embedding, `[ids.len(), hidden_size]`.
    ///
    /// # Errors
    /// [`crate::Error::TokenId`] for an id outside the vocabulary.
    fn embed(&self, ids: &[u32]) -> Result<Tensor>;

    /// Runs the packed batch and appends it to the caches.
    ///
    /// Returns f32 logits `[rows, vocab_size]` on the model's device: the rows wanted of the first
    /// span, in order, then those of the second, and so on. After an error every cache is as long
    /// as before the call.
    ///
    /// # Errors
    /// [`crate::Error::Batch`] if the spans do not add up to the input or exceed the model's
    /// maximum length, [`crate::Error::TokenId`], [`crate::Error::Interrupted`], or a failing tensor
    /// operation.
    fn forward(
        &self,
        input: Input<'_>,
        spans: &mut [Span<'_>],
        observer: Option<&mut dyn Observer>,
    ) -> Result<Tensor>;
}
