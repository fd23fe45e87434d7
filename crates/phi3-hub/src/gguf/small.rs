//! GGUF files of architecture `phi3small`: a form of this project's own, since llama.cpp has none.
//!
//! Every field of Phi-3-small's config.json that its results depend on is a key below `phi3small.`,
//! under llama.cpp's name where it has one. A field that config.json leaves out is left out here too,
//! and has the same default in either. Floats are f64, as wide as in config.json, so that a file of f32
//! weights gives the very logits of the folder it was made from.
//!
//! | key | field of config.json |
//! | --- | --- |
//! | `context_length` | `max_position_embeddings` |
//! | `embedding_length` | `hidden_size` |
//! | `block_count` | `num_hidden_layers` |
//! | `vocab_size` | `vocab_size` |
//! | `attention.head_count` | `num_attention_heads` |
//! | `attention.head_count_kv` | `num_key_value_heads` |
//! | `attention.layer_norm_epsilon` | `layer_norm_epsilon` |
//! | `attention.dense_every_n_layers` | `dense_attention_every_n_layers` |
//! | `attention.block_sparse.block_size` | `blocksparse_block_size` |
//! | `attention.block_sparse.local_blocks` | `blocksparse_num_local_blocks` |
//! | `attention.block_sparse.vertical_stride` | `blocksparse_vert_stride` |
//! | `attention.block_sparse.same_for_all_heads` | `blocksparse_homo_head_pattern` |
//! | `feed_forward_length` | `ff_intermediate_size` |
//! | `feed_forward_multiplier` | `ff_dim_multiplier` |
//! | `feed_forward_pad_to_256` | `gegelu_pad_to_256` |
//! | `gegelu_limit` | `gegelu_limit` |
//! | `mup.use_scaling` | `mup_use_scaling` |
//! | `mup.attention_multiplier` | `mup_attn_multiplier` |
//! | `mup.embedding_multiplier` | `mup_embedding_multiplier` |
//! | `mup.width_multiplier` | `mup_width_multiplier` |
//! | `dummy_token_ids` | `dummy_token_indices` |
//! | `rope.freq_base` | `rope_embedding_base` |
//! | `rope.position_scale` | `rope_position_scale` |
//! | `rope.scaling.type` | `rope_scaling.type`, which is `longrope`; the keys below belong to it |
//! | `rope.scaling.original_context_length` | `rope_scaling.original_max_position_embeddings` |
//! | `rope.scaling.short_factor`, `.long_factor` | `rope_scaling.short_factor`, `.long_factor`: arrays |
//! | `rope.scaling.short_mscale`, `.long_mscale` | `rope_scaling.short_mscale`, `.long_mscale` |
//! | `rope.scaling.attn_factor` | `rope_scaling.attention_factor` |
//! | `rope.scaling.factor_rule` | `rope_scaling.factor_rule` |
//!
//! Tensors have llama.cpp's names, each with a `.weight` and a `.bias`, and their rows lie as in the
//! checkpoint: those of `attn_qkv` grouped by key/value head (its queries, then its key, then its
//! value), those of `ffn_up` in pairs of the activation's two halves. `output.weight` is absent where
//! the embedding is the output head.
//!
//! The tokenizer is llama.cpp's model `gpt2` with `pre` = `llama-bpe`, which is cl100k's rule: `tokens`
//! spells the ranks in GPT-2's characters for bytes, `merges` are those by which the ranks arise, in
//! the order of ranks, and the special tokens and dummies are control tokens behind them.

use phi3_nn::rope::{RopeKind, RopeScalingConfig};
use serde::Deserialize;
use serde_json::{Map, Value as Json, json};

use super::error::Result;
use super::keys::{Keys, bad};
use super::value::{Array, Value};

/// A key below the architecture's name, and the field that it holds, as a JSON pointer.
struct Field {
    key: &'static str,
    pointer: &'static str,
    kind: Kind,
    required: bool,
}

#[derive(Clone, Copy)]
enum Kind {
    Number,
    Float,
    Flag,
    Text,
    Numbers,
    Floats,
}

const fn required(key: &'static str, pointer: &'static str, kind: Kind) -> Field {
    Field {
        key,
        pointer,
        kind,
        required: true,
    }
}

const fn optional(key: &'static str, pointer: &'static str, kind: Kind) -> Field {
    Field {
        key,
        pointer,
        kind,
        required: false,
    }
}

const FIELDS: [Field; 23] = [
    required("context_length", "/max_position_embeddings", Kind::Number),
    required("embedding_length", "/hidden_size", Kind::Number),
    required("block_count", "/num_hidden_layers", Kind::Number),
    required("vocab_size", "/vocab_size", Kind::Number),
    required("attention.head_count", "/num_attention_heads", Kind::Number),
    required(
        "attention.head_count_kv",
        "/num_key_value_heads",
        Kind::Number,
    ),
    optional(
        "attention.layer_norm_epsilon",
        "/layer_norm_epsilon",
        Kind::Float,
    ),
    optional(
        "attention.dense_every_n_layers",
        "/dense_attention_every_n_layers",
        Kind::Number,
    ),
    required(
        "attention.block_sparse.block_size",
        "/blocksparse_block_size",
        Kind::Number,
    ),
    required(
        "attention.block_sparse.local_blocks",
        "/blocksparse_num_local_blocks",
        Kind::Number,
    ),
    required(
        "attention.block_sparse.vertical_stride",
        "/blocksparse_vert_stride",
        Kind::Number,
    ),
    required(
        "attention.block_sparse.same_for_all_heads",
        "/blocksparse_homo_head_pattern",
        Kind::Flag,
    ),
    optional("feed_forward_length", "/ff_intermediate_size", Kind::Number),
    optional(
        "feed_forward_multiplier",
        "/ff_dim_multiplier",
        Kind::Number,
    ),
    optional("feed_forward_pad_to_256", "/gegelu_pad_to_256", Kind::Flag),
    required("gegelu_limit", "/gegelu_limit", Kind::Float),
    optional("mup.use_scaling", "/mup_use_scaling", Kind::Flag),
    optional(
        "mup.attention_multiplier",
        "/mup_attn_multiplier",
        Kind::Float,
    ),
    optional(
        "mup.embedding_multiplier",
        "/mup_embedding_multiplier",
        Kind::Float,
    ),
    optional("mup.width_multiplier", "/mup_width_multiplier", Kind::Float),
    optional("dummy_token_ids", "/dummy_token_indices", Kind::Numbers),
    required("rope.freq_base", "/rope_embedding_base", Kind::Float),
    optional("rope.position_scale", "/rope_position_scale", Kind::Float),
];

const SCALING_TYPE: &str = "rope.scaling.type";

/// Of a model with LongRoPE; the pointers begin at its `rope_scaling`.
const LONGROPE: [Field; 7] = [
    required(
        "rope.scaling.original_context_length",
        "/original_max_position_embeddings",
        Kind::Number,
    ),
    optional("rope.scaling.short_factor", "/short_factor", Kind::Floats),
    optional("rope.scaling.long_factor", "/long_factor", Kind::Floats),
    optional("rope.scaling.short_mscale", "/short_mscale", Kind::Float),
    optional("rope.scaling.long_mscale", "/long_mscale", Kind::Float),
    optional("rope.scaling.attn_factor", "/attention_factor", Kind::Float),
    optional("rope.scaling.factor_rule", "/factor_rule", Kind::Text),
];

/// The keys below the architecture's name for a config.json, and their values.
///
/// # Errors
/// A field that is missing or of another type, named.
pub(super) fn values(config: &Json) -> std::result::Result<Vec<(&'static str, Value)>, String> {
    match config.get("hidden_act") {
        None | Some(Json::Null) => {}
        Some(act) if act == "gegelu" => {}
        Some(act) => return Err(format!("hidden_act {act} is not \"gegelu\"")),
    }
    let mut values = Vec::new();
    for field in &FIELDS {
        field.write(config, &mut values)?;
    }
    let rope = match config.get("rope_scaling") {
        None | Some(Json::Null) => return Ok(values),
        Some(rope) => rope,
    };
    let kind = RopeScalingConfig::deserialize(rope)
        .map_err(|error| format!("rope_scaling: {error}"))?
        .kind()
        .map_err(|error| error.to_string())?;
    if kind == RopeKind::LongRope {
        values.push((SCALING_TYPE, "longrope".into()));
        let mut rope = rope.clone();
        // Where it stands inside, that one counts.
        let inside = rope
            .get("original_max_position_embeddings")
            .is_some_and(|original| !original.is_null());
        if let (false, Some(original)) = (inside, config.get("original_max_position_embeddings")) {
            rope["original_max_position_embeddings"] = original.clone();
        }
        for field in &LONGROPE {
            field.write(&rope, &mut values)?;
        }
    }
    Ok(values)
}

/// The fields of config.json that the keys of a file hold.
///
/// # Errors
/// A key that is missing or of another type, or another rope scaling than LongRoPE.
pub(super) fn config(keys: &Keys<'_>) -> Result<Map<String, Json>> {
    let mut config = Map::new();
    config.insert("architectures".to_owned(), json!(["Phi3SmallForCausalLM"]));
    config.insert("model_type".to_owned(), "phi3small".into());
    config.insert("hidden_act".to_owned(), "gegelu".into());
    config.insert("attention_bias".to_owned(), true.into());
    for field in &FIELDS {
        field.read(keys, &mut config)?;
    }
    keys.refuse_scaling(&["none", "longrope"])?;
    if keys.text(SCALING_TYPE)? == Some("longrope") {
        let mut rope = Map::new();
        rope.insert("type".to_owned(), "longrope".into());
        for field in &LONGROPE {
            field.read(keys, &mut rope)?;
        }
        config.insert("rope_scaling".to_owned(), rope.into());
    }
    Ok(config)
}

impl Field {
    fn name(&self) -> &'static str {
        self.pointer.trim_start_matches('/')
    }

    fn write(
        &self,
        config: &Json,
        values: &mut Vec<(&'static str, Value)>,
    ) -> std::result::Result<(), String> {
        match config.pointer(self.pointer) {
            None | Some(Json::Null) if self.required => Err(format!("{} is missing", self.name())),
            None | Some(Json::Null) => Ok(()),
            Some(json) => {
                let value = self.kind.value(json).ok_or_else(|| {
                    format!("{} is {json}, not {}", self.name(), self.kind.expected())
                })?;
                values.push((self.key, value));
                Ok(())
            }
        }
    }

    fn read(&self, keys: &Keys<'_>, config: &mut Map<String, Json>) -> Result<()> {
        let Some(value) = keys.get(self.key) else {
            return match self.required {
                true => Err(keys.missing(self.key, "the model's results depend on it")),
                false => Ok(()),
            };
        };
        let json = self
            .kind
            .json(value)
            .ok_or_else(|| bad(&keys.key(self.key), value, self.kind.expected()))?;
        config.insert(self.name().to_owned(), json);
        Ok(())
    }
}

impl Kind {
    fn expected(self) -> &'static str {
        match self {
            Self::Number => "a number below 2^31",
            Self::Float => "a finite number",
            Self::Flag => "true or false",
            Self::Text => "a text",
            Self::Numbers => "an array of numbers below 2^31",
            Self::Floats => "an array of finite numbers",
        }
    }

    fn value(self, json: &Json) -> Option<Value> {
        let number = |json: &Json| Some(u32::try_from(json.as_u64()?).ok()?).filter(fits);
        let list = json.as_array();
        Some(match self {
            Self::Number => number(json)?.into(),
            Self::Float => json.as_f64()?.into(),
            Self::Flag => json.as_bool()?.into(),
            Self::Text => json.as_str()?.into(),
            Self::Numbers => Array::U32(list?.iter().map(number).collect::<Option<_>>()?).into(),
            Self::Floats => {
                Array::F64(list?.iter().map(Json::as_f64).collect::<Option<_>>()?).into()
            }
        })
    }

    fn json(self, value: &Value) -> Option<Json> {
        let number = |number: u64| u32::try_from(number).ok().filter(fits);
        let finite = |number: &f64| number.is_finite();
        let list = value.as_array();
        Some(match self {
            Self::Number => number(value.as_u64()?)?.into(),
            Self::Float => value.as_f64().filter(finite)?.into(),
            Self::Flag => value.as_bool()?.into(),
            Self::Text => value.as_str()?.into(),
            Self::Numbers => {
                let numbers = list?.to_u64s()?.into_iter().map(number);
                numbers.collect::<Option<Vec<_>>>()?.into()
            }
            Self::Floats => {
                let numbers = list?.to_f64s()?;
                numbers.iter().all(finite).then_some(numbers)?.into()
            }
        })
    }
}

/// What the reader takes for a size or an id.
fn fits(number: &u32) -> bool {
    *number < 1 << 31
}

#[cfg(test)]
#[path = "small_tests.rs"]
mod tests;
