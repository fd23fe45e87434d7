//! What can be wrong with a safetensors file.

/// What is wrong with a safetensors file. The file itself is named by [`crate::Error`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum SafetensorsError {
    /// Shorter than the length field.
    #[error("has {found} bytes, too few for a safetensors file: it is truncated; fetch it again")]
    TooShort {
        /// Size of the file in bytes.
        found: u64,
    },
    /// The header is said to be longer than the file.
    #[error(
        "the header should have {header} bytes, but only {found} follow: the file is truncated or \
         not safetensors; fetch it again"
    )]
    HeaderOutside {
        /// The stated length in bytes.
        header: u64,
        /// What is there.
        found: u64,
    },
    /// The header is longer than the format allows.
    #[error(
        "the header should have {header} bytes, more than the {limit} that safetensors allows: the \
         file is damaged or not safetensors; fetch it again"
    )]
    HeaderTooLarge {
        /// The stated length in bytes.
        header: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// The header does not start like a JSON object.
    #[error("the header is not a JSON object: this is not a safetensors file")]
    NotSafetensors,
    /// The header is not the JSON it should be.
    #[error("header, line {line}, column {column}: {message}")]
    Header {
        /// Line within the header, from 1.
        line: usize,
        /// Column within the line.
        column: usize,
        /// What is wrong there.
        message: String,
    },
    /// Two tensors of one name.
    #[error("tensor {tensor} is listed twice")]
    Duplicate {
        /// The tensor.
        tensor: String,
    },
    /// A shape whose size does not fit in 64 bits.
    #[error("tensor {tensor}: shape {shape:?} overflows")]
    ShapeOverflow {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<u64>,
    },
    /// Offsets that do not match shape and dtype.
    #[error("tensor {tensor}: {dtype} {shape:?} takes {expected} bytes, its offsets span {found}")]
    Size {
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Bytes that shape and dtype ask for.
        expected: u64,
        /// Bytes between its offsets.
        found: u64,
    },
    /// Offsets in the wrong order.
    #[error("tensor {tensor}: offsets {begin}..{end} run backwards")]
    Backwards {
        /// The tensor.
        tensor: String,
        /// First byte.
        begin: u64,
        /// Byte after the last.
        end: u64,
    },
    /// Offsets beyond the end of the file.
    #[error(
        "tensor {tensor}: bytes {begin}..{end} lie outside the {data} bytes of data: the file is \
         truncated; fetch it again"
    )]
    Outside {
        /// The tensor.
        tensor: String,
        /// First byte.
        begin: u64,
        /// Byte after the last.
        end: u64,
        /// Bytes that follow the header.
        data: u64,
    },
    /// Tensors that overlap or leave a gap.
    #[error("tensor {tensor} begins at byte {begin}, the tensor before it ends at {expected}")]
    NotContiguous {
        /// The tensor.
        tensor: String,
        /// Where it begins.
        begin: u64,
        /// Where it should begin.
        expected: u64,
    },
    /// Bytes that belong to no tensor.
    #[error("{extra} bytes follow the last tensor")]
    Trailing {
        /// How many.
        extra: u64,
    },
    /// A dtype that no kernel computes with.
    #[error("tensor {tensor} is stored as {dtype}; only F32, F16 and BF16 weights can be used")]
    Dtype {
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: String,
    },
    /// The tensor does not make a matrix.
    #[error("tensor {tensor}: {detail}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// What is wrong.
        detail: String,
    },
    /// What was to be written does not match what was announced.
    #[error("writing tensor {tensor}: {detail}")]
    Write {
        /// The tensor.
        tensor: String,
        /// What is wrong.
        detail: String,
    },
}
