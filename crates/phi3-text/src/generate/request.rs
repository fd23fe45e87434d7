//! What is asked of a [`super::Generator`], and what it answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use candle_core::Tensor;
use phi3_nn::KvCache;

use crate::error::{Error, Result};
use crate::sampling::SamplingParams;

/// One sequence to generate.
#[derive(Clone, Debug)]
pub struct Request {
    /// The whole prompt, also the part that `cache` already holds.
    pub prompt_ids: Vec<u32>,
    /// The rows that the decoder reads for the prompt, `[prompt_ids.len(), hidden_size]`, if they are
    /// not the embeddings of its ids alone: those of a prompt with images. Ids in the place of such
    /// rows may lie outside the vocabulary; they only tell cached rows from others.
    pub embeddings: Option<Tensor>,
    /// How tokens are chosen.
    pub params: SamplingParams,
    /// Tokens to generate at most, a stop token included; at least 1.
    pub max_new_tokens: usize,
    /// Ids that end the answer; their text is not part of it.
    pub stop_ids: Vec<u32>,
    /// Texts that end the answer; they are not part of it.
    pub stop_strings: Vec<String>,
    /// Whether to give log-probabilities: of each token, and of that many most likely ones.
    pub logprobs: Option<usize>,
    /// Whether special tokens are left out of the text. Default: true.
    pub skip_special: bool,
    /// Whether the text goes on where the prompt ends: the first word then keeps the space that a
    /// SentencePiece tokenizer drops at the start of a text. Default: false, right for chat.
    pub continues_prompt: bool,
    /// What an earlier sequence computed; the common start of its ids and the prompt is reused.
    pub cache: Option<CachedPrefix>,
    /// Whether to keep the cache for [`super::Generator::take_cache`] when the sequence has
    /// finished. Default: false.
    pub keep_cache: bool,
    /// Cancels this sequence.
    pub cancel: CancelToken,
}

impl Request {
    /// A request with default settings: plain sampling, at most 256 new tokens, no stops.
    pub fn new(prompt_ids: Vec<u32>) -> Self {
        Self {
            prompt_ids,
            embeddings: None,
            params: SamplingParams::default(),
            max_new_tokens: 256,
            stop_ids: Vec::new(),
            stop_strings: Vec::new(),
            logprobs: None,
            skip_special: true,
            continues_prompt: false,
            cache: None,
            keep_cache: false,
            cancel: CancelToken::new(),
        }
    }
}

/// A flag that ends generation from another thread. Clones share the flag.
///
/// ```
/// use phi3_text::CancelToken;
/// let token = CancelToken::new();
/// let handle = token.clone();
/// handle.cancel();
/// assert!(token.is_cancelled());
/// ```
#[derive(Clone, Debug, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// A flag that is not raised.
    pub fn new() -> Self {
        Self::default()
    }

    /// Raises the flag: the sequence ends before its next forward call, or within the one under way
    /// if every other sequence of it is cancelled too.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether the flag is raised.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn flag(&self) -> &AtomicBool {
        &self.0
    }
}

/// A cache together with the ids it was computed from.
#[derive(Clone, Debug)]
pub struct CachedPrefix {
    ids: Vec<u32>,
    cache: KvCache,
}

impl CachedPrefix {
    /// Joins a cache with its ids.
    ///
    /// # Errors
    /// [`Error::Request`] if their lengths differ.
    pub fn new(ids: Vec<u32>, cache: KvCache) -> Result<Self> {
        if ids.len() != cache.len() {
            return Err(Error::Request(format!(
                "the cache holds {} tokens, but {} ids are given for it",
                cache.len(),
                ids.len()
            )));
        }
        Ok(Self { ids, cache })
    }

    /// The ids.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// The cache.
    pub fn cache(&self) -> &KvCache {
        &self.cache
    }

    /// Ids and cache.
    pub fn into_parts(self) -> (Vec<u32>, KvCache) {
        (self.ids, self.cache)
    }

    /// The cache cut to what it shares with `prompt`, but to one token less than the prompt: the
    /// last one must run to give logits.
    pub(super) fn into_common(mut self, prompt: &[u32]) -> Result<KvCache> {
        let shared = self
            .ids
            .iter()
            .zip(prompt)
            .take_while(|(cached, wanted)| cached == wanted)
            .count();
        self.cache
            .truncate(shared.min(prompt.len().saturating_sub(1)))?;
        Ok(self.cache)
    }
}

/// Something that happened to a sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Number of the sequence, as [`super::Generator::add`] gave it.
    pub sequence: usize,
    /// What happened.
    pub kind: EventKind,
}

impl Event {
    /// The text that this event adds to the answer.
    pub fn text(&self) -> &str {
        match &self.kind {
            EventKind::Token(token) => &token.text,
            EventKind::Finished(finished) => &finished.text,
        }
    }
}

/// What happened to a sequence.
#[derive(Clone, Debug, PartialEq)]
pub enum EventKind {
    /// A token was generated.
    Token(Token),
    /// The sequence is complete.
    Finished(Finished),
}

/// A generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Its log-probability in the model's own distribution, if asked for.
    pub logprob: Option<f32>,
    /// The most likely tokens at this place with their log-probabilities, if asked for.
    pub top_logprobs: Vec<(u32, f32)>,
    /// The text that has become certain with it: often the token's, sometimes none (an incomplete
    /// character, a possible stop string), sometimes that of several tokens.
    pub text: String,
}

/// The end of a sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// Why it ended.
    pub reason: FinishReason,
    /// Text that was withheld until now; usually none.
    pub text: String,
    /// What it took.
    pub usage: Usage,
}

/// Why a sequence ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop id was generated.
    Stop(u32),
    /// A stop string was completed.
    StopString(String),
    /// `max_new_tokens` were generated.
    Length,
    /// The sequence is as long as the model allows.
    ContextFull,
    /// It was cancelled.
    Cancelled,
}

/// What a sequence took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them that came from a cache and did not run.
    pub cached_tokens: usize,
    /// Tokens generated, a stop token included.
    pub completion_tokens: usize,
    /// Time from the first forward call to the first token. Other sequences of the same calls
    /// share it.
    pub prefill_time: Duration,
    /// Time from the first token to the last.
    pub decode_time: Duration,
}

impl Usage {
    /// Generated tokens per second after the first one; `None` if there is only one.
    pub fn tokens_per_second(&self) -> Option<f64> {
        let tokens = self.completion_tokens.checked_sub(1)?;
        let seconds = self.decode_time.as_secs_f64();
        (tokens > 0 && seconds > 0.0).then(|| tokens as f64 / seconds)
    }
}
