//! Stored tensors, and the handle through which a model asks for them.
//!
//! A [`TensorSource`] (safetensors files, a GGUF file, a map in a test) gives tensors by their
//! Hugging Face name, as stored: nothing is decoded or copied here. A [`StoredTensor`] may consist
//! of several parts stacked by rows, each with its own block type, because a GGUF file can hold the
//! queries, keys and values of one fused projection separately and differently quantised.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::ops::{Deref, Range};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use phi3_kernels::{BlockType, MatrixRef, ShapeError, dequantize};

use crate::cache_type::{CacheStore, CacheType};
use crate::error::{Error, Result};
use crate::residency::Residency;

/// A range of a shared byte buffer, usually of a mapped file. Cloning shares the buffer.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
}

impl Bytes {
    /// All bytes of `owner`.
    pub fn new(owner: Arc<dyn AsRef<[u8]> + Send + Sync>) -> Self {
        let range = 0..(*owner).as_ref().len();
        Self { owner, range }
    }

    /// The bytes of `range`, counted within `self`; `None` if the range leaves it.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        if range.start > range.end || range.end > self.range.len() {
            return None;
        }
        let start = self.range.start + range.start;
        Some(Self {
            owner: Arc::clone(&self.owner),
            range: start..start + range.len(),
        })
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self::new(Arc::new(bytes))
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // The range was checked against this owner; an owner that shrinks reads as empty.
        (*self.owner)
            .as_ref()
            .get(self.range.clone())
            .unwrap_or_default()
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bytes({} bytes)", self.range.len())
    }
}

/// Some consecutive rows of a tensor, all stored in one block type.
#[derive(Clone, Debug)]
pub struct TensorPart {
    /// How the weights are stored.
    pub block_type: BlockType,
    /// Number of rows (extent of the first axis).
    pub rows: usize,
    /// The stored blocks, row after row.
    pub bytes: Bytes,
}

/// A shape and the bytes that should hold it do not fit together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// The bytes of a part are not those of its rows.
    #[error(transparent)]
    Part(#[from] ShapeError),
    /// The rows of the parts do not add up to the first axis.
    #[error("expected {expected} rows, but the parts have {found}")]
    Rows {
        /// Extent of the first axis.
        expected: usize,
        /// Rows of all parts.
        found: usize,
    },
    /// The number of weights does not fit the address space.
    #[error("shape {shape:?} has more weights than this machine can address")]
    TooLarge {
        /// The shape.
        shape: Vec<usize>,
    },
}

/// A tensor as it lies in its file: a shape and the parts that, stacked along the first axis, make it.
#[derive(Clone, Debug)]
pub struct StoredTensor {
    shape: Vec<usize>,
    parts: Vec<TensorPart>,
}

impl StoredTensor {
    /// A tensor in one part.
    ///
    /// # Errors
    /// [`LayoutError`] if the bytes do not fit the shape, or a row is not a whole number of blocks.
    pub fn new(
        shape: Vec<usize>,
        block_type: BlockType,
        bytes: Bytes,
    ) -> std::result::Result<Self, LayoutError> {
        let rows = shape.first().copied().unwrap_or(1);
        Self::stacked(
            shape,
            vec![TensorPart {
                block_type,
                rows,
                bytes,
            }],
        )
    }

    /// A tensor whose `parts` are stacked along the first axis.
    ///
    /// # Errors
    /// [`LayoutError`] if a part's bytes do not fit its rows, or the rows do not add up.
    pub fn stacked(
        shape: Vec<usize>,
        parts: Vec<TensorPart>,
    ) -> std::result::Result<Self, LayoutError> {
        let columns = row_len(&shape)?;
        let mut rows = 0usize;
        for part in &parts {
            MatrixRef::new(part.block_type, part.rows, columns, &part.bytes)?;
            rows = rows.saturating_add(part.rows);
        }
        let expected = shape.first().copied().unwrap_or(1);
        if rows != expected {
            return Err(LayoutError::Rows {
                expected,
                found: rows,
            });
        }
        Ok(Self { shape, parts })
    }

    /// Shape in Hugging Face order, `[out, in]` for a matrix.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The parts, in row order.
    pub fn parts(&self) -> &[TensorPart] {
        &self.parts
    }

    /// Number of weights in a row: the product of all axes but the first.
    pub fn columns(&self) -> usize {
        self.shape.iter().skip(1).product()
    }

    /// Number of weights.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Size as stored, in bytes.
    pub fn size_in_bytes(&self) -> usize {
        self.parts.iter().map(|part| part.bytes.len()).sum()
    }

    /// The matrix (or tensor) at `index` of the first axis, in place: one expert of a stack
    /// `[experts, out, in]`.
    ///
    /// # Errors
    /// [`LayoutError::Rows`] if there is none, or the tensor has no second axis.
    pub fn at(&self, index: usize) -> std::result::Result<Self, LayoutError> {
        let missing = |found| LayoutError::Rows {
            expected: index.saturating_add(1),
            found,
        };
        let mut skipped = 0;
        for part in &self.parts {
            if let Some(local) = index.checked_sub(skipped).filter(|i| *i < part.rows) {
                let (Some(rows), shape) = (self.shape.get(1), self.shape.get(1..)) else {
                    return Err(missing(0));
                };
                let size = part.bytes.len() / part.rows;
                let bytes = part.bytes.slice(local * size..(local + 1) * size);
                let part = TensorPart {
                    block_type: part.block_type,
                    rows: *rows,
                    bytes: bytes.ok_or_else(|| missing(part.rows))?,
                };
                return Self::stacked(shape.unwrap_or_default().to_vec(), vec![part]);
            }
            skipped += part.rows;
        }
        Err(missing(skipped))
    }

    /// All weights as f32, in row order.
    ///
    /// # Errors
    /// [`LayoutError`] if a part does not decode to its rows.
    pub fn to_f32(&self) -> std::result::Result<Vec<f32>, LayoutError> {
        let mut out = vec![0f32; self.elements()];
        let mut rest = out.as_mut_slice();
        for part in &self.parts {
            let (head, tail) = rest.split_at_mut(part.rows * self.columns());
            dequantize(part.block_type, &part.bytes, head)?;
            rest = tail;
        }
        Ok(out)
    }
}

fn row_len(shape: &[usize]) -> std::result::Result<usize, LayoutError> {
    let product = |axes: &[usize]| {
        axes.iter()
            .try_fold(1usize, |product, &axis| product.checked_mul(axis))
    };
    match (product(shape), product(shape.get(1..).unwrap_or_default())) {
        (Some(_), Some(columns)) => Ok(columns),
        _ => Err(LayoutError::TooLarge {
            shape: shape.to_vec(),
        }),
    }
}

/// Where tensors come from. Names are Hugging Face's, whatever the file calls them.
pub trait TensorSource: Send + Sync {
    /// The tensor of that name, or `None` if there is none.
    ///
    /// # Errors
    /// Whatever keeps an existing tensor from being read (an unknown block type, a range outside
    /// its file).
    fn tensor(
        &self,
        name: &str,
    ) -> std::result::Result<Option<StoredTensor>, Box<dyn std::error::Error + Send + Sync>>;

    /// All names, sorted.
    fn names(&self) -> Vec<String>;

    /// What to call this source in a message: its file or folder.
    fn origin(&self) -> String;
}

/// Tensors in memory, for tests and conversions.
#[derive(Default)]
pub struct MemorySource {
    tensors: HashMap<String, StoredTensor>,
}

impl MemorySource {
    /// An empty source.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds (or replaces) a tensor.
    pub fn insert(&mut self, name: impl Into<String>, tensor: StoredTensor) {
        self.tensors.insert(name.into(), tensor);
    }
}

impl TensorSource for MemorySource {
    fn tensor(
        &self,
        name: &str,
    ) -> std::result::Result<Option<StoredTensor>, Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.tensors.get(name).cloned())
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = self.tensors.keys().cloned().collect();
        names.sort();
        names
    }

    fn origin(&self) -> String {
        "memory".to_owned()
    }
}

/// Who does a model's heavy work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// `phi3-kernels`, on weights as they lie in their file. CPU only.
    Kernels,
    /// candle, on dense tensors or its own quantised ones.
    Candle,
}

/// A model's view of a checkpoint: a source, a name prefix, and the device and dtype to build for.
///
/// Cloning is cheap and shares the source. On the CPU weights stay as stored and activations are
/// f32; on other devices `dtype` is the type of dense weights and activations.
#[derive(Clone)]
pub struct Weights {
    source: Arc<dyn TensorSource>,
    device: Device,
    dtype: DType,
    backend: Backend,
    cache_type: CacheType,
    residency: Option<Arc<dyn Residency>>,
    prefix: String,
    used: Arc<Mutex<BTreeSet<String>>>,
}

impl Weights {
    /// All tensors of `source`, for `device`. `dtype` is ignored on the CPU, which computes in f32.
    pub fn new(source: Arc<dyn TensorSource>, device: Device, dtype: DType) -> Self {
        let (backend, dtype) = match device.is_cpu() {
            true => (Backend::Kernels, DType::F32),
            false => (Backend::Candle, dtype),
        };
        Self {
            source,
            device,
            dtype,
            backend,
            cache_type: CacheType::F32,
            residency: None,
            prefix: String::new(),
            used: Arc::default(),
        }
    }

    /// The same weights for a model that runs in candle operations on the CPU too: the slow oracle
    /// of the kernels, and the code that a GPU runs.
    pub fn with_candle_operations(mut self) -> Self {
        self.backend = Backend::Candle;
        self
    }

    /// The same weights for a model whose caches are of this type where the kernels attend;
    /// [`CacheType::F32`] by default, which is exact.
    pub fn with_cache_type(mut self, cache_type: CacheType) -> Self {
        self.cache_type = cache_type;
        self
    }

    /// The same weights, whose use the model announces to `residency`. Where candle multiplies there
    /// are copies on the device, and nothing to announce.
    pub fn with_residency(mut self, residency: Arc<dyn Residency>) -> Self {
        self.residency = Some(residency);
        self
    }

    /// Who wants to know which weights are read next.
    pub fn residency(&self) -> Option<&Arc<dyn Residency>> {
        let kernels = self.backend == Backend::Kernels;
        self.residency.as_ref().filter(|_| kernels)
    }

    /// How the caches of the model are to be stored.
    pub fn cache_store(&self) -> CacheStore {
        match self.backend {
            Backend::Kernels => CacheStore::Pages(self.cache_type),
            Backend::Candle => CacheStore::Tensors(self.dtype),
        }
    }

    /// Who multiplies and attends.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// The tensors below `name`: `weights.pp("model").pp("norm")` sees `model.norm.weight` as `weight`.
    pub fn pp(&self, name: impl fmt::Display) -> Self {
        Self {
            prefix: self.full_name(&name.to_string()),
            ..self.clone()
        }
    }

    /// The device that tensors are built for.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The dtype of activations: f32 on the CPU.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The tensor `name` below the prefix as stored, or `None` if the source has none.
    ///
    /// # Errors
    /// [`Error::Source`] if it exists but cannot be read.
    pub fn find(&self, name: &str) -> Result<Option<StoredTensor>> {
        let full = self.full_name(name);
        let found = self.source.tensor(&full).map_err(|source| Error::Source {
            name: full.clone(),
            source,
        })?;
        if found.is_some() {
            self.used
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(full);
        }
        Ok(found)
    }

    /// The shape of the tensor `name`, for a model whose configuration does not tell it.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] or [`Error::Source`], naming the tensor.
    pub fn shape(&self, name: &str) -> Result<Vec<usize>> {
        match self.find(name)? {
            Some(tensor) => Ok(tensor.shape().to_vec()),
            None => Err(self.missing(name)),
        }
    }

    fn missing(&self, name: &str) -> Error {
        Error::MissingTensor {
            name: self.full_name(name),
            origin: self.source.origin(),
        }
    }

    /// The tensor `name` as stored; its shape must be `shape`.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::TensorShape`] or [`Error::Source`], naming the tensor.
    pub fn stored(&self, name: &str, shape: &[usize]) -> Result<StoredTensor> {
        let full = self.full_name(name);
        let Some(tensor) = self.find(name)? else {
            return Err(self.missing(name));
        };
        if tensor.shape() != shape {
            return Err(Error::TensorShape {
                name: full,
                origin: self.source.origin(),
                expected: shape.to_vec(),
                found: tensor.shape().to_vec(),
            });
        }
        Ok(tensor)
    }

    /// The tensor `name` decoded to f32 on the device: for norms, biases and factors.
    ///
    /// # Errors
    /// As [`Weights::stored`].
    pub fn tensor_f32(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let values = self.vec_f32(name, shape)?;
        Ok(Tensor::from_vec(values, shape, &self.device)?)
    }

    /// The tensor `name` decoded to f32 in memory.
    ///
    /// # Errors
    /// As [`Weights::stored`].
    pub fn vec_f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let stored = self.stored(name, shape)?;
        stored.to_f32().map_err(|source| Error::TensorBytes {
            name: self.full_name(name),
            source,
        })
    }

    /// Names in the source that nothing has asked for yet: what a finished model did not need.
    pub fn unused(&self) -> Vec<String> {
        let used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let mut names = self.source.names();
        names.retain(|name| !used.contains(name));
        names
    }

    /// `name` with the prefix, as it stands in the checkpoint.
    pub fn full_name(&self, name: &str) -> String {
        if self.prefix.is_empty() {
            name.to_owned()
        } else {
            format!("{}.{name}", self.prefix)
        }
    }
}
