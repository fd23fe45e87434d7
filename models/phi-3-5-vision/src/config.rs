//! config.json of model_type `phi3_v`.

use phi3_nn::{CacheSpec, CacheStore, Error, ModelInfo, Result, config};
use serde::Deserialize;

/// What config.json says of images; the decoder's fields stand beside these.
#[derive(Clone, Debug, Default, Deserialize)]
#[allow(missing_docs, reason = "the names are Hugging Face's")]
pub struct RawConfig {
    #[serde(default)]
    pub img_processor: RawImageProcessor,
    #[serde(default)]
    pub embd_layer: RawEmbeddingLayer,
    /// The tower's own config.json, where it is not that of CLIP ViT-L/14-336.
    #[serde(default)]
    pub vision_config: RawVisionConfig,
}

/// Which tower, and which of its hidden states.
#[derive(Clone, Debug, Default, Deserialize)]
#[allow(missing_docs, reason = "the names are Hugging Face's")]
pub struct RawImageProcessor {
    pub name: Option<String>,
    pub layer_idx: Option<i64>,
    pub type_feature: Option<String>,
}

/// How crops become tokens.
#[derive(Clone, Debug, Default, Deserialize)]
#[allow(missing_docs, reason = "the names are Hugging Face's")]
pub struct RawEmbeddingLayer {
    pub hd_transform_order: Option<String>,
    pub projection_cls: Option<String>,
    pub use_hd_transform: Option<bool>,
    pub with_learnable_separator: Option<bool>,
}

/// Of CLIP's vision config, what the shapes of the tensors do not tell.
#[derive(Clone, Debug, Default, Deserialize)]
#[allow(missing_docs, reason = "the names are Hugging Face's")]
pub struct RawVisionConfig {
    pub num_attention_heads: Option<usize>,
    pub layer_norm_eps: Option<f64>,
    pub hidden_act: Option<String>,
}

/// The checked configuration of the image tower. Its sizes are those of its tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct VisionConfig {
    /// Heads of a layer; `None` for as many as have 64 elements each, as in every CLIP tower.
    pub num_attention_heads: Option<usize>,
    /// Epsilon of every norm.
    pub layer_norm_eps: f64,
    /// Which hidden state is the feature, 0 being the embeddings, negative from the last on.
    pub feature_layer: i64,
}

/// A checked configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The decoder's: that of a `phi3` model, whose fields stand in the same file.
    pub decoder: phi_3_mini::Config,
    /// The image tower's.
    pub vision: VisionConfig,
}

impl Config {
    /// Reads and checks a config.json. `vision_config` in it, if there is one, describes a tower
    /// that is not CLIP ViT-L/14-336.
    ///
    /// # Errors
    /// [`Error::Config`] naming the field that is missing, malformed or unsupported.
    pub fn from_json(config: &serde_json::Value) -> Result<Self> {
        Ok(Self {
            decoder: phi_3_mini::Config::from_json(config)?,
            vision: config::from_json::<RawConfig>(config)?.try_into()?,
        })
    }

    /// What a caller may want to know of the model.
    pub fn info(&self) -> ModelInfo {
        ModelInfo {
            model_type: "phi3_v".to_owned(),
            ..self.decoder.info()
        }
    }

    /// Geometry and rules of the model's caches.
    pub fn cache_spec(&self, store: CacheStore) -> CacheSpec {
        self.decoder.cache_spec(store)
    }
}

impl TryFrom<RawConfig> for VisionConfig {
    type Error = Error;

    fn try_from(raw: RawConfig) -> Result<Self> {
        let RawConfig {
            img_processor,
            embd_layer,
            vision_config,
        } = raw;
        for (name, found, supported) in [
            (
                "img_processor.name",
                &img_processor.name,
                "clip_vision_model",
            ),
            (
                "img_processor.type_feature",
                &img_processor.type_feature,
                "patch",
            ),
            (
                "embd_layer.hd_transform_order",
                &embd_layer.hd_transform_order,
                "sub_glb",
            ),
            (
                "embd_layer.projection_cls",
                &embd_layer.projection_cls,
                "mlp",
            ),
            (
                "vision_config.hidden_act",
                &vision_config.hidden_act,
                "quick_gelu",
            ),
        ] {
            config::check_only("phi3_v", name, found.as_deref(), supported)?;
        }
        for (name, found) in [
            ("use_hd_transform", embd_layer.use_hd_transform),
            (
                "with_learnable_separator",
                embd_layer.with_learnable_separator,
            ),
        ] {
            if found == Some(false) {
                return Err(Error::config(format!(
                    "embd_layer.{name} false is not supported"
                )));
            }
        }
        let layer_norm_eps = vision_config.layer_norm_eps.unwrap_or(1e-5);
        config::check_not_negative("vision_config.layer_norm_eps", layer_norm_eps)?;
        if vision_config.num_attention_heads == Some(0) {
            return Err(Error::config("vision_config.num_attention_heads is 0"));
        }
        Ok(Self {
            num_attention_heads: vision_config.num_attention_heads,
            layer_norm_eps,
            feature_layer: img_processor.layer_idx.unwrap_or(-2),
        })
    }
}
