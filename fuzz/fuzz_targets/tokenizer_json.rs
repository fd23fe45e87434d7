//! tokenizer.json: what is accepted encodes and decodes without a panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use phi3::text::{DecodeStream, Tokenizer};
use phi3_tests::hostile::{tokenizer_config, tokenizer_json};
use serde_json::json;

fuzz_target!(init: phi3_fuzz::start(seeds), |data: &[u8]| {
    for config in [None, Some(tokenizer_config())] {
        let Ok(tokenizer) = Tokenizer::from_json(data, config.as_ref()) else {
            continue;
        };
        for text in ["", "hi ho <|user|>é\n", "  123 don't"] {
            let Ok(ids) = tokenizer.encode(text, true) else {
                continue;
            };
            _ = tokenizer.decode(&ids, true);
            let mut stream = DecodeStream::new(&tokenizer, false);
            for id in ids {
                if stream.push(id).is_err() {
                    break;
                }
            }
            _ = stream.finish();
        }
    }
});

fn seeds() -> Vec<Vec<u8>> {
    let bpe = tokenizer_json();
    let mut byte_level = bpe.clone();
    byte_level["normalizer"] = json!({"type": "NFC"});
    byte_level["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}|\\s+(?!\\S)|\\w+"}, "behavior": "Isolated",
            "invert": false},
        {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": false}]});
    byte_level["decoder"] = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
        "use_regex": true});
    byte_level["post_processor"] = json!({"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}});
    let mut word_level = bpe.clone();
    word_level["pre_tokenizer"] = json!({"type": "WhitespaceSplit"});
    word_level["model"] =
        json!({"type": "WordLevel", "vocab": {"hi": 0, "ho": 1}, "unk_token": "hi"});
    let mut unigram = bpe.clone();
    unigram["pre_tokenizer"] = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always",
        "split": true});
    unigram["model"] = json!({"type": "Unigram", "unk_id": 0, "byte_fallback": false,
        "vocab": [["<unk>", 0.0], ["h", -1.0], ["hi", -0.5], ["▁", -2.0]]});
    let files = [bpe, byte_level, word_level, unigram];
    files
        .iter()
        .map(|file| file.to_string().into_bytes())
        .collect()
}
