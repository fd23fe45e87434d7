//! config.json of model_type `phi3_v`.

use phi3_nn::{CacheSpec, CacheStore, ModelInfo, Result};

/// A checked configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The decoder's: that of a `phi3` model, whose fields stand in the same file.
    pub decoder: phi_3_mini::Config,
}

impl Config {
    /// Reads and checks a config.json.
    ///
    /// # Errors
    /// [`phi3_nn::Error::Config`] naming the field that is missing, malformed or unsupported.
    pub fn from_json(config: &serde_json::Value) -> Result<Self> {
        Ok(Self {
            decoder: phi_3_mini::Config::from_json(config)?,
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
