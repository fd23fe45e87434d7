//! Pictures: what `phi3 image-info` says, and `logits`, `generate` and `chat` with a model that sees.

use anyhow::{Context, Result, ensure};

use crate::support::{
    DONE, FAILED, Tensors, arg, assert_close, command, fixture, run, run_with, stdout,
};
use crate::tiny::{TEMPLATE, Tiny};

pub fn picture(name: &str) -> String {
    arg(&fixture("images").join(name))
}

#[test]
fn image_info_draws_the_crops_and_states_the_tokens() -> Result<()> {
    let text = stdout(["image-info", &picture("wide.png")])?;
    for words in [
        "1000x80, resized to 1344x107, padded to 1344x336",
        "4 crops",
        "745 tokens",
    ] {
        ensure!(text.contains(words), "{words}: {text}");
    }
    let grid: Vec<&str> = text.lines().skip(2).collect();
    ensure!(grid.len() == 6, "{text}");
    ensure!(grid[0] == "+--------+--------+--------+--------+", "{text}");
    ensure!(
        grid[1].starts_with("|........|"),
        "padding is drawn: {text}"
    );
    ensure!(grid[3].contains('1') && grid[3].contains('4'), "{text}");

    let text = stdout(["image-info", "--num-crops", "16", &picture("tall.png")])?;
    ensure!(
        text.contains("9 crops of 336x336 and the global view: 1561 tokens"),
        "{text}"
    );
    run(["image-info", "--num-crops", "0", &picture("tall.png")])?
        .says(FAILED, &["num_crops is 0"])?;
    run(["image-info", "no/such.png"])?.says(FAILED, &["no/such.png"])?;
    // The others are shown all the same.
    let mut both = run(["image-info", "no/such.png", &picture("wide.png")])?;
    let shown = std::mem::take(&mut both.stdout);
    ensure!(shown.contains("745 tokens"), "{shown}");
    both.says(FAILED, &["no/such.png", "1 of 2 files failed"])
}

#[test]
fn image_info_saves_what_the_model_sees() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let into = arg(&folder.path().join("crops"));
    stdout([
        "image-info",
        "--save",
        &into,
        &picture("square.png"),
        "--num-crops",
        "1",
    ])?;
    for (name, side) in [("padded", 336), ("global", 336), ("crop01", 336)] {
        let file = folder.path().join(format!("crops/square-{name}.png"));
        let saved = phi3::image::Image::path(&file).open(&phi3::image::Limits::default())?;
        ensure!((saved.width(), saved.height()) == (side, side), "{name}");
        // A picture of 336x336 in one crop is not resized.
        let original = phi3::image::Image::path(picture("square.png"));
        let original = original.open(&phi3::image::Limits::default())?;
        ensure!(saved == original, "{name}");
    }
    Ok(())
}

/// The vision kit's model with a tokenizer of the test's own.
pub fn seeing() -> Result<Tiny> {
    let tiny = Tiny::of("phi3.5-vision", Some(TEMPLATE))?;
    for file in ["clip_vision_config.json", "preprocessor_config.json"] {
        std::fs::copy(fixture("phi3.5-vision").join(file), tiny.file(file))?;
    }
    Ok(tiny)
}

#[test]
fn logits_of_a_prompt_with_a_picture_are_the_reference_s() -> Result<()> {
    let Some(kit) = kit() else {
        return Ok(());
    };
    let folder = tempfile::tempdir()?;
    let goldens = Tensors::read(&kit.join("phi3.5-vision/golden.safetensors"))?;
    let golden: serde_json::Value =
        serde_json::from_slice(&std::fs::read(kit.join("phi3.5-vision/golden.json"))?)?;
    for (case, golden) in golden["cases"].as_object().context("cases")? {
        let out = folder.path().join("out.safetensors");
        let mut args: Vec<String> = ["logits", "--model"].map(str::to_owned).into();
        args.push(arg(&kit.join("phi3.5-vision")));
        args.extend([
            "--prompt".to_owned(),
            golden["prompt"].as_str().context("prompt")?.to_owned(),
        ]);
        for name in golden["images"].as_array().into_iter().flatten() {
            let name = name.as_str().context("a name")?;
            args.extend(["--image".to_owned(), exact_picture(name)]);
        }
        args.extend(["--num-crops".to_owned(), golden["num_crops"].to_string()]);
        let generated = goldens.shape(&format!("{case}.decode_logits"))?[0];
        args.extend(["--generate".to_owned(), (generated + 1).to_string()]);
        args.extend(["--out".to_owned(), arg(&out)]);
        stdout(&args)?;
        let found = Tensors::read(&out)?;
        let ids = |tensors: &Tensors, name: &str| {
            tensors
                .ids(name)
                .map(<[i64]>::to_vec)
                .with_context(|| name.to_owned())
        };
        ensure!(
            ids(&found, "input_ids")? == ids(&goldens, &format!("{case}.input_ids"))?,
            "{case}"
        );
        ensure!(
            ids(&found, "generate_ids")? == ids(&goldens, &format!("{case}.decode_ids"))?,
            "{case}"
        );
        let logits = found.floats("logits").context("logits")?;
        let vocab = found.shape("logits")?[1];
        let last = goldens
            .floats(&format!("{case}.last_logits"))
            .context("last")?;
        assert_close(case, &logits[logits.len() - last.len()..], last)?;
        let every: Vec<f32> = logits
            .chunks_exact(vocab)
            .step_by(32)
            .flatten()
            .copied()
            .collect();
        let expected = goldens
            .floats(&format!("{case}.logits_every_32nd"))
            .context("every")?;
        assert_close(case, &every, expected)?;
        let rows = found.floats("generate_logits").context("generate_logits")?;
        let expected = goldens
            .floats(&format!("{case}.decode_logits"))
            .context("decode")?;
        assert_close(case, &rows[vocab..], expected)?;
        if let Some(sizes) = golden.get("image_sizes") {
            let sizes: Vec<i64> = sizes
                .as_array()
                .into_iter()
                .flatten()
                .flat_map(|size| {
                    size.as_array()
                        .into_iter()
                        .flatten()
                        .filter_map(|n| n.as_i64())
                })
                .collect();
            ensure!(ids(&found, "image_sizes")? == sizes, "{case}");
            let crops = golden["num_crops"].as_u64().context("crops")? as usize + 1;
            ensure!(found.shape("pixel_values")? == [sizes.len() / 2, crops, 3, 336, 336]);
        }
    }
    Ok(())
}

/// The file of a golden's picture: decoders of JPEG differ, so that for these it is the reference's
/// pixels, without loss.
fn exact_picture(name: &str) -> String {
    let suffix = if name.ends_with(".jpg") {
        ".rgb.png"
    } else {
        ""
    };
    picture(&format!("{name}{suffix}"))
}

/// Largest difference of a normalized value from the reference's; measured: 7.2e-7, in global views.
const PIXEL_TOLERANCE: f32 = 1e-6;

#[test]
fn logits_writes_the_pixels_that_the_reference_s_processor_makes() -> Result<()> {
    const SIDE: usize = 336;
    let tiny = seeing()?;
    let folder = fixture("phi3v-preprocess");
    let goldens = Tensors::read(&folder.join("golden.safetensors"))?;
    let golden: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.join("golden.json"))?)?;
    let cases = golden["cases"].as_object().context("cases")?;
    ensure!(cases.len() == 34);
    let out = tiny.file("pixels.safetensors");
    for (case, golden) in cases {
        let image = exact_picture(golden["image"].as_str().context("image")?);
        let crops = golden["num_crops"].to_string();
        let mut flags = vec!["--prompt", "<|image_1|>", "--image", &image];
        let out_name = arg(&out);
        flags.extend(["--num-crops", &crops, "--out", &out_name]);
        stdout(tiny.args("logits", &flags))?;
        let found = Tensors::read(&out)?;
        let ids = found.ids("input_ids").context("input_ids")?;
        let tokens = ids.iter().filter(|id| **id == -1).count();
        ensure!(golden["num_img_tokens"] == tokens, "{case}: {tokens}");
        let sizes = found.ids("image_sizes").context("image_sizes")?;
        ensure!(golden["image_sizes"] == serde_json::json!(sizes), "{case}");

        let mut shape = found.shape("pixel_values")?.to_vec();
        ensure!(shape.remove(0) == 1, "{case}");
        ensure!(golden["pixel_values_shape"] == serde_json::json!(shape));
        let pixels = found.floats("pixel_values").context("pixel_values")?;
        let used = golden["crops_used"].as_u64().context("crops_used")? as usize;
        let (some, rest) = pixels.split_at(used * 3 * SIDE * SIDE);
        ensure!(rest.iter().all(|value| *value == 0.0), "{case}");
        for (name, step, planes) in [
            ("global_stride6", 6, 3),
            ("pixel_values_stride16", 16, 3 * used),
        ] {
            // Of all crops some cases alone are in the repository, of global views all.
            let Some(expected) = goldens.floats(&format!("{case}.{name}")) else {
                ensure!(planes > 3, "{case} {name}");
                continue;
            };
            let planes = some.chunks_exact(SIDE * SIDE).take(planes);
            let rows = planes.flat_map(|plane| plane.chunks_exact(SIDE).step_by(step));
            let values: Vec<f32> = rows
                .flat_map(|row| row.iter().copied().step_by(step))
                .collect();
            ensure!(values.len() == expected.len(), "{case} {name}");
            for (value, expected) in values.iter().zip(expected) {
                let close = (value - expected).abs() <= PIXEL_TOLERANCE;
                ensure!(close, "{case} {name}: {value}, expected {expected}");
            }
        }
        // Behind the global view all bytes of the picture, which the values give back.
        let (mean, std) = (
            [0.481_454_66, 0.457_827_5, 0.408_210_73],
            [0.268_629_54, 0.261_302_58, 0.275_777_11],
        );
        let planes = some.chunks_exact(SIDE * SIDE).enumerate().skip(3);
        let bytes = planes.flat_map(|(plane, values)| {
            let (mean, std) = (mean[plane % 3], std[plane % 3]);
            values
                .iter()
                .map(move |value| ((f64::from(*value) * std + mean) * 255.0).round() as u64)
        });
        ensure!(golden["hd_rgb_sum"] == bytes.sum::<u64>(), "{case}");
    }
    Ok(())
}

/// The full set of goldens with the tokenizer that the repository may not carry.
fn kit() -> Option<std::path::PathBuf> {
    let beside = fixture("../../../shared/kit");
    let kit = std::env::var_os("PHI3_KIT").map_or(beside, Into::into);
    let there = kit.join("phi3.5-vision/tokenizer.json").is_file();
    if !there {
        eprintln!("skipped: needs the full kit of goldens; set PHI3_KIT to its folder");
    }
    there.then_some(kit)
}

#[test]
fn later_turns_compute_only_what_is_new() -> Result<()> {
    let tiny = seeing()?;
    let images = [picture("tiny.png"), picture("wide.png")];
    let flags = [
        "--image",
        &images[0],
        "--image",
        &images[1],
        "--max-new-tokens",
        "4",
        "--stats",
    ];
    let input = b"First?\nSecond?\nThird?\n";
    let chat = run_with(input, &mut command(tiny.args("chat", &flags)))?;
    ensure!(chat.code == Some(DONE), "{chat:?}");
    // "prompt N tokens (M cached)": the pictures' 757 + 745 tokens run in the first turn alone.
    let number = |line: &str, before: &str| -> usize {
        let rest = line.split_once(before).map_or("", |(_, rest)| rest);
        let digits = rest.split(|c: char| !c.is_ascii_digit()).next();
        digits.and_then(|digits| digits.parse().ok()).unwrap_or(0)
    };
    let usage = chat.stderr.lines().filter(|line| line.contains("prompt "));
    let turns: Vec<(usize, usize)> = usage
        .map(|line| (number(line, "prompt "), number(line, " tokens (")))
        .collect();
    let [(first, 0), (second, cached_second), (third, cached_third)] = turns[..] else {
        anyhow::bail!("{chat:?}");
    };
    ensure!(
        first > 1502 && second > first && third > second,
        "{turns:?}"
    );
    // What ran is no more than the question, the template around it, and the end of the last answer.
    ensure!(
        cached_second >= first && second - cached_second < 40,
        "{turns:?}"
    );
    ensure!(
        cached_third >= second && third - cached_third < 40,
        "{turns:?}"
    );
    Ok(())
}

#[test]
fn pictures_change_the_answer_and_their_order_counts() -> Result<()> {
    let tiny = seeing()?;
    let answer = |images: &[&str]| {
        let mut flags = vec!["--prompt", "What is it?", "--max-new-tokens", "8"];
        for image in images {
            flags.extend(["--image", image]);
        }
        stdout(tiny.args("generate", &flags))
    };
    let (a, b) = (picture("gradient.png"), picture("noise.png"));
    let answers = [
        answer(&[])?,
        answer(&[&a])?,
        answer(&[&b])?,
        answer(&[&a, &b])?,
    ];
    ensure!(
        answers[0] != answers[1] && answers[1] != answers[2],
        "{answers:?}"
    );
    ensure!(answer(&[&a])? == answers[1]);
    // /image in a chat is the same as --image.
    let by_flag = run_with(
        b"What is it?\n",
        &mut command(tiny.args("chat", &["--image", &a, "--max-new-tokens", "8"])),
    )?;
    let line = format!("/image {a}\nWhat is it?\n");
    let by_command = run_with(
        line.as_bytes(),
        &mut command(tiny.args("chat", &["--max-new-tokens", "8"])),
    )?;
    ensure!(
        by_flag.stdout == by_command.stdout && by_flag.stdout == answers[1],
        "{by_flag:?} {by_command:?}"
    );
    ensure!(by_command.stderr.contains("757 tokens"), "{by_command:?}");
    Ok(())
}

#[test]
fn what_cannot_be_seen_is_said() -> Result<()> {
    let blind = Tiny::new()?;
    let a = picture("tiny.png");
    run(blind.args("generate", &["--prompt", "x", "--image", &a]))?
        .says(FAILED, &["sees no pictures"])?;
    let tiny = seeing()?;
    let text = arg(&fixture("README.md"));
    run(tiny.args("generate", &["--prompt", "x", "--image", &text]))?.says(
        FAILED,
        &["README.md", "not a PNG, JPEG, WebP, GIF or BMP file"],
    )?;
    run(tiny.args("generate", &["--prompt", "<|image_2|>", "--image", &a]))?
        .says(FAILED, &["each must be named once"])
}

#[test]
fn a_tag_in_a_conversation_is_text_or_the_place_of_its_picture() -> Result<()> {
    let tiny = seeing()?;
    let a = picture("tiny.png");
    let say = |input: &str, flags: &[&str]| {
        let flags = [&["--max-new-tokens", "4"], flags].concat();
        run_with(input.as_bytes(), &mut command(tiny.args("chat", &flags)))
    };
    let without = say(
        "What is <|image_1|>?\nAnd now?\n",
        &["--system", "<|image_2|>"],
    )?;
    ensure!(
        without.code == Some(DONE) && !without.stderr.contains("error"),
        "{without:?}"
    );
    let (placed, before) = (
        say("<|image_1|>\nWhat?\n", &["--image", &a])?,
        say("What?\n", &["--image", &a])?,
    );
    // The first line alone is the message.
    ensure!(placed.code == Some(DONE) && before.code == Some(DONE));
    ensure!(!placed.stderr.contains("error"), "{placed:?}");
    Ok(())
}

#[test]
fn pictures_that_fit_no_context_are_refused() -> Result<()> {
    let tiny = seeing()?;
    let folder = tempfile::tempdir()?;
    for i in 0..200 {
        std::fs::copy(picture("tiny.png"), folder.path().join(format!("{i}.png")))?;
    }
    let folder = arg(folder.path());
    let flags = ["--prompt", "x", "--image", &folder, "--frames", "200"];
    run(tiny.args("generate", &flags))?.says(FAILED, &["must hold it", "the prompt has"])
}
