//! The container: a header of metadata and tensor entries, then the tensors' bytes.
//!
//! Layout after <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. Every count and
//! length is held against the size of the file before anything is allocated for it.

use std::collections::HashMap;

use phi3_nn::Bytes;

use super::error::{Error, Result};
use super::types::TensorType;
use super::value::{self, Array, Text, Value};

/// Where tensor data begins unless `general.alignment` says otherwise: multiples of 32 bytes.
pub const DEFAULT_ALIGNMENT: u64 = 32;

/// The key that sets the alignment.
pub const ALIGNMENT_KEY: &str = "general.alignment";

/// Real files have 32 or the page size; more would only move tensors out of the file.
pub(super) const MAX_ALIGNMENT: u64 = 1 << 20;

/// Arrays of arrays are allowed by the format and written by nobody; each level is a call.
const MAX_NESTING: usize = 4;

/// ggml's `GGML_MAX_DIMS`.
const MAX_AXES: u32 = 4;

/// Fewest bytes of a metadata entry (key length, type, value) and of a tensor entry (name length,
/// number of axes, type, offset).
const MIN_ENTRY: u64 = 8 + 4 + 1;
const MIN_TENSOR: u64 = 8 + 4 + 4 + 8;

/// A tensor's entry in the header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name in the file.
    pub name: String,
    /// Extents, outermost first as in Hugging Face files (`[out, in]`); the file has them the
    /// other way round.
    pub shape: Vec<usize>,
    /// How the weights are stored.
    pub tensor_type: TensorType,
    /// Size of the data in bytes; `None` if the type is unknown.
    pub size: Option<u64>,
    /// Offset of the data, from the start of the file.
    start: u64,
}

/// A parsed container over the bytes of a file.
#[derive(Debug)]
pub struct Container {
    version: u32,
    alignment: u64,
    metadata: Vec<(String, Value)>,
    keys: HashMap<String, usize>,
    tensors: Vec<TensorInfo>,
    names: HashMap<String, usize>,
    bytes: Bytes,
}

impl Container {
    /// Reads the header of `bytes`, a whole file, and checks that every tensor lies in it.
    ///
    /// # Errors
    /// Whatever is wrong with the header; see [`Error`].
    pub fn parse(bytes: Bytes) -> Result<Self> {
        let mut reader = Reader {
            bytes: &bytes,
            at: 0,
        };
        let version = reader.preamble()?;
        let tensor_count = reader.u64("the number of tensors")?;
        let entry_count = reader.u64("the number of metadata entries")?;
        let tensor_count = reader.check_count("tensors", tensor_count, MIN_TENSOR)?;
        let entry_count = reader.check_count("metadata entries", entry_count, MIN_ENTRY)?;

        let mut metadata = Vec::with_capacity(entry_count);
        let mut keys = HashMap::with_capacity(entry_count);
        for _ in 0..entry_count {
            let key = reader.string("a metadata key")?;
            let value = reader.value(&key)?;
            if keys.insert(key.clone(), metadata.len()).is_some() {
                return Err(Error::DuplicateKey { key });
            }
            metadata.push((key, value));
        }
        let alignment = match keys.get(ALIGNMENT_KEY).and_then(|&i| metadata.get(i)) {
            Some((_, value)) => check_alignment(value)?,
            None => DEFAULT_ALIGNMENT,
        };

        let mut entries = Vec::with_capacity(tensor_count);
        let mut names = HashMap::with_capacity(tensor_count);
        for _ in 0..tensor_count {
            let entry = reader.tensor_entry()?;
            if names.insert(entry.name.clone(), entries.len()).is_some() {
                return Err(Error::DuplicateTensor { tensor: entry.name });
            }
            entries.push(entry);
        }

        let data_start = (reader.at as u64).next_multiple_of(alignment);
        let file_size = bytes.len() as u64;
        let tensors = entries
            .into_iter()
            .map(|entry| entry.place(data_start, alignment, file_size))
            .collect::<Result<Vec<_>>>()?;
        check_overlap(&tensors)?;
        Ok(Self {
            version,
            alignment,
            metadata,
            keys,
            tensors,
            names,
            bytes,
        })
    }

    /// Version of the container: 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Alignment of tensor data in bytes.
    pub fn alignment(&self) -> u64 {
        self.alignment
    }

    /// All metadata, in file order.
    pub fn metadata(&self) -> &[(String, Value)] {
        &self.metadata
    }

    /// The value of a metadata key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        let index = *self.keys.get(key)?;
        self.metadata.get(index).map(|(_, value)| value)
    }

    /// All tensors, in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(*self.names.get(name)?)
    }

    /// The stored bytes of one of this container's tensors.
    ///
    /// # Errors
    /// [`Error::TensorType`] if the type is unknown, so that its size is too.
    pub fn data(&self, tensor: &TensorInfo) -> Result<Bytes> {
        let outside = || Error::OutsideFile {
            tensor: tensor.name.clone(),
            start: tensor.start,
            size: tensor.size.unwrap_or_default(),
            file_size: self.bytes.len() as u64,
        };
        let size = tensor.size.ok_or_else(|| tensor.unsupported())?;
        let start = usize::try_from(tensor.start).map_err(|_| outside())?;
        let size = usize::try_from(size).map_err(|_| outside())?;
        let end = start.checked_add(size).ok_or_else(outside)?;
        self.bytes.slice(start..end).ok_or_else(outside)
    }

    /// Size of the whole file in bytes.
    pub fn file_size(&self) -> u64 {
        self.bytes.len() as u64
    }
}

impl TensorInfo {
    pub(super) fn unsupported(&self) -> Error {
        Error::TensorType {
            tensor: self.name.clone(),
            found: self.tensor_type.name(),
            supported: super::types::supported(),
        }
    }
}

/// A tensor's entry as it stands in the file.
struct Entry {
    name: String,
    /// Innermost extent first.
    axes: Vec<u64>,
    tensor_type: TensorType,
    offset: u64,
}

impl Entry {
    fn place(self, data_start: u64, alignment: u64, file_size: u64) -> Result<TensorInfo> {
        let bad = |problem: String| Error::Dimensions {
            tensor: self.name.clone(),
            shape: self.axes.clone(),
            problem,
        };
        let too_large = || bad("more elements than can be addressed".to_owned());
        // Zero extents must not hide an overflow of the others.
        let elements = self
            .axes
            .iter()
            .try_fold(1u64, |product, &axis| product.checked_mul(axis.max(1)))
            .filter(|&n| n <= i64::MAX as u64)
            .ok_or_else(too_large)?;
        let elements = if self.axes.contains(&0) { 0 } else { elements };
        let size = match self.tensor_type.block() {
            Some((block_len, block_bytes)) => {
                let columns = self.axes.first().copied().unwrap_or(1);
                if !columns.is_multiple_of(block_len) {
                    return Err(bad(format!(
                        "{} rows are whole blocks of {block_len} elements",
                        self.tensor_type.name()
                    )));
                }
                let size = (elements / block_len).checked_mul(block_bytes);
                Some(size.ok_or_else(too_large)?)
            }
            None => None,
        };
        if !self.offset.is_multiple_of(alignment) {
            return Err(Error::Misaligned {
                tensor: self.name,
                offset: self.offset,
                alignment,
            });
        }
        let start = data_start.checked_add(self.offset);
        let end = start.and_then(|start| start.checked_add(size.unwrap_or_default()));
        let (Some(start), Some(_)) = (start, end.filter(|&end| end <= file_size)) else {
            return Err(Error::OutsideFile {
                tensor: self.name,
                start: data_start.saturating_add(self.offset),
                size: size.unwrap_or_default(),
                file_size,
            });
        };
        let shape = self
            .axes
            .iter()
            .rev()
            .map(|&axis| usize::try_from(axis))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| too_large())?;
        Ok(TensorInfo {
            name: self.name,
            shape,
            tensor_type: self.tensor_type,
            size,
            start,
        })
    }
}

pub(super) fn check_alignment(value: &Value) -> Result<u64> {
    value
        .as_u64()
        .filter(|a| a.is_power_of_two() && *a <= MAX_ALIGNMENT)
        .ok_or_else(|| Error::Alignment {
            found: value.to_string(),
            limit: MAX_ALIGNMENT,
        })
}

fn check_overlap(tensors: &[TensorInfo]) -> Result<()> {
    let mut sorted: Vec<_> = tensors.iter().filter(|t| t.size != Some(0)).collect();
    sorted.sort_by_key(|t| t.start);
    for pair in sorted.windows(2) {
        if let [first, second] = pair {
            // A tensor of unknown type has at least one byte.
            if first.start + first.size.unwrap_or(1) > second.start {
                return Err(Error::Overlap {
                    first: first.name.clone(),
                    second: second.name.clone(),
                });
            }
        }
    }
    Ok(())
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// Magic and version.
    fn preamble(&mut self) -> Result<u32> {
        let magic = self.bytes.get(..4).unwrap_or(self.bytes);
        if magic != b"GGUF" {
            return Err(Error::Magic {
                found: magic.to_vec(),
            });
        }
        self.at = 4;
        match self.u32("the version")? {
            version @ (2 | 3) => Ok(version),
            version if (1..=0xff).contains(&version.swap_bytes()) => Err(Error::BigEndian),
            found => Err(Error::Version { found }),
        }
    }

    fn tensor_entry(&mut self) -> Result<Entry> {
        let name = self.string("a tensor name")?;
        let what = |part: &str| format!("the {part} of tensor {name:?}");
        let axis_count = self.u32(&what("shape"))?;
        if axis_count > MAX_AXES {
            return Err(Error::Dimensions {
                problem: format!("{axis_count} axes, at most {MAX_AXES} are possible"),
                tensor: name,
                shape: Vec::new(),
            });
        }
        let axes = (0..axis_count)
            .map(|_| self.u64(&what("shape")))
            .collect::<Result<_>>()?;
        let tensor_type = TensorType(self.u32(&what("type"))?);
        let offset = self.u64(&what("offset"))?;
        Ok(Entry {
            name,
            axes,
            tensor_type,
            offset,
        })
    }

    fn value(&mut self, key: &str) -> Result<Value> {
        let what = format!("metadata key {key:?}");
        let id = self.u32(&what)?;
        Ok(match id {
            0 => Value::U8(self.number(&what, u8::from_le_bytes)?),
            1 => Value::I8(self.number(&what, i8::from_le_bytes)?),
            2 => Value::U16(self.number(&what, u16::from_le_bytes)?),
            3 => Value::I16(self.number(&what, i16::from_le_bytes)?),
            4 => Value::U32(self.number(&what, u32::from_le_bytes)?),
            5 => Value::I32(self.number(&what, i32::from_le_bytes)?),
            6 => Value::F32(self.number(&what, f32::from_le_bytes)?),
            value::BOOL => Value::Bool(self.number(&what, u8::from_le_bytes)? != 0),
            value::STRING => Value::String(self.text(&what)?),
            value::ARRAY => Value::Array(self.array(key, &what, MAX_NESTING)?),
            10 => Value::U64(self.number(&what, u64::from_le_bytes)?),
            11 => Value::I64(self.number(&what, i64::from_le_bytes)?),
            12 => Value::F64(self.number(&what, f64::from_le_bytes)?),
            _ => {
                return Err(Error::ValueType {
                    key: key.to_owned(),
                    id,
                });
            }
        })
    }

    fn array(&mut self, key: &str, what: &str, depth: usize) -> Result<Array> {
        if depth == 0 {
            return Err(Error::Nesting {
                key: key.to_owned(),
                limit: MAX_NESTING,
            });
        }
        let id = self.u32(what)?;
        let count = self.u64(what)?;
        Ok(match id {
            0 => Array::U8(self.numbers(what, count, u8::from_le_bytes)?),
            1 => Array::I8(self.numbers(what, count, i8::from_le_bytes)?),
            2 => Array::U16(self.numbers(what, count, u16::from_le_bytes)?),
            3 => Array::I16(self.numbers(what, count, i16::from_le_bytes)?),
            4 => Array::U32(self.numbers(what, count, u32::from_le_bytes)?),
            5 => Array::I32(self.numbers(what, count, i32::from_le_bytes)?),
            6 => Array::F32(self.numbers(what, count, f32::from_le_bytes)?),
            value::BOOL => Array::Bool(self.numbers(what, count, |[b]: [u8; 1]| b != 0)?),
            value::STRING => {
                let count = self.check_count(&format!("texts in {what}"), count, 8)?;
                let mut texts = Vec::with_capacity(count);
                for _ in 0..count {
                    texts.push(self.text(what)?);
                }
                Array::String(texts)
            }
            value::ARRAY => {
                let count = self.check_count(&format!("arrays in {what}"), count, 12)?;
                let mut arrays = Vec::with_capacity(count);
                for _ in 0..count {
                    arrays.push(self.array(key, what, depth - 1)?);
                }
                Array::Array(arrays)
            }
            10 => Array::U64(self.numbers(what, count, u64::from_le_bytes)?),
            11 => Array::I64(self.numbers(what, count, i64::from_le_bytes)?),
            12 => Array::F64(self.numbers(what, count, f64::from_le_bytes)?),
            _ => {
                return Err(Error::ValueType {
                    key: key.to_owned(),
                    id,
                });
            }
        })
    }

    fn numbers<T, const N: usize>(
        &mut self,
        what: &str,
        count: u64,
        decode: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<T>> {
        let count = self.check_count(&format!("values in {what}"), count, N as u64)?;
        let bytes = self.take(what, (count * N) as u64)?;
        let (chunks, _) = bytes.as_chunks::<N>();
        Ok(chunks.iter().map(|&chunk| decode(chunk)).collect())
    }

    fn number<T, const N: usize>(
        &mut self,
        what: &str,
        decode: impl Fn([u8; N]) -> T,
    ) -> Result<T> {
        let bytes = self.take(what, N as u64)?;
        let mut number = [0; N];
        number.copy_from_slice(bytes);
        Ok(decode(number))
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.number(what, u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.number(what, u64::from_le_bytes)
    }

    fn string(&mut self, what: &str) -> Result<String> {
        let text = self.text(what)?;
        text.as_str().map(str::to_owned).ok_or_else(|| Error::Utf8 {
            what: what.to_owned(),
            found: text.to_string_lossy().into_owned(),
        })
    }

    fn text(&mut self, what: &str) -> Result<Text> {
        let len = self.u64(what)?;
        Ok(self.take(what, len)?.into())
    }

    /// `count` as a `usize`, if as many items of at least `min_size` bytes can follow.
    fn check_count(&self, what: &str, count: u64, min_size: u64) -> Result<usize> {
        let left = self.bytes.len() - self.at;
        if count > left as u64 / min_size {
            return Err(Error::Count {
                what: what.to_owned(),
                count,
                left,
            });
        }
        Ok(count as usize)
    }

    fn take(&mut self, what: &str, needed: u64) -> Result<&'a [u8]> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let taken = usize::try_from(needed).ok().and_then(|n| rest.get(..n));
        let Some(taken) = taken else {
            return Err(Error::Truncated {
                what: what.to_owned(),
                offset: self.at,
                needed,
                left: rest.len(),
            });
        };
        self.at += taken.len();
        Ok(taken)
    }
}

#[cfg(test)]
#[path = "container_tests.rs"]
mod tests;
