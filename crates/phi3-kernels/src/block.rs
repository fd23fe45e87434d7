//! How the weights of a matrix lie in memory, and a borrowed view of one.

use std::fmt;
use std::str::FromStr;

/// How the weights of a matrix are stored: ggml's block formats, the plain float types, and one
/// format of this project, [`Int4`](Self::Int4).
///
/// A quantized row is a sequence of blocks of [`block_len`](Self::block_len) weights, each
/// [`block_bytes`](Self::block_bytes) long, without padding between blocks or rows. All numbers
/// are little-endian. The layouts are those of ggml's `ggml-common.h`; [`dequantize`] states
/// the formula of each, and the layout of [`Int4`](Self::Int4).
///
/// [`dequantize`]: crate::dequantize
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BlockType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an IEEE single.
    BF16,
    /// 32 weights `d * (q - 8)`, 4 bits each: 4.5 bits a weight.
    Q4_0,
    /// 32 weights `d * q + m`, 4 bits each: 5 bits a weight.
    Q4_1,
    /// 32 weights `d * (q - 16)`, 5 bits each: 5.5 bits a weight.
    Q5_0,
    /// 32 weights `d * q + m`, 5 bits each: 6 bits a weight.
    Q5_1,
    /// 32 weights `d * q`, 8 signed bits each: 8.5 bits a weight.
    Q8_0,
    /// 256 weights in 16 groups with 4-bit scales and minima, 2 bits each: 2.625 bits a weight.
    Q2K,
    /// 256 weights in 16 groups with 6-bit scales, 3 bits each: 3.4375 bits a weight.
    Q3K,
    /// 256 weights in 8 groups with 6-bit scales and minima, 4 bits each: 4.5 bits a weight.
    Q4K,
    /// 256 weights in 8 groups with 6-bit scales and minima, 5 bits each: 5.5 bits a weight.
    Q5K,
    /// 256 weights in 16 groups with 8-bit scales, 6 bits each: 6.5625 bits a weight.
    Q6K,
    /// 32 weights `d * table[q]` with a table of 16 unevenly spaced values: 4.5 bits a weight.
    IQ4NL,
    /// 256 weights `d * (q - 8)`, 4 bits each: 4.0625 bits a weight. A type of this project, which
    /// ggml does not have: the symmetric 4-bit form that the Phi-3 report describes for phones.
    Int4,
}

impl BlockType {
    /// Every type, in declaration order.
    pub const ALL: [BlockType; 15] = [
        BlockType::F32,
        BlockType::F16,
        BlockType::BF16,
        BlockType::Q4_0,
        BlockType::Q4_1,
        BlockType::Q5_0,
        BlockType::Q5_1,
        BlockType::Q8_0,
        BlockType::Q2K,
        BlockType::Q3K,
        BlockType::Q4K,
        BlockType::Q5K,
        BlockType::Q6K,
        BlockType::IQ4NL,
        BlockType::Int4,
    ];

    /// The type with this id in ggml's `enum ggml_type`, which is also the id in a GGUF file;
    /// `None` for a type that these kernels do not know.
    pub fn from_ggml(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.ggml_id() == id)
    }

    /// The id of this type in ggml's `enum ggml_type` and in GGUF files. That of
    /// [`Int4`](Self::Int4) is the bytes `INT4` read as a number, so far outside of the enumeration
    /// that ggml refuses a file which holds it instead of taking it for something else.
    pub const fn ggml_id(self) -> u32 {
        match self {
            BlockType::F32 => 0,
            BlockType::F16 => 1,
            BlockType::Q4_0 => 2,
            BlockType::Q4_1 => 3,
            BlockType::Q5_0 => 6,
            BlockType::Q5_1 => 7,
            BlockType::Q8_0 => 8,
            BlockType::Q2K => 10,
            BlockType::Q3K => 11,
            BlockType::Q4K => 12,
            BlockType::Q5K => 13,
            BlockType::Q6K => 14,
            BlockType::IQ4NL => 20,
            BlockType::BF16 => 30,
            BlockType::Int4 => u32::from_le_bytes(*b"INT4"),
        }
    }

    /// The name that ggml and GGUF tools print: `F32`, `Q4_0`, `Q4_K`, `IQ4_NL`.
    pub fn name(self) -> &'static str {
        match self {
            BlockType::F32 => "F32",
            BlockType::F16 => "F16",
            BlockType::BF16 => "BF16",
            BlockType::Q4_0 => "Q4_0",
            BlockType::Q4_1 => "Q4_1",
            BlockType::Q5_0 => "Q5_0",
            BlockType::Q5_1 => "Q5_1",
            BlockType::Q8_0 => "Q8_0",
            BlockType::Q2K => "Q2_K",
            BlockType::Q3K => "Q3_K",
            BlockType::Q4K => "Q4_K",
            BlockType::Q5K => "Q5_K",
            BlockType::Q6K => "Q6_K",
            BlockType::IQ4NL => "IQ4_NL",
            BlockType::Int4 => "INT4",
        }
    }

    /// Weights in a block: 1 for the float types, 256 for the K types and INT4, 32 for the others.
    pub const fn block_len(self) -> usize {
        match self {
            BlockType::F32 | BlockType::F16 | BlockType::BF16 => 1,
            BlockType::Q4_0
            | BlockType::Q4_1
            | BlockType::Q5_0
            | BlockType::Q5_1
            | BlockType::Q8_0
            | BlockType::IQ4NL => 32,
            BlockType::Q2K
            | BlockType::Q3K
            | BlockType::Q4K
            | BlockType::Q5K
            | BlockType::Q6K
            | BlockType::Int4 => 256,
        }
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            BlockType::F32 => 4,
            BlockType::F16 | BlockType::BF16 => 2,
            BlockType::Q4_0 | BlockType::IQ4NL => 18,
            BlockType::Q4_1 => 20,
            BlockType::Q5_0 => 22,
            BlockType::Q5_1 => 24,
            BlockType::Q8_0 => 34,
            BlockType::Q2K => 84,
            BlockType::Int4 => 130,
            BlockType::Q3K => 110,
            BlockType::Q4K => 144,
            BlockType::Q5K => 176,
            BlockType::Q6K => 210,
        }
    }

    /// Bytes of a row of `cols` weights; `None` when `cols` is not a whole number of blocks or
    /// the result overflows.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        if cols.is_multiple_of(self.block_len()) {
            (cols / self.block_len()).checked_mul(self.block_bytes())
        } else {
            None
        }
    }
}

impl fmt::Display for BlockType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that is none of [`BlockType`]'s; the message lists those that are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseBlockTypeError {
    name: String,
}

impl fmt::Display for ParseBlockTypeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unknown weight type {:?}; known are", self.name)?;
        for (i, t) in BlockType::ALL.iter().enumerate() {
            write!(f, "{} {t}", if i == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

impl std::error::Error for ParseBlockTypeError {}

impl FromStr for BlockType {
    type Err = ParseBlockTypeError;

    /// Reads a name in any case, with or without its underscores: `q4_k`, `Q4K`.
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let plain = |s: &str| s.replace('_', "").to_ascii_uppercase();
        let wanted = plain(s);
        Self::ALL
            .into_iter()
            .find(|t| plain(t.name()) == wanted)
            .ok_or_else(|| ParseBlockTypeError { name: s.into() })
    }
}

/// Lengths that do not fit together. The message names the thing, what was expected and what
/// was found.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ShapeError {
    /// The columns of a matrix, or the weights of a slice, are not a whole number of blocks.
    PartialBlock {
        /// Type of the weights.
        block_type: BlockType,
        /// Weights found.
        found: usize,
    },
    /// A slice has the wrong length.
    Length {
        /// Which slice, with its unit.
        what: &'static str,
        /// Type of the weights.
        block_type: BlockType,
        /// Length that the other arguments require.
        expected: usize,
        /// Length found.
        found: usize,
    },
    /// The size of a matrix does not fit the address space.
    TooLarge {
        /// Type of the weights.
        block_type: BlockType,
        /// Rows asked for.
        rows: usize,
        /// Columns asked for.
        cols: usize,
    },
    /// A row that the matrix does not have.
    Row {
        /// Row asked for.
        found: usize,
        /// Rows of the matrix.
        rows: usize,
    },
}

impl fmt::Display for ShapeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            ShapeError::PartialBlock { block_type, found } => write!(
                f,
                "{block_type} weights come in blocks of {}: expected a multiple of it, found {found}",
                block_type.block_len()
            ),
            ShapeError::Length {
                what,
                block_type,
                expected,
                found,
            } => write!(
                f,
                "{what} ({block_type}): expected {expected}, found {found}"
            ),
            ShapeError::TooLarge {
                block_type,
                rows,
                cols,
            } => write!(
                f,
                "a {block_type} matrix of {rows} rows and {cols} columns is larger than the address space"
            ),
            ShapeError::Row { found, rows } => {
                write!(f, "row {found} of a matrix: expected less than {rows}")
            }
        }
    }
}

impl std::error::Error for ShapeError {}

/// A borrowed matrix `[rows, cols]`, row-major, as it lies in a file: `rows` times
/// [`row_bytes`](BlockType::row_bytes) bytes of any alignment.
#[derive(Clone, Copy)]
pub struct MatrixRef<'a> {
    block_type: BlockType,
    rows: usize,
    cols: usize,
    row_bytes: usize,
    bytes: &'a [u8],
}

impl<'a> MatrixRef<'a> {
    /// Views `bytes` as a matrix.
    ///
    /// # Errors
    /// When `cols` is not a whole number of blocks, or `bytes` is not exactly as long as the
    /// matrix.
    pub fn new(
        block_type: BlockType,
        rows: usize,
        cols: usize,
        bytes: &'a [u8],
    ) -> Result<Self, ShapeError> {
        if !cols.is_multiple_of(block_type.block_len()) {
            return Err(ShapeError::PartialBlock {
                block_type,
                found: cols,
            });
        }
        let too_large = ShapeError::TooLarge {
            block_type,
            rows,
            cols,
        };
        let row_bytes = block_type.row_bytes(cols).ok_or(too_large.clone())?;
        let expected = row_bytes.checked_mul(rows).ok_or(too_large)?;
        if bytes.len() != expected {
            return Err(ShapeError::Length {
                what: "bytes of a matrix",
                block_type,
                expected,
                found: bytes.len(),
            });
        }
        Ok(Self {
            block_type,
            rows,
            cols,
            row_bytes,
            bytes,
        })
    }

    /// How the weights are stored.
    pub fn block_type(&self) -> BlockType {
        self.block_type
    }

    /// Number of rows: the outputs of a linear layer.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns: the inputs of a linear layer.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The whole matrix.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The bytes of row `r`.
    ///
    /// # Panics
    /// When `r` is not less than [`rows`](Self::rows).
    pub fn row(&self, r: usize) -> &'a [u8] {
        assert!(r < self.rows, "row {r} of a matrix of {} rows", self.rows);
        &self.bytes[r * self.row_bytes..][..self.row_bytes]
    }
}

impl fmt::Debug for MatrixRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "MatrixRef({} [{}, {}])",
            self.block_type, self.rows, self.cols
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_names_round_trip() {
        for t in BlockType::ALL {
            assert_eq!(BlockType::from_ggml(t.ggml_id()), Some(t));
            assert_eq!(t.name().parse(), Ok(t));
            assert_eq!(t.name().to_lowercase().replace('_', "").parse(), Ok(t));
            assert_eq!(t.to_string(), t.name());
        }
        assert_eq!(BlockType::Int4.ggml_id(), 0x3454_4e49);
        // 4 and 5 were Q4_2 and Q4_3, 9 is Q8_1, 15 Q8_K, which is never stored.
        for id in [4, 5, 9, 15, 16, 24, 31, u32::MAX] {
            assert_eq!(BlockType::from_ggml(id), None);
        }
        let message = "Q4_K_M".parse::<BlockType>().unwrap_err().to_string();
        assert!(
            message.contains("Q4_K_M") && message.contains("F32, F16"),
            "{message}"
        );
    }

    #[test]
    fn row_bytes_counts_whole_blocks() {
        assert_eq!(BlockType::Q4_0.row_bytes(576), Some(324));
        assert_eq!(BlockType::Q4K.row_bytes(576), None);
        assert_eq!(BlockType::F16.row_bytes(3), Some(6));
        assert_eq!(BlockType::F32.row_bytes(usize::MAX), None);
        assert_eq!(BlockType::Q8_0.row_bytes(usize::MAX - 31), None);
        assert_eq!(BlockType::Q6K.row_bytes(0), Some(0));
    }

    #[test]
    fn a_matrix_has_the_length_that_its_shape_says() {
        let bytes = [0u8; 72];
        let m = MatrixRef::new(BlockType::Q4_0, 2, 64, &bytes).unwrap();
        assert_eq!(m.row(1).len(), 36);
        assert_eq!(format!("{m:?}"), "MatrixRef(Q4_0 [2, 64])");
        let error = |rows, cols| {
            MatrixRef::new(BlockType::Q4_0, rows, cols, &bytes)
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            error(2, 33),
            "Q4_0 weights come in blocks of 32: expected a multiple of it, found 33"
        );
        assert_eq!(
            error(3, 64),
            "bytes of a matrix (Q4_0): expected 108, found 72"
        );
        assert!(error(usize::MAX, 64).contains("larger than the address space"));
    }
}
