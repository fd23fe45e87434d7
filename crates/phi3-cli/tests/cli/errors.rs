//! What goes wrong is said on stderr, with the name of the thing, and in the exit code; nothing
//! half-written stays.

use std::path::Path;

use anyhow::{Result, ensure};

use crate::support::{
    FAILED, NO_MODEL, Run, USAGE, arg, command, fixture, run, run_with, write_ids,
};

fn logits(ids: &[&Path], out: &Path, flags: &[&str]) -> Result<Run> {
    let mut args = vec!["logits".to_owned(), "--model".to_owned()];
    args.push(arg(&fixture("phi3-mini-4k")));
    args.push("--ids".to_owned());
    args.extend(ids.iter().map(|path| arg(path)));
    args.extend(["--out".to_owned(), arg(out)]);
    args.extend(flags.iter().map(|flag| (*flag).to_owned()));
    run(&args)
}

#[test]
fn files_of_ids() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let out = folder.path().join("out.safetensors");
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).map(|()| path)
    };
    logits(&[&folder.path().join("none.json")], &out, &[])?
        .says(FAILED, &["none.json", "reading"])?;
    for (name, text, words) in [
        ("text.json", "hello", &["JSON array of token ids"][..]),
        (
            "object.json",
            "{\"ids\": [1]}",
            &["JSON array of token ids"],
        ),
        (
            "negative.json",
            "[1, -1]",
            &["JSON array of token ids", "-1"],
        ),
        (
            "fraction.json",
            "[1.5]",
            &["JSON array of token ids", "1.5"],
        ),
        ("big.json", "[4294967296]", &["JSON array of token ids"]),
        ("cut.json", "[1, 2", &["JSON array of token ids"]),
        ("none.json", "[]", &["empty array", "at least one"]),
        (
            "outside.json",
            "[1, 2, 320]",
            &["element 2 is 320", "vocabulary of 320"],
        ),
        (
            "outside2.json",
            "[4294967295]",
            &["4294967295", "vocabulary of 320"],
        ),
    ] {
        let path = file(name, text)?;
        let words: Vec<_> = words.iter().copied().chain([name]).collect();
        logits(&[&path], &out, &[])?.says(FAILED, &words)?;
    }
    std::fs::write(folder.path().join("binary.json"), [0xff, 0xfe])?;
    logits(&[&folder.path().join("binary.json")], &out, &[])?.says(FAILED, &["binary.json"])?;
    logits(&[folder.path()], &out, &[])?.says(FAILED, &[&arg(folder.path())])?;
    ensure!(!out.exists(), "something was written");
    Ok(())
}

#[test]
fn one_bad_file_among_several_is_named() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let out = folder.path().join("out.safetensors");
    let good = write_ids(folder.path(), "good", &[1, 2, 3])?;
    let bad = write_ids(folder.path(), "bad", &[1, 999])?;
    logits(&[&good, &bad], &out, &[])?.says(FAILED, &["bad.json", "999"])?;
    let twin = folder.path().join("sub");
    std::fs::create_dir(&twin)?;
    let twin = write_ids(&twin, "good", &[1])?;
    logits(&[&good, &twin], &out, &[])?.says(USAGE, &["stem", "`good`", "rename"])?;
    ensure!(!out.exists(), "something was written");
    Ok(())
}

#[test]
fn lengths() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let out = folder.path().join("out.safetensors");
    let short = write_ids(folder.path(), "short", &[1, 2, 3])?;
    let long = write_ids(folder.path(), "long", &[1; 4097])?;
    logits(&[&long], &out, &[])?.says(FAILED, &["long.json", "4097 ids", "context of 4096"])?;
    logits(&[&short], &out, &["--generate", "5000"])?
        .says(FAILED, &["short.json", "5000 generated", "context of 4096"])?;
    logits(&[&short], &out, &["--generate", "18446744073709551615"])?
        .says(FAILED, &["short.json", "context of 4096"])?;
    for (flag, value) in [
        ("--decode-from", "0"),
        ("--decode-from", "-1"),
        ("--decode-from", "x"),
        ("--generate", "-1"),
        ("--recompute", "sometimes"),
    ] {
        logits(&[&short], &out, &[&format!("{flag}={value}")])?.says(USAGE, &[flag, value])?;
    }
    ensure!(!out.exists(), "something was written");
    Ok(())
}

#[test]
fn where_to_write() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let ids = write_ids(folder.path(), "ids", &[1, 2, 3])?;
    let missing = folder.path().join("missing/out.safetensors");
    logits(&[&ids], &missing, &[])?.says(FAILED, &["missing", "create it"])?;
    ensure!(!folder.path().join("missing").exists());
    logits(&[&ids], folder.path(), &[])?.says(FAILED, &["is a folder"])?;
    logits(&[&ids], &ids.join("out.safetensors"), &[])?.says(FAILED, &["ids.json"])?;

    // What was there stays if a run fails, and a run leaves only its result.
    let out = folder.path().join("out.safetensors");
    std::fs::write(&out, "old")?;
    let bad = write_ids(folder.path(), "bad", &[999])?;
    logits(&[&bad], &out, &[])?.says(FAILED, &["bad.json"])?;
    ensure!(std::fs::read(&out)? == b"old");
    std::fs::remove_file(&bad)?;
    logits(&[&ids], &out, &[])?;
    let mut left: Vec<_> = std::fs::read_dir(folder.path())?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<Result<_, _>>()?;
    left.sort();
    ensure!(left == ["ids.json", "out.safetensors"], "{left:?}");
    Ok(())
}

#[test]
fn models_that_are_not_there() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let absent = arg(&folder.path().join("absent"));
    let empty = arg(folder.path());
    let cache = arg(&folder.path().join("cache"));
    for (model, words) in [
        (absent.as_str(), &["no file or folder", "absent"][..]),
        ("./nowhere/phi", &["no file or folder", "./nowhere/phi"]),
        ("phi-q4.gguf", &["no file or folder", "phi-q4.gguf"]),
        ("phi", &["\"phi\"", "repo id"]),
        ("", &["repo id"]),
        (
            "no-such-org/no-such-model",
            &["phi3 download no-such-org/no-such-model"],
        ),
        (&empty, &["config.json", "folder of a model"]),
    ] {
        for name in ["generate", "chat", "tokenize", "inspect"] {
            let args = [name, "--model", model, "--cache-dir", &cache];
            run(args)?.says(NO_MODEL, words)?;
        }
    }
    let args = [
        "download",
        "no-such-org/no-such-model",
        "--offline",
        "--cache-dir",
        &cache,
    ];
    run(args)?.says(NO_MODEL, &["no-such-org/no-such-model"])?;
    let model = arg(&fixture("phi3-mini-4k"));
    run(["inspect", &model, "--revision", "v1"])?.says(FAILED, &["--revision"])
}

#[test]
fn files_that_are_no_model() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).map(|()| arg(&path))
    };
    let gguf = file("no.gguf", b"not a gguf file at all")?;
    let empty = file("empty.gguf", b"")?;
    let cut = file("cut.gguf", b"GGUF\x03\0\0\0")?;
    let huge = [b"GGUF\x03\0\0\0".as_slice(), &[0xff; 16]].concat();
    let huge = file("huge.gguf", &huge)?;
    for path in [&gguf, &empty, &cut, &huge] {
        for name in ["generate", "inspect", "tokenize"] {
            run([name, "--model", path])?.says(FAILED, &[path])?;
        }
    }
    let text = file("model.txt", b"hello")?;
    run(["inspect", &text])?.says(NO_MODEL, &[&text, "not a GGUF file"])?;
    let pickle = file("pytorch_model.bin", b"hello")?;
    run(["inspect", &pickle])?.says(NO_MODEL, &[&pickle, "safetensors"])
}

#[test]
fn devices_and_numbers() -> Result<()> {
    let model = arg(&fixture("phi3-mini-4k"));
    let with = |flag: &str, value: &str| {
        run(["generate", "--model", &model, "--prompt", "x", flag, value])
    };
    with("--device", "tpu")?.says(USAGE, &["tpu", "auto, cpu, cuda"])?;
    with("--device", "cuda:x")?.says(USAGE, &["cuda:x"])?;
    if !cfg!(feature = "cuda") {
        with("--device", "cuda")?.says(FAILED, &["cuda", "--features cuda"])?;
        with("--device", "cuda:1")?.says(FAILED, &["cuda:1", "--features cuda"])?;
    }
    if !cfg!(feature = "metal") {
        with("--device", "metal")?.says(FAILED, &["--features metal"])?;
    }
    with("--dtype", "f64")?.says(USAGE, &["f64", "bf16"])?;
    for threads in ["0", "1025", "many"] {
        with("--threads", threads)?.says(USAGE, &["--threads", threads])?;
    }
    with("--extend-context", "cubic:8192")?.says(USAGE, &["cubic:8192", "piecewise"])?;
    with("--extend-context", "power:2048")?.says(FAILED, &["already reaches 4096"])?;
    with("--logit-bias", "x=1")?.says(USAGE, &["x", "token id"])?;
    with("--logit-bias", "1")?.says(USAGE, &["ID=X"])
}

#[test]
fn environment_variables_that_mean_nothing() -> Result<()> {
    let model = arg(&fixture("phi3-mini-4k"));
    for (variable, value, words) in [
        ("PHI3_THREADS", "many", &["positive number", "many"][..]),
        ("PHI3_THREADS", "0", &["positive number"]),
        ("PHI3_KERNELS", "avx1024", &["backend", "avx1024"]),
        ("PHI3_LOG", "phi3=loud", &["phi3=loud", "debug"]),
    ] {
        let mut command = command(["inspect", &model]);
        let run = run_with(b"", command.env(variable, value))?;
        let words: Vec<_> = words.iter().copied().chain([variable]).collect();
        run.says(USAGE, &words)?;
    }
    Ok(())
}

#[test]
fn weights_without_tokenizer_say_so() -> Result<()> {
    let model = arg(&fixture("phi3-mini-4k"));
    for name in ["generate", "chat", "tokenize"] {
        run([name, "--model", &model, "--prompt", "x"])?
            .says(FAILED, &["phi3-mini-4k", "no tokenizer"])?;
    }
    Ok(())
}

#[test]
fn command_lines_that_mean_nothing() -> Result<()> {
    run(["generate"])?.says(USAGE, &["--model"])?;
    run(["inspect"])?.says(USAGE, &["MODEL"])?;
    run(["logits", "--model", "x"])?.says(USAGE, &["--ids", "--out"])?;
    run(["infer"])?.says(USAGE, &["infer"])?;
    run(["inspect", "a", "--model", "b"])?.says(USAGE, &["--model"])?;
    run([] as [&str; 0])?.says(USAGE, &["Usage", "chat"])
}
