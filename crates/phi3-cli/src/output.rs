//! stdout for answers, stderr for the rest, and what the exit code says.

use std::io::{ErrorKind, Write};

use phi3::text::Usage;
use tracing_subscriber::EnvFilter;

/// Messages on stderr: warnings, or what `-v` and `PHI3_LOG` ask for.
pub fn start_logging(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "info",
        _ => "debug",
    };
    let filter = EnvFilter::try_from_env("PHI3_LOG").unwrap_or_else(|_| {
        EnvFilter::new(format!("{level},tokenizers=error,ureq=warn,rustls=warn"))
    });
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .without_time()
        .init();
}

/// Writes an answer to stdout at once; a reader that has gone away ends the program quietly.
pub fn print_bytes(bytes: &[u8]) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        other => Ok(other?),
    }
}

/// [`print_bytes`] of text.
pub fn print(text: &str) -> anyhow::Result<()> {
    print_bytes(text.as_bytes())
}

/// Tokens and their times in one line.
pub fn usage_line(usage: &Usage) -> String {
    let computed = usage.prompt_tokens - usage.cached_tokens.min(usage.prompt_tokens);
    let prefill = usage.prefill_time.as_secs_f64();
    let per_second = |tokens: usize| tokens as f64 / prefill.max(1e-9);
    let decode = match usage.tokens_per_second() {
        Some(speed) => format!(", {speed:.1} tokens/s"),
        None => String::new(),
    };
    format!(
        "prompt {} tokens ({} cached) in {prefill:.2} s, {:.1} tokens/s; answer {} tokens{decode}",
        usage.prompt_tokens,
        usage.cached_tokens,
        per_second(computed),
        usage.completion_tokens,
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
        eprintln!("error: {first}");
    }
    for cause in lines {
        eprintln!("  because: {cause}");
    }
}

/// 3 where the model's files could not be had, 1 for anything else.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    let no_model = error.chain().any(|cause| {
        matches!(
            cause.downcast_ref::<phi3::hub::Error>(),
            Some(
                phi3::hub::Error::NoSuchPath { .. }
                    | phi3::hub::Error::NotAModel { .. }
                    | phi3::hub::Error::Hub(_)
            )
        )
    });
    if no_model { 3 } else { 1 }
}
