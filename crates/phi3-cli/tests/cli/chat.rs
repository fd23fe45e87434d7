//! `phi3 chat` over a pipe: a message a line.

use anyhow::{Context, Result, ensure};

use crate::support::{DONE, FAILED, Run, command, run_with};
use crate::tiny::{Tiny, WITHOUT_SYSTEM};

/// A conversation whose answers are short.
fn talk(tiny: &Tiny, flags: &[&str], lines: &str) -> Result<Run> {
    let flags = [&["--max-new-tokens", "12"], flags].concat();
    let run = run_with(lines.as_bytes(), &mut command(tiny.args("chat", &flags)))?;
    ensure!(run.code == Some(DONE), "{run:?}");
    Ok(run)
}

#[test]
fn commands() -> Result<()> {
    let tiny = Tiny::new()?;
    let one = talk(&tiny, &[], "hello\n")?.stdout;
    ensure!(one.len() > 1 && one.ends_with('\n'), "{one:?}");
    let two = talk(&tiny, &[], "hello\nhello\n")?.stdout;
    let second = two
        .strip_prefix(&one)
        .context("the first answer stays the same")?;
    ensure!(
        second != one,
        "the second answer does not know of the first"
    );

    let again = talk(&tiny, &[], "hello\n/reset\nhello\n")?;
    ensure!(again.stdout == format!("{one}{one}"), "{again:?}");
    ensure!(again.stderr.contains("starts anew"), "{again:?}");

    let set = talk(&tiny, &[], "/system be brief\nhello\n")?;
    ensure!(set.stderr.contains("system message set"), "{set:?}");
    let flag = talk(&tiny, &["--system", "be brief"], "hello\n")?.stdout;
    ensure!(set.stdout == flag && flag != one, "{set:?} {flag:?}");
    let kept = talk(&tiny, &["--system", "be brief"], "hello\n/reset\nhello\n")?.stdout;
    ensure!(
        kept == format!("{flag}{flag}"),
        "/reset keeps the system message: {kept:?}"
    );
    let removed = talk(&tiny, &["--system", "be brief"], "/system\nhello\n")?;
    ensure!(
        removed.stdout == one && removed.stderr.contains("no system message"),
        "{removed:?}"
    );

    let none = talk(&tiny, &[], "/help\n/nonsense\n\n   \n/exit\nhello\n")?;
    ensure!(none.stdout.is_empty(), "{none:?}");
    for word in [
        "/reset",
        "/system",
        "/stats",
        "/exit",
        "/nonsense is no command",
    ] {
        ensure!(none.stderr.contains(word), "{word}: {none:?}");
    }
    // Not every slash begins a command.
    let path = talk(&tiny, &[], "/etc/passwd is a file\n")?;
    ensure!(
        !path.stdout.is_empty() && !path.stderr.contains("command"),
        "{path:?}"
    );
    Ok(())
}

#[test]
fn the_first_message_may_be_a_flag() -> Result<()> {
    let tiny = Tiny::new()?;
    let typed = talk(&tiny, &[], "hello\nagain\n")?;
    let flag = talk(&tiny, &["--prompt", "hello"], "again")?;
    ensure!(typed.stdout == flag.stdout, "{typed:?} {flag:?}");
    ensure!(talk(&tiny, &[], "")?.stdout.is_empty());
    Ok(())
}

#[test]
fn statistics_on_request() -> Result<()> {
    let tiny = Tiny::new()?;
    let lines = "hello\n/stats\nhello\n/stats\nhello\n";
    let run = talk(&tiny, &[], lines)?;
    let stats: Vec<_> = run
        .stderr
        .lines()
        .filter(|line| line.contains("prompt"))
        .collect();
    ensure!(stats.len() == 1, "{run:?}");
    // The first turn is not computed again.
    ensure!(
        stats[0].contains("cached") && stats[0].contains("tokens/s"),
        "{run:?}"
    );
    ensure!(run.stderr.contains("tokens per second: on"), "{run:?}");
    ensure!(run.stderr.contains("tokens per second: off"), "{run:?}");
    ensure!(talk(&tiny, &[], "hello\nhello\nhello\n")?.stdout == run.stdout);
    Ok(())
}

#[test]
fn a_message_of_several_lines() -> Result<()> {
    let tiny = Tiny::new()?;
    let run = talk(&tiny, &["--stats"], "a\\\nb\n")?;
    // <|user|> \n a \n b <|end|> \n <|assistant|> \n
    ensure!(run.stderr.contains("prompt 9 tokens"), "{run:?}");
    let run = talk(&tiny, &["--stats"], "a\\\nb\\\n")?;
    ensure!(
        run.stderr.matches("prompt").count() == 1,
        "one message: {run:?}"
    );
    let crlf = talk(&tiny, &["--stats"], "a\r\n")?;
    ensure!(crlf.stderr.contains("prompt 7 tokens"), "{crlf:?}");
    Ok(())
}

#[test]
fn what_goes_wrong_with_a_message_does_not_end_the_conversation() -> Result<()> {
    let tiny = Tiny::new()?;
    let one = talk(&tiny, &[], "hello\n")?.stdout;
    let run = talk(&tiny, &[], "refuse me\nhello\n")?;
    ensure!(
        run.stdout == one && run.stderr.contains("no such talk"),
        "{run:?}"
    );
    let long = format!("{}\nhello\n", "xyz ".repeat(1100));
    let run = talk(&tiny, &[], &long)?;
    ensure!(run.stdout == one, "{run:?}");
    ensure!(
        run.stderr.contains("4406") || run.stderr.contains("4405"),
        "{run:?}"
    );
    ensure!(run.stderr.contains("/reset"), "{run:?}");
    Ok(())
}

#[test]
fn a_context_that_is_full_is_said() -> Result<()> {
    let tiny = Tiny::new()?;
    let text = "xyz ".repeat(1021);
    // <|user|> \n, 4 tokens a word but for the last space, <|end|> \n <|assistant|> \n: 5 are left.
    let run = talk(
        &tiny,
        &["--stats"],
        &format!("{text}\nhello\n/reset\nhello\n"),
    )?;
    ensure!(run.stderr.contains("the context is full"), "{run:?}");
    ensure!(run.stderr.contains("prompt 4089 tokens"), "{run:?}");
    ensure!(run.stderr.contains("must hold it"), "{run:?}");
    ensure!(
        run.stderr.contains("(/reset starts a new conversation)"),
        "{run:?}"
    );
    ensure!(
        run.stdout.ends_with(&talk(&tiny, &[], "hello\n")?.stdout),
        "{run:?}"
    );
    Ok(())
}

#[test]
fn an_answer_that_is_cut_is_said() -> Result<()> {
    let run = talk(&Tiny::new()?, &[], "hello\n")?;
    ensure!(run.stderr == "(cut at --max-new-tokens)\n", "{run:?}");
    Ok(())
}

#[test]
fn models_that_cannot_chat_or_hear() -> Result<()> {
    let plain = Tiny::with_template(None)?;
    run_with(b"hello\n", &mut command(plain.args("chat", &[])))?
        .says(FAILED, &["no chat template", "continue a text"])?;
    let deaf = Tiny::with_template(Some(WITHOUT_SYSTEM))?;
    let run = talk(&deaf, &[], "/system be brief\n")?;
    ensure!(run.stderr.contains("ignores system messages"), "{run:?}");
    let broken = Tiny::with_template(Some("{% for %}"))?;
    run_with(b"hello\n", &mut command(broken.args("chat", &[])))?
        .says(FAILED, &["chat template", "line 1"])?;
    let tiny = Tiny::new()?;
    let args = tiny.args("chat", &["--top-p", "7"]);
    run_with(b"hello\n", &mut command(args))?.says(FAILED, &["top_p", "7"])
}

#[test]
fn a_piped_conversation_leaves_no_history() -> Result<()> {
    let tiny = Tiny::new()?;
    let history = tiny.file("history");
    let history = history.display().to_string();
    talk(&tiny, &["--history", &history], "hello\n")?;
    ensure!(!tiny.file("history").exists());
    Ok(())
}
