//! The shapes of real models.

use super::Error;
use crate::gguf::moe::PUBLISHED_MSCALE;
use crate::gguf::names::Architecture;

/// Sizes of a model of architecture `phi3`, of `phimoe` where there are experts, or of `phi3small`
/// where layers are block-sparse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// What it is called: a folder under `models/`, or a size or context of such a model.
    pub name: &'static str,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward block.
    pub intermediate: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Rotated dimensions of a head.
    pub rotary_dim: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Longest sequence, in tokens.
    pub context: usize,
    /// Length up to which LongRoPE uses its short factors; `context` where there is none.
    pub trained: usize,
    /// Keys that a query sees, 0 for all.
    pub window: usize,
    /// Whether the output head is the embedding.
    pub tied: bool,
    /// Experts of a layer, of which a token takes two; 0 for one feed-forward block.
    pub experts: usize,
    /// Whether it is a Phi-3-small: every other layer block-sparse, all with biases.
    pub block_sparse: bool,
}

/// Phi-3-mini with 128k tokens of context: the weights have the shape of the 4k one's.
const PHI_3_MINI: Shape = Shape {
    name: "phi-3-mini",
    hidden: 3072,
    intermediate: 8192,
    layers: 32,
    heads: 32,
    kv_heads: 32,
    rotary_dim: 96,
    vocab: 32064,
    context: 131_072,
    trained: 4096,
    window: 0,
    tied: false,
    experts: 0,
    block_sparse: false,
};

/// Phi-3-medium with 128k tokens of context.
const PHI_3_MEDIUM: Shape = Shape {
    name: "phi-3-medium",
    hidden: 5120,
    intermediate: 17920,
    layers: 40,
    heads: 40,
    kv_heads: 10,
    rotary_dim: 128,
    ..PHI_3_MINI
};

/// Phi-3-small with 128k tokens of context.
const PHI_3_SMALL: Shape = Shape {
    name: "phi-3-small",
    hidden: 4096,
    intermediate: 14336,
    kv_heads: 8,
    rotary_dim: 128,
    vocab: 100_352,
    trained: 8192,
    tied: true,
    block_sparse: true,
    ..PHI_3_MINI
};

/// All shapes, from config.json of the checkpoints. Where a checkpoint exists with 4k or 8k and
/// with 128k tokens of context, the plain name means the latter; `-4k` has a window of 2047, where the
/// plain one sees every key.
pub const SHAPES: [Shape; 12] = [
    PHI_3_MINI,
    Shape {
        name: "phi-3-mini-4k",
        context: 4096,
        window: 2047,
        ..PHI_3_MINI
    },
    PHI_3_MEDIUM,
    Shape {
        name: "phi-3-medium-4k",
        context: 4096,
        window: 2047,
        ..PHI_3_MEDIUM
    },
    Shape {
        name: "phi-3-5-mini",
        ..PHI_3_MINI
    },
    Shape {
        name: "phi-4-mini",
        heads: 24,
        kv_heads: 8,
        vocab: 200_064,
        tied: true,
        ..PHI_3_MINI
    },
    PHI_3_SMALL,
    Shape {
        name: "phi-3-small-8k",
        context: 8192,
        ..PHI_3_SMALL
    },
    Shape {
        name: "phi-3-5-moe",
        hidden: 4096,
        intermediate: 6400,
        kv_heads: 8,
        rotary_dim: 128,
        experts: 16,
        ..PHI_3_MINI
    },
    // No real models: small enough for a test.
    Shape {
        name: "tiny",
        hidden: 256,
        intermediate: 512,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        rotary_dim: 64,
        vocab: 512,
        context: 8192,
        trained: 2048,
        window: 0,
        tied: false,
        experts: 0,
        block_sparse: false,
    },
    Shape {
        name: "tiny-small",
        hidden: 256,
        intermediate: 256,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        rotary_dim: 64,
        vocab: 512,
        context: 8192,
        trained: 2048,
        ..PHI_3_SMALL
    },
    Shape {
        name: "tiny-moe",
        hidden: 256,
        intermediate: 256,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        rotary_dim: 64,
        vocab: 512,
        context: 8192,
        trained: 2048,
        experts: 8,
        ..PHI_3_MINI
    },
];

impl Shape {
    pub(super) fn architecture(&self) -> Architecture {
        match self.experts {
            0 if self.block_sparse => Architecture::Phi3Small,
            0 => Architecture::Phi3,
            _ => Architecture::Phimoe,
        }
    }

    /// The shape of that name; dots and dashes are the same, and so are letters of either case.
    ///
    /// # Errors
    /// [`Error::Shape`], naming those that there are.
    pub fn from_name(name: &str) -> Result<Self, Error> {
        let plain = name.to_ascii_lowercase().replace(['.', '_'], "-");
        let known = SHAPES.into_iter().find(|shape| shape.name == plain);
        known.ok_or_else(|| Error::Shape {
            found: name.to_owned(),
            known: SHAPES.map(|shape| shape.name).join(", "),
        })
    }

    /// LongRoPE's √(1 + ln s / ln L) with s the factor by which the context grew from L; `None`
    /// where it did not grow. Phi-3.5-MoE states another number.
    pub(super) fn attention_factor(&self) -> Option<f32> {
        let factor = self.context as f64 / self.trained as f64;
        if self.experts > 0 {
            return (factor > 1.0).then_some(PUBLISHED_MSCALE as f32);
        }
        (factor > 1.0).then(|| (1.0 + factor.ln() / (self.trained as f64).ln()).sqrt() as f32)
    }

    /// Stand-ins for the long factors, which rise from 1 for the fastest rotation to the growth of
    /// the context for the slowest. The real ones were searched for.
    pub(super) fn long_factors(&self) -> Vec<f32> {
        let (half, growth) = (
            self.rotary_dim / 2,
            self.context as f64 / self.trained as f64,
        );
        let power = |i: usize| i as f64 / (half.max(2) - 1) as f64;
        (0..half).map(|i| growth.powf(power(i)) as f32).collect()
    }
}
