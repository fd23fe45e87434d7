//! `phi3 generate` with a tiny model.

use std::io::{BufRead, BufReader, Read};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::support::{
    DONE, FAILED, INTERRUPTED, Run, USAGE, command, json_lines, run, run_with, spawn, stdout,
};
use crate::tiny::{Tiny, WITHOUT_SYSTEM, id};

fn generate(tiny: &Tiny, flags: &[&str]) -> Result<String> {
    stdout(tiny.args("generate", flags))
}

#[test]
fn the_prompt_comes_from_the_flag_or_stdin() -> Result<()> {
    let tiny = Tiny::new()?;
    let flags = ["--max-new-tokens", "20"];
    let given = generate(&tiny, &["--prompt", "Hi there", "--max-new-tokens", "20"])?;
    ensure!(given.len() > 1 && given.ends_with('\n'), "{given:?}");
    // As `echo` writes it, as a Windows editor saves it, and without a line break.
    for text in ["Hi there\n", "Hi there\r\n", "Hi there"] {
        let run = run_with(text.as_bytes(), &mut command(tiny.args("generate", &flags)))?;
        ensure!(
            run.code == Some(DONE) && run.stdout == given,
            "{text:?}: {run:?}"
        );
        ensure!(run.stderr.is_empty(), "nothing to say: {run:?}");
    }
    // Only the last line break is the shell's.
    let run = run_with(b"Hi there\n\n", &mut command(tiny.args("generate", &flags)))?;
    ensure!(run.code == Some(DONE) && run.stdout != given, "{run:?}");

    let run = run_with(b"caf\xc3", &mut command(tiny.args("generate", &flags)))?;
    run.says(FAILED, &["stdin", "UTF-8"])
}

/// Tokens of the prompt, as the last JSON line says.
fn prompt_tokens(tiny: &Tiny, flags: &[&str]) -> Result<u64> {
    let flags = [&["--logprobs", "0", "--max-new-tokens", "1"], flags].concat();
    let lines = json_lines(&generate(tiny, &flags)?)?;
    lines
        .last()
        .and_then(|end| end["prompt_tokens"].as_u64())
        .context("prompt_tokens")
}

#[test]
fn raw_leaves_the_template_out() -> Result<()> {
    let tiny = Tiny::new()?;
    ensure!(prompt_tokens(&tiny, &["--raw", "--prompt", "xyz"])? == 3);
    // <|user|> \n x y z <|end|> \n <|assistant|> \n
    ensure!(prompt_tokens(&tiny, &["--prompt", "xyz"])? == 9);
    // And <|system|> \n q <|end|> \n before it.
    ensure!(prompt_tokens(&tiny, &["--prompt", "xyz", "--system", "q"])? == 14);
    // Special tokens in what the user wrote are those tokens, as in the reference.
    ensure!(prompt_tokens(&tiny, &["--raw", "--prompt", "<|end|>x"])? == 2);

    let plain = Tiny::with_template(None)?;
    ensure!(prompt_tokens(&plain, &["--prompt", "xyz"])? == 3);
    run(plain.args("generate", &["--prompt", "x", "--system", "q"]))?
        .says(FAILED, &["no chat template"])?;
    run(tiny.args("generate", &["--prompt", "x", "--system", "q", "--raw"]))?
        .says(USAGE, &["--system", "--raw"])?;
    run(tiny.args("generate", &["--prompt", "refuse me"]))?.says(FAILED, &["no such talk"])
}

#[test]
fn a_system_message_that_is_dropped_is_said() -> Result<()> {
    let flags = ["--prompt", "x", "--system", "q", "--max-new-tokens", "1"];
    let deaf = Tiny::with_template(Some(WITHOUT_SYSTEM))?;
    let found = run(deaf.args("generate", &flags))?;
    ensure!(found.code == Some(DONE), "{found:?}");
    ensure!(
        found.stderr.contains("ignores system messages"),
        "{found:?}"
    );
    let found = run(Tiny::new()?.args("generate", &flags))?;
    ensure!(found.stderr.is_empty(), "{found:?}");
    Ok(())
}

#[test]
fn a_seed_makes_the_same_text() -> Result<()> {
    let tiny = Tiny::new()?;
    let drawn = |seed: &str| {
        let flags = [
            "-p",
            "x",
            "--temperature",
            "1",
            "--max-new-tokens",
            "40",
            "--seed",
            seed,
        ];
        generate(&tiny, &flags)
    };
    ensure!(drawn("7")? == drawn("7")?);
    ensure!(drawn("7")? != drawn("8")?);
    // Without a temperature the model's own rule holds, which is greedy here.
    let greedy = |flags: &[&str]| {
        generate(
            &tiny,
            &[&["-p", "x", "--max-new-tokens", "40"], flags].concat(),
        )
    };
    ensure!(greedy(&["--seed", "7"])? == greedy(&[])?);
    ensure!(greedy(&["--temperature", "0", "--top-k", "5"])? == greedy(&[])?);
    // A flag that shapes a draw asks for one.
    ensure!(greedy(&["--top-p", "0.99", "--seed", "7"])? != greedy(&[])?);
    ensure!(greedy(&["--temperature", "1", "--top-k", "1"])? == greedy(&[])?);
    Ok(())
}

#[test]
fn stop_strings_end_the_answer_before_themselves() -> Result<()> {
    let tiny = Tiny::new()?;
    let flags = ["-p", "hello", "--max-new-tokens", "60"];
    let whole = generate(&tiny, &flags)?;
    let text = whole.trim_end_matches('\n');
    // Two characters from the middle: they may lie in two tokens.
    let chars: Vec<char> = text.chars().collect();
    ensure!(chars.len() > 12, "too short to stop in: {text:?}");
    let stop: String = chars[8..10].iter().collect();
    let before = text.find(&stop).context("the stop string")?;
    let cut = generate(
        &tiny,
        &[&flags[..], &["--stop", "never there", "--stop", &stop]].concat(),
    )?;
    ensure!(
        cut == format!("{}\n", &text[..before]),
        "{cut:?} of {text:?} at {stop:?}"
    );

    let lines = generate(
        &tiny,
        &[&flags[..], &["--stop", &stop, "--logprobs", "0"]].concat(),
    )?;
    let lines = json_lines(&lines)?;
    let end = lines.last().context("an end")?;
    ensure!(
        end["finish_reason"] == "stop" && end["stop"] == stop,
        "{end}"
    );
    Ok(())
}

#[test]
fn logprobs_as_json_lines() -> Result<()> {
    let tiny = Tiny::new()?;
    let flags = ["-p", "hello", "--max-new-tokens", "12"];
    let plain = generate(&tiny, &flags)?;
    let lines = json_lines(&generate(
        &tiny,
        &[&flags[..], &["--logprobs", "3"]].concat(),
    )?)?;
    let (end, tokens) = lines.split_last().context("lines")?;
    ensure!(tokens.len() == 12, "{} tokens", tokens.len());
    let text: String = lines
        .iter()
        .filter_map(|line| line["text"].as_str())
        .collect();
    ensure!(text + "\n" == plain);
    for token in tokens {
        let top = token["top_logprobs"].as_array().context("top_logprobs")?;
        let of = |value: &Value| value["logprob"].as_f64().context("logprob");
        ensure!(top.len() == 3, "{token}");
        ensure!(
            of(&top[0])? >= of(&top[1])? && of(&top[1])? >= of(&top[2])?,
            "{token}"
        );
        // Greedy: the token itself is the first.
        ensure!(
            top[0]["id"] == token["id"] && top[0]["token"] == token["token"],
            "{token}"
        );
        ensure!(of(&top[0])? == of(token)? && of(token)? < 0.0, "{token}");
        ensure!(token["token"].is_string(), "{token}");
    }
    ensure!(
        end["finish_reason"] == "length" && end["completion_tokens"] == 12,
        "{end}"
    );
    ensure!(
        end["prefill_seconds"].as_f64().is_some_and(|s| s > 0.0),
        "{end}"
    );

    // The end token of the generation config, which the bias makes the only choice.
    let bias = format!("{}=1000", id("<|end|>"));
    let flags = [&flags[..], &["--logprobs", "0", "--logit-bias", &bias]].concat();
    let lines = json_lines(&generate(&tiny, &flags)?)?;
    ensure!(lines.len() == 2, "{lines:?}");
    ensure!(
        lines[0]["id"] == id("<|end|>") && lines[0]["text"] == "",
        "{lines:?}"
    );
    ensure!(
        lines[1]["finish_reason"] == "stop" && lines[1]["stop"] == id("<|end|>"),
        "{lines:?}"
    );
    Ok(())
}

#[test]
fn flags_that_choose_tokens() -> Result<()> {
    let tiny = Tiny::new()?;
    let generated = |flags: &[&str]| {
        generate(
            &tiny,
            &[&["-p", "x", "--max-new-tokens", "5"], flags].concat(),
        )
    };
    ensure!(generated(&["--logit-bias", "120=1000"])? == "xxxxx\n");
    // Each x costs the next one 2, so that the bias is used up after a while.
    let flags = ["--logit-bias", "120=12", "--frequency-penalty", "2"];
    let text = generate(
        &tiny,
        &[&flags[..], &["-p", "x", "--max-new-tokens", "20"]].concat(),
    )?;
    let xs = text.chars().take_while(|c| *c == 'x').count();
    ensure!((2..19).contains(&xs), "{text:?}");
    // A negative number is a flag's value also where it stands apart.
    let apart = ["-p", "x", "--presence-penalty", "-2"];
    ensure!(generate(&tiny, &apart)? == generate(&tiny, &["-p", "x", "--presence-penalty=-2"])?);
    for (flag, value) in [
        ("--temperature", "-1"),
        ("--temperature", "NaN"),
        ("--top-p", "1.5"),
        ("--top-k", "0"),
        ("--min-p", "2"),
        ("--repetition-penalty", "0"),
        ("--presence-penalty", "3"),
        ("--frequency-penalty", "-3"),
        ("--max-new-tokens", "0"),
        ("--logit-bias", "320=1"),
        ("--stop", ""),
    ] {
        let found = run(tiny.args("generate", &["-p", "x", &format!("{flag}={value}")]))?;
        let name = flag.trim_start_matches('-').replace('-', "_");
        let name = if name == "stop" { "stop string" } else { &name };
        found
            .says(FAILED, &[name])
            .with_context(|| format!("{flag} {value}"))?;
    }
    Ok(())
}

#[test]
fn answers_on_stdout_the_rest_on_stderr() -> Result<()> {
    let tiny = Tiny::new()?;
    let flags = ["-p", "x", "--max-new-tokens", "5"];
    let plain = generate(&tiny, &flags)?;
    let with = run(tiny.args("generate", &[&flags[..], &["--stats", "-vv"]].concat()))?;
    ensure!(with.code == Some(DONE) && with.stdout == plain, "{with:?}");
    ensure!(with.stderr.contains("prompt 7 tokens"), "{with:?}");
    ensure!(with.stderr.contains("answer 5 tokens"), "{with:?}");
    ensure!(
        !with.stderr.contains('\u{1b}'),
        "colors belong to terminals: {with:?}"
    );
    Ok(())
}

#[test]
fn damaged_weights_are_said_not_sampled() -> Result<()> {
    let tiny = Tiny::new()?;
    let path = tiny.file("model.safetensors");
    let mut bytes = std::fs::read(&path)?;
    let len = bytes.len();
    bytes[len - 4096..].fill(0xff); // NaN
    std::fs::write(&path, bytes)?;
    run(tiny.args("generate", &["-p", "x"]))?.says(FAILED, &["logit", "damaged"])
}

#[test]
fn a_prompt_that_is_too_long_is_said() -> Result<()> {
    let tiny = Tiny::new()?;
    let long = "xyz ".repeat(1100);
    let args = tiny.args("generate", &["--max-new-tokens", "1"]);
    run_with(long.as_bytes(), &mut command(&args))?
        .says(FAILED, &["4406 tokens", "4096", "--extend-context"])?;
    run_with(b"", &mut command(tiny.args("generate", &["--raw"])))?
        .says(FAILED, &["the prompt has no token"])
}

/// Answers for a long time.
fn endless(tiny: &Tiny, name: &str, flags: &[&str]) -> Command {
    let never = format!("{}=-1000", id("<|end|>"));
    let flags = [&["--max-new-tokens", "4000", "--logit-bias", &never], flags].concat();
    command(tiny.args(name, &flags))
}

#[test]
fn a_reader_that_goes_away_ends_it_quietly() -> Result<()> {
    let tiny = Tiny::new()?;
    for flags in [&["-p", "x"][..], &["-p", "x", "--logprobs", "1"]] {
        let mut child = spawn(&mut endless(&tiny, "generate", flags))?;
        let mut out = child.stdout.take().context("stdout")?;
        out.read_exact(&mut [0])?;
        drop(out);
        let begun = Instant::now();
        let output = child.wait_with_output()?;
        ensure!(output.status.code() == Some(DONE), "{output:?}");
        ensure!(output.stderr.is_empty(), "{output:?}");
        ensure!(begun.elapsed() < Duration::from_secs(5), "it went on");
    }
    // Nobody reads stderr: no reason to fail.
    let mut child = spawn(&mut command(
        tiny.args("generate", &["-p", "x", "--stats", "--max-new-tokens", "2"]),
    ))?;
    drop(child.stderr.take());
    ensure!(child.wait()?.code() == Some(DONE));
    Ok(())
}

/// Sends SIGINT, as Ctrl-C does.
#[cfg(unix)]
pub fn interrupt(child: &std::process::Child) -> Result<()> {
    let status = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status()?;
    ensure!(status.success());
    Ok(())
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_answer_and_program() -> Result<()> {
    let tiny = Tiny::new()?;
    let mut child = spawn(&mut endless(&tiny, "generate", &["-p", "x"]))?;
    let mut out = child.stdout.take().context("stdout")?;
    out.read_exact(&mut [0])?;
    interrupt(&child)?;
    let mut rest = Vec::new();
    out.read_to_end(&mut rest)?;
    ensure!(rest.ends_with(b"\n"), "the line is not ended");
    ensure!(child.wait()?.code() == Some(INTERRUPTED));
    Ok(())
}

#[cfg(unix)]
#[test]
fn ctrl_c_in_a_conversation_ends_the_answer_only() -> Result<()> {
    use std::io::Write;

    let tiny = Tiny::new()?;
    let mut child = spawn(&mut endless(&tiny, "chat", &["--stats"]))?;
    let mut stdin = child.stdin.take().context("stdin")?;
    let mut out = child.stdout.take().context("stdout")?;
    let mut errors = BufReader::new(child.stderr.take().context("stderr")?);
    stdin.write_all(b"hello\n")?;
    out.read_exact(&mut [0])?;
    // stdout has to be read all the while, or the answer would wait for its reader.
    let reader = std::thread::spawn(move || out.read_to_end(&mut Vec::new()));
    interrupt(&child)?;
    let mut line = String::new();
    errors.read_line(&mut line)?;
    ensure!(line == "(stopped)\n", "{line:?}");
    stdin.write_all(b"/reset\n/exit\n")?;
    let mut rest = String::new();
    errors.read_to_string(&mut rest)?;
    ensure!(rest.contains("starts anew"), "{rest:?}");
    ensure!(child.wait()?.code() == Some(DONE));
    ensure!(reader.join().is_ok_and(|read| read.is_ok()));
    Ok(())
}

#[test]
fn the_context_can_be_extended() -> Result<()> {
    let tiny = Tiny::new()?;
    let long = "xyz ".repeat(1100);
    for rule in ["power:8192", "piecewise:8192"] {
        let flags = ["--max-new-tokens", "3", "--extend-context", rule, "--stats"];
        let Run {
            code,
            stdout,
            stderr,
        } = run_with(long.as_bytes(), &mut command(tiny.args("generate", &flags)))?;
        ensure!(code == Some(DONE) && !stdout.is_empty(), "{rule}: {stderr}");
        ensure!(stderr.contains("prompt 4406 tokens"), "{stderr}");
    }
    Ok(())
}

/// What is kept in memory changes no answer, and is said at the end.
#[test]
fn a_budget_of_memory_is_kept_and_counted() -> Result<()> {
    let tiny = Tiny::of("phi3.5-moe", None)?;
    let flags = [
        "--raw",
        "--prompt",
        "Which experts?",
        "--max-new-tokens",
        "4",
    ];
    let free = run(tiny.args("generate", &flags))?;
    ensure!(!free.stderr.contains("experts:"), "{}", free.stderr);
    let kept = run(tiny.args(
        "generate",
        &[&flags[..], &["--memory-budget", "1KiB"]].concat(),
    ))?;
    let counted = kept.stderr.contains("experts: 0 in memory when chosen, ");
    ensure!(counted && kept.stderr.contains("let go"), "{kept:?}");
    ensure!(
        kept.code == Some(DONE) && kept.stdout == free.stdout,
        "{kept:?}"
    );
    let flags = [&flags[..], &["--memory-budget", "much"]].concat();
    run(tiny.args("generate", &flags))?.says(USAGE, &["--memory-budget", "much"])
}
