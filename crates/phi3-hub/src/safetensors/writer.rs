//! Writing safetensors files, tensor after tensor, so that a file larger than the memory can be
//! written. The file gets its name only when it is complete.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use half::{bf16, f16};
use serde_json::{Map, Value, json};

use super::error::SafetensorsError;
use super::header::bits;
use crate::error::Error;

/// A tensor that will be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name.
    pub name: String,
    /// Storage type as the format spells it: `F32`, `F16`, `BF16`, `I64`, …
    pub dtype: String,
    /// Shape.
    pub shape: Vec<usize>,
}

/// A tensor with its values.
#[derive(Clone, Copy, Debug)]
pub struct TensorToWrite<'a> {
    /// Name.
    pub name: &'a str,
    /// Shape.
    pub shape: &'a [usize],
    /// Values in row order.
    pub data: TensorData<'a>,
}

/// The values of a tensor, in row order.
#[derive(Clone, Copy, Debug)]
pub enum TensorData<'a> {
    /// `F32`
    F32(&'a [f32]),
    /// `F16`
    F16(&'a [f16]),
    /// `BF16`
    Bf16(&'a [bf16]),
    /// `I64`
    I64(&'a [i64]),
}

impl TensorData<'_> {
    fn dtype(&self) -> &'static str {
        match self {
            Self::F32(_) => "F32",
            Self::F16(_) => "F16",
            Self::Bf16(_) => "BF16",
            Self::I64(_) => "I64",
        }
    }

    fn is_empty(&self) -> bool {
        match self {
            Self::F32(values) => values.is_empty(),
            Self::F16(values) => values.is_empty(),
            Self::Bf16(values) => values.is_empty(),
            Self::I64(values) => values.is_empty(),
        }
    }
}

/// Writes a whole file; a file of that name is replaced at the end, in one step.
///
/// # Errors
/// [`Error::Io`], or [`Error::Safetensors`] if a name comes twice or values do not fit their shape.
///
/// ```
/// use phi3_hub::safetensors::{TensorData, TensorToWrite, write_safetensors};
/// # let folder = tempfile::tempdir().unwrap();
/// # let path = folder.path().join("out.safetensors");
/// let logits = [0.5f32, -1.0];
/// let tensor = TensorToWrite { name: "logits", shape: &[1, 2], data: TensorData::F32(&logits) };
/// write_safetensors(&path, &[tensor], &[("by", "phi3")])?;
/// # Ok::<(), phi3_hub::Error>(())
/// ```
pub fn write_safetensors(
    path: &Path,
    tensors: &[TensorToWrite<'_>],
    metadata: &[(&str, &str)],
) -> Result<(), Error> {
    let specs = tensors
        .iter()
        .map(|tensor| TensorSpec {
            name: tensor.name.to_owned(),
            dtype: tensor.data.dtype().to_owned(),
            shape: tensor.shape.to_vec(),
        })
        .collect();
    let mut writer = SafetensorsWriter::create(path, specs, metadata)?;
    for tensor in tensors {
        writer.write(tensor.data)?;
    }
    writer.finish()
}

/// A file that is being written. Dropped before [`SafetensorsWriter::finish`], it leaves nothing.
#[derive(Debug)]
pub struct SafetensorsWriter {
    path: PathBuf,
    temporary: Temporary,
    file: BufWriter<File>,
    specs: Vec<TensorSpec>,
    sizes: Vec<u64>,
    /// The tensor being written, and how many of its bytes are.
    current: usize,
    written: u64,
}

impl SafetensorsWriter {
    /// Begins a file with these tensors, whose values follow in this order.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Safetensors`] if a name comes twice, a dtype is unknown or a
    /// shape overflows.
    pub fn create(
        path: &Path,
        specs: Vec<TensorSpec>,
        metadata: &[(&str, &str)],
    ) -> Result<Self, Error> {
        let (header, sizes) = header(&specs, metadata).map_err(|source| Error::Safetensors {
            path: path.to_owned(),
            source,
        })?;
        let (temporary, file) = Temporary::beside(path)?;
        let mut file = BufWriter::with_capacity(1 << 18, file);
        let result = file
            .write_all(&(header.len() as u64).to_le_bytes())
            .and_then(|()| file.write_all(&header));
        result.map_err(|source| Error::io("writing", path, source))?;
        let mut writer = Self {
            path: path.to_owned(),
            temporary,
            file,
            specs,
            sizes,
            current: 0,
            written: 0,
        };
        writer.advance();
        Ok(writer)
    }

    /// Writes values of the tensor whose turn it is: all of them, or the next ones.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Safetensors`] if they are of another type or too many.
    pub fn write(&mut self, data: TensorData<'_>) -> Result<(), Error> {
        if data.is_empty() {
            return Ok(());
        }
        match self.specs.get(self.current) {
            Some(spec) if spec.dtype != data.dtype() => {
                let detail = format!("announced as {}, got {}", spec.dtype, data.dtype());
                return Err(self.wrong(detail));
            }
            _ => {}
        }
        match data {
            TensorData::F32(values) => self.write_values(values, f32::to_le_bytes),
            TensorData::F16(values) => self.write_values(values, f16::to_le_bytes),
            TensorData::Bf16(values) => self.write_values(values, bf16::to_le_bytes),
            TensorData::I64(values) => self.write_values(values, i64::to_le_bytes),
        }
    }

    /// Writes bytes, little endian, of the tensor whose turn it is: all of them, or the next ones.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Safetensors`] if they are too many.
    pub fn write_bytes(&mut self, bytes: &[u8]) -> Result<(), Error> {
        if bytes.is_empty() {
            return Ok(());
        }
        let left = self
            .sizes
            .get(self.current)
            .map_or(0, |size| size - self.written);
        if bytes.len() as u64 > left {
            return Err(self.wrong(format!(
                "{} bytes more than its shape has",
                bytes.len() as u64 - left
            )));
        }
        self.file
            .write_all(bytes)
            .map_err(|source| Error::io("writing", &self.path, source))?;
        self.written += bytes.len() as u64;
        self.advance();
        Ok(())
    }

    /// Completes the file and gives it its name.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Safetensors`] if values are missing.
    pub fn finish(mut self) -> Result<(), Error> {
        if let Some(size) = self.sizes.get(self.current) {
            let detail = format!(
                "{} of its {size} bytes were never given",
                size - self.written
            );
            return Err(self.wrong(detail));
        }
        let io = |source| Error::io("writing", &self.path, source);
        self.file.flush().map_err(io)?;
        self.file.get_ref().sync_all().map_err(io)?;
        self.temporary.rename_to(&self.path).map_err(io)
    }

    fn write_values<T: Copy, const N: usize>(
        &mut self,
        values: &[T],
        to_le_bytes: fn(T) -> [u8; N],
    ) -> Result<(), Error> {
        let mut buffer = Vec::with_capacity(N << 14);
        for chunk in values.chunks(1 << 14) {
            buffer.clear();
            buffer.extend(chunk.iter().flat_map(|&value| to_le_bytes(value)));
            self.write_bytes(&buffer)?;
        }
        Ok(())
    }

    /// Moves on to the next tensor that wants bytes.
    fn advance(&mut self) {
        while self.sizes.get(self.current) == Some(&self.written) {
            self.current += 1;
            self.written = 0;
        }
    }

    fn wrong(&self, detail: String) -> Error {
        let tensor = match self.specs.get(self.current).or(self.specs.last()) {
            Some(spec) => spec.name.clone(),
            None => "(none announced)".to_owned(),
        };
        Error::Safetensors {
            path: self.path.clone(),
            source: SafetensorsError::Write { tensor, detail },
        }
    }
}

/// The header, padded with spaces so that the data begin at a multiple of 8, and each tensor's size.
fn header(
    specs: &[TensorSpec],
    metadata: &[(&str, &str)],
) -> Result<(Vec<u8>, Vec<u64>), SafetensorsError> {
    let mut map = Map::new();
    if !metadata.is_empty() {
        let texts: Map<_, _> = metadata
            .iter()
            .map(|&(key, text)| (key.to_owned(), Value::from(text)))
            .collect();
        map.insert("__metadata__".to_owned(), Value::Object(texts));
    }
    let mut names = HashSet::new();
    let mut sizes = Vec::with_capacity(specs.len());
    let mut offset = 0u64;
    for spec in specs {
        let wrong = |detail: String| SafetensorsError::Write {
            tensor: spec.name.clone(),
            detail,
        };
        if spec.name == "__metadata__" || !names.insert(spec.name.as_str()) {
            return Err(SafetensorsError::Duplicate {
                tensor: spec.name.clone(),
            });
        }
        let Some(bits) = bits(&spec.dtype) else {
            return Err(wrong(format!("unknown dtype {}", spec.dtype)));
        };
        let size = spec.shape.iter().try_fold(bits / 8, |product, &axis| {
            product.checked_mul(u64::try_from(axis).ok()?)
        });
        let end = size.and_then(|size| offset.checked_add(size));
        let (Some(size), Some(end), 0) = (size, end, bits % 8) else {
            return Err(wrong(format!(
                "{} {:?} has no size in bytes",
                spec.dtype, spec.shape
            )));
        };
        let entry =
            json!({"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [offset, end]});
        map.insert(spec.name.clone(), entry);
        sizes.push(size);
        offset = end;
    }
    let mut header = Value::Object(map).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok((header, sizes))
}

/// A file beside the final one, removed unless it is renamed.
#[derive(Debug)]
struct Temporary {
    path: PathBuf,
    kept: bool,
}

impl Temporary {
    fn beside(path: &Path) -> Result<(Self, File), Error> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let unique = COUNTER.fetch_add(1, Ordering::Relaxed);
        let temporary = path.with_file_name(format!(".{name}.{}-{unique}.tmp", std::process::id()));
        let file = File::create(&temporary).map_err(|source| Error::io("writing", path, source))?;
        Ok((
            Self {
                path: temporary,
                kept: false,
            },
            file,
        ))
    }

    fn rename_to(&mut self, path: &Path) -> std::io::Result<()> {
        fs::rename(&self.path, path)?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::debug!(path = %self.path.display(), %error, "temporary file stays");
        }
    }
}

#[cfg(test)]
mod tests;
