//! Configurations that no model can be built from, or only one of another size.

use phi3_tests::hostile::Folder;
use serde_json::json;

use crate::{Case, LOAD, check_folders};

const CONFIG: &str = "config.json";

const FILES: &[Case] = &[
    Case {
        name: "a config that is not JSON",
        damage: |folder| folder.write(CONFIG, "hidden_size: 64\n"),
        says: &[CONFIG, "line 1, column 1"],
    },
    Case {
        name: "a config that is cut",
        damage: |folder| folder.cut(CONFIG, 200),
        says: &[CONFIG, "EOF"],
    },
    Case {
        name: "a config nested 100,000 deep",
        damage: |folder| folder.write(CONFIG, "{\"a\":".repeat(100_000)),
        says: &[CONFIG, "recursion limit"],
    },
    Case {
        name: "a config of 17 megabytes",
        damage: |folder| folder.write(CONFIG, vec![b' '; 17 << 20]),
        says: &[CONFIG, "17825792", "16777216"],
    },
    Case {
        name: "a config that is a list",
        damage: |folder| folder.write(CONFIG, "[]"),
        says: &["model_type `(none)`", "phi3"],
    },
    Case {
        name: "a config with a number out of range",
        damage: |folder| folder.write(CONFIG, "{\"rope_theta\": 1e999}"),
        says: &[CONFIG, "number out of range"],
    },
    Case {
        name: "another model type",
        damage: |folder| folder.set_config("model_type", json!("mamba")),
        says: &["model_type `mamba`", "phi3"],
    },
    Case {
        name: "a model type that is a number",
        damage: |folder| folder.set_config("model_type", json!(3)),
        says: &["model_type `(none)`", "phi3"],
    },
];

#[test]
fn config_files_of_another_kind() {
    check_folders(LOAD, FILES);
}

/// A field of config.json, the value it is given, and what the error says.
type Row = (&'static str, &'static str, &'static [&'static str]);

const SIZES: &[Row] = &[
    ("hidden_size", "0", &["hidden_size is 0"]),
    ("hidden_size", "null", &["hidden_size: invalid type: null"]),
    ("hidden_size", "-64", &["hidden_size: invalid value", "-64"]),
    (
        "hidden_size",
        "64.5",
        &["hidden_size: invalid type", "64.5"],
    ),
    (
        "hidden_size",
        "\"64\"",
        &["hidden_size: invalid type: string"],
    ),
    (
        "hidden_size",
        "66",
        &["hidden_size 66", "num_attention_heads 4"],
    ),
    ("hidden_size", "68", &["17 of 17", "even"]),
    (
        "hidden_size",
        "128",
        &["model.embed_tokens.weight", "[320, 64]", "[320, 128]"],
    ),
    ("hidden_size", "134217728", &["head_dim is 33554432"]),
    (
        "hidden_size",
        "9223372036854775808",
        &["hidden_size is 9223372036854775808"],
    ),
    (
        "hidden_size",
        "1e30",
        &["hidden_size: invalid type", "1e+30"],
    ),
    ("vocab_size", "0", &["vocab_size is 0"]),
    (
        "vocab_size",
        "134217728",
        &["model.embed_tokens.weight", "[134217728, 64]"],
    ),
    (
        "vocab_size",
        "319",
        &["model.embed_tokens.weight", "[320, 64]", "[319, 64]"],
    ),
    (
        "intermediate_size",
        "134217728",
        &["mlp.gate_up_proj.weight", "[268435456, 64]"],
    ),
    ("intermediate_size", "0", &["intermediate_size is 0"]),
    ("num_hidden_layers", "0", &["num_hidden_layers is 0"]),
    ("num_hidden_layers", "4", &["model.layers.3.", "missing"]),
    (
        "num_hidden_layers",
        "134217728",
        &["num_hidden_layers is 134217728"],
    ),
    ("num_attention_heads", "0", &["num_attention_heads is 0"]),
    ("num_attention_heads", "64", &["1 of 1", "even"]),
    (
        "num_attention_heads",
        "8",
        &["qkv_proj.weight", "[192, 64]", "[128, 64]"],
    ),
    (
        "num_key_value_heads",
        "3",
        &["num_attention_heads 4", "num_key_value_heads 3"],
    ),
    ("num_key_value_heads", "0", &["num_key_value_heads is 0"]),
    (
        "num_key_value_heads",
        "268435456",
        &["num_key_value_heads 268435456"],
    ),
    ("head_dim", "0", &["head_dim is 0"]),
    ("head_dim", "15", &["15 of 15", "even"]),
    ("head_dim", "1000000000", &["head_dim is 1000000000"]),
    (
        "max_position_embeddings",
        "0",
        &["max_position_embeddings is 0"],
    ),
    (
        "max_position_embeddings",
        "18446744073709551615",
        &["max_position_embeddings is 18446744073709551615"],
    ),
    ("sliding_window", "0", &["sliding_window is 0"]),
    (
        "sliding_window",
        "-1",
        &["sliding_window: invalid value", "-1"],
    ),
];

const OTHER_MATHS: &[Row] = &[
    ("hidden_act", "\"gelu\"", &["hidden_act `gelu`", "silu"]),
    ("attention_bias", "true", &["attention_bias"]),
    ("mlp_bias", "true", &["mlp_bias"]),
    ("rms_norm_eps", "-1e-5", &["rms_norm_eps is -0.00001"]),
    (
        "rms_norm_eps",
        "\"small\"",
        &["rms_norm_eps: invalid type", "small"],
    ),
    ("rope_theta", "0", &["rope_theta is 0"]),
    ("rope_theta", "-10000.0", &["rope_theta is -10000"]),
    (
        "partial_rotary_factor",
        "0",
        &["partial_rotary_factor is 0"],
    ),
    (
        "partial_rotary_factor",
        "2",
        &["partial_rotary_factor is 2"],
    ),
    ("partial_rotary_factor", "0.1", &["1 of 16", "even"]),
    (
        "rope_scaling",
        "\"yes\"",
        &["rope_scaling: invalid type", "yes"],
    ),
    (
        "rope_scaling",
        r#"{"type": "yarn", "factor": 4.0}"#,
        &["rope type `yarn`", "longrope"],
    ),
    (
        "rope_scaling",
        r#"{"type": "longrope"}"#,
        &["short_factor", "long_factor"],
    ),
    (
        "rope_scaling",
        r#"{"type": "su", "short_factor": [1, 1, 1, 1], "long_factor": [1, 1, 1, 1, 1, 1, 1, 1]}"#,
        &["short_factor has 4", "need 8"],
    ),
    (
        "rope_scaling",
        r#"{"type": "su", "short_factor": [1, 1, 1, 1, 1, 1, 1, 1], "long_factor": []}"#,
        &["long_factor has 0", "need 8"],
    ),
    (
        "rope_scaling",
        r#"{"type": "su", "short_factor": [1, 1, 1, 1, 1, 1, 1, 0], "long_factor": [1, 1, 1, 1, 1, 1, 1, 1]}"#,
        &["short_factor holds 0"],
    ),
    (
        "rope_scaling",
        r#"{"type": "su", "short_factor": [1, 1, 1, 1, 1, 1, 1, 1], "long_factor": [1, 1, 1, -2, 1, 1, 1, 1]}"#,
        &["long_factor holds -2"],
    ),
    (
        "rope_scaling",
        r#"{"type": "su", "short_factor": [1, 1, 1, 1, 1, 1, 1, 1], "long_factor": ["NaN", 1, 1, 1, 1, 1, 1, 1]}"#,
        &["rope_scaling: invalid type", "NaN"],
    ),
    (
        "rope_scaling",
        r#"{"type": "longrope", "factor_rule": "magic"}"#,
        &["rope_scaling: unknown variant", "magic", "power"],
    ),
    (
        "rope_parameters",
        r#"{"rope_type": "llama3"}"#,
        &["rope type `llama3`", "longrope"],
    ),
    (
        "eos_token_id",
        "\"<|end|>\"",
        &["config.json", "eos_token_id", "<|end|>"],
    ),
    (
        "eos_token_id",
        "[1, -1]",
        &["config.json", "eos_token_id", "-1"],
    ),
];

fn check_rows(rows: &[Row]) {
    let failures: Vec<String> = rows
        .iter()
        .filter_map(|(field, value, says)| {
            let folder = Folder::good().unwrap();
            let value = serde_json::from_str(value).unwrap();
            let name = format!("{field} = {value}");
            folder.set_config(field, value).unwrap();
            crate::refused(&name, folder.path(), LOAD, says)
        })
        .collect();
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}

#[test]
fn sizes_that_do_not_fit() {
    check_rows(SIZES);
}

#[test]
fn maths_that_phi3_does_not_do() {
    check_rows(OTHER_MATHS);
}

#[test]
fn a_generation_config_that_is_not_json() {
    let folder = Folder::good().unwrap();
    folder.write("generation_config.json", "{").unwrap();
    let says = ["generation_config.json", "EOF"];
    let failure = crate::refused("generation config", folder.path(), LOAD, &says);
    assert_eq!(failure, None);
}
