//! Pixels and prompts of Phi-3.5-vision are the reference's: its image processor and processor, with
//! Pillow, torchvision and torch, made the goldens.

use anyhow::{Context, Result, ensure};
use phi_3_5_vision::processor::{Error, Layout, Processor, RgbImage, prompt_ids};
use phi3_image::Limits;
use phi3_tests::golden::Goldens;
use phi3_tests::{fixtures, kit};
use phi3_text::Tokenizer;
use serde_json::Value;
use sha2::{Digest, Sha256};

/// Largest difference of a normalized value; measured: 0 where no interpolation is involved, 7.2e-7
/// in global views.
const TOLERANCE: f32 = 1e-6;

fn json(name: &str) -> Result<Value> {
    let path = fixtures().join("phi3v-preprocess").join(name);
    Ok(serde_json::from_slice(&std::fs::read(&path)?)?)
}

/// A picture as Pillow decodes it.
fn picture(name: &str) -> Result<RgbImage> {
    // Decoders of JPEG differ; these are Pillow's pixels, without loss.
    let suffix = if name.ends_with(".jpg") {
        ".rgb.png"
    } else {
        ""
    };
    let path = fixtures().join("images").join(format!("{name}{suffix}"));
    let rgb = phi3_image::read(&path, &Limits::default())?;
    Ok(RgbImage::new(rgb.width, rgb.height, rgb.pixels)?)
}

fn processor(num_crops: &Value) -> Result<Processor> {
    let config = serde_json::json!({
        "num_crops": num_crops,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    });
    Ok(Processor::from_json(&config)?)
}

fn largest_difference(golden: &[f32], values: impl Iterator<Item = f32>) -> Result<f32> {
    let values: Vec<f32> = values.collect();
    ensure!(values.len() == golden.len(), "{} values", values.len());
    let differences = golden.iter().zip(&values).map(|(a, b)| (a - b).abs());
    Ok(differences.fold(0.0, f32::max))
}

/// Every `step`-th row and column of planes 336 wide.
fn strided(values: &[f32], step: usize) -> impl Iterator<Item = f32> {
    let rows = values
        .chunks_exact(336 * 336)
        .flat_map(move |plane| plane.chunks_exact(336).step_by(step));
    rows.flat_map(move |row| row.iter().copied().step_by(step))
}

#[test]
fn pixels_are_the_reference_s_in_every_byte() -> Result<()> {
    let golden = json("golden.json")?;
    let goldens = Goldens::load(&fixtures().join("phi3v-preprocess"))?;
    let cases = golden["cases"].as_object().context("cases")?;
    ensure!(cases.len() == 34);
    let mut most = 0f32;
    for (name, case) in cases {
        let processor = processor(&case["num_crops"])?;
        let image = picture(case["image"].as_str().context("image")?)?;
        let hd = processor.hd_image(&image)?;
        let digest: String = Sha256::digest(hd.pixels())
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(digest.as_str(), case["hd_rgb_sha256"], "{name}");

        let processed = processor.process(&image)?;
        let layout = &processed.layout;
        let size = serde_json::json!([layout.height(), layout.width()]);
        assert_eq!(size, case["image_sizes"], "{name}");
        assert_eq!(layout.tokens() as u64, case["num_img_tokens"], "{name}");
        assert_eq!(layout.crops() as u64 + 1, case["crops_used"], "{name}");

        let global = processed.pixel_values.get(..3 * 336 * 336);
        let global = strided(global.context("the global view")?, 6);
        let expected = goldens.floats(name, "global_stride6").context("global")?;
        let difference = largest_difference(expected, global)?;
        if let Some(expected) = goldens.floats(name, "pixel_values_stride16") {
            let all = strided(&processed.pixel_values, 16);
            most = most.max(largest_difference(expected, all)?);
        }
        most = most.max(difference);
        ensure!(most <= TOLERANCE, "{name}: {most}");

        let moments = case["crop_channel_mean"].as_array().context("means")?;
        for (plane, values) in processed.pixel_values.chunks_exact(336 * 336).enumerate() {
            let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / (336.0 * 336.0);
            let expected = moments[plane / 3][plane % 3].as_f64().context("mean")?;
            ensure!(
                (mean - expected).abs() < 2e-5,
                "{name}: plane {plane}: {mean}"
            );
        }

        let filled = processed.filled(processor.num_crops);
        let shape = case["pixel_values_shape"].as_array().context("shape")?;
        let shape: u64 = shape.iter().filter_map(Value::as_u64).product();
        assert_eq!(filled.len() as u64, shape, "{name}");
        let rest = filled.get(processed.pixel_values.len()..).context("rest")?;
        ensure!(rest.iter().all(|value| *value == 0.0));
    }
    println!("largest difference of a value: {most:e}");
    Ok(())
}

#[test]
fn sizes_and_tokens_are_those_of_the_reference_s_table() -> Result<()> {
    let table = json("token_count_table.json")?;
    let rows = table.as_array().context("a table")?;
    ensure!(rows.len() == 92);
    for row in rows {
        let size = |name: &str| row[name].as_u64().map(|n| n as usize).context("a number");
        let layout = Layout::new(size("width")?, size("height")?, size("num_crops")?)?;
        assert_eq!(layout.width(), size("padded_width")?, "{row}");
        assert_eq!(layout.height(), size("padded_height")?, "{row}");
        assert_eq!(layout.tokens(), size("tokens")?, "{row}");
    }
    Ok(())
}

#[test]
fn hostile_sizes_are_right_or_errors() -> Result<()> {
    for num_crops in [1, 4, 16, 64] {
        for (width, height) in [
            (1, 1),
            (1, 10_000),
            (10_000, 1),
            (1, 336),
            (7, 5000),
            (65_535, 1),
        ] {
            let image = RgbImage::new(width, height, vec![9; width * height * 3])?;
            let processor = Processor::default().with_num_crops(num_crops)?;
            match processor.process(&image) {
                Ok(processed) => {
                    let crops = processed.layout.crops();
                    ensure!(crops <= num_crops, "{width}x{height}: {crops} crops");
                    ensure!(processed.pixel_values.len() == (crops + 1) * 3 * 336 * 336);
                    ensure!(processed.pixel_values.iter().all(|value| value.is_finite()));
                }
                // The reference fails too: nothing of the short side remains.
                Err(Error::TooNarrow { .. }) => ensure!(width.max(height) > 336),
                Err(error) => return Err(error.into()),
            }
        }
    }
    ensure!(RgbImage::new(0, 5, Vec::new()).is_err());
    ensure!(RgbImage::new(usize::MAX, 2, Vec::new()).is_err());
    ensure!(RgbImage::new(2, 2, vec![0; 11]).is_err());
    ensure!(Processor::default().with_num_crops(0).is_err());
    ensure!(Processor::default().with_num_crops(65).is_err());
    for config in [
        r#"{"num_crops": -1}"#,
        r#"{"num_crops": 1e9}"#,
        r#"{"num_crops": 4, "image_std": [0, 1, 1]}"#,
        r#"{"image_mean": [0.5]}"#,
        "[]",
    ] {
        ensure!(
            Processor::from_json(&serde_json::from_str(config)?).is_err(),
            "{config}"
        );
    }
    Ok(())
}

/// Ids written as (id, count).
fn unrolled(rle: &Value) -> Result<Vec<i64>> {
    let mut ids = Vec::new();
    for pair in rle.as_array().context("pairs")? {
        let number = |i: usize| pair[i].as_i64().context("a number");
        ids.extend(std::iter::repeat_n(number(0)?, number(1)? as usize));
    }
    Ok(ids)
}

fn check_prompt(case: &Value, tokenizer: &Tokenizer) -> Result<()> {
    let processor = processor(&case["num_crops"])?;
    let mut tokens = Vec::new();
    for name in case["images"].as_array().into_iter().flatten() {
        let image = picture(name.as_str().context("a name")?)?;
        tokens.push(processor.layout(image.width(), image.height())?.tokens());
    }
    let prompt = case["prompt"].as_str().context("a prompt")?;
    let ids = prompt_ids(prompt, &tokens, |text| {
        tokenizer.encode(text, true).map_err(anyhow::Error::from)
    })?;
    ensure!(ids == unrolled(&case["ids_rle"])?, "{prompt}: {ids:?}");
    Ok(())
}

#[test]
fn prompts_are_the_reference_s_ids() -> Result<()> {
    let Some(kit) = kit("prompts_are_the_reference_s_ids") else {
        return Ok(());
    };
    let read = |name: &str| -> Result<Value> {
        Ok(serde_json::from_slice(&std::fs::read(kit.join(name))?)?)
    };
    let tokenizer = |folder: &str| -> Result<Tokenizer> {
        let json = std::fs::read(kit.join(folder).join("tokenizer.json"))?;
        let config = read(&format!("{folder}/tokenizer_config.json"))?;
        Ok(Tokenizer::from_json(&json, Some(&config))?)
    };
    let real = tokenizer("tokenizers/phi3-vision")?;
    let cases = read("phi3v-preprocess/processor_real_tokenizer.json")?;
    ensure!(cases.as_array().is_some_and(|cases| cases.len() == 11));
    for case in cases.as_array().into_iter().flatten() {
        check_prompt(case, &real).with_context(|| case["name"].to_string())?;
    }
    let small = tokenizer("phi3.5-vision")?;
    let golden = read("phi3.5-vision/golden.json")?;
    for (name, case) in golden["cases"].as_object().context("cases")? {
        check_prompt(case, &small).with_context(|| name.clone())?;
    }
    Ok(())
}
