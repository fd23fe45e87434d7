//! Which tensor of a file is stored how.

use std::str::FromStr;

use phi3_kernels::BlockType;

use super::Error;

/// The types of a file's weights, as llama.cpp's quantizer mixes them.
///
/// One block type for all matrices of the layers, or a mix that spends more on those that matter
/// more. In quantized files the output head has at least 6 bits a weight; norms are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FileType {
    /// All matrices alike, but for the head.
    Uniform(BlockType),
    /// Q3_K, with more for the sums of attention and of the feed-forward block.
    Q3KM,
    /// Q4_K, with Q5_K for q, k and v, and Q6_K for half of the `down_proj`s.
    Q4KM,
    /// Q5_K, with Q6_K for q, k and v and for half of the `down_proj`s.
    Q5KM,
}

/// What a matrix is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Embedding,
    Head,
    Qkv,
    AttentionOutput,
    Up,
    Down { layer: usize, layers: usize },
}

impl FileType {
    /// Every type.
    pub fn all() -> impl Iterator<Item = Self> {
        let uniform = BlockType::ALL.into_iter().map(Self::Uniform);
        uniform.chain([Self::Q3KM, Self::Q4KM, Self::Q5KM])
    }

    /// llama.cpp's name: `Q4_0`, `Q4_K_M`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Uniform(block_type) => block_type.name(),
            Self::Q3KM => "Q3_K_M",
            Self::Q4KM => "Q4_K_M",
            Self::Q5KM => "Q5_K_M",
        }
    }

    /// `general.file_type`: the id in llama.cpp's `enum llama_ftype`.
    pub(super) fn id(self) -> u32 {
        match self {
            Self::Uniform(BlockType::F32) => 0,
            Self::Uniform(BlockType::F16) => 1,
            Self::Uniform(BlockType::Q4_0) => 2,
            Self::Uniform(BlockType::Q4_1) => 3,
            Self::Uniform(BlockType::Q8_0) => 7,
            Self::Uniform(BlockType::Q5_0) => 8,
            Self::Uniform(BlockType::Q5_1) => 9,
            Self::Uniform(BlockType::Q2K) => 10,
            Self::Uniform(BlockType::Q3K) => 11,
            Self::Q3KM => 12,
            Self::Uniform(BlockType::Q4K) => 14,
            Self::Q4KM => 15,
            Self::Uniform(BlockType::Q5K) => 16,
            Self::Q5KM => 17,
            Self::Uniform(BlockType::Q6K) => 18,
            Self::Uniform(BlockType::IQ4NL) => 25,
            Self::Uniform(BlockType::BF16) => 32,
        }
    }

    /// How a matrix is stored.
    pub(super) fn block_type(self, role: Role) -> BlockType {
        use BlockType::{BF16, F16, F32, Q3K, Q4K, Q5K, Q6K, Q8_0};
        let base = match self {
            Self::Uniform(block_type) => block_type,
            Self::Q3KM => Q3K,
            Self::Q4KM => Q4K,
            Self::Q5KM => Q5K,
        };
        match (self, role) {
            (_, Role::Head) if matches!(base, F32 | F16 | BF16 | Q8_0) => base,
            (_, Role::Head) => Q6K,
            (Self::Q3KM, Role::Qkv | Role::AttentionOutput) => Q4K,
            (Self::Q3KM, Role::Down { layer, layers }) if layer < layers / 16 => Q5K,
            (Self::Q3KM, Role::Down { .. }) => Q4K,
            (Self::Q4KM, Role::Qkv) => Q5K,
            (Self::Q5KM, Role::Qkv) => Q6K,
            (Self::Q4KM | Self::Q5KM, Role::Down { layer, layers })
                if gets_more_bits(layer, layers) =>
            {
                Q6K
            }
            _ => base,
        }
    }
}

/// The first and the last eighth of the layers, and every third between.
fn gets_more_bits(layer: usize, layers: usize) -> bool {
    let eighth = layers / 8;
    layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
}

impl FromStr for FileType {
    type Err = Error;

    /// Reads a name in any case, with or without its underscores.
    fn from_str(name: &str) -> Result<Self, Error> {
        let plain = |name: &str| name.replace('_', "").to_ascii_uppercase();
        let wanted = plain(name);
        Self::all()
            .find(|known| plain(known.name()) == wanted)
            .ok_or_else(|| Error::FileType {
                found: name.to_owned(),
                known: Self::all().map(Self::name).collect::<Vec<_>>().join(", "),
            })
    }
}
