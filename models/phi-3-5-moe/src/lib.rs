//! The `phimoe` decoder: Phi-3.5-MoE, a mixture of experts.
//!
//! - model_type: `phimoe`; checkpoint: `microsoft/Phi-3.5-MoE-instruct`
//! - paper: *Phi-3 Technical Report*, arXiv:2404.14219; the router is SparseMixer's,
//!   arXiv:2310.00811 and arXiv:2409.12136
//! - reference: transformers 4.57.1, `models/phimoe/modeling_phimoe.py`
//!
//! With H the hidden size, I an expert's intermediate size, E experts of which each token takes K,
//! h query heads, k key/value heads and d the width of a head, one layer is
//! ```text
//! q, k, v = W_q·ln(x) + b_q, W_k·ln(x) + b_k, W_v·ln(x) + b_v
//! a = softmax(rope(q)·rope(k)ᵀ/√d + mask)·v
//! x = x + W_o·a + b_o
//! y = ln(x);  s = W_gate·y                              W_gate [E, H]
//! x = x + Σ_K weight_i(s) · w2_i·(silu(w1_i·y) · w3_i·y)  w1, w3 [I, H], w2 [H, I]
//! ```
//! and logits are `W_lm·ln(x) + b_lm`. `ln` is LayerNorm with weight and bias (its epsilon is called
//! `rms_norm_eps` all the same); attention and head have biases where the configuration says so.
//! Which experts a token takes, and their weights, is [`router`]'s; LongRoPE multiplies cos and sin
//! by `short_mscale` and `long_mscale`, not by the formula of `phi3`.
//!
//! Tensors are found under the names of the hub (`block_sparse_moe.gate`,
//! `block_sparse_moe.experts.E.w1`, `w2`, `w3`) and under those of transformers 5 (`mlp.router`,
//! `mlp.experts.gate_up_proj` `[E, 2I, H]`, `mlp.experts.down_proj` `[E, H, I]`).
//!
//! # Deviations from the reference
//! - Passing `original_max_position_embeddings` recomputes the history with the long factors, as
//!   `generate()` of the reference does with its default attention; LongRoPE factors follow each
//!   sequence's own length, not the longest of the batch.
//! - SparseMixer is written for two experts per token; here `num_experts_per_tok` is any number,
//!   each further choice made as the second is.
//! - `router_type` is an addition: `topk_softmax` for checkpoints trained with the plain router
//!   ([`RouterKind`]).
//! - A sequence longer than `max_position_embeddings` is an error.
#![forbid(unsafe_code)]

mod balance;
mod config;
mod experts;
mod model;
pub mod router;

pub use balance::balance_loss;
pub use config::{Config, RawConfig};
pub use model::Model;
pub use router::{Router, RouterKind, RouterTrace, Routing};
