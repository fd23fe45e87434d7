//! The decoder, which reads ids or embeddings as every model does.

use candle_core::Tensor;
use phi3_nn::{CausalLm, Input, KvCache, ModelInfo, Observer, Result, Span, Weights};

use crate::Config;

/// The decoder of a `phi3_v` checkpoint: that of phi-3-mini, with the same names of tensors.
pub struct Model {
    decoder: phi_3_mini::Model,
    info: ModelInfo,
}

impl Model {
    /// Builds the model from the tensors of a checkpoint.
    ///
    /// # Errors
    /// Those of [`phi_3_mini::Model::new`], naming the tensor.
    pub fn new(config: &Config, weights: Weights) -> Result<Self> {
        Ok(Self {
            decoder: phi_3_mini::Model::new(&config.decoder, weights)?,
            info: config.info(),
        })
    }
}

impl CausalLm for Model {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn new_cache(&self) -> KvCache {
        self.decoder.new_cache()
    }

    fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        self.decoder.embed(ids)
    }

    fn forward(
        &self,
        input: Input<'_>,
        spans: &mut [Span<'_>],
        observer: Option<&mut dyn Observer>,
    ) -> Result<Tensor> {
        self.decoder.forward(input, spans, observer)
    }
}
