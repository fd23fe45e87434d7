//! A model's files: found on disk or downloaded, checked, and handed out as plain data.
//!
//! A model is a folder in Hugging Face's layout, one `.gguf` file, or a repo id on the hub; [`open`]
//! takes all three and returns the same [`Checkpoint`]: `config.json` as a value, the tokenizer
//! files and the chat template as they are, and the weights as a [`TensorSource`] over mapped files.
//! What the values mean is for other crates to know.
//!
//! ```no_run
//! use phi3_hub::{HubOptions, Source, open};
//!
//! let source = Source::parse("microsoft/Phi-3-mini-4k-instruct", None)?;
//! let checkpoint = open(&source, &HubOptions::from_env())?;
//! println!("{} from {}", checkpoint.config["model_type"], checkpoint.origin);
//! # Ok::<(), phi3_hub::Error>(())
//! ```
//!
//! Nothing read here is trusted: sizes are checked before they are allocated, names before they
//! become paths, and a file that fails a check is an [`Error`] that names it.

#![deny(unsafe_code)]

mod checkpoint;
mod config;
mod disk;
mod error;
pub mod gguf;
mod hub;
#[expect(
    unsafe_code,
    reason = "mapping a file and letting go of its pages is unsafe by nature; nothing else is done there"
)]
mod mapping;
mod memory_budget;
mod names;
pub mod quantize;
pub mod safetensors;
mod source;
mod tiktoken;

pub use checkpoint::{
    ChatTemplateSource, Checkpoint, TensorEntry, TokenizerFiles, open, open_folder, open_headers,
    open_without_weights,
};
pub use config::{parse_json, read_bytes, read_json};
pub use disk::free_space;
pub use error::Error;
pub use hub::{
    HubError, HubOptions, NoProgress, Progress, RetryPolicy, TerminalProgress, download,
};
pub use mapping::map_file;
pub use memory_budget::{Counters, MemoryBudget};
pub use phi3_nn::weights::TensorSource;
pub use source::Source;
