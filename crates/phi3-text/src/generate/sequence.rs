//! One sequence on its way from prompt to end.

use std::time::{Duration, Instant};

use candle_core::Tensor;
use phi3_nn::{KvCache, LogitRows, ModelInfo, Span};

use super::request::{CachedPrefix, CancelToken, FinishReason, Finished, Request};
use super::request::{Token, Usage};
use crate::error::{Error, Result};
use crate::sampling::{Sampled, Sampler};
use crate::stop::StopMatcher;
use crate::stream::DecodeStream;
use crate::tokenizer::Tokenizer;

/// A sequence that is not finished yet.
pub(super) struct Sequence<'m> {
    pub(super) number: usize,
    /// Prompt and generated tokens. Those up to the cache's length have run.
    ids: Vec<u32>,
    prompt_len: usize,
    /// The rows of the prompt, if they are not those of its ids.
    embeddings: Option<Tensor>,
    cached: usize,
    cache: KvCache,
    sampler: Sampler,
    stream: DecodeStream<'m>,
    matcher: StopMatcher,
    stop_ids: Vec<u32>,
    logprobs: Option<usize>,
    /// Length at which the sequence ends, and why it ends there.
    end: (usize, FinishReason),
    keep_cache: bool,
    cancel: CancelToken,
    cancelled: bool,
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    /// Rows of the forward call under way.
    pub(super) rows: usize,
}

impl<'m> Sequence<'m> {
    /// Checks a request and prepares its sequence.
    pub(super) fn new(
        number: usize,
        request: Request,
        info: &ModelInfo,
        tokenizer: &'m Tokenizer,
        new_cache: impl FnOnce() -> KvCache,
    ) -> Result<Self> {
        let prompt = request.prompt_ids;
        let context = info.max_position_embeddings;
        if prompt.is_empty() {
            let reason = "the prompt has no token; give at least one (a BOS token will do)";
            return Err(Error::Request(reason.to_owned()));
        }
        if prompt.len() >= context {
            return Err(Error::PromptTooLong {
                tokens: prompt.len(),
                context,
            });
        }
        let vocab_size = info.vocab_size;
        let outside = |id: &u32| usize::try_from(*id).is_ok_and(|id| id >= vocab_size);
        if let Some(rows) = &request.embeddings {
            let expected = [prompt.len(), info.hidden_size];
            if rows.dims() != expected {
                return Err(Error::Request(format!(
                    "`embeddings` is {:?}, expected {expected:?}: a row for each token of the prompt",
                    rows.dims()
                )));
            }
        } else if let Some(&id) = prompt.iter().find(|id| outside(id)) {
            return Err(phi3_nn::Error::TokenId { id, vocab_size }.into());
        }
        if let Some(id) = request.params.logit_bias.keys().find(|id| outside(id)) {
            return Err(Error::Request(format!(
                "`logit_bias` names the token {id}, but the model's vocabulary has {vocab_size}"
            )));
        }
        if request.max_new_tokens == 0 {
            let reason = "`max_new_tokens` is 0, expected at least 1";
            return Err(Error::Request(reason.to_owned()));
        }
        let mut sampler = Sampler::new(request.params)?;
        if request.embeddings.is_some() {
            let ids = prompt.iter().copied().filter(|id| !outside(id));
            sampler.observe_prompt(&ids.collect::<Vec<_>>());
        } else {
            sampler.observe_prompt(&prompt);
        }
        let matcher = StopMatcher::new(request.stop_strings)?;
        let stream = if request.continues_prompt {
            DecodeStream::continuing(tokenizer, request.skip_special, &prompt)
        } else {
            DecodeStream::new(tokenizer, request.skip_special)
        };
        let cache = match request.cache {
            Some(prefix) => prefix.into_common(&prompt)?,
            None => new_cache(),
        };
        let wanted = prompt.len().saturating_add(request.max_new_tokens);
        let end = if wanted <= context {
            (wanted, FinishReason::Length)
        } else {
            (context, FinishReason::ContextFull)
        };
        Ok(Self {
            number,
            prompt_len: prompt.len(),
            embeddings: request.embeddings,
            ids: prompt,
            cached: cache.len(),
            cache,
            sampler,
            stream,
            matcher,
            stop_ids: request.stop_ids,
            logprobs: request.logprobs,
            end,
            keep_cache: request.keep_cache,
            cancel: request.cancel,
            cancelled: false,
            started: None,
            first_token: None,
            last_token: None,
            rows: 0,
        })
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled || self.cancel.is_cancelled()
    }

    /// Cancels this sequence alone: the token of its request may be shared with others.
    pub(super) fn cancel(&mut self) {
        self.cancelled = true;
    }

    /// Whether the prompt has run and the sequence now goes token by token.
    fn is_decoding(&self) -> bool {
        self.ids.len() > self.prompt_len
    }

    /// Plans the rows of the next forward call: at most `budget` of a prompt, or the one token
    /// generated last. Gives how many prompt rows that takes.
    pub(super) fn plan(&mut self, budget: usize) -> usize {
        let open = self.ids.len() - self.cache.len();
        self.rows = if self.is_decoding() {
            open
        } else {
            open.min(budget)
        };
        if self.rows > 0 && self.started.is_none() {
            self.started = Some(Instant::now());
        }
        if self.is_decoding() { 0 } else { self.rows }
    }

    /// Whether the call that just ran gave this sequence logits.
    pub(super) fn has_logits(&self) -> bool {
        self.rows > 0 && self.cache.len() == self.ids.len()
    }

    /// The planned rows of a prompt that brings its own.
    pub(super) fn own_rows(&self) -> Result<Option<Tensor>> {
        match &self.embeddings {
            Some(rows) if !self.is_decoding() => {
                let rows = rows.narrow(0, self.cache.len(), self.rows);
                Ok(Some(rows.map_err(phi3_nn::Error::from)?))
            }
            _ => Ok(None),
        }
    }

    /// The planned ids and their span.
    pub(super) fn span(&mut self) -> (&[u32], Span<'_>) {
        let start = self.cache.len();
        let rows = if start + self.rows == self.ids.len() {
            LogitRows::Last
        } else {
            LogitRows::None
        };
        let ids = self.ids.get(start..start + self.rows).unwrap_or_default();
        // A prompt in chunks is known to reach its end; LongRoPE then chooses its factors once.
        let span = Span::new(self.rows, &mut self.cache)
            .with_logits(rows)
            .reaching(self.ids.len())
            .interrupted_by(self.cancel.flag());
        (ids, span)
    }

    /// Chooses the next token from its logits. Gives the token, and the end if this is it.
    pub(super) fn step(&mut self, logits: &mut [f32]) -> Result<(Token, Option<Finished>)> {
        let Sampled {
            id,
            logprob,
            top_logprobs,
        } = self.sampler.sample(logits, self.logprobs)?;
        let now = Instant::now();
        self.first_token.get_or_insert(now);
        self.last_token = Some(now);
        self.ids.push(id);

        let mut token = Token {
            id,
            logprob,
            top_logprobs,
            text: String::new(),
        };
        if self.stop_ids.contains(&id) {
            let finished = self.finish(FinishReason::Stop(id))?;
            return Ok((token, Some(finished)));
        }
        let decoded = self.stream.push(id)?;
        let (text, stop) = self.matcher.push(&decoded);
        token.text = text;
        let reason = match stop {
            Some(stop) => FinishReason::StopString(stop),
            None if self.ids.len() >= self.end.0 => self.end.1.clone(),
            None => return Ok((token, None)),
        };
        Ok((token, Some(self.finish(reason)?)))
    }

    /// The end of the sequence: withheld text is let go, unless a stop string already cut it.
    pub(super) fn finish(&mut self, reason: FinishReason) -> Result<Finished> {
        let mut reason = reason;
        let mut text = String::new();
        if !matches!(reason, FinishReason::StopString(_)) {
            let (before, stop) = self.matcher.push(&self.stream.finish()?);
            text = before;
            match stop {
                // The last characters, complete only now, are those of a stop string.
                Some(stop) if reason != FinishReason::Cancelled => {
                    reason = FinishReason::StopString(stop);
                }
                Some(_) => {}
                None => text.push_str(&self.matcher.finish()),
            }
        }
        Ok(Finished {
            reason,
            text,
            usage: self.usage(),
        })
    }

    fn usage(&self) -> Usage {
        let between = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
            (Some(from), Some(to)) => to.saturating_duration_since(from),
            _ => Duration::ZERO,
        };
        Usage {
            prompt_tokens: self.prompt_len,
            cached_tokens: self.cached,
            completion_tokens: self.ids.len() - self.prompt_len,
            prefill_time: between(self.started, self.first_token),
            decode_time: between(self.first_token, self.last_token),
        }
    }

    /// What can be reused later, if the request asked to keep it.
    pub(super) fn into_cache(mut self) -> Option<CachedPrefix> {
        if !self.keep_cache {
            return None;
        }
        self.ids.truncate(self.cache.len());
        CachedPrefix::new(self.ids, self.cache).ok()
    }
}
