//! Text out of a stream of ids, piece by piece.
//!
//! Decoding token by token goes wrong in three ways: the space at the start of a word is lost
//! (SentencePiece strips the first one of a *text*, not of a token), a character split over
//! several tokens comes out as U+FFFD, and a run of byte tokens is judged before it is complete.
//! [`DecodeStream`] withholds what the next token could still change and nothing else, so that the
//! pieces put together are exactly what [`Tokenizer::decode`] gives for all ids.
//!
//! The two decoders of the Phi family (byte-level BPE; SentencePiece with byte fallback) run here
//! token by token with work proportional to the token. Any other decoder runs on a short window of
//! ids.

use serde_json::Value;
use tokenizers::DecoderWrapper;

use crate::error::Result;
use crate::tokenizer::Tokenizer;

/// Decodes ids as they come.
///
/// ```
/// # fn main() -> phi3_text::Result<()> {
/// # use phi3_text::{DecodeStream, Tokenizer};
/// # let json = br#"{"model": {"type": "BPE", "vocab": {"\u00c3": 0, "\u00a9": 1, "a": 2}, "merges": []},
/// #   "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}}"#;
/// # let tokenizer = Tokenizer::from_json(json, None)?;
/// let mut stream = DecodeStream::new(&tokenizer, true);
/// assert_eq!(stream.push(2)?, "a");
/// assert_eq!(stream.push(0)?, ""); // the first half of é
/// assert_eq!(stream.push(1)?, "é");
/// assert_eq!(stream.finish()?, "");
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct DecodeStream<'t> {
    tokenizer: &'t Tokenizer,
    skip_special: bool,
    state: State,
}

impl<'t> DecodeStream<'t> {
    /// A stream at the start of a text: a SentencePiece tokenizer's first space is dropped, as
    /// [`Tokenizer::decode`] does.
    pub fn new(tokenizer: &'t Tokenizer, skip_special: bool) -> Self {
        Self {
            tokenizer,
            skip_special,
            state: State::new(tokenizer.plan()),
        }
    }

    /// A stream that goes on behind `prompt`: the first space is kept, so that the prompt's text
    /// and the streamed text put together read as one.
    pub fn continuing(tokenizer: &'t Tokenizer, skip_special: bool, prompt: &[u32]) -> Self {
        let mut stream = Self::new(tokenizer, skip_special);
        let mut last: Vec<u32> = prompt
            .iter()
            .rev()
            .copied()
            .filter(|&id| stream.visible(id).is_some())
            .take(CONTEXT)
            .collect();
        last.reverse();
        match &mut stream.state {
            State::Bytes { .. } => {}
            State::Pieces { strip, .. } => {
                if !last.is_empty() {
                    *strip = 0;
                }
            }
            State::Window { context, .. } => *context = last,
        }
        stream
    }

    /// Takes the next id and gives the text that no later id can change.
    ///
    /// # Errors
    /// [`crate::Error::Decode`] if the decoder of `tokenizer.json` fails.
    pub fn push(&mut self, id: u32) -> Result<String> {
        let Some(token) = self.visible(id) else {
            return Ok(String::new());
        };
        match (&mut self.state, self.tokenizer.plan()) {
            (State::Bytes { held }, _) => {
                held.extend_from_slice(&byte_level_bytes(&token));
                Ok(take_decided(held))
            }
            (State::Pieces { run, strip }, DecoderPlan::Pieces(pieces)) => {
                if let Some(byte) = pieces.byte_of(&token) {
                    run.push(byte);
                    return Ok(String::new());
                }
                let mut text = byte_run(run);
                text.push_str(&pieces.text_of(token));
                Ok(strip_first(text, strip, pieces.strip.map(|(char, _)| char)))
            }
            (State::Window { context, pending }, _) => {
                pending.push(id);
                let force = pending.len() >= PENDING;
                window_text(self.tokenizer, self.skip_special, context, pending, force)
            }
            // A stream's state is made from its tokenizer's plan.
            (State::Pieces { .. }, _) => Ok(String::new()),
        }
    }

    /// The text withheld so far, as it decodes when no further id comes: an incomplete character
    /// becomes U+FFFD.
    ///
    /// # Errors
    /// As [`DecodeStream::push`].
    pub fn finish(&mut self) -> Result<String> {
        match (&mut self.state, self.tokenizer.plan()) {
            (State::Bytes { held }, _) => {
                Ok(String::from_utf8_lossy(&std::mem::take(held)).into_owned())
            }
            (State::Pieces { run, strip }, DecoderPlan::Pieces(pieces)) => {
                let text = byte_run(run);
                Ok(strip_first(text, strip, pieces.strip.map(|(char, _)| char)))
            }
            (State::Window { context, pending }, _) => {
                window_text(self.tokenizer, self.skip_special, context, pending, true)
            }
            (State::Pieces { .. }, _) => Ok(String::new()),
        }
    }

    /// The token of `id`, if it takes part in the text.
    fn visible(&self, id: u32) -> Option<String> {
        if self.skip_special && self.tokenizer.is_special(id) {
            return None;
        }
        self.tokenizer.id_to_token(id)
    }
}

#[derive(Debug)]
enum State {
    /// Byte-level: bytes of an incomplete character, at most 3.
    Bytes { held: Vec<u8> },
    /// SentencePiece: the byte tokens since the last other token, and how many leading characters
    /// may still be stripped.
    Pieces { run: Vec<u8>, strip: usize },
    /// Any other decoder: ids whose text is out, kept as context, and ids whose text is not.
    Window {
        context: Vec<u32>,
        pending: Vec<u32>,
    },
}

impl State {
    fn new(plan: &DecoderPlan) -> Self {
        match plan {
            DecoderPlan::ByteLevel => Self::Bytes { held: Vec::new() },
            DecoderPlan::Pieces(pieces) => Self::Pieces {
                run: Vec::new(),
                strip: pieces.strip.map_or(0, |(_, count)| count),
            },
            DecoderPlan::Other => Self::Window {
                context: Vec::new(),
                pending: Vec::new(),
            },
        }
    }
}

/// How a tokenizer's decoder can be run token by token.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum DecoderPlan {
    /// Every character of a token is one byte of the text.
    ByteLevel,
    /// Tokens are pieces of text, or single bytes.
    Pieces(Pieces),
    /// Something else.
    Other,
}

impl DecoderPlan {
    pub(crate) fn new(decoder: Option<&DecoderWrapper>) -> Self {
        let Some(Ok(decoder)) = decoder.map(serde_json::to_value) else {
            return Self::Other;
        };
        if kind(&decoder) == "ByteLevel" {
            return Self::ByteLevel;
        }
        let steps = match decoder.get("decoders").and_then(Value::as_array) {
            Some(steps) => steps.as_slice(),
            None => std::slice::from_ref(&decoder),
        };
        match Pieces::new(steps) {
            Some(pieces) => Self::Pieces(pieces),
            None => Self::Other,
        }
    }
}

/// SentencePiece's decoder: replacements, byte fallback, and a strip at the start of the text.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Pieces {
    replace: Vec<(String, String)>,
    byte_fallback: bool,
    strip: Option<(char, usize)>,
}

impl Pieces {
    /// `None` if the steps are others than these, or in another order.
    fn new(steps: &[Value]) -> Option<Self> {
        let mut pieces = Self::default();
        let mut fused = false;
        for step in steps {
            match kind(step) {
                "Replace" if !pieces.byte_fallback && !fused => {
                    let from = step.get("pattern")?.get("String")?.as_str()?;
                    let to = step.get("content")?.as_str()?;
                    pieces.replace.push((from.to_owned(), to.to_owned()));
                }
                "ByteFallback" if !fused => pieces.byte_fallback = true,
                "Fuse" => fused = true,
                "Strip" if fused && pieces.strip.is_none() => {
                    if step.get("stop")?.as_u64()? != 0 {
                        return None;
                    }
                    let char = step.get("content")?.as_str()?.chars().next()?;
                    let count = usize::try_from(step.get("start")?.as_u64()?).ok()?;
                    pieces.strip = Some((char, count));
                }
                _ => return None,
            }
        }
        Some(pieces)
    }

    /// The byte that a token like `<0x0A>` stands for.
    fn byte_of(&self, token: &str) -> Option<u8> {
        if !self.byte_fallback || token.len() != 6 {
            return None;
        }
        let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
        u8::from_str_radix(digits, 16).ok()
    }

    fn text_of(&self, token: String) -> String {
        self.replace
            .iter()
            .fold(token, |text, (from, to)| text.replace(from.as_str(), to))
    }
}

fn kind(step: &Value) -> &str {
    step.get("type").and_then(Value::as_str).unwrap_or_default()
}

/// A run of byte tokens as the byte fallback decoder judges it: as a whole it is UTF-8, or every
/// byte of it becomes U+FFFD. Hence the whole run is withheld until another token ends it.
fn byte_run(run: &mut Vec<u8>) -> String {
    let bytes = std::mem::take(run);
    String::from_utf8(bytes).unwrap_or_else(|error| "\u{FFFD}".repeat(error.into_bytes().len()))
}

/// Strips up to `left` characters `char` from the start of the text; the first other character
/// ends the stripping for good.
fn strip_first(mut text: String, left: &mut usize, char: Option<char>) -> String {
    while *left > 0 {
        match text.chars().next() {
            None => break,
            Some(first) if Some(first) == char => {
                text.remove(0);
                *left -= 1;
            }
            Some(_) => *left = 0,
        }
    }
    text
}

/// The bytes of a byte-level token: each character stands for one byte (printable ones for
/// themselves, the others shifted behind U+0100 in order). A token with any other character is
/// taken as the text it is.
fn byte_level_bytes(token: &str) -> Vec<u8> {
    token
        .chars()
        .map(byte_level_byte)
        .collect::<Option<Vec<u8>>>()
        .unwrap_or_else(|| token.as_bytes().to_vec())
}

fn byte_level_byte(char: char) -> Option<u8> {
    let code = u32::from(char);
    let byte = match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => code,
        0x100..=0x120 => code - 0x100,
        0x121..=0x142 => code - 0x121 + 0x7F,
        0x143 => 0xAD,
        _ => return None,
    };
    u8::try_from(byte).ok()
}

/// Takes from `held` what is decided: everything but the start of a character at the end.
fn take_decided(held: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut rest = held.as_slice();
    loop {
        match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                rest = &[];
                break;
            }
            Err(error) => {
                let (valid, tail) = rest.split_at(error.valid_up_to());
                text.push_str(&String::from_utf8_lossy(valid));
                match error.error_len() {
                    Some(len) => {
                        text.push('\u{FFFD}');
                        rest = tail.get(len..).unwrap_or_default();
                    }
                    None => {
                        rest = tail;
                        break;
                    }
                }
            }
        }
    }
    *held = rest.to_vec();
    text
}

/// Ids of settled text that a window decoder sees before the new ones.
const CONTEXT: usize = 8;
/// Ids that a window decoder withholds at most while their text ends in U+FFFD.
const PENDING: usize = 16;

fn window_text(
    tokenizer: &Tokenizer,
    skip_special: bool,
    context: &mut Vec<u32>,
    pending: &mut Vec<u32>,
    force: bool,
) -> Result<String> {
    let before = tokenizer.decode(context, skip_special)?;
    let context_len = context.len();
    context.append(pending);
    let text = tokenizer.decode(context, skip_special)?;
    if text.ends_with('\u{FFFD}') && !force {
        *pending = context.split_off(context_len);
        return Ok(String::new());
    }
    keep_last(context, CONTEXT);
    let common = before
        .char_indices()
        .zip(text.chars())
        .find(|((_, a), b)| a != b)
        .map_or(before.len().min(text.len()), |((at, _), _)| at);
    Ok(text.get(common..).unwrap_or_default().to_owned())
}

fn keep_last(ids: &mut Vec<u32>, count: usize) {
    ids.drain(..ids.len().saturating_sub(count));
}

#[cfg(test)]
mod tests;
