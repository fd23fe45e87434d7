//! stdout for answers, stderr for the rest, and what the exit code says.

use std::io::{ErrorKind, IsTerminal, Write};
use std::sync::LazyLock;

use phi3::text::Usage;
use tracing_subscriber::EnvFilter;

/// A command line or environment variable that means nothing: the exit code says so.
#[derive(Debug)]
pub struct UsageError(pub String);

impl std::fmt::Display for UsageError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UsageError {}

/// What keeping within --memory-budget took, for people.
pub fn memory_line(counters: &phi3::hub::Counters) -> String {
    let gigabytes = |bytes: u64| bytes as f64 / 1e9;
    format!(
        "experts: {} in memory when chosen, {} read from disk ({:.2} GB), {} let go; {:.2} of {:.2} \
         GB in memory",
        counters.hits,
        counters.misses,
        gigabytes(counters.bytes_read),
        counters.dropped,
        gigabytes(counters.resident_bytes),
        gigabytes(counters.group_bytes),
    )
}

/// Messages on stderr: warnings, or what `-v` and `PHI3_LOG` ask for.
pub fn start_logging(verbose: u8) -> anyhow::Result<()> {
    let level = match verbose {
        0 => "warn",
        1 => "info",
        _ => "debug",
    };
    let filter = match std::env::var("PHI3_LOG") {
        Ok(directives) if !directives.is_empty() => {
            EnvFilter::try_new(&directives).map_err(|error| {
                UsageError(format!(
                    "environment variable PHI3_LOG: expected a level (error, warn, info, debug, \
                     trace) or module=level pairs, found {directives:?} ({error})"
                ))
            })?
        }
        _ => EnvFilter::new(format!("{level},tokenizers=error,ureq=warn,rustls=warn")),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none())
        .with_target(false)
        .without_time()
        .init();
    Ok(())
}

/// Writes an answer to stdout at once; a reader that has gone away ends the program quietly.
pub fn print_bytes(bytes: &[u8]) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => Err(anyhow::Error::new(error).context("writing to stdout")),
        Ok(()) => Ok(()),
    }
}

/// [`print_bytes`] of text.
pub fn print(text: &str) -> anyhow::Result<()> {
    print_bytes(text.as_bytes())
}

/// Writes a piece of an answer. What a model says must not steer the terminal: there, characters
/// that would are shown as `�`. A file or pipe gets them as they are.
pub fn answer(piece: &str) -> anyhow::Result<()> {
    static TERMINAL: LazyLock<bool> = LazyLock::new(|| std::io::stdout().is_terminal());
    match *TERMINAL {
        true => print(&without_controls(piece)),
        false => print(piece),
    }
}

fn without_controls(text: &str) -> String {
    let shown = |c: char| match c {
        '\n' | '\t' => c,
        c if c.is_control() => char::REPLACEMENT_CHARACTER,
        c => c,
    };
    text.chars().map(shown).collect()
}

/// A line for the user on stderr. Nobody reading it is no reason to fail.
pub fn note(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Tokens and their times in one line.
pub fn usage_line(usage: &Usage) -> String {
    let computed = usage.prompt_tokens - usage.cached_tokens.min(usage.prompt_tokens);
    let prefill = usage.prefill_time.as_secs_f64();
    let cached = match usage.cached_tokens {
        0 => String::new(),
        cached => format!(" ({cached} cached)"),
    };
    let first = match prefill > 0.0 {
        true => format!(
            " in {prefill:.2} s, {:.1} tokens/s",
            computed as f64 / prefill
        ),
        false => String::new(),
    };
    let decode = match usage.tokens_per_second() {
        Some(speed) => format!(
            " in {:.2} s, {speed:.1} tokens/s",
            usage.decode_time.as_secs_f64()
        ),
        None => String::new(),
    };
    format!(
        "prompt {} tokens{cached}{first}; answer {} tokens{decode}",
        usage.prompt_tokens, usage.completion_tokens,
    )
}

/// The error and its causes, one a line.
pub fn report(error: &anyhow::Error) {
    let mut causes: Vec<String> = Vec::new();
    for cause in error.chain() {
        let text = cause.to_string();
        // Transparent wrappers repeat the message of what they wrap.
        if causes.last().is_none_or(|last| !last.contains(&text)) {
            causes.push(text);
        }
    }
    let mut lines = causes.iter();
    if let Some(first) = lines.next() {
        note(&format!("error: {first}"));
    }
    for cause in lines {
        note(&format!("  because: {cause}"));
    }
    let too_long = |cause: &(dyn std::error::Error + 'static)| {
        let text = match cause.downcast_ref::<phi3::Error>() {
            Some(phi3::Error::Text(text)) => Some(text.as_ref()),
            _ => cause.downcast_ref::<phi3::text::Error>(),
        };
        matches!(text, Some(phi3::text::Error::PromptTooLong { .. }))
    };
    if error.chain().any(too_long) {
        note("  what helps: a shorter prompt, or --extend-context");
    }
}

/// 2 for wrong usage, 3 where the model's files could not be had, 1 for anything else.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    use phi3::hub::Error::{Hub, MissingFile, NoSuchPath, NotAModel, WrongKindOfFile};
    if error.chain().any(|cause| cause.is::<UsageError>()) {
        return 2;
    }
    let no_model = error.chain().any(|cause| {
        let facade = cause.downcast_ref::<phi3::Error>();
        let hub = match facade {
            Some(phi3::Error::Hub(hub)) => Some(hub.as_ref()),
            _ => cause.downcast_ref::<phi3::hub::Error>(),
        };
        matches!(
            hub,
            Some(
                NoSuchPath { .. }
                    | NotAModel { .. }
                    | WrongKindOfFile { .. }
                    | MissingFile { .. }
                    | Hub(_)
            )
        )
    });
    if no_model { 3 } else { 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_cannot_steer_the_terminal() {
        let title = "\u{1b}]0;owned\u{7}\u{9b}2J\rabc\tä\n";
        assert_eq!(without_controls(title), "�]0;owned��2J�abc\tä\n");
    }
}
