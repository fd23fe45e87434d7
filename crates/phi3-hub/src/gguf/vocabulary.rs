//! The vocabulary in a GGUF file's metadata, checked.

use std::collections::HashMap;

use super::config::{END_TOKENS, token_id};
use super::container::Container;
use super::error::{Error, Result};
use super::value::{Array, Value};

const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";

/// What a token is for: llama.cpp's `llama_token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Text that merges make.
    Normal,
    /// Matched before everything else, and left out of decoded text on request.
    Special,
    /// Matched before everything else, and always decoded.
    UserDefined,
    /// Padding of the vocabulary; never made and never decoded.
    Unused,
    /// One byte, for text that no token spells.
    Byte,
}

/// A vocabulary: texts, all different and not empty, with their kinds.
#[derive(Debug)]
pub(super) struct Vocabulary {
    pub texts: Vec<String>,
    pub kinds: Vec<Kind>,
    /// Empty if the file has none.
    pub scores: Vec<f32>,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub unknown: Option<u32>,
    pub padding: Option<u32>,
}

impl Vocabulary {
    /// # Errors
    /// [`Error::Vocabulary`], [`Error::MissingKey`] or [`Error::BadValue`].
    pub fn read(container: &Container, sentencepiece: bool) -> Result<Self> {
        let tokens = array(container, TOKENS)?.ok_or_else(|| Error::MissingKey {
            key: TOKENS.to_owned(),
            hint: "the file has no vocabulary",
        })?;
        let tokens = tokens
            .as_texts()
            .ok_or_else(|| wrong_type(TOKENS, tokens, "texts"))?;
        if tokens.is_empty() {
            return Err(Error::Vocabulary(format!("{TOKENS} is empty")));
        }
        // Ids are 32 bits wide in the metadata and everywhere else.
        if u32::try_from(tokens.len()).is_err() {
            return Err(Error::Vocabulary(format!(
                "{} tokens are too many",
                tokens.len()
            )));
        }
        let texts: Vec<String> = tokens
            .iter()
            .enumerate()
            .map(|(id, token)| match token.as_str() {
                Some("") => format!("[EMPTY_{id}]"),
                Some(text) => text.to_owned(),
                // JSON has no place for such bytes. The token keeps its id, and nothing makes it.
                None => format!("[BYTES_{id}]"),
            })
            .collect();
        check_unique(&texts)?;

        let id = |name: &str, default: Option<u32>| -> Result<Option<u32>> {
            let id = token_id(container, name)?.map_or(default.map(u64::from), Some);
            // As llama.cpp, which writes it where a vocabulary was cut: an id without a token is none.
            Ok(id.filter(|id| *id < texts.len() as u64).map(|id| id as u32))
        };
        let default = |id: u32| sentencepiece.then_some(id);
        let (bos, eos) = (
            id("bos_token_id", default(1))?,
            id("eos_token_id", default(2))?,
        );
        let unknown = id("unknown_token_id", default(0))?;
        let padding = id("padding_token_id", None)?;

        let mut kinds = match array(container, TYPES)? {
            Some(types) => kinds(types, texts.len())?,
            None => guessed_kinds(&texts, [bos, eos, unknown].into_iter().flatten()),
        };
        for (id, ((kind, text), token)) in kinds.iter_mut().zip(&texts).zip(tokens).enumerate() {
            // Converters fill a vocabulary up with such names, some of them as control tokens.
            let padding = *text == format!("[PAD{id}]");
            if padding || token.as_str().is_none_or(str::is_empty) {
                *kind = Kind::Unused;
            } else if *kind == Kind::UserDefined && END_TOKENS.contains(&text.as_str()) {
                *kind = Kind::Special;
            }
        }
        let scores = match array(container, SCORES)? {
            Some(Array::F32(scores)) if scores.len() == texts.len() => scores.clone(),
            Some(scores) if scores.len() == texts.len() => {
                return Err(wrong_type(SCORES, scores, "f32"));
            }
            Some(scores) => return Err(mismatch(SCORES, scores.len(), texts.len())),
            None => Vec::new(),
        };
        Ok(Self {
            texts,
            kinds,
            scores,
            bos,
            eos,
            unknown,
            padding,
        })
    }

    /// The text of a token.
    pub fn text(&self, id: u32) -> Option<&str> {
        self.texts.get(id as usize).map(String::as_str)
    }

    /// Ids, texts and kinds.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &str, Kind)> {
        (0..)
            .zip(&self.texts)
            .zip(&self.kinds)
            .map(|((id, text), kind)| (id, text.as_str(), *kind))
    }
}

/// A metadata array of texts.
///
/// # Errors
/// [`Error::BadValue`] if the key holds something else.
pub(super) fn array<'a>(container: &'a Container, key: &str) -> Result<Option<&'a Array>> {
    match container.get(key) {
        None => Ok(None),
        Some(Value::Array(array)) => Ok(Some(array)),
        Some(other) => Err(Error::BadValue {
            key: key.to_owned(),
            found: other.type_name(),
            expected: "an array".to_owned(),
        }),
    }
}

pub(super) fn wrong_type(key: &str, found: &Array, expected: &str) -> Error {
    Error::BadValue {
        key: key.to_owned(),
        found: format!("an array of {}", found.item_type_name()),
        expected: format!("an array of {expected}"),
    }
}

fn mismatch(key: &str, found: usize, tokens: usize) -> Error {
    Error::Vocabulary(format!("{key} has {found} entries for {tokens} tokens"))
}

fn check_unique(texts: &[String]) -> Result<()> {
    let mut seen = HashMap::with_capacity(texts.len());
    for (id, text) in texts.iter().enumerate() {
        if let Some(first) = seen.insert(text.as_str(), id) {
            let shown: String = text.chars().take(80).collect();
            return Err(Error::Vocabulary(format!(
                "tokens {first} and {id} are both {shown:?}"
            )));
        }
    }
    Ok(())
}

fn kinds(types: &Array, tokens: usize) -> Result<Vec<Kind>> {
    if types.len() != tokens {
        return Err(mismatch(TYPES, types.len(), tokens));
    }
    let types = types
        .to_u64s()
        .ok_or_else(|| wrong_type(TYPES, types, "token types"))?;
    Ok(types
        .into_iter()
        .map(|kind| match kind {
            2 | 3 => Kind::Special,
            4 => Kind::UserDefined,
            5 => Kind::Unused,
            6 => Kind::Byte,
            _ => Kind::Normal,
        })
        .collect())
}

/// Without types the tokens that the metadata name are special, and those spelled like bytes bytes.
fn guessed_kinds(texts: &[String], special: impl Iterator<Item = u32>) -> Vec<Kind> {
    let mut kinds: Vec<_> = texts
        .iter()
        .map(|text| {
            if byte_of(text).is_some() {
                Kind::Byte
            } else if END_TOKENS.contains(&text.as_str()) {
                Kind::Special
            } else {
                Kind::Normal
            }
        })
        .collect();
    for id in special {
        if let Some(kind) = kinds.get_mut(id as usize) {
            *kind = Kind::Special;
        }
    }
    kinds
}

/// The byte that `<0x0A>` stands for.
pub(super) fn byte_of(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}
