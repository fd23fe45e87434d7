//! Text in, text out.
//!
//! [`Tokenizer`] turns text into ids and back. [`ChatTemplate`] turns a conversation into the text
//! that the model was trained on. [`Generator`] runs the model: its [`Request`]s say what to
//! continue, how to choose tokens ([`SamplingParams`]) and when to stop ([`stop_ids`], stop
//! strings); its [`Event`]s bring the text as it becomes certain ([`DecodeStream`],
//! [`StopMatcher`]).
//!
//! This crate reads no files: `phi3` hands it what `phi3-hub` found.
//!
//! ```no_run
//! # fn run(model: &dyn phi3_nn::CausalLm, tokenizer: &phi3_text::Tokenizer, template: &phi3_text::ChatTemplate) -> phi3_text::Result<()> {
//! use phi3_text::{Generator, Message, Request, stop_ids};
//!
//! let prompt = template.render(&[Message::user("What is the capital of France?")], true)?;
//! let mut request = Request::new(tokenizer.encode_chat(&prompt)?);
//! request.stop_ids = stop_ids(None, None, Some(template.source()), tokenizer)?;
//! let mut generator = Generator::new(model, tokenizer);
//! generator.add(request)?;
//! for event in generator {
//!     print!("{}", event?.text());
//! }
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

pub mod chat_template;
pub mod error;
pub mod generate;
pub mod sampling;
pub mod stop;
pub mod stream;
pub mod tokenizer;

#[cfg(test)]
mod testing;

pub use chat_template::{
    ChatTemplate, Content, ImageSource, Message, Part, RenderOptions, TemplateSource,
};
pub use error::{Error, Result};
pub use generate::{
    CachedPrefix, CancelToken, Completion, Event, EventKind, FinishReason, Finished, Generator,
    Request, Token, Usage, complete,
};
pub use sampling::{Sampled, Sampler, SamplingParams};
pub use stop::{StopMatcher, stop_ids};
pub use stream::DecodeStream;
pub use tokenizer::{SpecialTokens, Tokenizer};
