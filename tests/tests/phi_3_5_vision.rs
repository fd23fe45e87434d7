//! Phi-3.5-vision against the reference's goldens, its tower against candle-transformers' CLIP, and
//! the forward contract with images in the sequences.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::clip::text_model::Activation;
use candle_transformers::models::clip::vision_model::{ClipVisionConfig, ClipVisionTransformer};
use half::bf16;
use phi_3_5_vision::processor::{ProcessedImage, Processor, RgbImage};
use phi_3_5_vision::{Config, ImageFeatures, Model};
use phi3_kernels::BlockType;
use phi3_nn::{CausalLm, Input, KvCache, LogitRows, Observer, Span};
use phi3_tests::golden::Kit;
use phi3_tests::parity::{F32_TOLERANCE, Recorder, argmax_rows, assert_close, decode, step};
use phi3_tests::runner::check_contract;
use phi3_tests::{fixtures, kit};
use serde_json::{Value, json};

/// Largest difference that rounding the weights, tower included, to bf16 makes to a golden logit,
/// as a share of the deviation of the logits. Measured: 9.8e-2.
const BF16_WEIGHTS_TOLERANCE: f32 = 2.5e-1;

/// The same for weights of Q8_0, whose matrices here are narrow and multiply f32 activations.
/// Measured: 1.5e-1.
const Q8_0_WEIGHTS_TOLERANCE: f32 = 3e-1;

fn read_json(path: &Path) -> Result<Value> {
    let bytes = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    Ok(serde_json::from_slice(&bytes)?)
}

/// A folder's configuration, the tower's own included, as `phi3_hub` gives it.
fn config_of(folder: &Path, kit: &Kit) -> Result<Config> {
    let mut config = kit.config.clone();
    config["vision_config"] = read_json(&folder.join("clip_vision_config.json"))?;
    Ok(Config::from_json(&config)?)
}

fn load(folder: &Path) -> Result<(Kit, Model)> {
    let kit = Kit::load(folder)?;
    let model = Model::new(&config_of(folder, &kit)?, kit.weights(&Device::Cpu)?)?;
    Ok((kit, model))
}

fn load_fixture() -> Result<(Kit, Model)> {
    load(&fixtures().join("phi3.5-vision"))
}

/// The pixels of a file; of a JPEG those that the reference's decoder gave.
fn rgb(folder: &Path, name: &str) -> Result<RgbImage> {
    let exact = if name.ends_with(".jpg") {
        folder.join(format!("{name}.rgb.png"))
    } else {
        folder.join(name)
    };
    let image = phi3_image::read(&exact, &phi3_image::Limits::default())?;
    Ok(RgbImage::new(image.width, image.height, image.pixels)?)
}

/// The images of a case, in order.
fn images(case: &Value, folder: &Path) -> Result<Vec<ProcessedImage>> {
    let num_crops = case["num_crops"].as_u64().context("num_crops")? as usize;
    let processor = Processor::default().with_num_crops(num_crops)?;
    let names = case["images"].as_array().cloned().unwrap_or_default();
    let names = names.iter().map(|name| name.as_str().context("a name"));
    names
        .map(|name| Ok(processor.process(&rgb(folder, name?)?)?))
        .collect()
}

/// A picture that no golden has, in `columns` x `rows` crops.
fn some_image(seed: usize, columns: usize, rows: usize) -> Result<ProcessedImage> {
    let (width, height) = (columns * 336, rows * 336);
    let value = |i: usize| ((i * i / 7 + i * (seed + 3)) / 64 % 256) as u8;
    let image = RgbImage::new(width, height, (0..3 * width * height).map(value).collect())?;
    let image = Processor::default()
        .with_num_crops(columns * rows)?
        .process(&image)?;
    ensure!(image.layout.crops() == columns * rows);
    Ok(image)
}

fn encode(model: &Model, images: &[ProcessedImage]) -> Result<Vec<ImageFeatures>> {
    Ok(model.encode_images(&images.iter().collect::<Vec<_>>(), None)?)
}

/// One call with embeddings; logits of all rows.
fn embedded_step(
    model: &Model,
    cache: &mut KvCache,
    rows: &Tensor,
    observer: Option<&mut dyn Observer>,
) -> Result<Vec<f32>> {
    let span = Span::new(rows.dim(0)?, cache).with_logits(LogitRows::All);
    let logits = model.forward(Input::Embeddings(rows), &mut [span], observer)?;
    Ok(logits.flatten_all()?.to_vec1()?)
}

/// Every `step`-th row of `rows`, from `first` on.
fn every(rows: &[f32], width: usize, step: usize) -> Vec<f32> {
    let rows = rows.chunks_exact(width).step_by(step);
    rows.flatten().copied().collect()
}

/// All that a kit's folder has, against the images of another; the largest difference of a logit of
/// each case, as a share of their deviation.
fn check(folder: &Path, pictures: &Path) -> Result<Vec<(String, f32)>> {
    let (kit, model) = load(folder)?;
    let golden = read_json(&folder.join("golden.json"))?;
    let cases = golden["cases"].as_object().context("cases")?.iter();
    cases
        .map(|(case, about)| {
            let largest = check_case(&kit, &model, case, &images(about, pictures)?)
                .with_context(|| format!("case {case}"))?;
            Ok((case.clone(), largest))
        })
        .collect()
}

fn check_case(kit: &Kit, model: &Model, case: &str, images: &[ProcessedImage]) -> Result<f32> {
    let vocab = model.info().vocab_size;
    let hidden = model.info().hidden_size;
    let mut recorder = Recorder::default();
    let images: Vec<&ProcessedImage> = images.iter().collect();
    let features = model.encode_images(&images, Some(&mut recorder))?;
    let ids = kit.signed_ids(case, "input_ids").context("input_ids")?;
    let rows = model.embed_prompt(&ids, &features)?;
    let mut cache = model.new_cache();
    let logits = embedded_step(model, &mut cache, &rows, Some(&mut recorder))?;

    // In the order in which they are computed: the first that differs says where to look.
    let shown = |name: &str| {
        let found = recorder.values.get(name).map(Vec::as_slice);
        found.with_context(|| format!("`{name}` was not shown"))
    };
    let compare = |name: &str, found: &[f32], width: usize| match kit.floats(case, name) {
        Some(golden) => assert_close(name, found, golden, width, F32_TOLERANCE),
        None => Ok(0.0),
    };
    if !images.is_empty() {
        // The goldens count the class token, whose features nobody uses, as row 0.
        let patches = 24 * 24;
        let clip = shown("clip_hidden_m2")?;
        let width =
            clip.len() / patches / images.iter().map(|i| i.layout.crops() + 1).sum::<usize>();
        for (name, crops, wanted) in [
            (
                "clip_hidden_m2_first3crops_row0to3",
                3,
                (0..4).collect::<Vec<_>>(),
            ),
            (
                "clip_hidden_m2_first6crops_every_37th",
                6,
                (0..=patches).step_by(37).collect(),
            ),
        ] {
            let golden = kit.floats(case, name).context("clip")?;
            let golden: Vec<&[f32]> = golden.chunks_exact(width).collect();
            let (mut found, mut expected) = (Vec::new(), Vec::new());
            let crops = clip.chunks_exact(patches * width).take(crops);
            for (crop, golden) in crops.zip(golden.chunks_exact(wanted.len())) {
                for (row, golden) in wanted.iter().zip(golden).filter(|(row, _)| **row > 0) {
                    found.extend_from_slice(&crop[(row - 1) * width..][..width]);
                    expected.extend_from_slice(golden);
                }
            }
            assert_close(name, &found, &expected, width, F32_TOLERANCE)?;
        }
        let merged = 4 * width;
        let projected = shown("img_projection_in")?;
        compare(
            "img_projection_in_every_61st",
            &every(projected, merged, 61),
            merged,
        )?;
        let projected = shown("img_projection_out")?;
        compare("img_projection_out", projected, hidden)?;
        compare(
            "img_projection_out_every_5th",
            &every(projected, hidden, 5),
            hidden,
        )?;
    }
    let layer0 = every(shown("hidden_layer0")?, hidden, 16);
    compare("hidden_layer0_every_16th", &layer0, hidden)?;
    compare("logits_every_4th", &every(&logits, vocab, 4), vocab)?;
    compare("logits_every_32nd", &every(&logits, vocab, 32), vocab)?;
    let last = &logits[logits.len().saturating_sub(16 * vocab)..];
    ensure!(kit.floats(case, "last_logits").is_some(), "last_logits");
    let mut largest = compare("last_logits", last, vocab)?;

    let decode_ids = kit.ids(case, "decode_ids").context("decode_ids")?;
    let steps = decode(model, &mut cache, &decode_ids[..decode_ids.len() - 1])?;
    largest = largest.max(compare("decode_logits", &steps, vocab)?);
    let mut greedy = argmax_rows(&logits[logits.len() - vocab..], vocab);
    greedy.extend(argmax_rows(&steps, vocab));
    ensure!(greedy == decode_ids, "decode_ids: {greedy:?}");
    Ok(largest)
}

#[test]
fn every_golden_of_the_fixture_holds() -> Result<()> {
    let cases = check(
        &fixtures().join("phi3.5-vision"),
        &fixtures().join("images"),
    )?;
    println!("of the deviation of its logits: {cases:?}");
    Ok(())
}

#[test]
fn every_golden_of_the_full_kit_holds() -> Result<()> {
    let Some(folder) = kit("the comparison with all phi3_v goldens") else {
        return Ok(());
    };
    let cases = check(&folder.join("phi3.5-vision"), &folder.join("images"))?;
    println!("of the deviation of its logits: {cases:?}");
    ensure!(cases.len() >= 7, "only {} cases", cases.len());
    Ok(())
}

/// candle-transformers leaves the embeddings out of its hidden states and appends the pooled output:
/// the last but one of three layers is its entry 1.
#[test]
fn the_tower_is_candle_transformers_clip() -> Result<()> {
    let (kit, model) = load_fixture()?;
    let tensors = kit.f32_tensors()?.into_iter().map(|(name, shape, bytes)| {
        let tensor = Tensor::from_raw_buffer(&bytes, DType::F32, &shape, &Device::Cpu)?;
        Ok((name, tensor))
    });
    let vars = VarBuilder::from_tensors(tensors.collect::<Result<_>>()?, DType::F32, &Device::Cpu);
    let config = ClipVisionConfig {
        embed_dim: 128,
        activation: Activation::QuickGelu,
        intermediate_size: 256,
        num_hidden_layers: 3,
        num_attention_heads: 2,
        projection_dim: 768,
        num_channels: 3,
        image_size: 336,
        patch_size: 14,
    };
    let vars = vars.pp("model.vision_embed_tokens.img_processor.vision_model");
    let theirs = ClipVisionTransformer::new(vars, &config)?;
    // 7 crops: more than go through our tower at once.
    let images = [some_image(1, 3, 1)?, some_image(2, 2, 1)?];
    let pixels: Vec<f32> = images.iter().flat_map(|i| i.pixel_values.clone()).collect();
    let pixels = Tensor::from_vec(pixels, (7, 3, 336, 336), &Device::Cpu)?;
    let expected = theirs.output_hidden_states(&pixels)?[1].narrow(1, 1, 576)?;
    let mut recorder = Recorder::default();
    model.encode_images(&images.iter().collect::<Vec<_>>(), Some(&mut recorder))?;
    let found = recorder.values.get("clip_hidden_m2").context("features")?;
    let expected: Vec<f32> = expected.flatten_all()?.to_vec1()?;
    let error = assert_close("clip_hidden_m2", found, &expected, 128, F32_TOLERANCE)?;
    println!("within {error:e} of the deviation of the features");
    Ok(())
}

/// What an image's features are does not depend on the images beside it.
#[test]
fn images_encoded_together_are_those_encoded_alone() -> Result<()> {
    let (_, model) = load_fixture()?;
    let images = [
        some_image(5, 1, 2)?,
        some_image(6, 3, 1)?,
        some_image(7, 1, 1)?,
    ];
    let together = encode(&model, &images)?;
    for (image, features) in images.iter().zip(&together) {
        ensure!(features.tokens() == image.layout.tokens());
        let alone = encode(&model, std::slice::from_ref(image))?;
        let difference = (alone[0].rows() - features.rows())?.abs()?.max_all()?;
        ensure!(difference.to_scalar::<f32>()? == 0.0);
    }
    ensure!(encode(&model, &[])?.is_empty());
    Ok(())
}

/// The fixture with a longrope limit of 320 tokens, and prompts with images below, at, across and
/// beyond it: packed, in chunks, and decoded across the limit they are what they are alone.
#[test]
fn the_forward_contract_holds_with_images() -> Result<()> {
    let folder = fixtures().join("phi3.5-vision");
    let kit = Kit::load(&folder)?;
    let mut config = kit.config.clone();
    config["original_max_position_embeddings"] = json!(320);
    let weights = kit.weights(&Device::Cpu)?;
    let model = Model::new(&Config::from_json(&config)?, weights)?;
    let vocab = model.info().vocab_size;
    // One crop and the global view: 313 tokens.
    let features = encode(&model, &[some_image(3, 1, 1)?])?;
    ensure!(features[0].tokens() == 313);
    let prompt = |before: i64, after: i64| -> Vec<i64> {
        let text = |ids: std::ops::Range<i64>| ids.map(|i| (i * i * 7 + i * 31) % 500);
        let image = std::iter::repeat_n(-1, 313);
        text(0..before)
            .chain(image)
            .chain(text(9..9 + after))
            .collect()
    };
    let prompts = [prompt(3, 1), prompt(3, 4), prompt(3, 5), prompt(20, 30)];
    let rows = prompts
        .iter()
        .map(|ids| Ok(model.embed_prompt(ids, &features)?))
        .collect::<Result<Vec<_>>>()?;
    let alone = rows
        .iter()
        .map(|rows| embedded_step(&model, &mut model.new_cache(), rows, None))
        .collect::<Result<Vec<_>>>()?;
    let close = |what: &str, found: &[f32], expected: &[f32]| {
        assert_close(what, found, expected, vocab, F32_TOLERANCE).map(drop)
    };
    let last = |logits: &[f32]| logits[logits.len() - vocab..].to_vec();

    let packed = Tensor::cat(&rows, 0)?;
    let mut caches: Vec<_> = rows.iter().map(|_| model.new_cache()).collect();
    let mut spans: Vec<_> = caches
        .iter_mut()
        .zip(&prompts)
        .map(|(cache, ids)| Span::new(ids.len(), cache).with_logits(LogitRows::All))
        .collect();
    let logits = model.forward(Input::Embeddings(&packed), &mut spans, None)?;
    close(
        "packed",
        &logits.flatten_all()?.to_vec1::<f32>()?,
        &alone.concat(),
    )?;

    for (rows, alone) in rows.iter().zip(&alone) {
        let len = rows.dim(0)?;
        let (mut cache, mut chunked) = (model.new_cache(), Vec::new());
        for first in (0..len).step_by(100) {
            let chunk = rows.narrow(0, first, 100.min(len - first))?;
            let span = Span::new(chunk.dim(0)?, &mut cache)
                .with_logits(LogitRows::All)
                .reaching(len);
            let logits = model.forward(Input::Embeddings(&chunk), &mut [span], None)?;
            chunked.extend(logits.flatten_all()?.to_vec1::<f32>()?);
        }
        close("chunked", &chunked, alone)?;

        // Decoded by ids, across the limit where it is near, from the kept rows of the image; back
        // below it; and a second turn.
        let more = [7u32, 19, 23, 5, 11];
        let mut cache = model.new_cache();
        embedded_step(&model, &mut cache, rows, None)?;
        let found = decode(&model, &mut cache, &more)?;
        let all = Tensor::cat(&[rows, &model.embed(&more)?], 0)?;
        let expected = embedded_step(&model, &mut model.new_cache(), &all, None)?;
        close("decoded", &last(&found), &last(&expected))?;
        cache.truncate(len - 2)?;
        let found = embedded_step(&model, &mut cache, &rows.narrow(0, len - 2, 2)?, None)?;
        close("after truncation", &last(&found), &last(alone))?;
        let found = step(&model, &mut cache, &more)?;
        close("a second turn", &last(&found), &last(&expected))?;
    }
    // And in text alone, as every model.
    let ids = |len: u32| (0..len).map(|i| (i * 13 + len) % vocab as u32).collect();
    check_contract(&model, &[ids(5), ids(320), ids(321), ids(324)])
}

#[test]
fn weights_in_fewer_bits_stay_close_the_towers_too() -> Result<()> {
    let folder = fixtures().join("phi3.5-vision");
    let kit = Kit::load(&folder)?;
    let config = config_of(&folder, &kit)?;
    let about = &read_json(&folder.join("golden.json"))?["cases"]["single"];
    let images = images(about, &fixtures().join("images"))?;
    let ids = kit.signed_ids("single", "input_ids").context("ids")?;
    let golden = kit.floats("single", "last_logits").context("logits")?;
    let f32s = |bytes: &[u8]| -> Vec<f32> {
        let chunks = bytes.as_chunks::<4>().0.iter();
        chunks.map(|c| f32::from_le_bytes(*c)).collect()
    };
    for (block_type, tolerance) in [
        (BlockType::BF16, BF16_WEIGHTS_TOLERANCE),
        (BlockType::Q8_0, Q8_0_WEIGHTS_TOLERANCE),
    ] {
        let weights = kit.weights_as(&Device::Cpu, |name, stored, bytes| {
            let values = f32s(bytes);
            // Norms, biases and rows that are no whole blocks stay as they are.
            let matrix =
                name.contains("_proj") || name.contains(".fc") || name.contains("img_projection");
            if block_type == BlockType::BF16 {
                let bytes = values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes());
                return (block_type, bytes.collect());
            }
            if !matrix || name.ends_with("bias") {
                return (stored, bytes.to_vec());
            }
            let mut blocks = vec![0; block_type.row_bytes(values.len()).unwrap_or(0)];
            match phi3_kernels::quantize(block_type, &values, 32, None, &mut blocks) {
                Ok(()) => (block_type, blocks),
                Err(_) => (stored, bytes.to_vec()),
            }
        })?;
        let model = Model::new(&config, weights)?;
        let vocab = model.info().vocab_size;
        let rows = model.embed_prompt(&ids, &encode(&model, &images)?)?;
        let logits = embedded_step(&model, &mut model.new_cache(), &rows, None)?;
        let last = &logits[logits.len() - golden.len()..];
        let error = assert_close(block_type.name(), last, golden, vocab, tolerance)?;
        println!("{block_type}: {error:e}");
        ensure!(
            error > tolerance / 100.0,
            "the weights were not rounded at all"
        );
    }
    Ok(())
}

/// A GPU's path: candle's operations in decoder and projections.
#[test]
fn candle_operations_give_the_same() -> Result<()> {
    let folder = fixtures().join("phi3.5-vision");
    let (kit, model) = load(&folder)?;
    let weights = kit.weights(&Device::Cpu)?.with_candle_operations();
    let candle = Model::new(&config_of(&folder, &kit)?, weights)?;
    let image = some_image(8, 2, 1)?;
    let (ours, theirs) = (
        encode(&model, std::slice::from_ref(&image))?,
        encode(&candle, &[image])?,
    );
    let values = |features: &ImageFeatures| features.rows().flatten_all()?.to_vec1::<f32>();
    let hidden = model.info().hidden_size;
    assert_close(
        "features",
        &values(&theirs[0])?,
        &values(&ours[0])?,
        hidden,
        F32_TOLERANCE,
    )?;
    Ok(())
}

#[test]
fn prompts_and_images_that_do_not_fit_are_refused() -> Result<()> {
    let (_, model) = load_fixture()?;
    let image = some_image(3, 1, 1)?;
    let features = encode(&model, std::slice::from_ref(&image))?;
    for ids in [vec![1, -1], vec![1], vec![-1; 314]] {
        let message = model
            .embed_prompt(&ids, &features)
            .err()
            .map(|e| e.to_string());
        ensure!(message.context("it fits")?.contains("313 tokens"));
    }
    ensure!(model.embed_prompt(&[i64::MAX], &[]).is_err());
    ensure!(model.embed_prompt(&[560], &[]).is_err());
    let mut cut = image;
    cut.pixel_values.truncate(3 * 336 * 336 + 7);
    ensure!(encode(&model, &[cut.clone()]).is_err(), "a crop cut short");
    cut.pixel_values.truncate(3 * 336 * 336);
    ensure!(encode(&model, &[cut]).is_err(), "a crop too few");
    Ok(())
}

#[test]
fn configurations_without_sense_name_the_field() -> Result<()> {
    let folder = fixtures().join("phi3.5-vision");
    let kit = Kit::load(&folder)?;
    for (field, key, value, expected) in [
        ("img_processor", "layer_idx", json!(-5), "layer_idx"),
        ("img_processor", "layer_idx", json!(4), "layer_idx"),
        (
            "img_processor",
            "type_feature",
            json!("cls_patch"),
            "type_feature",
        ),
        (
            "embd_layer",
            "hd_transform_order",
            json!("glb_sub"),
            "hd_transform_order",
        ),
        (
            "embd_layer",
            "use_hd_transform",
            json!(false),
            "use_hd_transform",
        ),
        (
            "vision_config",
            "num_attention_heads",
            json!(3),
            "num_attention_heads",
        ),
        (
            "vision_config",
            "num_attention_heads",
            json!(0),
            "num_attention_heads",
        ),
        ("vision_config", "hidden_act", json!("gelu"), "hidden_act"),
        (
            "vision_config",
            "layer_norm_eps",
            json!(-1),
            "layer_norm_eps",
        ),
        (
            "vision_config",
            "num_attention_heads",
            json!("2"),
            "vision_config",
        ),
    ] {
        let mut config = kit.config.clone();
        config[field][key] = value.clone();
        let weights = kit.weights(&Device::Cpu)?;
        let built = Config::from_json(&config).and_then(|config| Model::new(&config, weights));
        let message = built.err().map(|error| error.to_string());
        let message = message.with_context(|| format!("{field}.{key} {value} is accepted"))?;
        ensure!(
            message.contains(expected),
            "{field}.{key} {value}: {message}"
        );
    }
    Ok(())
}
