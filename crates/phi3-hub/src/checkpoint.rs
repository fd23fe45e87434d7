//! The one form in which every model comes out of this crate.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use phi3_nn::weights::{MemorySource, TensorSource};
use serde_json::Value;

use crate::config::{
    MAX_CONFIG, MAX_TEMPLATE, MAX_TOKENIZER, read_bytes, read_json, read_optional_bytes,
    read_optional_json,
};
use crate::error::Error;
use crate::gguf;
use crate::hub::{HubOptions, Seen, download, download_small, look};
use crate::safetensors::SafetensorsSource;
use crate::source::Source;

/// A model's files, opened: everything that is needed to build and prompt it.
#[derive(Clone)]
pub struct Checkpoint {
    /// `config.json`, with `clip_vision_config.json`, if there is one, as its `vision_config`; or what a GGUF file's metadata amount to in its terms.
    pub config: Value,
    /// `generation_config.json`, if there is one.
    pub generation_config: Option<Value>,
    /// `preprocessor_config.json`, if there is one: how a vision model wants its images.
    pub preprocessor_config: Option<Value>,
    /// The tokenizer's files.
    pub tokenizer: TokenizerFiles,
    /// The chat template, if the model has one.
    pub chat_template: Option<ChatTemplateSource>,
    /// The weights, by Hugging Face's names.
    pub weights: Arc<dyn TensorSource>,
    /// What the files hold, in the order in which it lies there, under the files' own names.
    pub tensors: Vec<TensorEntry>,
    /// The folder or file that all of this was read from.
    pub origin: String,
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint")
            .field("origin", &self.origin)
            .field("model_type", &self.config.get("model_type"))
            .field("tensors", &self.tensors.len())
            .finish_non_exhaustive()
    }
}

/// The tokenizer's files as they are; which of them exist differs between models.
#[derive(Clone, Debug, Default)]
pub struct TokenizerFiles {
    /// `tokenizer.json` (or its equivalent made from a GGUF file's vocabulary).
    pub tokenizer_json: Option<Vec<u8>>,
    /// `tokenizer_config.json`.
    pub tokenizer_config: Option<Value>,
    /// `special_tokens_map.json`.
    pub special_tokens_map: Option<Value>,
    /// A `.tiktoken` file of ranks, which phi-3-small has instead of `tokenizer.json`.
    pub tiktoken: Option<Vec<u8>>,
}

/// A chat template and where it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatTemplateSource {
    /// The template that is used unless another is asked for by name.
    pub text: String,
    /// Where it came from, for messages: a file, or a file and its key.
    pub origin: String,
    /// Further templates by name (`tool_use`, …).
    pub named: BTreeMap<String, String>,
}

/// A tensor as its file lists it, for people to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    /// Name in the file.
    pub name: String,
    /// Storage type as the file calls it: `F32`, `BF16`, `Q4_K`, …; also types that cannot be used.
    pub dtype: String,
    /// Shape in Hugging Face's order, `[out, in]` for a matrix.
    pub shape: Vec<usize>,
    /// Size in the file, in bytes.
    pub bytes: u64,
    /// The file's name.
    pub file: String,
}

/// Opens a model wherever it is, downloading what is missing.
///
/// # Errors
/// Whatever is wrong with the download or the files, see [`Error`].
pub fn open(source: &Source, options: &HubOptions) -> Result<Checkpoint, Error> {
    open_path(&download(source, options)?)
}

fn open_path(path: &Path) -> Result<Checkpoint, Error> {
    match path.is_dir() {
        true => open_folder(path),
        false => gguf::open(path),
    }
}

/// Opens a model for its configuration and texts alone: [`Checkpoint::weights`] and
/// [`Checkpoint::tensors`] are empty, and the weights of a repo in Hugging Face's layout are neither
/// needed nor downloaded.
///
/// # Errors
/// As [`open`].
pub fn open_without_weights(source: &Source, options: &HubOptions) -> Result<Checkpoint, Error> {
    let path = download_small(source, options)?;
    match gguf_of(&path)? {
        Some(path) => gguf::open(&path),
        None => small_files(&path),
    }
}

/// Opens a model to look at it: [`Checkpoint::tensors`] lists what it has, but where that is on the
/// hub in Hugging Face's layout only the headers are read, and [`Checkpoint::weights`] is empty.
///
/// # Errors
/// As [`open`].
pub fn open_headers(source: &Source, options: &HubOptions) -> Result<Checkpoint, Error> {
    match look(source, options)? {
        Seen::Here(path) => open_path(&path),
        Seen::Remote { folder, tensors } => Ok(Checkpoint {
            tensors,
            ..small_files(&folder)?
        }),
    }
}

/// Opens a folder in Hugging Face's layout. A folder without `config.json` that holds exactly one
/// GGUF file stands for that file.
///
/// # Errors
/// See [`Error`]; a folder whose only weights are pickles is refused.
pub fn open_folder(folder: &Path) -> Result<Checkpoint, Error> {
    if let Some(path) = gguf_of(folder)? {
        return gguf::open(&path);
    }
    let small = small_files(folder)?;
    let weights = SafetensorsSource::open(folder)?;
    Ok(Checkpoint {
        tensors: weights.entries(),
        weights: Arc::new(weights),
        ..small
    })
}

/// The GGUF file that a path stands for.
fn gguf_of(path: &Path) -> Result<Option<PathBuf>, Error> {
    match path {
        _ if !path.is_dir() => Ok(Some(path.to_owned())),
        _ if path.join("config.json").exists() => Ok(None),
        _ => single_gguf(path),
    }
}

/// A folder's files except the weights.
fn small_files(folder: &Path) -> Result<Checkpoint, Error> {
    let config = match read_json(&folder.join("config.json"), MAX_CONFIG) {
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::MissingFile {
                folder: folder.to_owned(),
                file: "config.json".to_owned(),
                advice: "give the folder of a model in Hugging Face's layout, or a .gguf file"
                    .to_owned(),
            });
        }
        other => other?,
    };
    let optional = |name: &str| read_optional_json(&folder.join(name), MAX_CONFIG);
    let config = with_vision_config(config, optional("clip_vision_config.json")?);
    let tokenizer_config = optional("tokenizer_config.json")?;
    let chat_template = chat_template(folder, tokenizer_config.as_ref())?;
    Ok(Checkpoint {
        config,
        generation_config: optional("generation_config.json")?,
        preprocessor_config: optional("preprocessor_config.json")?,
        tokenizer: TokenizerFiles {
            tokenizer_json: read_optional_bytes(&folder.join("tokenizer.json"), MAX_TOKENIZER)?,
            tokenizer_config,
            special_tokens_map: optional("special_tokens_map.json")?,
            tiktoken: tiktoken(folder)?,
        },
        chat_template,
        tensors: Vec::new(),
        weights: Arc::new(MemorySource::new()),
        origin: folder.display().to_string(),
    })
}

/// Phi-3-vision's config.json does not describe its image tower, which is always the same. Where
/// a folder has one of its own, its configuration becomes `vision_config`, as in other models that see.
fn with_vision_config(mut config: Value, vision: Option<Value>) -> Value {
    if let (Some(fields), Some(vision)) = (config.as_object_mut(), vision) {
        fields.entry("vision_config").or_insert(vision);
    }
    config
}

fn single_gguf(folder: &Path) -> Result<Option<PathBuf>, Error> {
    let mut files = files_with_suffix(folder, ".gguf")?;
    if files.len() > 1 {
        return Err(Error::SeveralGguf {
            origin: folder.display().to_string(),
            files: files
                .iter()
                .map(|file| file.display().to_string())
                .collect(),
        });
    }
    Ok(files.pop())
}

fn tiktoken(folder: &Path) -> Result<Option<Vec<u8>>, Error> {
    match files_with_suffix(folder, ".tiktoken")?.first() {
        Some(path) => read_bytes(path, MAX_TOKENIZER).map(Some),
        None => Ok(None),
    }
}

/// The files of a folder whose names end so, sorted; empty if there is no such folder.
pub(crate) fn files_with_suffix(folder: &Path, suffix: &str) -> Result<Vec<PathBuf>, Error> {
    let entries = match folder.read_dir() {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("listing", folder, error)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry
            .map_err(|error| Error::io("listing", folder, error))?
            .path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .to_lowercase();
        if name.ends_with(suffix) && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// The chat template of a folder: `chat_template.jinja` wins over `tokenizer_config.json`, as in
/// transformers.
fn chat_template(
    folder: &Path,
    tokenizer_config: Option<&Value>,
) -> Result<Option<ChatTemplateSource>, Error> {
    let origin = folder.join("tokenizer_config.json").display().to_string();
    let mut found = match tokenizer_config.and_then(|config| config.get("chat_template")) {
        Some(value) => ChatTemplateSource::from_json(value, &origin)?,
        None => None,
    };
    let jinja = folder.join("chat_template.jinja");
    if let Some(text) = read_template(&jinja)? {
        found = Some(ChatTemplateSource {
            text,
            origin: jinja.display().to_string(),
            named: found.map(|source| source.named).unwrap_or_default(),
        });
    }
    if let Some(found) = &mut found {
        for path in files_with_suffix(&folder.join("additional_chat_templates"), ".jinja")? {
            let name = path
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if let Some(text) = read_template(&path)? {
                found.named.insert(name, text);
            }
        }
    }
    Ok(found)
}

fn read_template(path: &Path) -> Result<Option<String>, Error> {
    let Some(bytes) = read_optional_bytes(path, MAX_TEMPLATE)? else {
        return Ok(None);
    };
    match String::from_utf8(bytes) {
        Ok(text) => Ok(Some(text)),
        Err(error) => Err(Error::ChatTemplate {
            origin: path.display().to_string(),
            detail: format!(
                "it is not UTF-8 from byte {} on",
                error.utf8_error().valid_up_to()
            ),
        }),
    }
}

impl ChatTemplateSource {
    /// The `chat_template` of `tokenizer_config.json`: a text, or a list of
    /// `{"name": …, "template": …}` of which `default` is the template and the others stay available
    /// by name. Without a `default` the first is taken. `null` and an empty list are no template.
    ///
    /// # Errors
    /// [`Error::ChatTemplate`] for any other form.
    pub fn from_json(value: &Value, origin: &str) -> Result<Option<Self>, Error> {
        let wrong = |detail: String| Error::ChatTemplate {
            origin: origin.to_owned(),
            detail,
        };
        let list = match value {
            Value::Null => return Ok(None),
            Value::String(text) => {
                return Ok(Some(Self {
                    text: text.clone(),
                    origin: origin.to_owned(),
                    named: BTreeMap::new(),
                }));
            }
            Value::Array(list) => list,
            _ => {
                return Err(wrong(
                    "it is neither a text nor a list of named texts".to_owned(),
                ));
            }
        };
        let mut named = BTreeMap::new();
        let mut first = None;
        for (i, item) in list.iter().enumerate() {
            let field = |key: &str| item.get(key).and_then(Value::as_str);
            let (Some(name), Some(template)) = (field("name"), field("template")) else {
                return Err(wrong(format!("entry {i} lacks a name or a template")));
            };
            first.get_or_insert_with(|| name.to_owned());
            named.insert(name.to_owned(), template.to_owned());
        }
        let Some(first) = first else {
            return Ok(None);
        };
        let name = if named.contains_key("default") {
            "default".to_owned()
        } else {
            first
        };
        if name != "default" {
            tracing::warn!(
                origin,
                name,
                "no chat template is called default: using this one"
            );
        }
        let text = named.remove(&name).unwrap_or_default();
        Ok(Some(Self {
            text,
            origin: format!("{origin} ({name})"),
            named,
        }))
    }
}

#[cfg(test)]
mod tests;
