use std::path::PathBuf;

use tokenizers::Tokenizer;

use super::*;
use crate::gguf::Array;
use crate::gguf::Writer;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/fixtures")
        .join(name)
}

fn container(path: &str) -> Container {
    Container::parse(std::fs::read(fixture(path)).unwrap().into()).unwrap()
}

fn tokenizer(container: &Container) -> Tokenizer {
    let files = files(container).unwrap().unwrap();
    Tokenizer::from_bytes(files.tokenizer_json).unwrap()
}

fn encode(tokenizer: &Tokenizer, text: &str, special: bool) -> Vec<u32> {
    tokenizer.encode(text, special).unwrap().get_ids().to_vec()
}

const PHI3: &str = "phi3-gguf/ggml-vocab-phi-3.gguf";

#[test]
fn all_llama_cpp_vectors_of_the_phi3_vocabulary_pass() {
    let tokenizer = tokenizer(&container(PHI3));
    let inputs = std::fs::read_to_string(fixture(&format!("{PHI3}.inp"))).unwrap();
    let outputs = std::fs::read_to_string(fixture(&format!("{PHI3}.out"))).unwrap();
    // What follows the last separator is an empty text.
    let inputs: Vec<_> = inputs.split("\n__ggml_vocab_test__\n").collect();
    let outputs: Vec<_> = outputs.split('\n').collect();
    assert_eq!((inputs.len(), outputs.len()), (47, 47));
    for (text, output) in inputs.into_iter().zip(outputs) {
        let expected: Vec<u32> = output
            .split_whitespace()
            .map(|id| id.parse().unwrap())
            .collect();
        assert_eq!(encode(&tokenizer, text, false), expected, "{text:?}");
    }
}

#[test]
fn the_phi3_vocabulary_reproduces_all_goldens() {
    let tokenizer = tokenizer(&container(PHI3));
    let golden = std::fs::read(fixture("tokenizers/phi3-mini.json")).unwrap();
    let golden: Json = serde_json::from_slice(&golden).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 300);
    let ids = |value: &Json| -> Vec<u32> { serde_json::from_value(value.clone()).unwrap() };
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let expected = ids(&case["ids"]);
        assert_eq!(encode(&tokenizer, text, false), expected, "{text:?}");
        assert_eq!(
            encode(&tokenizer, text, true),
            ids(&case["ids_special"]),
            "{text:?}"
        );
        for (skip, key) in [(false, "decoded"), (true, "decoded_skip_special")] {
            let decoded = tokenizer.decode(&expected, skip).unwrap();
            assert_eq!(decoded, case[key].as_str().unwrap(), "{text:?}, {key}");
        }
    }
}

#[test]
fn the_phi3_tokenizer_has_the_flags_of_its_hugging_face_form() {
    let container = container(PHI3);
    let files = files(&container).unwrap().unwrap();
    let json: Json = serde_json::from_slice(&files.tokenizer_json).unwrap();
    let token = |text: &str| {
        let added = json["added_tokens"].as_array().unwrap();
        let token = added.iter().find(|token| token["content"] == text).unwrap();
        (
            token["id"].as_u64().unwrap(),
            token["rstrip"] == true,
            token["special"] == true,
        )
    };
    assert_eq!(token("<s>"), (1, false, true));
    assert_eq!(token("</s>"), (2, true, false));
    assert_eq!(token("<|endoftext|>"), (32000, false, true));
    assert_eq!(token("<|end|>"), (32007, true, true));
    assert_eq!(token("<|user|>"), (32010, true, true));
    assert_eq!(json["added_tokens"].as_array().unwrap().len(), 14);
    assert_eq!(json["model"]["merges"].as_array().unwrap().len(), 61249);
    let config = &files.tokenizer_config;
    assert_eq!(config["bos_token"], "<s>");
    assert_eq!(config["eos_token"], "<|endoftext|>");
    assert_eq!(config["add_bos_token"], true);
    assert_eq!(
        config["added_tokens_decoder"]["32007"]["content"],
        "<|end|>"
    );
    assert!(
        config["chat_template"]
            .as_str()
            .unwrap()
            .contains("<|user|>")
    );
}

#[test]
fn a_padding_token_is_never_made_nor_decoded() {
    let tokenizer = tokenizer(&container(PHI3));
    assert_eq!(tokenizer.decode(&[32011, 29871, 32063], false).unwrap(), "");
    assert_ne!(encode(&tokenizer, "[PAD32011]", false).len(), 1);
}

/// A file with a SentencePiece vocabulary: three control tokens, the bytes, and `pieces` with
/// falling scores.
fn sentencepiece(pieces: &[&str]) -> Writer {
    let bytes: Vec<String> = (0..256).map(|byte| format!("<0x{byte:02X}>")).collect();
    let tokens: Array = ["<unk>", "<s>", "</s>"]
        .into_iter()
        .chain(bytes.iter().map(String::as_str))
        .chain(pieces.iter().copied())
        .collect();
    let types = [2, 3, 3]
        .into_iter()
        .chain([6; 256])
        .chain(pieces.iter().map(|_| 1));
    let scores = [0.0; 259]
        .into_iter()
        .chain((0..pieces.len()).map(|i| -(i as f32)));
    let mut writer = Writer::new();
    writer.set("general.architecture", "llama");
    writer.set(MODEL, "llama");
    writer.set("tokenizer.ggml.tokens", tokens);
    writer.set("tokenizer.ggml.token_type", Array::I32(types.collect()));
    writer.set("tokenizer.ggml.scores", Array::F32(scores.collect()));
    writer
}

/// A file with a byte-level vocabulary of `tokens`, all of them ordinary.
fn byte_level_file(tokens: &[&str], merges: &[&str]) -> Writer {
    let mut writer = Writer::new();
    writer.set("general.architecture", "llama");
    writer.set(MODEL, "gpt2");
    writer.set(PRE, "gpt-2");
    writer.set(
        "tokenizer.ggml.tokens",
        tokens.iter().copied().collect::<Array>(),
    );
    writer.set(MERGES, merges.iter().copied().collect::<Array>());
    writer
}

fn parsed(writer: &Writer) -> Container {
    let bytes = writer.to_vec::<Error>(|_, _| Ok(())).unwrap();
    Container::parse(bytes.into()).unwrap()
}

fn error(writer: &Writer) -> String {
    files(&parsed(writer)).unwrap_err().to_string()
}

#[test]
fn the_space_prefix_is_the_files_choice() {
    let pieces = ["▁", "a", "b", "▁a", "▁b"];
    let mut writer = sentencepiece(&pieces);
    let with = tokenizer(&parsed(&writer));
    let text = |ids: &[u32], tokenizer: &Tokenizer| tokenizer.decode(ids, true).unwrap();
    assert_eq!(encode(&with, "a b", true), [1, 262, 263]);
    assert_eq!(text(&[1, 262, 263], &with), "a b");

    writer.set("tokenizer.ggml.add_space_prefix", false);
    writer.set("tokenizer.ggml.add_bos_token", false);
    writer.set("tokenizer.ggml.add_eos_token", true);
    let without = tokenizer(&parsed(&writer));
    assert_eq!(encode(&without, "a b", true), [260, 263, 2]);
    assert_eq!(text(&[262, 263], &without), " a b");
}

#[test]
fn text_without_a_token_falls_back_to_bytes() {
    let tokenizer = tokenizer(&parsed(&sentencepiece(&["▁"])));
    let ids = encode(&tokenizer, "é", false);
    assert_eq!(ids, [259, 3 + 0xc3, 3 + 0xa9]);
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), "é");
}

#[test]
fn the_better_score_merges_first() {
    let left = tokenizer(&parsed(&sentencepiece(&["a", "b", "c", "ab", "bc", "▁"])));
    assert_eq!(encode(&left, "abc", false), [264, 262, 261]);
    let right = tokenizer(&parsed(&sentencepiece(&["a", "b", "c", "bc", "ab", "▁"])));
    assert_eq!(encode(&right, "abc", false), [264, 259, 262]);
}

#[test]
fn a_control_token_is_never_made_of_text_pieces() {
    // The pieces could be merged to "<s", and that with ">" to the bos token.
    let mut writer = sentencepiece(&["▁", "<", "s", ">", "<s"]);
    writer.set("tokenizer.ggml.add_space_prefix", false);
    let files = files(&parsed(&writer)).unwrap().unwrap();
    let json: Json = serde_json::from_slice(&files.tokenizer_json).unwrap();
    assert_eq!(json["model"]["merges"], json!([["<", "s"]]));
}

#[test]
fn only_phi3_strips_after_its_special_tokens() {
    let mut writer = sentencepiece(&["▁", "a"]);
    let rstrip = |writer: &Writer| {
        let files = files(&parsed(writer)).unwrap().unwrap();
        let json: Json = serde_json::from_slice(&files.tokenizer_json).unwrap();
        let added = json["added_tokens"].as_array().unwrap().clone();
        added
            .iter()
            .map(|token| token["rstrip"] == true)
            .collect::<Vec<_>>()
    };
    assert_eq!(rstrip(&writer), [false, false, false]);
    writer.set("general.name", "My Phi-3 tune");
    assert_eq!(rstrip(&writer), [false, false, true]);
    writer.set("general.name", "anything");
    writer.set("general.architecture", "phi3");
    assert_eq!(rstrip(&writer), [false, false, true]);
}

#[test]
fn tokens_that_are_not_text_do_not_stop_the_load() {
    let mut writer = sentencepiece(&["▁", "a", "x", "y"]);
    let mut tokens: Vec<crate::gguf::Text> = match parsed(&writer).get("tokenizer.ggml.tokens") {
        Some(Value::Array(Array::String(tokens))) => tokens.clone(),
        _ => panic!("tokens"),
    };
    tokens[261] = b"\xff"[..].into();
    tokens[262] = b"".as_slice().into();
    writer.set("tokenizer.ggml.tokens", Array::String(tokens));
    let tokenizer = tokenizer(&parsed(&writer));
    assert_eq!(encode(&tokenizer, "a", false), [259, 260]);
    assert_eq!(tokenizer.decode(&[261, 262], false).unwrap(), "");
}

#[test]
fn byte_level_encodes_and_decodes() {
    let mut writer = byte_level_file(&["a", "Ġ", "Ġa", "Ã", "©", "<|end|>"], &["Ġ a"]);
    writer.set(
        "tokenizer.ggml.token_type",
        Array::I32(vec![1, 1, 1, 1, 1, 3]),
    );
    let tokenizer = tokenizer(&parsed(&writer));
    let ids = encode(&tokenizer, "a aé<|end|>", true);
    assert_eq!(ids, [0, 2, 3, 4, 5]);
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "a aé");
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), "a aé<|end|>");
}

#[test]
fn llama_bpe_puts_bos_first_and_keeps_whole_words() {
    let mut writer = byte_level_file(&["a", "b", "ab", "<|begin_of_text|>"], &[]);
    writer.set("tokenizer.ggml.token_type", Array::I32(vec![1, 1, 1, 3]));
    writer.set("tokenizer.ggml.bos_token_id", 3u32);
    assert_eq!(encode(&tokenizer(&parsed(&writer)), "ab", true), [0, 1]);
    writer.set(PRE, "llama-bpe");
    assert_eq!(encode(&tokenizer(&parsed(&writer)), "ab", true), [3, 2]);
}

#[test]
fn templates_are_handed_over_with_their_names() {
    let mut writer = sentencepiece(&["▁"]);
    assert_eq!(chat_template(&parsed(&writer)).unwrap(), None);
    writer.set("tokenizer.chat_template", "one");
    assert_eq!(chat_template(&parsed(&writer)).unwrap(), Some(json!("one")));
    writer.set(
        "tokenizer.chat_templates",
        ["tool_use"].into_iter().collect::<Array>(),
    );
    writer.set("tokenizer.chat_template.tool_use", "two");
    let both = json!([
        {"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"},
    ]);
    assert_eq!(chat_template(&parsed(&writer)).unwrap(), Some(both));
    writer.set("tokenizer.chat_template", 1u32);
    assert!(chat_template(&parsed(&writer)).is_err());
}

#[test]
fn a_file_without_a_tokenizer_has_none() {
    let mut writer = Writer::new();
    assert!(files(&parsed(&writer)).unwrap().is_none());
    writer.set(MODEL, "no_vocab");
    assert!(files(&parsed(&writer)).unwrap().is_none());
}

#[test]
fn hostile_vocabularies_are_named_errors() {
    let mut writer = Writer::new();
    writer.set(MODEL, "bert");
    assert!(error(&writer).contains("\"bert\" is not supported, only llama, gpt2"));
    writer.set(MODEL, "llama");
    assert!(error(&writer).contains("tokenizer.ggml.tokens\" is missing"));
    writer.set("tokenizer.ggml.tokens", 3u32);
    assert!(error(&writer).contains("expected an array"));
    writer.set("tokenizer.ggml.tokens", Array::U8(vec![1]));
    assert!(error(&writer).contains("expected an array of texts"));
    writer.set("tokenizer.ggml.tokens", Array::String(vec![]));
    assert!(error(&writer).contains("is empty"));

    let mut writer = sentencepiece(&["▁", "a", "a"]);
    assert!(error(&writer).contains("tokens 260 and 261 are both \"a\""));
    writer = sentencepiece(&["▁"]);
    writer.set("tokenizer.ggml.scores", Array::F32(vec![0.0; 3]));
    assert!(error(&writer).contains("has 3 entries for 260 tokens"));
    writer = sentencepiece(&["▁"]);
    writer.set("tokenizer.ggml.token_type", Array::I32(vec![1]));
    assert!(error(&writer).contains("has 1 entries for 260 tokens"));
    writer = sentencepiece(&["▁"]);
    writer.set("tokenizer.ggml.scores", Array::I32(vec![0; 260]));
    assert!(error(&writer).contains("expected an array of f32"));
    writer = sentencepiece(&["▁"]);
    writer.set("tokenizer.ggml.bos_token_id", 1_000_000u32);
    assert!(error(&writer).contains("add_bos_token"));
}

#[test]
fn hostile_merges_are_named_errors() {
    let tokens = ["a", "b", "ab"];
    let mut writer = byte_level_file(&tokens, &["a b"]);
    assert!(files(&parsed(&writer)).is_ok());
    for (merge, expected) in [
        ("ab", "is not two tokens"),
        ("", "is not two tokens"),
        ("a ", "is not two tokens"),
        ("b a", "needs \"ba\""),
        ("a c", "needs \"c\""),
    ] {
        let error = error(&byte_level_file(&tokens, &["a b", merge]));
        assert!(
            error.contains("merge 1") && error.contains(expected),
            "{merge}: {error}"
        );
    }
    writer.set(PRE, "unheard-of");
    assert!(error(&writer).contains("unheard-of"));
    let mut no_merges = Writer::new();
    no_merges.set(MODEL, "gpt2");
    no_merges.set(
        "tokenizer.ggml.tokens",
        tokens.into_iter().collect::<Array>(),
    );
    assert!(error(&no_merges).contains("merges\" is missing"));
}

#[test]
fn hostile_tokens_of_great_length_end_soon() {
    let long = "a".repeat(1 << 20);
    let error = error(&sentencepiece(&["▁", "a", &long]));
    assert!(error.contains("far longer"), "{error}");
    let nan = {
        let mut writer = sentencepiece(&["▁", "a", "aa"]);
        writer.set("tokenizer.ggml.scores", Array::F32(vec![f32::NAN; 262]));
        writer
    };
    assert!(files(&parsed(&nan)).is_ok());
}
