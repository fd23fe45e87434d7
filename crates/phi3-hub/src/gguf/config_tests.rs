use phi3_kernels::BlockType;
use phi3_nn::rope::{LongRope, RopeScalingConfig};

use super::*;
use crate::gguf::testing::{HEAD_DIM, Model};

fn config(model: &Model) -> Json {
    model.file().config().unwrap()
}

fn error(model: &Model) -> String {
    model.file().config().unwrap_err().to_string()
}

/// A model with rope factors, 16 times as long as it was trained.
fn longrope(attn_factor: Option<f32>) -> Model {
    let mut model = Model::fused();
    model.set("rope.scaling.original_context_length", 4u32);
    if let Some(factor) = attn_factor {
        model.set("rope.scaling.attn_factor", factor);
    }
    model.add_f32("rope_factors_long.weight", &[1.118_320_7; HEAD_DIM / 2]);
    model.add_f32("rope_factors_short.weight", &[1.0; HEAD_DIM / 2]);
    model
}

#[test]
fn a_phi3_file_gives_a_phi3_config() {
    let mut model = Model::fused();
    model.writer.set("tokenizer.ggml.bos_token_id", 1u32);
    model.writer.set("tokenizer.ggml.eos_token_id", 32000u32);
    model
        .writer
        .set("tokenizer.ggml.padding_token_id", 32000u32);
    let expected = json!({
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "attention_bias": false,
        "attention_dropout": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "hidden_act": "silu",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 64,
        "partial_rotary_factor": 1.0,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": null,
        "sliding_window": null,
        "tie_word_embeddings": true,
        "torch_dtype": "float16",
        "use_cache": true,
        "vocab_size": 12,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
    });
    assert_eq!(config(&model), expected);
}

#[test]
fn the_window_is_the_files_or_that_of_the_two_early_checkpoints() {
    let mut model = Model::fused();
    assert_eq!(config(&model)["sliding_window"], Json::Null);
    model.set("attention.sliding_window", 0u32);
    assert_eq!(config(&model)["sliding_window"], Json::Null);
    model.set("attention.sliding_window", 31u32);
    assert_eq!(config(&model)["sliding_window"], 31);

    for (architecture, layers, window) in [
        ("phi3", 32u32, json!(2047)),
        ("phi3", 40, json!(2047)),
        ("phi3", 24, Json::Null),
        ("llama", 32, Json::Null),
    ] {
        let mut early = Model::metadata(architecture);
        early.set("context_length", 4096u32);
        early.set("block_count", layers);
        early.set("vocab_size", 32064u32);
        assert_eq!(
            config(&early)["sliding_window"],
            window,
            "{architecture} {layers}"
        );
        early.set("attention.sliding_window", 0u32);
        assert_eq!(
            config(&early)["sliding_window"],
            Json::Null,
            "0 says that there is none"
        );
    }
}

#[test]
fn an_output_matrix_unties_the_embedding() {
    let mut model = Model::fused();
    model.add("output.weight", &[12, 256], BlockType::Q6K);
    assert_eq!(config(&model)["tie_word_embeddings"], false);
}

#[test]
fn rope_factors_become_longrope() {
    let scaling = config(&longrope(Some(1.190_238)))["rope_scaling"].clone();
    assert_eq!(scaling["type"], "longrope");
    assert_eq!(
        scaling["long_factor"],
        json!(vec![1.118_320_7; HEAD_DIM / 2])
    );
    assert_eq!(scaling["short_factor"], json!(vec![1.0; HEAD_DIM / 2]));
    assert_eq!(scaling["attention_factor"], 1.190_238);
    assert_eq!(
        config(&longrope(None))["original_max_position_embeddings"],
        4
    );
    assert!(
        config(&longrope(None))["rope_scaling"]
            .get("attention_factor")
            .is_none()
    );
}

/// The factor that the converter writes is the formula that a config without one asks for.
#[test]
fn the_converters_attention_factor_is_the_formula() {
    let formula = (1.0 + (131072.0f64 / 4096.0).ln() / 4096.0f64.ln()).sqrt();
    let written =
        config(&longrope(Some(formula as f32)))["rope_scaling"]["attention_factor"].clone();
    assert_eq!(written.as_f64().unwrap() as f32, formula as f32);
    assert!((written.as_f64().unwrap() - 1.190_238_071_423_808_3).abs() < 1e-7);
}

#[test]
fn incomplete_rope_factors_are_refused() {
    let mut model = Model::fused();
    model.add_f32("rope_factors_long.weight", &[1.0; HEAD_DIM / 2]);
    assert!(error(&model).contains("rope_factors_short.weight\" is missing"));
    model.add_f32("rope_factors_short.weight", &[1.0; HEAD_DIM / 2]);
    assert!(error(&model).contains("original_context_length\" is missing"));
    model.set("rope.dimension_count", HEAD_DIM as u32 / 2);
    assert!(error(&model).contains("expected [16]"));

    let mut model = Model::fused();
    model.set("rope.scaling.original_context_length", 4u32);
    model.add_f32("rope_factors_long.weight", &[f32::NAN; HEAD_DIM / 2]);
    assert!(error(&model).contains("found NaN"));
}

#[test]
fn other_rope_scaling_is_refused() {
    for (key, value) in [
        ("rope.scaling.type", Value::from("yarn")),
        ("rope.scaling.type", Value::from("longrope")),
        ("rope.scaling.factor", Value::F32(4.0)),
        ("rope.scale_linear", Value::F32(0.5)),
    ] {
        for architecture in ["phi3", "llama"] {
            let mut model = Model::apart(architecture);
            model.set(key, value.clone());
            let text = error(&model);
            assert!(
                text.contains(key) && text.contains(&value.to_string()),
                "{text}"
            );
        }
    }
    for (key, value) in [
        ("rope.scaling.type", Value::from("none")),
        ("rope.scaling.type", Value::from("linear")),
        ("rope.scaling.factor", Value::F32(1.0)),
        ("rope.scale_linear", Value::F32(0.0)),
    ] {
        let mut model = Model::apart("llama");
        model.set(key, value);
        assert_eq!(config(&model)["rope_scaling"], Json::Null, "{key}");
    }
}

#[test]
fn llama_3_frequencies_are_longrope_with_the_same_factors_at_every_length() {
    let mut model = Model::apart("llama");
    model.add_f32("rope_freqs.weight", &[1.0; HEAD_DIM / 2]);
    assert_eq!(config(&model)["rope_scaling"], Json::Null);

    let mut factors = [1.0; HEAD_DIM / 2];
    (factors[7], factors[8]) = (2.5, 8.0);
    let mut model = Model::apart("llama");
    model.add_f32("rope_freqs.weight", &factors);
    let config = config(&model);
    let raw: RopeScalingConfig = serde_json::from_value(config["rope_scaling"].clone()).unwrap();
    let original = config["original_max_position_embeddings"].as_u64().unwrap();
    let context = config["max_position_embeddings"].as_u64().unwrap();
    assert_eq!(original, context, "no sequence is computed again");
    let long = LongRope::from_config(&raw, HEAD_DIM, Some(original as usize), context as usize);
    let long = long.unwrap();
    let factors = factors.map(f64::from);
    assert_eq!(long.short_factor, factors);
    assert_eq!(long.long_factor, factors);
    assert_eq!((long.short_mscale, long.long_mscale), (1.0, 1.0));
}

#[test]
fn llama_3_frequencies_are_refused_where_they_cannot_be_meant() {
    let factors = [8.0; HEAD_DIM / 2];
    let mut phi3 = Model::apart("phi3");
    phi3.add_f32("rope_freqs.weight", &factors);
    let mut both = Model::apart("llama");
    for name in ["rope_freqs", "rope_factors_long", "rope_factors_short"] {
        both.add_f32(&format!("{name}.weight"), &factors);
    }
    for model in [phi3, both] {
        let text = error(&model);
        assert!(
            text.contains("rope_freqs.weight") && text.contains("Llama 3.1"),
            "{text}"
        );
    }
    let mut short = Model::apart("llama");
    short.add_f32("rope_freqs.weight", &[8.0; HEAD_DIM / 4]);
    assert!(error(&short).contains("half the rotated dimensions"));
}

#[test]
fn heads_may_be_of_another_size_and_partly_rotated() {
    let mut model = Model::metadata("phi3");
    model.set("vocab_size", 5u32);
    model.set("rope.dimension_count", 48u32);
    let partial = config(&model);
    assert_eq!(partial["partial_rotary_factor"], 0.75);
    assert!(partial.get("head_dim").is_none());
    assert_eq!(partial["vocab_size"], 5);
    model.set("attention.key_length", 96u32);
    model.set("attention.value_length", 96u32);
    assert_eq!(config(&model)["head_dim"], 96);
    assert_eq!(config(&model)["partial_rotary_factor"], 0.5);
    model.set("attention.value_length", 64u32);
    assert!(error(&model).contains("value_length\" is 64"));

    let mut model = Model::metadata("llama");
    model.set("rope.dimension_count", 48u32);
    assert!(error(&model).contains("the whole head"));
}

#[test]
fn the_partial_factor_survives_truncation() {
    for head_dim in (2..=256).step_by(2) {
        for rotary_dim in (2..=head_dim).step_by(2) {
            let factor = partial_factor(rotary_dim, head_dim);
            assert_eq!((head_dim as f64 * factor) as usize, rotary_dim);
        }
    }
}

#[test]
fn per_layer_numbers_are_read_if_they_agree() {
    let mut model = Model::apart("llama");
    model.set("attention.head_count", Array::I32(vec![4, 4, 4]));
    model.set("attention.head_count_kv", Array::U32(vec![2]));
    assert_eq!(config(&model)["num_key_value_heads"], 2);
    model.set("attention.head_count_kv", Array::U32(vec![2, 0, 2]));
    assert!(error(&model).contains("alike"));
    model.set("attention.head_count_kv", Array::U32(vec![]));
    assert!(error(&model).contains("expected a number"));
}

#[test]
fn what_other_models_compute_is_refused() {
    for (key, value) in [
        ("expert_count", Value::U32(8)),
        ("attention.clamp_kqv", Value::F32(8.0)),
        ("attention.scale", Value::F32(0.1)),
        ("logit_scale", Value::F32(0.5)),
        ("embedding_scale", Value::F32(12.0)),
        ("final_logit_softcapping", Value::F32(30.0)),
        ("use_parallel_residual", Value::Bool(true)),
        ("attention.causal", Value::Bool(false)),
        ("attention.sliding_window_pattern", Value::U32(6)),
        ("expert_count", Value::from("eight")),
    ] {
        let mut model = Model::apart("llama");
        model.set(key, value);
        assert!(error(&model).contains(key), "{}", error(&model));
    }
    let mut model = Model::apart("llama");
    model.set("expert_count", 0u32);
    model.set("attention.causal", true);
    assert!(model.file().config().is_ok());
}

#[test]
fn missing_and_hostile_numbers_are_named() {
    let mut bare = Model::default();
    assert!(error(&bare).contains("general.architecture\" is missing"));
    bare.writer.set("general.architecture", "phi3");
    assert!(error(&bare).contains("phi3.embedding_length\" is missing"));
    for (key, value, expected) in [
        ("embedding_length", Value::U32(0), "positive"),
        (
            "embedding_length",
            Value::U32(255),
            "a multiple of the 4 heads",
        ),
        ("embedding_length", Value::U64(u64::MAX), "a number up to"),
        ("attention.head_count", Value::I32(-4), "a number up to"),
        ("attention.head_count", Value::from("4"), "a number up to"),
        (
            "attention.head_count_kv",
            Value::U32(3),
            "a divisor of the 4 heads",
        ),
        (
            "attention.head_count_kv",
            Value::U32(0),
            "a divisor of the 4 heads",
        ),
        ("rope.dimension_count", Value::U32(63), "an even number"),
        ("rope.dimension_count", Value::U32(128), "an even number"),
        ("rope.freq_base", Value::F32(f32::NAN), "a positive number"),
        (
            "attention.layer_norm_rms_epsilon",
            Value::F32(-1.0),
            "a positive number",
        ),
    ] {
        let mut model = Model::fused();
        model.set(key, value);
        let text = error(&model);
        assert!(text.contains(key) && text.contains(expected), "{text}");
    }
    let mut model = Model::fused();
    model.writer.set("split.count", 2u16);
    assert!(error(&model).contains("llama-gguf-split --merge"));
    let mut model = Model::fused();
    let tokens: Array = ["x"; 13].into_iter().collect();
    model.writer.set("tokenizer.ggml.tokens", tokens);
    assert!(error(&model).contains("13 tokens"));
}

#[test]
fn every_end_token_ends_generation() {
    let mut model = Model::fused();
    let tokens: Array = ["<|end|>", "a", "<|endoftext|>", "<|im_end|>"]
        .into_iter()
        .collect();
    model.writer.set("tokenizer.ggml.tokens", tokens);
    model
        .writer
        .set("tokenizer.ggml.token_type", Array::I32(vec![4, 1, 3, 1]));
    let generation = |model: &Model| model.file().generation_config().unwrap();
    assert_eq!(generation(&model), json!({"eos_token_id": [0, 2]}));
    model.writer.set("tokenizer.ggml.bos_token_id", 5u32);
    model.writer.set("tokenizer.ggml.eos_token_id", 2u32);
    model.writer.set("tokenizer.ggml.eot_token_id", 7u32);
    model.writer.set("tokenizer.ggml.eom_token_id", -1i32);
    model.writer.set("tokenizer.ggml.padding_token_id", 6u32);
    assert_eq!(
        generation(&model),
        json!({"bos_token_id": 5, "eos_token_id": [2, 7, 0], "pad_token_id": 6})
    );
    model.writer.set("tokenizer.ggml.eos_token_id", "two");
    assert!(model.file().generation_config().is_err());
}
