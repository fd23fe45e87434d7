//! What a template may use up. It comes from a downloaded repository and is run as it is.
//!
//! The engine counts instructions and depth. Three things it does not count are added here:
//! text written (also into a captured block), strings and lists that double through `~`, `+` or a
//! filter (checked by filters that [`super::guard`] puts in), and filter arguments that ask for
//! huge repetitions.

use std::sync::atomic::{AtomicUsize, Ordering};

use minijinja::value::{Object, Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value, filters};

use super::python;

/// Longest template, in bytes.
pub(super) const MAX_SOURCE: usize = 1 << 20;
/// Longest rendering, and longest string on the way to it, in bytes.
pub(super) const MAX_TEXT: usize = 16 << 20;
/// Longest list.
const MAX_ITEMS: usize = 1 << 20;
/// Bytes that all guarded strings of one rendering may have together.
const MAX_TOTAL: usize = 512 << 20;
/// Largest number that a filter takes as a width or count.
pub(super) const MAX_NUMBER: usize = 10_000;
/// Instructions of one rendering: real templates use some hundred for each message.
const MAX_INSTRUCTIONS: usize = 1_000_000;
/// Bytes of literal text that all instructions together could write into a captured block.
const MAX_LITERAL: usize = 512 << 20;
/// Nested calls of macros and loops.
const MAX_RECURSION: usize = 150;

/// Name of the checking filter.
pub(super) const GUARD: &str = "__guard";
/// Name of the filter that also turns its value into text.
pub(super) const TEXT: &str = "__text";

/// Marks an error of this module, so that it is told apart from the engine's.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Exceeded(pub(super) String);

/// The error for a limit of that name.
pub(super) fn exceeded(limit: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, "limit exceeded").with_source(Exceeded(limit))
}

/// Whether a text of `len` bytes is still allowed.
pub(super) fn check_len(len: usize) -> Result<(), Error> {
    if len > MAX_TEXT {
        return Err(exceeded(format!("{MAX_TEXT} bytes of text")));
    }
    Ok(())
}

/// Whether a value, with everything in it, is of reasonable size.
pub(super) fn check_nested(value: &Value) -> Result<(), Error> {
    fn visit(value: &Value, left: &mut usize, depth: usize) -> Result<(), Error> {
        *left = left
            .checked_sub(1)
            .ok_or_else(|| exceeded(format!("{MAX_ITEMS} items")))?;
        if depth > 64 {
            return Err(exceeded("64 nested values".to_owned()));
        }
        match value.kind() {
            ValueKind::Seq | ValueKind::Iterable => {
                for item in value.try_iter()? {
                    visit(&item, left, depth + 1)?;
                }
            }
            ValueKind::Map => {
                for key in value.try_iter()? {
                    visit(&value.get_item(&key)?, left, depth + 1)?;
                }
            }
            _ => {}
        }
        Ok(())
    }
    visit(value, &mut MAX_ITEMS.clone(), 0)
}

/// Sets all limits of `env` for templates whose longest stretch of literal text is `literal` bytes.
pub(super) fn install(env: &mut Environment<'static>, literal: usize) {
    env.set_recursion_limit(MAX_RECURSION);
    env.set_fuel(u64::try_from(instructions(literal)).ok());
    env.set_formatter(|out: &mut Output, state: &State, value: &Value| {
        let text = python::to_str(value)?;
        let written = &budget(state).written;
        check_len(
            text.len()
                .saturating_add(written.fetch_add(text.len(), Ordering::Relaxed)),
        )?;
        out.write_str(&text)
            .map_err(|_| Error::from(ErrorKind::WriteFailure))
    });
    env.add_filter(GUARD, guard);
    env.add_filter(TEXT, text);
    env.add_filter("string", python::to_str);
    macro_rules! checked {
        ($($name:literal => $filter:path),*) => {$(
            env.add_filter(concat!("__", $name), $filter);
            env.add_filter($name, |state: &State, args: Rest<Value>| {
                check_arguments($name, &args)?;
                state.apply_filter(concat!("__", $name), &args)
            });
        )*};
    }
    checked! {
        "batch" => filters::batch,
        "slice" => filters::slice,
        "indent" => filters::indent,
        "format" => filters::format,
        "join" => filters::join
    }
    // Jinja's text filters take any value as the text that Python makes of it.
    macro_rules! of_text {
        ($($name:literal => $filter:path),*) => {$(
            env.add_filter(concat!("__", $name), $filter);
            env.add_filter($name, |state: &State, args: Rest<Value>| {
                let mut args = args.to_vec();
                if let Some(value) = args.first_mut() {
                    *value = text(state, value.clone())?;
                }
                check_arguments($name, &args)?;
                state.apply_filter(concat!("__", $name), &args)
            });
        )*};
    }
    of_text! {
        "replace" => filters::replace,
        "trim" => filters::trim,
        "upper" => filters::upper,
        "lower" => filters::lower,
        "title" => filters::title,
        "capitalize" => filters::capitalize
    }
}

/// Instructions that a template may run when its longest literal text has `literal` bytes.
pub(super) fn instructions(literal: usize) -> usize {
    MAX_INSTRUCTIONS.min(MAX_LITERAL / literal.max(1))
}

/// The `unknown_method_callback` of the Python methods, with checked arguments.
pub(super) fn method(
    state: &State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    guard(state, value.clone())?;
    let mut all = vec![value.clone()];
    all.extend_from_slice(args);
    if method == "join" {
        all.swap(0, 1.min(args.len()));
    }
    check_arguments(method, &all)?;
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

/// What one rendering has used.
#[derive(Debug, Default)]
struct Budget {
    written: AtomicUsize,
    guarded: AtomicUsize,
}

impl Object for Budget {}

fn budget(state: &State) -> std::sync::Arc<Budget> {
    state.get_or_set_temp_object("__budget", Budget::default)
}

/// The checking filter: gives its value back unless it has grown too large.
fn guard(state: &State, value: Value) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        check_len(text.len())?;
        let before = budget(state)
            .guarded
            .fetch_add(text.len(), Ordering::Relaxed);
        if before.saturating_add(text.len()) > MAX_TOTAL {
            return Err(exceeded(format!("{MAX_TOTAL} bytes of strings")));
        }
    } else if matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable)
        && value.len().is_some_and(|len| len > MAX_ITEMS)
    {
        return Err(exceeded(format!("{MAX_ITEMS} items")));
    }
    Ok(value)
}

/// As [`guard`], and gives text: Python's for anything that is not a string.
fn text(state: &State, value: Value) -> Result<Value, Error> {
    match value.as_str() {
        Some(_) => guard(state, value),
        None => guard(state, Value::from(python::to_str(&value)?)),
    }
}

/// Refuses arguments (the value itself first) that make a filter or method write without bound.
fn check_arguments(name: &str, args: &[Value]) -> Result<(), Error> {
    let len = |value: Option<&Value>| value.and_then(Value::as_str).map_or(0, str::len);
    for arg in args.iter().skip(1) {
        let values: Vec<Value> = match arg.kind() {
            // Keyword arguments come as a map.
            ValueKind::Map => arg
                .try_iter()?
                .map(|key| arg.get_item(&key))
                .collect::<Result<_, _>>()?,
            _ => vec![arg.clone()],
        };
        let too_large = |value: &Value| value.as_usize().is_some_and(|count| count > MAX_NUMBER);
        if values.iter().any(too_large) {
            return Err(exceeded(format!("{MAX_NUMBER} as a width or count")));
        }
    }
    match name {
        "replace" => {
            let (text, from, to) = (len(args.first()), len(args.get(1)), len(args.get(2)));
            let hits = match from {
                0 => text + 1,
                _ => text / from,
            };
            check_len(text.saturating_add(hits.saturating_mul(to)))
        }
        "join" => {
            let Some(items) = args.first().and_then(|items| items.try_iter().ok()) else {
                return Ok(());
            };
            let separator = len(args.get(1));
            let mut total = 0usize;
            for item in items {
                total = total.saturating_add(len(Some(&item)) + separator + 1);
                check_len(total)?;
            }
            Ok(())
        }
        "format" => {
            let text = args.first().and_then(Value::as_str).unwrap_or_default();
            let wide = text
                .split(|char: char| !char.is_ascii_digit())
                .any(|digits| digits.len() > 4);
            if wide {
                return Err(exceeded(format!("{MAX_NUMBER} as a width")));
            }
            let total = args.iter().map(|arg| len(Some(arg))).sum::<usize>();
            // `{0}{0}` may use an argument again and again.
            check_len(total.saturating_mul(text.matches(['%', '{']).count().max(1)))
        }
        _ => Ok(()),
    }
}
