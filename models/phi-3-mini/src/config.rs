//! config.json of model_type `phi3`.

use phi3_nn::config::{self, MAX_COUNT, MAX_SIZE};
use phi3_nn::rope::{LongRope, RopeKind, RopeParameters, RopeScalingConfig};
use phi3_nn::{AttentionPattern, CacheSpec, CacheStore, Error, ModelInfo, Recompute, Result};
use serde::Deserialize;

/// config.json as it is written; fields that play no role at inference are left out.
#[derive(Clone, Debug, Deserialize)]
#[allow(missing_docs, reason = "the names are Hugging Face's")]
pub struct RawConfig {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub vocab_size: usize,
    pub num_key_value_heads: Option<usize>,
    pub head_dim: Option<usize>,
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
    pub mlp_bias: bool,
    #[serde(default)]
    pub lm_head_bias: bool,
}

fn default_positions() -> usize {
    4096
}

fn default_eps() -> f64 {
    1e-5
}

/// A checked configuration: every size is positive and they fit each other.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Width H of the residual stream.
    pub hidden_size: usize,
    /// Width I of the feed-forward block.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads h.
    pub num_attention_heads: usize,
    /// Key/value heads k; divides h.
    pub num_key_value_heads: usize,
    /// Width d of a head.
    pub head_dim: usize,
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
    /// Whether the output head is the embedding itself.
    pub tie_word_embeddings: bool,
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
            model_type: "phi3".to_owned(),
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
        config::check_sizes(MAX_COUNT, &[("num_hidden_layers", raw.num_hidden_layers)])?;
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
        config::check_multiple(heads, kv_heads)?;
        let head_dim = config::head_dim(raw.head_dim, raw.hidden_size, raw.num_attention_heads)?;
        config::check_not_negative("rms_norm_eps", raw.rms_norm_eps)?;
        config::check_only("phi3", "hidden_act", raw.hidden_act.as_deref(), "silu")?;
        for (name, set) in [
            ("attention_bias", raw.attention_bias),
            ("mlp_bias", raw.mlp_bias),
            ("lm_head_bias", raw.lm_head_bias),
        ] {
            if set {
                return Err(Error::config(format!(
                    "{name} is not supported; phi3 has no biases"
                )));
            }
        }
        Ok(Self {
            hidden_size: raw.hidden_size,
            intermediate_size: raw.intermediate_size,
            num_hidden_layers: raw.num_hidden_layers,
            num_attention_heads: raw.num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size: raw.vocab_size,
            max_position_embeddings: raw.max_position_embeddings,
            rms_norm_eps: raw.rms_norm_eps,
            rope: rope_parameters(&raw, head_dim)?,
            attention: AttentionPattern::from_sliding_window(
                raw.sliding_window,
                raw.max_position_embeddings,
            )?,
            tie_word_embeddings: raw.tie_word_embeddings,
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
    let theta = scaling.theta(raw.rope_theta, 10_000.0)?;
    let partial = scaling
        .partial_rotary_factor
        .or(raw.partial_rotary_factor)
        .unwrap_or(1.0);
    if !(partial > 0.0 && partial <= 1.0) {
        return Err(Error::config(format!(
            "partial_rotary_factor is {partial}, not in (0, 1]"
        )));
    }
    let rotary_dim = (head_dim as f64 * partial) as usize;
    if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
        return Err(Error::config(format!(
            "{rotary_dim} of {head_dim} dimensions are rotated, which is not a positive even number"
        )));
    }
    let long = match scaling.kind()? {
        RopeKind::Default => None,
        RopeKind::LongRope => {
            // 4096 is the default of the reference's config class.
            let original = raw.original_max_position_embeddings.or_else(|| {
                scaling
                    .original_max_position_embeddings
                    .is_none()
                    .then_some(4096)
            });
            Some(LongRope::from_config(
                scaling,
                rotary_dim,
                original,
                raw.max_position_embeddings,
            )?)
        }
    };
    Ok(RopeParameters {
        theta,
        rotary_dim,
        long,
    })
}
