use phi3_kernels::BlockType;

use super::*;
use crate::gguf::testing::{HEAD_DIM, HIDDEN, INTERMEDIATE, KV_ROWS, Model, Q_ROWS};

fn error(model: &Model) -> String {
    match model.file().weights() {
        Ok(_) => panic!("the file was accepted"),
        Err(error) => error.to_string(),
    }
}

/// A complete model and one tensor more.
fn with(architecture: &str, name: &str, shape: &[usize]) -> Model {
    let mut model = Model::apart(architecture);
    model.add(name, shape, BlockType::F32);
    model
}

#[test]
fn names_of_the_converter_go_both_ways() {
    for gguf in [
        "token_embd.weight",
        "output_norm.weight",
        "output.weight",
        "blk.0.attn_norm.weight",
        "blk.31.ffn_norm.weight",
        "blk.7.attn_qkv.weight",
        "blk.7.attn_output.weight",
        "blk.7.ffn_up.weight",
        "blk.7.ffn_down.weight",
    ] {
        let hf = hf_name(gguf).unwrap();
        assert_eq!(gguf_name(&hf).as_deref(), Some(gguf), "{hf}");
    }
    assert_eq!(
        hf_name("blk.2.ffn_gate.weight"),
        hf_name("blk.2.ffn_up.weight")
    );
    assert_eq!(hf_name("blk.02.ffn_up.weight"), None);
    assert_eq!(hf_name("blk.2.ffn_up.bias"), None);
    assert_eq!(gguf_name("model.layers.0.self_attn.q_proj.weight"), None);
    assert_eq!(gguf_name("model.layers.x.mlp.down_proj.weight"), None);
}

#[test]
fn a_bias_is_refused() {
    for name in ["blk.0.attn_q.bias", "blk.0.attn_qkv.bias", "output.bias"] {
        for architecture in ["phi3", "llama"] {
            let error = error(&with(architecture, name, &[Q_ROWS]));
            assert!(error.contains(name) && error.contains("biases"), "{error}");
        }
    }
}

#[test]
fn what_phi3_layers_lack_is_refused() {
    for (name, reason) in [
        ("blk.0.attn_q_norm.weight", "no such norm"),
        ("blk.0.post_attention_norm.weight", "no such norm"),
        ("blk.0.ffn_gate_inp.weight", "mixtures"),
        ("blk.0.ffn_up_exps.weight", "mixtures"),
        ("blk.0.attn_sinks.weight", "could change"),
        ("position_embd.weight", "could change"),
        ("blk.0.rope_freqs.weight", "single layer"),
        ("blk.1.attn_norm.weight", "beyond the block_count"),
    ] {
        let error = error(&with("llama", name, &[4]));
        assert!(error.contains(name) && error.contains(reason), "{error}");
    }
}

#[test]
fn an_old_frequency_buffer_is_ignored() {
    let model = with("llama", "blk.0.attn_rot_embd.weight", &[HEAD_DIM / 2]);
    assert!(model.file().weights().is_ok());
}

#[test]
fn half_a_fused_tensor_is_refused() {
    for missing in ["attn_q", "attn_k", "attn_v", "ffn_up"] {
        let name = format!("blk.0.{missing}.weight");
        let full = Model::apart("llama");
        let mut model = Model::metadata("llama");
        for tensor in full.writer.tensors().iter().filter(|t| t.name != name) {
            let bytes = full.data[&tensor.name].clone();
            model.add_bytes(&tensor.name, &tensor.shape, tensor.tensor_type, bytes);
        }
        let error = error(&model);
        assert!(error.contains(&format!("{name:?} is missing")), "{error}");
    }
    let rows = Q_ROWS + 2 * KV_ROWS;
    let error = error(&with("phi3", "blk.0.attn_qkv.weight", &[rows, HIDDEN]));
    assert!(error.contains("both fused and apart"), "{error}");
}

#[test]
fn rows_follow_from_the_metadata() {
    let mut model = Model::metadata("phi3");
    model.add("blk.0.attn_qkv.weight", &[Q_ROWS, HIDDEN], BlockType::F16);
    let text = error(&model);
    assert!(
        text.contains("[256, 256]") && text.contains("512 rows"),
        "{text}"
    );

    let mut model = Model::metadata("phi3");
    model.add(
        "blk.0.ffn_up.weight",
        &[INTERMEDIATE, HIDDEN],
        BlockType::F16,
    );
    let text = error(&model);
    assert!(text.contains("1024 rows (gate and up"), "{text}");

    let mut model = Model::metadata("llama");
    model.add("blk.0.attn_q.weight", &[Q_ROWS, HIDDEN], BlockType::F16);
    model.add(
        "blk.0.attn_k.weight",
        &[KV_ROWS, HIDDEN / 2],
        BlockType::F16,
    );
    model.add("blk.0.attn_v.weight", &[KV_ROWS, HIDDEN], BlockType::F16);
    let text = error(&model);
    assert!(
        text.contains("blk.0.attn_k.weight") && text.contains("columns"),
        "{text}"
    );

    let mut model = Model::metadata("phi3");
    model.add("blk.0.attn_qkv.weight", &[512 * 256], BlockType::F16);
    assert!(error(&model).contains("a matrix"));
}
