//! The header of a safetensors file, checked in full before anything is read by it.

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;

use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

use super::error::SafetensorsError;

/// One tensor as the header lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name.
    pub name: String,
    /// Storage type as written: `F32`, `BF16`, `I64`, …
    pub dtype: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// Where it lies, in bytes from the start of the file.
    pub range: Range<usize>,
}

/// All tensors of a file in the order of their bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// The tensors.
    pub tensors: Vec<TensorInfo>,
    /// The free texts under `__metadata__`.
    pub metadata: Vec<(String, String)>,
}

impl Header {
    /// Bytes of the length field in front of the header.
    pub(crate) const PREFIX: usize = 8;
    /// Longest header that the format allows, in bytes.
    pub(crate) const MAX_LEN: u64 = 100_000_000;

    /// Parses and checks the header of a whole file.
    ///
    /// # Errors
    /// [`SafetensorsError`] for a header outside the file or larger than the format allows, JSON of
    /// another form, names given twice, offsets that do not match shape and dtype, lie outside the
    /// file, overlap or leave gaps.
    pub fn parse(file: &[u8]) -> Result<Self, SafetensorsError> {
        Self::parse_start(file, file.len() as u64)
    }

    /// [`Header::parse`] of a file of `len` bytes of which only the first are at hand, up to the end of
    /// the header at least.
    pub(crate) fn parse_start(start: &[u8], len: u64) -> Result<Self, SafetensorsError> {
        let (json, data_start) = split(start, len)?;
        let raw: RawHeader = serde_json::from_slice(json).map_err(|error| {
            let text = error.to_string();
            let place = format!(" at line {} column {}", error.line(), error.column());
            SafetensorsError::Header {
                line: error.line(),
                column: error.column(),
                message: text.strip_suffix(&place).unwrap_or(&text).to_owned(),
            }
        })?;
        let mut seen = HashSet::with_capacity(raw.tensors.len());
        if let Some((name, _)) = raw
            .tensors
            .iter()
            .find(|(name, _)| !seen.insert(name.as_str()))
        {
            return Err(SafetensorsError::Duplicate {
                tensor: name.clone(),
            });
        }
        let data = len - data_start as u64;
        let mut tensors = Vec::with_capacity(raw.tensors.len());
        for (name, entry) in raw.tensors {
            tensors.push(entry.check(name, data, data_start)?);
        }
        tensors.sort_by_key(|tensor| (tensor.range.start, tensor.range.end));
        check_contiguous(&tensors, data_start, len)?;
        Ok(Self {
            tensors,
            metadata: raw.metadata,
        })
    }
}

/// The header's JSON, and where the data begin.
fn split(start: &[u8], file_len: u64) -> Result<(&[u8], usize), SafetensorsError> {
    let Some((prefix, rest)) = start.split_first_chunk::<{ Header::PREFIX }>() else {
        return Err(SafetensorsError::TooShort { found: file_len });
    };
    let header = u64::from_le_bytes(*prefix);
    let found = file_len.saturating_sub(Header::PREFIX as u64);
    if header > Header::MAX_LEN {
        return Err(SafetensorsError::HeaderTooLarge {
            header,
            limit: Header::MAX_LEN,
        });
    }
    let len = usize::try_from(header).unwrap_or(usize::MAX);
    let Some(json) = rest.get(..len).filter(|_| header <= found) else {
        return Err(SafetensorsError::HeaderOutside { header, found });
    };
    if json.first() != Some(&b'{') {
        return Err(SafetensorsError::NotSafetensors);
    }
    Ok((json, Header::PREFIX + len))
}

/// Every byte of the data belongs to exactly one tensor.
fn check_contiguous(
    tensors: &[TensorInfo],
    data_start: usize,
    file_len: u64,
) -> Result<(), SafetensorsError> {
    let mut expected = data_start;
    for tensor in tensors {
        if tensor.range.start != expected {
            return Err(SafetensorsError::NotContiguous {
                tensor: tensor.name.clone(),
                begin: (tensor.range.start - data_start) as u64,
                expected: (expected - data_start) as u64,
            });
        }
        expected = tensor.range.end;
    }
    match file_len.saturating_sub(expected as u64) {
        0 => Ok(()),
        extra => Err(SafetensorsError::Trailing { extra }),
    }
}

/// A tensor's entry in the JSON.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct RawTensor {
    pub(crate) dtype: String,
    pub(crate) shape: Vec<u64>,
    pub(crate) data_offsets: (u64, u64),
}

impl RawTensor {
    fn check(
        self,
        name: String,
        data: u64,
        data_start: usize,
    ) -> Result<TensorInfo, SafetensorsError> {
        let (begin, end) = self.data_offsets;
        if begin > end {
            return Err(SafetensorsError::Backwards {
                tensor: name,
                begin,
                end,
            });
        }
        if end > data {
            return Err(SafetensorsError::Outside {
                tensor: name,
                begin,
                end,
                data,
            });
        }
        let elements = self
            .shape
            .iter()
            .try_fold(1u64, |product, &axis| product.checked_mul(axis));
        let shape = self
            .shape
            .iter()
            .map(|&axis| usize::try_from(axis))
            .collect::<Result<Vec<_>, _>>();
        let (Some(elements), Ok(shape)) = (elements, shape) else {
            return Err(SafetensorsError::ShapeOverflow {
                tensor: name,
                shape: self.shape,
            });
        };
        // The size of an unknown type cannot be checked; it can never be asked for either.
        if let Some(bits) = bits(&self.dtype) {
            let Some(expected) = elements.checked_mul(bits).map(|bits| bits.div_ceil(8)) else {
                return Err(SafetensorsError::ShapeOverflow {
                    tensor: name,
                    shape: self.shape,
                });
            };
            if expected != end - begin {
                return Err(SafetensorsError::Size {
                    tensor: name,
                    dtype: self.dtype,
                    shape,
                    expected,
                    found: end - begin,
                });
            }
        }
        // Both are at most the length of a slice in memory.
        let range = data_start + begin as usize..data_start + end as usize;
        Ok(TensorInfo {
            name,
            dtype: self.dtype,
            shape,
            range,
        })
    }
}

/// Bits per element of the types that the format knows.
pub(crate) fn bits(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" | "F8_E4M3FNUZ"
        | "F8_E5M2FNUZ" => 8,
        "U16" | "I16" | "F16" | "BF16" => 16,
        "U32" | "I32" | "F32" => 32,
        "U64" | "I64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

/// The JSON as it stands: a map in which nothing is lost, duplicates included.
struct RawHeader {
    tensors: Vec<(String, RawTensor)>,
    metadata: Vec<(String, String)>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut header = RawHeader {
                    tensors: Vec::new(),
                    metadata: Vec::new(),
                };
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        header.metadata = map.next_value::<Texts>()?.0;
                    } else {
                        let tensor = map
                            .next_value::<RawTensor>()
                            .map_err(|error| A::Error::custom(format!("tensor {name}: {error}")))?;
                        header.tensors.push((name, tensor));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// `__metadata__`: texts by name.
struct Texts(Vec<(String, String)>);

impl<'de> Deserialize<'de> for Texts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let map = Option::<serde_json::Map<String, serde_json::Value>>::deserialize(deserializer)?;
        let mut texts = Vec::new();
        for (name, value) in map.unwrap_or_default() {
            let serde_json::Value::String(text) = value else {
                return Err(D::Error::custom(format!(
                    "__metadata__: {name} is not a text"
                )));
            };
            texts.push((name, text));
        }
        Ok(Self(texts))
    }
}

#[cfg(test)]
mod tests;
