//! config.json of model_type `phi3small`.

use phi3_nn::config::{self, MAX_COUNT, MAX_SIZE};
use phi3_nn::rope::{LongRope, RopeKind, RopeParameters, RopeScalingConfig};
use phi3_nn::{
    AttentionPattern, BlockSparseLayout, CacheSpec, CacheStore, Error, ModelInfo, Recompute, Result,
};
use serde::Deserialize;

/// config.json as it is written; fields that play no role at inference are left out.
///
/// `attention_bias` is among them: hub configs say false, and every projection has a bias.
#[derive(Clone, Debug, Deserialize)]
#[allow(missing_docs, reason = "the names are Hugging Face's")]
pub struct RawConfig {
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    /// Stands inside `rope_scaling` in hub configs.
    pub original_max_position_embeddings: Option<usize>,
    pub rope_embedding_base: f64,
    #[serde(default = "one")]
    pub rope_position_scale: f64,
    pub rope_scaling: Option<RopeScalingConfig>,
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub hidden_act: Option<String>,
    pub gegelu_limit: f64,
    #[serde(default = "yes")]
    pub gegelu_pad_to_256: bool,
    pub ff_dim_multiplier: Option<usize>,
    pub ff_intermediate_size: Option<usize>,
    pub blocksparse_homo_head_pattern: bool,
    pub blocksparse_block_size: usize,
    pub blocksparse_num_local_blocks: usize,
    pub blocksparse_vert_stride: usize,
    pub dense_attention_every_n_layers: Option<usize>,
    #[serde(default = "default_eps")]
    pub layer_norm_epsilon: f64,
    #[serde(default = "yes")]
    pub mup_use_scaling: bool,
    #[serde(default = "one")]
    pub mup_width_multiplier: f64,
    #[serde(default = "one")]
    pub mup_embedding_multiplier: f64,
    #[serde(default = "one")]
    pub mup_attn_multiplier: f64,
    #[serde(default = "yes")]
    pub tie_word_embeddings: bool,
    /// Not in hub configs; vLLM reads it too.
    pub dummy_token_indices: Option<Vec<u32>>,
}

fn yes() -> bool {
    true
}

fn one() -> f64 {
    1.0
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
    pub layer_norm_epsilon: f64,
    /// Rotary embedding of every layer.
    pub rope: RopeParameters,
    /// Multiplies positions before they are rotated.
    pub rope_position_scale: f64,
    /// What a query of a layer that is not dense sees.
    pub layout: BlockSparseLayout,
    /// The last of so many layers is dense; 0 where none is.
    pub dense_attention_every_n_layers: usize,
    /// Multiplies q·k.
    pub attention_scale: f64,
    /// Limit inside the gated activation.
    pub gegelu_limit: f64,
    /// Multiplies embeddings.
    pub mup_embedding_multiplier: f64,
    /// Divides logits.
    pub mup_width_multiplier: f64,
    /// Whether the output head is the embedding itself.
    pub tie_word_embeddings: bool,
    /// Tokens that are never chosen.
    pub dummy_token_indices: Vec<u32>,
}

impl Config {
    /// Reads and checks a config.json.
    ///
    /// # Errors
    /// [`Error::Config`] naming the field that is missing, malformed or unsupported.
    pub fn from_json(config: &serde_json::Value) -> Result<Self> {
        config::from_json::<RawConfig>(config)?.try_into()
    }

    /// What a query of the layer sees.
    pub fn attention(&self, layer_idx: usize) -> AttentionPattern {
        let every = self.dense_attention_every_n_layers;
        if every > 0 && (layer_idx + 1).is_multiple_of(every) {
            AttentionPattern::Causal
        } else {
            AttentionPattern::BlockSparse(self.layout)
        }
    }

    /// What a caller may want to know of the model.
    pub fn info(&self) -> ModelInfo {
        ModelInfo {
            model_type: "phi3small".to_owned(),
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
            patterns: (0..self.num_hidden_layers)
                .map(|layer_idx| self.attention(layer_idx))
                .collect(),
            num_key_value_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
            rope_limit: self.rope.original_max_position_embeddings(),
            recompute: Recompute::Never,
            max_len: self.max_position_embeddings,
            store,
        }
    }
}

impl TryFrom<RawConfig> for Config {
    type Error = Error;

    fn try_from(raw: RawConfig) -> Result<Self> {
        let intermediate_size = intermediate_size(&raw)?;
        let heads = ("num_attention_heads", raw.num_attention_heads);
        let kv_heads = ("num_key_value_heads", raw.num_key_value_heads);
        config::check_sizes(MAX_COUNT, &[("num_hidden_layers", raw.num_hidden_layers)])?;
        config::check_sizes(
            MAX_SIZE,
            &[
                ("hidden_size", raw.hidden_size),
                ("ff_intermediate_size", intermediate_size),
                heads,
                kv_heads,
                ("vocab_size", raw.vocab_size),
                ("max_position_embeddings", raw.max_position_embeddings),
                ("blocksparse_block_size", raw.blocksparse_block_size),
                (
                    "blocksparse_num_local_blocks",
                    raw.blocksparse_num_local_blocks,
                ),
                ("blocksparse_vert_stride", raw.blocksparse_vert_stride),
            ],
        )?;
        config::check_multiple(heads, kv_heads)?;
        let head_dim = config::head_dim(None, raw.hidden_size, raw.num_attention_heads)?;
        for (name, number) in [
            ("rope_embedding_base", raw.rope_embedding_base),
            ("rope_position_scale", raw.rope_position_scale),
            ("gegelu_limit", raw.gegelu_limit),
            ("mup_width_multiplier", raw.mup_width_multiplier),
            ("mup_embedding_multiplier", raw.mup_embedding_multiplier),
            ("mup_attn_multiplier", raw.mup_attn_multiplier),
        ] {
            config::check_positive(name, number)?;
        }
        config::check_not_negative("layer_norm_epsilon", raw.layer_norm_epsilon)?;
        let act = raw.hidden_act.as_deref();
        config::check_only("phi3small", "hidden_act", act, "gegelu")?;
        let layout = BlockSparseLayout::new(
            raw.num_attention_heads,
            raw.blocksparse_block_size,
            raw.blocksparse_num_local_blocks,
            raw.blocksparse_vert_stride,
            raw.blocksparse_homo_head_pattern,
        )
        .ok_or_else(|| Error::config("a number of the block-sparse pattern is 0"))?;
        let attention_scale = if raw.mup_use_scaling {
            raw.mup_attn_multiplier / head_dim as f64
        } else {
            1.0 / (head_dim as f64).sqrt()
        };
        let rope = rope_parameters(&raw, head_dim)?;
        let (max_position_embeddings, rope_position_scale) = match rope.long {
            // The reference asserts that a LongRoPE sequence is shorter than the maximum, and
            // scales positions only without LongRoPE.
            Some(_) => ((raw.max_position_embeddings - 1).max(1), 1.0),
            None => (raw.max_position_embeddings, raw.rope_position_scale),
        };
        Ok(Self {
            hidden_size: raw.hidden_size,
            intermediate_size,
            num_hidden_layers: raw.num_hidden_layers,
            num_attention_heads: raw.num_attention_heads,
            num_key_value_heads: raw.num_key_value_heads,
            head_dim,
            vocab_size: raw.vocab_size,
            max_position_embeddings,
            layer_norm_epsilon: raw.layer_norm_epsilon,
            rope,
            rope_position_scale,
            layout,
            dense_attention_every_n_layers: raw.dense_attention_every_n_layers.unwrap_or(0),
            attention_scale,
            gegelu_limit: raw.gegelu_limit,
            mup_embedding_multiplier: raw.mup_embedding_multiplier,
            mup_width_multiplier: raw.mup_width_multiplier,
            tie_word_embeddings: raw.tie_word_embeddings,
            dummy_token_indices: dummy_tokens(raw.dummy_token_indices, raw.vocab_size),
        })
    }
}

fn intermediate_size(raw: &RawConfig) -> Result<usize> {
    if let Some(size) = raw.ff_intermediate_size {
        return Ok(size);
    }
    let multiplier = raw.ff_dim_multiplier.ok_or_else(|| {
        Error::config("one of ff_intermediate_size and ff_dim_multiplier is needed")
    })?;
    let size = (raw.hidden_size / 3)
        .saturating_mul(2)
        .saturating_mul(multiplier);
    Ok(match raw.gegelu_pad_to_256 {
        true => size.checked_next_multiple_of(256).unwrap_or(usize::MAX),
        false => size,
    })
}

fn rope_parameters(raw: &RawConfig, head_dim: usize) -> Result<RopeParameters> {
    if !head_dim.is_multiple_of(2) {
        return Err(Error::config(format!(
            "heads of {head_dim} dimensions cannot be rotated in pairs"
        )));
    }
    let none = RopeScalingConfig::default();
    let scaling = raw.rope_scaling.as_ref().unwrap_or(&none);
    let long = match scaling.kind()? {
        RopeKind::Default => None,
        RopeKind::LongRope => {
            let mut long = LongRope::from_config(
                scaling,
                head_dim,
                (scaling.original_max_position_embeddings).or(raw.original_max_position_embeddings),
                raw.max_position_embeddings,
            )?;
            let positive = |mscale: Option<f64>| mscale.filter(|mscale| *mscale > 0.0);
            // Without its own factor the short regime has none; phi3 applies the formula to both.
            long.short_mscale = positive(scaling.short_mscale).unwrap_or(1.0);
            if let Some(mscale) = positive(scaling.long_mscale) {
                long.long_mscale = mscale;
            }
            if !(long.short_mscale.is_finite() && long.long_mscale.is_finite()) {
                return Err(Error::config("a mscale of rope_scaling is not finite"));
            }
            Some(long)
        }
    };
    Ok(RopeParameters {
        theta: raw.rope_embedding_base,
        rotary_dim: head_dim,
        long,
    })
}

/// What is never chosen: as configured, else the ids that Phi-3-small's tokenizer calls dummy, and
/// the special tokens of cl100k that the model does not use.
fn dummy_tokens(configured: Option<Vec<u32>>, vocab_size: usize) -> Vec<u32> {
    const USED: [u32; 5] = [
        100_257, // <|endoftext|>
        100_261, // <|system|>
        100_262, // <|user|>
        100_263, // <|assistant|>
        100_266, // <|end|>
    ];
    let mut ids =
        configured.unwrap_or_else(|| (100_256..100_352).filter(|id| !USED.contains(id)).collect());
    ids.retain(|id| (*id as usize) < vocab_size);
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn untrained_tokens_are_those_of_the_tokenizer() {
        let ids = dummy_tokens(None, 100_352);
        assert_eq!(ids.len(), 91);
        assert_eq!(ids[..5], [100_256, 100_258, 100_259, 100_260, 100_264]);
        assert_eq!(ids.last(), Some(&100_351));
        assert!(dummy_tokens(None, 320).is_empty());
        assert_eq!(dummy_tokens(Some(vec![3, 400]), 320), [3]);
    }
}
