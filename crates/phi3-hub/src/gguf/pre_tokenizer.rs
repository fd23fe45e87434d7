//! How a byte-level BPE vocabulary splits text into words before merging: what
//! `tokenizer.ggml.pre` names.
//!
//! A GGUF file only names the rule. The expressions are those of the `tokenizer.json` that the name
//! stands for; llama.cpp uses approximations of some, because its engine lacks case-insensitive
//! groups and letter classes. `default` is llama.cpp's own rule and has no other definition.

use serde_json::{Value as Json, json};

use super::error::{Error, Result};

/// A rule, and what goes with it in llama.cpp's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PreTokenizer {
    /// llama.cpp's rule for files that name none.
    Default,
    /// GPT-2: words with their leading space, runs of digits, runs of punctuation.
    Gpt2,
    /// GPT-2 with every digit a word of its own.
    Smollm,
    /// Llama 3: digits in groups of three, punctuation keeps the line breaks after it.
    LlamaBpe,
    /// DBRX, which is GPT-4's cl100k: the same expression as Llama 3.
    Dbrx,
    /// GPT-4o's o200k, of Phi-4-mini: words break between lower and upper case.
    Gpt4o,
}

/// The names in files; the first of each rule is the usual one.
const NAMES: [(&str, PreTokenizer); 11] = [
    ("default", PreTokenizer::Default),
    ("gpt-2", PreTokenizer::Gpt2),
    ("phi-2", PreTokenizer::Gpt2),
    ("smollm", PreTokenizer::Smollm),
    ("llama-bpe", PreTokenizer::LlamaBpe),
    ("llama3", PreTokenizer::LlamaBpe),
    ("llama-v3", PreTokenizer::LlamaBpe),
    ("dbrx", PreTokenizer::Dbrx),
    ("smaug-bpe", PreTokenizer::Dbrx),
    ("gpt-4o", PreTokenizer::Gpt4o),
    ("llama4", PreTokenizer::Gpt4o),
];

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

const CL100K: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    r"|[^\r\n\p{L}\p{N}]?\p{L}+",
    r"|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
);

const O200K: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
);

impl PreTokenizer {
    /// The rule of that name.
    ///
    /// # Errors
    /// [`Error::Tokenizer`], naming the known ones: a wrong rule gives wrong ids without a sign.
    pub fn from_name(name: &str) -> Result<Self> {
        let found = NAMES.iter().find(|(known, _)| *known == name);
        found.map(|(_, rule)| *rule).ok_or_else(|| {
            let names: Vec<_> = NAMES.iter().map(|(name, _)| *name).collect();
            Error::Tokenizer {
                key: "tokenizer.ggml.pre",
                found: name.to_owned(),
                supported: names.join(", "),
            }
        })
    }

    /// The name of the rule that a `pre_tokenizer` of `tokenizer.json` follows; `None` if llama.cpp
    /// has none. Llama 3 and DBRX split alike and differ in `ignore_merges`.
    pub fn recognize(json: &Json, ignore_merges: bool) -> Option<&'static str> {
        let found = Shape::of(json)?;
        let mut rules = NAMES.iter().filter(|(_, rule)| {
            rule.ignore_merges() == ignore_merges
                && Shape::of(&rule.to_json()).as_ref() == Some(&found)
        });
        rules.next().map(|(name, _)| *name)
    }

    /// The `pre_tokenizer` of `tokenizer.json`: splits, then spells each word's bytes as the
    /// vocabulary does.
    pub fn to_json(self) -> Json {
        let steps = match self {
            PreTokenizer::Default => vec![
                split(r"[\p{P}$+<=>^~|]+"),
                split(GPT2),
                split(r"\p{N}+"),
                split("[0-9][0-9][0-9]"),
            ],
            PreTokenizer::Gpt2 => vec![split(GPT2)],
            PreTokenizer::Smollm => vec![split(r"\p{N}"), split(GPT2)],
            PreTokenizer::LlamaBpe | PreTokenizer::Dbrx => vec![split(CL100K)],
            PreTokenizer::Gpt4o => vec![split(O200K)],
        };
        let bytes = json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false,
        });
        let steps: Vec<Json> = steps.into_iter().chain([bytes]).collect();
        json!({"type": "Sequence", "pretokenizers": steps})
    }

    /// Whether a word that is itself in the vocabulary is that token, whatever the merges make of
    /// it.
    pub fn ignore_merges(self) -> bool {
        self == PreTokenizer::LlamaBpe
    }

    /// Whether bos is put first when the file does not say.
    pub fn adds_bos(self) -> bool {
        self == PreTokenizer::LlamaBpe
    }
}

/// What a byte-level `pre_tokenizer` does, however it is written.
#[derive(Debug, PartialEq, Eq)]
struct Shape {
    /// Expressions that cut words out, in turn.
    splits: Vec<String>,
}

impl Shape {
    /// `None` for steps that no byte-level rule has.
    fn of(json: &Json) -> Option<Self> {
        let steps = match json["pretokenizers"].as_array() {
            Some(steps) => steps.as_slice(),
            None => std::slice::from_ref(json),
        };
        let (last, steps) = steps.split_last()?;
        if last["type"] != "ByteLevel" || last["add_prefix_space"] == true {
            return None;
        }
        let mut splits = Vec::new();
        for step in steps {
            let kind = step["type"].as_str()?;
            let isolates = step["behavior"] == "Isolated" && step["invert"] != true;
            // The expressions here match every character, so that nothing lies between matches.
            let keeps_matches = step["behavior"] == "Removed" && step["invert"] == true;
            match kind {
                "Split" if isolates || keeps_matches => {
                    splits.push(step["pattern"]["Regex"].as_str()?.to_owned());
                }
                "Digits" if step["individual_digits"] == true => splits.push(r"\p{N}".to_owned()),
                _ => return None,
            }
        }
        // GPT-2's own expression is what ByteLevel uses unless told not to, which is the default.
        if last["use_regex"] != false {
            splits.push(GPT2.to_owned());
        }
        Some(Self { splits })
    }
}

fn split(regex: &str) -> Json {
    json!({
        "type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::{
        OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _, PreTokenizerWrapper,
    };

    /// The words of `text`, in its own spelling.
    fn words(name: &str, text: &str) -> Vec<String> {
        split_by(PreTokenizer::from_name(name).unwrap().to_json(), text)
    }

    fn split_by(json: Json, text: &str) -> Vec<String> {
        let rule: PreTokenizerWrapper = serde_json::from_value(json).unwrap();
        let mut split = PreTokenizedString::from(text);
        rule.pre_tokenize(&mut split).unwrap();
        split
            .get_splits(OffsetReferential::Original, OffsetType::Byte)
            .into_iter()
            .map(|(_, (start, end), _)| text[start..end].to_owned())
            .collect()
    }

    const TEXT: &str = "Hello, y'all! I'LL pay $12345.67\n\n  for camelCase\tnaïve 한국x²  ";

    #[test]
    fn gpt2_splits_as_documented() {
        assert_eq!(
            words("gpt-2", TEXT),
            [
                "Hello",
                ",",
                " y",
                "'",
                "all",
                "!",
                " I",
                "'",
                "LL",
                " pay",
                " $",
                "12345",
                ".",
                "67",
                "\n\n ",
                " for",
                " camelCase",
                "\t",
                "naïve",
                " 한국x",
                "²",
                "  "
            ]
        );
        assert_eq!(
            words("gpt-2", "we're I'll he'd"),
            ["we", "'re", " I", "'ll", " he", "'d"]
        );
        assert_eq!(words("phi-2", "a  b"), ["a", " ", " b"]);
    }

    #[test]
    fn smollm_splits_every_digit() {
        assert_eq!(
            words("smollm", "pay 12345 for x² in 2024."),
            [
                "pay", " ", "1", "2", "3", "4", "5", " for", " x", "²", " in", " ", "2", "0", "2",
                "4", "."
            ]
        );
    }

    #[test]
    fn llama_and_dbrx_split_as_documented() {
        for name in ["llama-bpe", "dbrx"] {
            assert_eq!(
                words(name, TEXT),
                [
                    "Hello",
                    ",",
                    " y",
                    "'all",
                    "!",
                    " I",
                    "'LL",
                    " pay",
                    " $",
                    "123",
                    "45",
                    ".",
                    "67",
                    "\n\n",
                    " ",
                    " for",
                    " camelCase",
                    "\tnaïve",
                    " 한국x",
                    "²",
                    "  "
                ]
            );
        }
        assert_eq!(words("llama3", "end.\n\nNext"), ["end", ".\n\n", "Next"]);
    }

    #[test]
    fn gpt4o_breaks_between_cases_and_keeps_contractions() {
        assert_eq!(
            words("gpt-4o", TEXT),
            [
                "Hello", ",", " y", "'all", "!", " I'LL", " pay", " $", "123", "45", ".", "67",
                "\n\n", " ", " for", " camel", "Case", "\tnaïve", " 한국x", "²", "  "
            ]
        );
        assert_eq!(
            words("gpt-4o", "HTTPServer a/b//\n"),
            ["HTTPServer", " a", "/b", "//\n"]
        );
    }

    #[test]
    fn default_splits_punctuation_and_digits_in_threes() {
        assert_eq!(
            words("default", "Hi, you<3 12345+1"),
            ["Hi", ",", " you", "<", "3", " ", "123", "45", "+", "1"]
        );
    }

    /// These two have a `tokenizer.json` of their own making: GPT-2's rule is built into the
    /// tokenizers crate, and SmolLM's is that after single digits.
    #[test]
    fn gpt2_and_smollm_split_as_the_tokenizers_crate_does() {
        let gpt2 = json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
        });
        let digits = json!({"type": "Digits", "individual_digits": true});
        let smollm = json!({"type": "Sequence", "pretokenizers": [digits, gpt2]});
        let alphabet: Vec<char> = "ab Z1²Ⅳ \t\n\r's'll.,$é한\u{301}\u{a0}😀ſ"
            .chars()
            .collect();
        let mut state = 1u64;
        for _ in 0..300 {
            let text: String = (0..20)
                .map(|_| {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    alphabet[(state >> 33) as usize % alphabet.len()]
                })
                .collect();
            assert_eq!(
                words("gpt-2", &text),
                split_by(gpt2.clone(), &text),
                "{text:?}"
            );
            assert_eq!(
                words("smollm", &text),
                split_by(smollm.clone(), &text),
                "{text:?}"
            );
        }
    }

    #[test]
    fn rules_are_recognized_in_every_spelling() {
        for (name, rule) in NAMES {
            let found = PreTokenizer::recognize(&rule.to_json(), rule.ignore_merges()).unwrap();
            assert_eq!(PreTokenizer::from_name(found).unwrap(), rule, "{name}");
        }
        let recognize = |json: Json| PreTokenizer::recognize(&json, false);
        let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false});
        assert_eq!(recognize(byte_level.clone()), Some("gpt-2"));
        let digits = json!({"type": "Digits", "individual_digits": true});
        let smollm = json!({"type": "Sequence", "pretokenizers": [digits, byte_level]});
        assert_eq!(recognize(smollm), Some("smollm"));
        let last = json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": false});
        let phi4 = json!({
            "type": "Split", "pattern": {"Regex": O200K}, "behavior": "Removed", "invert": true,
        });
        let phi4 = json!({"type": "Sequence", "pretokenizers": [phi4, last]});
        assert_eq!(recognize(phi4), Some("gpt-4o"));
        for other in [
            json!(null),
            json!({"type": "Whitespace"}),
            json!({"type": "ByteLevel", "add_prefix_space": true}),
            json!({"type": "Sequence", "pretokenizers": [split(r"\w+"), last]}),
        ] {
            assert_eq!(recognize(other), None);
        }
    }

    #[test]
    fn an_unknown_rule_is_an_error_that_names_the_known() {
        let error = PreTokenizer::from_name("qwen2").unwrap_err().to_string();
        assert!(
            error.contains("qwen2") && error.contains("smollm, llama-bpe"),
            "{error}"
        );
    }
}
