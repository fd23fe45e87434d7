//! When an answer ends: stop ids, and stop strings across token borders.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

/// End tokens of the Phi family: they end a turn whatever the template looks like.
const PHI_ENDS: [&str; 2] = ["<|end|>", "<|endoftext|>"];

/// End tokens of other families' templates: they count where the template writes them.
const TEMPLATE_ENDS: [&str; 8] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|end_of_text|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
    "</s>",
];

/// The ids that end an answer, sorted.
///
/// They are the `eos_token_id` (a number or a list) of `generation_config.json` and of
/// `config.json`, the tokenizer's `eos_token`, and the end tokens that are special in the
/// vocabulary and either Phi's own or written by the template. Checkpoints differ in which of them
/// they name: a Phi-3-small config has only `<|endoftext|>`, while every answer ends with
/// `<|end|>`.
///
/// # Errors
/// [`Error::StopId`] if an `eos_token_id` is neither.
pub fn stop_ids(
    generation_config: Option<&Value>,
    config: Option<&Value>,
    template: Option<&str>,
    tokenizer: &Tokenizer,
) -> Result<Vec<u32>> {
    let mut ids = BTreeSet::new();
    let files = [
        ("generation_config.json", generation_config),
        ("config.json", config),
    ];
    for (file, json) in files {
        if let Some(value) = json.and_then(|json| json.get("eos_token_id")) {
            let wrong = || Error::StopId {
                file,
                value: value.to_string(),
            };
            add_eos(value, &mut ids).ok_or_else(wrong)?;
        }
    }
    ids.extend(
        tokenizer
            .eos_token()
            .and_then(|token| tokenizer.token_to_id(token)),
    );
    let template = template.unwrap_or_default();
    let ends = PHI_ENDS.iter().chain(
        TEMPLATE_ENDS
            .iter()
            .filter(|token| template.contains(**token)),
    );
    ids.extend(
        ends.filter_map(|token| tokenizer.token_to_id(token))
            .filter(|&id| tokenizer.is_special(id)),
    );
    Ok(ids.into_iter().collect())
}

fn add_eos(value: &Value, ids: &mut BTreeSet<u32>) -> Option<()> {
    match value {
        Value::Null => {}
        Value::Array(values) => {
            for value in values {
                ids.insert(u32::try_from(value.as_u64()?).ok()?);
            }
        }
        value => {
            ids.insert(u32::try_from(value.as_u64()?).ok()?);
        }
    }
    Some(())
}

/// Finds stop strings in a text that comes in pieces.
///
/// Text that may still become a stop string is withheld until it cannot any more. Which stop string
/// is found does not depend on how the text is cut into pieces: it is the one that is complete
/// first, and of those complete at the same character the longest.
///
/// ```
/// use phi3_text::StopMatcher;
/// let mut matcher = StopMatcher::new(vec!["###".to_owned()])?;
/// assert_eq!(matcher.push("a#b#"), ("a#b".to_owned(), None));
/// assert_eq!(matcher.push("##c"), (String::new(), Some("###".to_owned())));
/// # Ok::<(), phi3_text::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    /// Text withheld: the start of a stop string, or of several.
    held: String,
}

impl StopMatcher {
    /// A matcher for these strings; without any, all text passes.
    ///
    /// # Errors
    /// [`Error::Request`] if one of them is empty.
    pub fn new(stops: Vec<String>) -> Result<Self> {
        if stops.iter().any(String::is_empty) {
            let reason = "a stop string is empty; leave it out".to_owned();
            return Err(Error::Request(reason));
        }
        Ok(Self {
            stops,
            held: String::new(),
        })
    }

    /// Takes the next piece. Gives the text that is certain to precede any stop string, and the
    /// stop string if one is complete; what follows it is dropped.
    pub fn push(&mut self, text: &str) -> (String, Option<String>) {
        if self.stops.is_empty() {
            return (text.to_owned(), None);
        }
        self.held.push_str(text);
        let found = self
            .stops
            .iter()
            .filter_map(|stop| Some((self.held.find(stop.as_str())?, stop)))
            .min_by_key(|(start, stop)| (start + stop.len(), *start));
        if let Some((start, stop)) = found {
            let stop = stop.clone();
            self.held.truncate(start);
            return (std::mem::take(&mut self.held), Some(stop));
        }
        let safe = self.held.len() - self.open_suffix();
        let rest = self.held.split_off(safe);
        (std::mem::replace(&mut self.held, rest), None)
    }

    /// The text withheld, when no more comes.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Length of the longest end of the text that is the start of a stop string.
    fn open_suffix(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let from = self.held.len().saturating_sub(longest.saturating_sub(1));
        (from..self.held.len())
            .filter_map(|at| self.held.get(at..))
            .find(|suffix| self.stops.iter().any(|stop| stop.starts_with(suffix)))
            .map_or(0, str::len)
    }
}

#[cfg(test)]
mod tests;
