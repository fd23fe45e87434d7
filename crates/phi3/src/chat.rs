//! A conversation with a model.

use std::sync::Arc;

use phi3_text::{
    CachedPrefix, CancelToken, ChatTemplate, Content, EventKind, FinishReason, Finished, Generator,
    ImageSource, Message, Part, Request, SamplingParams, Tokenizer, Usage,
};

use crate::error::{Error, Result};
use crate::image::{Fetch, Image, Layout, Limits};
use crate::model::LanguageModel;
use crate::seen::{SeenImage, with_image_tags, without_marks};

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
    /// Where the pictures come from that the messages show, in order, then those of `shown`.
    sources: Vec<ImageSource>,
    /// The first of `sources`, or all, as the model has seen them.
    images: Vec<SeenImage>,
    /// Pictures that go with the next message.
    shown: Vec<Part>,
    /// What pictures may cost.
    pub limits: Limits,
    /// Gets pictures that messages name by a URL. Default: nobody does, and they are an error.
    pub fetch: Option<Arc<Fetch>>,
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
            sources: Vec::new(),
            images: Vec::new(),
            shown: Vec::new(),
            fetch: None,
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

    /// Continues a conversation that was held elsewhere. Its pictures are opened with the next message;
    /// those with which it begins as this one did are kept as the model has seen them.
    pub fn set_messages(&mut self, messages: Vec<Message>) {
        self.messages = messages;
        let shown = std::mem::take(&mut self.shown);
        let sources = pictures(&self.messages).chain(shown.iter().filter_map(picture));
        let sources: Vec<_> = sources.cloned().collect();
        let same = self.sources.iter().zip(&sources);
        let same = same.take_while(|(old, new)| old == new).count();
        self.images.truncate(same);
        (self.sources, self.shown) = (sources, shown);
    }

    /// Forgets all turns and pictures, a system message included.
    pub fn reset(&mut self) {
        self.messages.clear();
        self.sources.clear();
        self.images.clear();
        self.shown.clear();
    }

    /// Shows a picture, which goes with the next message, before its text. The model looks at it once,
    /// now; later turns compute nothing of it again.
    ///
    /// # Errors
    /// [`Error::Blind`] if the model sees no pictures; [`Error::Text`] if its context does not hold this
    /// one beside the others; those of [`Image::open`], and of the pictures of [`Chat::set_messages`].
    pub fn show(&mut self, image: &Image) -> Result<Layout> {
        let source = image.source()?;
        self.look()?;
        let image = std::slice::from_ref(image);
        let seen = self.model.see_beside(&self.images, image, &self.limits)?;
        let layout = seen.first().map(|seen| *seen.layout());
        self.images.extend(seen);
        self.sources.push(source.clone());
        self.shown.push(Part::Picture(source));
        layout.ok_or_else(|| Error::Blind {
            origin: self.model.origin().to_owned(),
        })
    }

    /// The pictures of this conversation that the model has seen, in the order of their numbers.
    pub fn images(&self) -> &[SeenImage] {
        &self.images
    }

    /// Looks at the pictures that the model has not seen yet, all at once.
    fn look(&mut self) -> Result<()> {
        let unseen = self.sources.get(self.images.len()..).unwrap_or_default();
        if unseen.is_empty() {
            return Ok(());
        }
        let open = |source| Image::from_source(source, self.fetch.as_ref());
        let unseen = unseen.iter().map(open).collect::<Result<Vec<_>>>()?;
        let seen = self.model.see_beside(&self.images, &unseen, &self.limits)?;
        self.images.extend(seen);
        Ok(())
    }

    /// Sets (or with an empty text removes) the system message, which comes first. Some templates
    /// drop it, as Phi-3-medium's does.
    pub fn set_system(&mut self, text: &str) {
        self.messages.retain(|message| message.role != "system");
        if !text.is_empty() {
            self.messages.insert(0, Message::system(text));
        }
    }

    /// Says something, a text as the user; the answer comes piece by piece.
    ///
    /// Pictures among the parts of a message are opened and looked at now, once. What the cache holds
    /// of the conversation is not computed again. If this fails the conversation is as before.
    ///
    /// ```no_run
    /// use phi3::text::{ImageSource, Message, Part};
    /// let model = phi3::load("microsoft/Phi-3.5-vision-instruct")?;
    /// let mut chat = model.chat()?;
    /// let picture = Part::Picture(ImageSource::Path("cat.jpg".into()));
    /// let question = Message::user(vec![picture, Part::text("What is in the picture?")]);
    /// println!("{}", chat.send(question)?.text()?);
    /// println!("{}", chat.send("What color is it?")?.text()?);
    /// # Ok::<(), phi3::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Text`] if the template refuses the conversation, or it is longer than the model's
    /// context. For pictures [`Error::Blind`], [`Error::NoFetcher`], [`Error::NoSource`] and those of
    /// [`Image::open`].
    pub fn send(&mut self, message: impl Into<Message>) -> Result<Answer<'_, 'm>> {
        let mut message = message.into();
        let sources_before = self.sources.len();
        let own = message.content.pictures().cloned();
        self.sources.extend(own.collect::<Vec<_>>());
        if !self.shown.is_empty() {
            let mut parts = self.shown.clone();
            match message.content {
                Content::Text(text) => parts.push(Part::Text { text }),
                Content::Parts(own) => parts.extend(own),
                Content::None => {}
            }
            message.content = parts.into();
        }
        self.messages.push(message);
        match self.look().and_then(|()| self.start()) {
            Ok((generator, cancel)) => Ok(Answer {
                sources_before,
                shown: std::mem::take(&mut self.shown),
                chat: self,
                generator,
                cancel,
                text: String::new(),
                finished: None,
                failed: false,
            }),
            Err(error) => {
                self.forget_last(sources_before);
                Err(error)
            }
        }
    }

    /// Takes back the last message and the pictures that came with it.
    fn forget_last(&mut self, sources_before: usize) {
        self.messages.pop();
        self.sources.truncate(sources_before);
        self.images.truncate(sources_before);
    }

    fn start(&mut self) -> Result<(Generator<'m>, CancelToken)> {
        let bare = |message: &Message| matches!(&message.content, Content::Parts(parts) if parts.contains(&Part::Image));
        if self.messages.iter().any(bare) {
            return Err(Error::NoSource);
        }
        let messages = with_image_tags(&self.messages);
        let rendered = self.template.render(&messages, true)?;
        let mut request = match self.model.vision() {
            Some(_) => self
                .model
                .image_prompt(&rendered, &self.images)?
                .into_request(),
            None => Request::new(self.tokenizer.encode_chat(&without_marks(&rendered))?),
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
    /// Pictures of the conversation before those of the question's own parts.
    sources_before: usize,
    /// Those that were shown before the question and went with it.
    shown: Vec<Part>,
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
            // Nothing was said to the question. What was shown goes with the next.
            self.chat.forget_last(self.sources_before);
            self.chat.shown = std::mem::take(&mut self.shown);
        } else {
            let text = std::mem::take(&mut self.text);
            self.chat.messages.push(Message::assistant(text));
        }
    }
}

/// The pictures that messages show, in order.
fn pictures(messages: &[Message]) -> impl Iterator<Item = &ImageSource> {
    messages
        .iter()
        .flat_map(|message| message.content.pictures())
}

fn picture(part: &Part) -> Option<&ImageSource> {
    match part {
        Part::Picture(source) => Some(source),
        Part::Text { .. } | Part::Image => None,
    }
}
