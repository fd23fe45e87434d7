//! What `phi3 chat` relies on in the library, on the same tiny models.

use anyhow::{Result, ensure};
use phi3::LanguageModel;
use phi3::text::{Content, FinishReason};

use crate::support::arg;
use crate::tiny::{TEMPLATE, Tiny};

fn load(tiny: &Tiny) -> Result<LanguageModel> {
    Ok(phi3::load(&arg(tiny.path()))?)
}

/// The cache of the turns before changes nothing: behind a sliding window that has dropped their
/// keys, and across the LongRoPE limit, which lies at 32 tokens here.
#[test]
fn a_cached_turn_answers_like_a_fresh_conversation() -> Result<()> {
    for name in [
        "phi3-mini-4k",
        "phi3-mini-4k-window",
        "phi3-mini-128k-longrope",
        "phi4-mini",
    ] {
        let tiny = Tiny::of(name, Some(TEMPLATE))?;
        let model = load(&tiny)?;
        let mut chat = model.chat()?;
        chat.settings.max_new_tokens = 9;
        for turn in ["a", "and b?", "what about c, then"] {
            let before = chat.messages().to_vec();
            let mut answer = chat.send(turn)?;
            let text = answer.by_ref().collect::<phi3::Result<String>>()?;
            let cached = answer.usage().map_or(0, |usage| usage.cached_tokens);
            drop(answer);
            ensure!(
                before.is_empty() == (cached == 0),
                "{name}, {turn}: {cached} cached"
            );

            let mut fresh = model.chat()?;
            fresh.settings.max_new_tokens = 9;
            fresh.set_messages(before);
            let expected = fresh.send(turn)?.text()?;
            ensure!(
                text == expected,
                "{name}, {turn}: {text:?} instead of {expected:?}"
            );
            ensure!(fresh.messages() == chat.messages());
        }
    }
    Ok(())
}

#[test]
fn an_answer_stopped_before_its_first_word_is_forgotten() -> Result<()> {
    let tiny = Tiny::new()?;
    let model = load(&tiny)?;
    let mut chat = model.chat()?;
    let mut answer = chat.send("hello")?;
    answer.cancel_token().cancel();
    ensure!(answer.next().is_none());
    ensure!(answer.finish_reason() == Some(&FinishReason::Cancelled));
    drop(answer);
    ensure!(chat.messages().is_empty(), "{:?}", chat.messages());

    // Stopped later, what was said stays.
    let mut answer = chat.send("hello")?;
    let mut text = String::new();
    while text.is_empty() {
        match answer.next() {
            Some(piece) => text.push_str(&piece?),
            None => break,
        }
    }
    answer.cancel_token().cancel();
    for piece in answer.by_ref() {
        text.push_str(&piece?);
    }
    drop(answer);
    ensure!(
        !text.is_empty() && chat.messages().len() == 2,
        "{:?}",
        chat.messages()
    );
    let said = &chat.messages()[1].content;
    ensure!(*said == Content::Text(text.clone()), "{said:?} {text:?}");
    Ok(())
}
