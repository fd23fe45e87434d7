//! A model that sees: pictures become features, and prompts show them.

use std::sync::atomic::{AtomicU32, Ordering};

use candle_core::Tensor;
use phi_3_5_vision::ImageFeatures;
use phi_3_5_vision::processor::{Layout, ProcessedImage, Processor, prompt_ids};
use phi3_image::Limits;
use phi3_text::{Content, Message, Part, Request};

use crate::error::{Error, Result};
use crate::image::Image;
use crate::model::LanguageModel;

/// A picture as a model has seen it: computed once, it serves every prompt that shows it. A clone
/// shares the features.
#[derive(Clone, Debug)]
pub struct SeenImage {
    layout: Layout,
    features: ImageFeatures,
    /// Stands for its rows where a cache compares them; no other picture of this process has it.
    key: u32,
}

/// Keys lie above every vocabulary.
const FIRST_KEY: u32 = 1 << 31;

fn next_key() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    FIRST_KEY | NEXT.fetch_add(1, Ordering::Relaxed)
}

impl SeenImage {
    /// Its crops and tokens.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Tokens that it takes in a prompt.
    pub fn tokens(&self) -> usize {
        self.features.tokens()
    }
}

/// A prompt with pictures in it.
#[derive(Clone, Debug)]
pub struct ImagePrompt {
    /// Tokens, and -k in the place of each token of image k.
    pub ids: Vec<i64>,
    /// What the decoder reads, `[ids.len(), hidden_size]`.
    pub embeddings: Tensor,
    /// `ids` with a number for each token of an image that tells its rows from those of others: of
    /// another picture with the same tag, too.
    keys: Vec<u32>,
}

impl ImagePrompt {
    fn new(ids: Vec<i64>, embeddings: Tensor, images: &[SeenImage]) -> Self {
        // Rows follow the order of the images, whatever the numbers of their tags.
        let mut rows = images
            .iter()
            .flat_map(|image| std::iter::repeat_n(image.key, image.tokens()));
        let keys = ids.iter().map(|id| match u32::try_from(*id) {
            Ok(id) => id,
            Err(_) => rows.next().unwrap_or(u32::MAX),
        });
        let keys = keys.collect();
        Self {
            ids,
            embeddings,
            keys,
        }
    }

    /// The prompt as a request with default settings.
    pub fn into_request(self) -> Request {
        let mut request = Request::new(self.keys);
        request.embeddings = Some(self.embeddings);
        request
    }
}

/// Messages as the templates of this family take them: parts become one text, in which the images
/// are `<|image_1|>`, `<|image_2|>`, …, counted through all messages, each with a line break behind
/// it as in Phi-3.5-vision's prompts.
#[must_use]
pub fn with_image_tags(messages: &[Message]) -> Vec<Message> {
    let mut number = 0;
    let tagged = messages.iter().map(|message| {
        let Content::Parts(parts) = &message.content else {
            return message.clone();
        };
        let mut text = String::new();
        for part in parts {
            match part {
                Part::Text { text: more } => text.push_str(more),
                Part::Image | Part::Picture(_) => {
                    number += 1;
                    text.push_str(&format!("<|image_{number}|>\n"));
                }
            }
        }
        Message {
            role: message.role.clone(),
            content: text.into(),
            extra: message.extra.clone(),
        }
    });
    tagged.collect()
}

impl LanguageModel {
    /// How its pictures are cut.
    ///
    /// # Errors
    /// [`Error::Blind`] for a model that sees no pictures.
    pub fn image_processor(&self) -> Result<&Processor> {
        let blind = || Error::Blind {
            origin: self.origin().to_owned(),
        };
        self.processor.as_ref().ok_or_else(blind)
    }

    /// Cuts pictures into at most `num_crops` crops from now on, instead of the checkpoint's number.
    ///
    /// # Errors
    /// [`Error::Blind`], or [`Error::Pixels`] for a number that no picture can have.
    pub fn set_num_crops(&mut self, num_crops: usize) -> Result<()> {
        let processor = self.image_processor()?.clone();
        self.processor = Some(processor.with_num_crops(num_crops)?);
        Ok(())
    }

    /// Opens pictures and shows them to the model.
    ///
    /// # Errors
    /// [`Error::Blind`], those of [`Image::open`], or [`Error::Model`].
    pub fn see(&self, images: &[Image], limits: &Limits) -> Result<Vec<SeenImage>> {
        let processor = self.image_processor()?;
        let mut processed = Vec::with_capacity(images.len());
        for image in images {
            processed.push(processor.process(&image.open(limits)?)?);
        }
        self.see_processed(&processed)
    }

    /// Shows pictures that are cut already to the model.
    ///
    /// # Errors
    /// [`Error::Blind`] or [`Error::Model`].
    pub fn see_processed(&self, images: &[ProcessedImage]) -> Result<Vec<SeenImage>> {
        let Some(model) = self.vision() else {
            return Err(Error::Blind {
                origin: self.origin().to_owned(),
            });
        };
        let processed: Vec<&ProcessedImage> = images.iter().collect();
        let features = model.encode_images(&processed, None)?;
        let seen = images
            .iter()
            .zip(features)
            .map(|(image, features)| SeenImage {
                layout: image.layout,
                features,
                key: next_key(),
            });
        Ok(seen.collect())
    }

    /// The prompt that `text` with the tags `<|image_1|>`, `<|image_2|>`, … of `images` makes, as
    /// the reference's processor does: every piece of text between images has the tokenizer's BOS.
    ///
    /// # Errors
    /// [`Error::Blind`], [`Error::NoTokenizer`], [`Error::Pixels`] if the tags are not those of the
    /// images, or [`Error::Model`].
    pub fn image_prompt(&self, text: &str, images: &[SeenImage]) -> Result<ImagePrompt> {
        let Some(model) = self.vision() else {
            return Err(Error::Blind {
                origin: self.origin().to_owned(),
            });
        };
        let tokenizer = self.tokenizer()?;
        let tokens: Vec<usize> = images.iter().map(SeenImage::tokens).collect();
        let ids = prompt_ids(text, &tokens, |text| {
            tokenizer.encode(text, true).map_err(Error::from)
        })?;
        let features: Vec<ImageFeatures> =
            images.iter().map(|image| image.features.clone()).collect();
        let embeddings = model.embed_prompt(&ids, &features)?;
        Ok(ImagePrompt::new(ids, embeddings, images))
    }
}

/// The processor of a checkpoint that sees: its preprocessor_config.json, or where there is none
/// Phi-3.5-vision's.
pub(crate) fn processor_of(config: Option<&serde_json::Value>) -> Result<Processor> {
    Ok(match config {
        Some(config) => Processor::from_json(config)?,
        None => Processor::default().with_num_crops(4)?,
    })
}
