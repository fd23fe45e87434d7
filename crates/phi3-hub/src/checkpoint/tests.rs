use std::fs;

use serde_json::json;

use super::*;
use crate::safetensors::{TensorData, TensorToWrite, write_safetensors};

fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let tensor = TensorToWrite {
        name: "w",
        shape: &[1],
        data: TensorData::F32(&[1.0]),
    };
    write_safetensors(&folder.path().join("model.safetensors"), &[tensor], &[]).unwrap();
    for (name, content) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    folder
}

fn open_error(folder: &tempfile::TempDir) -> String {
    open_folder(folder.path())
        .expect_err("must be refused")
        .to_string()
}

#[test]
fn a_full_folder() {
    let folder = folder(&[
        ("config.json", r#"{"model_type":"phi3"}"#),
        ("generation_config.json", r#"{"eos_token_id":[1,2]}"#),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", r#"{"chat_template":"T"}"#),
        ("special_tokens_map.json", "{}"),
        ("preprocessor_config.json", r#"{"num_crops":4}"#),
        ("clip_vision_config.json", r#"{"num_attention_heads":2}"#),
        ("cl100k_base.tiktoken", "IQ== 0"),
    ]);
    let source = Source::Folder(folder.path().to_owned());
    let checkpoint = open(&source, &HubOptions::default()).unwrap();
    assert_eq!(checkpoint.config["model_type"], "phi3");
    let vision = &checkpoint.config["vision_config"];
    assert_eq!(vision["num_attention_heads"], 2);
    assert_eq!(
        checkpoint.generation_config.unwrap()["eos_token_id"],
        json!([1, 2])
    );
    assert_eq!(checkpoint.preprocessor_config.unwrap()["num_crops"], 4);
    assert_eq!(checkpoint.tokenizer.tokenizer_json.unwrap(), b"{}");
    assert_eq!(checkpoint.tokenizer.tiktoken.unwrap(), b"IQ== 0");
    assert_eq!(checkpoint.chat_template.unwrap().text, "T");
    assert_eq!(checkpoint.weights.names(), ["w"]);
    assert_eq!(checkpoint.tensors[0].name, "w");
    assert_eq!(checkpoint.origin, folder.path().display().to_string());
}

#[test]
fn what_a_config_says_of_its_image_tower_wins() {
    let folder = folder(&[
        (
            "config.json",
            r#"{"vision_config":{"num_attention_heads":4}}"#,
        ),
        ("clip_vision_config.json", r#"{"num_attention_heads":2}"#),
    ]);
    let checkpoint = open_folder(folder.path()).unwrap();
    let vision = &checkpoint.config["vision_config"];
    assert_eq!(vision["num_attention_heads"], 4);
}

#[test]
fn only_config_and_weights_are_required() {
    let folder = folder(&[("config.json", "{}")]);
    let checkpoint = open_folder(folder.path()).unwrap();
    assert!(checkpoint.generation_config.is_none() && checkpoint.chat_template.is_none());
    assert!(checkpoint.tokenizer.tokenizer_json.is_none());
    fs::remove_file(folder.path().join("config.json")).unwrap();
    let error = open_error(&folder);
    assert!(
        error.contains("config.json") && error.contains(&*folder.path().to_string_lossy()),
        "{error}"
    );
}

#[test]
fn broken_files_are_named() {
    for name in [
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ] {
        let folder = folder(&[("config.json", "{}"), (name, "{\"a\":\n tru}")]);
        let error = open_error(&folder);
        assert!(error.contains(name) && error.contains("line 2"), "{error}");
    }
}

#[test]
fn several_gguf_files_need_a_name() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["a.gguf", "b.gguf"] {
        fs::write(folder.path().join(name), "GGUF").unwrap();
    }
    let error = open_error(&folder);
    assert!(
        error.contains("a.gguf") && error.contains("b.gguf"),
        "{error}"
    );
}

fn template(files: &[(&str, &str)]) -> ChatTemplateSource {
    let folder = folder(&[&[("config.json", "{}")], files].concat());
    open_folder(folder.path()).unwrap().chat_template.unwrap()
}

#[test]
fn the_jinja_file_wins() {
    let found = template(&[
        ("chat_template.jinja", "from file {{ 1 }}\n"),
        (
            "tokenizer_config.json",
            r#"{"chat_template":"from config"}"#,
        ),
    ]);
    assert_eq!(found.text, "from file {{ 1 }}\n");
    assert!(
        found.origin.ends_with("chat_template.jinja"),
        "{}",
        found.origin
    );
}

#[test]
fn a_list_of_templates() {
    let found = template(&[
        (
            "tokenizer_config.json",
            r#"{"chat_template":[{"name":"tool_use","template":"T"},{"name":"default","template":"D"}]}"#,
        ),
        ("additional_chat_templates/rag.jinja", "R"),
    ]);
    assert_eq!(found.text, "D");
    assert_eq!(found.named["tool_use"], "T");
    assert_eq!(found.named["rag"], "R");
    assert!(found.origin.contains("tokenizer_config.json") && found.origin.contains("default"));
}

#[test]
fn templates_in_odd_forms() {
    let from = |value: Value| ChatTemplateSource::from_json(&value, "here");
    assert_eq!(from(Value::Null).unwrap(), None);
    assert_eq!(from(json!([])).unwrap(), None);
    assert_eq!(
        from(json!([{"name": "x", "template": "X"}]))
            .unwrap()
            .unwrap()
            .text,
        "X"
    );
    for value in [
        json!(1),
        json!({}),
        json!([1]),
        json!([{"name": "x"}]),
        json!([{"template": "x"}]),
    ] {
        let error = from(value.clone()).unwrap_err().to_string();
        assert!(error.starts_with("here"), "{value}: {error}");
    }
}

#[test]
fn a_template_that_is_not_utf8() {
    let folder = folder(&[("config.json", "{}")]);
    fs::write(folder.path().join("chat_template.jinja"), b"abc\xff").unwrap();
    let error = open_error(&folder);
    assert!(
        error.contains("chat_template.jinja") && error.contains("byte 3"),
        "{error}"
    );
}
