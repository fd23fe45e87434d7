//! Puts checks into a template's source.
//!
//! The engine has no hook for its operators, but every value passes a filter if one is written
//! behind it. So each tag is read, and the checking filter comes before every `~`, `+` and `*` and
//! in front of every other filter. The operands of `~` also become text as Python writes it. Lines
//! stay as they are, so that errors name the right one.

use super::limits::{GUARD, TEXT};

/// A template source with the checking filter put in.
pub(super) struct Guarded {
    pub(super) source: String,
    /// Longest stretch of text outside tags, in bytes.
    pub(super) literal: usize,
}

/// Puts the checking filter into a template, and makes transformers' `{% generation %}` blocks,
/// which only mark text for training, plain blocks.
pub(super) fn guard_source(source: &str) -> Guarded {
    let mut out = String::with_capacity(source.len() * 2);
    // The longest stretch of literal text, and the current one: only a tag ends it for certain.
    let (mut literal, mut stretch) = (0, 0);
    let mut rest = source;
    while let Some(start) = rest.find('{') {
        let (text, tag) = rest.split_at(start);
        stretch += text.len();
        literal = literal.max(stretch);
        out.push_str(text);
        let close = match tag.as_bytes().get(1) {
            Some(b'{') => "}}",
            Some(b'%') => "%}",
            Some(b'#') => "#}",
            _ => {
                stretch += 1;
                out.push('{');
                rest = tag.get(1..).unwrap_or_default();
                continue;
            }
        };
        if close == "#}" {
            let end = tag.find(close).map_or(tag.len(), |at| at + 2);
            let (comment, behind) = tag.split_at(end);
            out.push_str(comment);
            rest = behind;
            continue;
        }
        let end = expression_end(tag, close);
        let (tag, behind) = tag.split_at(end);
        rest = behind;
        let inner = tag
            .get(2..)
            .and_then(|tag| tag.strip_suffix(close))
            .unwrap_or_default();
        let word = inner.trim_matches(['-', '+']).trim();
        if close == "%}" && word == "raw" {
            // Up to its end a raw block is text.
            let end = raw_end(rest);
            let (raw, behind) = rest.split_at(end);
            stretch += raw.len();
            literal = literal.max(stretch);
            out.push_str(tag);
            out.push_str(raw);
            rest = behind;
            continue;
        }
        if word != "endraw" {
            stretch = 0;
        }
        match word {
            "generation" if close == "%}" => out.push_str(&tag.replace(word, "if true")),
            "endgeneration" if close == "%}" => out.push_str(&tag.replace(word, "endif")),
            _ => guard_expression(tag, close, &mut out),
        }
    }
    literal = literal.max(stretch + rest.len());
    out.push_str(rest);
    Guarded {
        source: out,
        literal,
    }
}

/// Where the tag that `text` starts with ends, string literals skipped.
fn expression_end(text: &str, close: &str) -> usize {
    let bytes = text.as_bytes();
    let mut at = 2;
    while at < bytes.len() {
        match bytes.get(at) {
            Some(&quote @ (b'"' | b'\'')) => at = string_end(bytes, at, quote),
            _ if bytes
                .get(at..)
                .is_some_and(|rest| rest.starts_with(close.as_bytes())) =>
            {
                return at + 2;
            }
            _ => at += 1,
        }
    }
    bytes.len()
}

fn string_end(bytes: &[u8], start: usize, quote: u8) -> usize {
    let mut at = start + 1;
    while let Some(&byte) = bytes.get(at) {
        match byte {
            b'\\' => at += 2,
            _ if byte == quote => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

/// Where the `{% endraw %}` of a raw block starts.
fn raw_end(text: &str) -> usize {
    let mut from = 0;
    while let Some(found) = text.get(from..).and_then(|rest| rest.find("{%")) {
        let at = from + found;
        let tag = text.get(at + 2..).unwrap_or_default();
        if tag
            .trim_start_matches(['-', '+'])
            .trim_start()
            .starts_with("endraw")
        {
            return at;
        }
        from = at + 2;
    }
    text.len()
}

/// What is known of an expression at one level of brackets.
#[derive(Clone, Copy, Default)]
struct Level {
    /// The current operand has an operator that binds tighter than `~`: a filter written behind it
    /// would take only its last part.
    tight: bool,
    /// The current operand stands behind a `~`.
    concatenated: bool,
}

/// Copies a tag with the filters put in.
fn guard_expression(tag: &str, close: &str, out: &mut String) {
    let bytes = tag.as_bytes();
    let end = tag.len() - if tag.ends_with(close) { 2 } else { 0 };
    let mut outer: Vec<Level> = Vec::new();
    let mut level = Level::default();
    // Whether what came last is a whole operand, and whether the last word was `is` or `is not`,
    // behind which a name is a test and takes no filter.
    let (mut operand, mut test) = (false, false);
    let mut at = 2.min(end);
    out.push_str(tag.get(..at).unwrap_or_default());
    while let Some(&byte) = bytes.get(at).filter(|_| at < end) {
        let start = at;
        at += 1;
        match byte {
            b'"' | b'\'' => {
                at = string_end(bytes, start, byte);
                (operand, test) = (true, false);
            }
            b'a'..=b'z' | b'A'..=b'Z' | b'_' | b'0'..=b'9' | 0x80.. => {
                while bytes.get(at).is_some_and(|byte| {
                    byte.is_ascii_alphanumeric() || *byte == b'_' || *byte >= 0x80
                }) {
                    at += 1;
                }
                let word = tag.get(start..at).unwrap_or_default();
                let is_keyword = matches!(word, "and" | "or" | "not" | "in" | "is" | "if" | "else");
                if word == "is" {
                    // A test binds as tightly as a filter does.
                    level.tight = true;
                } else if operand || is_keyword {
                    end_operand(&mut level, operand, out);
                }
                operand = !is_keyword && !test;
                test = word == "is" || (test && word == "not");
            }
            b'(' | b'[' | b'{' => {
                outer.push(std::mem::take(&mut level));
                (operand, test) = (false, false);
            }
            b')' | b']' | b'}' => {
                end_operand(&mut level, operand, out);
                level = outer.pop().unwrap_or_default();
                (operand, test) = (true, false);
            }
            b'|' => {
                out.push_str(&format!("|{GUARD}"));
                operand = false;
            }
            b'.' => operand = false,
            b'~' => {
                if operand && !level.tight {
                    out.push_str(&format!("|{TEXT} "));
                } else if operand {
                    out.push_str(&format!("|{GUARD} "));
                }
                level = Level {
                    tight: false,
                    concatenated: true,
                };
                operand = false;
            }
            b'*' | b'/' | b'%' => {
                if operand && byte == b'*' {
                    out.push_str(&format!("|{GUARD} "));
                }
                while bytes.get(at) == Some(&byte) {
                    at += 1;
                }
                level.tight = true;
                operand = false;
            }
            // White space control.
            b'-' | b'+' if at == end => end_operand(&mut level, operand, out),
            b'-' | b'+' if !operand => level.tight = true,
            b'+' => {
                end_operand(&mut level, operand, out);
                out.push_str(&format!("|{GUARD} "));
                operand = false;
            }
            _ if byte.is_ascii_whitespace() => {}
            _ => {
                end_operand(&mut level, operand, out);
                operand = false;
            }
        }
        out.push_str(tag.get(start..at.min(tag.len())).unwrap_or_default());
    }
    end_operand(&mut level, operand, out);
    out.push_str(tag.get(at.min(tag.len())..).unwrap_or_default());
}

/// The operand is complete: behind a `~` it becomes text.
fn end_operand(level: &mut Level, operand: bool, out: &mut String) {
    if operand && level.concatenated && !level.tight {
        out.push_str(&format!("|{TEXT} "));
    }
    *level = Level::default();
}
