//! The `phi3` decoder: Phi-3-mini (4k and 128k), Phi-3-medium (4k and 128k), Phi-3.5-mini and
//! Phi-4-mini.
//!
//! - model_type: `phi3`; checkpoints: `microsoft/Phi-3-mini-4k-instruct` and its siblings
//! - paper: *Phi-3 Technical Report*, arXiv:2404.14219; LongRoPE, arXiv:2402.13753
//! - reference: transformers 4.57.1, `models/phi3/modeling_phi3.py`
//!
//! With H the hidden size, I the intermediate size, h query heads, k key/value heads and d the
//! width of a head, one layer is
//! ```text
//! [q | k | v] = W_qkv · rms(x)              W_qkv   [(h + 2k)·d, H]
//! a = softmax(rope(q)·rope(k)ᵀ/√d + mask)·v
//! x = x + W_o · a                           W_o     [H, h·d]
//! [gate | up] = W_gu · rms(x)               W_gu    [2I, H]
//! x = x + W_down · (up · silu(gate))        W_down  [H, I]
//! ```
//! and logits are `W_lm · rms(x)`, with `W_lm` the embedding itself where they are tied. Query head
//! i reads key/value head i / (h/k). Only the first `partial_rotary_factor · d` dimensions of a head
//! are rotated. There are no biases.
//!
//! # Deviations from the reference
//! - Passing `original_max_position_embeddings` recomputes the history with the long factors, as
//!   `generate()` of the reference does with its default attention; its eager attention loses the
//!   causal mask in that one step, which is not followed.
//! - LongRoPE factors follow each sequence's own length, not the longest of the batch.
//! - `rope_scaling.factor_rule` is an addition: closed forms for checkpoints without factor lists
//!   ([`phi3_nn::rope::FactorRule`]).
//! - A sequence longer than `max_position_embeddings` is an error.
#![forbid(unsafe_code)]

mod config;
mod model;

pub use config::{Config, RawConfig};
pub use model::Model;
