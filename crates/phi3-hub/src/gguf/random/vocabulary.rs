//! A vocabulary of any size that SentencePiece could have made.

/// Tokens, their scores and llama.cpp's types.
pub(super) struct Vocabulary {
    pub tokens: Vec<String>,
    pub scores: Vec<f32>,
    pub types: Vec<i32>,
    /// The id that ends a text.
    pub end: u32,
}

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// Phi-3's added tokens, which begin 64 ids before the end of its vocabulary.
const ADDED: [&str; 11] = [
    "<|endoftext|>",
    "<|assistant|>",
    "<|placeholder1|>",
    "<|placeholder2|>",
    "<|placeholder3|>",
    "<|placeholder4|>",
    "<|system|>",
    "<|end|>",
    "<|placeholder5|>",
    "<|placeholder6|>",
    "<|user|>",
];
const ADDED_ROOM: usize = 64;

/// 62 letters: words of up to three of them are enough for 240,000 tokens, and those that Phi-3's
/// 32,000 hold have as many merges as its own.
const LETTERS: &[u8; 62] = b"etaoinshrdlcumwfgypbvkjxqzETAOINSHRDLCUMWFGYPBVKJXQZ0123456789";

impl Vocabulary {
    /// `len` tokens, at least 400: three special ones, the bytes, words of letters, Phi-3's added
    /// tokens, and unused ones to the end.
    pub fn new(len: usize) -> Self {
        let mut all = Self {
            tokens: Vec::with_capacity(len),
            scores: Vec::with_capacity(len),
            types: Vec::with_capacity(len),
            end: 0,
        };
        all.push("<unk>".to_owned(), UNKNOWN, 0.0);
        all.push("<s>".to_owned(), CONTROL, 0.0);
        all.push("</s>".to_owned(), CONTROL, 0.0);
        for byte in 0..=u8::MAX {
            all.push(format!("<0x{byte:02X}>"), BYTE, 0.0);
        }
        all.push("▁".to_owned(), NORMAL, 0.0);
        let words = len.saturating_sub(ADDED_ROOM + all.tokens.len());
        for idx in 0..words {
            // A word comes after its parts and has a worse score, as if merged later.
            all.push(word(idx), NORMAL, -1.0 - idx as f32);
        }
        all.end = u32::try_from(all.tokens.len()).unwrap_or(u32::MAX);
        for text in ADDED {
            all.push(text.to_owned(), CONTROL, 0.0);
        }
        for id in all.tokens.len()..len {
            all.push(format!("[PAD{id}]"), UNUSED, 0.0);
        }
        all
    }

    fn push(&mut self, token: String, kind: i32, score: f32) {
        self.tokens.push(token);
        self.types.push(kind);
        self.scores.push(score);
    }
}

/// The words in order of length: e, t, …, 9, ee, et, …
fn word(idx: usize) -> String {
    let mut letters = Vec::new();
    let mut rest = idx + 1;
    while rest > 0 {
        rest -= 1;
        letters.push(char::from(LETTERS[rest % LETTERS.len()]));
        rest /= LETTERS.len();
    }
    letters.iter().rev().collect()
}
