//! Metadata of a file to be written: what [`super::config`] and [`super::tokenizer`] read, the other
//! way round, in the spelling of llama.cpp's converter.

mod tokenizer;

use phi3_nn::rope::{LongRope, RopeKind, RopeScalingConfig};
use serde::Deserialize;
use serde_json::Value as Json;

use super::names::{Architecture, ROPE_FACTORS_LONG, ROPE_FACTORS_SHORT};
use super::value::Value;
use super::{moe, small};

pub(crate) use tokenizer::tokenizer;

/// What a file says of its model, but for the tokenizer.
pub(crate) struct Metadata {
    pub values: Vec<(String, Value)>,
    /// Names and values of the rope factors, which are tensors.
    pub rope_factors: Vec<(&'static str, Vec<f32>)>,
}

/// The version of the block formats.
const QUANTIZATION_VERSION: u32 = 2;

/// The fields of config.json that a file states, with the defaults of Hugging Face's config class.
#[derive(Deserialize)]
struct Config {
    hidden_size: u32,
    intermediate_size: u32,
    num_hidden_layers: u32,
    num_attention_heads: u32,
    num_key_value_heads: Option<u32>,
    head_dim: Option<u32>,
    vocab_size: u32,
    #[serde(default = "default_positions")]
    max_position_embeddings: u32,
    original_max_position_embeddings: Option<u32>,
    #[serde(default = "default_eps")]
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_scaling: Option<RopeScalingConfig>,
    rope_parameters: Option<RopeScalingConfig>,
    partial_rotary_factor: Option<f64>,
    sliding_window: Option<u32>,
}

fn default_positions() -> u32 {
    4096
}

fn default_eps() -> f64 {
    1e-5
}

/// The architecture of a model that has this config.
///
/// # Errors
/// A `model_type` that cannot be written.
pub(crate) fn architecture(config: &Json) -> Result<Architecture, String> {
    match config.get("model_type").and_then(Json::as_str) {
        Some("phi3") => Ok(Architecture::Phi3),
        Some("phimoe") => Ok(Architecture::Phimoe),
        Some("phi3small") => Ok(Architecture::Phi3Small),
        Some("phi3_v") => Err(
            "model_type \"phi3_v\" cannot be quantized into a file; quantize it while it is loaded \
             (--quantize TYPE of the other commands)"
                .to_owned(),
        ),
        other => Err(format!(
            "model_type {:?} cannot be quantized into a file, only \"phi3\", \"phi3small\" and \"phimoe\"",
            other.unwrap_or("(none)")
        )),
    }
}

/// The metadata of a model of `model_type` phi3, phi3small or phimoe whose weights are stored as `file_type` says.
///
/// # Errors
/// What is wrong with the config.
pub(crate) fn model(config: &Json, name: &str, file_type: u32) -> Result<Metadata, String> {
    let architecture = architecture(config).unwrap_or(Architecture::Phi3);
    let prefix = architecture.name();
    let general = general(prefix, name, file_type);
    if architecture == Architecture::Phi3Small {
        let own = small::values(config)?.into_iter();
        let own = own.map(|(key, value)| (format!("{prefix}.{key}"), value));
        return Ok(Metadata {
            values: general.into_iter().chain(own).collect(),
            rope_factors: Vec::new(),
        });
    }
    let raw = Config::deserialize(config).map_err(|error| error.to_string())?;
    let heads = raw.num_attention_heads;
    let head_dim = match raw.head_dim {
        Some(head_dim) => head_dim,
        None if heads > 0 && raw.hidden_size.is_multiple_of(heads) => raw.hidden_size / heads,
        None => {
            return Err(format!(
                "hidden_size {} is not a multiple of num_attention_heads {heads}",
                raw.hidden_size
            ));
        }
    };
    let none = RopeScalingConfig::default();
    let rope = raw
        .rope_parameters
        .as_ref()
        .or(raw.rope_scaling.as_ref())
        .unwrap_or(&none);
    let partial = rope
        .partial_rotary_factor
        .or(raw.partial_rotary_factor)
        .unwrap_or(1.0);
    if !(partial > 0.0 && partial <= 1.0) {
        return Err(format!("partial_rotary_factor is {partial}, not in (0, 1]"));
    }
    let rotary_dim = (f64::from(head_dim) * partial) as u32;
    let mut longrope = longrope(&raw, rope, rotary_dim)?;
    let moe = architecture == Architecture::Phimoe;
    if moe && let Some(longrope) = &mut longrope {
        let stated = |name: &str, value: Option<f64>| {
            value.ok_or_else(|| format!("rope_scaling.{name} is missing"))
        };
        longrope.short_mscale = stated("short_mscale", rope.short_mscale)?;
        longrope.long_mscale = stated("long_mscale", rope.long_mscale)?;
    }
    let trained = longrope.as_ref().map_or_else(
        || {
            raw.original_max_position_embeddings
                .unwrap_or(raw.max_position_embeddings)
        },
        |rope| u32::try_from(rope.original_max_position_embeddings).unwrap_or(u32::MAX),
    );

    let mut values = general;
    let mut set = |key: &str, value: Value| values.push((format!("{prefix}.{key}"), value));
    for (key, number) in [
        ("context_length", raw.max_position_embeddings),
        ("rope.scaling.original_context_length", trained),
        ("embedding_length", raw.hidden_size),
        ("feed_forward_length", raw.intermediate_size),
        ("block_count", raw.num_hidden_layers),
        ("attention.head_count", heads),
        (
            "attention.head_count_kv",
            raw.num_key_value_heads.unwrap_or(heads),
        ),
        ("rope.dimension_count", rotary_dim),
        // 0 is none; a file without the key is taken for one of an early converter.
        ("attention.sliding_window", raw.sliding_window.unwrap_or(0)),
        ("vocab_size", raw.vocab_size),
    ] {
        set(key, number.into());
    }
    if head_dim.checked_mul(heads) != Some(raw.hidden_size) {
        set("attention.key_length", head_dim.into());
        set("attention.value_length", head_dim.into());
    }
    set(
        "attention.layer_norm_rms_epsilon",
        (raw.rms_norm_eps as f32).into(),
    );
    // The defaults of the reference's config classes.
    let default_theta = if moe { 1e6 } else { 10_000.0 };
    let theta = rope.rope_theta.or(raw.rope_theta).unwrap_or(default_theta);
    set("rope.freq_base", (theta as f32).into());
    if moe {
        let fields = moe::Fields::deserialize(config).map_err(|error| error.to_string())?;
        let mscales = longrope.as_ref();
        let mscales = mscales.map(|rope| [rope.short_mscale, rope.long_mscale]);
        for (key, value) in fields.keys(mscales) {
            set(key, value);
        }
    }
    let mut rope_factors = Vec::new();
    if let Some(rope) = longrope {
        set(
            "rope.scaling.attn_factor",
            (rope.short_mscale as f32).into(),
        );
        for (name, factors) in [
            (ROPE_FACTORS_LONG, rope.long_factor),
            (ROPE_FACTORS_SHORT, rope.short_factor),
        ] {
            rope_factors.push((name, factors.into_iter().map(|f| f as f32).collect()));
        }
    }
    Ok(Metadata {
        values,
        rope_factors,
    })
}

/// What every file says of itself.
fn general(architecture: &str, name: &str, file_type: u32) -> Vec<(String, Value)> {
    let mut values: Vec<(String, Value)> = vec![
        ("general.architecture".to_owned(), architecture.into()),
        ("general.type".to_owned(), "model".into()),
    ];
    if !name.is_empty() {
        values.push(("general.name".to_owned(), name.into()));
    }
    values.push(("general.file_type".to_owned(), file_type.into()));
    values.push((
        "general.quantization_version".to_owned(),
        QUANTIZATION_VERSION.into(),
    ));
    values
}

fn longrope(
    raw: &Config,
    rope: &RopeScalingConfig,
    rotary_dim: u32,
) -> Result<Option<LongRope>, String> {
    let kind = rope.kind().map_err(|error| error.to_string())?;
    if kind == RopeKind::Default {
        return Ok(None);
    }
    // 4096 is the default of the reference's config class.
    let original = raw
        .original_max_position_embeddings
        .map(|n| n as usize)
        .or_else(|| {
            let inside = rope.original_max_position_embeddings;
            inside.is_none().then_some(4096)
        });
    LongRope::from_config(
        rope,
        rotary_dim as usize,
        original,
        raw.max_position_embeddings as usize,
    )
    .map(Some)
    .map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests;
