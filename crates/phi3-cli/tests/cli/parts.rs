//! Messages of several parts: text and pictures in a conversation of the library, and in its files.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use phi3::image::{Fetch, Image};
use phi3::text::{ImageSource, Message, Part};
use phi3::{Chat, Error, LanguageModel};
use serde_json::json;

use crate::images::{picture, seeing};
use crate::support::{FAILED, Tensors, USAGE, arg, fixture, run, stdout};
use crate::tiny::Tiny;

fn load(tiny: &Tiny) -> Result<LanguageModel> {
    let mut model = phi3::load(&arg(tiny.path()))?;
    model.set_num_crops(1)?;
    Ok(model)
}

fn chat(model: &LanguageModel) -> Result<Chat<'_>> {
    let mut chat = model.chat()?;
    chat.settings.max_new_tokens = 5;
    Ok(chat)
}

fn path(name: &str) -> Part {
    Part::Picture(ImageSource::Path(picture(name).into()))
}

/// Says `message`: the answer, the tokens that ran, and those that did not.
fn say(chat: &mut Chat<'_>, message: impl Into<Message>) -> Result<(String, usize, usize)> {
    let mut answer = chat.send(message)?;
    let text = answer.by_ref().collect::<phi3::Result<String>>()?;
    let usage = answer.usage().context("an answer without an end")?;
    let cached = usage.cached_tokens;
    Ok((text, usage.prompt_tokens - cached, cached))
}

/// Gives a file for every URL, and counts.
fn counting(count: &Arc<AtomicUsize>) -> Arc<Fetch> {
    let count = Arc::clone(count);
    Arc::new(move |url| {
        count.fetch_add(1, Ordering::Relaxed);
        let name = url.rsplit('/').next().unwrap_or_default();
        Ok(std::fs::read(picture(name))?)
    })
}

#[test]
fn parts_are_what_showing_and_saying_are() -> Result<()> {
    let tiny = seeing()?;
    let model = load(&tiny)?;
    let (a, b) = (picture("gradient.png"), picture("noise.png"));
    let mut shown = chat(&model)?;
    shown.show(&Image::path(&a))?;
    shown.show(&Image::bytes(std::fs::read(&b)?))?;
    let expected = say(&mut shown, "Which is it?")?;
    ensure!(expected.1 > 2 * 313, "{expected:?}");

    let mut sent = chat(&model)?;
    let bytes = ImageSource::Bytes(std::fs::read(&b)?.into());
    let question = vec![
        path("gradient.png"),
        bytes.into(),
        Part::text("Which is it?"),
    ];
    ensure!(say(&mut sent, Message::user(question))? == expected);
    ensure!(shown.messages() == sent.messages() && sent.images().len() == 2);

    // One shown and one sent make the same question; and pixels are those of their file.
    let mut mixed = chat(&model)?;
    let pixels = Image::path(&a).open(&mixed.limits)?;
    let (w, h) = (pixels.width(), pixels.height());
    mixed.show(&Image::pixels(w, h, pixels.pixels().to_vec())?)?;
    let question = vec![path("noise.png"), Part::text("Which is it?")];
    ensure!(say(&mut mixed, Message::user(question))? == expected);

    // Between pictures there may be text, and the order counts.
    let mut turned = chat(&model)?;
    let question = vec![path("noise.png"), Part::text("or"), path("gradient.png")];
    ensure!(say(&mut turned, Message::user(question))?.0 != expected.0);
    Ok(())
}

#[test]
fn a_conversation_comes_back_from_json_with_its_pictures() -> Result<()> {
    let tiny = seeing()?;
    let model = load(&tiny)?;
    let count = Arc::new(AtomicUsize::new(0));
    let fetched = || count.load(Ordering::Relaxed);
    let url = |name: &str| Part::Picture(ImageSource::Url(format!("test://pictures/{name}")));
    let mut first = chat(&model)?;
    first.fetch = Some(counting(&count));
    let turns = [
        Message::user(vec![url("gradient.png"), Part::text("A?")]),
        Message::user("B?"),
        Message::user(vec![Part::text("And "), url("noise.png")]),
        Message::user("C?"),
    ];
    let mut answers = Vec::new();
    for (turn, pictures) in turns.iter().zip([1, 1, 2, 2]) {
        let (text, ran, cached) = say(&mut first, turn.clone())?;
        // A picture is fetched and looked at in its own turn, and runs in no later one.
        ensure!(fetched() == pictures, "{} fetched", fetched());
        let new_pictures = turn.content.pictures().count();
        ensure!(ran < 60 + 313 * new_pictures, "{ran} ran, {cached} cached");
        answers.push(text);
    }

    let saved = serde_json::to_string(first.messages())?;
    let saved: Vec<Message> = serde_json::from_str(&saved)?;
    ensure!(saved == first.messages());
    let mut second = chat(&model)?;
    second.fetch = Some(counting(&count));
    second.set_messages(saved[..6].to_vec());
    ensure!(fetched() == 2, "nothing is fetched before it is needed");
    ensure!(say(&mut second, "C?")?.0 == answers[3]);
    ensure!(fetched() == 4 && second.messages() == first.messages());

    // What it has seen already it keeps; another picture is looked at, and the cache does not take it
    // for the one that was there.
    second.set_messages(saved[..6].to_vec());
    let (text, _, cached) = say(&mut second, "C?")?;
    ensure!(text == answers[3] && fetched() == 4 && cached > 2 * 313);
    let other = [
        Message::user(vec![url("noise.png"), Part::text("A?")]),
        saved[1].clone(),
    ];
    second.set_messages(other.to_vec());
    let (text, _, cached) = say(&mut second, "B?")?;
    ensure!(cached < 100, "{cached}");
    let mut fresh = chat(&model)?;
    fresh.fetch = Some(counting(&count));
    fresh.set_messages(other.to_vec());
    ensure!(say(&mut fresh, "B?")?.0 == text);
    second.reset();
    ensure!(second.images().is_empty() && say(&mut second, turns[0].clone())?.0 == answers[0]);
    Ok(())
}

#[test]
fn what_cannot_be_shown_leaves_the_conversation_as_it_was() -> Result<()> {
    let tiny = seeing()?;
    let model = load(&tiny)?;
    let mut chat = chat(&model)?;
    let before = say(&mut chat, "Hello")?;
    chat.show(&Image::path(picture("tiny.png")))?;
    let messages = chat.messages().to_vec();
    let url = ImageSource::Url("https://x/y.png".to_owned());
    let refused = [
        (
            ImageSource::Path("no/such.png".into()).into(),
            "no/such.png",
        ),
        (ImageSource::Bytes([1, 2].into()).into(), "the image"),
        (url.into(), "is not fetched"),
        (Part::Image, "without a path, bytes or a URL"),
    ];
    for (part, expected) in refused {
        let message = Message::user(vec![path("noise.png"), part, Part::text("?")]);
        let error = chat.send(message).err().context("it was shown")?;
        ensure!(error.to_string().contains(expected), "{error}");
        ensure!(chat.messages() == messages && chat.images().len() == 1);
    }
    // Stopped before the first word: what was shown goes with the next message.
    let mut answer = chat.send(Message::user(vec![path("noise.png")]))?;
    answer.cancel_token().cancel();
    ensure!(answer.next().is_none());
    drop(answer);
    ensure!(chat.messages() == messages && chat.images().len() == 1);
    let found = say(&mut chat, "What is it?")?;

    let mut fresh = self::chat(&model)?;
    ensure!(say(&mut fresh, "Hello")?.0 == before.0);
    fresh.show(&Image::path(picture("tiny.png")))?;
    ensure!(say(&mut fresh, "What is it?")?.0 == found.0);
    Ok(())
}

#[test]
fn a_blind_model_reads_the_text_of_parts_and_refuses_pictures() -> Result<()> {
    let tiny = Tiny::new()?;
    let model = phi3::load(&arg(tiny.path()))?;
    let parts = vec![Part::text("a"), Part::text("b")];
    let text = self::chat(&model)?.send(Message::user(parts))?.text()?;
    ensure!(text == self::chat(&model)?.send("ab")?.text()?);
    let mut chat = self::chat(&model)?;
    let refused = chat.send(Message::user(vec![path("tiny.png")])).err();
    ensure!(matches!(refused, Some(Error::Blind { .. })), "{refused:?}");
    ensure!(chat.messages().is_empty());
    Ok(())
}

#[test]
fn chat_files_may_have_parts() -> Result<()> {
    let tiny = seeing()?;
    let file = tiny.file("talk.json");
    let talk = json!([
        {"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "https://x/a.png"}},
            {"type": "text", "text": "What is it?"},
        ]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "image", "path": "b.png"}]},
    ]);
    std::fs::write(&file, talk.to_string())?;
    let file = arg(&file);
    let rendered = stdout(tiny.args("tokenize", &["--chat", &file, "--rendered"]))?;
    ensure!(
        rendered
            == "<|user|>\n<|image_1|>\nWhat is it?<|end|>\n<|assistant|>\nA cat.<|end|>\n\
                <|user|>\nAnd <|image_2|>\n<|end|>\n<|assistant|>\n",
        "{rendered}"
    );
    run(tiny.args("tokenize", &["--chat", &file]))?.says(FAILED, &["talk.json", "--rendered"])?;
    std::fs::write(
        tiny.file("talk.json"),
        r#"[{"role": "user", "content": [{"type": "film"}]}]"#,
    )?;
    run(tiny.args("tokenize", &["--chat", &file]))?.says(FAILED, &["talk.json", "film"])
}

#[test]
fn frames_of_an_animation_and_of_a_folder_are_pictures() -> Result<()> {
    let tiny = seeing()?;
    let out = tiny.file("out.safetensors");
    let images = |image: &str, frames: &str, prompt: &str| -> Result<usize> {
        let flags = [
            "--prompt",
            prompt,
            "--image",
            image,
            "--frames",
            frames,
            "--num-crops",
            "1",
            "--out",
            &arg(&out),
        ];
        stdout(tiny.args("logits", &flags))?;
        Ok(Tensors::read(&out)?.shape("image_sizes")?[0])
    };
    let animation = arg(&fixture("image-formats/animated.gif"));
    let three = "<|image_1|><|image_2|><|image_3|>x";
    ensure!(images(&animation, "3", three)? == 3);
    let folder = tempfile::tempdir()?;
    for (name, number) in [("tiny.png", 1), ("gray.png", 2), ("wide.png", 10)] {
        std::fs::copy(picture(name), folder.path().join(format!("f{number}.png")))?;
    }
    let folder = arg(folder.path());
    ensure!(images(&folder, "2", "<|image_1|><|image_2|>x")? == 2);
    ensure!(images(&folder, "9", three)? == 3, "there are no more");
    let generate = |flags: &[&str]| run(tiny.args("generate", flags));
    generate(&["--prompt", "x", "--image", &folder])?
        .says(USAGE, &["is a folder", "--frames N"])?;
    generate(&["--prompt", "x", "--frames", "2"])?.says(USAGE, &["--image"])?;
    generate(&["--prompt", "x", "--frames", "0", "--image", &folder])?
        .says(USAGE, &["--frames"])?;
    let empty = tempfile::tempdir()?;
    let empty = arg(empty.path());
    generate(&["--prompt", "x", "--frames", "2", "--image", &empty])?
        .says(FAILED, &[&empty, "no picture"])
}
