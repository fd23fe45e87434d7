//! What can be wrong with a model's files.

use std::io;
use std::path::{Path, PathBuf};

use crate::hub::HubError;
use crate::safetensors::SafetensorsError;

/// An error of this crate. Messages name the file and say what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model was given as a path, and there is nothing at that path.
    #[error("there is no file or folder {}", path.display())]
    NoSuchPath {
        /// The path as given.
        path: PathBuf,
    },
    /// Neither an existing path nor a repo id.
    #[error(
        "{model:?} is neither an existing folder or .gguf file nor a repo id like org/name: {detail}"
    )]
    NotAModel {
        /// The text as given.
        model: String,
        /// What is wrong with it.
        detail: String,
    },
    /// An existing file that is not a `.gguf` file.
    #[error("{} is not a GGUF file: {advice}", path.display())]
    WrongKindOfFile {
        /// The file.
        path: PathBuf,
        /// What to give instead.
        advice: String,
    },
    /// A revision was given for a model on disk.
    #[error("{} is on disk and has no revisions: leave --revision out, or give a repo id", path.display())]
    RevisionOfPath {
        /// The folder or file.
        path: PathBuf,
    },
    /// The system refused to open, read or write a file.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was being done, as a participle.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A folder, pipe or device where a file was expected.
    #[error("{} is not a regular file", path.display())]
    NotAFile {
        /// What was given.
        path: PathBuf,
    },
    /// A file is larger than any of its kind should be.
    #[error("{} has {size} bytes; a file of this kind has at most {limit}", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size in bytes, or how much of it was read.
        size: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// A file is not the JSON it should be.
    #[error("{}, line {line}, column {column}: {message}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Line of the error, from 1; 0 if the error has no place.
        line: usize,
        /// Column of the error, from 1.
        column: usize,
        /// What is wrong there.
        message: String,
    },
    /// git checked out the pointer to a large file instead of the file.
    #[error(
        "{} is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder, or download the model again",
        path.display()
    )]
    LfsPointer {
        /// The file.
        path: PathBuf,
    },
    /// A file that every model of this form has is absent.
    #[error("{} has no {file}: {advice}", folder.display())]
    MissingFile {
        /// The model's folder.
        folder: PathBuf,
        /// The file's name.
        file: String,
        /// What to do about it.
        advice: String,
    },
    /// The only weights are pickles.
    #[error(
        "{origin} has its weights only as {file}, a Python pickle, which can run any code when it is \
         read and is therefore refused: convert it to safetensors (in Python, \
         `model.save_pretrained(folder, safe_serialization=True)`) or use a revision that has safetensors"
    )]
    Pickle {
        /// The folder or repo.
        origin: String,
        /// One of the pickles.
        file: String,
    },
    /// Several GGUF files, and nothing says which.
    #[error("{origin} has several GGUF files; name one of them: {}", files.join(", "))]
    SeveralGguf {
        /// The folder or repo.
        origin: String,
        /// What can be given as the model.
        files: Vec<String>,
    },
    /// A name in a file or listing that would lead out of the model's folder.
    #[error("{origin} names the file {name:?}, which leaves the model's folder: refused")]
    UnsafeName {
        /// Where the name was read.
        origin: String,
        /// The name.
        name: String,
    },
    /// The index of sharded weights contradicts the files.
    #[error("{}: tensor {tensor} is said to be in {shard}, {problem}", index.display())]
    Index {
        /// The index file.
        index: PathBuf,
        /// The tensor.
        tensor: String,
        /// The file that should hold it.
        shard: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// A safetensors file is damaged, hostile or of an unknown form.
    #[error("{}: {source}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: SafetensorsError,
    },
    /// A GGUF file is damaged, hostile or of an unknown form.
    #[error("{}: {source}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A `.tiktoken` file is damaged, or not Phi-3-small's.
    #[error("{origin}: the ranks of the tokenizer cannot be used: {detail}")]
    Tiktoken {
        /// The model's folder.
        origin: String,
        /// What is wrong.
        detail: String,
    },
    /// The chat template is not in a form that is known.
    #[error("{origin}: the chat template cannot be read: {detail}")]
    ChatTemplate {
        /// The file.
        origin: String,
        /// What was found.
        detail: String,
    },
    /// Something about the hub or its cache.
    #[error(transparent)]
    Hub(#[from] HubError),
}

impl Error {
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }

    pub(crate) fn json(path: &Path, error: &serde_json::Error) -> Self {
        // serde_json appends the place to its message; here it stands in front.
        let text = error.to_string();
        let place = format!(" at line {} column {}", error.line(), error.column());
        Self::Json {
            path: path.to_owned(),
            line: error.line(),
            column: error.column(),
            message: text.strip_suffix(&place).unwrap_or(&text).to_owned(),
        }
    }
}
