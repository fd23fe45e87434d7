//! Text in, text out.
#![forbid(unsafe_code)]

pub mod chat_template;
pub mod error;
pub mod sampling;
pub mod stop;
pub mod stream;
pub mod tokenizer;

#[cfg(test)]
mod testing;

pub use chat_template::{ChatTemplate, Content, Message, Part, RenderOptions, TemplateSource};
pub use error::{Error, Result};
pub use sampling::{Sampled, Sampler, SamplingParams};
pub use stop::{StopMatcher, stop_ids};
pub use stream::DecodeStream;
pub use tokenizer::{SpecialTokens, Tokenizer};
