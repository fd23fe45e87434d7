//! ggml's tensor types, also those that no kernel here decodes: a file that holds one can still
//! be checked and listed.

use phi3_kernels::BlockType;

/// A tensor type as a file names it: the id in ggml's `enum ggml_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TensorType(pub u32);

/// Types of ggml (`ggml.h`, `ggml-common.h`) without a [`BlockType`]: id, name, weights and bytes
/// of a block.
const OTHERS: [(u32, &str, u64, u64); 21] = [
    (9, "Q8_1", 32, 36),
    (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
    (40, "NVFP4", 64, 36),
    (41, "Q1_0", 128, 18),
    (42, "Q2_0", 64, 18),
];

impl TensorType {
    /// The type that the kernels decode, if they do.
    pub fn block_type(self) -> Option<BlockType> {
        BlockType::from_ggml(self.0)
    }

    /// ggml's name, or `unknown(id)`.
    pub fn name(self) -> String {
        match (self.block_type(), self.other()) {
            (Some(known), _) => known.name().to_owned(),
            (None, Some((_, name, _, _))) => (*name).to_owned(),
            (None, None) => format!("unknown({})", self.0),
        }
    }

    /// Weights and bytes of a block, for every type whose layout is known.
    pub fn block(self) -> Option<(u64, u64)> {
        match self.block_type() {
            Some(known) => Some((known.block_len() as u64, known.block_bytes() as u64)),
            None => self.other().map(|(_, _, len, bytes)| (*len, *bytes)),
        }
    }

    fn other(self) -> Option<&'static (u32, &'static str, u64, u64)> {
        OTHERS.iter().find(|(id, ..)| *id == self.0)
    }
}

impl From<BlockType> for TensorType {
    fn from(block_type: BlockType) -> Self {
        Self(block_type.ggml_id())
    }
}

/// Names of all types that can be used, for messages.
pub(super) fn supported() -> String {
    let names: Vec<_> = BlockType::ALL.iter().map(|t| t.name()).collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_has_one_name() {
        assert_eq!(TensorType(12).name(), "Q4_K");
        assert_eq!(TensorType(23).name(), "IQ4_XS");
        assert_eq!(TensorType(23).block(), Some((256, 136)));
        assert_eq!(TensorType(4711).name(), "unknown(4711)");
        assert_eq!(TensorType(4711).block(), None);
        for (id, ..) in OTHERS {
            assert_eq!(TensorType(id).block_type(), None, "{id} is listed twice");
        }
        for known in BlockType::ALL {
            assert_eq!(TensorType::from(known).block_type(), Some(known));
        }
    }
}
