use serde_json::json;

use super::super::container::Container;
use super::super::names::{Architecture, gguf_name_in, hf_name_in};
use super::super::writer::Writer;
use super::super::{Error, export};
use super::*;

/// Every field has a value that is not its default, floats those that f32 would round.
fn full() -> Json {
    json!({
        "model_type": "phi3small",
        "hidden_act": "gegelu",
        "vocab_size": 320,
        "max_position_embeddings": 131_072,
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "ff_intermediate_size": null,
        "ff_dim_multiplier": 4,
        "gegelu_pad_to_256": false,
        "gegelu_limit": 19.3,
        "layer_norm_epsilon": 1.1e-6,
        "dense_attention_every_n_layers": 3,
        "blocksparse_block_size": 8,
        "blocksparse_num_local_blocks": 2,
        "blocksparse_vert_stride": 4,
        "blocksparse_homo_head_pattern": true,
        "mup_use_scaling": false,
        "mup_attn_multiplier": 1.3,
        "mup_embedding_multiplier": 9.7,
        "mup_width_multiplier": 7.9,
        "dummy_token_indices": [3, 319],
        "rope_embedding_base": 1_000_001,
        "rope_position_scale": 0.7,
        "rope_scaling": {
            "type": "su",
            "original_max_position_embeddings": 48,
            "short_factor": [1.0, 1.0 / 3.0],
            "long_factor": [2, 1e10 / 3.0],
            "short_mscale": 1.05,
            "long_mscale": 1.1902380714238083,
            "attention_factor": 1.2,
        },
    })
}

fn container(config: &Json) -> Container {
    let mut writer = Writer::new();
    for (key, value) in export::model(config, "m", 0).unwrap().values {
        writer.set(key, value);
    }
    Container::parse(writer.to_vec(|_, _| Ok::<(), Error>(())).unwrap().into()).unwrap()
}

fn read(container: &Container) -> Result<Json> {
    config(&Keys::new(container, Architecture::Phi3Small)).map(Json::from)
}

/// Numbers are compared as f64: 2 and 2.0 are the same factor.
fn same(a: &Json, b: &Json) -> bool {
    match (a, b) {
        (Json::Number(a), Json::Number(b)) => a.as_f64() == b.as_f64(),
        (Json::Array(a), Json::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b))
        }
        _ => a == b,
    }
}

#[test]
fn every_field_comes_back_as_it_was() {
    let config = full();
    let back = read(&container(&config)).unwrap();
    for (name, value) in config.as_object().unwrap() {
        match name.as_str() {
            "ff_intermediate_size" => assert!(back.get(name).is_none()),
            "rope_scaling" => {
                for (name, value) in value.as_object().unwrap() {
                    let found = &back["rope_scaling"][name];
                    let expected = match name.as_str() {
                        "type" => &json!("longrope"),
                        _ => value,
                    };
                    assert!(same(found, expected), "{name}: {found}, not {expected}");
                }
            }
            _ => assert!(same(&back[name], value), "{name}: {}", back[name]),
        }
    }
    // What is read back is written as the same bytes.
    assert_eq!(values(&back).unwrap(), values(&config).unwrap());
}

#[test]
fn what_config_json_leaves_out_keeps_the_models_default() {
    let mut config = full();
    for name in [
        "gegelu_pad_to_256",
        "layer_norm_epsilon",
        "dense_attention_every_n_layers",
        "mup_use_scaling",
        "mup_width_multiplier",
        "dummy_token_indices",
        "rope_position_scale",
        "rope_scaling",
    ] {
        config[name] = Json::Null;
        let back = read(&container(&config)).unwrap();
        assert!(back.get(name).is_none(), "{name}");
    }
    config["rope_scaling"] = json!({"type": "default", "short_mscale": 2.0});
    assert!(
        read(&container(&config))
            .unwrap()
            .get("rope_scaling")
            .is_none()
    );
}

#[test]
fn the_original_length_may_stand_beside_the_scaling() {
    let mut config = full();
    config["original_max_position_embeddings"] = json!(50);
    let original = |config: &Json| {
        read(&container(config)).unwrap()["rope_scaling"]["original_max_position_embeddings"]
            .clone()
    };
    assert_eq!(original(&config), 48, "the one inside counts");
    config["rope_scaling"]["original_max_position_embeddings"] = Json::Null;
    assert_eq!(original(&config), 50);
}

#[test]
fn what_cannot_be_written_is_named() {
    let with = |pointer: &str, value: Json| {
        let mut config = full();
        *config.pointer_mut(pointer).unwrap() = value;
        values(&config).unwrap_err()
    };
    for (pointer, value, words) in [
        (
            "/num_attention_heads",
            Json::Null,
            "num_attention_heads is missing",
        ),
        (
            "/gegelu_limit",
            json!("20"),
            "gegelu_limit is \"20\", not a finite number",
        ),
        (
            "/blocksparse_homo_head_pattern",
            json!(1),
            "not true or false",
        ),
        ("/vocab_size", json!(1u64 << 31), "not a number below 2^31"),
        (
            "/dummy_token_indices",
            json!([-1]),
            "not an array of numbers",
        ),
        ("/rope_scaling/type", json!("yarn"), "yarn"),
        ("/rope_scaling/short_factor", json!(["1"]), "invalid type"),
        ("/hidden_act", json!("silu"), "hidden_act \"silu\""),
    ] {
        let error = with(pointer, value);
        assert!(error.contains(words), "{pointer}: {error}");
    }
}

#[test]
fn hostile_values_are_refused() {
    for (key, value, words) in [
        ("vocab_size", Value::U64(1 << 40), "a number below 2^31"),
        ("gegelu_limit", Value::F64(f64::NAN), "a finite number"),
        ("mup.use_scaling", Value::U32(1), "true or false"),
        ("dummy_token_ids", Value::U32(1), "an array of numbers"),
        (
            "rope.scaling.long_factor",
            Array::F64(vec![f64::INFINITY]).into(),
            "finite",
        ),
        ("rope.scaling.type", "yarn".into(), "yarn"),
        ("rope.scaling.factor_rule", Value::Bool(true), "a text"),
    ] {
        let mut writer = Writer::new();
        for (key, value) in export::model(&full(), "m", 0).unwrap().values {
            writer.set(key, value);
        }
        writer.set(format!("phi3small.{key}"), value);
        let bytes = writer.to_vec(|_, _| Ok::<(), Error>(())).unwrap();
        let error = read(&Container::parse(bytes.into()).unwrap()).unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains(key) && error.contains(words),
            "{key}: {error}"
        );
    }
    let empty = Writer::new().to_vec(|_, _| Ok::<(), Error>(())).unwrap();
    let error = read(&Container::parse(empty.into()).unwrap()).unwrap_err();
    assert!(
        error.to_string().contains("phi3small.context_length"),
        "{error}"
    );
}

#[test]
fn names_go_both_ways() {
    for (gguf, hf) in [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.final_layernorm.weight"),
        ("output_norm.bias", "model.final_layernorm.bias"),
        ("output.weight", "lm_head.weight"),
        (
            "blk.3.attn_qkv.bias",
            "model.layers.3.self_attn.query_key_value.bias",
        ),
        (
            "blk.3.attn_output.weight",
            "model.layers.3.self_attn.dense.weight",
        ),
        ("blk.31.ffn_up.bias", "model.layers.31.mlp.up_proj.bias"),
        (
            "blk.0.ffn_down.weight",
            "model.layers.0.mlp.down_proj.weight",
        ),
        (
            "blk.0.attn_norm.bias",
            "model.layers.0.input_layernorm.bias",
        ),
    ] {
        let architecture = Architecture::Phi3Small;
        assert_eq!(hf_name_in(architecture, gguf).as_deref(), Some(hf));
        assert_eq!(gguf_name_in(architecture, hf).as_deref(), Some(gguf));
    }
    for other in [
        "blk.0.attn_q.weight",
        "blk.0.ffn_gate.weight",
        "blk.0.ffn_gate_exps.weight",
        "rope_factors_long.weight",
        "rope_freqs.weight",
    ] {
        assert_eq!(hf_name_in(Architecture::Phi3Small, other), None, "{other}");
    }
}
