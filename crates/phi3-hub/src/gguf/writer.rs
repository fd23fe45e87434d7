//! Writing a container: metadata and a plan of tensors first, then the data tensor by tensor.

use std::io::{BufWriter, Write};
use std::path::Path;

use super::container::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, check_alignment};
use super::error::{Error, Result};
use super::types::TensorType;
use super::unfinished::Unfinished;
use super::value::{Array, Value};

/// ggml keeps names in 64 bytes with a final zero, and refuses files with longer ones.
const MAX_NAME: usize = 63;

const VERSION: u32 = 3;

/// A GGUF file to be: what its header says.
///
/// ```
/// use phi3_hub::gguf::{Container, Error, Writer};
/// use phi3_kernels::BlockType;
///
/// let mut writer = Writer::new();
/// writer.set("general.architecture", "phi3");
/// writer.add_tensor("output_norm.weight", &[2], BlockType::F32)?;
/// let file = writer.to_vec(|_tensor, sink| sink.write(&[0; 8]))?;
/// let container = Container::parse(file.into())?;
/// assert_eq!(container.tensors()[0].shape, [2]);
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Writer {
    metadata: Vec<(String, Value)>,
    tensors: Vec<PlannedTensor>,
}

/// A tensor that is going to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedTensor {
    /// Name in the file.
    pub name: String,
    /// Extents, outermost first; the file has them the other way round.
    pub shape: Vec<usize>,
    /// How the weights are stored.
    pub tensor_type: TensorType,
    /// Size of the data in bytes.
    pub size: u64,
}

impl Writer {
    /// A file without metadata or tensors.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets a metadata value, in place of an earlier one of that key.
    pub fn set(&mut self, key: impl Into<String>, value: impl Into<Value>) {
        let (key, value) = (key.into(), value.into());
        match self.metadata.iter_mut().find(|(known, _)| *known == key) {
            Some((_, old)) => *old = value,
            None => self.metadata.push((key, value)),
        }
    }

    /// The metadata set so far, in file order.
    pub fn metadata(&self) -> &[(String, Value)] {
        &self.metadata
    }

    /// Plans a tensor, written after those planned before. `shape` is outermost first.
    ///
    /// # Errors
    /// [`Error::Write`] if rows are not whole blocks, the size overflows, the name is too long for
    /// ggml or the tensor has more than 4 axes; [`Error::DuplicateTensor`].
    pub fn add_tensor(
        &mut self,
        name: impl Into<String>,
        shape: &[usize],
        tensor_type: impl Into<TensorType>,
    ) -> Result<()> {
        let (name, tensor_type) = (name.into(), tensor_type.into());
        if self.tensors.iter().any(|tensor| tensor.name == name) {
            return Err(Error::DuplicateTensor { tensor: name });
        }
        let size = planned_size(shape, tensor_type).ok_or_else(|| {
            Error::Write(format!(
                "tensor {name:?} of shape {shape:?} cannot be stored as {}",
                tensor_type.name()
            ))
        })?;
        if name.len() > MAX_NAME || shape.len() > 4 {
            return Err(Error::Write(format!(
                "tensor {name:?} of shape {shape:?}: ggml allows {MAX_NAME} bytes of name and 4 axes"
            )));
        }
        self.tensors.push(PlannedTensor {
            name,
            shape: shape.to_vec(),
            tensor_type,
            size,
        });
        Ok(())
    }

    /// The planned tensors, in file order.
    pub fn tensors(&self) -> &[PlannedTensor] {
        &self.tensors
    }

    /// Writes the file. `fill` is called for each tensor in turn and writes exactly its `size`
    /// bytes; only what it holds itself is in memory. The file appears under `path` when it is
    /// complete and on the disk, in place of what was there; after an error nothing new is there.
    /// What a process that was killed while writing `path` left beside it is removed.
    ///
    /// # Errors
    /// What `fill` returns, [`Error::Io`], or [`Error::Write`] if it wrote too much or too little.
    pub fn write<E: From<Error>>(
        &self,
        path: &Path,
        fill: impl FnMut(&PlannedTensor, &mut TensorSink<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let io = |source| Error::Io {
            path: path.to_owned(),
            source,
        };
        let (file, unfinished) = Unfinished::create(path).map_err(io)?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        self.write_into(&mut out, path, fill)?;
        let file = out.into_inner().map_err(|e| io(e.into_error()))?;
        file.sync_all().map_err(io)?;
        unfinished.finish(path).map_err(io)?;
        // Closed, and with that unlocked, only under its final name.
        drop(file);
        Ok(())
    }

    /// The file in memory; see [`Writer::write`].
    ///
    /// # Errors
    /// What `fill` returns, or [`Error::Write`] if it wrote too much or too little.
    pub fn to_vec<E: From<Error>>(
        &self,
        fill: impl FnMut(&PlannedTensor, &mut TensorSink<'_>) -> Result<(), E>,
    ) -> Result<Vec<u8>, E> {
        let mut out = Vec::new();
        self.write_into(&mut out, Path::new("(memory)"), fill)?;
        Ok(out)
    }

    fn write_into<E: From<Error>>(
        &self,
        out: &mut dyn Write,
        path: &Path,
        mut fill: impl FnMut(&PlannedTensor, &mut TensorSink<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let alignment = self.alignment()?;
        let header = self.header(alignment);
        let mut sink = TensorSink {
            out,
            path,
            tensor: "the header",
            left: header.len() as u64,
        };
        sink.write(&header)?;
        let mut at = header.len() as u64;
        for tensor in &self.tensors {
            sink.pad(at, alignment)?;
            at = at.next_multiple_of(alignment) + tensor.size;
            sink.tensor = &tensor.name;
            sink.left = tensor.size;
            fill(tensor, &mut sink)?;
            if sink.left != 0 {
                return Err(Error::Write(format!(
                    "{} of {} bytes of tensor {:?} were not written",
                    sink.left, tensor.size, tensor.name
                ))
                .into());
            }
        }
        sink.pad(at, alignment)?;
        Ok(())
    }

    fn alignment(&self) -> Result<u64> {
        match self.metadata.iter().find(|(key, _)| key == ALIGNMENT_KEY) {
            Some((_, value)) => check_alignment(value),
            None => Ok(DEFAULT_ALIGNMENT),
        }
    }

    fn header(&self, alignment: u64) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        put(&mut out, VERSION.to_le_bytes());
        put(&mut out, (self.tensors.len() as u64).to_le_bytes());
        put(&mut out, (self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_text(&mut out, key.as_bytes());
            put(&mut out, value.type_id().to_le_bytes());
            put_value(&mut out, value);
        }
        let mut offset = 0u64;
        for tensor in &self.tensors {
            put_text(&mut out, tensor.name.as_bytes());
            put(&mut out, (tensor.shape.len() as u32).to_le_bytes());
            for &axis in tensor.shape.iter().rev() {
                put(&mut out, (axis as u64).to_le_bytes());
            }
            put(&mut out, tensor.tensor_type.0.to_le_bytes());
            put(&mut out, offset.to_le_bytes());
            offset = (offset + tensor.size).next_multiple_of(alignment);
        }
        out
    }
}

/// Where a tensor's bytes go; takes as many as were planned.
pub struct TensorSink<'a> {
    out: &'a mut dyn Write,
    path: &'a Path,
    tensor: &'a str,
    left: u64,
}

impl TensorSink<'_> {
    /// Writes the tensor's next bytes.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Write`] if these are more than were planned.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let Some(left) = self.left.checked_sub(bytes.len() as u64) else {
            return Err(Error::Write(format!(
                "tensor {:?} got more bytes than planned",
                self.tensor
            )));
        };
        self.left = left;
        self.raw(bytes)
    }

    fn pad(&mut self, at: u64, alignment: u64) -> Result<()> {
        let mut gap = at.next_multiple_of(alignment) - at;
        while gap > 0 {
            let chunk = gap.min(64);
            self.raw(&[0; 64][..chunk as usize])?;
            gap -= chunk;
        }
        Ok(())
    }

    fn raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(|source| Error::Io {
            path: self.path.to_owned(),
            source,
        })
    }
}

fn planned_size(shape: &[usize], tensor_type: TensorType) -> Option<u64> {
    let (block_len, block_bytes) = tensor_type.block()?;
    let columns = shape.last().copied().unwrap_or(1) as u64;
    if !columns.is_multiple_of(block_len) {
        return None;
    }
    shape
        .iter()
        .try_fold(1u64, |product, &axis| product.checked_mul(axis as u64))?
        .checked_div(block_len)?
        .checked_mul(block_bytes)
}

fn put<const N: usize>(out: &mut Vec<u8>, bytes: [u8; N]) {
    out.extend_from_slice(&bytes);
}

fn put_text(out: &mut Vec<u8>, text: &[u8]) {
    put(out, (text.len() as u64).to_le_bytes());
    out.extend_from_slice(text);
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(v) => put(out, v.to_le_bytes()),
        Value::I8(v) => put(out, v.to_le_bytes()),
        Value::U16(v) => put(out, v.to_le_bytes()),
        Value::I16(v) => put(out, v.to_le_bytes()),
        Value::U32(v) => put(out, v.to_le_bytes()),
        Value::I32(v) => put(out, v.to_le_bytes()),
        Value::F32(v) => put(out, v.to_le_bytes()),
        Value::U64(v) => put(out, v.to_le_bytes()),
        Value::I64(v) => put(out, v.to_le_bytes()),
        Value::F64(v) => put(out, v.to_le_bytes()),
        Value::Bool(v) => out.push(u8::from(*v)),
        Value::String(text) => put_text(out, text.as_bytes()),
        Value::Array(array) => put_array(out, array),
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    put(out, array.item_type_id().to_le_bytes());
    put(out, (array.len() as u64).to_le_bytes());
    match array {
        Array::U8(v) => v.iter().for_each(|v| put(out, v.to_le_bytes())),
        Array::I8(v) => v.iter().for_each(|v| put(out, v.to_le_bytes())),
        Array::U16(v) => v.iter().for_each(|v| put(out, v.to_le_bytes())),
        Array::I16(v) => v.iter().for_each(|v| put(out, v.to_le_bytes())),
        Array::U32(v) => v.iter().for_each(|v| put(out, v.to_le_bytes())),
        Array::I32(v) => v.iter().for_each(|v| put(out, v.to_le_bytes())),
        Array::F32(v) => v.iter().for_each(|v| put(out, v.to_le_bytes())),
        Array::U64(v) => v.iter().for_each(|v| put(out, v.to_le_bytes())),
        Array::I64(v) => v.iter().for_each(|v| put(out, v.to_le_bytes())),
        Array::F64(v) => v.iter().for_each(|v| put(out, v.to_le_bytes())),
        Array::Bool(v) => out.extend(v.iter().map(|&v| u8::from(v))),
        Array::String(v) => v.iter().for_each(|text| put_text(out, text.as_bytes())),
        Array::Array(v) => v.iter().for_each(|inner| put_array(out, inner)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::container::Container;
    use super::*;
    use phi3_kernels::BlockType;

    fn sample() -> Writer {
        let mut writer = Writer::new();
        writer.set("general.architecture", "phi3");
        writer.add_tensor("a", &[3], BlockType::F32).unwrap();
        writer.add_tensor("b", &[2, 32], BlockType::Q4_0).unwrap();
        writer
    }

    fn filler(tensor: &PlannedTensor, sink: &mut TensorSink<'_>) -> Result<()> {
        sink.write(&vec![tensor.name.as_bytes()[0]; tensor.size as usize])
    }

    #[test]
    fn every_value_type_comes_back() {
        let arrays = [
            Array::U8(vec![1]),
            Array::I8(vec![-1]),
            Array::U16(vec![2, 3]),
            Array::I16(vec![-2]),
            Array::U32(vec![]),
            Array::I32(vec![-3]),
            Array::F32(vec![0.5]),
            Array::U64(vec![u64::MAX]),
            Array::I64(vec![i64::MIN]),
            Array::F64(vec![1e300]),
            Array::Bool(vec![true, false]),
            Array::String(vec!["a".into(), (&b"\xff\0"[..]).into()]),
            Array::Array(vec![Array::U8(vec![1]), Array::Bool(vec![])]),
        ];
        let mut writer = Writer::new();
        for (i, array) in arrays.iter().enumerate() {
            writer.set(format!("array.{i}"), array.clone());
            if let Some(item) = array.get(0) {
                writer.set(format!("item.{i}"), item);
            }
        }
        let bytes = writer.to_vec(filler).unwrap();
        let container = Container::parse(bytes.into()).unwrap();
        for (i, array) in arrays.iter().enumerate() {
            let found = container.get(&format!("array.{i}"));
            assert_eq!(found, Some(&Value::Array(array.clone())));
            assert_eq!(container.get(&format!("item.{i}")), array.get(0).as_ref());
        }
        assert_eq!(container.version(), 3);
    }

    #[test]
    fn a_tensor_lies_at_the_alignment_asked_for() {
        for alignment in [1u32, 32, 256] {
            let mut writer = sample();
            writer.set("general.alignment", alignment);
            let bytes = writer.to_vec(filler).unwrap();
            let container = Container::parse(bytes.into()).unwrap();
            assert_eq!(container.alignment(), u64::from(alignment));
            let data = container.data(container.tensor("b").unwrap()).unwrap();
            assert_eq!(&*data, &[b'b'; 36]);
        }
    }

    #[test]
    fn a_file_appears_only_when_it_is_complete() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let listing = || std::fs::read_dir(folder.path()).unwrap().count();

        let error = sample()
            .write(&path, |tensor, sink| match tensor.name.as_str() {
                "a" => filler(tensor, sink),
                _ => Err(Error::Write("no more".to_owned())),
            })
            .unwrap_err();
        assert!(error.to_string().contains("no more"), "{error}");
        assert_eq!(listing(), 0, "nothing may stay behind");

        std::fs::write(&path, "old").unwrap();
        let short = sample()
            .write(&path, |_, sink| sink.write(&[0]))
            .unwrap_err();
        assert!(
            short.to_string().contains("11 of 12 bytes of tensor \"a\""),
            "{short}"
        );
        let long = sample()
            .write(&path, |_, sink| sink.write(&[0; 13]))
            .unwrap_err();
        assert!(
            long.to_string().contains("more bytes than planned"),
            "{long}"
        );
        assert_eq!(std::fs::read(&path).unwrap(), b"old");

        sample().write(&path, filler).unwrap();
        assert_eq!(listing(), 1);
        let container = Container::parse(std::fs::read(&path).unwrap().into()).unwrap();
        assert_eq!(container.tensors().len(), 2);
    }

    #[test]
    fn what_ggml_refuses_is_not_planned() {
        let mut writer = sample();
        let add = |writer: &mut Writer, name: &str, shape: &[usize]| {
            writer
                .add_tensor(name, shape, BlockType::Q4_0)
                .map_err(|e| e.to_string())
        };
        assert!(add(&mut writer, "a", &[32]).unwrap_err().contains("twice"));
        assert!(add(&mut writer, "c", &[33]).unwrap_err().contains("Q4_0"));
        assert!(add(&mut writer, "c", &[usize::MAX, 32]).is_err());
        assert!(
            add(&mut writer, "c", &[1, 1, 1, 1, 32])
                .unwrap_err()
                .contains("4 axes")
        );
        assert!(add(&mut writer, &"n".repeat(64), &[32]).is_err());
        assert!(add(&mut writer, &"n".repeat(63), &[32]).is_ok());
        writer.set("general.alignment", 3u32);
        assert!(
            writer
                .to_vec(filler)
                .unwrap_err()
                .to_string()
                .contains("power of two")
        );
    }
}
