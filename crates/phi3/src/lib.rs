//! Run the Phi-3 family of language models: load one, talk with it.
//!
//! A model is a repo id on the hub, a folder in Hugging Face's layout, or one `.gguf` file; the
//! call is the same:
//!
//! ```no_run
//! fn main() -> Result<(), phi3::Error> {
//!     let model = phi3::load("microsoft/Phi-3-mini-4k-instruct")?;
//!     let mut chat = model.chat()?;
//!     for piece in chat.send("What is the capital of France?")? {
//!         print!("{}", piece?);
//!     }
//!     Ok(())
//! }
//! ```
//!
//! A model that sees takes pictures with the text: [`Chat::show`], or a [`text::Message`] of several
//! parts.
//!
//! [`load_with`] takes a device, a revision and more ([`LoadOptions`]). [`LanguageModel::complete`]
//! continues plain text. Below the conversation, [`text::Generator`] drives several sequences at
//! once, and [`nn::CausalLm`] gives logits for packed sequences. The crates below are
//! re-exported: [`hub`] (files), [`text`] (tokenizer, templates, sampling), [`nn`] (layers and the
//! forward contract).
#![forbid(unsafe_code)]

mod auto;
mod chat;
mod error;
pub mod eval;
mod extend;
pub mod image;
mod importance;
mod model;
mod seen;

pub use phi3_hub as hub;
pub use phi3_nn as nn;
pub use phi3_text as text;

pub use auto::ModelConfig;
pub use chat::{Answer, Chat, ChatSettings};
pub use error::{Error, Result};
pub use extend::ContextExtension;
pub use importance::importance;
pub use model::{LanguageModel, LoadOptions, load, load_template, load_tokenizer, load_with};
pub use phi_3_5_moe::{RouterTrace, Routing};
pub use phi3_kernels::{InstructionSet, Probe, probe};
pub use phi3_kernels::{argmax, backend_name, check_environment, num_threads, set_num_threads};
pub use phi3_nn::{CacheType, DeviceSpec};
pub use phi3_text::SamplingParams;
pub use seen::{ImagePrompt, SeenImage, with_image_tags, without_marks};
