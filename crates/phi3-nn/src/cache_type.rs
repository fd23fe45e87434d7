//! How keys and values are stored.

use std::fmt;
use std::str::FromStr;

use candle_core::DType;

/// The type of keys and values that the CPU kernels read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum CacheType {
    /// As computed: for comparison with a reference.
    F32,
    /// Rounded to half precision, which costs less than any quantization of the weights and halves
    /// what attention reads.
    #[default]
    F16,
    /// Rounded to eight bits with a scale for 32 numbers, in GGUF's Q8_0 blocks: half of what f16
    /// takes, at about the error of Q8_0 weights.
    Q8_0,
}

impl CacheType {
    /// Every type.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Q8_0];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Q8_0 => "q8_0",
        }
    }

    /// Bytes of a key or value of `head_dim` numbers.
    pub(crate) fn row_bytes(self, head_dim: usize) -> usize {
        match self {
            Self::F32 => head_dim.saturating_mul(4),
            Self::F16 => head_dim.saturating_mul(2),
            Self::Q8_0 => phi3_kernels::q8_0_row_bytes(head_dim),
        }
    }
}

impl fmt::Display for CacheType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A cache type that does not exist.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no type of a cache; there are f16, f32 and q8_0")]
pub struct ParseCacheTypeError(String);

impl FromStr for CacheType {
    type Err = ParseCacheTypeError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let same = |of: &Self| of.name().eq_ignore_ascii_case(name);
        let found = Self::ALL.into_iter().find(same);
        found.ok_or_else(|| ParseCacheTypeError(name.to_owned()))
    }
}

/// Who holds keys and values, and in which form: as [`crate::Weights::cache_store`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheStore {
    /// Pages in host memory, for the kernels.
    Pages(CacheType),
    /// Tensors of this dtype, for candle.
    Tensors(DType),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_in_any_case() {
        for cache_type in CacheType::ALL {
            let name = cache_type.to_string();
            assert_eq!(name.parse(), Ok(cache_type));
            assert_eq!(name.to_uppercase().parse(), Ok(cache_type));
        }
        let error = "q3".parse::<CacheType>().unwrap_err().to_string();
        assert!(error.contains("q3"), "{error}");
        for cache_type in CacheType::ALL {
            assert!(error.contains(cache_type.name()), "{error}");
        }
    }
}
