use serde_json::json;

use super::*;
use crate::testing::{
    build, byte_level, byte_level_json, ids_of, kit_tokenizer, sentencepiece, sentencepiece_config,
    sentencepiece_json,
};

#[test]
fn goldens() {
    for folder in ["phi3-mini", "phi3-mini-nobos", "phi3-vision", "phi3-small"] {
        let Some((tokenizer, cases)) = kit_tokenizer(folder) else {
            return;
        };
        for case in &cases {
            let text = case["text"].as_str().unwrap();
            let ids = ids_of(case, "ids").unwrap();
            assert_eq!(
                tokenizer.encode(text, false).unwrap(),
                ids,
                "{folder} {text:?}"
            );
            assert_eq!(tokenizer.encode_chat(text).unwrap(), ids);
            // phi3-small has no ids_special: its tokenizer adds nothing.
            let special = ids_of(case, "ids_special").unwrap_or_else(|| ids.clone());
            assert_eq!(
                tokenizer.encode(text, true).unwrap(),
                special,
                "{folder} {text:?}"
            );
            for (skip, name) in [(false, "decoded"), (true, "decoded_skip_special")] {
                let decoded = tokenizer.decode(&ids, skip).unwrap();
                assert_eq!(
                    decoded,
                    case[name].as_str().unwrap(),
                    "{folder} {name} {text:?}"
                );
            }
        }
    }
}

#[test]
fn every_section_between_special_tokens_gets_its_prefix() {
    let tokenizer = sentencepiece();
    let id = |token: &str| tokenizer.token_to_id(token).unwrap();
    let newline = id("<0x0A>");
    // `<|user|>` swallows the line break behind it, `<|end|>` does not, and each section between
    // them starts with its own `▁`.
    assert_eq!(
        tokenizer
            .encode_chat("<|user|>\nhi<|end|>\n<|assistant|>\n")
            .unwrap(),
        [
            id("<|user|>"),
            id("▁hi"),
            id("<|end|>"),
            id("▁"),
            newline,
            id("<|assistant|>")
        ]
    );
    assert_eq!(
        tokenizer.encode("the cat", true).unwrap(),
        [1, id("▁the"), id("▁cat")]
    );
    assert_eq!(
        tokenizer.encode("the cat", false).unwrap(),
        [id("▁the"), id("▁cat")]
    );
    assert_eq!(tokenizer.encode("", true).unwrap(), [1]);
}

#[test]
fn truncation_and_padding_of_the_file_are_ignored() {
    let tokenizer = sentencepiece();
    assert_eq!(tokenizer.encode("a b c d e f", false).unwrap().len(), 12);
    assert_eq!(tokenizer.encode("a", false).unwrap().len(), 2);
}

#[test]
fn byte_fallback_and_strip() {
    let tokenizer = sentencepiece();
    let text = "hi 你 ü 😀";
    let ids = tokenizer.encode(text, false).unwrap();
    assert!(ids.contains(&tokenizer.token_to_id("<0xE4>").unwrap()));
    assert!(ids.contains(&tokenizer.token_to_id("ü").unwrap()));
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
    // Half a character: one U+FFFD for each byte of the run.
    let half = tokenizer.token_to_id("<0xE4>").unwrap();
    assert_eq!(tokenizer.decode(&[half, half], true).unwrap(), "��");
}

#[test]
fn ids_outside_the_vocabulary_decode_to_nothing() {
    let tokenizer = sentencepiece();
    let the = tokenizer.token_to_id("▁the").unwrap();
    assert_eq!(
        tokenizer
            .decode(&[the, 32_063, u32::MAX, the], true)
            .unwrap(),
        "the the"
    );
}

#[test]
fn special_tokens_by_role_and_flag() {
    let tokenizer = sentencepiece();
    assert_eq!(tokenizer.bos_token(), Some("<s>"));
    assert_eq!(tokenizer.eos_token(), Some("<|endoftext|>"));
    assert_eq!(tokenizer.unk_token(), Some("<unk>"));
    assert_eq!(tokenizer.pad_token(), Some("<|endoftext|>"));
    let special = |token: &str| tokenizer.is_special(tokenizer.token_to_id(token).unwrap());
    assert!(special("<|end|>") && special("<s>"));
    assert!(!special("</s>") && !special("▁the") && !tokenizer.is_special(u32::MAX));
    assert_eq!(tokenizer.id_to_token(3).as_deref(), Some("<0x00>"));
}

#[test]
fn bos_follows_the_config() {
    let json = sentencepiece_json();
    let encode =
        |config: Option<&serde_json::Value>| build(&json, config).encode("a", true).unwrap();
    let plain = encode(None);
    let with_bos = [&[1], plain.as_slice()].concat();
    let mut config = sentencepiece_config();
    assert_eq!(encode(Some(&config)), with_bos);
    // The Llama class adds BOS unless told otherwise.
    config.as_object_mut().unwrap().remove("add_bos_token");
    assert_eq!(encode(Some(&config)), with_bos);
    config["tokenizer_class"] = json!("PreTrainedTokenizerFast");
    assert_eq!(encode(Some(&config)), plain);
    config["add_eos_token"] = json!(true);
    let eos = build(&json, None).token_to_id("<|endoftext|>").unwrap();
    assert_eq!(encode(Some(&config)), [plain.as_slice(), &[eos]].concat());
    config["tokenizer_class"] = json!("LlamaTokenizerFast");
    config["add_bos_token"] = json!(false);
    config["add_eos_token"] = json!(false);
    assert_eq!(encode(Some(&config)), plain);
}

#[test]
fn flags_of_the_config_win() {
    let json = sentencepiece_json();
    let end = build(&json, None).token_to_id("<|end|>").unwrap();
    let mut config = sentencepiece_config();
    config["added_tokens_decoder"] = json!({
        (end.to_string()): {"content": "<|end|>", "rstrip": true, "normalized": false, "special": true},
        ((end + 1).to_string()): {"content": "<|tool|>", "normalized": false, "special": true},
    });
    let tokenizer = build(&json, Some(&config));
    assert_eq!(tokenizer.encode_chat("<|end|>\n \n").unwrap(), [end]);
    assert_eq!(tokenizer.encode_chat("<|tool|>").unwrap(), [end + 1]);
    assert!(tokenizer.is_special(end + 1));
    // A role makes a plain entry of the vocabulary special.
    config["pad_token"] = json!("ü");
    let tokenizer = build(&json, Some(&config));
    assert!(tokenizer.is_special(tokenizer.token_to_id("ü").unwrap()));
}

#[test]
fn files_that_do_not_belong_together() {
    let json = sentencepiece_json().to_string();
    let mut config = sentencepiece_config();
    config["added_tokens_decoder"] = json!({"7": {"content": "<|end|>", "special": true}});
    let error = Tokenizer::from_json(json.as_bytes(), Some(&config)).unwrap_err();
    assert!(error.to_string().contains("<|end|>"), "{error}");
    config["added_tokens_decoder"] = json!({"seven": {"content": "<|end|>"}});
    let error = Tokenizer::from_json(json.as_bytes(), Some(&config)).unwrap_err();
    assert!(error.to_string().contains("`seven`"), "{error}");
    config["added_tokens_decoder"] = json!({});
    config["bos_token"] = json!("<bos>");
    let error = Tokenizer::from_json(json.as_bytes(), Some(&config)).unwrap_err();
    assert!(error.to_string().contains("add_bos_token"), "{error}");
}

#[test]
fn prefix_space_follows_the_config() {
    let config = json!({"add_prefix_space": true});
    let hi = byte_level().token_to_id("Ġhi").unwrap();
    let tokenizer = build(&byte_level_json(), Some(&config));
    assert_eq!(tokenizer.encode("hi", false).unwrap(), [hi]);
    assert_ne!(byte_level().encode("hi", false).unwrap(), [hi]);
}

#[test]
fn damaged_files_are_errors() {
    let empty = json!({"version": "1.0", "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": null, "truncation": null,
        "padding": null, "model": {"type": "BPE", "vocab": {}, "merges": []}});
    let error = Tokenizer::from_json(empty.to_string().as_bytes(), None).unwrap_err();
    assert!(error.to_string().contains("empty"), "{error}");
    let mut merges = sentencepiece_json();
    merges["model"]["merges"] = json!(["zz top"]);
    let mut regex = byte_level_json();
    regex["pre_tokenizer"] = json!({"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": false});
    for json in [
        String::new(),
        "{".to_owned(),
        "[]".to_owned(),
        "null".to_owned(),
        "{\"model\": 1}".to_owned(),
        merges.to_string(),
        regex.to_string(),
    ] {
        let error = Tokenizer::from_json(json.as_bytes(), None).unwrap_err();
        assert!(error.to_string().starts_with("tokenizer.json: "), "{error}");
    }
    // A decoder that the library itself cannot run on an empty token.
    let mut strip = sentencepiece_json();
    strip["decoder"] = json!({"type": "Strip", "content": "a", "start": 0, "stop": 9});
    let tokenizer = build(&strip, None);
    let a = tokenizer.token_to_id("a").unwrap();
    assert!(tokenizer.decode(&[a], true).is_err());
}
