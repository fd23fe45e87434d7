//! The metadata of a GGUF file as `config.json` and `generation_config.json` of a Phi-3 model.

use serde_json::{Map, Value as Json, json};

use super::container::Container;
use super::error::{Error, Result};
use super::keys::{Keys, bad};
use super::moe::Moe;
use super::names::{
    Architecture, Dimensions, OUTPUT, ROPE_FACTORS_LONG, ROPE_FACTORS_SHORT, ROPE_FREQUENCIES,
    TOKEN_EMBEDDING,
};
use super::value::{Array, Value};
use super::{small, weights};

/// Texts of tokens that end a turn or a text. llama.cpp stops at them even where the metadata name
/// only one, as those of Phi-3 do, whose `<|end|>` is not the end-of-text token.
pub(super) const END_TOKENS: [&str; 7] = [
    "<|end|>",
    "<|endoftext|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
];

/// The architecture of a file.
///
/// # Errors
/// [`Error::MissingKey`] or [`Error::Architecture`].
pub(super) fn architecture(container: &Container) -> Result<Architecture> {
    Architecture::from_name(architecture_name(container)?)
}

pub(super) fn architecture_name(container: &Container) -> Result<&str> {
    let key = "general.architecture";
    let value = container.get(key).ok_or_else(|| Error::MissingKey {
        key: key.to_owned(),
        hint: "this is not a model file",
    })?;
    value.as_str().ok_or_else(|| bad(key, value, "text"))
}

/// The model's numbers, checked: what both the config and the tensor mapping need.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Hyperparameters {
    pub architecture: Architecture,
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub rotary_dim: usize,
    pub intermediate: usize,
    pub context: usize,
    /// Of architecture `phimoe`.
    pub moe: Option<Moe>,
}

impl Hyperparameters {
    /// # Errors
    /// A key that is missing, of the wrong type, out of range, or that asks for something Phi-3
    /// layers do not do.
    pub fn read(container: &Container) -> Result<Self> {
        refuse_split(container)?;
        let architecture = architecture(container)?;
        let keys = Keys::new(container, architecture);
        keys.refuse_other_maths()?;
        let hidden = keys.positive("embedding_length")?;
        let heads = keys.positive("attention.head_count")?;
        let kv_heads = keys.optional("attention.head_count_kv")?.unwrap_or(heads);
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(Error::BadValue {
                key: keys.key("attention.head_count_kv"),
                found: kv_heads.to_string(),
                expected: format!("a divisor of the {heads} heads"),
            });
        }
        let head_dim = match keys.optional("attention.key_length")? {
            Some(head_dim) => head_dim,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                return Err(Error::BadValue {
                    key: keys.key("embedding_length"),
                    found: hidden.to_string(),
                    expected: format!("a multiple of the {heads} heads"),
                });
            }
        };
        if let Some(value_length) = keys.optional("attention.value_length")?
            && value_length != head_dim
        {
            return Err(Error::BadValue {
                key: keys.key("attention.value_length"),
                found: value_length.to_string(),
                expected: format!("{head_dim}, as the keys have"),
            });
        }
        let rotary_dim = keys.optional("rope.dimension_count")?.unwrap_or(head_dim);
        // Llama's row order pairs rows over the whole head, so that no part of it can stay unrotated;
        // the configs of Phi-3.5-MoE and Phi-3-small know no part of a head.
        let whole = architecture != Architecture::Phi3 && rotary_dim != head_dim;
        if rotary_dim == 0 || rotary_dim % 2 != 0 || rotary_dim > head_dim || whole {
            return Err(Error::BadValue {
                key: keys.key("rope.dimension_count"),
                found: rotary_dim.to_string(),
                expected: match architecture {
                    Architecture::Llama | Architecture::Phimoe | Architecture::Phi3Small => {
                        format!("{head_dim}, the whole head")
                    }
                    Architecture::Phi3 => format!("an even number from 2 to {head_dim}"),
                },
            });
        }
        Ok(Self {
            architecture,
            hidden,
            layers: keys.positive("block_count")?,
            heads,
            kv_heads,
            head_dim,
            rotary_dim,
            intermediate: match architecture {
                // Its config may state a multiplier instead; no tensor is put together by it.
                Architecture::Phi3Small => keys.optional("feed_forward_length")?.unwrap_or(0),
                _ => keys.positive("feed_forward_length")?,
            },
            context: keys.positive("context_length")?,
            moe: match architecture {
                Architecture::Phimoe => Some(Moe::read(container, &keys)?),
                Architecture::Phi3 | Architecture::Llama | Architecture::Phi3Small => None,
            },
        })
    }

    pub fn dimensions(&self) -> Dimensions {
        Dimensions {
            layers: self.layers,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            intermediate: self.intermediate,
            experts: self.moe.as_ref().map_or(0, |moe| moe.experts),
        }
    }

    /// `config.json`.
    ///
    /// # Errors
    /// As [`Hyperparameters::read`].
    pub fn config(&self, container: &Container) -> Result<Json> {
        let keys = Keys::new(container, self.architecture);
        if self.architecture == Architecture::Phi3Small {
            let mut config = small::config(&keys)?;
            config.insert("torch_dtype".to_owned(), dtype(container).into());
            config.insert(
                "vocab_size".to_owned(),
                vocab_size(container, &keys)?.into(),
            );
            let tied = container.tensor(OUTPUT).is_none();
            config.insert("tie_word_embeddings".to_owned(), tied.into());
            insert_token_ids(container, &mut config)?;
            return Ok(config.into());
        }
        let rope_scaling = self.rope_scaling(container, &keys)?;
        let original = match keys.optional("rope.scaling.original_context_length")? {
            Some(original) => original,
            // Without two lists nothing changes at any length.
            None if container.tensor(ROPE_FACTORS_LONG).is_none() => self.context,
            None => {
                return Err(Error::MissingKey {
                    key: keys.key("rope.scaling.original_context_length"),
                    hint: "without it nobody knows where the long rope factors begin",
                });
            }
        };
        let mut config = json!({
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "attention_bias": false,
            "attention_dropout": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.context,
            "original_max_position_embeddings": original,
            "partial_rotary_factor": partial_factor(self.rotary_dim, self.head_dim),
            "rms_norm_eps": keys.float("attention.layer_norm_rms_epsilon")?.ok_or_else(|| {
                keys.missing("attention.layer_norm_rms_epsilon", "RMSNorm needs it")
            })?,
            "rope_theta": keys.float("rope.freq_base")?.unwrap_or(10000.0),
            "rope_scaling": rope_scaling,
            "sliding_window": self.sliding_window(&keys)?,
            "tie_word_embeddings": container.tensor(OUTPUT).is_none(),
            "torch_dtype": dtype(container),
            "use_cache": true,
            "vocab_size": vocab_size(container, &keys)?,
        });
        if let Some(config) = config.as_object_mut() {
            if let Some(moe) = &self.moe {
                moe.write(self, original, config);
            }
            if self.head_dim.checked_mul(self.heads) != Some(self.hidden) {
                config.insert("head_dim".to_owned(), self.head_dim.into());
            }
            insert_token_ids(container, config)?;
        }
        Ok(config)
    }

    /// The window of a Phi-3 file that does not state one was fixed in the reader until llama.cpp
    /// pull request 8931: 2047 for the two checkpoints with a context of 4096.
    fn sliding_window(&self, keys: &Keys<'_>) -> Result<Option<usize>> {
        match keys.optional("attention.sliding_window")? {
            Some(0) => Ok(None),
            Some(window) => Ok(Some(window)),
            None => {
                let early_4k = self.architecture == Architecture::Phi3
                    && self.context == 4096
                    && matches!(self.layers, 32 | 40);
                Ok(early_4k.then_some(2047))
            }
        }
    }

    fn rope_scaling(&self, container: &Container, keys: &Keys<'_>) -> Result<Option<Json>> {
        let factors = |name: &str| -> Result<Option<Vec<Json>>> {
            let Some(tensor) = container.tensor(name) else {
                return Ok(None);
            };
            let expected = self.rotary_dim / 2;
            if tensor.shape.iter().product::<usize>() != expected {
                return Err(Error::TensorShape {
                    tensor: name.to_owned(),
                    found: tensor.shape.clone(),
                    expected: format!("[{expected}], half the rotated dimensions of a head"),
                });
            }
            let values = weights::values(container, tensor)?;
            match values.iter().find(|v| !(v.is_finite() && **v > 0.0)) {
                Some(wrong) => Err(Error::TensorBytes {
                    tensor: name.to_owned(),
                    message: format!("rope factors are positive numbers, found {wrong}"),
                }),
                None => Ok(Some(values.into_iter().map(number).collect())),
            }
        };
        let one = Json::from(1.0);
        let frequencies = factors(ROPE_FREQUENCIES)?.filter(|all| all.iter().any(|f| *f != one));
        let given = (factors(ROPE_FACTORS_SHORT)?, factors(ROPE_FACTORS_LONG)?);
        let (short, long) = match (frequencies, given) {
            (None, (None, None)) => {
                keys.refuse_scaling(&["none"])?;
                return Ok(None);
            }
            // Llama 3.1's scaling divides each frequency by one factor at every length: LongRoPE whose
            // lists are the same, and whose attention factor is 1.
            (Some(factors), (None, None)) if self.architecture == Architecture::Llama => {
                keys.refuse_scaling(&["none"])?;
                return Ok(Some(json!({
                    "type": "longrope",
                    "short_factor": factors,
                    "long_factor": factors,
                    "attention_factor": 1.0,
                })));
            }
            (Some(_), _) => {
                return Err(Error::Unsupported {
                    what: format!("tensor {ROPE_FREQUENCIES:?} with factors other than 1"),
                    reason: "only Llama 3.1 and later have it, and no other rope factors"
                        .to_owned(),
                });
            }
            (None, (Some(short), Some(long))) => (short, long),
            (None, (short, _)) => {
                let [missing, present] = match short {
                    Some(_) => [ROPE_FACTORS_LONG, ROPE_FACTORS_SHORT],
                    None => [ROPE_FACTORS_SHORT, ROPE_FACTORS_LONG],
                };
                return Err(Error::MissingTensor {
                    tensor: missing.to_owned(),
                    present: present.to_owned(),
                });
            }
        };
        keys.refuse_scaling(&["none", "longrope"])?;
        let mut scaling = Map::new();
        scaling.insert("type".to_owned(), "longrope".into());
        scaling.insert("short_factor".to_owned(), short.into());
        scaling.insert("long_factor".to_owned(), long.into());
        // The converter writes √(1 + ln s / ln L); without it the model computes the same.
        if let Some(factor) = keys.float("rope.scaling.attn_factor")? {
            scaling.insert("attention_factor".to_owned(), factor.into());
        }
        Ok(Some(scaling.into()))
    }
}

/// The ids that a config.json names too.
fn insert_token_ids(container: &Container, config: &mut Map<String, Json>) -> Result<()> {
    for (name, key) in [
        ("bos_token_id", "bos_token_id"),
        ("eos_token_id", "eos_token_id"),
        ("pad_token_id", "padding_token_id"),
    ] {
        if let Some(id) = token_id(container, key)? {
            config.insert(name.to_owned(), id.into());
        }
    }
    Ok(())
}

/// `generation_config.json`: every token that ends generation, and bos and pad.
///
/// # Errors
/// An id that is not a number.
pub(super) fn generation_config(container: &Container) -> Result<Json> {
    let mut ends = Vec::new();
    for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
        ends.extend(token_id(container, key)?);
    }
    let texts = container
        .get("tokenizer.ggml.tokens")
        .and_then(Value::as_array)
        .and_then(Array::as_texts)
        .unwrap_or_default();
    let types = container
        .get("tokenizer.ggml.token_type")
        .and_then(Value::as_array);
    for (id, text) in texts.iter().enumerate() {
        // An ordinary token of that spelling is text.
        let special = matches!(types.and_then(|types| types.get(id)?.as_u64()), Some(3 | 4));
        if special && text.as_str().is_some_and(|text| END_TOKENS.contains(&text)) {
            ends.push(id as u64);
        }
    }
    let mut seen = std::collections::BTreeSet::new();
    ends.retain(|id| seen.insert(*id));
    let mut config = Map::new();
    if let Some(id) = token_id(container, "bos_token_id")? {
        config.insert("bos_token_id".to_owned(), id.into());
    }
    config.insert("eos_token_id".to_owned(), ends.into());
    if let Some(id) = token_id(container, "padding_token_id")? {
        config.insert("pad_token_id".to_owned(), id.into());
    }
    Ok(config.into())
}

/// A token id below `tokenizer.ggml.`.
pub(super) fn token_id(container: &Container, name: &str) -> Result<Option<u64>> {
    let key = format!("tokenizer.ggml.{name}");
    match container.get(&key) {
        None => Ok(None),
        // Some converters write -1 for "none".
        Some(Value::I32(..=-1) | Value::U32(u32::MAX)) => Ok(None),
        Some(value) => value
            .as_u64()
            .map(Some)
            .ok_or_else(|| bad(&key, value, "a token id")),
    }
}

fn refuse_split(container: &Container) -> Result<()> {
    match container.get("split.count").and_then(Value::as_u64) {
        Some(parts @ 2..) => Err(Error::Unsupported {
            what: format!("one model in {parts} GGUF files"),
            reason: "join them first, with llama-gguf-split --merge".to_owned(),
        }),
        _ => Ok(()),
    }
}

/// Rows of the embedding: a model's vocabulary is padded beyond its tokens.
fn vocab_size(container: &Container, keys: &Keys<'_>) -> Result<usize> {
    let tokens = container
        .get("tokenizer.ggml.tokens")
        .and_then(Value::as_array)
        .map(Array::len);
    let rows = container
        .tensor(TOKEN_EMBEDDING)
        .and_then(|tensor| tensor.shape.first().copied());
    match (rows, tokens) {
        (Some(rows), Some(tokens)) if tokens > rows => Err(Error::BadValue {
            key: "tokenizer.ggml.tokens".to_owned(),
            found: format!("{tokens} tokens"),
            expected: format!("at most {rows}, the rows of {TOKEN_EMBEDDING}"),
        }),
        (Some(rows), _) => Ok(rows),
        (None, Some(tokens)) => Ok(tokens),
        (None, None) => keys.positive("vocab_size"),
    }
}

/// What the file was made from, as far as it shows: the type of dense weights.
fn dtype(container: &Container) -> &'static str {
    let has = |name: &str| {
        container
            .tensors()
            .iter()
            .any(|tensor| tensor.shape.len() > 1 && tensor.tensor_type.name() == name)
    };
    let all_f32 = !container.tensors().is_empty()
        && container
            .tensors()
            .iter()
            .all(|t| t.tensor_type.name() == "F32");
    if has("BF16") {
        "bfloat16"
    } else if all_f32 {
        "float32"
    } else {
        "float16"
    }
}

/// The factor `p` with `int(head_dim * p) == rotary_dim`, as transformers computes it.
fn partial_factor(rotary_dim: usize, head_dim: usize) -> f64 {
    let exact = rotary_dim as f64 / head_dim as f64;
    if (head_dim as f64 * exact) as usize == rotary_dim {
        exact
    } else {
        (rotary_dim as f64 + 0.5) / head_dim as f64
    }
}

fn number(value: f32) -> Json {
    Value::F32(value).as_f64().into()
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
