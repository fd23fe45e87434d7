//! Which tensor is stored how: llama.cpp's presets.
//!
//! The rules are those of `llama_tensor_get_type` in llama.cpp's `llama-quant.cpp`, as far as they
//! concern Phi-3's tensors, with two exceptions. The fused `attn_qkv` has the rules of its own with
//! which the Phi-3 files in circulation were made (one type for all layers), while recent versions
//! (llama-cpp-python 0.3.36) treat it like `attn_v`, finer in some layers and coarser in others. And
//! where rows are no whole blocks of Q2_K or Q3_K, the substitute is IQ4_NL, of the same size as the
//! Q4_0 that recent versions take and nearer.
//!
//! INT4 is this project's own: every matrix alike, embedding and head too, and Q4_0 where rows are no
//! whole blocks.

use std::fmt;
use std::str::FromStr;

use phi3_kernels::BlockType;
use phi3_kernels::BlockType::{
    BF16, F16, F32, IQ4NL, Int4, Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0,
};

/// How the weights of a model are stored: one type for all matrices, or a mix that spends more bits
/// on those that need them.
///
/// ```
/// use phi3_hub::quantize::Mix;
///
/// let mix: Mix = "q4_k_m".parse()?;
/// assert_eq!(mix.to_string(), "Q4_K_M");
/// # Ok::<(), phi3_hub::quantize::ParseMixError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mix(&'static Preset);

#[derive(Debug, PartialEq, Eq, Hash)]
struct Preset {
    name: &'static str,
    /// Type of most matrices.
    base: BlockType,
    size: Size,
    /// `general.file_type`, the id in llama.cpp's `enum llama_ftype`.
    file_type: u32,
}

/// Which of the mixes around one type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Size {
    Plain,
    Small,
    Medium,
    Large,
}

const PRESETS: [Preset; 19] = [
    preset("F32", F32, Size::Plain, 0),
    preset("F16", F16, Size::Plain, 1),
    preset("BF16", BF16, Size::Plain, 32),
    preset("Q8_0", Q8_0, Size::Plain, 7),
    preset("Q6_K", Q6K, Size::Plain, 18),
    preset("Q5_K_M", Q5K, Size::Medium, 17),
    preset("Q5_K_S", Q5K, Size::Small, 16),
    preset("Q5_1", Q5_1, Size::Plain, 9),
    preset("Q5_0", Q5_0, Size::Plain, 8),
    preset("Q4_K_M", Q4K, Size::Medium, 15),
    preset("Q4_K_S", Q4K, Size::Small, 14),
    preset("Q4_1", Q4_1, Size::Plain, 3),
    preset("IQ4_NL", IQ4NL, Size::Plain, 25),
    preset("Q4_0", Q4_0, Size::Plain, 2),
    // The type's number in files, since llama.cpp has no id for it.
    preset("INT4", Int4, Size::Plain, u32::from_le_bytes(*b"INT4")),
    preset("Q3_K_L", Q3K, Size::Large, 13),
    preset("Q3_K_M", Q3K, Size::Medium, 12),
    preset("Q3_K_S", Q3K, Size::Small, 11),
    preset("Q2_K", Q2K, Size::Plain, 10),
];

/// The short names of the usual mixes, as llama.cpp takes them.
const ALIASES: [(&str, &str); 3] = [("Q3_K", "Q3_K_M"), ("Q4_K", "Q4_K_M"), ("Q5_K", "Q5_K_M")];

const fn preset(name: &'static str, base: BlockType, size: Size, file_type: u32) -> Preset {
    Preset {
        name,
        base,
        size,
        file_type,
    }
}

/// A matrix of a model, as far as its type depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Matrix<'a> {
    /// Name in the GGUF file.
    pub name: &'a str,
    /// Extent of its rows.
    pub columns: usize,
    /// Its layer, if it is in one, and the number of layers.
    pub layer: Option<usize>,
    pub layers: usize,
    /// Whether the model has no output head of its own, so that the embedding is one.
    pub tied: bool,
    /// Whether the importance of columns is known.
    pub importance: bool,
}

impl Mix {
    /// Every mix, largest first.
    pub fn all() -> impl Iterator<Item = Self> {
        PRESETS.iter().map(Self)
    }

    /// llama.cpp's name, or `INT4`.
    pub fn name(self) -> &'static str {
        self.0.name
    }

    /// The id in llama.cpp's `enum llama_ftype`, which files hold as `general.file_type`; for INT4
    /// the type's own number, which is none of them.
    pub fn file_type(self) -> u32 {
        self.0.file_type
    }

    /// The type of most of the matrices.
    pub fn base(self) -> BlockType {
        self.0.base
    }

    /// The type of a matrix.
    pub(crate) fn block_type(self, matrix: Matrix<'_>) -> BlockType {
        let base = self.0.base;
        // Which experts a token takes hangs on the last bits of the router's scores, and it is small.
        if matrix.name.ends_with("ffn_gate_inp.weight") {
            return F32;
        }
        if base.block_len() == 1 {
            return base;
        }
        fitting(self.wanted(matrix), matrix.columns)
    }

    fn wanted(self, matrix: Matrix<'_>) -> BlockType {
        let Preset { base, size, .. } = *self.0;
        let (layer, layers) = (matrix.layer.unwrap_or(0), matrix.layers);
        let kind = matrix.name.rsplit_once('.').map_or("", |(name, _)| name);
        let kind = kind.rsplit_once('.').map_or(kind, |(_, kind)| kind);
        let kind = kind.strip_suffix("_exps").unwrap_or(kind);
        if kind == "output" || kind == "token_embd" && matrix.tied {
            return match base {
                Int4 => Int4,
                _ if !matrix.columns.is_multiple_of(base.block_len()) => Q8_0,
                Q8_0 => Q8_0,
                _ => Q6K,
            };
        }
        match (kind, base, size) {
            ("attn_qkv", Q3K, Size::Medium | Size::Large) => Q4K,
            ("attn_qkv", Q4K, Size::Medium) => Q5K,
            ("attn_qkv", Q5K, Size::Medium) => Q6K,
            // Apart from queries in Phi-3.5-MoE, four of whose heads share one.
            ("attn_v", Q2K, _) => Q4K,
            ("attn_v", Q3K, Size::Medium) if layer < 2 => Q5K,
            ("attn_v", Q3K, Size::Medium) => Q4K,
            ("attn_v", Q3K, Size::Large) => Q5K,
            ("attn_v", Q4K | Q5K, Size::Medium) if use_more_bits(layer, layers) => Q6K,
            ("attn_v", Q4K, Size::Small) if layer < 4 => Q5K,
            ("attn_output", Q2K, _) => Q3K,
            ("attn_output", Q3K, Size::Medium) => Q4K,
            ("attn_output", Q3K, Size::Large) => Q5K,
            ("ffn_down", Q2K, _) => Q3K,
            ("ffn_down", Q3K, Size::Medium) if layer < layers / 16 => Q5K,
            ("ffn_down", Q3K, Size::Medium) => Q4K,
            ("ffn_down", Q3K, Size::Large) => Q5K,
            ("ffn_down", Q4K | Q5K, Size::Medium) if use_more_bits(layer, layers) => Q6K,
            ("ffn_down", Q4K, Size::Small) if layer < layers / 8 => Q5K,
            ("ffn_down", IQ4NL, _) if layer < layers / 8 && !matrix.importance => Q5K,
            ("ffn_down", Q4_0, _) if layer < layers / 8 && matrix.importance => Q4_1,
            ("ffn_down", Q5_0, _) if layer < layers / 8 && matrix.importance => Q5_1,
            _ => base,
        }
    }
}

/// The first and the last eighth of the layers, and every third between.
fn use_more_bits(layer: usize, layers: usize) -> bool {
    let eighth = layers / 8;
    layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
}

/// `wanted`, or what stands in for it where rows are not whole blocks of it.
fn fitting(wanted: BlockType, columns: usize) -> BlockType {
    if columns.is_multiple_of(wanted.block_len()) {
        return wanted;
    }
    let small = match wanted {
        Q2K | Q3K => IQ4NL,
        Int4 => Q4_0,
        Q4K => Q5_0,
        Q5K => Q5_1,
        Q6K => Q8_0,
        other => other,
    };
    if columns.is_multiple_of(small.block_len()) {
        small
    } else {
        F16
    }
}

impl fmt::Display for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that is none of [`Mix`]'s; the message lists those that are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseMixError {
    name: String,
}

impl fmt::Display for ParseMixError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = Mix::all().map(Mix::name).collect();
        write!(
            f,
            "unknown weight type {:?}; known are {}",
            self.name,
            names.join(", ")
        )
    }
}

impl std::error::Error for ParseMixError {}

impl FromStr for Mix {
    type Err = ParseMixError;

    /// Reads a name in any case, with or without its underscores; `Q3_K`, `Q4_K` and `Q5_K` are
    /// their `_M`.
    fn from_str(name: &str) -> Result<Self, ParseMixError> {
        let plain = |name: &str| name.replace('_', "").to_ascii_uppercase();
        let wanted = plain(name);
        let alias = ALIASES.iter().find(|(alias, _)| plain(alias) == wanted);
        let wanted = alias.map_or(wanted, |(_, name)| plain(name));
        Self::all()
            .find(|mix| plain(mix.name()) == wanted)
            .ok_or_else(|| ParseMixError {
                name: name.to_owned(),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(name: &str, columns: usize) -> Matrix<'_> {
        let layer = name
            .strip_prefix("blk.")
            .and_then(|rest| rest.split('.').next()?.parse().ok());
        Matrix {
            name,
            columns,
            layer,
            layers: 32,
            tied: false,
            importance: false,
        }
    }

    fn chosen(mix: &str, name: &str, columns: usize) -> BlockType {
        let mix: Mix = mix.parse().unwrap();
        mix.block_type(matrix(name, columns))
    }

    #[test]
    fn names_in_any_case_and_short_ones() {
        for mix in Mix::all() {
            assert_eq!(mix.name().parse(), Ok(mix));
            assert_eq!(mix.name().to_lowercase().replace('_', "").parse(), Ok(mix));
        }
        assert_eq!("q4_k".parse::<Mix>().unwrap().name(), "Q4_K_M");
        let error = "q9".parse::<Mix>().unwrap_err().to_string();
        assert!(
            error.contains("\"q9\"") && error.contains("Q4_K_M, Q4_K_S"),
            "{error}"
        );
    }

    /// The counts that `llama-quantize` prints for Phi-3-mini: 32 layers, an output head.
    #[test]
    fn phi_3_mini_in_q4_k_m() {
        let down: Vec<usize> = (0..32)
            .filter(|layer| chosen("Q4_K_M", &format!("blk.{layer}.ffn_down.weight"), 8192) == Q6K)
            .collect();
        assert_eq!(
            down,
            [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
        );
        assert_eq!(chosen("Q4_K_M", "blk.5.attn_qkv.weight", 3072), Q5K);
        assert_eq!(chosen("Q4_K_M", "blk.5.attn_output.weight", 3072), Q4K);
        assert_eq!(chosen("Q4_K_M", "blk.5.ffn_up.weight", 3072), Q4K);
        assert_eq!(chosen("Q4_K_M", "token_embd.weight", 3072), Q4K);
        assert_eq!(chosen("Q4_K_M", "output.weight", 3072), Q6K);
    }

    #[test]
    fn heads_are_finer() {
        for (mix, head) in [
            ("Q4_0", Q6K),
            ("Q2_K", Q6K),
            ("INT4", Int4),
            ("Q8_0", Q8_0),
            ("F16", F16),
            ("BF16", BF16),
        ] {
            assert_eq!(chosen(mix, "output.weight", 3072), head, "{mix}");
        }
        let tied = Matrix {
            tied: true,
            ..matrix("token_embd.weight", 3072)
        };
        let mix: Mix = "Q4_0".parse().unwrap();
        assert_eq!(mix.block_type(tied), Q6K);
        assert_eq!(mix.block_type(matrix("token_embd.weight", 3072)), Q4_0);
    }

    #[test]
    fn rows_that_are_no_whole_blocks_fall_back() {
        for (mix, name, expected) in [
            ("Q4_K_M", "blk.9.attn_output.weight", Q5_0),
            ("Q5_K_M", "blk.9.attn_output.weight", Q5_1),
            ("Q6_K", "blk.9.attn_output.weight", Q8_0),
            ("Q2_K", "blk.9.ffn_up.weight", IQ4NL),
            ("Q4_K_M", "output.weight", Q8_0),
            ("Q4_0", "output.weight", Q8_0),
            ("Q4_0", "blk.9.attn_output.weight", Q4_0),
            ("INT4", "blk.9.attn_output.weight", Q4_0),
            ("INT4", "output.weight", Q4_0),
        ] {
            assert_eq!(chosen(mix, name, 576), expected, "{mix} {name}");
            assert_eq!(chosen(mix, name, 40), F16, "{mix} {name}");
        }
        assert_eq!(chosen("F32", "blk.9.attn_output.weight", 40), F32);
    }

    #[test]
    fn small_and_large_mixes() {
        for (mix, name, expected) in [
            ("Q4_K_S", "blk.3.ffn_down.weight", Q5K),
            ("Q4_K_S", "blk.4.ffn_down.weight", Q4K),
            ("Q4_K_S", "blk.3.attn_qkv.weight", Q4K),
            ("Q3_K_M", "blk.1.ffn_down.weight", Q5K),
            ("Q3_K_M", "blk.2.ffn_down.weight", Q4K),
            ("Q3_K_M", "blk.2.attn_output.weight", Q4K),
            ("Q3_K_S", "blk.2.attn_output.weight", Q3K),
            ("Q3_K_L", "blk.2.attn_output.weight", Q5K),
            ("Q2_K", "blk.2.ffn_down.weight", Q3K),
            ("Q2_K", "blk.2.ffn_up.weight", Q2K),
            ("IQ4_NL", "blk.3.ffn_down.weight", Q5K),
            ("IQ4_NL", "blk.4.ffn_down.weight", IQ4NL),
        ] {
            assert_eq!(chosen(mix, name, 8192), expected, "{mix} {name}");
        }
    }
}
