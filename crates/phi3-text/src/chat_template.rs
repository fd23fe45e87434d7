//! Chat templates, rendered as transformers renders them.
//!
//! A checkpoint brings a Jinja template that turns a conversation into one text. transformers runs
//! it with `trim_blocks` and `lstrip_blocks`, `raise_exception` and `strftime_now` as functions, a
//! `tojson` that leaves non-ASCII text and HTML alone, and Python's ways of printing values; so
//! does [`ChatTemplate`]. Loops, recursion and output of a template are limited.
//!
//! One difference is deliberate: `strftime_now` gives UTC.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::SystemTime;

use minijinja::{Environment, ErrorKind};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::tokenizer::SpecialTokens;

mod guard;
mod limits;
mod message;
mod part;
mod python;

pub use message::{Content, Message};
pub use part::{ImageSource, Part};

/// A parsed chat template with the special tokens that it may write.
///
/// ```
/// use phi3_text::{ChatTemplate, Message, SpecialTokens};
/// let source = "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n\
///               {% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}";
/// let template = ChatTemplate::parse(source, SpecialTokens::default())?;
/// assert_eq!(
///     template.render(&[Message::user("Hi")], true)?,
///     "<|user|>\nHi<|end|>\n<|assistant|>\n"
/// );
/// # Ok::<(), phi3_text::Error>(())
/// ```
pub struct ChatTemplate {
    source: String,
    guarded: String,
    instructions: usize,
    tokens: SpecialTokens,
    environment: Environment<'static>,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("source", &self.source)
            .field("tokens", &self.tokens)
            .finish_non_exhaustive()
    }
}

/// What a template may be given beside the messages.
#[derive(Clone, Debug, Default)]
pub struct RenderOptions {
    /// Whether to end with the opening of the assistant's turn.
    pub add_generation_prompt: bool,
    /// Descriptions of tools that the model may call.
    pub tools: Option<Vec<Value>>,
    /// Documents to answer from.
    pub documents: Option<Vec<Value>>,
    /// Further variables that some templates know (`enable_thinking`).
    pub extra: Map<String, Value>,
}

/// A place where a template may be found: what to call it in a message, and what is there.
///
/// The value is the template as a string, or a list of `{"name": …, "template": …}`.
#[derive(Clone, Copy, Debug)]
pub struct TemplateSource<'a> {
    /// A file, or a field of one: `chat_template.jinja`.
    pub origin: &'a str,
    /// What is there, if anything.
    pub value: Option<&'a Value>,
}

impl ChatTemplate {
    /// Parses a template.
    ///
    /// # Errors
    /// [`Error::Template`] with the line and the cause if it is not valid Jinja, and
    /// [`Error::TemplateLimit`] if it is longer than 1 MiB.
    pub fn parse(source: &str, tokens: SpecialTokens) -> Result<Self> {
        if source.len() > limits::MAX_SOURCE {
            return Err(Error::TemplateLimit {
                line: 0,
                limit: format!("{} bytes of source", limits::MAX_SOURCE),
            });
        }
        let guarded = guard::guard_source(source);
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(limits::method);
        environment.add_filter("tojson", python::tojson);
        environment.add_function("raise_exception", raise_exception);
        limits::install(&mut environment, guarded.literal);
        let template = Self {
            source: source.to_owned(),
            guarded: guarded.source,
            instructions: limits::instructions(guarded.literal),
            tokens,
            environment,
        }
        .with_clock(SystemTime::now);
        template.run(|environment, source| {
            environment
                .template_from_named_str("chat template", source)
                .map(|_| ())
        })?;
        Ok(template)
    }

    /// Takes the first source that has a template; of a list of named ones `default`, else the
    /// only one.
    ///
    /// # Errors
    /// [`Error::NoTemplate`] naming the places looked at, or as [`ChatTemplate::parse`].
    pub fn from_sources(sources: &[TemplateSource<'_>], tokens: SpecialTokens) -> Result<Self> {
        let found = sources
            .iter()
            .find_map(|source| template_text(source.value?));
        match found {
            Some(text) => Self::parse(text, tokens),
            None => Err(Error::NoTemplate {
                looked_at: sources
                    .iter()
                    .map(|source| source.origin.to_owned())
                    .collect(),
            }),
        }
    }

    /// The same template with another clock behind `strftime_now`.
    #[must_use]
    pub fn with_clock(mut self, now: impl Fn() -> SystemTime + Send + Sync + 'static) -> Self {
        self.environment
            .add_function("strftime_now", move |format: &str| {
                python::strftime(now(), format)
            });
        self
    }

    /// The template as it was given.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The conversation as one text.
    ///
    /// # Errors
    /// [`Error::TemplateRaised`] with the template's own message if it refuses these messages,
    /// [`Error::Template`] with line and cause if it fails, [`Error::TemplateLimit`] if it runs or
    /// writes without end.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let options = RenderOptions {
            add_generation_prompt,
            ..RenderOptions::default()
        };
        self.render_with(messages, &options)
    }

    /// As [`ChatTemplate::render`], with tools, documents and further variables.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render_with(&self, messages: &[Message], options: &RenderOptions) -> Result<String> {
        let mut context = options.extra.clone();
        let mut set = |name: &str, value: Value| context.insert(name.to_owned(), value);
        let plain = messages.iter().map(|message| Message {
            role: message.role.clone(),
            content: message.content.without_sources(),
            extra: message.extra.clone(),
        });
        let messages =
            serde_json::to_value(plain.collect::<Vec<_>>()).map_err(|error| Error::Template {
                line: 0,
                cause: format!("the messages cannot be handed over: {error}"),
            })?;
        set("messages", messages);
        set(
            "add_generation_prompt",
            options.add_generation_prompt.into(),
        );
        set("tools", options.tools.clone().into());
        set("documents", options.documents.clone().into());
        // A token that the tokenizer does not have is undefined, not none: it prints as nothing.
        let tokens = [
            ("bos_token", &self.tokens.bos),
            ("eos_token", &self.tokens.eos),
            ("unk_token", &self.tokens.unk),
            ("pad_token", &self.tokens.pad),
        ];
        for (name, token) in tokens {
            if let Some(token) = token {
                set(name, token.clone().into());
            }
        }
        let mut out = LimitedWriter::default();
        self.run(|environment, source| {
            let template = environment.template_from_named_str("chat template", source)?;
            template.render_captured_to(&context, &mut out).map(|_| ())
        })?;
        String::from_utf8(out.bytes).map_err(|_| Error::Template {
            line: 0,
            cause: "the output is not UTF-8".to_owned(),
        })
    }

    /// Runs a call into the engine and gives its errors their names.
    fn run(
        &self,
        call: impl FnOnce(&Environment<'static>, &str) -> std::result::Result<(), minijinja::Error>,
    ) -> Result<()> {
        // The engine and its filters reserve memory for numbers that a template names; where that
        // overflows, the panic is an error of this template.
        let outcome = catch_unwind(AssertUnwindSafe(|| call(&self.environment, &self.guarded)));
        match outcome {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(self.named(&error)),
            Err(_) => Err(Error::TemplateLimit {
                line: 0,
                limit: "what memory can hold".to_owned(),
            }),
        }
    }

    fn named(&self, error: &minijinja::Error) -> Error {
        let line = error.line().unwrap_or(0);
        let mut cause = describe(error);
        let mut current: Option<&(dyn std::error::Error + 'static)> =
            std::error::Error::source(error);
        while let Some(inner) = current {
            if let Some(Raised(message)) = inner.downcast_ref() {
                let message = message.clone();
                return Error::TemplateRaised { line, message };
            }
            // The writer's error lies inside an I/O error, whose source it is not.
            let wrapped = inner
                .downcast_ref::<io::Error>()
                .and_then(|error| error.get_ref()?.downcast_ref());
            if let Some(limits::Exceeded(limit)) = inner.downcast_ref().or(wrapped) {
                let limit = limit.clone();
                return Error::TemplateLimit { line, limit };
            }
            let text = inner
                .downcast_ref::<minijinja::Error>()
                .map_or_else(|| inner.to_string(), describe);
            if !cause.contains(&text) {
                cause.push_str(": ");
                cause.push_str(&text);
            }
            current = inner.source();
        }
        if error.kind() == ErrorKind::OutOfFuel {
            let limit = format!("{} instructions", self.instructions);
            return Error::TemplateLimit { line, limit };
        }
        if cause.contains("recursion limit") {
            let limit = "nested calls".to_owned();
            return Error::TemplateLimit { line, limit };
        }
        Error::Template { line, cause }
    }
}

fn describe(error: &minijinja::Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}

fn template_text(value: &Value) -> Option<&str> {
    if let Some(text) = value.as_str() {
        return Some(text);
    }
    let named = value.as_array()?;
    let chosen = named
        .iter()
        .find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"))
        .or(match named.as_slice() {
            [only] => Some(only),
            _ => None,
        })?;
    chosen.get("template")?.as_str()
}

/// Marks the error that a template raises itself.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: String) -> std::result::Result<minijinja::Value, minijinja::Error> {
    let error = minijinja::Error::new(ErrorKind::InvalidOperation, message.clone());
    Err(error.with_source(Raised(message)))
}

/// Collects the rendering up to its limit.
#[derive(Default)]
struct LimitedWriter {
    bytes: Vec<u8>,
}

impl io::Write for LimitedWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len().saturating_add(bytes.len()) > limits::MAX_TEXT {
            let limit = format!("{} bytes of text", limits::MAX_TEXT);
            return Err(io::Error::other(limits::Exceeded(limit)));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
