//! Small tokenizers with the traps of the real ones, and the goldens where they are present.

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::tokenizer::Tokenizer;

/// SentencePiece style, as the Llama-2 vocabulary of Phi-3-mini: prepended `▁`, byte fallback, no
/// pre-tokenizer. Ids: 0 `<unk>`, 1 `<s>`, 2 `</s>` (not special, strips right), 3–258 bytes, then
/// `▁`, letters, `.`, merges; behind them `<|endoftext|>`, `<|user|>` and `<|assistant|>` (both
/// strip right) and `<|end|>` (does not).
pub(crate) fn sentencepiece_json() -> Value {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    tokens.extend((0..=255u8).map(|byte| format!("<0x{byte:02X}>")));
    tokens.extend("▁abcdefghijklmnopqrstuvwxyz.ü".chars().map(String::from));
    let merges = [
        ("h", "i"),
        ("t", "h"),
        ("th", "e"),
        ("▁", "the"),
        ("▁", "hi"),
        ("▁", "▁"),
        ("c", "a"),
        ("ca", "t"),
        ("▁", "cat"),
    ];
    tokens.extend(merges.map(|(left, right)| format!("{left}{right}")));
    let model_len = tokens.len();
    let vocab: serde_json::Map<_, _> = tokens
        .into_iter()
        .enumerate()
        .map(|(id, token)| (token, json!(id)))
        .collect();
    let added = |id: usize, content: &str, rstrip: bool, special: bool| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": rstrip, "normalized": false, "special": special})
    };
    json!({
        "version": "1.0",
        // Both are to be ignored.
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"},
        "added_tokens": [
            added(0, "<unk>", false, true),
            added(1, "<s>", false, true),
            added(2, "</s>", true, false),
            added(model_len, "<|endoftext|>", false, true),
            added(model_len + 1, "<|user|>", true, true),
            added(model_len + 2, "<|assistant|>", true, true),
            added(model_len + 3, "<|end|>", false, true),
        ],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "fuse_unk": true,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "byte_fallback": true,
            "vocab": vocab,
            "merges": merges.map(|(left, right)| format!("{left} {right}"))},
    })
}

pub(crate) fn sentencepiece_config() -> Value {
    json!({"tokenizer_class": "LlamaTokenizer", "add_bos_token": true, "add_eos_token": false,
        "bos_token": "<s>", "eos_token": {"content": "<|endoftext|>"}, "unk_token": "<unk>",
        "pad_token": "<|endoftext|>", "clean_up_tokenization_spaces": true})
}

pub(crate) fn sentencepiece() -> Tokenizer {
    build(&sentencepiece_json(), Some(&sentencepiece_config()))
}

/// Byte-level, as GPT-2 and cl100k: 256 single bytes, a few merges, `<|end|>` and `<|endoftext|>`.
pub(crate) fn byte_level_json() -> Value {
    let mut tokens: Vec<String> = (0..=255u8)
        .map(|byte| byte_level_char(byte).to_string())
        .collect();
    let merges = [("h", "i"), ("Ġ", "hi"), ("Ã", "©")];
    tokens.extend(merges.map(|(left, right)| format!("{left}{right}")));
    let model_len = tokens.len();
    let vocab: serde_json::Map<_, _> = tokens
        .into_iter()
        .enumerate()
        .map(|(id, token)| (token, json!(id)))
        .collect();
    let added = |id: usize, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true})
    };
    json!({
        "version": "1.0",
        "added_tokens": [added(model_len, "<|end|>"), added(model_len + 1, "<|endoftext|>")],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "fuse_unk": false,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "byte_fallback": false,
            "vocab": vocab,
            "merges": merges.map(|(left, right)| format!("{left} {right}"))},
    })
}

pub(crate) fn byte_level() -> Tokenizer {
    build(&byte_level_json(), None)
}

/// GPT-2's stand-in character for a byte, by its definition: printable bytes stand for themselves,
/// the others take the characters from U+0100 on in turn.
fn byte_level_char(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|&other| !printable(other)).count();
    char::from_u32(0x100 + u32::try_from(rank).unwrap()).unwrap()
}

pub(crate) fn build(json: &Value, config: Option<&Value>) -> Tokenizer {
    Tokenizer::from_json(json.to_string().as_bytes(), config).unwrap()
}

/// A path of the kit of goldens, or `None` with the reason printed.
pub(crate) fn kit(path: &str) -> Option<PathBuf> {
    let root = match std::env::var_os("PHI3_KIT") {
        Some(root) => PathBuf::from(root),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/kit"),
    };
    let found = root.join(path);
    if found.exists() {
        return Some(found);
    }
    eprintln!("skipped: no {path} in the kit (set PHI3_KIT to its folder)");
    None
}

pub(crate) fn kit_json(path: &str) -> Option<Value> {
    let bytes = std::fs::read(kit(path)?).unwrap();
    Some(serde_json::from_slice(&bytes).unwrap())
}

/// The tokenizer of a folder of the kit, and the cases of its `golden.json`.
pub(crate) fn kit_tokenizer(folder: &str) -> Option<(Tokenizer, Vec<Value>)> {
    let json = std::fs::read(kit(&format!("tokenizers/{folder}/tokenizer.json"))?).unwrap();
    let config = kit_json(&format!("tokenizers/{folder}/tokenizer_config.json"))?;
    let golden = kit_json(&format!("tokenizers/{folder}/golden.json"))?;
    let cases = golden["cases"].as_array().unwrap().clone();
    assert!(cases.len() >= 300, "{folder} has {} cases", cases.len());
    Some((Tokenizer::from_json(&json, Some(&config)).unwrap(), cases))
}

pub(crate) fn ids_of(case: &Value, name: &str) -> Option<Vec<u32>> {
    serde_json::from_value(case.get(name)?.clone()).unwrap()
}
