//! `phi3 quantize` and `phi3 eval kl`: files that run like the model they came from, and what the
//! rounding costs.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::support::{
    DONE, FAILED, NO_MODEL, Tensors, USAGE, arg, command, run, stdout, write_ids,
};
use crate::tiny::Tiny;

/// More than a window of [`kl`], in letters of the tiny vocabulary.
fn text(folder: &Path) -> Result<String> {
    let path = folder.join("text.txt");
    std::fs::write(
        &path,
        "when one hen sees no men, ten den men ran on. ".repeat(8),
    )?;
    Ok(arg(&path))
}

fn quantize(tiny: &Tiny, kind: &str, flags: &[&str]) -> Result<String> {
    let out = arg(&tiny.file(&format!("{kind}-{}.gguf", flags.len())));
    let mut args = vec!["quantize".to_owned(), arg(tiny.path()), out.clone()];
    args.extend(["--type", kind].map(str::to_owned));
    args.extend(flags.iter().map(|flag| (*flag).to_owned()));
    let run = run(&args)?;
    ensure!(run.code == Some(DONE) && run.stdout.is_empty(), "{run:?}");
    ensure!(run.stderr.contains("bits a weight"), "{run:?}");
    Ok(out)
}

/// The logits of a few ids, computed by the program.
fn logits(tiny: &Tiny, flags: &[&str]) -> Result<Vec<f32>> {
    let ids = write_ids(tiny.path(), "ids", &[1, 40, 300, 7, 7, 256])?;
    let out = tiny.file("logits.safetensors");
    let _ = std::fs::remove_file(&out);
    let (ids, out_arg) = (arg(&ids), arg(&out));
    let mut args = vec!["logits", "--ids", &ids, "--out", &out_arg];
    args.extend(flags);
    stdout(&args)?;
    Ok(Tensors::read(&out)?
        .floats("logits")
        .context("no logits")?
        .to_vec())
}

/// A file, and the same type while loading, are the same model in every bit.
#[test]
fn a_file_is_what_quantizing_while_loading_gives() -> Result<()> {
    let tiny = Tiny::new()?;
    let folder = arg(tiny.path());
    let whole = logits(&tiny, &["--model", &folder])?;
    for kind in ["Q8_0", "Q4_0", "Q4_K_M"] {
        let file = quantize(&tiny, kind, &[])?;
        let from_file = logits(&tiny, &["--model", &file])?;
        let while_loading = logits(&tiny, &["--model", &folder, "--quantize", kind])?;
        ensure!(from_file == while_loading, "{kind}");
        ensure!(from_file != whole, "{kind} rounded nothing");
    }
    Ok(())
}

/// Tokenizer and template come along: the file answers, and as the folder does in 8 bits.
#[test]
fn a_file_chats_alone() -> Result<()> {
    let tiny = Tiny::new()?;
    let file = quantize(&tiny, "Q8_0", &[])?;
    let answer = |model: &[&str]| {
        let flags = ["generate", "--prompt", "no one", "--max-new-tokens", "8"];
        stdout(flags.iter().chain(model))
    };
    let folder = arg(tiny.path());
    let expected = answer(&["--model", &folder, "--quantize", "q8_0"])?;
    ensure!(!expected.trim().is_empty());
    ensure!(answer(&["--model", &file])? == expected);
    Ok(())
}

/// Nothing that exists is replaced unasked, and a failed run leaves no file behind.
#[test]
fn what_cannot_be_written_is_said() -> Result<()> {
    let tiny = Tiny::new()?;
    let (folder, out) = (arg(tiny.path()), arg(&tiny.file("out.gguf")));
    let quantize = |flags: &[&str]| run([&["quantize"], flags].concat());
    std::fs::write(&out, "kept")?;
    quantize(&[&folder, &out, "--type", "Q8_0"])?.says(FAILED, &["out.gguf", "--force"])?;
    ensure!(std::fs::read_to_string(&out)? == "kept");
    quantize(&[&folder, "--type", "Q8_0"])?.says(USAGE, &["the file to write"])?;
    quantize(&[&folder, &out, "--type", "Q9_0"])?.says(USAGE, &["Q9_0"])?;
    let missing = arg(&tiny.file("missing"));
    quantize(&[&missing, &out, "--force", "--type", "Q8_0"])?.says(NO_MODEL, &["missing"])?;
    let nowhere = arg(&tiny.file("missing/out.gguf"));
    quantize(&[&folder, &nowhere, "--type", "Q8_0"])?.says(FAILED, &["missing"])?;
    ensure!(std::fs::read_to_string(&out)? == "kept");
    let left: Vec<_> = std::fs::read_dir(tiny.path())?
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .filter(|name| name.contains(".part"))
        .collect();
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

/// Importance changes which rounding is chosen, not the layout.
#[test]
fn importance_is_measured_on_a_text() -> Result<()> {
    let tiny = Tiny::new()?;
    let text = text(tiny.path())?;
    let plain = std::fs::read(quantize(&tiny, "Q4_0", &[])?)?;
    let weighed = std::fs::read(quantize(&tiny, "Q4_0", &["--imatrix", &text])?)?;
    ensure!(plain.len() == weighed.len() && plain != weighed);
    let missing = arg(&tiny.file("no.txt"));
    let (folder, out) = (arg(tiny.path()), arg(&tiny.file("never.gguf")));
    let args = [
        "quantize",
        &folder,
        &out,
        "--type",
        "Q4_0",
        "--imatrix",
        &missing,
    ];
    run(args)?.says(FAILED, &["no.txt"])?;
    ensure!(!Path::new(&out).exists());
    Ok(())
}

fn kl(tiny: &Tiny, models: &[&str], flags: &[&str]) -> Result<Value> {
    let (reference, text) = (arg(tiny.path()), text(tiny.path())?);
    let mut args = vec!["eval", "kl", "--reference", &reference, "--text", &text];
    args.extend(["--window", "64", "--json"]);
    args.extend(models.iter().flat_map(|model| ["--model", model]));
    args.extend(flags);
    Ok(serde_json::from_str(&stdout(&args)?)?)
}

/// A model is at no distance from itself, and several compared at once are as far as each alone.
#[test]
fn divergence_from_a_reference() -> Result<()> {
    let tiny = Tiny::new()?;
    let (folder, q8, q4) = (
        arg(tiny.path()),
        quantize(&tiny, "Q8_0", &[])?,
        quantize(&tiny, "Q4_0", &[])?,
    );
    let own = kl(&tiny, &[&folder], &[])?;
    let number = |value: &Value, key: &str| {
        let found = value.get(key).and_then(Value::as_f64);
        found.with_context(|| format!("no {key} in {value}"))
    };
    ensure!(number(&own, "mean_kl")?.abs() < 1e-9, "{own}");
    ensure!(number(&own, "same_top")? == 1.0, "{own}");
    ensure!(number(&own, "perplexity")? == number(&own, "reference_perplexity")?);

    let together = kl(&tiny, &[&q8, &q4], &[])?;
    let [first, second] = together.as_array().map(Vec::as_slice).unwrap_or_default() else {
        anyhow::bail!("{together}");
    };
    ensure!(*first == kl(&tiny, &[&q8], &[])? && *second == kl(&tiny, &[&q4], &[])?);
    ensure!(
        number(second, "mean_kl")? > number(first, "mean_kl")?,
        "{together}"
    );
    ensure!(number(first, "mean_kl")? > 0.0);
    Ok(())
}

#[test]
fn a_text_that_is_too_short_is_said() -> Result<()> {
    let tiny = Tiny::new()?;
    let (folder, short) = (arg(tiny.path()), arg(&tiny.file("short.txt")));
    std::fs::write(&short, "no")?;
    let args = ["eval", "kl", "--model", &folder, "--reference", &folder];
    let mut command = command(args);
    crate::support::run_with(b"", command.args(["--text", &short]))?
        .says(FAILED, &["1 tokens", "window of 512"])
}
