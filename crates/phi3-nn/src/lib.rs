//! What the models of the Phi-3 family share, on candle tensors.
//!
//! A model file describes one checkpoint type; everything that two of them need lives here:
//! weights as stored ([`weights`]), layers that serve every way of storing them, rotary position
//! embedding with LongRoPE ([`rope`]), the one [`attention()`] function, the key/value cache of a
//! sequence ([`kv_cache`]), and the packed forward contract ([`causal_lm`]).
#![forbid(unsafe_code)]

pub mod attention;
pub mod cache_type;
pub mod causal_lm;
pub mod config;
pub mod device;
pub mod embedding;
pub mod error;
mod full_attention;
mod heads;
mod host;
pub mod kv_cache;
mod kv_pages;
mod lanes;
mod layer_cache;
pub mod linear;
pub mod mixture;
pub mod mlp;
pub mod norm;
pub mod packed;
pub mod residency;
mod residual;
pub mod rope;
mod sparse_attention;
pub mod weights;

pub use attention::{AttentionParams, AttentionPattern, attention};
pub use cache_type::{CacheStore, CacheType, ParseCacheTypeError};
pub use causal_lm::{CausalLm, Input, LogitRows, ModelInfo, Observer, Span};
pub use device::DeviceSpec;
pub use embedding::Embedding;
pub use error::{Error, Result};
pub use full_attention::full_attention;
pub use heads::{FusedHeads, Qkv};
pub use kv_cache::{CacheSpec, KvCache, Recompute};
pub use lanes::in_lanes;
pub use linear::Linear;
pub use mlp::{GatedMlp, quick_gelu};
pub use norm::{LayerNorm, RmsNorm};
pub use packed::Packed;
pub use phi3_kernels::BlockSparseLayout;
pub use residency::Residency;
pub use residual::residual;
pub use rope::{Regime, RopeTables, RotaryEmbedding};
pub use weights::{
    Backend, Bytes, LayoutError, MemorySource, StoredTensor, TensorPart, TensorSource, Weights,
};
