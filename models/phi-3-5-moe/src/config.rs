//! config.json of model_type `phimoe`.

use phi3_nn::config::{self, MAX_COUNT, MAX_SIZE};
use phi3_nn::rope::{LongRope, RopeKind, RopeParameters, RopeScalingConfig};
use phi3_nn::{AttentionPattern, CacheSpec, CacheStore, Error, ModelInfo, Recompute, Result};
use serde::Deserialize;

use crate::router::RouterKind;

/// config.json as it is written; fields that play no role at inference are left out.
#[derive(Clone, Debug, Deserialize)]
#[allow(missing_docs, reason = "the names are Hugging Face's")]
pub struct RawConfig {
    pub hidden_size: usize,
    /// Of one expert.
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub vocab_size: usize,
    pub num_key_value_heads: Option<usize>,
    pub head_dim: Option<usize>,
    #[serde(default = "default_experts")]
    pub num_local_experts: usize,
    #[serde(default = "default_experts_per_tok")]
    pub num_experts_per_tok: usize,
    #[serde(default = "default_jitter")]
    pub router_jitter_noise: f64,
    /// An addition of this library: a name of [`RouterKind`].
    pub router_type: Option<String>,
    #[serde(default = "default_positions")]
    pub max_position_embeddings: usize,
    pub original_max_position_embeddings: Option<usize>,
    #[serde(default = "default_eps")]
    pub rms_norm_eps: f64,
    pub rope_theta: Option<f64>,
    /// How transformers up to version 4 writes the rope.
    pub rope_scaling: Option<RopeScalingConfig>,
    /// How transformers 5 writes it, `rope_theta` included.
    pub rope_parameters: Option<RopeScalingConfig>,
    pub partial_rotary_factor: Option<f64>,
    pub sliding_window: Option<usize>,
    #[serde(default)]
    pub tie_word_embeddings: bool,
    pub hidden_act: Option<String>,
    #[serde(default)]
    pub attention_bias: bool,
    #[serde(default)]
    pub lm_head_bias: bool,
}

fn default_experts() -> usize {
    16
}

fn default_experts_per_tok() -> usize {
    2
}

fn default_jitter() -> f64 {
    0.01
}

fn default_positions() -> usize {
    131_072
}

fn default_eps() -> f64 {
    1e-5
}

/// The default of the reference's config class; the published checkpoint states 10000.
const DEFAULT_THETA: f64 = 1e6;

/// A checked configuration: every size is positive and they fit each other.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Width H of the residual stream.
    pub hidden_size: usize,
    /// Width I of an expert.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads h.
    pub num_attention_heads: usize,
    /// Key/value heads k; divides h.
    pub num_key_value_heads: usize,
    /// Width d of a head.
    pub head_dim: usize,
    /// Experts E of a layer.
    pub num_local_experts: usize,
    /// Experts K that a token takes; at most E.
    pub num_experts_per_tok: usize,
    /// Jitter ε of the router.
    pub router_jitter_noise: f64,
    /// How the router chooses.
    pub router: RouterKind,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Longest sequence, in tokens.
    pub max_position_embeddings: usize,
    /// Epsilon of every norm.
    pub rms_norm_eps: f64,
    /// Rotary embedding of every layer.
    pub rope: RopeParameters,
    /// Which keys a query sees, in every layer.
    pub attention: AttentionPattern,
    /// Whether q, k, v and o have biases.
    pub attention_bias: bool,
    /// Whether the output head has one.
    pub lm_head_bias: bool,
}

impl Config {
    /// Reads and checks a config.json.
    ///
    /// # Errors
    /// [`Error::Config`] naming the field that is missing, malformed or unsupported.
    pub fn from_json(config: &serde_json::Value) -> Result<Self> {
        config::from_json::<RawConfig>(config)?.try_into()
    }

    /// What a caller may want to know of the model.
    pub fn info(&self) -> ModelInfo {
        ModelInfo {
            model_type: "phimoe".to_owned(),
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            num_hidden_layers: self.num_hidden_layers,
            max_position_embeddings: self.max_position_embeddings,
            original_max_position_embeddings: self.rope.original_max_position_embeddings(),
        }
    }

    /// Geometry and rules of the model's caches.
    pub fn cache_spec(&self, store: CacheStore) -> CacheSpec {
        CacheSpec {
            patterns: vec![self.attention; self.num_hidden_layers],
            num_key_value_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
            rope_limit: self.rope.original_max_position_embeddings(),
            recompute: Recompute::Always,
            max_len: self.max_position_embeddings,
            store,
        }
    }
}

impl TryFrom<RawConfig> for Config {
    type Error = Error;

    fn try_from(raw: RawConfig) -> Result<Self> {
        let num_key_value_heads = raw.num_key_value_heads.unwrap_or(raw.num_attention_heads);
        let heads = ("num_attention_heads", raw.num_attention_heads);
        let kv_heads = ("num_key_value_heads", num_key_value_heads);
        config::check_sizes(
            MAX_COUNT,
            &[
                ("num_hidden_layers", raw.num_hidden_layers),
                ("num_local_experts", raw.num_local_experts),
                ("num_experts_per_tok", raw.num_experts_per_tok),
            ],
        )?;
        config::check_sizes(
            MAX_SIZE,
            &[
                ("hidden_size", raw.hidden_size),
                ("intermediate_size", raw.intermediate_size),
                heads,
                kv_heads,
                ("vocab_size", raw.vocab_size),
                ("max_position_embeddings", raw.max_position_embeddings),
            ],
        )?;
        if raw.num_experts_per_tok > raw.num_local_experts {
            return Err(Error::config(format!(
                "num_experts_per_tok {} is more than num_local_experts {}",
                raw.num_experts_per_tok, raw.num_local_experts
            )));
        }
        config::check_multiple(heads, kv_heads)?;
        let head_dim = config::head_dim(raw.head_dim, raw.hidden_size, raw.num_attention_heads)?;
        if !head_dim.is_multiple_of(2) {
            return Err(Error::config(format!(
                "head_dim is {head_dim}, which is no model's"
            )));
        }
        config::check_not_negative("rms_norm_eps", raw.rms_norm_eps)?;
        config::check_not_negative("router_jitter_noise", raw.router_jitter_noise)?;
        config::check_only("phimoe", "hidden_act", raw.hidden_act.as_deref(), "silu")?;
        if raw.tie_word_embeddings {
            return Err(Error::config(
                "tie_word_embeddings is not supported; phimoe has a head of its own",
            ));
        }
        let router = match raw.router_type.as_deref() {
            Some(name) => RouterKind::from_name(name)?,
            None => RouterKind::default(),
        };
        Ok(Self {
            hidden_size: raw.hidden_size,
            intermediate_size: raw.intermediate_size,
            num_hidden_layers: raw.num_hidden_layers,
            num_attention_heads: raw.num_attention_heads,
            num_key_value_heads,
            head_dim,
            num_local_experts: raw.num_local_experts,
            num_experts_per_tok: raw.num_experts_per_tok,
            router_jitter_noise: raw.router_jitter_noise,
            router,
            vocab_size: raw.vocab_size,
            max_position_embeddings: raw.max_position_embeddings,
            rms_norm_eps: raw.rms_norm_eps,
            rope: rope_parameters(&raw, head_dim)?,
            attention: AttentionPattern::from_sliding_window(
                raw.sliding_window,
                raw.max_position_embeddings,
            )?,
            attention_bias: raw.attention_bias,
            lm_head_bias: raw.lm_head_bias,
        })
    }
}

fn rope_parameters(raw: &RawConfig, head_dim: usize) -> Result<RopeParameters> {
    let none = RopeScalingConfig::default();
    let scaling = raw
        .rope_parameters
        .as_ref()
        .or(raw.rope_scaling.as_ref())
        .unwrap_or(&none);
    let theta = scaling.theta(raw.rope_theta, DEFAULT_THETA)?;
    let partial = scaling.partial_rotary_factor.or(raw.partial_rotary_factor);
    if let Some(partial) = partial.filter(|partial| *partial != 1.0) {
        return Err(Error::config(format!(
            "partial_rotary_factor {partial} is not supported; phimoe rotates whole heads"
        )));
    }
    let long = match scaling.kind()? {
        RopeKind::Default => None,
        RopeKind::LongRope => {
            let original = scaling
                .original_max_position_embeddings
                .or(raw.original_max_position_embeddings);
            let mut long =
                LongRope::from_config(scaling, head_dim, original, raw.max_position_embeddings)?;
            let mscale = |name: &str, value: Option<f64>| match value {
                Some(value) if value.is_finite() && value > 0.0 => Ok(value),
                Some(value) => Err(Error::config(format!("rope_scaling.{name} is {value}"))),
                None => Err(Error::config(format!(
                    "rope_scaling.{name} is missing; phimoe states it with longrope"
                ))),
            };
            long.short_mscale = mscale("short_mscale", scaling.short_mscale)?;
            long.long_mscale = mscale("long_mscale", scaling.long_mscale)?;
            Some(long)
        }
    };
    Ok(RopeParameters {
        theta,
        rotary_dim: head_dim,
        long,
    })
}
