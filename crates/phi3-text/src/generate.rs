//! Generation: several sequences at once, one packed forward call per step.
//!
//! A [`Generator`] holds a model and a tokenizer and takes [`Request`]s at any time. As an iterator
//! it gives [`Event`]s: each token with the text that has become certain, and the end of each
//! sequence with its reason and usage. Every forward call carries the next token of each sequence
//! that is decoding and a chunk of the prompts that are not there yet, so a new request does not
//! wait for the others to finish, nor do they wait for its prompt.
//!
//! What a sequence generates does not depend on the others beside it: its random numbers are its
//! own, and its logits are the same up to the rounding of f32 (the forward contract of `phi3-nn`).

use std::collections::{HashMap, VecDeque};

use candle_core::Tensor;
use phi3_nn::{CausalLm, Input, Span};

use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

mod request;
mod sequence;

pub use request::{
    CachedPrefix, CancelToken, Event, EventKind, FinishReason, Finished, Request, Token, Usage,
};

use sequence::Sequence;

/// Prompt rows of one forward call, unless set otherwise.
const PREFILL_ROWS: usize = 512;

/// Drives sequences on a model.
///
/// The iterator ends when no sequence is left; after [`Generator::add`] it goes on.
///
/// ```no_run
/// # fn run(model: &dyn phi3_nn::CausalLm, tokenizer: &phi3_text::Tokenizer) -> phi3_text::Result<()> {
/// use phi3_text::{Generator, Request};
/// let mut generator = Generator::new(model, tokenizer);
/// generator.add(Request::new(tokenizer.encode("The capital of France is", true)?))?;
/// for event in generator {
///     print!("{}", event?.text());
/// }
/// # Ok(())
/// # }
/// ```
pub struct Generator<'m> {
    model: &'m dyn CausalLm,
    tokenizer: &'m Tokenizer,
    prefill_rows: usize,
    live: Vec<Sequence<'m>>,
    events: VecDeque<Result<Event>>,
    caches: HashMap<usize, CachedPrefix>,
    next_number: usize,
}

impl<'m> Generator<'m> {
    /// A generator without sequences.
    pub fn new(model: &'m dyn CausalLm, tokenizer: &'m Tokenizer) -> Self {
        Self {
            model,
            tokenizer,
            prefill_rows: PREFILL_ROWS,
            live: Vec::new(),
            events: VecDeque::new(),
            caches: HashMap::new(),
            next_number: 0,
        }
    }

    /// The same generator with at most `rows` prompt tokens in one forward call (default 512, at
    /// least 1). Fewer let running sequences wait less for a new prompt and take longer for it.
    #[must_use]
    pub fn with_prefill_rows(mut self, rows: usize) -> Self {
        self.prefill_rows = rows.max(1);
        self
    }

    /// Adds a sequence and gives its number: 0 for the first, then counting up.
    ///
    /// # Errors
    /// [`Error::Request`] for an empty prompt, no new token, an empty stop string or a
    /// `logit_bias` outside the vocabulary; [`Error::PromptTooLong`]; a token id outside the
    /// vocabulary; [`Error::SamplingParameter`]. The other sequences are not affected.
    pub fn add(&mut self, request: Request) -> Result<usize> {
        let number = self.next_number;
        let sequence = Sequence::new(number, request, self.model.info(), self.tokenizer, || {
            self.model.new_cache()
        })?;
        self.live.push(sequence);
        self.next_number += 1;
        Ok(number)
    }

    /// Cancels a sequence: it ends before the next forward call. A number that is not running
    /// changes nothing.
    pub fn cancel(&mut self, sequence: usize) {
        let mut live = self.live.iter_mut();
        if let Some(found) = live.find(|live| live.number == sequence) {
            found.cancel();
        }
    }

    /// Sequences that are not finished.
    pub fn live(&self) -> usize {
        self.live.len()
    }

    /// Takes the cache of a finished sequence whose request said `keep_cache`, to be reused in a
    /// later request. `None` if there is none, or it was taken already.
    pub fn take_cache(&mut self, sequence: usize) -> Option<CachedPrefix> {
        self.caches.remove(&sequence)
    }

    /// One round: ends cancelled sequences, then runs one forward call for the others.
    fn advance(&mut self) {
        self.end_cancelled();
        if self.live.is_empty() {
            return;
        }
        match self.forward() {
            Ok(logits) => self.sample(logits),
            // All that took part are cancelled: the next round ends them.
            Err(Error::Model(phi3_nn::Error::Interrupted)) => {}
            Err(error) => {
                // Every sequence took part in the call, and would fail again.
                self.live.clear();
                self.events.push_back(Err(error));
            }
        }
    }

    fn end_cancelled(&mut self) {
        let (cancelled, live) = std::mem::take(&mut self.live)
            .into_iter()
            .partition(Sequence::is_cancelled);
        self.live = live;
        for mut sequence in cancelled {
            match sequence.finish(FinishReason::Cancelled) {
                Ok(finished) => self.end(sequence, finished),
                Err(source) => self.fail(&sequence, source),
            }
        }
    }

    /// Runs the next rows of all sequences; gives one row of logits for each that wants one.
    fn forward(&mut self) -> Result<Vec<Vec<f32>>> {
        let mut budget = self.prefill_rows;
        for sequence in &mut self.live {
            budget -= sequence.plan(budget);
        }
        let mut ids: Vec<u32> = Vec::new();
        let mut spans: Vec<Span<'_>> = Vec::new();
        let mut own_rows: Vec<(usize, Option<Tensor>)> = Vec::new();
        for sequence in self.live.iter_mut().filter(|sequence| sequence.rows > 0) {
            own_rows.push((sequence.rows, sequence.own_rows()?));
            let (rows, span) = sequence.span();
            ids.extend_from_slice(rows);
            spans.push(span);
        }
        let embeddings = embed(self.model, &ids, &own_rows)?;
        let input = match &embeddings {
            Some(rows) => Input::Embeddings(rows),
            None => Input::Ids(&ids),
        };
        let logits = self.model.forward(input, &mut spans, None)?;
        rows_of(&logits)
    }

    /// Chooses the next token of every sequence that got logits, and ends those that are complete.
    fn sample(&mut self, logits: Vec<Vec<f32>>) {
        let mut logits = logits.into_iter();
        for mut sequence in std::mem::take(&mut self.live) {
            if !sequence.has_logits() {
                self.live.push(sequence);
                continue;
            }
            let mut row = logits.next().unwrap_or_default();
            match sequence.step(&mut row) {
                Ok((token, finished)) => {
                    self.events.push_back(Ok(Event {
                        sequence: sequence.number,
                        kind: EventKind::Token(token),
                    }));
                    match finished {
                        Some(finished) => self.end(sequence, finished),
                        None => self.live.push(sequence),
                    }
                }
                Err(source) => self.fail(&sequence, source),
            }
        }
    }

    fn end(&mut self, sequence: Sequence<'m>, finished: Finished) {
        let number = sequence.number;
        self.events.push_back(Ok(Event {
            sequence: number,
            kind: EventKind::Finished(finished),
        }));
        if let Some(cache) = sequence.into_cache() {
            self.caches.insert(number, cache);
        }
    }

    fn fail(&mut self, sequence: &Sequence<'m>, source: Error) {
        self.events.push_back(Err(Error::Sequence {
            sequence: sequence.number,
            source: Box::new(source),
        }));
    }
}

impl Iterator for Generator<'_> {
    type Item = Result<Event>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Some(event);
            }
            if self.live.is_empty() {
                return None;
            }
            self.advance();
        }
    }
}

impl std::fmt::Debug for Generator<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Generator")
            .field("live", &self.live.len())
            .field("prefill_rows", &self.prefill_rows)
            .finish_non_exhaustive()
    }
}

/// A finished sequence, put together from its events.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// The whole answer.
    pub text: String,
    /// Every token, a stop token included.
    pub tokens: Vec<Token>,
    /// Why it ended.
    pub reason: FinishReason,
    /// What it took.
    pub usage: Usage,
}

impl Completion {
    /// The ids of the tokens.
    pub fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|token| token.id).collect()
    }
}

/// Runs requests side by side to their ends; the completions come in the order of the requests.
///
/// # Errors
/// The first error of any of them, as [`Generator::add`] and the generator's iterator give them.
pub fn complete(
    model: &dyn CausalLm,
    tokenizer: &Tokenizer,
    requests: impl IntoIterator<Item = Request>,
) -> Result<Vec<Completion>> {
    let mut generator = Generator::new(model, tokenizer);
    let mut completions: Vec<Completion> = Vec::new();
    for request in requests {
        generator.add(request)?;
        completions.push(Completion {
            text: String::new(),
            tokens: Vec::new(),
            reason: FinishReason::Cancelled,
            usage: Usage::default(),
        });
    }
    for event in generator {
        let event = event?;
        // Numbers count up from 0 in the order of adding.
        let Some(completion) = completions.get_mut(event.sequence) else {
            continue;
        };
        completion.text.push_str(event.text());
        match event.kind {
            EventKind::Token(token) => completion.tokens.push(token),
            EventKind::Finished(finished) => {
                completion.reason = finished.reason;
                completion.usage = finished.usage;
            }
        }
    }
    Ok(completions)
}

/// The rows of a batch in which a prompt brings its own; `None` if none does.
fn embed(
    model: &dyn CausalLm,
    ids: &[u32],
    own_rows: &[(usize, Option<Tensor>)],
) -> Result<Option<Tensor>> {
    if own_rows.iter().all(|(_, rows)| rows.is_none()) {
        return Ok(None);
    }
    let mut pieces = Vec::with_capacity(own_rows.len());
    let mut start = 0;
    for (len, rows) in own_rows {
        let ids = ids.get(start..start + len).unwrap_or_default();
        pieces.push(match rows {
            Some(rows) => rows.clone(),
            None => model.embed(ids)?,
        });
        start += len;
    }
    let rows = Tensor::cat(&pieces, 0).map_err(phi3_nn::Error::from)?; // [n, hidden]
    Ok(Some(rows))
}

/// The rows of `[rows, vocab_size]` in host memory.
fn rows_of(logits: &Tensor) -> Result<Vec<Vec<f32>>> {
    Ok(logits.to_vec2().map_err(phi3_nn::Error::from)?)
}

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;
