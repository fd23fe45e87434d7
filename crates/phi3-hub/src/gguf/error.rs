use std::path::PathBuf;

/// What is wrong with a GGUF file, or why this crate cannot use it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file could not be opened, mapped or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },

    /// The file does not begin with `GGUF`.
    #[error(
        "not a GGUF file: it begins with the bytes {found:02x?}, expected 47 47 55 46 (\"GGUF\"); \
         an interrupted download or an error page saved as a file looks like this"
    )]
    Magic {
        /// Up to four bytes from the start of the file.
        found: Vec<u8>,
    },

    /// The numbers of the file are big-endian.
    #[error("the GGUF file is big-endian; convert it to little-endian (gguf_convert_endian.py)")]
    BigEndian,

    /// A container version other than 2 and 3.
    #[error(
        "GGUF version {found} is not supported, only 2 and 3; convert the model again with a \
         current converter"
    )]
    Version {
        /// The version that the file names.
        found: u32,
    },

    /// The header ends in the middle of something.
    #[error(
        "the GGUF header is cut off in {what} at byte {offset}: it needs {needed} bytes, {left} \
         are left; the file is incomplete or damaged, fetch it again"
    )]
    Truncated {
        /// What was being read.
        what: String,
        /// Offset in the file.
        offset: usize,
        /// Bytes that it needs.
        needed: u64,
        /// Bytes from `offset` to the end of the file.
        left: usize,
    },

    /// A count that the rest of the file cannot hold.
    #[error(
        "the GGUF header says {count} {what}, more than the {left} bytes that follow can hold; \
         the file is damaged"
    )]
    Count {
        /// What is counted.
        what: String,
        /// The count.
        count: u64,
        /// Bytes left in the file.
        left: usize,
    },

    /// A type id of a metadata value that GGUF does not define.
    #[error("metadata key {key:?} has the unknown value type {id}, GGUF defines 0 to 12")]
    ValueType {
        /// The metadata key.
        key: String,
        /// The id found.
        id: u32,
    },

    /// Arrays of arrays, deeper than any writer makes them.
    #[error("metadata key {key:?} nests arrays more than {limit} deep")]
    Nesting {
        /// The metadata key.
        key: String,
        /// The depth that is read.
        limit: usize,
    },

    /// A key, tensor name or text that must be UTF-8 and is not.
    #[error("{what} is not UTF-8: {found:?}")]
    Utf8 {
        /// What was being read.
        what: String,
        /// The bytes, lossily decoded.
        found: String,
    },

    /// Two metadata entries with one key.
    #[error("metadata key {key:?} occurs twice")]
    DuplicateKey {
        /// The key.
        key: String,
    },

    /// Two tensors with one name.
    #[error("tensor {tensor:?} occurs twice")]
    DuplicateTensor {
        /// The name.
        tensor: String,
    },

    /// `general.alignment` is unusable.
    #[error("general.alignment is {found}, expected a power of two from 1 to {limit}")]
    Alignment {
        /// The value found.
        found: String,
        /// Largest accepted alignment.
        limit: u64,
    },

    /// A tensor with more axes than ggml has, or too large a product of them.
    #[error("tensor {tensor:?} has the shape {shape:?} in the file, {problem}")]
    Dimensions {
        /// The tensor.
        tensor: String,
        /// Extents in file order, innermost first.
        shape: Vec<u64>,
        /// What is wrong with them.
        problem: String,
    },

    /// A tensor's data does not begin at a multiple of the alignment.
    #[error(
        "the data of tensor {tensor:?} begins at offset {offset}, not a multiple of the \
         alignment {alignment}"
    )]
    Misaligned {
        /// The tensor.
        tensor: String,
        /// Offset within the data section.
        offset: u64,
        /// The file's alignment.
        alignment: u64,
    },

    /// A tensor's data leaves the file.
    #[error(
        "the data of tensor {tensor:?} takes {size} bytes at byte {start}, the file ends at \
         {file_size}; it is incomplete or damaged, fetch it again"
    )]
    OutsideFile {
        /// The tensor.
        tensor: String,
        /// First byte in the file.
        start: u64,
        /// Size in bytes.
        size: u64,
        /// Size of the file.
        file_size: u64,
    },

    /// The data of two tensors overlap.
    #[error("the data of tensors {first:?} and {second:?} overlap; the file is damaged")]
    Overlap {
        /// The tensor that begins first.
        first: String,
        /// The tensor that begins inside it.
        second: String,
    },

    /// A required metadata key is absent.
    #[error("metadata key {key:?} is missing; {hint}")]
    MissingKey {
        /// The key.
        key: String,
        /// What it is needed for, or what to do.
        hint: &'static str,
    },

    /// A metadata key has a value of the wrong type or out of range.
    #[error("metadata key {key:?} is {found}, expected {expected}")]
    BadValue {
        /// The key.
        key: String,
        /// The value or type found.
        found: String,
        /// What it should be.
        expected: String,
    },

    /// A `general.architecture` that no model here implements.
    #[error("GGUF architecture {found:?} is not supported, only {supported}")]
    Architecture {
        /// The architecture that the file names.
        found: String,
        /// Those that are supported.
        supported: String,
    },

    /// The file asks for something that the Phi-3 layers do not compute.
    #[error("{what} is not supported: {reason}")]
    Unsupported {
        /// The metadata entry or feature.
        what: String,
        /// Why, or what to do.
        reason: String,
    },

    /// A tensor that the model has no place for.
    #[error("tensor {tensor:?} has no place in a Phi-3 model: {reason}")]
    UnexpectedTensor {
        /// The tensor.
        tensor: String,
        /// Why ignoring it would be wrong.
        reason: &'static str,
    },

    /// One part of a fused tensor is there, another is not.
    #[error("tensor {tensor:?} is missing, while {present:?} is there")]
    MissingTensor {
        /// The missing tensor.
        tensor: String,
        /// Its companion.
        present: String,
    },

    /// A tensor whose shape does not follow from the metadata.
    #[error("tensor {tensor:?} has the shape {found:?}, expected {expected}")]
    TensorShape {
        /// The tensor.
        tensor: String,
        /// Shape found, outermost axis first.
        found: Vec<usize>,
        /// What the metadata say.
        expected: String,
    },

    /// A tensor is used whose block type has no decoder here.
    #[error(
        "tensor {tensor:?} is stored as {found}, which is not supported; use a file quantized to \
         one of {supported}"
    )]
    TensorType {
        /// The tensor.
        tensor: String,
        /// Name (or number) of its type.
        found: String,
        /// The types that can be read.
        supported: String,
    },

    /// A tensor whose bytes do not make its shape.
    #[error("tensor {tensor:?}: {message}")]
    TensorBytes {
        /// The tensor.
        tensor: String,
        /// What does not fit.
        message: String,
    },

    /// The vocabulary is unusable.
    #[error("the tokenizer in the GGUF file is unusable: {0}")]
    Vocabulary(String),

    /// The tokenizer model or pre-tokenizer is unknown.
    #[error("{key} {found:?} is not supported, only {supported}")]
    Tokenizer {
        /// The metadata key.
        key: &'static str,
        /// The value found.
        found: String,
        /// Those that are supported.
        supported: String,
    },

    /// What was to be written is inconsistent.
    #[error("cannot write the GGUF file: {0}")]
    Write(String),
}

/// Result with this module's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
