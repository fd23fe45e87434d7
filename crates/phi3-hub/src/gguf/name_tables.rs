//! Names of tensors in a GGUF file, and what Hugging Face calls them.

use super::names::{Architecture, OUTPUT, Section, TOKEN_EMBEDDING};

/// Tensors outside of layers.
pub(super) fn global(architecture: Architecture) -> &'static [(&'static str, &'static str)] {
    match architecture {
        Architecture::Phi3 | Architecture::Llama => GLOBAL.as_slice(),
        Architecture::Phimoe => MOE_GLOBAL.as_slice(),
        Architecture::Phi3Small => SMALL_GLOBAL.as_slice(),
    }
}

/// The layer of an architecture that has biases: names without `.weight` and `.bias`, and whether
/// there may be a bias. `None` for those that follow [`LAYER`].
pub(super) fn layer_with_biases(
    architecture: Architecture,
) -> Option<&'static [(&'static str, &'static str, bool)]> {
    match architecture {
        Architecture::Phi3 | Architecture::Llama => None,
        Architecture::Phimoe => Some(MOE_LAYER.as_slice()),
        Architecture::Phi3Small => Some(SMALL_LAYER.as_slice()),
    }
}

const GLOBAL: [(&str, &str); 3] = [
    (TOKEN_EMBEDDING, "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    (OUTPUT, "lm_head.weight"),
];

const MOE_GLOBAL: [(&str, &str); 5] = [
    (TOKEN_EMBEDDING, "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    (OUTPUT, "lm_head.weight"),
    ("output_norm.bias", "model.norm.bias"),
    ("output.bias", "lm_head.bias"),
];

const SMALL_GLOBAL: [(&str, &str); 4] = [
    (TOKEN_EMBEDDING, "model.embed_tokens.weight"),
    ("output_norm.weight", "model.final_layernorm.weight"),
    ("output_norm.bias", "model.final_layernorm.bias"),
    (OUTPUT, "lm_head.weight"),
];

/// After `blk.N.` in the file, and after `model.layers.N.`.
pub(super) const LAYER: [(&str, &str, Option<Section>); 10] = [
    ("attn_norm.weight", "input_layernorm.weight", None),
    ("ffn_norm.weight", "post_attention_layernorm.weight", None),
    ("attn_output.weight", "self_attn.o_proj.weight", None),
    ("ffn_down.weight", "mlp.down_proj.weight", None),
    ("attn_qkv.weight", QKV, Some(Section::Qkv)),
    ("attn_q.weight", QKV, Some(Section::Q)),
    ("attn_k.weight", QKV, Some(Section::K)),
    ("attn_v.weight", QKV, Some(Section::V)),
    ("ffn_gate.weight", GATE_UP, Some(Section::Gate)),
    ("ffn_up.weight", GATE_UP, Some(Section::Up)),
];
const QKV: &str = "self_attn.qkv_proj.weight";
const GATE_UP: &str = "mlp.gate_up_proj.weight";

const MOE_LAYER: [(&str, &str, bool); 7] = [
    ("attn_norm", "input_layernorm", true),
    ("ffn_norm", "post_attention_layernorm", true),
    ("attn_q", "self_attn.q_proj", true),
    ("attn_k", "self_attn.k_proj", true),
    ("attn_v", "self_attn.v_proj", true),
    ("attn_output", "self_attn.o_proj", true),
    ("ffn_gate_inp", "block_sparse_moe.gate", false),
];

/// What stands before the number of an expert, and its matrices.
pub(super) const EXPERTS: &str = "block_sparse_moe.experts.";
pub(super) const EXPERT: [(&str, &str); 3] = [
    ("ffn_gate_exps.weight", "w1.weight"),
    ("ffn_down_exps.weight", "w2.weight"),
    ("ffn_up_exps.weight", "w3.weight"),
];

const SMALL_LAYER: [(&str, &str, bool); 6] = [
    ("attn_norm", "input_layernorm", true),
    ("attn_qkv", "self_attn.query_key_value", true),
    ("attn_output", "self_attn.dense", true),
    ("ffn_norm", "post_attention_layernorm", true),
    ("ffn_up", "mlp.up_proj", true),
    ("ffn_down", "mlp.down_proj", true),
];
