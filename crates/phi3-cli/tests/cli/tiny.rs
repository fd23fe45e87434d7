//! A tiny model that can chat: random weights of a fixture, and a byte-level tokenizer and template
//! of the test's own.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{arg, fixture};

/// Phi-3's shape, and a refusal as some templates have it.
pub const TEMPLATE: &str = "{% for message in messages %}{% if message.content == 'refuse me' %}\
    {{ raise_exception('no such talk') }}{% endif %}{{ '<|' + message.role + '|>\\n' + \
    message.content + '<|end|>\\n' }}{% endfor %}{% if add_generation_prompt %}\
    {{ '<|assistant|>\\n' }}{% endif %}";

/// A template that drops system messages, as Phi-3-medium's.
pub const WITHOUT_SYSTEM: &str = "{% for message in messages %}{% if message.role != 'system' %}\
    {{ '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}{% endif %}{% endfor %}\
    {{ '<|assistant|>\\n' }}";

const SPECIAL: [&str; 5] = [
    "<|endoftext|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
];
const VOCAB: usize = 320;

/// A model folder that goes away with the value.
pub struct Tiny {
    folder: TempDir,
}

impl Tiny {
    pub fn new() -> Result<Self> {
        Self::with_template(Some(TEMPLATE))
    }

    pub fn with_template(template: Option<&str>) -> Result<Self> {
        Self::of("phi3-mini-4k", template)
    }

    /// The weights of a fixture with a vocabulary of 320.
    pub fn of(name: &str, template: Option<&str>) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let from = fixture(name);
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(from.join(file), folder.path().join(file))?;
        }
        let config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": false,
            "eos_token": "<|endoftext|>", "chat_template": template,
        });
        let write =
            |name: &str, value: &Value| std::fs::write(folder.path().join(name), value.to_string());
        write("tokenizer.json", &tokenizer_json())?;
        write("tokenizer_config.json", &config)?;
        write(
            "generation_config.json",
            &json!({"eos_token_id": [id("<|end|>")]}),
        )?;
        Ok(Self { folder })
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `phi3 COMMAND --model THIS FLAGS…`
    pub fn args(&self, command: &str, flags: &[&str]) -> Vec<String> {
        let mut args = vec![command.to_owned(), "--model".to_owned(), arg(self.path())];
        args.extend(flags.iter().map(|flag| (*flag).to_owned()));
        args
    }
}

/// The id of a special token.
pub fn id(special: &str) -> usize {
    let place = SPECIAL.iter().position(|token| *token == special);
    VOCAB - SPECIAL.len() + place.unwrap_or_default()
}

/// 256 single bytes, pairs of letters up to the model's vocabulary, and the special tokens.
fn tokenizer_json() -> Value {
    let mut tokens: Vec<String> = (0..=255u8)
        .map(|byte| byte_char(byte).to_string())
        .collect();
    let letters = ('a'..='z').flat_map(|a| ['e', 'n', 'o'].map(|b| format!("{a}{b}")));
    tokens.extend(letters.take(VOCAB - SPECIAL.len() - tokens.len()));
    let merges: Vec<String> = tokens[256..]
        .iter()
        .map(|token| format!("{} {}", &token[..1], &token[1..]))
        .collect();
    let vocab: serde_json::Map<_, _> = tokens
        .into_iter()
        .enumerate()
        .map(|(id, token)| (token, json!(id)))
        .collect();
    let added: Vec<Value> = SPECIAL
        .iter()
        .map(|token| {
            json!({"id": id(token), "content": token, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
        "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null, "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "fuse_unk": false,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "byte_fallback": false,
            "vocab": vocab, "merges": merges},
    })
}

/// GPT-2's stand-in character for a byte: printable bytes stand for themselves, the others take the
/// characters from U+0100 on in turn.
fn byte_char(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|&other| !printable(other)).count();
    u32::try_from(rank)
        .ok()
        .and_then(|rank| char::from_u32(0x100 + rank))
        .unwrap_or('?')
}
