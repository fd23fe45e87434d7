use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::testing::{byte_level, kit_json, kit_tokenizer, sentencepiece};

#[test]
fn ids_from_every_place() {
    let tokenizer = sentencepiece();
    let id = |token: &str| tokenizer.token_to_id(token).unwrap();
    // `<|end|>` ends an answer even if no file says so; `<|endoftext|>` is the eos_token.
    let family = [id("<|endoftext|>"), id("<|end|>")];
    assert_eq!(stop_ids(None, None, None, &tokenizer).unwrap(), family);
    let ids = stop_ids(
        Some(&json!({"eos_token_id": [7, 9, 7]})),
        Some(&json!({"eos_token_id": 5})),
        None,
        &tokenizer,
    );
    assert_eq!(ids.unwrap(), [&[5, 7, 9], family.as_slice()].concat());
    let none = json!({"eos_token_id": null});
    assert_eq!(
        stop_ids(Some(&none), None, None, &tokenizer).unwrap(),
        family
    );
    // `</s>` is written by the template, but is not a special token here.
    assert_eq!(
        stop_ids(None, None, Some("{{ x }}</s>"), &tokenizer).unwrap(),
        family
    );
    // A tokenizer without a config still stops.
    let tokenizer = byte_level();
    assert_eq!(stop_ids(None, None, None, &tokenizer).unwrap().len(), 2);
}

#[test]
fn end_tokens_that_the_template_writes() {
    let mut json = crate::testing::byte_level_json();
    json["added_tokens"][0]["content"] = json!("<|im_end|>");
    let tokenizer = crate::testing::build(&json, None);
    let end = tokenizer.token_to_id("<|im_end|>").unwrap();
    let without = stop_ids(None, None, Some("plain"), &tokenizer).unwrap();
    assert!(!without.contains(&end));
    let with = stop_ids(None, None, Some("{{ m }}<|im_end|>"), &tokenizer).unwrap();
    assert!(with.contains(&end));
}

#[test]
fn wrong_ids_name_their_file() {
    let tokenizer = sentencepiece();
    for value in [
        json!("2"),
        json!(-1),
        json!(1.5),
        json!([1, "x"]),
        json!({}),
    ] {
        let config = json!({"eos_token_id": value});
        let error = stop_ids(None, Some(&config), None, &tokenizer).unwrap_err();
        assert!(error.to_string().starts_with("config.json"), "{error}");
    }
}

#[test]
fn real_configs() {
    let Some((tokenizer, _)) = kit_tokenizer("phi3-vision") else {
        return;
    };
    let Some(config) = kit_json("configs/phi-3-vision-128k-instruct/config.json") else {
        return;
    };
    // config.json names `</s>` (2) only.
    let ids = stop_ids(None, Some(&config), None, &tokenizer).unwrap();
    assert_eq!(ids, [2, 32_000, 32_007]);
    let Some((small, _)) = kit_tokenizer("phi3-small") else {
        return;
    };
    let ids = stop_ids(None, Some(&json!({"eos_token_id": 100_257})), None, &small).unwrap();
    assert_eq!(ids, [100_257, 100_266]);
}

fn run(stops: &[&str], pieces: &[&str]) -> (String, Option<String>) {
    let mut matcher = StopMatcher::new(stops.iter().map(ToString::to_string).collect()).unwrap();
    let mut text = String::new();
    for piece in pieces {
        let (more, stop) = matcher.push(piece);
        text.push_str(&more);
        if stop.is_some() {
            return (text, stop);
        }
    }
    (text + &matcher.finish(), None)
}

#[test]
fn strings_across_pieces() {
    let stop = |text: &str, stop: &str| (text.to_owned(), Some(stop.to_owned()));
    assert_eq!(
        run(&["\nUser:"], &["Hi", "\nUs", "er", ": x"]),
        stop("Hi", "\nUser:")
    );
    assert_eq!(
        run(&["\nUser:"], &["Hi", "\nUs", "ed"]),
        ("Hi\nUsed".to_owned(), None)
    );
    assert_eq!(run(&["aab"], &["a", "a", "a", "b"]), stop("a", "aab"));
    assert_eq!(run(&["😀é"], &["x😀", "é"]), stop("x", "😀é"));
    assert_eq!(run(&["é"], &["e", "è"]), ("eè".to_owned(), None));
    assert_eq!(run(&[], &["a", ""]), ("a".to_owned(), None));
    // Complete first wins, then the longest.
    assert_eq!(run(&["abcd", "bc"], &["abcd"]), stop("a", "bc"));
    assert_eq!(run(&["bc", "abc"], &["abc"]), stop("", "abc"));
    assert!(StopMatcher::new(vec![String::new()]).is_err());
}

#[test]
fn text_is_released_as_soon_as_it_is_safe() {
    let mut matcher = StopMatcher::new(vec!["abc".to_owned()]).unwrap();
    assert_eq!(matcher.push("xab"), ("x".to_owned(), None));
    assert_eq!(matcher.push("ab"), ("ab".to_owned(), None));
    assert_eq!(matcher.push("x"), ("abx".to_owned(), None));
    assert_eq!(matcher.finish(), "");
}

proptest! {
    #[test]
    fn pieces_do_not_matter(
        text in "[abc]{0,24}",
        stops in prop::collection::vec("[abc]{1,4}", 0..4),
        cuts in prop::collection::vec(0usize..25, 0..6),
    ) {
        let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(text.len())).collect();
        cuts.extend([0, text.len()]);
        cuts.sort_unstable();
        let pieces: Vec<&str> = cuts.windows(2).map(|cut| &text[cut[0]..cut[1]]).collect();
        let whole = run(&stops, &[text.as_str()]);
        prop_assert_eq!(&run(&stops, &pieces), &whole);
        // Nothing is lost: text and stop string are the start of the input.
        let (before, stop) = whole;
        let seen = before.clone() + stop.as_deref().unwrap_or_default();
        prop_assert!(text.starts_with(&seen));
        match stop {
            Some(_) => prop_assert!(stops.iter().all(|stop| !before.contains(stop))),
            None => prop_assert!(before == text && stops.iter().all(|stop| !text.contains(stop))),
        }
    }
}
