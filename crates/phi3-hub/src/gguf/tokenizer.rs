//! The tokenizer of a GGUF file as `tokenizer.json` and `tokenizer_config.json`.
//!
//! Two of llama.cpp's tokenizer models exist in Phi-3-like files: `llama`, SentencePiece's BPE with
//! a byte fallback (Phi-3, Llama 2), and `gpt2`, byte-level BPE (Phi-4-mini, Llama 3, SmolLM).

use serde_json::{Map, Value as Json, json};

use super::container::Container;
use super::error::{Error, Result};
use super::merges;
use super::names::Architecture;
use super::pre_tokenizer::PreTokenizer;
use super::value::Value;
use super::vocabulary::{Kind, Vocabulary, array, wrong_type};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const MERGES: &str = "tokenizer.ggml.merges";
const TEMPLATE: &str = "tokenizer.chat_template";

/// The two files.
#[derive(Debug)]
pub(super) struct Files {
    pub tokenizer_json: Vec<u8>,
    pub tokenizer_config: Json,
}

/// The tokenizer files; `None` if the file has no tokenizer.
///
/// # Errors
/// An unknown tokenizer model or pre-tokenizer, or an unusable vocabulary.
pub(super) fn files(container: &Container) -> Result<Option<Files>> {
    let model = match text(container, MODEL)? {
        None | Some("no_vocab" | "none") => return Ok(None),
        Some("llama") => Model::SentencePiece,
        Some("gpt2") => Model::ByteLevel(pre_tokenizer(container)?),
        Some(other) => {
            return Err(Error::Tokenizer {
                key: MODEL,
                found: other.to_owned(),
                supported: "llama, gpt2".to_owned(),
            });
        }
    };
    let vocabulary = Vocabulary::read(container, matches!(model, Model::SentencePiece))?;
    let added = added_tokens(container, &vocabulary)?;
    let adds_bos = flag(container, "add_bos_token")?.unwrap_or(model.adds_bos());
    let adds_eos = flag(container, "add_eos_token")?.unwrap_or(false);
    let bos = bound("bos", vocabulary.bos, &vocabulary, adds_bos)?;
    let eos = bound("eos", vocabulary.eos, &vocabulary, adds_eos)?;
    let mut json = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "post_processor": post_processor(bos, eos),
    });
    let rest = match model {
        Model::SentencePiece => {
            let prefix = flag(container, "add_space_prefix")?.unwrap_or(true);
            sentencepiece(&vocabulary, prefix)?
        }
        Model::ByteLevel(rule) => byte_level(container, &vocabulary, rule)?,
    };
    if let (Json::Object(json), Json::Object(rest)) = (&mut json, rest) {
        json.extend(rest);
    }
    Ok(Some(Files {
        tokenizer_json: json.to_string().into_bytes(),
        tokenizer_config: tokenizer_config(container, &vocabulary, &added, adds_bos, adds_eos)?,
    }))
}

/// The chat templates, in the form that `tokenizer_config.json` has them: a text, or, if there are
/// others beside it, a list of texts with names.
///
/// # Errors
/// A template that is not UTF-8 text.
pub(super) fn chat_template(container: &Container) -> Result<Option<Json>> {
    let mut named = Vec::new();
    for (key, _) in container.metadata() {
        let name = match key.strip_prefix(TEMPLATE) {
            Some("") => "default",
            Some(rest) => match rest.strip_prefix('.') {
                Some(name) => name,
                None => continue,
            },
            None => continue,
        };
        if let Some(template) = text(container, key)? {
            named.push(json!({"name": name, "template": template}));
        }
    }
    Ok(match named.as_slice() {
        [] => None,
        [only] if only["name"] == "default" => Some(only["template"].clone()),
        _ => Some(named.into()),
    })
}

enum Model {
    SentencePiece,
    ByteLevel(PreTokenizer),
}

impl Model {
    fn adds_bos(&self) -> bool {
        match self {
            Model::SentencePiece => true,
            Model::ByteLevel(rule) => rule.adds_bos(),
        }
    }
}

fn pre_tokenizer(container: &Container) -> Result<PreTokenizer> {
    match text(container, PRE)? {
        Some(name) => PreTokenizer::from_name(name),
        None => {
            tracing::warn!("the GGUF file names no pre-tokenizer, using llama.cpp's default");
            Ok(PreTokenizer::Default)
        }
    }
}

fn sentencepiece(vocabulary: &Vocabulary, prefix: bool) -> Result<Json> {
    let merges = merges::from_scores(vocabulary)?;
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let prepend = json!({"type": "Prepend", "prepend": "▁"});
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let normalizers = if prefix {
        vec![prepend, replace]
    } else {
        vec![replace]
    };
    let unknown = vocabulary.unknown.and_then(|id| vocabulary.text(id));
    Ok(json!({
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": unknown,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": true,
            "ignore_merges": false,
            "vocab": vocab(vocabulary),
            "merges": merges,
        },
    }))
}

fn byte_level(container: &Container, vocabulary: &Vocabulary, rule: PreTokenizer) -> Result<Json> {
    let merges = array(container, MERGES)?.ok_or_else(|| Error::MissingKey {
        key: MERGES.to_owned(),
        hint: "a gpt2 tokenizer is nothing without its merges",
    })?;
    let texts = merges
        .as_texts()
        .ok_or_else(|| wrong_type(MERGES, merges, "texts"))?;
    let vocab = vocab(vocabulary);
    let merges = texts
        .iter()
        .enumerate()
        .map(|(i, merge)| {
            let wrong = |problem: &str| {
                let shown: String = merge.to_string_lossy().chars().take(80).collect();
                Error::Vocabulary(format!("merge {i} {shown:?} {problem}"))
            };
            let pair = merge.as_str().and_then(|merge| {
                // The first character is part of the left half, even if it is a space.
                let from = merge.chars().next()?.len_utf8();
                let at = from + merge.get(from..)?.find(' ')?;
                Some((merge.get(..at)?, merge.get(at + 1..)?))
            });
            let (left, right) = pair
                .filter(|(_, right)| !right.is_empty())
                .ok_or_else(|| wrong("is not two tokens"))?;
            let joined = [left, right].concat();
            match [left, right, &joined]
                .into_iter()
                .find(|text| !vocab.contains_key(*text))
            {
                Some(unknown) => Err(wrong(&format!("needs {unknown:?}, which is no token"))),
                None => Ok((left, right)),
            }
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(json!({
        "normalizer": null,
        "pre_tokenizer": rule.to_json(),
        "decoder": {
            "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true,
        },
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": rule.ignore_merges(),
            "vocab": vocab,
            "merges": merges,
        },
    }))
}

/// Padding is left out, so that no id of it decodes to anything.
fn vocab(vocabulary: &Vocabulary) -> Map<String, Json> {
    vocabulary
        .iter()
        .filter(|(_, _, kind)| *kind != Kind::Unused)
        .map(|(id, text, _)| (text.to_owned(), id.into()))
        .collect()
}

fn added_tokens(container: &Container, vocabulary: &Vocabulary) -> Result<Vec<Json>> {
    let strips = strips_after_specials(container)?;
    Ok(vocabulary
        .iter()
        .filter(|(_, _, kind)| matches!(kind, Kind::Special | Kind::UserDefined))
        .map(|(id, text, kind)| {
            let rstrip = strips && !matches!(text, "<unk>" | "<s>" | "<|endoftext|>");
            json!({
                "id": id,
                "content": text,
                "single_word": false,
                "lstrip": false,
                "rstrip": rstrip,
                "normalized": false,
                "special": kind == Kind::Special,
            })
        })
        .collect())
}

/// Phi-3's added tokens swallow the white space after them. The format has no place for that;
/// llama.cpp goes by the model's name, transformers by the architecture. Phi-3 with its own
/// vocabulary is either here.
fn strips_after_specials(container: &Container) -> Result<bool> {
    if text(container, MODEL)? != Some("llama") {
        return Ok(false);
    }
    let name = match container.get("general.name") {
        Some(Value::String(name)) => name.to_string_lossy().to_lowercase(),
        _ => String::new(),
    };
    let architecture = text(container, "general.architecture")?;
    let phi = [Architecture::Phi3, Architecture::Phimoe].map(Architecture::name);
    Ok(architecture.is_some_and(|name| phi.contains(&name))
        || name.contains("phi-3")
        || name.contains("phi3"))
}

/// The text of a token that is put at an end of every text, or `None` if it is not.
fn bound<'a>(
    what: &str,
    id: Option<u32>,
    vocabulary: &'a Vocabulary,
    wanted: bool,
) -> Result<Option<(u32, &'a str)>> {
    if !wanted {
        return Ok(None);
    }
    id.and_then(|id| Some((id, vocabulary.text(id)?)))
        .map(Some)
        .ok_or_else(|| {
            Error::Vocabulary(format!(
                "tokenizer.ggml.add_{what}_token is true, and tokenizer.ggml.{what}_token_id names no token"
            ))
        })
}

fn post_processor(bos: Option<(u32, &str)>, eos: Option<(u32, &str)>) -> Json {
    if bos.is_none() && eos.is_none() {
        return Json::Null;
    }
    let sequence = |name: &str, type_id: u32| {
        let special = |token: Option<(u32, &str)>| {
            token.map(|(_, text)| json!({"SpecialToken": {"id": text, "type_id": type_id}}))
        };
        let text = json!({"Sequence": {"id": name, "type_id": type_id}});
        let all: Vec<Json> = special(bos)
            .into_iter()
            .chain([text])
            .chain(special(eos))
            .collect();
        all
    };
    let tokens: Map<String, Json> = bos
        .into_iter()
        .chain(eos)
        .map(|(id, text)| {
            let token = json!({"id": text, "ids": [id], "tokens": [text]});
            (text.to_owned(), token)
        })
        .collect();
    let single = sequence("A", 0);
    let pair = [single.as_slice(), &sequence("B", 1)].concat();
    json!({
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": tokens,
    })
}

fn tokenizer_config(
    container: &Container,
    vocabulary: &Vocabulary,
    added: &[Json],
    adds_bos: bool,
    adds_eos: bool,
) -> Result<Json> {
    let decoder: Map<String, Json> = added
        .iter()
        .filter_map(|token| {
            let mut token = token.as_object()?.clone();
            let id = token.remove("id")?;
            Some((id.to_string(), token.into()))
        })
        .collect();
    let mut config = json!({
        "add_bos_token": adds_bos,
        "add_eos_token": adds_eos,
        "added_tokens_decoder": decoder,
        "clean_up_tokenization_spaces": false,
        "tokenizer_class": "PreTrainedTokenizerFast",
    });
    if let Some(config) = config.as_object_mut() {
        for (key, id) in [
            ("bos_token", vocabulary.bos),
            ("eos_token", vocabulary.eos),
            ("unk_token", vocabulary.unknown),
            ("pad_token", vocabulary.padding),
        ] {
            if let Some(text) = id.and_then(|id| vocabulary.text(id)) {
                config.insert(key.to_owned(), text.into());
            }
        }
        if let Some(template) = chat_template(container)? {
            config.insert("chat_template".to_owned(), template);
        }
    }
    Ok(config)
}

fn flag(container: &Container, name: &str) -> Result<Option<bool>> {
    let key = format!("tokenizer.ggml.{name}");
    match container.get(&key) {
        None => Ok(None),
        Some(value) => value.as_bool().map(Some).ok_or_else(|| Error::BadValue {
            key,
            found: format!("{value} ({})", value.type_name()),
            expected: "a bool".to_owned(),
        }),
    }
}

fn text<'a>(container: &'a Container, key: &str) -> Result<Option<&'a str>> {
    match container.get(key) {
        None => Ok(None),
        Some(value) => value.as_str().map(Some).ok_or_else(|| Error::BadValue {
            key: key.to_owned(),
            found: format!("{value} ({})", value.type_name()),
            expected: "UTF-8 text".to_owned(),
        }),
    }
}

#[cfg(test)]
#[path = "tokenizer_tests.rs"]
mod tests;
