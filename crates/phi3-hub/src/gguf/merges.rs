//! The merges of a SentencePiece vocabulary.
//!
//! SentencePiece's BPE has no list of merges: of all neighbors whose concatenation is a token, it
//! joins the pair whose token has the best score. The same order as a list: every way to split a
//! token into two tokens is a merge, by falling score of the result.

use std::collections::HashMap;

use super::error::{Error, Result};
use super::vocabulary::{Kind, Vocabulary};

/// Bound on the bytes that are compared while splitting tokens: the sum of their squared lengths.
/// Phi-3's vocabulary of 32,000 tokens needs 1.7 million.
const MAX_WORK: u64 = 1 << 28;

/// All merges, best first, as texts.
///
/// # Errors
/// [`Error::Vocabulary`] without scores, or if tokens are so long that splitting them all
/// would take long.
pub(super) fn from_scores(vocabulary: &Vocabulary) -> Result<Vec<(&str, &str)>> {
    if vocabulary.scores.is_empty() {
        return Err(Error::Vocabulary(
            "tokenizer.ggml.scores is missing, and the merges follow from the scores".to_owned(),
        ));
    }
    let mut work = 0u64;
    let mut ids = HashMap::new();
    for (id, text, kind) in vocabulary.iter() {
        if kind == Kind::Normal {
            ids.insert(text, id);
            let len = text.len() as u64;
            work = work.saturating_add(len.saturating_mul(len));
        }
    }
    if work > MAX_WORK {
        return Err(Error::Vocabulary(
            "its tokens are far longer than those of any language".to_owned(),
        ));
    }
    let mut merges = Vec::new();
    for (id, text, kind) in vocabulary.iter() {
        if kind != Kind::Normal {
            continue;
        }
        let score = vocabulary.scores.get(id as usize).copied();
        let score = score.unwrap_or_default();
        for (at, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(at);
            if let (Some(left_id), Some(right_id)) = (ids.get(left), ids.get(right)) {
                merges.push((score, id, *left_id, *right_id, left, right));
            }
        }
    }
    // Equal scores do not occur between tokens that training made; ids make the order definite.
    merges.sort_by(|a, b| {
        let by_score = b.0.total_cmp(&a.0);
        by_score.then_with(|| (a.1, a.2, a.3).cmp(&(b.1, b.2, b.3)))
    });
    Ok(merges
        .into_iter()
        .map(|(.., left, right)| (left, right))
        .collect())
}
