//! Phi-3-small's tokenizer, which its repository keeps as ranks, in the form of `tokenizer.json`.
//!
//! A `.tiktoken` file lists the byte sequences of a vocabulary, base64 with their ranks. Encoding
//! joins whichever adjacent pair makes the token of the lowest rank, again and again; so a token's
//! rank is its id and the priority of the merge that makes it. Which two tokens that merge joins
//! is not written: it is where joining by lower ranks alone leaves the token's bytes.
//!
//! Around cl100k's ranks Phi-3-small has special tokens of its own at fixed ids. Text is encoded
//! with all of them active, and nothing is put before it.
//!
//! Source: tokenization_phi3_small.py of microsoft/Phi-3-small-8k-instruct; tiktoken's educational
//! implementation.

use std::borrow::Cow;
use std::collections::HashMap;

use serde_json::{Map, Value, json};

use crate::checkpoint::Checkpoint;
use crate::error::Error;
use crate::gguf::cl100k_pre_tokenizer;

/// Tokens of cl100k_base that are no special ones.
const RANKS: usize = 100_256;

/// The special tokens from id [`RANKS`] on; the dummies between and behind them are numbered in
/// an order of their own.
const SPECIAL: [(usize, &str); 9] = [
    (100_257, "<|endoftext|>"),
    (100_258, "<|fim_prefix|>"),
    (100_259, "<|fim_middle|>"),
    (100_260, "<|fim_suffix|>"),
    (100_261, "<|system|>"),
    (100_262, "<|user|>"),
    (100_263, "<|assistant|>"),
    (100_266, "<|end|>"),
    (100_276, "<|endofprompt|>"),
];

/// Dummies whose number does not follow from the one before: 0 and 1 come first and 2 stands
/// before all.
const DUMMIES: [(usize, usize); 3] = [(100_256, 2), (100_264, 0), (100_265, 1)];

/// Rows of Phi-3-small's embedding, which all have a token.
const VOCAB_SIZE: usize = 100_352;

impl Checkpoint {
    /// `tokenizer.json`, or what amounts to it: made from a `.tiktoken` file, or, for a Phi-3-small
    /// whose folder has neither, from cl100k's public ranks. `None` if the checkpoint has no
    /// tokenizer.
    ///
    /// # Errors
    /// [`Error::Tiktoken`] if the ranks are damaged or other ones than Phi-3-small's.
    pub fn tokenizer_json(&self) -> Result<Option<Cow<'_, [u8]>>, Error> {
        let error = |detail| Error::Tiktoken {
            origin: self.origin.clone(),
            detail,
        };
        if let Some(json) = &self.tokenizer.tokenizer_json {
            return Ok(Some(Cow::Borrowed(json)));
        }
        if let Some(file) = &self.tokenizer.tiktoken {
            let json = parse(file).and_then(|ranks| tokenizer_json(&ranks));
            return json.map(|json| Some(json.into())).map_err(error);
        }
        if !self.is_phi_3_small() {
            return Ok(None);
        }
        let json = public_ranks().and_then(|ranks| tokenizer_json(&ranks));
        json.map(|json| Some(json.into())).map_err(error)
    }

    /// Whether [`Checkpoint::tokenizer_json`] has something to give.
    pub fn has_tokenizer(&self) -> bool {
        let files = &self.tokenizer;
        files.tokenizer_json.is_some() || files.tiktoken.is_some() || self.is_phi_3_small()
    }

    /// Whether this is a Phi-3-small with the vocabulary of the published ones.
    fn is_phi_3_small(&self) -> bool {
        self.config["model_type"] == "phi3small" && self.config["vocab_size"] == VOCAB_SIZE
    }
}

/// Byte sequences in the order of their ranks.
type Ranks = Vec<Vec<u8>>;

/// The lines of a `.tiktoken` file.
fn parse(file: &[u8]) -> Result<Ranks, String> {
    let mut ranks = Ranks::new();
    for (idx, line) in file.split(|byte| *byte == b'\n').enumerate() {
        let line = line.trim_ascii();
        if line.is_empty() {
            continue;
        }
        let wrong = |what: &str| format!("line {} {what}", idx + 1);
        let text = std::str::from_utf8(line).map_err(|_| wrong("is not text"))?;
        let (token, rank) = text
            .split_once(' ')
            .ok_or_else(|| wrong("is not a token and its rank"))?;
        if rank.trim().parse() != Ok(ranks.len()) {
            return Err(wrong(&format!("should have the rank {}", ranks.len())));
        }
        ranks.push(base64(token.as_bytes()).ok_or_else(|| wrong("is not base64"))?);
    }
    Ok(ranks)
}

/// cl100k's ranks, as the crate `tiktoken-rs` carries them.
fn public_ranks() -> Result<Ranks, String> {
    let encoding = tiktoken_rs::cl100k_base().map_err(|error| error.to_string())?;
    let token = |rank| encoding.decode_bytes(&[rank]);
    let ranks: Result<_, _> = (0..RANKS as u32).map(token).collect();
    ranks.map_err(|error| error.to_string())
}

/// The bytes that padded base64 stands for.
fn base64(text: &[u8]) -> Option<Vec<u8>> {
    let padding = text
        .iter()
        .rev()
        .take_while(|digit| **digit == b'=')
        .count();
    if text.is_empty() || !text.len().is_multiple_of(4) || padding > 2 {
        return None;
    }
    let digits = &text[..text.len() - padding];
    let (mut bits, mut held) = (0u32, 0);
    let mut bytes = Vec::with_capacity(digits.len() * 3 / 4);
    for digit in digits {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held) as u8);
            bits &= (1 << held) - 1;
        }
    }
    (bits == 0).then_some(bytes)
}

fn tokenizer_json(ranks: &Ranks) -> Result<Vec<u8>, String> {
    if ranks.len() != RANKS {
        return Err(format!(
            "it has {} ranks, and Phi-3-small's special tokens follow on {RANKS}",
            ranks.len()
        ));
    }
    let spelled = spelling();
    let spell =
        |bytes: &[u8]| -> String { bytes.iter().map(|b| spelled[usize::from(*b)]).collect() };
    let ids: HashMap<&[u8], usize> = ranks
        .iter()
        .enumerate()
        .map(|(rank, token)| (token.as_slice(), rank))
        .collect();
    if ids.len() != RANKS {
        return Err("two of its ranks have the same bytes".to_owned());
    }
    if let Some(byte) = (0..=u8::MAX).find(|byte| !ids.contains_key(&[*byte][..])) {
        return Err(format!("no rank is the byte {byte:#04x} alone"));
    }
    let vocab: Map<_, _> = ranks
        .iter()
        .enumerate()
        .map(|(rank, token)| (spell(token), json!(rank)))
        .collect();
    let mut merges = Vec::with_capacity(RANKS - 256);
    for (rank, token) in ranks.iter().enumerate() {
        if token.len() > 1 {
            let middle = parts_of(token, rank, &ids)
                .ok_or_else(|| format!("no merge of lower ranks makes the token of rank {rank}"))?;
            let (left, right) = token.split_at(middle);
            merges.push(Value::String(format!("{} {}", spell(left), spell(right))));
        }
    }
    let added: Vec<_> = (RANKS..VOCAB_SIZE)
        .map(|id| {
            json!({"id": id, "content": special_token(id), "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null, "pre_tokenizer": cl100k_pre_tokenizer(), "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": false},
        // A word that is a token is that token, whatever the merges would make of it.
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "fuse_unk": false,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "byte_fallback": false,
            "ignore_merges": true, "vocab": vocab, "merges": merges},
    });
    Ok(json.to_string().into_bytes())
}

/// Where the bytes of a token part into the two tokens that its merge joins: joining by the ranks
/// below its own ends there.
fn parts_of(token: &[u8], rank: usize, ids: &HashMap<&[u8], usize>) -> Option<usize> {
    let joined = |start: usize, end: usize| {
        let found = ids.get(&token[start..end]).copied();
        found.filter(|found| *found < rank).unwrap_or(usize::MAX)
    };
    // Where the parts begin, each with the rank of it and the next one joined.
    let mut parts: Vec<(usize, usize)> = (0..token.len() - 1)
        .map(|start| (start, joined(start, start + 2)))
        .chain([(token.len() - 1, usize::MAX)])
        .collect();
    while parts.len() > 2 {
        let (idx, lowest) = parts
            .iter()
            .enumerate()
            .min_by_key(|(_, (_, rank))| *rank)
            .map(|(idx, (_, rank))| (idx, *rank))?;
        if lowest == usize::MAX {
            return None;
        }
        parts.remove(idx + 1);
        let end_of = |idx: usize| parts.get(idx + 1).map_or(token.len(), |(start, _)| *start);
        let rank_of = |idx: usize| match idx + 1 < parts.len() {
            true => joined(parts[idx].0, end_of(idx + 1)),
            false => usize::MAX,
        };
        let (own, before) = (rank_of(idx), idx.checked_sub(1).map(rank_of));
        parts[idx].1 = own;
        if let Some(before) = before {
            parts[idx - 1].1 = before;
        }
    }
    parts.get(1).map(|(start, _)| *start)
}

/// GPT-2's stand-in character of each byte: printable bytes stand for themselves, the others take
/// the characters from U+0100 on in turn.
fn spelling() -> [char; 256] {
    let mut others = '\u{100}'..;
    std::array::from_fn(|byte| match byte as u8 {
        byte @ (b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF) => char::from(byte),
        _ => others.next().unwrap_or('\u{100}'),
    })
}

fn special_token(id: usize) -> String {
    if let Some((_, name)) = SPECIAL.iter().find(|(special, _)| *special == id) {
        return (*name).to_owned();
    }
    let listed = DUMMIES.iter().find(|(dummy, _)| *dummy == id);
    let number = match listed {
        Some((_, number)) => *number,
        // 3 to 11 stand before `<|endofprompt|>`, the others behind it.
        None if id < 100_276 => id - 100_267 + 3,
        None => id - 100_277 + 12,
    };
    format!("<|dummy_id_{number}|>")
}

#[cfg(test)]
mod tests;
