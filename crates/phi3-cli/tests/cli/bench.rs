//! `bench`: models that it makes, and what it says of them.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::support::{DONE, FAILED, USAGE, arg, fixture, run, stdout};

/// Arguments of a run that takes a moment.
fn quick<'a>(model: &[&'a str], flags: &[&'a str]) -> Vec<&'a str> {
    let quick = ["-p", "5", "-n", "3", "--repeat", "2", "-t", "2"];
    [&["bench"], model, &quick, flags].concat()
}

#[test]
fn a_random_model_is_made_and_measured() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = arg(&folder.path().join("tiny.gguf"));
    let random = [
        "--random", "tiny", "--type", "q4_k_m", "--layers", "1", "--out", &path,
    ];
    let args = quick(&random, &["-d", "0,9", "-b", "1,3", "--json"]);
    let found: Vec<Value> = serde_json::from_str(&stdout(&args)?)?;
    let tests: Vec<[&Value; 4]> = found
        .iter()
        .map(|it| [&it["n_prompt"], &it["n_gen"], &it["depth"], &it["batch"]])
        .collect();
    let expected = [
        [5, 0, 0, 1],
        [0, 3, 0, 1],
        [0, 3, 0, 3],
        [5, 0, 9, 1],
        [0, 3, 9, 1],
        [0, 3, 9, 3],
    ];
    ensure!(json!(tests) == json!(expected), "{tests:?}");
    for object in &found {
        for (field, value) in [
            ("model", json!(path)),
            ("model_type", json!("phi3")),
            ("type", json!("Q4_K_M")),
            ("layers", json!(1)),
            ("threads", json!(2)),
        ] {
            ensure!(object[field] == value, "{field}: {object}");
        }
        let number = |pointer: &str| {
            let value = object.pointer(pointer).and_then(Value::as_f64);
            value.with_context(|| format!("{pointer} of {object}"))
        };
        let [median, min, max] =
            ["median", "min", "max"].map(|name| number(&format!("/tokens_per_second/{name}")));
        let (median, min, max) = (median?, min?, max?);
        ensure!(0.0 < min && min <= median && median <= max, "{object}");
        for pointer in [
            "/parameters",
            "/weight_bytes",
            "/seconds/median",
            "/load_seconds",
            "/gigabytes_per_second",
            "/share_of_read_bandwidth",
            "/gigaops_per_second",
            "/share_of_compute",
            "/probe/read_gigabytes_per_second",
            "/probe/read_gigabytes_per_second_median",
            "/probe/instruction_sets/0/int8_gigaops_per_second",
        ] {
            ensure!(number(pointer)? > 0.0, "{pointer}: {object}");
        }
        let load = number("/load_seconds")?;
        ensure!(number("/load_to_first_token_seconds")? > load, "{object}");
        let is_prompt = object["n_prompt"] == 5;
        let first = object["time_to_first_token"].is_number();
        ensure!(first == is_prompt, "{object}");
        if cfg!(target_os = "linux") {
            ensure!(number("/peak_memory_bytes")? > 1e6, "{object}");
        }
    }
    Ok(())
}

#[test]
fn a_table_of_a_folder() -> Result<()> {
    // This model's window of 2047 and its float weights.
    let folder = arg(&fixture("phi3-mini-4k"));
    let table = stdout(quick(&["--model", &folder], &["-d", "3"]))?;
    ensure!(
        table.starts_with(&format!("{folder}: phi3, F32, 3 layers")),
        "{table}"
    );
    for line in [
        "\n| test | depth |",
        "\n| pp5 | 3 | 1 | 2 |",
        "\n| tg3 | 3 | 1 | 2 |",
    ] {
        ensure!(table.contains(line), "{line} is not in {table}");
    }
    Ok(())
}

/// A made model is a model like any other, and made once.
#[test]
fn a_made_model_is_used_again() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = arg(&folder.path().join("tiny.gguf"));
    let make = ["bench", "--random", "tiny", "--make-only", "--out", &path];
    ensure!(stdout(make)? == format!("{path}\n"));
    let made = std::fs::metadata(&path)?.modified()?;
    ensure!(stdout(make)? == format!("{path}\n"));
    ensure!(std::fs::metadata(&path)?.modified()? == made);
    let other = [&make[..], &["--seed", "1"]].concat();
    run(&other)?.says(
        FAILED,
        &["--out", "exists and is not the random tiny", "seed 1"],
    )?;

    let inspected: Value = serde_json::from_str(&stdout(["inspect", &path, "--json"])?)?;
    for (field, value) in [
        ("num_hidden_layers", json!(2)),
        ("vocab_size", json!(512)),
        ("tokenizer", json!(true)),
    ] {
        ensure!(inspected[field] == value, "{field}: {}", inspected[field]);
    }
    let flags = ["--raw", "--prompt", "et", "--max-new-tokens", "3"];
    let run = run([&["generate", "--model", &path], &flags[..]].concat())?;
    ensure!(run.code == Some(DONE), "{run:?}");
    Ok(())
}

#[test]
fn what_cannot_be_measured_is_said() -> Result<()> {
    let says = |args: &[&str], words: &[&str]| run([&["bench"], args].concat())?.says(USAGE, words);
    says(&[], &["--model"])?;
    says(
        &["--random", "phi-2"],
        &["--random", "phi-2", "phi-3-medium"],
    )?;
    says(&["--random", "tiny", "--type", "Q9_9"], &["Q9_9", "Q4_K_M"])?;
    says(
        &["--random", "tiny", "--layers", "3"],
        &["--layers", "tiny has 2"],
    )?;
    says(&["--random", "tiny", "-b", "0"], &["0", "1..=4096"])?;
    says(&["--model", "x", "--layers", "3"], &["--layers", "--model"])?;
    let folder = arg(&fixture("phi3-mini-4k"));
    says(
        &["--model", &folder, "-d", "0,4090"],
        &["--depth 4090", "512 more", "4096"],
    )?;
    let nothing = ["bench", "--model", &folder, "-p", "0", "-n", "0"];
    run(nothing)?.says(FAILED, &["nothing to measure", "-p"])
}
