//! A whole model through `phi3_hub::quantize`: what comes back is the same model.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use phi3::hub::quantize::{Mix, Options, write_gguf};
use phi3::nn::{Input, LogitRows, Span};
use phi3::{CacheType, LanguageModel, LoadOptions};
use phi3_tests::fixtures;
use serde_json::Value as Json;

fn write(folder: &Path, mix: &str, out: &Path) -> Result<()> {
    let checkpoint = phi3::hub::open_folder(folder)?;
    let go_on = &mut |_: &_, _, _| ControlFlow::Continue(());
    write_gguf(&checkpoint, mix.parse()?, out, &Options::default(), go_on)?;
    Ok(())
}

fn load(path: &Path, quantize: Option<Mix>) -> Result<LanguageModel> {
    let options = LoadOptions {
        device: "cpu".parse()?,
        quantize,
        cache_type: CacheType::F32,
        ..LoadOptions::default()
    };
    let path = path.to_str().context("a path in UTF-8")?;
    Ok(phi3::load_with(path, &options)?)
}

fn logits(model: &LanguageModel, ids: &[u32]) -> Result<Vec<f32>> {
    let mut cache = model.model().new_cache();
    let spans = &mut [Span::new(ids.len(), &mut cache).with_logits(LogitRows::All)];
    let logits = model.model().forward(Input::Ids(ids), spans, None)?;
    Ok(logits.flatten_all()?.to_vec1()?)
}

/// Bit for bit, so that no test of one way needs repeating for the other.
#[test]
fn loading_quantized_is_loading_the_file() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for name in [
        "phi3-mini-4k",
        "phi3-mini-4k-window",
        "phi3-mini-128k-longrope",
        "phi4-mini",
        "phi3.5-moe",
        "phi3.5-moe-jitter",
        "phi3-small-8step",
        "phi3-small-homo",
        "phi3-small-128k",
    ] {
        let source = fixtures().join(name);
        for mix in ["F32", "Q8_0", "Q4_K_M", "Q2_K"] {
            let out = folder.path().join(format!("{name}-{mix}.gguf"));
            write(&source, mix, &out).with_context(|| format!("{name} {mix}"))?;
            let (file, loaded) = (load(&out, None)?, load(&source, Some(mix.parse()?))?);
            // Past the limit of the short factors too.
            let vocab = u32::try_from(file.model().info().vocab_size)?;
            let ids: Vec<u32> = (0..70).map(|i| (7 * i + 3) % vocab).collect();
            let longest = file.model().info().max_position_embeddings;
            let ids = &ids[..ids.len().min(longest)];
            let (a, b) = (logits(&file, ids)?, logits(&loaded, ids)?);
            assert!(a == b, "{name} {mix}");
            if mix == "F32" {
                assert!(a == logits(&load(&source, None)?, ids)?, "{name} {mix}");
            }
        }
    }
    Ok(())
}

fn demo() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.demo/SmolLM2-135M-Instruct-f16");
    if folder.join("config.json").exists() {
        return Some(folder);
    }
    eprintln!("skipped: run scripts/demo.sh once to fetch the trained model");
    None
}

#[test]
fn a_trained_models_tokenizer_and_template_come_back() -> Result<()> {
    let Some(source) = demo() else { return Ok(()) };
    let folder = tempfile::tempdir()?;
    let out = folder.path().join("model.gguf");
    write(&source, "Q8_0", &out)?;
    let (before, after) = (load(&source, None)?, load(&out, None)?);
    assert_eq!(before.stop_ids(), after.stop_ids());

    let original = phi3::hub::open_folder(&source)?;
    let written = phi3::hub::gguf::open(&out)?;
    let template = |c: &phi3::hub::Checkpoint| c.chat_template.clone().map(|t| (t.text, t.named));
    assert_eq!(template(&written), template(&original));

    let golden = std::fs::read(fixtures().join("smollm2/golden.json"))?;
    let golden: Json = serde_json::from_slice(&golden)?;
    let mut texts: Vec<String> = strings(&golden);
    texts.push(
        "Digits 1234567, caf\u{e9}, \u{1f600}, \t tabs\n\n<|im_start|>user x<|im_end|>".to_owned(),
    );
    let (a, b) = (before.tokenizer()?, after.tokenizer()?);
    for text in &texts {
        for special in [false, true] {
            assert_eq!(
                a.encode(text, special)?,
                b.encode(text, special)?,
                "{text:?}"
            );
        }
    }

    // Eight bits are enough for the same choice of the next token.
    let ids = a.encode("The capital of France is", false)?;
    let top = |model: &LanguageModel| -> Result<Option<usize>> {
        let all = logits(model, &ids)?;
        let last = all.len() - model.model().info().vocab_size;
        Ok(phi3::argmax(&all[last..]))
    };
    assert_eq!(top(&before)?, top(&after)?);
    Ok(())
}

/// Every text of a JSON value.
fn strings(json: &Json) -> Vec<String> {
    match json {
        Json::String(text) => vec![text.clone()],
        Json::Array(items) => items.iter().flat_map(strings).collect(),
        Json::Object(fields) => fields.values().flat_map(strings).collect(),
        _ => Vec::new(),
    }
}
