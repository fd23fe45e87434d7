//! The `phi3small` decoder: Phi-3-small, 8k and 128k, whose layers are dense and block-sparse in
//! turn.
//!
//! - model_type: `phi3small`; checkpoints: `microsoft/Phi-3-small-8k-instruct`,
//!   `microsoft/Phi-3-small-128k-instruct`
//! - paper: *Phi-3 Technical Report*, arXiv:2404.14219
//! - reference: the modeling code of the hub repository; vLLM 0.6.3, `models/phi3_small.py`
//!
//! With H the hidden size, I the intermediate size, h query heads, k key/value heads, g = h/k and d
//! the width of a head, one layer is
//! ```text
//! [q_0 … q_(g-1) | k | v] per group = W_qkv · ln(x) + b      W_qkv   [k·(g + 2)·d, H]
//! a = softmax(rope(q)·rope(k)ᵀ·m/d + mask)·v                 m       mup_attn_multiplier
//! x = x + W_dense · a + b                                    W_dense [H, h·d]
//! [a_0, b_0, a_1, b_1, …] = W_up · ln(x) + b                 W_up    [2I, H]
//! x = x + W_down · (a·σ(1.702 a)·(b + 1)) + b                W_down  [H, I]
//! ```
//! where a is at most `gegelu_limit` and b within it on both sides. It starts with
//! x = `mup_embedding_multiplier` · embed(ids), and logits are E · ln(x) / `mup_width_multiplier`
//! with E the embedding itself. Tokens that were never trained have the lowest logit there is. ln
//! is a norm with weight and bias. Of `dense_attention_every_n_layers` layers the last is dense;
//! the others see what [`phi3_nn::BlockSparseLayout`] shows.
//!
//! # Deviations from the reference
//! - Which LongRoPE factors a sequence uses follows from its own length, not from the longest of
//!   the batch, and a prompt fed in chunks uses from its first chunk on what its whole length asks
//!   for.
//! - Keys that were computed before a sequence passed the LongRoPE limit keep their rotation, as in
//!   the reference ([`phi3_nn::Recompute::Never`]; a cache can be told otherwise).
//! - Blocks begin at a sequence's first token; there is no padding.
//! - Without `dummy_token_indices` in the config the untrained tokens are those of Phi-3-small's
//!   tokenizer; the reference asks the tokenizer itself.
//! - A sequence longer than the configured maximum is an error.
#![forbid(unsafe_code)]

mod config;
mod model;

pub use config::{Config, RawConfig};
pub use model::Model;
