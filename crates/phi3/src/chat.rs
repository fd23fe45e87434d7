//! A conversation with a model.

use phi3_text::{
    CachedPrefix, CancelToken, ChatTemplate, EventKind, FinishReason, Finished, Generator, Message,
    Request, SamplingParams, Tokenizer, Usage,
};

use crate::error::Result;
use crate::image::{Image, Layout, Limits};
use crate::model::LanguageModel;
use crate::seen::{SeenImage, tagged};

/// How a conversation's answers are generated.
#[derive(Clone, Debug, PartialEq)]
pub struct ChatSettings {
    /// How tokens are chosen. Default: what the checkpoint's generation config says, which for the
    /// Phi-3 family means greedily.
    pub sampling: SamplingParams,
    /// Longest answer, in tokens. Default: 1024.
    pub max_new_tokens: usize,
    /// Texts that end an answer beside the model's own end tokens.
    pub stop_strings: Vec<String>,
}

/// A conversation: its messages so far, and the cache of what the model has already read.
///
/// ```no_run
/// let model = phi3::load("microsoft/Phi-3-mini-4k-instruct")?;
/// let mut chat = model.chat()?;
/// for piece in chat.send("What is the capital of France?")? {
///     print!("{}", piece?);
/// }
/// # Ok::<(), phi3::Error>(())
/// ```
pub struct Chat<'m> {
    model: &'m LanguageModel,
    tokenizer: &'m Tokenizer,
    template: &'m ChatTemplate,
    messages: Vec<Message>,
    cache: Option<CachedPrefix>,
    /// What the model has seen, in the order of its tags.
    images: Vec<SeenImage>,
    /// Those of them that belong to a message; the others go with the next.
    sent_images: usize,
    /// What pictures may cost.
    pub limits: Limits,
    /// How answers are generated; may be changed between turns.
    pub settings: ChatSettings,
}

impl<'m> Chat<'m> {
    pub(crate) fn new(model: &'m LanguageModel) -> Result<Self> {
        Ok(Self {
            model,
            tokenizer: model.tokenizer()?,
            template: model.chat_template()?,
            messages: Vec::new(),
            cache: None,
            images: Vec::new(),
            sent_images: 0,
            limits: Limits::default(),
            settings: ChatSettings {
                sampling: model.default_sampling(),
                max_new_tokens: 1024,
                stop_strings: Vec::new(),
            },
        })
    }

    /// The turns so far.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Continues a conversation that was held elsewhere.
    pub fn set_messages(&mut self, messages: Vec<Message>) {
        self.messages = messages;
    }

    /// Forgets all turns and pictures, a system message included.
    pub fn reset(&mut self) {
        self.messages.clear();
        if !self.images.is_empty() {
            // The cache knows pictures by their numbers, which begin anew.
            self.cache = None;
            self.images.clear();
            self.sent_images = 0;
        }
    }

    /// Shows a picture, which goes with the next message: its tag is put before the text. The model
    /// looks at it once, now; later turns compute nothing of it again.
    ///
    /// # Errors
    /// [`crate::Error::Blind`] if the model sees no pictures; those of [`Image::open`].
    pub fn show(&mut self, image: &Image) -> Result<Layout> {
        let seen = self.model.see(std::slice::from_ref(image), &self.limits)?;
        let layout = seen.first().map(|seen| *seen.layout());
        self.images.extend(seen);
        layout.ok_or_else(|| crate::Error::Blind {
            origin: self.model.origin().to_owned(),
        })
    }

    /// The pictures of this conversation, in the order of their numbers.
    pub fn images(&self) -> &[SeenImage] {
        &self.images
    }

    /// Sets (or with an empty text removes) the system message, which comes first. Some templates
    /// drop it, as Phi-3-medium's does.
    pub fn set_system(&mut self, text: &str) {
        self.messages.retain(|message| message.role != "system");
        if !text.is_empty() {
            self.messages.insert(0, Message::system(text));
        }
    }

    /// Says `text` as the user; the answer comes piece by piece.
    ///
    /// What the cache holds of the conversation is not computed again. If this fails the
    /// conversation is as before.
    ///
    /// # Errors
    /// [`crate::Error::Text`] if the template refuses the conversation, or it is longer than the
    /// model's context.
    pub fn send(&mut self, text: &str) -> Result<Answer<'_, 'm>> {
        let new_images = self.images.len() - self.sent_images;
        let text = tagged(self.sent_images + 1, new_images, text);
        self.messages.push(Message::user(text));
        match self.start() {
            Ok((generator, cancel)) => Ok(Answer {
                images_before: std::mem::replace(&mut self.sent_images, self.images.len()),
                chat: self,
                generator,
                cancel,
                text: String::new(),
                finished: None,
                failed: false,
            }),
            Err(error) => {
                self.messages.pop();
                Err(error)
            }
        }
    }

    fn start(&mut self) -> Result<(Generator<'m>, CancelToken)> {
        let rendered = self.template.render(&self.messages, true)?;
        let mut request = match self.model.vision() {
            Some(_) => self
                .model
                .image_prompt(&rendered, &self.images)?
                .into_request(),
            None => Request::new(self.tokenizer.encode_chat(&rendered)?),
        };
        request.params = self.settings.sampling.clone();
        request.max_new_tokens = self.settings.max_new_tokens;
        request.stop_ids = self.model.stop_ids().to_vec();
        request.stop_strings.clone_from(&self.settings.stop_strings);
        request.cache = self.cache.take();
        request.keep_cache = true;
        let cancel = request.cancel.clone();
        let mut generator = Generator::new(self.model.model().as_ref(), self.tokenizer);
        generator.add(request)?;
        Ok((generator, cancel))
    }
}

/// An answer on its way: an iterator over pieces of text.
///
/// Dropped or cancelled before its end, it leaves in the conversation what was said until then; if
/// that is nothing, the question is forgotten too.
pub struct Answer<'c, 'm> {
    chat: &'c mut Chat<'m>,
    /// How many pictures were sent before this message.
    images_before: usize,
    generator: Generator<'m>,
    cancel: CancelToken,
    text: String,
    finished: Option<Finished>,
    failed: bool,
}

impl Answer<'_, '_> {
    /// Ends this answer from elsewhere, such as a signal handler.
    pub fn cancel_token(&self) -> CancelToken {
        self.cancel.clone()
    }

    /// Why the answer ended; `None` while it has not.
    pub fn finish_reason(&self) -> Option<&FinishReason> {
        self.finished.as_ref().map(|finished| &finished.reason)
    }

    /// Tokens and times; `None` before the end.
    pub fn usage(&self) -> Option<Usage> {
        self.finished.as_ref().map(|finished| finished.usage)
    }

    /// Runs to the end and returns the whole text.
    ///
    /// # Errors
    /// The first error of any piece.
    pub fn text(mut self) -> Result<String> {
        for piece in self.by_ref() {
            piece?;
        }
        Ok(self.text.clone())
    }
}

impl Iterator for Answer<'_, '_> {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.failed && self.finished.is_none() {
            let event = match self.generator.next()? {
                Ok(event) => event,
                Err(error) => {
                    self.failed = true;
                    return Some(Err(error.into()));
                }
            };
            let piece = event.text().to_owned();
            self.text.push_str(&piece);
            if let EventKind::Finished(finished) = event.kind {
                self.finished = Some(finished);
                self.chat.cache = self.generator.take_cache(event.sequence);
            }
            if !piece.is_empty() {
                return Some(Ok(piece));
            }
        }
        None
    }
}

impl Drop for Answer<'_, '_> {
    fn drop(&mut self) {
        let stopped = matches!(self.finish_reason(), None | Some(FinishReason::Cancelled));
        if self.text.is_empty() && stopped {
            self.chat.messages.pop(); // the question: nothing was said to it
            self.chat.sent_images = self.chat.sent_images.min(self.images_before);
        } else {
            let text = std::mem::take(&mut self.text);
            self.chat.messages.push(Message::assistant(text));
        }
    }
}
