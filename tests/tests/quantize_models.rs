//! A whole model through `phi3_hub::quantize`: what comes back is the same model.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use candle_core::Tensor;
use phi3::hub::quantize::{Mix, Options, QuantizedSource, write_gguf};
use phi3::image::{Limits, Processor};
use phi3::nn::{CausalLm, Input, LogitRows, Span, TensorPart, TensorSource};
use phi3::{CacheType, LanguageModel, LoadOptions};
use phi3_kernels::BlockType;
use phi3_tests::fixtures;
use phi3_tests::parity::assert_close;
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

/// Largest difference that weights of Q8_0 make to the f32 logits of phi3.5-vision's fixture, all rows of
/// a prompt with an image, as a share of their deviation. Measured: 1.4e-1 of the decoder alone, 3.1e-1
/// of the tower alone, 3.5e-1 of both.
const VISION_Q8_0_TOLERANCE: f32 = 6e-1;

fn bytes_of(source: &dyn TensorSource, name: &str) -> Result<Vec<(BlockType, Vec<u8>)>> {
    let tensor = source.tensor(name).map_err(|error| anyhow!("{error}"))?;
    let tensor = tensor.with_context(|| name.to_owned())?;
    let part = |part: &TensorPart| (part.block_type, part.bytes.to_vec());
    Ok(tensor.parts().iter().map(part).collect())
}

/// Every matrix of the decoder, and with the flag of the tower and the projection, is what encoding it
/// alone gives; all else is as it was stored.
#[test]
fn a_vision_model_is_quantized_layer_by_layer() -> Result<()> {
    let checkpoint = phi3::hub::open_folder(&fixtures().join("phi3.5-vision"))?;
    let stored = checkpoint.weights.as_ref();
    let q8_0: Mix = "Q8_0".parse()?;
    for (decoder, tower) in [
        (Some(q8_0), None),
        (None, Some(q8_0)),
        (Some(q8_0), Some(q8_0)),
    ] {
        let source = QuantizedSource::of_parts(&checkpoint, decoder, tower, None)?;
        let mut names = stored.names();
        names.sort();
        assert_eq!(source.names(), names);
        let mut encoded = [0, 0];
        for name in &names {
            let before = bytes_of(stored, name)?;
            let after = bytes_of(&source, name)?;
            let of_tower = name.contains("vision_embed_tokens");
            let tensor = stored.tensor(name).map_err(|error| anyhow!("{error}"))?;
            let tensor = tensor.context("a tensor")?;
            let linear = tensor.shape().len() == 2 && !name.contains("position_embedding");
            let wanted = if of_tower { tower } else { decoder };
            if !linear || wanted.is_none() {
                let f32s = before.iter().all(|(kind, _)| *kind == BlockType::F32);
                assert!(f32s && after == before, "{name}");
                continue;
            }
            encoded[usize::from(of_tower)] += 1;
            let values = tensor.to_f32()?;
            let columns = tensor.columns();
            let row = BlockType::Q8_0.row_bytes(columns).context("whole blocks")?;
            let mut alone = vec![0; values.len() / columns * row];
            phi3_kernels::quantize(BlockType::Q8_0, &values, columns, None, &mut alone)?;
            assert!(after == [(BlockType::Q8_0, alone)], "{name}");
        }
        // Two layers of four matrices, embedding and head; three of six, and the projection's two.
        let expected = [10, 20];
        for ((encoded, expected), wanted) in encoded.iter().zip(expected).zip([decoder, tower]) {
            assert_eq!(*encoded, if wanted.is_some() { expected } else { 0 });
        }
    }
    Ok(())
}

#[test]
fn a_quantized_vision_model_stays_close() -> Result<()> {
    let folder = fixtures().join("phi3.5-vision");
    let path = folder.to_str().context("a path in UTF-8")?;
    let image = phi3::image::Image::path(fixtures().join("images/gradient.png"));
    let processor = Processor::default().with_num_crops(4)?;
    let image = processor.process(&image.open(&Limits::default())?)?;
    let mut ids: Vec<i64> = (0..40).map(|i| (i * i * 7 + i * 31) % 500).collect();
    ids.splice(5..5, std::iter::repeat_n(-1, image.layout.tokens()));
    // Logits, and the rows of the image.
    let run = |quantize: Option<&str>, quantize_vision: Option<&str>| -> Result<[Vec<f32>; 2]> {
        let options = LoadOptions {
            device: "cpu".parse()?,
            quantize: quantize.map(str::parse).transpose()?,
            quantize_vision: quantize_vision.map(str::parse).transpose()?,
            cache_type: CacheType::F32,
            ..LoadOptions::default()
        };
        let model = phi3::load_with(path, &options)?;
        let model = model.vision().context("it sees")?;
        let features = model.encode_images(&[&image], None)?;
        let rows = model.embed_prompt(&ids, &features)?;
        let mut cache = model.new_cache();
        let spans = &mut [Span::new(ids.len(), &mut cache).with_logits(LogitRows::All)];
        let logits = model.forward(Input::Embeddings(&rows), spans, None)?;
        let values = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
        Ok([values(&logits)?, values(features[0].rows())?])
    };
    let vocab = 560;
    let [logits, rows] = run(None, None)?;
    for (decoder, tower) in [
        (Some("Q8_0"), None),
        (None, Some("Q8_0")),
        (Some("Q8_0"), Some("Q8_0")),
    ] {
        let [found, found_rows] = run(decoder, tower)?;
        assert_eq!(found_rows == rows, tower.is_none());
        let error = assert_close("logits", &found, &logits, vocab, VISION_Q8_0_TOLERANCE)?;
        println!("decoder {decoder:?}, tower {tower:?}: {error:e}");
        assert!(error > 1e-3, "nothing was rounded");
    }
    // Types whose blocks the narrow rows do not fill, and those that are floats.
    for mix in ["Q4_K_M", "INT4", "F16", "Q2_K"] {
        let [found, _] = run(Some(mix), Some(mix))?;
        assert!(
            found != logits && found.iter().all(|logit| logit.is_finite()),
            "{mix}"
        );
    }
    Ok(())
}

#[test]
fn a_tower_that_is_not_there_cannot_be_quantized() -> Result<()> {
    let checkpoint = phi3::hub::open_folder(&fixtures().join("phi3-mini-4k"))?;
    let tower = Some("Q8_0".parse()?);
    let refused = QuantizedSource::of_parts(&checkpoint, None, tower, None).err();
    let message = refused.context("it was quantized")?.to_string();
    assert!(message.contains("no image tower"), "{message}");
    // And a file has no place for one.
    let folder = tempfile::tempdir()?;
    let vision = fixtures().join("phi3.5-vision");
    let refused = write(&vision, "Q8_0", &folder.path().join("x.gguf")).err();
    let message = refused.context("it was written")?.to_string();
    assert!(
        message.contains("phi3_v") && message.contains("into a file"),
        "{message}"
    );
    Ok(())
}
