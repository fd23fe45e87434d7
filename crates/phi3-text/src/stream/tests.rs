use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::testing::{
    build, byte_level, byte_level_json, ids_of, kit_tokenizer, sentencepiece, sentencepiece_json,
};

fn streamed(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> String {
    let mut stream = DecodeStream::new(tokenizer, skip_special);
    let mut text = String::new();
    for &id in ids {
        text.push_str(&stream.push(id).unwrap());
    }
    text + &stream.finish().unwrap()
}

#[test]
fn goldens() {
    for folder in ["phi3-mini", "phi3-mini-nobos", "phi3-vision", "phi3-small"] {
        let Some((tokenizer, cases)) = kit_tokenizer(folder) else {
            return;
        };
        assert_ne!(*tokenizer.plan(), DecoderPlan::Other);
        for case in &cases {
            let ids = ids_of(case, "ids").unwrap();
            for (skip, name) in [(false, "decoded"), (true, "decoded_skip_special")] {
                let text = streamed(&tokenizer, &ids, skip);
                assert_eq!(text, case[name].as_str().unwrap(), "{folder} {name}");
            }
        }
    }
}

#[test]
fn spaces_stay_where_they_are() {
    let tokenizer = sentencepiece();
    let id = |token: &str| tokenizer.token_to_id(token).unwrap();
    let mut stream = DecodeStream::new(&tokenizer, true);
    // Only the text's first space goes, also behind a skipped token.
    assert_eq!(stream.push(id("<|assistant|>")).unwrap(), "");
    assert_eq!(stream.push(id("▁the")).unwrap(), "the");
    assert_eq!(stream.push(id("<|end|>")).unwrap(), "");
    assert_eq!(stream.push(id("▁cat")).unwrap(), " cat");
    assert_eq!(stream.push(id("▁▁")).unwrap(), "  ");
    assert_eq!(stream.push(id("t")).unwrap(), "t");
    assert_eq!(stream.finish().unwrap(), "");

    let mut stream = DecodeStream::continuing(&tokenizer, true, &[1, id("▁the")]);
    assert_eq!(stream.push(id("▁cat")).unwrap(), " cat");
    // Behind nothing but special tokens the text has not begun.
    let mut stream = DecodeStream::continuing(&tokenizer, true, &[1, id("<|user|>")]);
    assert_eq!(stream.push(id("▁cat")).unwrap(), "cat");
}

#[test]
fn characters_come_whole() {
    let tokenizer = sentencepiece();
    let mut stream = DecodeStream::new(&tokenizer, true);
    let ids = tokenizer.encode("你the", false).unwrap();
    let pieces: Vec<_> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    assert_eq!(pieces.concat(), "你the");
    assert!(pieces.contains(&"你t".to_owned()) || pieces.contains(&"你the".to_owned()));

    let tokenizer = byte_level();
    let mut stream = DecodeStream::new(&tokenizer, true);
    let pieces: Vec<_> = "h😀"
        .bytes()
        .map(|byte| stream.push(u32::from(byte)).unwrap())
        .collect();
    assert_eq!(pieces, ["h", "", "", "", "😀"]);
    // A character cut short becomes U+FFFD when it is certain that it is.
    assert_eq!(stream.push(0xF0).unwrap(), "");
    assert_eq!(stream.push(0x9F).unwrap(), "");
    assert_eq!(stream.push(u32::from(b'h')).unwrap(), "\u{FFFD}h");
    assert_eq!(stream.push(0xE4).unwrap(), "");
    assert_eq!(stream.finish().unwrap(), "\u{FFFD}");
}

#[test]
fn other_decoders_run_on_a_window() {
    let mut json = sentencepiece_json();
    json["decoder"] = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always",
        "split": true});
    let tokenizer = build(&json, None);
    assert_eq!(*tokenizer.plan(), DecoderPlan::Other);
    let ids = tokenizer.encode("the cat the", false).unwrap();
    assert_eq!(streamed(&tokenizer, &ids, true), "the cat the");
    // Withholding has an end even if the text never stops ending in U+FFFD.
    let mut json = byte_level_json();
    json["decoder"] = json!({"type": "Sequence", "decoders": [{"type": "ByteLevel",
        "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]});
    let tokenizer = build(&json, None);
    assert_eq!(*tokenizer.plan(), DecoderPlan::Other);
    let mut stream = DecodeStream::new(&tokenizer, true);
    let pieces: Vec<_> = (0..40).map(|_| stream.push(0xFF).unwrap()).collect();
    assert!(pieces.iter().any(|piece| !piece.is_empty()));
    assert_eq!(
        streamed(&tokenizer, &[0xC3, 0xA9, 256, 257], true),
        "éhi hi"
    );
}

#[test]
fn byte_level_table_is_complete() {
    let tokenizer = byte_level();
    for byte in 0..=255u32 {
        let token = tokenizer.id_to_token(byte).unwrap();
        assert_eq!(byte_level_bytes(&token), [byte as u8]);
    }
    assert_eq!(byte_level_bytes("a b"), b"a b");
}

proptest! {
    #[test]
    fn pieces_join_to_the_whole(
        ids in prop::collection::vec(0u32..320, 0..40),
        skip in any::<bool>(),
    ) {
        for tokenizer in [sentencepiece(), byte_level()] {
            let whole = tokenizer.decode(&ids, skip).unwrap();
            prop_assert_eq!(streamed(&tokenizer, &ids, skip), whole);
        }
    }

    #[test]
    fn bytes_of_any_kind(bytes in prop::collection::vec(any::<u8>(), 0..30), text in ".{0,12}") {
        let mut bytes = bytes;
        bytes.extend(text.bytes());
        let tokenizer = byte_level();
        let ids: Vec<u32> = bytes.iter().map(|&byte| u32::from(byte)).collect();
        prop_assert_eq!(streamed(&tokenizer, &ids, true), String::from_utf8_lossy(&bytes));
        let tokenizer = sentencepiece();
        let ids: Vec<u32> = bytes.iter().map(|&byte| 3 + u32::from(byte)).collect();
        prop_assert_eq!(streamed(&tokenizer, &ids, true), tokenizer.decode(&ids, true).unwrap());
    }
}
