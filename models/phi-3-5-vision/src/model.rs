//! The decoder and the way of images into it.

use candle_core::Tensor;
use phi3_nn::{CausalLm, Error, Input, KvCache, ModelInfo, Observer, Result, Span, Weights};

use crate::config::Config;
use crate::image_embedding::{ImageEmbedding, ImageFeatures};
use crate::processor::ProcessedImage;

/// A `phi3_v` checkpoint, ready to run. As a [`CausalLm`] it reads ids, or embeddings that
/// [`Model::embed_prompt`] has made of a prompt with images.
pub struct Model {
    vision_embed_tokens: ImageEmbedding,
    /// That of phi-3-mini, with the same names of tensors.
    decoder: phi_3_mini::Model,
    info: ModelInfo,
}

impl Model {
    /// Builds the model from the tensors of a checkpoint.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::TensorShape`] and their kin, naming the tensor.
    pub fn new(config: &Config, weights: Weights) -> Result<Self> {
        let decoder = phi_3_mini::Model::new(&config.decoder, weights.clone())?;
        let vision_embed_tokens = ImageEmbedding::new(
            &config.vision,
            config.decoder.hidden_size,
            weights.pp("model").pp("vision_embed_tokens"),
        )?;
        Ok(Self {
            vision_embed_tokens,
            decoder,
            info: config.info(),
        })
    }

    /// The features of images, in their order: made once, they serve every prompt and turn that
    /// shows the image.
    ///
    /// The observer is shown `clip_hidden_m2` `[crops, patches, C]`, and per image
    /// `img_projection_in` `[tokens, 4C]` and `img_projection_out` `[tokens, hidden_size]`.
    ///
    /// # Errors
    /// [`Error::Batch`] for an image whose pixels are not those of its layout, or those of a tensor
    /// operation and of the observer.
    pub fn encode_images(
        &self,
        images: &[&ProcessedImage],
        observer: Option<&mut dyn Observer>,
    ) -> Result<Vec<ImageFeatures>> {
        self.vision_embed_tokens.forward(images, observer)
    }

    /// The embeddings of a prompt, `[ids.len(), hidden_size]`: ids from 0 on are tokens; in place of
    /// negative ones come the rows of `images`, first to last, whatever the ids' numbers. So does
    /// the reference: a prompt that names image 2 first has image 1's features there.
    ///
    /// # Errors
    /// [`Error::TokenId`], or [`Error::Batch`] if there are not as many negative ids as rows.
    pub fn embed_prompt(&self, ids: &[i64], images: &[ImageFeatures]) -> Result<Tensor> {
        let places = ids.iter().filter(|id| **id < 0).count();
        let rows: usize = images.iter().map(ImageFeatures::tokens).sum();
        if places != rows {
            return Err(Error::Batch(format!(
                "the prompt has {places} places for image tokens, the images have {rows} tokens"
            )));
        }
        let mut features = images.iter().map(ImageFeatures::rows);
        let mut left: Option<(&Tensor, usize)> = None;
        let mut pieces = Vec::new();
        for run in ids.chunk_by(|a, b| (*a < 0) == (*b < 0)) {
            if run.first().is_some_and(|id| *id >= 0) {
                let id = |id: &i64| u32::try_from(*id).unwrap_or(u32::MAX);
                let ids: Vec<u32> = run.iter().map(id).collect();
                pieces.push(self.embed(&ids)?);
                continue;
            }
            let mut wanted = run.len();
            while wanted > 0 {
                let Some((rows, first)) = left.take().or_else(|| Some((features.next()?, 0)))
                else {
                    break;
                };
                let len = rows.dim(0)?;
                let taken = wanted.min(len - first);
                pieces.push(rows.narrow(0, first, taken)?);
                wanted -= taken;
                left = (first + taken < len).then_some((rows, first + taken));
            }
        }
        match pieces.as_slice() {
            [] => self.embed(&[]),
            [one] => Ok(one.clone()),
            several => Ok(Tensor::cat(several, 0)?),
        }
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
