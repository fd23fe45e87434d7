//! `tokenizer.json` as the vocabulary of a GGUF file.
//!
//! Two kinds have a form there: BPE with a byte fallback as SentencePiece makes it (`llama`; the
//! order of its merges becomes scores), and byte-level BPE (`gpt2`; the rule that splits text into
//! words gets llama.cpp's name). What was written is read back and compared, so that a tokenizer
//! which the format cannot express is an error, not a model that reads other words.

use std::collections::{HashMap, HashSet};

use serde_json::Value as Json;

use crate::gguf::container::Container;
use crate::gguf::pre_tokenizer::PreTokenizer;
use crate::gguf::value::{Array, Value};
use crate::gguf::vocabulary::byte_of;
use crate::gguf::writer::Writer;
use crate::gguf::{config::END_TOKENS, tokenizer as reader};
use crate::{ChatTemplateSource, Checkpoint, parse_json};

type Values = Vec<(String, Value)>;

// llama.cpp's `llama_token_type`.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// Metadata below `tokenizer.`; none if the checkpoint has no tokenizer.
///
/// # Errors
/// What a GGUF file cannot express.
pub(crate) fn tokenizer(checkpoint: &Checkpoint) -> Result<Values, String> {
    let file = checkpoint
        .tokenizer_json()
        .map_err(|error| error.to_string())?;
    let Some(file) = file else {
        return Ok(vec![("tokenizer.ggml.model".to_owned(), "no_vocab".into())]);
    };
    let json: Json = parse_json(std::path::Path::new("tokenizer.json"), &file)
        .map_err(|error| error.to_string())?;
    let source = Source {
        json: &json,
        config: checkpoint.tokenizer.tokenizer_config.as_ref(),
        model: &checkpoint.config,
        generation: checkpoint.generation_config.as_ref(),
    };
    let mut values = source.values()?;
    source.compare(&values)?;
    if let Some(template) = &checkpoint.chat_template {
        templates(template, &mut values);
    }
    Ok(values)
}

fn templates(template: &ChatTemplateSource, values: &mut Values) {
    let key = "tokenizer.chat_template";
    values.push((key.to_owned(), template.text.as_str().into()));
    if !template.named.is_empty() {
        let names: Array = template.named.keys().map(String::as_str).collect();
        values.push((format!("{key}s"), names.into()));
    }
    for (name, text) in &template.named {
        values.push((format!("{key}.{name}"), text.as_str().into()));
    }
}

/// The files that say what the tokenizer is.
struct Source<'a> {
    json: &'a Json,
    config: Option<&'a Json>,
    model: &'a Json,
    generation: Option<&'a Json>,
}

/// A vocabulary in the order of ids.
struct Tokens<'a> {
    texts: Vec<String>,
    types: Vec<i32>,
    ids: HashMap<&'a str, u32>,
}

/// Both halves of a merge.
type Merge<'a> = (&'a str, &'a str);

impl<'a> Source<'a> {
    fn values(&self) -> Result<Values, String> {
        let model = &self.json["model"];
        // Old files leave the type out.
        if !matches!(model["type"].as_str(), None | Some("BPE")) || !model["merges"].is_array() {
            return Err(format!(
                "its model is {}, and only BPE has a form there",
                model["type"]
            ));
        }
        let sentencepiece = model["byte_fallback"] == true;
        let tokens = self.tokens(sentencepiece)?;
        let merges = self.merges()?;
        let mut values = Values::new();
        let mut set =
            |key: &str, value: Value| values.push((format!("tokenizer.ggml.{key}"), value));
        let texts: Array = tokens.texts.iter().map(String::as_str).collect();
        if sentencepiece {
            set("model", "llama".into());
            set("pre", "default".into());
            set("tokens", texts.into());
            set("scores", Array::F32(scores(&tokens, &merges)).into());
            set("token_type", Array::I32(tokens.types.clone()).into());
            set("add_space_prefix", self.adds_space()?.into());
        } else {
            let ignore_merges = model["ignore_merges"] == true;
            let rule = PreTokenizer::recognize(&self.json["pre_tokenizer"], ignore_merges)
                .ok_or_else(|| {
                    format!(
                        "llama.cpp has no name for its pre_tokenizer {}",
                        shortened(&self.json["pre_tokenizer"])
                    )
                })?;
            set("model", "gpt2".into());
            set("pre", rule.into());
            set("tokens", texts.into());
            set("token_type", Array::I32(tokens.types.clone()).into());
            let merges: Vec<String> = merges.iter().map(|(l, r)| format!("{l} {r}")).collect();
            let merges: Array = merges.iter().map(String::as_str).collect();
            set("merges", merges.into());
        }
        for (key, name) in [
            ("bos_token_id", "bos_token"),
            ("eos_token_id", "eos_token"),
            ("unknown_token_id", "unk_token"),
            ("padding_token_id", "pad_token"),
        ] {
            if let Some(id) = self.special(name, &tokens) {
                set(key, id.into());
            }
        }
        if let Some(id) = self.other_end(&tokens) {
            set("eom_token_id", id.into());
        }
        set("add_bos_token", self.adds("bos_token", 0).into());
        set("add_eos_token", self.adds("eos_token", usize::MAX).into());
        Ok(values)
    }

    fn tokens(&self, sentencepiece: bool) -> Result<Tokens<'a>, String> {
        let vocab = self.json["model"]["vocab"]
            .as_object()
            .ok_or("it has no vocabulary")?;
        let rows = self.model["vocab_size"]
            .as_u64()
            .and_then(|n| u32::try_from(n).ok());
        let rows = rows.ok_or("config.json has no vocab_size")?;
        let mut tokens = Tokens {
            texts: (0..rows).map(|id| format!("[PAD{id}]")).collect(),
            types: vec![UNUSED; rows as usize],
            ids: HashMap::new(),
        };
        for (text, id) in vocab {
            let kind = if sentencepiece && byte_of(text).is_some() {
                BYTE
            } else {
                NORMAL
            };
            tokens.put(text, id.as_u64(), kind)?;
        }
        for token in self.added() {
            let text = token["content"].as_str().unwrap_or_default();
            let kind = if self.json["model"]["unk_token"] == *text && sentencepiece {
                UNKNOWN
            } else if token["special"] == true {
                CONTROL
            } else {
                USER_DEFINED
            };
            tokens.put(text, token["id"].as_u64(), kind)?;
        }
        Ok(tokens)
    }

    fn added(&self) -> &'a [Json] {
        self.json["added_tokens"]
            .as_array()
            .map_or(&[], Vec::as_slice)
    }

    fn merges(&self) -> Result<Vec<Merge<'a>>, String> {
        let merges = self.json["model"]["merges"]
            .as_array()
            .map_or(&[][..], Vec::as_slice);
        let pair = |merge: &'a Json| match merge {
            Json::String(text) => text.split_once(' '),
            Json::Array(halves) => match halves.as_slice() {
                [left, right] => left.as_str().zip(right.as_str()),
                _ => None,
            },
            _ => None,
        };
        merges
            .iter()
            .map(|merge| pair(merge).ok_or_else(|| format!("merge {merge} is not two tokens")))
            .collect()
    }

    /// Whether a text begins with a space that nobody wrote.
    fn adds_space(&self) -> Result<bool, String> {
        let steps = flattened(&self.json["normalizer"], "normalizers");
        let splits = flattened(&self.json["pre_tokenizer"], "pretokenizers");
        if let Some(metaspace) = splits.iter().find(|step| step["type"] == "Metaspace") {
            return match metaspace["prepend_scheme"].as_str() {
                Some("never") => Ok(false),
                None | Some("always") => Ok(true),
                Some(other) => Err(format!(
                    "prepend_scheme {other:?} treats the first word differently, which llama.cpp does not"
                )),
            };
        }
        Ok(steps.iter().any(|step| step["type"] == "Prepend"))
    }

    /// A token that the configs name, by its text or its id.
    fn special(&self, name: &str, tokens: &Tokens<'_>) -> Option<u32> {
        let named = self.config.and_then(|config| {
            let token = config.get(name)?;
            token.as_str().or_else(|| token.get("content")?.as_str())
        });
        if let Some(id) = named.and_then(|text| tokens.ids.get(text)) {
            return Some(*id);
        }
        let id = match self.model.get(format!("{name}_id"))? {
            Json::Array(ids) => ids.first()?.as_u64()?,
            id => id.as_u64()?,
        };
        u32::try_from(id)
            .ok()
            .filter(|id| (*id as usize) < tokens.texts.len())
    }

    /// An id that ends generation, and that a reader would not know by its text.
    fn other_end(&self, tokens: &Tokens<'_>) -> Option<u32> {
        let eos = self.special("eos_token", tokens);
        let ids = self.generation?.get("eos_token_id")?.as_array()?;
        ids.iter()
            .filter_map(|id| u32::try_from(id.as_u64()?).ok())
            .find(|id| {
                let text = tokens.texts.get(*id as usize);
                Some(*id) != eos && text.is_some_and(|text| !END_TOKENS.contains(&text.as_str()))
            })
    }

    /// Whether the post-processor puts a token at an end of every text: the first or the last.
    fn adds(&self, name: &str, place: usize) -> bool {
        let steps = flattened(&self.json["post_processor"], "processors");
        let Some(template) = steps
            .iter()
            .find(|step| step["type"] == "TemplateProcessing")
        else {
            return false;
        };
        let pieces = template["single"].as_array().map_or(&[][..], Vec::as_slice);
        let piece = pieces.get(place.min(pieces.len().saturating_sub(1)));
        let found = piece.and_then(|piece| piece["SpecialToken"]["id"].as_str());
        let wanted = self.config.and_then(|config| {
            let token = config.get(name)?;
            token.as_str().or_else(|| token.get("content")?.as_str())
        });
        // A lone special token in the template is at either end; its name tells which it is.
        found.is_some() && (wanted.is_none() || found == wanted)
    }

    /// Reads `values` back and compares what decides over ids.
    fn compare(&self, values: &Values) -> Result<(), String> {
        let mut writer = Writer::new();
        writer.set("general.architecture", "phi3");
        for (key, value) in values {
            writer.set(key.as_str(), value.clone());
        }
        let back = || {
            let bytes = writer.to_vec(|_, _| Ok(()))?;
            reader::files(&Container::parse(bytes.into())?)
        };
        let files = back().map_err(|error| error.to_string())?;
        let files = files.ok_or("it came back as none")?;
        let back: Json =
            serde_json::from_slice(&files.tokenizer_json).map_err(|e| e.to_string())?;
        let other = Source {
            json: &back,
            ..*self
        };
        let (merges, read) = (self.merges()?, other.merges()?);
        if merges.len() != read.len() {
            return Err(format!(
                "it has {} merges, and {} follow from the order of its tokens",
                merges.len(),
                read.len()
            ));
        }
        if let Some((found, expected)) = read.iter().zip(&merges).find(|(a, b)| a != b) {
            return Err(format!(
                "its merge {expected:?} comes in another place than the order of tokens says ({found:?})"
            ));
        }
        let flags = |token: &Json| {
            let flag = |name: &str| token[name] == true;
            (
                flag("special"),
                flag("lstrip"),
                flag("rstrip"),
                flag("single_word"),
            )
        };
        for token in self.added() {
            let same = |other: &&Json| other["content"] == token["content"];
            match other.added().iter().find(same) {
                Some(found) if flags(found) == flags(token) => {}
                // Base vocabularies list such tokens among the added ones.
                None => {}
                Some(_) => tracing::warn!(
                    token = %token["content"],
                    "a GGUF file cannot say how this token treats the white space around it"
                ),
            }
        }
        Ok(())
    }
}

impl<'a> Tokens<'a> {
    fn put(&mut self, text: &'a str, id: Option<u64>, kind: i32) -> Result<(), String> {
        let place = id.and_then(|id| usize::try_from(id).ok());
        let place = place
            .filter(|place| *place < self.texts.len())
            .ok_or_else(|| {
                format!(
                    "token {text:?} has the id {id:?}, and the model {} rows",
                    self.texts.len()
                )
            })?;
        let slots = self.texts.get_mut(place).zip(self.types.get_mut(place));
        if let Some((slot, slot_kind)) = slots {
            if *slot_kind != UNUSED && slot != text {
                return Err(format!(
                    "tokens {slot:?} and {text:?} have the same id {place}"
                ));
            }
            text.clone_into(slot);
            *slot_kind = kind;
        }
        self.ids.insert(text, place as u32);
        Ok(())
    }
}

/// Scores that order merges as the list does: a token's is less the later its first merge comes.
fn scores(tokens: &Tokens<'_>, merges: &[Merge<'_>]) -> Vec<f32> {
    let mut scores = vec![0f32; tokens.texts.len()];
    let mut next = 0u32;
    let mut scored = HashSet::new();
    let mut give = |id: u32, next: &mut u32| {
        if let Some(score) = scores.get_mut(id as usize)
            && scored.insert(id)
        {
            // Exact up to 2^24, far more than any vocabulary.
            *score = -(*next as f32);
            *next += 1;
        }
    };
    for (left, right) in merges {
        let joined = [*left, *right].concat();
        if let Some(id) = tokens.ids.get(joined.as_str()) {
            give(*id, &mut next);
        }
    }
    // Single characters are the result of no merge.
    for (id, kind) in tokens.types.iter().enumerate() {
        if *kind == NORMAL {
            give(id as u32, &mut next);
        }
    }
    scores
}

/// The steps of a sequence, or the one step that there is.
fn flattened<'a>(json: &'a Json, list: &str) -> Vec<&'a Json> {
    match json[list].as_array() {
        Some(steps) => steps.iter().collect(),
        None if json.is_object() => vec![json],
        None => Vec::new(),
    }
}

fn shortened(json: &Json) -> String {
    let text = json.to_string();
    match text.char_indices().nth(200) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}
