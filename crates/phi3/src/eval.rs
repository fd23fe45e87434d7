//! How much a model differs from another one of the same vocabulary: what quantizing costs.

use std::ops::ControlFlow;

use phi3_nn::{CausalLm, Input, LogitRows, Span};
use serde::Serialize;

use crate::error::{Error, Result};

/// How to walk through a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EvalOptions {
    /// Tokens of a window. Windows do not overlap and know nothing of each other; the second half
    /// of each is scored, so that every scored token has half a window of context.
    pub window: usize,
    /// Windows in one packed call.
    pub batch: usize,
}

impl Default for EvalOptions {
    fn default() -> Self {
        Self {
            window: 512,
            batch: 2,
        }
    }
}

/// Two models on one text. Logarithms are natural; divergences are those of the reference's
/// distribution of the next token from the model's, `sum p_ref ln(p_ref / p)`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// Scored tokens.
    pub tokens: usize,
    /// `exp` of the mean negative log-probability of the text's next token.
    pub perplexity: f64,
    /// The same of the reference.
    pub reference_perplexity: f64,
    /// Mean divergence.
    pub mean_kl: f64,
    /// Standard error of the mean.
    pub mean_kl_error: f64,
    /// Median divergence.
    pub median_kl: f64,
    /// The divergence that one in a thousand tokens exceeds.
    pub kl_99_9: f64,
    /// Largest divergence.
    pub max_kl: f64,
    /// Share of the tokens at which both models prefer the same next token.
    pub same_top: f64,
}

/// Compares `model` with `reference` on the text of `ids`; `on_progress` hears the number of tokens
/// done and of all, and says whether to go on. After a break the result covers what was done.
///
/// # Errors
/// [`Error::Evaluation`] if the vocabularies differ, the window is too small or longer than a model
/// allows, or the text does not fill one window; whatever a forward call returns.
pub fn compare(
    model: &dyn CausalLm,
    reference: &dyn CausalLm,
    ids: &[u32],
    options: EvalOptions,
    on_progress: impl FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Comparison> {
    let found = compare_all(&[model], reference, ids, options, on_progress)?;
    found.into_iter().next().ok_or_else(|| Error::Evaluation {
        reason: "there is no model to compare".to_owned(),
    })
}

/// [`compare`] of several models with one reference, which runs only once.
///
/// # Errors
/// As [`compare`].
pub fn compare_all(
    models: &[&dyn CausalLm],
    reference: &dyn CausalLm,
    ids: &[u32],
    options: EvalOptions,
    mut on_progress: impl FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Vec<Comparison>> {
    for model in models {
        check(*model, reference, ids, options)?;
    }
    let vocab = reference.info().vocab_size;
    let windows: Vec<&[u32]> = ids.chunks_exact(options.window).collect();
    let mut scores = vec![Vec::new(); models.len()];
    for (i, batch) in windows.chunks(options.batch.max(1)).enumerate() {
        let done = i * options.batch.max(1) * options.window;
        if on_progress(done, windows.len() * options.window).is_break() && i > 0 {
            break;
        }
        let next: Vec<usize> = batch
            .iter()
            .flat_map(|window| &window[window.len() / 2..])
            .map(|id| *id as usize)
            .collect();
        let theirs = logits(reference, batch)?;
        for (model, scores) in models.iter().zip(&mut scores) {
            let ours = logits(*model, batch)?;
            scores.extend(score_rows(&ours, &theirs, &next, vocab));
        }
    }
    Ok(scores.iter().map(|scores| summarize(scores)).collect())
}

/// The scores of all rows, on as many threads as the kernels have: exponentials of whole
/// vocabularies in f64 would else take as long as the models.
fn score_rows(ours: &[f32], theirs: &[f32], next: &[usize], vocab: usize) -> Vec<Score> {
    let rows = next.len().div_ceil(phi3_kernels::num_threads()).max(1);
    let parts = ours
        .chunks(rows * vocab)
        .zip(theirs.chunks(rows * vocab))
        .zip(next.chunks(rows));
    std::thread::scope(|scope| {
        let handles: Vec<_> = parts
            .map(|((ours, theirs), next)| {
                scope.spawn(move || {
                    let rows = ours.chunks(vocab).zip(theirs.chunks(vocab)).zip(next);
                    rows.map(|((ours, theirs), next)| Score::new(ours, theirs, *next))
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        handles
            .into_iter()
            .flat_map(|handle| handle.join().expect("scoring a row cannot panic"))
            .collect()
    })
}

fn check(
    model: &dyn CausalLm,
    reference: &dyn CausalLm,
    ids: &[u32],
    options: EvalOptions,
) -> Result<()> {
    let fail = |reason: String| Err(Error::Evaluation { reason });
    let (ours, theirs) = (model.info(), reference.info());
    if ours.vocab_size != theirs.vocab_size {
        return fail(format!(
            "the model has {} tokens, the reference {}",
            ours.vocab_size, theirs.vocab_size
        ));
    }
    if options.window < 2 {
        return fail("a window has at least 2 tokens".to_owned());
    }
    let longest = ours
        .max_position_embeddings
        .min(theirs.max_position_embeddings);
    if options.window > longest {
        return fail(format!(
            "the window of {} tokens is longer than the {longest} that the models allow",
            options.window
        ));
    }
    if ids.len() < options.window {
        return fail(format!(
            "the text has {} tokens, less than one window of {}: take a longer text or a smaller window \
             (--window)",
            ids.len(),
            options.window
        ));
    }
    Ok(())
}

/// Logits of the rows that predict the second half of each window, `[rows, v]`.
fn logits(model: &dyn CausalLm, windows: &[&[u32]]) -> Result<Vec<f32>> {
    let mut caches: Vec<_> = windows.iter().map(|_| model.new_cache()).collect();
    let mut ids = Vec::new();
    let mut spans = Vec::new();
    let vocab = model.info().vocab_size;
    let mut row = 0;
    for (window, cache) in windows.iter().zip(&mut caches) {
        // The last token of a window predicts nothing that is known.
        let (len, scored) = (window.len() - 1, window.len() - window.len() / 2);
        ids.extend_from_slice(&window[..len]);
        spans.push(Span::new(len, cache).with_logits(LogitRows::LastN(scored)));
        row += scored.min(len);
    }
    let all = model.forward(Input::Ids(&ids), &mut spans, None)?;
    let all = all.flatten_all().and_then(|all| all.to_vec1::<f32>());
    let all = all.map_err(phi3_nn::Error::from)?;
    debug_assert_eq!(all.len(), row * vocab);
    Ok(all)
}

/// One token.
#[derive(Clone, Copy)]
struct Score {
    /// Negative log-probabilities of the text's token.
    loss: f64,
    reference_loss: f64,
    kl: f64,
    same_top: bool,
}

impl Score {
    fn new(ours: &[f32], theirs: &[f32], next: usize) -> Self {
        let (log_ours, log_theirs) = (log_sum_exp(ours), log_sum_exp(theirs));
        let mut kl = 0.0;
        for (ours, theirs) in ours.iter().zip(theirs) {
            let theirs = f64::from(*theirs) - log_theirs;
            kl += theirs.exp() * (theirs - (f64::from(*ours) - log_ours));
        }
        let loss = |logits: &[f32], log: f64| {
            log - logits
                .get(next)
                .map_or(f64::NEG_INFINITY, |l| f64::from(*l))
        };
        Self {
            loss: loss(ours, log_ours),
            reference_loss: loss(theirs, log_theirs),
            // Below zero only by rounding.
            kl: kl.max(0.0),
            same_top: phi3_kernels::argmax(ours) == phi3_kernels::argmax(theirs),
        }
    }
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|l| f64::from(*l - max).exp()).sum();
    f64::from(max) + sum.ln()
}

fn summarize(scores: &[Score]) -> Comparison {
    let count = scores.len() as f64;
    let mean = |value: fn(&Score) -> f64| scores.iter().map(value).sum::<f64>() / count;
    let mean_kl = mean(|score| score.kl);
    let variance = scores.iter().map(|s| (s.kl - mean_kl).powi(2)).sum::<f64>() / count;
    let mut sorted: Vec<f64> = scores.iter().map(|score| score.kl).collect();
    sorted.sort_by(f64::total_cmp);
    let quantile = |share: f64| {
        let last = sorted.len().saturating_sub(1);
        let place = (share * last as f64).round() as usize;
        sorted.get(place.min(last)).copied().unwrap_or(f64::NAN)
    };
    Comparison {
        tokens: scores.len(),
        perplexity: mean(|score| score.loss).exp(),
        reference_perplexity: mean(|score| score.reference_loss).exp(),
        mean_kl,
        mean_kl_error: (variance / count).sqrt(),
        median_kl: quantile(0.5),
        kl_99_9: quantile(0.999),
        max_kl: quantile(1.0),
        same_top: mean(|score| f64::from(u8::from(score.same_top))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_by_hand() {
        // Probabilities 1/2, 1/2 against 1/4, 3/4.
        let (ours, theirs) = ([1f32.ln(), 3f32.ln()], [0.0, 0.0]);
        let score = Score::new(&ours, &theirs, 0);
        let expected = 0.5 * (0.5f64 / 0.25).ln() + 0.5 * (0.5f64 / 0.75).ln();
        assert!((score.kl - expected).abs() < 1e-7);
        assert!((score.loss - 4f64.ln()).abs() < 1e-6);
        assert!((score.reference_loss - 2f64.ln()).abs() < 1e-6);
        let same = Score::new(&ours, &ours, 1);
        assert!(same.kl < 1e-12 && same.same_top);
    }

    #[test]
    fn summary_by_hand() {
        let score = |kl: f64, same_top| Score {
            loss: 2f64.ln(),
            reference_loss: 3f64.ln(),
            kl,
            same_top,
        };
        let scores = [score(0.0, true), score(0.25, true), score(0.5, false)];
        let found = summarize(&scores);
        assert_eq!(
            (found.tokens, found.max_kl, found.median_kl),
            (3, 0.5, 0.25)
        );
        let near = |a: f64, b: f64| (a - b).abs() < 1e-12;
        assert!(near(found.perplexity, 2.0) && near(found.reference_perplexity, 3.0));
        assert!(near(found.mean_kl, 0.25) && near(found.same_top, 2.0 / 3.0));
        // Deviation √(1/24), of a mean of three.
        assert!(near(found.mean_kl_error, (1f64 / 24.0 / 3.0).sqrt()));
        let scores: Vec<_> = (0..=2000).map(|kl| score(f64::from(kl), true)).collect();
        assert_eq!(summarize(&scores).kl_99_9, 1998.0);
    }
}
