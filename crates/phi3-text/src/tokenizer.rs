//! Text to ids and back, exactly as the reference library does it.
//!
//! The work is done by the `tokenizers` crate; this module adds what transformers adds on top of
//! `tokenizer.json`: the flags of `added_tokens_decoder`, `add_bos_token` and `add_eos_token`, the
//! special tokens by role, and no truncation or padding whatever the file says.
//!
//! One setting of transformers is deliberately not followed: `clean_up_tokenization_spaces`, which
//! removes spaces before punctuation from decoded text. Every Phi-3 checkpoint sets it to false,
//! and it would lose spaces that the model wrote.

use std::collections::{BTreeMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};

use serde::Deserialize;
use serde_json::Value;
use tokenizers::{AddedToken, PreTokenizerWrapper};

use crate::error::{Error, Result};
use crate::stream::DecoderPlan;

/// The special tokens that a tokenizer names by role, as a chat template sees them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// `bos_token`.
    pub bos: Option<String>,
    /// `eos_token`.
    pub eos: Option<String>,
    /// `unk_token`.
    pub unk: Option<String>,
    /// `pad_token`.
    pub pad: Option<String>,
}

impl SpecialTokens {
    /// Reads `bos_token`, `eos_token`, `unk_token` and `pad_token`, each a string or an object with
    /// `content`. Anything else counts as absent.
    ///
    /// ```
    /// use phi3_text::SpecialTokens;
    /// let config = serde_json::json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}});
    /// let tokens = SpecialTokens::from_config(&config);
    /// assert_eq!(tokens.bos.as_deref(), Some("<s>"));
    /// assert_eq!(tokens.eos.as_deref(), Some("</s>"));
    /// assert_eq!(tokens.pad, None);
    /// ```
    pub fn from_config(tokenizer_config: &Value) -> Self {
        let token = |name: &str| {
            let value = tokenizer_config.get(name)?;
            let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
            Some(text.to_owned())
        };
        Self {
            bos: token("bos_token"),
            eos: token("eos_token"),
            unk: token("unk_token"),
            pad: token("pad_token"),
        }
    }
}

/// A tokenizer with its special tokens.
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    tokens: SpecialTokens,
    special_ids: HashSet<u32>,
    /// Set where `tokenizer_config.json` rules what surrounds a text.
    frame: Option<Frame>,
    plan: DecoderPlan,
}

/// The ids around a text.
#[derive(Clone, Copy)]
struct Frame {
    bos: Option<u32>,
    eos: Option<u32>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("tokens", &self.tokens)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Builds a tokenizer from the bytes of `tokenizer.json` and, if there is one, the parsed
    /// `tokenizer_config.json`.
    ///
    /// # Errors
    /// [`Error::TokenizerFile`] if either does not parse, the vocabulary is empty, or
    /// `added_tokens_decoder` contradicts the vocabulary.
    pub fn from_json(tokenizer_json: &[u8], tokenizer_config: Option<&Value>) -> Result<Self> {
        let mut inner = guarded(|| tokenizers::Tokenizer::from_bytes(tokenizer_json))
            .map_err(|reason| file_error(TOKENIZER, reason))?;
        if inner.get_vocab_size(true) == 0 {
            return Err(file_error(TOKENIZER, "the vocabulary is empty"));
        }
        // A file saved after training may still carry both; a prompt must not be cut or padded.
        inner
            .with_truncation(None)
            .map_err(|error| file_error(TOKENIZER, error))?;
        inner.with_padding(None);

        let mut tokens = SpecialTokens::default();
        let mut own_frame = None;
        if let Some(config) = tokenizer_config {
            tokens = SpecialTokens::from_config(config);
            let options = Options::deserialize(config)
                .map_err(|error| file_error(TOKENIZER_CONFIG, error))?;
            apply_added_tokens(&mut inner, &options)?;
            apply_roles(&mut inner, &tokens)?;
            apply_prefix_space(&mut inner, &options);
            own_frame = frame(&inner, &options, &tokens)?;
        }
        let added = inner.get_added_vocabulary();
        let special_ids = inner
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, token)| token.special || added.is_special_token(&token.content))
            .map(|(id, _)| id)
            .collect();
        let plan = DecoderPlan::new(inner.get_decoder());
        Ok(Self {
            inner,
            tokens,
            special_ids,
            frame: own_frame,
            plan,
        })
    }

    /// The ids of `text`. Special tokens written out in the text become their ids.
    ///
    /// With `add_special` the tokenizer's own frame is added: BOS where `add_bos_token` says so.
    ///
    /// # Errors
    /// [`Error::Encode`] if the tokenizer cannot represent the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let frame = self.frame.filter(|_| add_special);
        let post_process = add_special && frame.is_none();
        let encoding =
            guarded(|| self.inner.encode_fast(text, post_process)).map_err(Error::Encode)?;
        let ids = encoding.get_ids();
        Ok(match frame {
            Some(Frame { bos, eos }) => bos
                .into_iter()
                .chain(ids.iter().copied())
                .chain(eos)
                .collect(),
            None => ids.to_vec(),
        })
    }

    /// The ids of a rendered chat template: special tokens become their ids, and no BOS is added,
    /// since a template that wants one writes it.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_chat(&self, rendered: &str) -> Result<Vec<u32>> {
        self.encode(rendered, false)
    }

    /// The text of `ids`, without special tokens if `skip_special`. Ids outside the vocabulary are
    /// skipped, as the reference does: the embedding may have more rows than there are tokens.
    ///
    /// # Errors
    /// [`Error::Decode`] if the decoder of `tokenizer.json` fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        guarded(|| self.inner.decode(ids, skip_special)).map_err(Error::Decode)
    }

    /// The id of the token whose text is exactly `token`.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token as it stands in the vocabulary (`▁the`, `<0x0A>`), not as it decodes.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Number of tokens, the added ones included. The model's embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Whether `id` is a special token, which decoding can skip.
    pub fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

    /// The special tokens by role.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.tokens
    }

    /// `bos_token` of `tokenizer_config.json`.
    pub fn bos_token(&self) -> Option<&str> {
        self.tokens.bos.as_deref()
    }

    /// `eos_token` of `tokenizer_config.json`.
    pub fn eos_token(&self) -> Option<&str> {
        self.tokens.eos.as_deref()
    }

    /// `unk_token` of `tokenizer_config.json`.
    pub fn unk_token(&self) -> Option<&str> {
        self.tokens.unk.as_deref()
    }

    /// `pad_token` of `tokenizer_config.json`.
    pub fn pad_token(&self) -> Option<&str> {
        self.tokens.pad.as_deref()
    }

    /// How this tokenizer's decoder can be run token by token.
    pub(crate) fn plan(&self) -> &DecoderPlan {
        &self.plan
    }
}

const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

fn file_error(file: &'static str, reason: impl ToString) -> Error {
    Error::TokenizerFile {
        file,
        reason: reason.to_string(),
    }
}

/// Runs a call into the `tokenizers` crate, whose code indexes and unwraps in places that only a
/// damaged file can reach: such a panic becomes an error of this call.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> std::result::Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(error.to_string()),
        Err(panic) => Err(panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("the tokenizer library failed")
            .to_owned()),
    }
}

/// What `tokenizer_config.json` changes in a tokenizer.
#[derive(Deserialize)]
struct Options {
    #[serde(default)]
    tokenizer_class: Option<String>,
    #[serde(default)]
    add_bos_token: Option<bool>,
    #[serde(default)]
    add_eos_token: Option<bool>,
    #[serde(default)]
    add_prefix_space: Option<bool>,
    #[serde(default)]
    added_tokens_decoder: BTreeMap<String, AddedTokenConfig>,
}

#[derive(Deserialize)]
struct AddedTokenConfig {
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    normalized: Option<bool>,
    #[serde(default)]
    special: bool,
}

/// The flags of `added_tokens_decoder` win over those in `tokenizer.json`, and tokens that only it
/// names are added.
fn apply_added_tokens(inner: &mut tokenizers::Tokenizer, options: &Options) -> Result<()> {
    let mut tokens = Vec::with_capacity(options.added_tokens_decoder.len());
    for (id, token) in &options.added_tokens_decoder {
        let id: u32 = id.parse().map_err(|_| {
            let reason = format!("`added_tokens_decoder` has the key `{id}`, expected a token id");
            file_error(TOKENIZER_CONFIG, reason)
        })?;
        if token.content.is_empty() {
            continue;
        }
        tokens.push((id, token));
    }
    // New tokens get the next free ids one by one, so they must come in the order of their ids.
    tokens.sort_by_key(|(id, _)| *id);
    let added = tokens.iter().map(|(_, token)| AddedToken {
        content: token.content.clone(),
        single_word: token.single_word,
        lstrip: token.lstrip,
        rstrip: token.rstrip,
        normalized: token.normalized.unwrap_or(!token.special),
        special: token.special,
    });
    let added: Vec<_> = added.collect();
    inner
        .add_tokens(added)
        .map_err(|error| file_error(TOKENIZER_CONFIG, error))?;
    for (id, token) in tokens {
        let found = inner.token_to_id(&token.content);
        if found != Some(id) {
            let found = found.map_or("none".to_owned(), |found| found.to_string());
            let reason = format!(
                "`added_tokens_decoder` gives `{}` the id {id}, but in {TOKENIZER} it has {found}; the two files do not belong together",
                token.content
            );
            return Err(file_error(TOKENIZER_CONFIG, reason));
        }
    }
    Ok(())
}

/// A token that has a role is special, even where the vocabulary holds it as a plain entry. One
/// that the vocabulary lacks is left out: it would get an id that the model has no row for.
fn apply_roles(inner: &mut tokenizers::Tokenizer, tokens: &SpecialTokens) -> Result<()> {
    let roles = [&tokens.bos, &tokens.eos, &tokens.unk, &tokens.pad];
    let known = inner.get_added_vocabulary().get_vocab();
    let missing: Vec<_> = roles
        .into_iter()
        .flatten()
        .filter(|token| inner.token_to_id(token).is_some() && !known.contains_key(*token))
        .map(|token| AddedToken::from(token.clone(), true))
        .collect();
    if !missing.is_empty() {
        inner
            .add_special_tokens(missing)
            .map_err(|error| file_error(TOKENIZER_CONFIG, error))?;
    }
    Ok(())
}

fn apply_prefix_space(inner: &mut tokenizers::Tokenizer, options: &Options) {
    let Some(wanted) = options.add_prefix_space else {
        return;
    };
    if let Some(PreTokenizerWrapper::ByteLevel(byte_level)) = inner.get_pre_tokenizer() {
        let mut byte_level = *byte_level;
        byte_level.add_prefix_space = wanted;
        inner.with_pre_tokenizer(Some(byte_level));
    }
}

/// `add_bos_token` and `add_eos_token` replace the post-processor of `tokenizer.json`, as they do in
/// transformers: for the Llama classes always (BOS unless told otherwise), else where they are set.
fn frame(
    inner: &tokenizers::Tokenizer,
    options: &Options,
    tokens: &SpecialTokens,
) -> Result<Option<Frame>> {
    let class = options.tokenizer_class.as_deref().unwrap_or_default();
    let is_llama = matches!(
        class.strip_suffix("Fast").unwrap_or(class),
        "LlamaTokenizer" | "CodeLlamaTokenizer"
    );
    if !is_llama && options.add_bos_token.is_none() && options.add_eos_token.is_none() {
        return Ok(None);
    }
    let id_of = |token: &Option<String>| inner.token_to_id(token.as_deref()?);
    let required = |flag: &str, id: Option<u32>| {
        let reason = format!("`{flag}` is true, but that token is not in the vocabulary");
        id.map(Some)
            .ok_or_else(|| file_error(TOKENIZER_CONFIG, reason))
    };
    let bos = match options.add_bos_token {
        Some(true) => required("add_bos_token", id_of(&tokens.bos))?,
        Some(false) => None,
        None if is_llama => id_of(&tokens.bos),
        None => None,
    };
    let eos = match options.add_eos_token {
        Some(true) => required("add_eos_token", id_of(&tokens.eos))?,
        _ => None,
    };
    Ok(Some(Frame { bos, eos }))
}

#[cfg(test)]
mod tests;
