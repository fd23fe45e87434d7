use phi3_kernels::BlockType;

use super::super::testing::{HEAD_DIM, HIDDEN, INTERMEDIATE, KV_ROWS, Model, Q_ROWS, VOCAB};
use super::super::{Architecture, gguf_name_in, hf_name_in};
use super::*;

const EXPERTS: usize = 3;

/// As llama.cpp's converter writes it: no key of this project's own.
fn model() -> Model {
    let mut model = Model::metadata("phimoe");
    model.set("expert_count", EXPERTS as u32);
    model.set("expert_used_count", 2u32);
    model.add("token_embd.weight", &[VOCAB, HIDDEN], BlockType::Q8_0);
    for (name, rows) in [
        ("output", VOCAB),
        ("blk.0.attn_q", Q_ROWS),
        ("blk.0.attn_k", KV_ROWS),
        ("blk.0.attn_v", KV_ROWS),
        ("blk.0.attn_output", HIDDEN),
    ] {
        model.add(&format!("{name}.weight"), &[rows, HIDDEN], BlockType::Q4_0);
        model.add(&format!("{name}.bias"), &[rows], BlockType::F32);
    }
    for name in ["output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"] {
        model.add(&format!("{name}.weight"), &[HIDDEN], BlockType::F32);
        model.add(&format!("{name}.bias"), &[HIDDEN], BlockType::F32);
    }
    let gate = [EXPERTS, HIDDEN];
    model.add("blk.0.ffn_gate_inp.weight", &gate, BlockType::F32);
    for (name, rows, columns) in [
        ("ffn_gate_exps", INTERMEDIATE, HIDDEN),
        ("ffn_up_exps", INTERMEDIATE, HIDDEN),
        ("ffn_down_exps", HIDDEN, INTERMEDIATE),
    ] {
        let name = format!("blk.0.{name}.weight");
        model.add(&name, &[EXPERTS, rows, columns], BlockType::Q4_0);
    }
    model
}

fn with_rope(mut model: Model) -> Model {
    model.set("rope.scaling.original_context_length", 32u32);
    model.set("rope.scaling.attn_factor", 1.25f32);
    model.add_f32("rope_factors_long.weight", &[2.0; HEAD_DIM / 2]);
    model.add_f32("rope_factors_short.weight", &[1.0; HEAD_DIM / 2]);
    model
}

#[test]
fn names_of_the_converter_go_both_ways() {
    for (gguf, hf) in [
        ("output_norm.bias", "model.norm.bias"),
        ("output.bias", "lm_head.bias"),
        (
            "blk.3.attn_q.weight",
            "model.layers.3.self_attn.q_proj.weight",
        ),
        ("blk.3.attn_q.bias", "model.layers.3.self_attn.q_proj.bias"),
        (
            "blk.31.ffn_norm.bias",
            "model.layers.31.post_attention_layernorm.bias",
        ),
        (
            "blk.7.ffn_gate_inp.weight",
            "model.layers.7.block_sparse_moe.gate.weight",
        ),
    ] {
        assert_eq!(hf_name_in(Architecture::Phimoe, gguf).as_deref(), Some(hf));
        assert_eq!(
            gguf_name_in(Architecture::Phimoe, hf).as_deref(),
            Some(gguf)
        );
    }
    for (gguf, matrix) in [
        ("ffn_gate_exps", "w1"),
        ("ffn_down_exps", "w2"),
        ("ffn_up_exps", "w3"),
    ] {
        let hf = format!("model.layers.1.block_sparse_moe.experts.15.{matrix}.weight");
        let gguf = format!("blk.1.{gguf}.weight");
        assert_eq!(gguf_name_in(Architecture::Phimoe, &hf), Some(gguf));
    }
    for wrong in [
        "block_sparse_moe.experts.x.w1.weight",
        "block_sparse_moe.experts",
        "mlp.down_proj.weight",
    ] {
        let hf = format!("model.layers.1.{wrong}");
        assert_eq!(gguf_name_in(Architecture::Phimoe, &hf), None, "{wrong}");
    }
    for dense in [
        "blk.1.attn_qkv.weight",
        "blk.1.ffn_up.weight",
        "blk.1.ffn_gate_inp.bias",
    ] {
        assert_eq!(hf_name_in(Architecture::Phimoe, dense), None, "{dense}");
    }
}

#[test]
fn each_expert_is_a_tensor_where_it_lies() {
    let model = model();
    let weights = model.file().weights().unwrap();
    for (gguf, matrix, shape) in [
        ("ffn_gate_exps", "w1", [INTERMEDIATE, HIDDEN]),
        ("ffn_down_exps", "w2", [HIDDEN, INTERMEDIATE]),
    ] {
        let stack = &model.data[&format!("blk.0.{gguf}.weight")];
        for (expert, bytes) in stack.chunks_exact(stack.len() / EXPERTS).enumerate() {
            let name = format!("model.layers.0.block_sparse_moe.experts.{expert}.{matrix}.weight");
            let tensor = weights.tensor(&name).unwrap().unwrap();
            assert_eq!(tensor.shape(), shape);
            assert!(*tensor.parts()[0].bytes == *bytes, "{name}");
        }
    }
    let names = weights.names();
    assert_eq!(
        names
            .iter()
            .filter(|name| name.contains(".experts."))
            .count(),
        3 * EXPERTS
    );
}

#[test]
fn the_config_is_phi_3_5_moes() {
    let config = model().file().config().unwrap();
    for (field, value) in [
        ("model_type", Json::from("phimoe")),
        ("num_local_experts", EXPERTS.into()),
        ("num_experts_per_tok", 2.into()),
        ("attention_bias", true.into()),
        ("lm_head_bias", true.into()),
        ("tie_word_embeddings", false.into()),
        ("rope_scaling", Json::Null),
    ] {
        assert_eq!(config[field], value, "{field}");
    }
    assert!(
        config.get("router_jitter_noise").is_none(),
        "the model's default holds"
    );
}

#[test]
fn mscales_are_the_files_the_published_or_the_factor() {
    let scaling = |model: &Model| model.file().config().unwrap()["rope_scaling"].clone();
    let mut model = with_rope(model());
    let found = scaling(&model);
    assert_eq!(
        [&found["short_mscale"], &found["long_mscale"]],
        [&Json::from(1.25); 2]
    );
    assert!(found.get("attention_factor").is_none());
    model.set("rope.scaling.short_mscale", 1.1f64);
    model.set("rope.scaling.long_mscale", PUBLISHED_MSCALE);
    let found = scaling(&model);
    assert_eq!(found["short_mscale"], 1.1);
    assert_eq!(found["long_mscale"], PUBLISHED_MSCALE);
    // The published checkpoint, as the converter writes it, by its header alone.
    let mut published = Model::metadata("phimoe");
    for (key, value) in [
        ("expert_count", 16u32),
        ("expert_used_count", 2),
        ("context_length", 131_072),
        ("embedding_length", 4096),
        ("attention.head_count", 4096 / HEAD_DIM as u32),
        ("vocab_size", 32064),
    ] {
        published.set(key, value);
    }
    let mut published = with_rope(published);
    published.set("rope.scaling.original_context_length", 4096u32);
    let found = scaling(&published);
    assert_eq!(found["short_mscale"], PUBLISHED_MSCALE);
    assert_eq!(found["long_mscale"], PUBLISHED_MSCALE);
}

#[test]
fn what_contradicts_the_number_of_experts_is_refused() {
    let message = |model: &Model| match model.file().weights() {
        Ok(_) => panic!("the file was accepted"),
        Err(error) => error.to_string(),
    };
    let mut other = model();
    other.set("expert_count", EXPERTS as u32 + 1);
    let text = message(&other);
    assert!(
        text.contains("_exps") && text.contains("expert_count"),
        "{text}"
    );
    let mut none = Model::metadata("phimoe");
    none.set("vocab_size", 12u32);
    let text = none.file().config().unwrap_err().to_string();
    assert!(text.contains("phimoe.expert_count"), "{text}");
    let mut jitter = model();
    jitter.set("router_jitter_noise", -0.5f32);
    let text = jitter.file().config().unwrap_err().to_string();
    assert!(text.contains("router_jitter_noise"), "{text}");
    jitter.set("router_jitter_noise", 0.0f32);
    assert_eq!(jitter.file().config().unwrap()["router_jitter_noise"], 0.0);
}
