//! A folder's safetensors files as a source of tensors.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use phi3_kernels::BlockType;
use phi3_nn::weights::{Bytes, StoredTensor, TensorSource};

use super::error::SafetensorsError;
use super::header::{Header, TensorInfo};
use super::index::read_weight_map;
use super::{INDEX, SINGLE};
use crate::checkpoint::{TensorEntry, files_with_suffix};
use crate::config::is_lfs_pointer;
use crate::error::Error;
use crate::mapping::map_file;
use crate::names;
use crate::source::PICKLES;

/// The tensors of one file or of a sharded set, mapped. Opening reads only the headers.
#[derive(Debug)]
pub struct SafetensorsSource {
    origin: PathBuf,
    files: Vec<MappedFile>,
    by_name: HashMap<String, (usize, usize)>,
}

#[derive(Debug)]
struct MappedFile {
    path: PathBuf,
    name: String,
    bytes: Bytes,
    tensors: Vec<TensorInfo>,
}

impl SafetensorsSource {
    /// Opens a folder: `model.safetensors`, else the shards of `model.safetensors.index.json`.
    ///
    /// # Errors
    /// [`Error::Pickle`] or [`Error::MissingFile`] if it has neither, [`Error::Safetensors`],
    /// [`Error::Index`] or [`Error::UnsafeName`] if a file is damaged or lies.
    pub fn open(folder: &Path) -> Result<Self, Error> {
        if folder.join(SINGLE).exists() {
            return Self::open_file(&folder.join(SINGLE));
        }
        if folder.join(INDEX).exists() {
            return Self::open_index(&folder.join(INDEX));
        }
        Err(no_weights(folder)?)
    }

    /// Opens one safetensors file of any name.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::LfsPointer`] or [`Error::Safetensors`].
    pub fn open_file(path: &Path) -> Result<Self, Error> {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let file = MappedFile::open(path, name)?;
        let by_name = file
            .tensors
            .iter()
            .enumerate()
            .map(|(i, tensor)| (tensor.name.clone(), (0, i)))
            .collect();
        Ok(Self {
            origin: path.to_owned(),
            files: vec![file],
            by_name,
        })
    }

    /// Opens the shards that an index file names.
    ///
    /// # Errors
    /// As [`SafetensorsSource::open`].
    pub fn open_index(index: &Path) -> Result<Self, Error> {
        let folder = index.parent().unwrap_or(Path::new(""));
        let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (tensor, shard) in read_weight_map(index)? {
            shards.entry(shard).or_default().push(tensor);
        }
        let mut source = Self {
            origin: index.to_owned(),
            files: Vec::new(),
            by_name: HashMap::new(),
        };
        for (shard, tensors) in shards {
            source.add_shard(index, folder, shard, tensors)?;
        }
        Ok(source)
    }

    fn add_shard(
        &mut self,
        index: &Path,
        folder: &Path,
        shard: String,
        tensors: Vec<String>,
    ) -> Result<(), Error> {
        let problem = |tensor: &str, shard: &str, problem| Error::Index {
            index: index.to_owned(),
            tensor: tensor.to_owned(),
            shard: shard.to_owned(),
            problem,
        };
        let any = tensors.first().map(String::as_str).unwrap_or_default();
        let path = names::inside(folder, &shard).ok_or_else(|| Error::UnsafeName {
            origin: index.display().to_string(),
            name: shard.clone(),
        })?;
        if !path.exists() {
            return Err(problem(
                any,
                &shard,
                "which does not exist: fetch the missing file",
            ));
        }
        let file = MappedFile::open(&path, shard)?;
        let places: HashMap<&str, usize> = file
            .tensors
            .iter()
            .enumerate()
            .map(|(i, tensor)| (tensor.name.as_str(), i))
            .collect();
        let wanted: BTreeSet<&str> = tensors.iter().map(String::as_str).collect();
        for name in places.keys().filter(|name| !wanted.contains(*name)) {
            tracing::debug!(
                tensor = *name,
                shard = file.name,
                "not in the index: ignored"
            );
        }
        let file_idx = self.files.len();
        for tensor in &tensors {
            let Some(&place) = places.get(tensor.as_str()) else {
                return Err(problem(tensor, &file.name, "which has no such tensor"));
            };
            self.by_name.insert(tensor.clone(), (file_idx, place));
        }
        self.files.push(file);
        Ok(())
    }

    /// All tensors, file by file, in the order in which they lie there.
    pub fn entries(&self) -> Vec<TensorEntry> {
        let mut entries = Vec::with_capacity(self.by_name.len());
        for (file_idx, file) in self.files.iter().enumerate() {
            for (i, tensor) in file.tensors.iter().enumerate() {
                if self.by_name.get(&tensor.name) == Some(&(file_idx, i)) {
                    entries.push(TensorEntry {
                        name: tensor.name.clone(),
                        dtype: tensor.dtype.clone(),
                        shape: tensor.shape.clone(),
                        bytes: tensor.range.len() as u64,
                        file: file.name.clone(),
                    });
                }
            }
        }
        entries
    }

    /// The tensor `name` as stored, or `None` if there is none.
    ///
    /// # Errors
    /// [`Error::Safetensors`] if its dtype is not F32, F16 or BF16.
    pub fn get(&self, name: &str) -> Result<Option<StoredTensor>, Error> {
        let Some(&(file_idx, place)) = self.by_name.get(name) else {
            return Ok(None);
        };
        let Some((file, info)) = self
            .files
            .get(file_idx)
            .and_then(|file| Some((file, file.tensors.get(place)?)))
        else {
            return Ok(None);
        };
        file.tensor(info)
            .map(Some)
            .map_err(|source| Error::Safetensors {
                path: file.path.clone(),
                source,
            })
    }
}

impl TensorSource for SafetensorsSource {
    fn tensor(
        &self,
        name: &str,
    ) -> Result<Option<StoredTensor>, Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.get(name)?)
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = self.by_name.keys().cloned().collect();
        names.sort();
        names
    }

    fn origin(&self) -> String {
        self.origin.display().to_string()
    }
}

impl MappedFile {
    fn open(path: &Path, name: String) -> Result<Self, Error> {
        let bytes = map_file(path)?;
        if is_lfs_pointer(&bytes) {
            return Err(Error::LfsPointer {
                path: path.to_owned(),
            });
        }
        let header = Header::parse(&bytes).map_err(|source| Error::Safetensors {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            path: path.to_owned(),
            name,
            bytes,
            tensors: header.tensors,
        })
    }

    fn tensor(&self, info: &TensorInfo) -> Result<StoredTensor, SafetensorsError> {
        let block_type = match info.dtype.as_str() {
            "F32" => BlockType::F32,
            "F16" => BlockType::F16,
            "BF16" => BlockType::BF16,
            _ => {
                return Err(SafetensorsError::Dtype {
                    tensor: info.name.clone(),
                    dtype: info.dtype.clone(),
                });
            }
        };
        // The range was checked against these bytes when the header was parsed.
        let bytes = self
            .bytes
            .slice(info.range.clone())
            .unwrap_or_else(|| Bytes::from(Vec::new()));
        StoredTensor::new(info.shape.clone(), block_type, bytes).map_err(|error| {
            SafetensorsError::Shape {
                tensor: info.name.clone(),
                detail: error.to_string(),
            }
        })
    }
}

/// Why a folder has no weights that can be used.
fn no_weights(folder: &Path) -> Result<Error, Error> {
    for suffix in PICKLES {
        if let Some(path) = files_with_suffix(folder, &format!(".{suffix}"))?.first() {
            return Ok(Error::Pickle {
                origin: folder.display().to_string(),
                file: path
                    .file_name()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into_owned(),
            });
        }
    }
    let other = files_with_suffix(folder, ".safetensors")?;
    let gguf = files_with_suffix(folder, ".gguf")?;
    let advice = match (other.first(), gguf.first()) {
        (Some(path), _) => format!(
            "there is {}; rename it to {SINGLE}, or add {INDEX} if it is one of several",
            path.file_name().unwrap_or_default().to_string_lossy()
        ),
        (None, Some(path)) => format!("to use the GGUF file, give {}", path.display()),
        (None, None) => format!("the folder has no weights ({SINGLE} or {INDEX} with its shards)"),
    };
    Ok(Error::MissingFile {
        folder: folder.to_owned(),
        file: SINGLE.to_owned(),
        advice,
    })
}

#[cfg(test)]
mod tests;
