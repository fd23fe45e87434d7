//! `phi3 generate`: one prompt, one answer.

use anyhow::Result;
use phi3::image::{Limits, image_tags};
use phi3::text::{
    EventKind, FinishReason, Finished, Generator, Message, Request, Token, Tokenizer,
};
use phi3::{LanguageModel, SeenImage};
use serde_json::{Value, json};

use crate::args::{ComputeArgs, ImageArgs, SourceArgs, load};
use crate::sampling::SamplingArgs;
use crate::{input, interrupt, output, system};

/// Continue a prompt, or answer it as one turn of a chat.
///
/// With a model that has a chat template the prompt is one turn of a
/// conversation; with --raw, or without a template, it is a text to continue.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    /// The prompt; if it is left out, stdin without its last line break.
    #[arg(long, short, value_name = "TEXT")]
    prompt: Option<String>,
    #[command(flatten)]
    images: ImageArgs,
    /// A system message for the chat template.
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,
    /// Continue the prompt as plain text, without the chat template.
    #[arg(long)]
    raw: bool,
    /// Print one JSON object a line instead of text: for each token its log-probability and those
    /// of the N most likely ones; at the end why it ended, and usage.
    #[arg(long, value_name = "N")]
    logprobs: Option<usize>,
    /// Print tokens and times to stderr at the end.
    #[arg(long)]
    stats: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
}

pub fn run(args: &Args) -> Result<()> {
    let prompt = input::prompt(args.prompt.as_deref())?;
    let mut model = load(&args.source, &args.compute)?;
    args.images.prepare(&mut model)?;
    let tokenizer = model.tokenizer()?;
    let mut request = prompt_request(&model, args, &prompt)?;
    request.params = args.sampling.params(model.default_sampling());
    request.max_new_tokens = args.sampling.max_new_tokens;
    request.stop_ids = model.stop_ids().to_vec();
    request.stop_strings.clone_from(&args.sampling.stop);
    request.logprobs = args.logprobs;
    interrupt::cancels(&request.cancel)?;

    let mut generator = Generator::new(model.model().as_ref(), tokenizer);
    generator.add(request)?;
    for event in generator {
        let event = event?;
        if args.logprobs.is_some() {
            let json = match &event.kind {
                EventKind::Token(token) => token_json(token, tokenizer),
                EventKind::Finished(finished) => end_json(finished),
            };
            output::print(&format!("{json}\n"))?;
        } else {
            output::answer(event.text())?;
        }
        if let EventKind::Finished(finished) = &event.kind {
            if args.logprobs.is_none() {
                output::print("\n")?;
            }
            if args.stats {
                output::note(&output::usage_line(&finished.usage));
            }
            if let Some(counters) = model.memory_counters() {
                output::note(&output::memory_line(&counters));
            }
        }
    }
    interrupt::exit_if_interrupted();
    Ok(())
}

fn prompt_request(model: &LanguageModel, args: &Args, prompt: &str) -> Result<Request> {
    let tokenizer = model.tokenizer()?;
    let images = model_images(model, args)?;
    let tags: String = (1..=images.len())
        .map(|k| format!("<|image_{k}|>\n"))
        .collect();
    // A prompt that names its pictures itself is left as it is.
    let prompt = &match image_tags(prompt).is_empty() {
        true => tags + prompt,
        false => prompt.to_owned(),
    };
    let template = match args.raw {
        true => None,
        // A system message cannot be dropped silently, so then the template must be there.
        false if args.system.is_some() => Some(model.chat_template()?),
        false => model.chat_template().ok(),
    };
    let Some(template) = template else {
        let mut request = match model.vision() {
            Some(_) => model.image_prompt(prompt, &images)?.into_request(),
            None => Request::new(tokenizer.encode(prompt, true)?),
        };
        request.continues_prompt = true;
        return Ok(request);
    };
    let mut messages: Vec<Message> = args
        .system
        .iter()
        .map(|text| Message::system(text.as_str()))
        .collect();
    if let Some(system) = &args.system {
        system::warn_if_ignored(template, system);
    }
    messages.push(Message::user(prompt.as_str()));
    let rendered = template.render(&messages, true)?;
    Ok(match model.vision() {
        Some(_) => model.image_prompt(&rendered, &images)?.into_request(),
        None => Request::new(tokenizer.encode_chat(&rendered)?),
    })
}

fn model_images(model: &LanguageModel, args: &Args) -> Result<Vec<SeenImage>> {
    if args.images.image.is_empty() {
        return Ok(Vec::new());
    }
    Ok(model.see(&args.images.images()?, &Limits::default())?)
}

fn token_json(token: &Token, tokenizer: &Tokenizer) -> Value {
    let top: Vec<Value> = token
        .top_logprobs
        .iter()
        .map(|(id, logprob)| {
            json!({ "id": id, "token": tokenizer.id_to_token(*id), "logprob": logprob })
        })
        .collect();
    json!({
        "id": token.id,
        "token": tokenizer.id_to_token(token.id),
        "text": token.text,
        "logprob": token.logprob,
        "top_logprobs": top,
    })
}

fn end_json(finished: &Finished) -> Value {
    let (reason, stop) = match &finished.reason {
        FinishReason::Stop(id) => ("stop", json!(id)),
        FinishReason::StopString(text) => ("stop", json!(text)),
        FinishReason::Length => ("length", Value::Null),
        FinishReason::ContextFull => ("context_full", Value::Null),
        FinishReason::Cancelled => ("cancelled", Value::Null),
    };
    let usage = &finished.usage;
    json!({
        "text": finished.text,
        "finish_reason": reason,
        "stop": stop,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "prefill_seconds": usage.prefill_time.as_secs_f64(),
        "decode_seconds": usage.decode_time.as_secs_f64(),
    })
}
