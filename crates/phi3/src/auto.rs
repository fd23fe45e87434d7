//! The model that a configuration asks for, by its `model_type`.

use std::sync::Arc;

use phi3_nn::rope::RopeParameters;
use phi3_nn::{AttentionPattern, CacheSpec, CacheStore, CacheType, CausalLm, ModelInfo, Weights};
use serde_json::Value;

use crate::error::{Error, Result};

/// A checked configuration of any supported model.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum ModelConfig {
    /// `phi3`: Phi-3-mini, Phi-3-medium, Phi-3.5-mini, Phi-4-mini.
    Phi3(phi_3_mini::Config),
    /// `phimoe`: Phi-3.5-MoE.
    PhiMoe(phi_3_5_moe::Config),
    /// `phi3small`: Phi-3-small.
    Phi3Small(phi_3_small::Config),
    /// `phi3_v`: Phi-3-vision, Phi-3.5-vision.
    Phi3V(phi_3_5_vision::Config),
}

impl ModelConfig {
    /// Every `model_type` that can be built.
    pub const MODEL_TYPES: [&'static str; 4] = ["phi3", "phi3_v", "phi3small", "phimoe"];

    /// Reads config.json and chooses the model.
    ///
    /// # Errors
    /// [`Error::ModelType`] for a type that is not supported, [`Error::Model`] for a configuration
    /// that no model can be built from.
    pub fn from_json(config: &Value) -> Result<Self> {
        match config.get("model_type").and_then(Value::as_str) {
            Some("phi3") => Ok(Self::Phi3(phi_3_mini::Config::from_json(config)?)),
            Some("phimoe") => Ok(Self::PhiMoe(phi_3_5_moe::Config::from_json(config)?)),
            Some("phi3small") => Ok(Self::Phi3Small(phi_3_small::Config::from_json(config)?)),
            Some("phi3_v") => Ok(Self::Phi3V(phi_3_5_vision::Config::from_json(config)?)),
            other => Err(Error::ModelType {
                found: other.unwrap_or("(none)").to_owned(),
                supported: Self::MODEL_TYPES.join(", "),
            }),
        }
    }

    /// Builds the model from its weights.
    ///
    /// # Errors
    /// [`Error::Model`] naming the tensor that is missing or does not fit.
    pub fn build(&self, weights: Weights) -> Result<Arc<dyn CausalLm>> {
        match self {
            Self::Phi3(config) => Ok(Arc::new(phi_3_mini::Model::new(config, weights)?)),
            Self::PhiMoe(config) => Ok(Arc::new(phi_3_5_moe::Model::new(config, weights)?)),
            Self::Phi3Small(config) => Ok(Arc::new(phi_3_small::Model::new(config, weights)?)),
            Self::Phi3V(config) => Ok(Arc::new(phi_3_5_vision::Model::new(config, weights)?)),
        }
    }

    /// Builds the model if it is one that sees images, as the type that shows them to it.
    ///
    /// # Errors
    /// As [`ModelConfig::build`].
    pub fn build_vision(&self, weights: Weights) -> Result<Option<Arc<phi_3_5_vision::Model>>> {
        match self {
            Self::Phi3V(config) => {
                let model = phi_3_5_vision::Model::new(config, weights)?;
                Ok(Some(Arc::new(model)))
            }
            _ => Ok(None),
        }
    }

    /// What the model is.
    pub fn info(&self) -> ModelInfo {
        match self {
            Self::Phi3(config) => config.info(),
            Self::PhiMoe(config) => config.info(),
            Self::Phi3Small(config) => config.info(),
            Self::Phi3V(config) => config.info(),
        }
    }

    /// Geometry of its caches, which tells their size.
    pub fn cache_spec(&self, store: CacheStore) -> CacheSpec {
        match self {
            Self::Phi3(config) => config.cache_spec(store),
            Self::PhiMoe(config) => config.cache_spec(store),
            Self::Phi3Small(config) => config.cache_spec(store),
            Self::Phi3V(config) => config.cache_spec(store),
        }
    }

    /// Its rotary embedding.
    pub fn rope(&self) -> &RopeParameters {
        match self {
            Self::Phi3(config) => &config.rope,
            Self::PhiMoe(config) => &config.rope,
            Self::Phi3Small(config) => &config.rope,
            Self::Phi3V(config) => &config.decoder.rope,
        }
    }

    /// Query heads of a layer.
    pub fn num_attention_heads(&self) -> usize {
        match self {
            Self::Phi3(config) => config.num_attention_heads,
            Self::PhiMoe(config) => config.num_attention_heads,
            Self::Phi3Small(config) => config.num_attention_heads,
            Self::Phi3V(config) => config.decoder.num_attention_heads,
        }
    }

    /// What a query of each layer sees.
    pub fn attention_patterns(&self) -> Vec<AttentionPattern> {
        self.cache_spec(CacheStore::Pages(CacheType::F32)).patterns
    }
}
