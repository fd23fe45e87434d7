//! A model that sees: pictures become features, and prompts show them.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use candle_core::Tensor;
use phi_3_5_vision::ImageFeatures;
use phi_3_5_vision::processor::{Layout, ProcessedImage, Processor, RgbImage, prompt_ids, tags};
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

/// Crops, global views included, that a model is shown together: enough for every thread, and what bounds
/// memory, to some 60 MB besides the pictures themselves.
const CROPS_AT_ONCE: usize = 16;

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

/// A noncharacter, which no text has for any purpose but such a one: behind the first character of what
/// looks like an image's tag in a message but is text.
const NOT_A_TAG: &str = "<\u{FDD0}|image_";
const TAG: &str = "<|image_";

/// Messages as the templates of this family take them: parts become one text, in which the images
/// are `<|image_1|>`, `<|image_2|>`, …, counted through all messages, each with a line break behind
/// it as in Phi-3.5-vision's prompts.
///
/// A message whose text has the tags of its own images, each once, shows them there. Any other such tag in
/// a text is text, and gets a mark (U+FDD0) that [`LanguageModel::image_prompt`] takes out again, or
/// [`without_marks`].
#[must_use]
pub fn with_image_tags(messages: &[Message]) -> Vec<Message> {
    let mut number = 0;
    let tagged = messages.iter().map(|message| {
        let parts = match &message.content {
            Content::None => return message.clone(),
            Content::Text(text) => std::slice::from_ref(&Part::text(text.as_str())).to_vec(),
            Content::Parts(parts) => parts.clone(),
        };
        let own = number..number + parts.iter().filter(|part| is_image(part)).count();
        number = own.end;
        let placed = are_placed(&parts, own.clone());
        let (mut text, mut next) = (String::new(), own.start);
        for part in &parts {
            match part {
                Part::Text { text: more } if placed => text.push_str(more),
                Part::Text { text: more } => text.push_str(&more.replace(TAG, NOT_A_TAG)),
                Part::Image | Part::Picture(_) => {
                    next += 1;
                    if !placed {
                        text.push_str(&format!("{TAG}{next}|>\n"));
                    }
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

/// A rendered conversation without the marks of [`with_image_tags`], for models that see no pictures.
#[must_use]
pub fn without_marks(rendered: &str) -> String {
    rendered.replace(NOT_A_TAG, TAG)
}

fn is_image(part: &Part) -> bool {
    matches!(part, Part::Image | Part::Picture(_))
}

/// Whether the texts among `parts` have the tags of the images that follow the first `own.start`, and no
/// others.
fn are_placed(parts: &[Part], own: Range<usize>) -> bool {
    let mut numbers = Vec::new();
    for part in parts {
        if let Part::Text { text } = part {
            numbers.extend(tags(text).into_iter().map(|tag| tag.number));
        }
    }
    numbers.sort_unstable();
    !own.is_empty() && numbers.into_iter().eq(own.map(|index| index + 1))
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

    /// Opens pictures and shows them to the model, some at a time, so that memory holds the pixels of those
    /// alone.
    ///
    /// # Errors
    /// [`Error::Blind`], those of [`Image::open`], [`Error::Uncut`], [`Error::Text`] if they have more
    /// tokens than the model's context, which is found before it looks at them, or [`Error::Model`].
    pub fn see(&self, images: &[Image], limits: &Limits) -> Result<Vec<SeenImage>> {
        self.see_beside(&[], images, limits)
    }

    /// [`see`](Self::see) of pictures that share a context with those that were `seen_before`.
    pub(crate) fn see_beside(
        &self,
        seen_before: &[SeenImage],
        images: &[Image],
        limits: &Limits,
    ) -> Result<Vec<SeenImage>> {
        let processor = self.image_processor()?;
        let before: usize = seen_before.iter().map(SeenImage::tokens).sum();
        let uncut = |image: &Image, source| Error::Uncut {
            name: image.name(),
            source,
        };
        let tokens_of = |image: &Image, pixels: &RgbImage| {
            let layout = processor.layout(pixels.width(), pixels.height());
            Ok::<_, Error>(layout.map_err(|it| uncut(image, it))?.tokens())
        };
        if images.len() > 1 {
            // To decode a picture twice is nothing beside looking at it once.
            let mut tokens = before;
            for image in images.iter().filter(|image| !image.is_fetched()) {
                tokens += tokens_of(image, &image.open(limits)?)?;
                self.check_context(tokens)?;
            }
        }
        let (mut seen, mut tokens) = (Vec::with_capacity(images.len()), before);
        let (mut waiting, mut crops) = (Vec::new(), 0);
        for (index, image) in images.iter().enumerate() {
            let pixels = image.open(limits)?;
            tokens += tokens_of(image, &pixels)?;
            self.check_context(tokens)?;
            let processed = processor.process(&pixels);
            let processed = processed.map_err(|it| uncut(image, it))?;
            crops += processed.layout.crops() + 1;
            waiting.push(processed);
            if crops >= CROPS_AT_ONCE || index + 1 == images.len() {
                seen.extend(self.see_processed(&waiting)?);
                (waiting, crops) = (Vec::new(), 0);
            }
        }
        Ok(seen)
    }

    /// Whether so many tokens of pictures leave room for others.
    ///
    /// # Errors
    /// [`Error::Text`] if they do not.
    fn check_context(&self, tokens: usize) -> Result<()> {
        let context = self.model().info().max_position_embeddings;
        if tokens < context {
            return Ok(());
        }
        Err(phi3_text::Error::PromptTooLong { tokens, context }.into())
    }

    /// Shows pictures that are cut already to the model, all at once.
    ///
    /// # Errors
    /// [`Error::Blind`], [`Error::Text`] if they have more tokens than the model's context, or
    /// [`Error::Model`].
    pub fn see_processed(&self, images: &[ProcessedImage]) -> Result<Vec<SeenImage>> {
        let Some(model) = self.vision() else {
            return Err(Error::Blind {
                origin: self.origin().to_owned(),
            });
        };
        self.check_context(images.iter().map(|image| image.layout.tokens()).sum())?;
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
            tokenizer
                .encode(&without_marks(text), true)
                .map_err(Error::from)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn text_of(messages: &[Message]) -> Vec<String> {
        let texts = with_image_tags(messages)
            .into_iter()
            .map(|it| match it.content {
                Content::Text(text) => text,
                other => panic!("{other:?}"),
            });
        texts.collect()
    }

    #[test]
    fn images_are_counted_and_what_only_looks_like_a_tag_is_text() {
        let user = |parts: Vec<Part>| Message::user(parts);
        let messages = [
            Message::system("A tag is <|image_1|>."),
            user(vec![Part::Image, Part::text("What is it?")]),
            user(vec![
                Part::Image,
                Part::Image,
                Part::text("<|image_3|> or <|image_2|>?"),
            ]),
            user(vec![Part::Image, Part::text("not <|image_1|>")]),
            Message::user("nor <|image_4|>"),
        ];
        let texts = text_of(&messages);
        assert_eq!(texts[0], "A tag is <\u{FDD0}|image_1|>.");
        assert_eq!(texts[1], "<|image_1|>\nWhat is it?");
        assert_eq!(texts[2], "<|image_3|> or <|image_2|>?");
        assert_eq!(texts[3], "<|image_4|>\nnot <\u{FDD0}|image_1|>");
        assert_eq!(texts[4], "nor <\u{FDD0}|image_4|>");
        assert_eq!(without_marks(&texts[4]), "nor <|image_4|>");
        let numbers = tags(&texts.concat()).into_iter().map(|tag| tag.number);
        assert_eq!(numbers.collect::<Vec<_>>(), [1, 3, 2, 4]);
    }
}
