//! From logits to the next token.
//!
//! The steps come in the order of transformers' `generate`: logit bias, repetition penalty,
//! presence and frequency penalties, temperature, top-k, top-p, min-p, then one draw. Temperature 0
//! is greedy: the highest logit after the penalties, of equal ones the lowest id.
//!
//! Log-probabilities are those of the model: of the logits as they came, before all of these steps.
//!
//! Each sequence has its own [`Sampler`] with its own stream of random numbers (ChaCha12 keyed by
//! the seed, one 64-bit number for each drawn token), so what a seed gives depends neither on the
//! platform nor on which other sequences run beside it.

use std::collections::{BTreeMap, HashMap};

use rand::RngCore;
use rand::SeedableRng;
use rand_chacha::ChaCha12Rng;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

mod candidates;

use candidates::Candidates;

/// How tokens are chosen. The default is plain sampling from the model's distribution.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SamplingParams {
    /// Divides the logits, at least 0; 0 chooses greedily.
    pub temperature: f32,
    /// Keeps the `k` most likely tokens; of equal ones the lower ids.
    pub top_k: Option<usize>,
    /// Keeps the fewest most likely tokens whose probabilities reach this sum, in (0, 1].
    pub top_p: Option<f32>,
    /// Keeps tokens at least this many times as likely as the most likely one, in [0, 1].
    pub min_p: Option<f32>,
    /// Divides positive and multiplies negative logits of all tokens seen so far, prompt included;
    /// above 0, where 1 changes nothing (transformers' `repetition_penalty`).
    pub repetition_penalty: f32,
    /// Subtracted from the logit of every token generated so far, in [-2, 2] (OpenAI's meaning).
    pub presence_penalty: f32,
    /// Subtracted from a token's logit once for every time it was generated, in [-2, 2] (OpenAI's
    /// meaning).
    pub frequency_penalty: f32,
    /// Added to the logits of these ids; minus infinity forbids a token.
    pub logit_bias: BTreeMap<u32, f32>,
    /// Seed of the random numbers; `None` takes one from the operating system.
    pub seed: Option<u64>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: None,
            top_p: None,
            min_p: None,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: BTreeMap::new(),
            seed: None,
        }
    }
}

impl SamplingParams {
    /// Always the most likely token.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            ..Self::default()
        }
    }

    /// Checks every range.
    ///
    /// # Errors
    /// [`Error::SamplingParameter`] naming the first parameter outside its range.
    pub fn validate(&self) -> Result<()> {
        let check = |name, value: f32, valid: bool, expected| {
            if valid {
                return Ok(());
            }
            let value = value.to_string();
            Err(Error::SamplingParameter {
                name,
                value,
                expected,
            })
        };
        let penalty = -2.0..=2.0;
        check(
            "temperature",
            self.temperature,
            self.temperature.is_finite() && self.temperature >= 0.0,
            "expected a number of at least 0",
        )?;
        if self.top_k == Some(0) {
            let expected = "expected at least 1, or nothing to keep all tokens";
            check("top_k", 0.0, false, expected)?;
        }
        if let Some(top_p) = self.top_p {
            let expected = "expected more than 0 and at most 1";
            check("top_p", top_p, top_p > 0.0 && top_p <= 1.0, expected)?;
        }
        if let Some(min_p) = self.min_p {
            let expected = "expected 0 to 1";
            check("min_p", min_p, (0.0..=1.0).contains(&min_p), expected)?;
        }
        check(
            "repetition_penalty",
            self.repetition_penalty,
            self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0,
            "expected more than 0",
        )?;
        for (name, value) in [
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ] {
            check(name, value, penalty.contains(&value), "expected -2 to 2")?;
        }
        for &bias in self.logit_bias.values() {
            let expected = "expected a finite number, or minus infinity to forbid the token";
            let valid = bias.is_finite() || bias == f32::NEG_INFINITY;
            check("logit_bias", bias, valid, expected)?;
        }
        Ok(())
    }
}

/// The outcome of one step.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The chosen token.
    pub id: u32,
    /// Its log-probability, if log-probabilities were asked for.
    pub logprob: Option<f32>,
    /// The most likely tokens with their log-probabilities, most likely first, of equal ones the
    /// lower id first; as many as asked for.
    pub top_logprobs: Vec<(u32, f32)>,
}

/// Chooses the tokens of one sequence.
///
/// ```
/// use phi3_text::{Sampler, SamplingParams};
/// let mut sampler = Sampler::new(SamplingParams::greedy())?;
/// let sampled = sampler.sample(&mut [0.0, 2.0, 1.0], None)?;
/// assert_eq!(sampled.id, 1);
/// # Ok::<(), phi3_text::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
    seed: u64,
    random: ChaCha12Rng,
    /// How often each token seen so far was generated; 0 if it was only in the prompt.
    seen: HashMap<u32, u32>,
    candidates: Candidates,
}

impl Sampler {
    /// A sampler for a new sequence.
    ///
    /// # Errors
    /// As [`SamplingParams::validate`].
    pub fn new(params: SamplingParams) -> Result<Self> {
        params.validate()?;
        let seed = params.seed.unwrap_or_else(|| rand::rng().next_u64());
        let mut key = [0; 32];
        for (byte, seed) in key.iter_mut().zip(seed.to_le_bytes()) {
            *byte = seed;
        }
        Ok(Self {
            params,
            seed,
            random: ChaCha12Rng::from_seed(key),
            seen: HashMap::new(),
            candidates: Candidates::default(),
        })
    }

    /// The seed in use, also if it came from the operating system: it repeats the run.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The parameters in use.
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// Makes the prompt known to the repetition penalty.
    pub fn observe_prompt(&mut self, ids: &[u32]) {
        #[expect(
            clippy::float_cmp,
            reason = "exactly 1 is the value that changes nothing"
        )]
        if self.params.repetition_penalty != 1.0 {
            for &id in ids {
                self.seen.entry(id).or_insert(0);
            }
        }
    }

    /// Chooses the next token from a row of logits, which it changes, and remembers it for the
    /// penalties.
    ///
    /// With `logprobs` the log-probability of the chosen token is given, and that many of the most
    /// likely ones.
    ///
    /// # Errors
    /// [`Error::BadLogit`] if a logit is not a number or infinitely high, [`Error::NoCandidate`] if
    /// all are minus infinity.
    pub fn sample(&mut self, logits: &mut [f32], logprobs: Option<usize>) -> Result<Sampled> {
        let bad = |value: &f32| value.is_nan() || *value == f32::INFINITY;
        if let Some(id) = logits.iter().position(bad) {
            let value = logits.get(id).copied().unwrap_or(f32::NAN);
            return Err(Error::BadLogit { id, value });
        }
        let wanted = logprobs.map(|top| (log_sum_exp(logits), top));
        let (mut top_logprobs, mut unchanged) = (Vec::new(), Vec::new());
        if let Some((norm, top)) = wanted {
            self.candidates.fill(logits, 1.0);
            self.candidates.keep_top(top);
            top_logprobs.extend(
                self.candidates
                    .sorted()
                    .map(|(id, logit)| (id, logprob(logit, norm))),
            );
            unchanged.extend_from_slice(logits);
        }
        self.penalize(logits);
        let id = self.choose(logits)?;
        let count = self.seen.entry(id).or_insert(0);
        *count = count.saturating_add(1);
        let chosen = usize::try_from(id).ok().and_then(|id| unchanged.get(id));
        Ok(Sampled {
            id,
            logprob: wanted
                .zip(chosen)
                .map(|((norm, _), &logit)| logprob(logit, norm)),
            top_logprobs,
        })
    }

    fn penalize(&self, logits: &mut [f32]) {
        let params = &self.params;
        for (&id, bias) in &params.logit_bias {
            if let Some(logit) = at(logits, id) {
                *logit += bias;
            }
        }
        for (&id, &count) in &self.seen {
            let Some(logit) = at(logits, id) else {
                continue;
            };
            if *logit < 0.0 {
                *logit *= params.repetition_penalty;
            } else {
                *logit /= params.repetition_penalty;
            }
            if count > 0 {
                *logit -= params.presence_penalty + params.frequency_penalty * count as f32;
            }
        }
    }

    fn choose(&mut self, logits: &[f32]) -> Result<u32> {
        let params = &self.params;
        if params.temperature == 0.0 {
            return argmax(logits).ok_or(Error::NoCandidate);
        }
        let candidates = &mut self.candidates;
        candidates.fill(logits, params.temperature);
        if candidates.is_empty() {
            return Err(Error::NoCandidate);
        }
        if let Some(top_k) = params.top_k {
            candidates.keep_top(top_k);
        }
        if let Some(top_p) = params.top_p.filter(|&top_p| top_p < 1.0) {
            candidates.keep_mass(f64::from(top_p));
        }
        if let Some(min_p) = params.min_p {
            candidates.keep_likely(f64::from(min_p));
        }
        // 53 random bits make every multiple of 2^-53 in [0, 1) equally likely.
        let draw = (self.random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        candidates.pick(draw).ok_or(Error::NoCandidate)
    }
}

fn at(logits: &mut [f32], id: u32) -> Option<&mut f32> {
    logits.get_mut(usize::try_from(id).ok()?)
}

/// The lowest id with the highest logit above minus infinity.
fn argmax(logits: &[f32]) -> Option<u32> {
    let mut best = None;
    let mut highest = f32::NEG_INFINITY;
    for (id, &logit) in logits.iter().enumerate() {
        if logit > highest {
            highest = logit;
            best = u32::try_from(id).ok();
        }
    }
    best
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let highest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits
        .iter()
        .map(|&logit| (f64::from(logit) - highest).exp())
        .sum();
    highest + sum.ln()
}

fn logprob(logit: f32, norm: f64) -> f32 {
    (f64::from(logit) - norm) as f32
}

#[cfg(test)]
mod tests;
