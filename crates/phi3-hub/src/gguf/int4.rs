//! What a file that holds INT4 weights says of them, since no specification of ggml's does.
//!
//! INT4 is this project's own block type ([`BlockType::Int4`]): 256 successive weights of a row,
//! `d * (q - 8)` with q from 0 to 15, as a half-precision d and 128 bytes, where of each 64 weights
//! byte l of 32 holds q of weight l in its low half and of weight l + 32 in its high half. Rows
//! that are no whole blocks are stored as Q4_0, norms as F32.
//!
//! A tensor of it has the type number `0x34544E49`, the bytes `INT4`, which is far outside of ggml's
//! enumeration: llama.cpp says "invalid ggml type" and loads nothing, where a number within it would
//! one day be another type, and bytes disguised as a tensor of `I8` would be weights of a wrong
//! shape. The metadata key [`VERSION_KEY`] must be [`VERSION`]; [`BLOCK_LENGTH_KEY`] and
//! [`BLOCK_BYTES_KEY`] say the size of a block to programs that only list a file.

use phi3_kernels::BlockType;

use super::container::Container;
use super::error::{Error, Result};
use super::value::Value;

const VERSION_KEY: &str = "phi3.int4.version";
const BLOCK_LENGTH_KEY: &str = "phi3.int4.block_length";
const BLOCK_BYTES_KEY: &str = "phi3.int4.block_bytes";

/// Changes when the layout of a block does.
const VERSION: u32 = 1;

/// The keys of a file with tensors of INT4.
pub(crate) fn metadata() -> [(&'static str, Value); 3] {
    let number = |n: usize| Value::U32(u32::try_from(n).unwrap_or(u32::MAX));
    [
        (VERSION_KEY, Value::U32(VERSION)),
        (BLOCK_LENGTH_KEY, number(BlockType::Int4.block_len())),
        (BLOCK_BYTES_KEY, number(BlockType::Int4.block_bytes())),
    ]
}

/// # Errors
/// A layout that is not known here.
pub(super) fn check(container: &Container) -> Result<()> {
    match container.get(VERSION_KEY) {
        Some(value) if value.as_u64() == Some(VERSION.into()) => Ok(()),
        Some(value) => Err(Error::BadValue {
            key: VERSION_KEY.to_owned(),
            found: value.to_string(),
            expected: format!("{VERSION}, the layout of INT4 blocks that this program reads"),
        }),
        None => Err(Error::MissingKey {
            key: VERSION_KEY.to_owned(),
            hint: "it says how the blocks of the file's INT4 tensors are laid out",
        }),
    }
}
