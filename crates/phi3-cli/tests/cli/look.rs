//! Commands that look without running a model: inspect, tokenize, completions, help.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::support::{
    DONE, FAILED, Tensors, USAGE, arg, command, fixture, run, run_with, stdout, write_ids,
};
use crate::tiny::{Tiny, id};

fn inspect(name: &str, flags: &[&str]) -> Result<Value> {
    let path = arg(&fixture(name));
    let args = [&["inspect", &path, "--json"], flags].concat();
    serde_json::from_str(&stdout(args)?).context("inspect --json is JSON")
}

#[test]
fn inspect_as_json() -> Result<()> {
    let found = inspect("phi3-mini-4k", &[])?;
    let folder = arg(&fixture("phi3-mini-4k"));
    for (field, value) in [
        ("model", json!(folder)),
        ("model_type", json!("phi3")),
        ("architecture", json!("Phi3ForCausalLM")),
        ("parameters", json!(191_936)),
        ("size", json!(767_744)),
        ("chat_template", json!(false)),
        ("tokenizer", json!(false)),
        ("num_hidden_layers", json!(3)),
        ("hidden_size", json!(64)),
        ("vocab_size", json!(320)),
        ("num_attention_heads", json!(4)),
        ("num_key_value_heads", json!(4)),
        ("head_dim", json!(16)),
        ("context", json!(4096)),
        ("sliding_window", json!(2047)),
    ] {
        ensure!(found[field] == value, "{field}: {}", found[field]);
    }
    ensure!(found["rope"]["kind"] == "default" && found["rope"]["theta"] == 10000.0);
    // [out, in] of q, k, v in one and of o, in each of three layers.
    let attention = 3 * (3 * 64 * 64 + 64 * 64);
    ensure!(
        found["quantization"]["attention"]["F32"] == attention,
        "{found}"
    );
    ensure!(found.get("tensors").is_none());
    let tiny = Tiny::new()?;
    let found: Value = serde_json::from_str(&stdout(tiny.args("inspect", &["--json"]))?)?;
    ensure!(found["tokenizer"] == true && found["chat_template"] == true);
    Ok(())
}

#[test]
fn inspect_knows_rope_and_grouped_heads() -> Result<()> {
    let config: Value = serde_json::from_slice(&std::fs::read(
        fixture("phi3-mini-128k-longrope").join("config.json"),
    )?)?;
    let found = inspect("phi3-mini-128k-longrope", &[])?;
    let original = &config["original_max_position_embeddings"];
    ensure!(found["rope"]["kind"] == "longrope");
    ensure!(&found["rope"]["original_max_position_embeddings"] == original);
    let context = config["max_position_embeddings"]
        .as_f64()
        .context("context")?;
    ensure!(found["context"].as_f64() == Some(context));
    let original = original.as_f64().context("original")?;
    let factor = (1.0 + (context / original).ln() / original.ln()).sqrt();
    for name in ["short_mscale", "long_mscale"] {
        let found = found["rope"][name].as_f64().context(name)?;
        ensure!(
            (found - factor).abs() < 1e-9,
            "{name}: {found} instead of {factor}"
        );
    }
    let text = stdout(["inspect", &arg(&fixture("phi3-mini-128k-longrope"))])?;
    ensure!(
        text.contains(&format!("long factors beyond {original} tokens")),
        "{text}"
    );

    let found = inspect("phi4-mini", &[])?;
    ensure!(found["num_attention_heads"].as_u64() > found["num_key_value_heads"].as_u64());
    let (part, whole) = (
        found["rope"]["rotary_dim"].as_u64(),
        found["head_dim"].as_u64(),
    );
    ensure!(
        part < whole,
        "phi4-mini turns a part of each head: {part:?} of {whole:?}"
    );
    ensure!(inspect("phi3-mini-4k-bf16", &[])?["quantization"]["attention"]["BF16"].is_u64());
    Ok(())
}

#[test]
fn inspect_estimates_memory_at_a_context() -> Result<()> {
    let memory = |tokens: &str| -> Result<(u64, u64)> {
        let found = inspect("phi3-mini-128k-longrope", &["--context", tokens])?;
        let memory = &found["memory"];
        let number = |name: &str| memory[name].as_u64().with_context(|| name.to_owned());
        ensure!(number("context")? == tokens.parse::<u64>()?);
        ensure!(number("weights")? == found["size"].as_u64().context("size")?);
        ensure!(number("total")? == number("weights")? + number("kv_cache")?);
        Ok((number("kv_cache")?, number("total")?))
    };
    let (small, big) = (memory("1000")?, memory("2000")?);
    ensure!(
        small.0 > 0 && big.0 > small.0 && big.1 > small.1,
        "{small:?} {big:?}"
    );
    // A window bounds the cache.
    let window = |tokens| -> Result<Value> {
        Ok(inspect("phi3-mini-4k-window", &["--context", tokens])?["memory"]["kv_cache"].clone())
    };
    let (a, b) = (window("100")?.as_u64(), window("200")?.as_u64());
    let (a, b) = (a.context("bytes")?, b.context("bytes")?);
    ensure!(
        b < 2 * a,
        "twice the context should not take twice the cache: {a} {b}"
    );
    run([
        "inspect",
        &arg(&fixture("phi3-mini-4k")),
        "--context",
        "many",
    ])?
    .says(USAGE, &["--context"])
}

#[test]
fn inspect_as_text_and_its_tensors() -> Result<()> {
    let model = arg(&fixture("phi3-mini-4k"));
    let text = stdout(["inspect", &model])?;
    for words in [
        "phi3 (Phi3ForCausalLM)",
        "191.9 thousand",
        "3 of width 64",
        "4 query heads, 4 key/value heads of 16",
        "4096 tokens, sliding window 2047",
        "theta 10000",
        "767.7 kB",
    ] {
        ensure!(text.contains(words), "{words:?} is not in {text}");
    }
    ensure!(text == stdout(["inspect", "--model", &model])?);
    ensure!(text == stdout(["inspect", "-m", &model])?);

    let listed = stdout(["inspect", &model, "--tensors"])?;
    let rows = listed
        .strip_prefix(&text)
        .context("the tensors come behind")?;
    // Embedding, head, last norm, and 6 tensors in each of 3 layers.
    let rows: Vec<_> = rows.lines().filter(|line| line.contains("F32")).collect();
    ensure!(rows.len() == 21, "{listed}");
    let qkv = rows
        .iter()
        .find(|row| row.contains("layers.0.self_attn.qkv_proj"));
    ensure!(
        qkv.is_some_and(|row| row.contains("[192, 64]") && row.contains("49152")),
        "{qkv:?}"
    );
    let found = inspect("phi3-mini-4k", &["--tensors"])?;
    let tensors = found["tensors"].as_array().context("tensors")?;
    ensure!(tensors.len() == 21);
    let bytes: u64 = tensors
        .iter()
        .filter_map(|tensor| tensor["bytes"].as_u64())
        .sum();
    ensure!(found["size"] == bytes);
    for field in ["name", "type", "shape", "bytes", "file"] {
        ensure!(!tensors[0][field].is_null(), "{field}");
    }
    Ok(())
}

#[test]
fn inspect_shows_what_it_cannot_run() -> Result<()> {
    let tiny = Tiny::new()?;
    let path = tiny.file("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    config["model_type"] = json!("gpt_neox");
    std::fs::write(&path, config.to_string())?;
    let text = stdout(tiny.args("inspect", &["--tensors"]))?;
    ensure!(
        text.contains("cannot run") && text.contains("gpt_neox"),
        "{text}"
    );
    ensure!(text.contains("lm_head.weight"), "{text}");
    let found: Value = serde_json::from_str(&stdout(tiny.args("inspect", &["--json"]))?)?;
    ensure!(
        found["unsupported"].is_string() && found["parameters"].is_u64(),
        "{found}"
    );
    run(tiny.args("generate", &["-p", "x"]))?.says(FAILED, &["gpt_neox", "phi3"])
}

#[test]
fn a_vocabulary_alone_can_tokenize() -> Result<()> {
    let model = arg(&fixture("phi3-gguf/ggml-vocab-phi-3.gguf"));
    let inputs = std::fs::read_to_string(fixture("phi3-gguf/ggml-vocab-phi-3.gguf.inp"))?;
    let expected = std::fs::read_to_string(fixture("phi3-gguf/ggml-vocab-phi-3.gguf.out"))?;
    let inputs: Vec<_> = inputs.split("\n__ggml_vocab_test__\n").collect();
    let mut checked = 0;
    // A few: the rest is phi3-hub's and phi3-text's to check.
    for (text, line) in inputs.iter().zip(expected.lines()).step_by(15) {
        let mut ids = Vec::new();
        for id in line.split_whitespace() {
            ids.push(id.parse::<u32>()?);
        }
        // The last line break of stdin is the shell's.
        let args = ["tokenize", "--model", &model, "--json"];
        let found = run_with(format!("{text}\n").as_bytes(), &mut command(args))?;
        ensure!(found.code == Some(DONE), "{found:?}");
        ensure!(
            serde_json::from_str::<Vec<u32>>(&found.stdout)? == ids,
            "{text:?}: {found:?}"
        );
        checked += 1;
    }
    ensure!(checked >= 3, "{checked}");
    let text = stdout(["inspect", &model])?;
    ensure!(text.contains("parameters               0"), "{text}");
    run(["generate", "--model", &model, "-p", "x"])?.says(
        FAILED,
        &["model.embed_tokens.weight", "ggml-vocab-phi-3.gguf"],
    )
}

#[test]
fn tokenize_both_ways() -> Result<()> {
    let tiny = Tiny::new()?;
    let tokenize = |flags: &[&str]| stdout(tiny.args("tokenize", flags));
    // `ae` is one token, the first behind the bytes; the others are bytes.
    ensure!(tokenize(&["-p", "xae é", "--json"])? == "[120,256,32,195,169]\n");
    let lines = tokenize(&["-p", "ae é\n<|end|>"])?;
    let lines: Vec<_> = lines.lines().map(str::trim).collect();
    let end = format!("{}  <|end|>", id("<|end|>"));
    ensure!(
        lines == ["256  ae", "32  Ġ", "195  Ã", "169  ©", "10  Ċ", &end],
        "{lines:?}"
    );
    ensure!(tokenize(&["--decode", "[120, 256, 32, 195, 169]"])? == "xae é\n");
    ensure!(tokenize(&["-p", "", "--json"])? == "[]\n");
    let bad = run(tiny.args("tokenize", &["--decode", "1 2"]))?;
    bad.says(FAILED, &["--decode", "JSON array"])?;
    run(tiny.args("tokenize", &["--decode", "[999999]"]))?.says(FAILED, &["999999"])?;
    run(tiny.args("tokenize", &["--decode", "[1]", "-p", "x"]))?.says(USAGE, &["--decode"])
}

#[test]
fn completions_for_the_usual_shells() -> Result<()> {
    for (shell, word) in [
        ("bash", "complete -F"),
        ("zsh", "#compdef phi3"),
        ("fish", "complete -c phi3"),
        ("powershell", "Register-ArgumentCompleter"),
        ("elvish", "edit:completion"),
    ] {
        let script = stdout(["completions", shell])?;
        ensure!(script.contains(word), "{shell}: {script}");
        for flag in [
            "max-new-tokens",
            "extend-context",
            "decode-from",
            "tokenize",
        ] {
            ensure!(script.contains(flag), "{shell} lacks {flag}");
        }
        // Where the shell is installed it says whether it can read the script.
        if ["bash", "zsh", "fish"].contains(&shell)
            && Command::new(shell).arg("--version").output().is_ok()
        {
            let folder = tempfile::tempdir()?;
            let path = folder.path().join("script");
            std::fs::write(&path, &script)?;
            let checked = Command::new(shell).arg("-n").arg(&path).output()?;
            ensure!(checked.status.success(), "{shell}: {checked:?}");
        }
    }
    run(["completions", "cmd"])?.says(USAGE, &["cmd", "bash"])
}

#[test]
fn help_of_every_command() -> Result<()> {
    let help = stdout(["--help"])?;
    let (_, list) = help.split_once("\nCommands:\n").context("Commands")?;
    let list = list.split_once("\n\n").map_or(list, |(list, _)| list);
    let commands = list
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "help");
    let commands: Vec<_> = commands.collect();
    for name in [
        "download",
        "inspect",
        "generate",
        "chat",
        "tokenize",
        "logits",
        "completions",
    ] {
        ensure!(commands.contains(&name), "{name}: {help}");
    }
    for name in commands {
        for flag in ["--help", "-h"] {
            let found = stdout([name, flag])?;
            ensure!(
                found.contains(&format!("Usage: phi3 {name}")),
                "{name}: {found}"
            );
            // What a flag says is in the text, not a Rust type.
            ensure!(
                !found.contains("Option<") && !found.contains("\n\n\n"),
                "{found}"
            );
        }
    }
    // What a command says of itself at length is shown, not only the line in the list.
    for (command, words) in [
        (&["quantize"][..], "Q4_K_M is what most people want"),
        (&["eval", "kl"], "the second half of each is scored"),
        (&["inspect"], "headers of its safetensors"),
        (&["bench"], "Every test runs once to warm up"),
    ] {
        let found = stdout([command, &["--help"]].concat())?;
        ensure!(found.contains(words), "{command:?}: {found}");
    }
    for name in ["generate", "chat"] {
        let found = stdout([name, "--help"])?;
        let (before, sampling) = found.split_once("\nSampling:").context("Sampling")?;
        for flag in [
            "--temperature",
            "--top-k",
            "--seed",
            "--stop",
            "--max-new-tokens",
        ] {
            ensure!(sampling.contains(flag), "{flag}");
        }
        for flag in [
            "--stats",
            "--system",
            "--device",
            "--threads",
            "--revision",
            "--offline",
        ] {
            ensure!(
                before.contains(flag),
                "{name}: {flag} belongs to the general options"
            );
        }
    }
    let version = stdout(["--version"])?;
    ensure!(
        version == format!("phi3 {}\n", env!("CARGO_PKG_VERSION")),
        "{version}"
    );
    ensure!(stdout(["-V"])? == version);
    Ok(())
}

#[test]
fn paths_with_spaces_and_letters_of_all_kinds() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let model: PathBuf = folder.path().join("my modèl 模型");
    std::fs::create_dir(&model)?;
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(fixture("phi3-mini-4k").join(file), model.join(file))?;
    }
    let text = stdout(["inspect", &arg(&model)])?;
    ensure!(text.contains("my modèl 模型"), "{text}");
    Ok(())
}

#[test]
fn a_conversation_is_rendered_and_tokenized() -> Result<()> {
    let tiny = Tiny::new()?;
    let file = tiny.file("talk.json");
    let talk =
        json!([{ "role": "user", "content": "hi" }, { "role": "assistant", "content": "ho" }]);
    std::fs::write(&file, talk.to_string())?;
    let file = arg(&file);
    let open = "<|user|>\nhi<|end|>\n<|assistant|>\nho<|end|>\n";
    let rendered = stdout(tiny.args("tokenize", &["--chat", &file, "--rendered"]))?;
    ensure!(rendered == format!("{open}<|assistant|>\n"), "{rendered:?}");
    let bare = ["--chat", &file, "--rendered", "--no-generation-prompt"];
    ensure!(stdout(tiny.args("tokenize", &bare))? == open);
    let ids = stdout(tiny.args("tokenize", &["--chat", &file, "--json"]))?;
    let text = stdout(tiny.args("tokenize", &["--decode", ids.trim()]))?;
    ensure!(text.trim_end() == rendered.trim_end(), "{text:?}");
    std::fs::write(tiny.file("talk.json"), "{}")?;
    run(tiny.args("tokenize", &["--chat", &file]))?.says(FAILED, &["talk.json", "JSON array"])
}

/// Every token of the prompt is counted once for each expert that it takes, in every layer; the
/// counts are those that `phi3 logits --hidden` shows.
#[test]
fn inspect_shows_which_experts_a_prompt_takes() -> Result<()> {
    let tiny = Tiny::of("phi3.5-moe", None)?;
    let prompt = "Which experts take this text?";
    let text = stdout(tiny.args("inspect", &["--router", prompt, "--json"]))?;
    let found: Value = serde_json::from_str(&text)?;
    let ids: Vec<i64> = serde_json::from_str(&stdout(
        tiny.args("tokenize", &["--prompt", prompt, "--json"]),
    )?)?;
    ensure!(found["tokens"] == ids.len(), "{found}");
    let file = write_ids(tiny.path(), "ids", &ids)?;
    let out = arg(&tiny.file("out.safetensors"));
    stdout(tiny.args("logits", &["--ids", &arg(&file), "--hidden", "--out", &out]))?;
    let shown = Tensors::read(&tiny.file("out.safetensors"))?;
    let layers = found["layers"].as_array().context("layers")?;
    ensure!(layers.len() == 3, "{found}");
    for (layer, load) in layers.iter().enumerate() {
        let mut expected = vec![0i64; 16];
        let experts = shown.ids(&format!("layer{layer}.experts"));
        for expert in experts.context("experts")? {
            expected[usize::try_from(*expert)?] += 1;
        }
        ensure!(*load == json!(expected), "layer {layer}: {load}");
    }

    let text = stdout(tiny.args("inspect", &["--router", prompt]))?;
    let rows: Vec<&str> = text.lines().skip(3).collect();
    ensure!(
        rows.len() == 3 && text.contains("each through 2 of 16 experts"),
        "{text}"
    );
    let sums = rows.iter().map(|row| {
        let columns = row.split_whitespace().skip(1).take(16);
        columns
            .filter_map(|count| count.parse::<usize>().ok())
            .sum::<usize>()
    });
    ensure!(sums.into_iter().all(|sum| sum == 2 * ids.len()), "{text}");

    let dense = Tiny::new()?;
    run(dense.args("inspect", &["--router", prompt]))?.says(USAGE, &["--router", "phi3"])
}
