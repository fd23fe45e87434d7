//! A tiny Phi-3-small with the vocabulary of the real ones: its tokenizer is cl100k's ranks, not a
//! tokenizer.json.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use safetensors::tensor::{TensorView, serialize_to_file};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{DONE, FAILED, arg, command, fixture, json_lines, run, run_with, stdout};

const VOCAB: usize = 100_352;
const END: u64 = 100_266;

/// Of the shape of Phi-3-small's own: it begins with bos and ends, without a further turn, with eos.
const TEMPLATE: &str = "{{ bos_token }}{% for message in messages %}{{ '<|' + message.role + \
    '|>\\n' + message.content + '<|end|>\\n' }}{% endfor %}{% if add_generation_prompt %}\
    {{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}";

/// The layers of a fixture with an embedding of the real number of rows. If `ends`, every token is
/// followed by `<|end|>`.
fn model(ends: bool) -> Result<TempDir> {
    let from = fixture("phi3-small-8step");
    let mut config: Value = serde_json::from_slice(&std::fs::read(from.join("config.json"))?)?;
    let fields = config.as_object_mut().context("a config")?;
    fields["vocab_size"] = json!(VOCAB);
    // As in a hub config: which tokens are dummies follows from the vocabulary.
    fields.remove("dummy_token_indices");
    let hidden = config["hidden_size"].as_u64().context("hidden_size")? as usize;

    let bytes = std::fs::read(from.join("model.safetensors"))?;
    let read = SafeTensors::deserialize(&bytes)?;
    let mut tensors = HashMap::new();
    for (name, view) in read.tensors() {
        tensors.insert(name, (view.shape().to_vec(), view.data().to_vec()));
    }
    let mut state = 1u32;
    let mut embedding: Vec<f32> = (0..VOCAB * hidden)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        })
        .collect();
    if ends {
        embedding[END as usize * hidden..][..hidden].fill(1.0);
        for (name, value) in [("weight", 0f32), ("bias", 1.0)] {
            let name = format!("model.final_layernorm.{name}");
            let (_, data) = tensors.get_mut(&name).context("the last norm")?;
            *data = value.to_le_bytes().repeat(hidden);
        }
    }
    let embedding = embedding.iter().flat_map(|x| x.to_le_bytes()).collect();
    let name = "model.embed_tokens.weight".to_owned();
    tensors.insert(name, (vec![VOCAB, hidden], embedding));

    let folder = tempfile::tempdir()?;
    let views = tensors
        .iter()
        .map(|(name, (shape, data))| Ok((name, TensorView::new(Dtype::F32, shape.clone(), data)?)))
        .collect::<Result<HashMap<_, _>>>()?;
    serialize_to_file(views, None, &folder.path().join("model.safetensors"))?;
    let write =
        |name: &str, value: &Value| std::fs::write(folder.path().join(name), value.to_string());
    write("config.json", &config)?;
    let tokenizer = json!({"tokenizer_class": "Phi3SmallTokenizer", "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "chat_template": TEMPLATE});
    write("tokenizer_config.json", &tokenizer)?;
    Ok(folder)
}

fn args(command: &str, model: &Path, flags: &[&str]) -> Vec<String> {
    let mut args = vec![command.to_owned(), "--model".to_owned(), arg(model)];
    args.extend(flags.iter().map(|flag| (*flag).to_owned()));
    args
}

fn ids(model: &Path, flags: &[&str]) -> Result<Vec<u32>> {
    let text = stdout(args("tokenize", model, &[&["--json"], flags].concat()))?;
    Ok(serde_json::from_str(&text)?)
}

#[test]
fn text_becomes_cl100k_ids() -> Result<()> {
    let folder = model(false)?;
    let path = folder.path();
    let text = "Hello world<|end|>";
    ensure!(ids(path, &["--prompt", text])? == [9906, 1917, 100_266]);
    // The tokenizer adds nothing; the template does.
    ensure!(ids(path, &["--prompt", text, "--add-special"])? == [9906, 1917, 100_266]);
    let chat = path.join("chat.json");
    std::fs::write(&chat, r#"[{"role": "user", "content": "Hello world"}]"#)?;
    let chat = arg(&chat);
    ensure!(
        ids(path, &["--chat", &chat])?
            == [
                100_257, 100_262, 198, 9906, 1917, 100_266, 198, 100_263, 198
            ]
    );
    ensure!(
        ids(path, &["--chat", &chat, "--no-generation-prompt"])?
            == [100_257, 100_262, 198, 9906, 1917, 100_266, 198, 100_257]
    );
    let text = stdout(args("tokenize", path, &["--decode", "[9906,1917,100266]"]))?;
    ensure!(text == "Hello world<|end|>\n", "{text:?}");
    let report: Value = serde_json::from_str(&stdout(["inspect", &arg(path), "--json"])?)?;
    ensure!(report["tokenizer"] == true && report["chat_template"] == true);

    // A file of ranks beside the weights comes first, whether it can be used or not.
    std::fs::write(path.join("cl100k_base.tiktoken"), "IQ== 0\nIg== 1\n")?;
    run(args("tokenize", path, &["--prompt", "a"]))?.says(FAILED, &["ranks", "it has 2 ranks"])?;
    std::fs::write(path.join("cl100k_base.tiktoken"), "IQ== 0\nIg== 7\n")?;
    run(args("tokenize", path, &["--prompt", "a"]))?.says(FAILED, &["line 2", "the rank 1"])?;
    let Some(file) = kit_ranks() else {
        return Ok(());
    };
    std::fs::copy(file, path.join("cl100k_base.tiktoken"))?;
    ensure!(ids(path, &["--prompt", "Hello world<|end|>"])? == [9906, 1917, 100_266]);
    Ok(())
}

/// The file of a real repository, where it is at hand.
fn kit_ranks() -> Option<PathBuf> {
    let kit = std::env::var_os("PHI3_KIT").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/kit"),
        PathBuf::from,
    );
    let file = kit.join("tokenizers/phi3-small/cl100k_base.tiktoken");
    if file.is_file() {
        return Some(file);
    }
    eprintln!("skipped: no file of ranks; PHI3_KIT says where the kit is");
    None
}

#[test]
fn it_generates_and_ends() -> Result<()> {
    let flags = [
        "--prompt",
        "Hello world",
        "--logprobs",
        "0",
        "--max-new-tokens",
        "9",
    ];
    let folder = model(false)?;
    let lines = json_lines(&stdout(args("generate", folder.path(), &flags))?)?;
    let (end, tokens) = lines.split_last().context("lines")?;
    ensure!(end["prompt_tokens"] == 9 && tokens.len() == 9, "{lines:?}");
    for token in tokens {
        let id = token["id"].as_u64().context("an id")?;
        let trained = id < 100_256 || [100_257, 100_261, 100_262, 100_263, END].contains(&id);
        ensure!(trained, "{id} is a dummy");
    }

    let folder = model(true)?;
    let lines = json_lines(&stdout(args("generate", folder.path(), &flags))?)?;
    let end = lines.last().context("a line")?;
    ensure!(
        end["finish_reason"] == "stop" && end["stop"] == END,
        "{lines:?}"
    );
    ensure!(lines.len() <= 2, "{lines:?}");
    let chat = run_with(
        b"Hello\nAgain\n",
        &mut command(args("chat", folder.path(), &[])),
    )?;
    ensure!(
        chat.code == Some(DONE) && chat.stdout.trim().is_empty(),
        "{chat:?}"
    );
    Ok(())
}

#[test]
fn inspect_states_what_a_sparse_cache_holds() -> Result<()> {
    let folder = arg(&fixture("phi3-small-8step"));
    let stated = |context: &str| -> Result<u64> {
        let report = stdout(["inspect", &folder, "--json", "--context", context])?;
        let report: Value = serde_json::from_str(&report)?;
        report["memory"]["kv_cache"].as_u64().context("kv_cache")
    };
    // Blocks of 8, of which the nearest 3 and every eighth stay, in two layers of three; 4 heads of
    // 16 numbers of 2 bytes. At 1000 tokens blocks 0 to 122 are far: heads see 15, 15, 15 and 16.
    let (row, near, far) = (16 * 2 * 2, 2 * 4, 15 + 15 + 15 + 16);
    let dense = 1024 * 4 * row;
    ensure!(stated("1000")? == dense + 2 * (near + far) * 8 * row);
    ensure!(stated("18446744073709551615").is_ok());
    Ok(())
}
