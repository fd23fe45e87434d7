use std::path::PathBuf;
use std::sync::Arc;

use phi3_nn::weights::MemorySource;
use serde_json::json;

use super::*;
use crate::gguf::{Container, GgufFile, Writer};
use crate::{ChatTemplateSource, Checkpoint, TokenizerFiles};

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/fixtures")
        .join(name)
}

fn checkpoint(config: Json, tokenizer: TokenizerFiles) -> Checkpoint {
    Checkpoint {
        config,
        generation_config: None,
        preprocessor_config: None,
        tokenizer,
        chat_template: None,
        weights: Arc::new(MemorySource::new()),
        tensors: Vec::new(),
        origin: "test".to_owned(),
    }
}

/// A file of these metadata, opened again.
fn file(values: Vec<(String, Value)>) -> GgufFile {
    let mut writer = Writer::new();
    writer.set("general.architecture", "phi3");
    for (key, value) in values {
        writer.set(key, value);
    }
    let bytes = writer
        .to_vec(|_, _| Ok::<(), super::super::Error>(()))
        .unwrap();
    GgufFile::parse(bytes.into(), "test").unwrap()
}

#[test]
fn the_phi3_vocabulary_comes_back() {
    let path = fixture("phi3-gguf/ggml-vocab-phi-3.gguf");
    let original = GgufFile::parse(std::fs::read(path).unwrap().into(), "test").unwrap();
    let files = original.tokenizer().unwrap();
    let config = json!({"vocab_size": 32064});
    let mut checkpoint = checkpoint(config, files.clone());
    let template = original.chat_template().unwrap().unwrap();
    checkpoint.chat_template = ChatTemplateSource::from_json(&template, "").unwrap();
    let values = tokenizer(&checkpoint).unwrap();
    let written = file(values);
    let json = |files: &TokenizerFiles| -> Json {
        serde_json::from_slice(files.tokenizer_json.as_ref().unwrap()).unwrap()
    };
    let back = written.tokenizer().unwrap();
    assert!(json(&back) == json(&files), "the tokenizer changed");
    assert_eq!(back.tokenizer_config, files.tokenizer_config);
    let get = |file: &GgufFile, key: &str| {
        let key = format!("tokenizer.ggml.{key}");
        file.container().get(&key).cloned()
    };
    for key in ["model", "tokens", "bos_token_id", "eos_token_id"] {
        assert!(get(&written, key) == get(&original, key), "{key}");
    }
}

/// From the ranks through a file, with the ids of tiktoken, which its goldens are.
#[test]
fn phi_3_smalls_vocabulary_comes_back() {
    let template =
        "{{ bos_token }}{% for message in messages %}{{ message.content }}<|end|>{% endfor %}";
    let files = TokenizerFiles {
        tokenizer_config: Some(json!({
            "bos_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
        })),
        ..TokenizerFiles::default()
    };
    let config = json!({"model_type": "phi3small", "vocab_size": 100_352});
    let mut checkpoint = checkpoint(config, files);
    checkpoint.chat_template = ChatTemplateSource::from_json(&template.into(), "").unwrap();
    let written = file(tokenizer(&checkpoint).unwrap());
    assert_eq!(written.chat_template().unwrap(), Some(template.into()));
    // The end of a turn is not the end of a text.
    let generation = written.generation_config().unwrap();
    assert_eq!(generation["eos_token_id"], json!([100_257, 100_266]));
    assert_eq!(generation["bos_token_id"], 100_257);

    let back = written.tokenizer().unwrap().tokenizer_json.unwrap();
    let back = tokenizers::Tokenizer::from_bytes(back).unwrap();
    let golden = std::fs::read(fixture("tokenizers/phi3-small.json")).unwrap();
    let golden: Json = serde_json::from_slice(&golden).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 300);
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        assert_eq!(back.encode(text, true).unwrap().get_ids(), ids, "{text:?}");
        for (skip, key) in [(false, "decoded"), (true, "decoded_skip_special")] {
            let decoded = back.decode(&ids, skip).unwrap();
            assert_eq!(decoded, case[key].as_str().unwrap(), "{text:?}, {key}");
        }
    }
    for (token, id) in golden["special_tokens"].as_object().unwrap() {
        assert_eq!(json!(back.token_to_id(token)), *id, "{token}");
    }
}

fn bpe(byte_fallback: bool, pre_tokenizer: Json) -> Json {
    json!({
        "added_tokens": [{"id": 4, "content": "<|end|>", "special": true}],
        "normalizer": null,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": null,
        "model": {
            "type": "BPE", "byte_fallback": byte_fallback,
            "vocab": {"a": 0, "b": 1, "ab": 2, "abb": 3},
            "merges": ["a b", ["ab", "b"]],
        },
    })
}

fn exported(json: &Json) -> Result<Vec<(String, Value)>, String> {
    let files = TokenizerFiles {
        tokenizer_json: Some(json.to_string().into_bytes()),
        tokenizer_config: Some(json!({"eos_token": {"content": "<|end|>"}})),
        ..TokenizerFiles::default()
    };
    tokenizer(&checkpoint(json!({"vocab_size": 8}), files))
}

#[test]
fn vocabularies_are_filled_up_to_the_rows_of_the_embedding() {
    let json = bpe(
        false,
        json!({"type": "ByteLevel", "add_prefix_space": false}),
    );
    let written = file(exported(&json).unwrap());
    let container: &Container = written.container();
    let tokens = container
        .get("tokenizer.ggml.tokens")
        .unwrap()
        .as_array()
        .unwrap();
    let tokens: Vec<_> = tokens
        .as_texts()
        .unwrap()
        .iter()
        .map(|t| t.as_str().unwrap())
        .collect();
    assert_eq!(
        tokens,
        [
            "a", "b", "ab", "abb", "<|end|>", "[PAD5]", "[PAD6]", "[PAD7]"
        ]
    );
    let number = |key: &str| container.get(key).unwrap().as_u64();
    assert_eq!(number("tokenizer.ggml.eos_token_id"), Some(4));
    assert_eq!(
        container.get("tokenizer.ggml.pre").unwrap().as_str(),
        Some("gpt-2")
    );
    let back = written.tokenizer().unwrap().tokenizer_json.unwrap();
    let back: Json = serde_json::from_slice(&back).unwrap();
    assert_eq!(back["model"]["merges"], json!([["a", "b"], ["ab", "b"]]));
}

#[test]
fn what_has_no_form_is_an_error() {
    let error = |json: &Json| exported(json).unwrap_err();
    let message = error(&bpe(false, json!({"type": "Whitespace"})));
    assert!(message.contains("Whitespace"), "{message}");

    let mut unigram = bpe(true, json!(null));
    unigram["model"]["type"] = json!("Unigram");
    assert!(error(&unigram).contains("Unigram"));

    // "b b" would follow from the tokens too, so that a list without "ab b" is no SentencePiece's.
    let mut partial = bpe(true, json!(null));
    partial["model"]["vocab"]["bb"] = json!(5);
    partial["model"]["merges"] = json!(["a b", "b b"]);
    let message = error(&partial);
    assert!(
        message.contains("2 merges") || message.contains("place"),
        "{message}"
    );

    let mut outside = bpe(
        false,
        json!({"type": "ByteLevel", "add_prefix_space": false}),
    );
    outside["model"]["vocab"]["b"] = json!(8);
    assert!(error(&outside).contains("8 rows"), "{}", error(&outside));

    let mut twice = bpe(
        false,
        json!({"type": "ByteLevel", "add_prefix_space": false}),
    );
    twice["model"]["vocab"]["b"] = json!(0);
    assert!(error(&twice).contains("same id"), "{}", error(&twice));
}

#[test]
fn templates_come_back() {
    let json = bpe(
        false,
        json!({"type": "ByteLevel", "add_prefix_space": false}),
    );
    let files = TokenizerFiles {
        tokenizer_json: Some(json.to_string().into_bytes()),
        ..TokenizerFiles::default()
    };
    let mut checkpoint = checkpoint(json!({"vocab_size": 8}), files);
    checkpoint.chat_template = Some(ChatTemplateSource {
        text: "{{ messages }}".to_owned(),
        origin: String::new(),
        named: [("tool_use".to_owned(), "{{ tools }}".to_owned())].into(),
    });
    let written = file(tokenizer(&checkpoint).unwrap());
    let back = written.chat_template().unwrap().unwrap();
    let back = ChatTemplateSource::from_json(&back, "").unwrap().unwrap();
    let expected = checkpoint.chat_template.unwrap();
    assert_eq!((back.text, back.named), (expected.text, expected.named));
}

/// Numbers of a config, through the metadata and back.
fn config_back(name: &str) -> (Json, Json) {
    let path = fixture(name).join("config.json");
    let config: Json = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let metadata = model(&config, "name", 7).unwrap();
    let mut writer = Writer::new();
    for (key, value) in metadata.values {
        writer.set(key, value);
    }
    let f32 = phi3_kernels::BlockType::F32;
    for (name, factors) in &metadata.rope_factors {
        writer.add_tensor(*name, &[factors.len()], f32).unwrap();
    }
    if config["tie_word_embeddings"] != true {
        writer.add_tensor("output.weight", &[1], f32).unwrap();
    }
    let bytes = writer
        .to_vec(|tensor, sink| {
            let factors = metadata
                .rope_factors
                .iter()
                .find(|(name, _)| *name == tensor.name);
            let zero = [0.0];
            let factors = factors.map_or(&zero[..], |(_, factors)| factors);
            factors
                .iter()
                .try_for_each(|f| sink.write(&f.to_le_bytes()))
        })
        .unwrap();
    let file = GgufFile::parse(bytes.into(), "test").unwrap();
    (config, file.config().unwrap())
}

#[test]
fn configs_come_back() {
    for name in [
        "phi3-mini-4k",
        "phi3-mini-4k-window",
        "phi3-mini-128k-longrope",
        "phi3-medium-4k",
        "phi3-medium-128k",
        "phi4-mini",
    ] {
        let (config, back) = config_back(name);
        for key in [
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "original_max_position_embeddings",
            "sliding_window",
            "vocab_size",
            "tie_word_embeddings",
        ] {
            assert_eq!(back[key], config[key], "{name} {key}");
        }
        let number = |json: &Json, key: &str| json[key].as_f64();
        for key in ["rms_norm_eps", "rope_theta"] {
            assert_eq!(number(&back, key), number(&config, key), "{name} {key}");
        }
        let partial = config["partial_rotary_factor"].as_f64().unwrap_or(1.0);
        assert_eq!(
            back["partial_rotary_factor"].as_f64(),
            Some(partial),
            "{name}"
        );
        for key in ["short_factor", "long_factor"] {
            let list = |json: &Json| -> Vec<f32> {
                let list = json["rope_scaling"][key].as_array();
                list.into_iter()
                    .flatten()
                    .map(|f| f.as_f64().unwrap() as f32)
                    .collect()
            };
            assert_eq!(list(&back), list(&config), "{name} {key}");
        }
    }
}

#[test]
fn a_config_without_a_model_is_an_error() {
    let error = |config: Json| model(&config, "", 0).err().unwrap();
    assert!(error(json!({})).contains("hidden_size"));
    let odd = json!({
        "hidden_size": 10, "intermediate_size": 4, "num_hidden_layers": 1,
        "num_attention_heads": 3, "vocab_size": 4,
    });
    assert!(error(odd).contains("multiple of num_attention_heads 3"));
}
