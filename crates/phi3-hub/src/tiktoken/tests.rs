use std::sync::LazyLock;

use proptest::prelude::*;
use tokenizers::Tokenizer;

use super::*;

/// What the public ranks become: made once, it is the same for all tests.
static PUBLIC: LazyLock<Vec<u8>> =
    LazyLock::new(|| tokenizer_json(&public_ranks().unwrap()).unwrap());

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::from_bytes(&*PUBLIC).unwrap());

fn encode(text: &str) -> Vec<u32> {
    TOKENIZER.encode(text, true).unwrap().get_ids().to_vec()
}

#[test]
fn every_golden_of_phi_3_small_holds() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../tests/fixtures/tokenizers/phi3-small.json"
    );
    let golden: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 300);
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        assert_eq!(encode(text), ids, "{text:?}");
        for (skip, key) in [(false, "decoded"), (true, "decoded_skip_special")] {
            let decoded = TOKENIZER.decode(&ids, skip).unwrap();
            assert_eq!(decoded, case[key].as_str().unwrap(), "{text:?}, {key}");
        }
    }
    let special = golden["special_tokens"].as_object().unwrap();
    assert_eq!(special.len(), VOCAB_SIZE - RANKS);
    for (token, id) in special {
        assert_eq!(json!(TOKENIZER.token_to_id(token)), *id, "{token}");
        assert_eq!(encode(&format!("a{token}b")).len(), 3, "{token}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Texts of every script, and those in which runs of the same merges meet.
    #[test]
    fn ids_are_those_of_tiktoken(text in "(\\PC{0,40}|[ab \\n\\r\\t0-9'sS.]{0,60}|(a|aa|aaa| |the){0,30})") {
        let tiktoken = tiktoken_rs::cl100k_base_singleton().encode_ordinary(&text);
        prop_assert_eq!(encode(&text), tiktoken);
    }
}

/// The public ranks as a file has them.
fn file() -> Vec<u8> {
    let digits = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut file = Vec::new();
    for (rank, token) in public_ranks().unwrap().iter().enumerate() {
        for three in token.chunks(3) {
            let bits = (0..3).fold(0, |bits, i| {
                bits << 8 | usize::from(three.get(i).copied().unwrap_or(0))
            });
            let text = (0..4).map(|i| match i <= three.len() {
                true => digits[bits >> (18 - 6 * i) & 63],
                false => b'=',
            });
            file.extend(text);
        }
        file.extend(format!(" {rank}\n").bytes());
    }
    file
}

#[test]
fn a_file_gives_what_the_public_ranks_give() {
    let file = file();
    assert_eq!(parse(&file).unwrap(), public_ranks().unwrap());
    assert_eq!(tokenizer_json(&parse(&file).unwrap()).unwrap(), *PUBLIC);
}

#[test]
fn damaged_files_are_errors() {
    for (text, words) in [
        ("IQ==", "line 1 is not a token"),
        ("IQ== 0\n\nIg= 1", "line 3 is not base64"),
        ("IQ== 0\nI===  1", "line 2 is not base64"),
        ("IQ== 0\nIR== 1", "line 2 is not base64"),
        ("IQ== 0\nI!== 1", "line 2 is not base64"),
        (" 0", "line 1 is not"),
        ("IQ== 1", "line 1 should have the rank 0"),
        ("IQ== 0\nIg== 2", "line 2 should have the rank 1"),
        ("IQ== -1", "line 1 should have the rank 0"),
        ("\u{fffd} 0", "line 1 is not base64"),
    ] {
        let error = parse(text.as_bytes()).unwrap_err();
        assert!(error.contains(words), "{text:?}: {error}");
    }
    assert!(parse(b"\xff 0").unwrap_err().contains("line 1 is not text"));
    assert_eq!(parse(b"").unwrap(), Ranks::new());
    let error = |ranks: &Ranks| tokenizer_json(ranks).unwrap_err();
    let ranks = public_ranks().unwrap();
    assert!(error(&ranks[..1000].to_vec()).contains("1000 ranks"));
    let mut changed = ranks.clone();
    changed[5] = changed[4].clone();
    assert!(error(&changed).contains("same bytes"));
    changed[5] = b"hopefully no token".to_vec();
    assert!(error(&changed).contains("the byte 0x26 alone"));
    let mut changed = ranks;
    changed[1000] = b"\x00\x01 no merge makes this".to_vec();
    assert!(error(&changed).contains("rank 1000"));
}
