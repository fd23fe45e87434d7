//! GGUF files: the container, and what its contents are in Hugging Face's terms.
//!
//! [`Container`] reads and [`Writer`] writes the container itself, whatever model is in it.
//! [`GgufFile`] adds what the file means: a `config.json`, a `generation_config.json`, the
//! tokenizer's files, the chat template and tensors under Hugging Face names, for the
//! architectures whose layers are Phi-3 layers ([`Architecture`]). Nobody outside this module
//! sees a GGUF name, except to show it.

mod config;
mod container;
mod error;
pub(crate) mod export;
pub(crate) mod int4;
mod keys;
mod merges;
mod moe;
mod name_tables;
mod names;
mod pre_tokenizer;
pub mod random;
mod small;
mod tokenizer;
mod types;
mod unfinished;
mod value;
mod vocabulary;
mod weights;
mod writer;

use std::path::Path;
use std::sync::Arc;

use phi3_nn::{Bytes, TensorSource};
use serde_json::Value as Json;

use crate::{ChatTemplateSource, Checkpoint, TensorEntry, TokenizerFiles, map_file};

pub use container::{ALIGNMENT_KEY, Container, DEFAULT_ALIGNMENT, TensorInfo};
pub use error::{Error, Result};
pub use names::{Architecture, gguf_name, gguf_name_in, hf_name, hf_name_in};
pub use types::TensorType;
pub use value::{Array, Text, Value};
pub use writer::{PlannedTensor, TensorSink, Writer};

/// Opens a GGUF file as a checkpoint. The file is mapped, its weights are used where they lie.
///
/// # Errors
/// [`crate::Error`] if the file cannot be mapped, is damaged, or holds a model that is not made of
/// Phi-3 layers; [`Error`] says what is wrong. A tensor of a type that cannot be decoded is an
/// error only when it is asked for.
pub fn open(path: &Path) -> std::result::Result<Checkpoint, crate::Error> {
    let wrap = |source: Error| crate::Error::Gguf {
        path: path.to_owned(),
        source: source.into(),
    };
    let origin = path.display().to_string();
    let file = GgufFile::parse(map_file(path)?, &origin).map_err(wrap)?;
    let chat_template = match file.chat_template().map_err(wrap)? {
        Some(template) => ChatTemplateSource::from_json(&template, &origin)?,
        None => None,
    };
    Ok(Checkpoint {
        config: file.config().map_err(wrap)?,
        generation_config: Some(file.generation_config().map_err(wrap)?),
        preprocessor_config: None,
        tokenizer: file.tokenizer().map_err(wrap)?,
        chat_template,
        weights: file.weights().map_err(wrap)?,
        tensors: file.entries(),
        origin,
    })
}

/// A GGUF file and what it means.
///
/// Parsing checks the container only, so that any model can be listed; each of the other methods
/// fails if the file does not hold what it asks for.
#[derive(Clone, Debug)]
pub struct GgufFile {
    container: Arc<Container>,
    origin: String,
}

/// A tensor of a GGUF file, for people to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSummary {
    /// Name in the file.
    pub name: String,
    /// The Hugging Face tensor that holds it, wholly or as some of its rows.
    pub hf_name: Option<String>,
    /// How the weights are stored; `unknown(id)` for a type that nobody here knows.
    pub type_name: String,
    /// Extents, outermost first as in Hugging Face files.
    pub shape: Vec<usize>,
    /// Size in bytes, if the type is known.
    pub bytes: Option<u64>,
}

impl GgufFile {
    /// Maps a file and reads its header.
    ///
    /// # Errors
    /// [`crate::Error`] if the file cannot be mapped or its header is damaged.
    pub fn open(path: &Path) -> std::result::Result<Self, crate::Error> {
        let origin = path.display().to_string();
        Self::parse(map_file(path)?, &origin).map_err(|source| crate::Error::Gguf {
            path: path.to_owned(),
            source: source.into(),
        })
    }

    /// Reads the header of `bytes`, a whole file; `origin` is what messages call it.
    ///
    /// # Errors
    /// Whatever is wrong with the header.
    pub fn parse(bytes: Bytes, origin: &str) -> Result<Self> {
        Ok(Self {
            container: Arc::new(Container::parse(bytes)?),
            origin: origin.to_owned(),
        })
    }

    /// The container.
    pub fn container(&self) -> &Container {
        &self.container
    }

    /// All metadata, in file order.
    pub fn metadata(&self) -> &[(String, Value)] {
        self.container.metadata()
    }

    /// `general.architecture`, also one that is not supported.
    ///
    /// # Errors
    /// [`Error::MissingKey`] or [`Error::BadValue`].
    pub fn architecture(&self) -> Result<&str> {
        config::architecture_name(&self.container)
    }

    /// All tensors, in file order.
    pub fn tensors(&self) -> Vec<TensorSummary> {
        let architecture = config::architecture(&self.container).unwrap_or(Architecture::Phi3);
        let summary = |tensor: &TensorInfo| TensorSummary {
            name: tensor.name.clone(),
            hf_name: hf_name_in(architecture, &tensor.name),
            type_name: tensor.tensor_type.name(),
            shape: tensor.shape.clone(),
            bytes: tensor.size,
        };
        self.container.tensors().iter().map(summary).collect()
    }

    /// The model as a `config.json` of `model_type` `phi3`, `phimoe` or `phi3small`.
    ///
    /// # Errors
    /// An unsupported architecture, a missing or contradictory key, or one that asks for something
    /// that Phi-3 layers do not do.
    pub fn config(&self) -> Result<Json> {
        config::Hyperparameters::read(&self.container)?.config(&self.container)
    }

    /// The ids that end generation, and bos and pad, as a `generation_config.json`.
    ///
    /// # Errors
    /// A token id that is not a number.
    pub fn generation_config(&self) -> Result<Json> {
        config::generation_config(&self.container)
    }

    /// The tokenizer as `tokenizer.json` and `tokenizer_config.json`; both absent if the file has
    /// no vocabulary.
    ///
    /// # Errors
    /// An unknown tokenizer model or pre-tokenizer, or an unusable vocabulary.
    pub fn tokenizer(&self) -> Result<TokenizerFiles> {
        Ok(match tokenizer::files(&self.container)? {
            Some(files) => TokenizerFiles {
                tokenizer_json: Some(files.tokenizer_json),
                tokenizer_config: Some(files.tokenizer_config),
                ..TokenizerFiles::default()
            },
            None => TokenizerFiles::default(),
        })
    }

    /// The chat template as `tokenizer_config.json` has it: a text, or a list of named texts.
    ///
    /// # Errors
    /// [`Error::BadValue`] if it is not text.
    pub fn chat_template(&self) -> Result<Option<Json>> {
        tokenizer::chat_template(&self.container)
    }

    /// The tensors by their Hugging Face names, in the file's bytes.
    ///
    /// # Errors
    /// A tensor that a Phi-3 model has no place for, or whose shape contradicts the metadata.
    pub fn weights(&self) -> Result<Arc<dyn TensorSource>> {
        let numbers = config::Hyperparameters::read(&self.container)?;
        let dimensions = numbers.dimensions();
        Ok(Arc::new(weights::GgufSource {
            recipes: names::map_tensors(&self.container, numbers.architecture, &dimensions)?,
            container: Arc::clone(&self.container),
            head_dim: dimensions.head_dim,
            origin: self.origin.clone(),
        }))
    }

    fn entries(&self) -> Vec<TensorEntry> {
        let file = Path::new(&self.origin).file_name().unwrap_or_default();
        let entry = |tensor: TensorSummary| TensorEntry {
            name: tensor.name,
            dtype: tensor.type_name,
            shape: tensor.shape,
            bytes: tensor.bytes.unwrap_or_default(),
            file: file.to_string_lossy().into_owned(),
        };
        self.tensors().into_iter().map(entry).collect()
    }
}

/// How cl100k splits text into words: a `pre_tokenizer` of `tokenizer.json`.
pub(crate) fn cl100k_pre_tokenizer() -> Json {
    pre_tokenizer::PreTokenizer::Dbrx.to_json()
}

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
