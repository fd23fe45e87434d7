//! Running the tests.

use std::time::Instant;

use anyhow::{Context, Result};
use phi3::nn::{CacheSpec, CausalLm, Input, KvCache, LogitRows, Span};

use super::machine;
use crate::output::note;

/// Tokens of a prompt that run in one call, as many as a generator takes.
const CHUNK: usize = 512;

/// Most tokens of the warm-up.
const WARM_UP: usize = 32;

/// One test: a prompt or a generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Test {
    /// Tokens of the prompt, or 0.
    pub n_prompt: usize,
    /// Tokens to generate, or 0.
    pub n_gen: usize,
    /// Tokens in the cache before.
    pub depth: usize,
    /// Sequences at once.
    pub batch: usize,
}

/// What a test gave.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// The test.
    pub test: Test,
    /// Threads that ran it.
    pub threads: usize,
    /// Seconds of each repetition.
    pub seconds: Vec<f64>,
    /// The most memory until now.
    pub peak_memory: Option<u64>,
    /// Bytes of keys and values that a step reads of the sequences, on average.
    pub cache_bytes: f64,
}

/// The middle of some numbers, and their ends.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Spread {
    /// Half of the numbers are below it.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Test {
    /// Tokens that each sequence grows by.
    pub fn tokens(&self) -> usize {
        self.n_prompt + self.n_gen
    }

    /// `pp512` or `tg64`, as llama-bench calls them.
    pub fn name(&self) -> String {
        match self.n_gen {
            0 => format!("pp{}", self.n_prompt),
            n_gen => format!("tg{n_gen}"),
        }
    }
}

impl Measured {
    /// Tokens of all sequences a second.
    pub fn tokens_per_second(&self) -> Spread {
        let tokens = (self.test.tokens() * self.test.batch) as f64;
        Spread::of(self.seconds.iter().map(|seconds| tokens / seconds))
    }

    /// The test and its speed, for the user who waits.
    pub fn line(&self) -> String {
        let Test { depth, batch, .. } = self.test;
        let speed = self.tokens_per_second();
        format!(
            "{} at depth {depth}, batch {batch}, {} threads: {:.2} tokens/s ({:.2} to {:.2})",
            self.test.name(),
            self.threads,
            speed.median,
            speed.min,
            speed.max
        )
    }
}

impl Spread {
    /// Of no number it is 0.
    pub fn of(numbers: impl Iterator<Item = f64>) -> Self {
        let mut numbers: Vec<f64> = numbers.collect();
        numbers.sort_by(f64::total_cmp);
        let at = |idx: usize| numbers.get(idx).copied().unwrap_or(0.0);
        let last = numbers.len().saturating_sub(1);
        Self {
            median: (at(last / 2) + at(last.div_ceil(2))) / 2.0,
            min: at(0),
            max: at(last),
        }
    }
}

/// A model under test, and the caches of its sequences.
pub struct Bench<'m> {
    model: &'m dyn CausalLm,
    spec: CacheSpec,
    repeat: usize,
    ids: RandomIds,
    depth: usize,
    /// Length that sequences are known to reach at this depth, the same for all tests, so that all
    /// use the same LongRoPE factors.
    reaches: usize,
    caches: Vec<KvCache>,
    /// The cache as it was filled, where a window makes truncating it expensive.
    filled: Option<KvCache>,
}

impl<'m> Bench<'m> {
    pub fn new(model: &'m dyn CausalLm, spec: CacheSpec, repeat: usize) -> Self {
        Self {
            model,
            spec,
            repeat,
            ids: RandomIds(model.info().vocab_size),
            depth: 0,
            reaches: 0,
            caches: Vec::new(),
            filled: None,
        }
    }

    /// Reads one token and chooses the next: all weights are used once.
    pub fn first_token(&mut self) -> Result<()> {
        let mut cache = self.model.new_cache();
        let ids = self.ids.take(0, 1);
        let span = Span::new(1, &mut cache);
        choose(self.model, &ids, &mut [span])
    }

    /// Fills a cache with `depth` random tokens, for tests of at most `tokens` more.
    pub fn fill(&mut self, depth: usize, tokens: usize) -> Result<()> {
        let mut cache = self.model.new_cache();
        let reaches = depth + tokens;
        let ids = self.ids.take(0, depth);
        for chunk in ids.chunks(CHUNK) {
            let span = Span::new(chunk.len(), &mut cache)
                .reaching(reaches)
                .with_logits(LogitRows::None);
            self.model.forward(Input::Ids(chunk), &mut [span], None)?;
        }
        let windowed = |pattern: &phi3::nn::AttentionPattern| pattern.window().is_some();
        self.filled = self
            .spec
            .patterns
            .iter()
            .any(windowed)
            .then(|| cache.clone());
        self.caches = vec![cache];
        (self.depth, self.reaches) = (depth, reaches);
        Ok(())
    }

    /// Runs a test; `None`, with a note to the user, if its caches do not fit into memory.
    pub fn run(&mut self, test: &Test) -> Result<Option<Measured>> {
        if let Some(missing) = self.missing_memory(test) {
            note(&format!(
                "left out {} at depth {}: the caches of {} sequences need {:.1} GB more than is free",
                test.name(),
                test.depth,
                test.batch,
                missing / 1e9
            ));
            return Ok(None);
        }
        let warm_up = match test.n_gen {
            0 => Test {
                n_prompt: test.n_prompt.min(WARM_UP),
                ..*test
            },
            _ => Test { n_gen: 1, ..*test },
        };
        self.once(&warm_up)?;
        let seconds: Result<Vec<f64>> = (0..self.repeat).map(|_| self.once(test)).collect();
        let mean_length = test.depth + test.tokens() / 2;
        Ok(Some(Measured {
            test: *test,
            threads: phi3::num_threads(),
            seconds: seconds?,
            peak_memory: machine::peak_memory(),
            cache_bytes: self.spec.bytes_read_at(mean_length) as f64 * test.batch as f64,
        }))
    }

    /// Bytes that the caches of a test need beyond what is there and free.
    fn missing_memory(&self, test: &Test) -> Option<f64> {
        let held: usize = self.caches.iter().map(KvCache::size_in_bytes).sum();
        let copies = test.batch + usize::from(self.filled.is_some());
        let needed = self.spec.bytes_at(test.depth + test.tokens()) as f64 * copies as f64;
        let free = machine::available_memory()? as f64 * 0.95 + held as f64;
        (needed > free).then_some(needed - free)
    }

    /// Seconds of a test, on caches that hold what they were filled with.
    fn once(&mut self, test: &Test) -> Result<f64> {
        self.prepare(test.batch)?;
        match test.n_gen {
            0 => self.prompt(test.n_prompt),
            n_gen => self.generate(n_gen),
        }
    }

    fn prepare(&mut self, batch: usize) -> Result<()> {
        match &self.filled {
            Some(filled) => {
                self.caches.clear();
                self.caches.resize_with(batch, || filled.unshared());
            }
            None => {
                self.caches.truncate(batch);
                for cache in &mut self.caches {
                    cache.truncate(self.depth)?;
                }
                let first = self.caches.first().context("no cache was filled")?.clone();
                self.caches.resize_with(batch, || first.unshared());
            }
        }
        Ok(())
    }

    fn prompt(&mut self, tokens: usize) -> Result<f64> {
        let ids = self.ids.take(self.depth, tokens);
        let cache = self.caches.first_mut().context("no cache was filled")?;
        let start = Instant::now();
        let mut left = ids.as_slice();
        while left.len() > CHUNK {
            let (chunk, rest) = left.split_at(CHUNK);
            let span = Span::new(CHUNK, cache)
                .reaching(self.reaches)
                .with_logits(LogitRows::None);
            self.model.forward(Input::Ids(chunk), &mut [span], None)?;
            left = rest;
        }
        let span = Span::new(left.len(), cache).reaching(self.reaches);
        choose(self.model, left, &mut [span])?;
        Ok(start.elapsed().as_secs_f64())
    }

    fn generate(&mut self, tokens: usize) -> Result<f64> {
        let batch = self.caches.len();
        let steps: Vec<Vec<u32>> = (0..tokens)
            .map(|step| self.ids.take(self.depth + step * batch, batch))
            .collect();
        let start = Instant::now();
        for ids in &steps {
            let caches = self.caches.iter_mut();
            let spans = caches.map(|cache| Span::new(1, cache).reaching(self.reaches));
            choose(self.model, ids, &mut spans.collect::<Vec<_>>())?;
        }
        Ok(start.elapsed().as_secs_f64())
    }
}

/// A call, and the most likely next token of each of its sequences.
fn choose(model: &dyn CausalLm, ids: &[u32], spans: &mut [Span<'_>]) -> Result<()> {
    let logits = model.forward(Input::Ids(ids), spans, None)?;
    for row in logits.to_vec2::<f32>()? {
        phi3::argmax(&row).context("the logits hold no number to choose by")?;
    }
    Ok(())
}

/// Random ids below a vocabulary's size, the same in every run.
struct RandomIds(usize);

impl RandomIds {
    fn take(&self, from: usize, count: usize) -> Vec<u32> {
        let id = |position: usize| {
            // The finalizer of SplitMix64.
            let mut z = (position as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            let id = (z ^ (z >> 31)) % self.0.max(1) as u64;
            u32::try_from(id).unwrap_or(0)
        };
        (from..from + count).map(id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_the_middle_and_the_ends() {
        let of = |numbers: &[f64]| {
            let Spread { median, min, max } = Spread::of(numbers.iter().copied());
            (median, min, max)
        };
        assert_eq!(of(&[3.0, 1.0, 2.0]), (2.0, 1.0, 3.0));
        assert_eq!(of(&[4.0, 1.0, 2.0, 10.0]), (3.0, 1.0, 10.0));
        assert_eq!(of(&[7.0]), (7.0, 7.0, 7.0));
        assert_eq!(of(&[]), (0.0, 0.0, 0.0));
    }

    #[test]
    fn speed_counts_the_tokens_of_all_sequences() {
        let measured = Measured {
            test: Test {
                n_prompt: 0,
                n_gen: 64,
                depth: 4096,
                batch: 4,
            },
            threads: 2,
            seconds: vec![16.0, 8.0, 32.0],
            peak_memory: None,
            cache_bytes: 0.0,
        };
        let speed = measured.tokens_per_second();
        assert_eq!((speed.median, speed.min, speed.max), (16.0, 8.0, 32.0));
        let line = measured.line();
        assert!(
            line.starts_with("tg64 at depth 4096, batch 4, 2 threads: 16.00"),
            "{line}"
        );
    }

    #[test]
    fn ids_are_those_of_the_vocabulary() {
        let ids = RandomIds(10).take(5, 1000);
        assert!(ids.iter().all(|id| *id < 10) && (0..10).all(|id| ids.contains(&id)));
        assert_eq!(ids[3], RandomIds(10).take(8, 1)[0]);
    }
}
