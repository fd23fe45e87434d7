//! `phi3 generate`: one prompt, one answer.

use anyhow::{Context, Result};
use phi3::LanguageModel;
use phi3::text::{EventKind, Finished, Generator, Message, Request, Token};
use serde_json::{Value, json};

use crate::args::{ComputeArgs, SourceArgs, load};
use crate::interrupt;
use crate::output;
use crate::sampling::SamplingArgs;

/// Answers a prompt. With a model that has a chat template the prompt is one turn of a
/// conversation; with --raw, or without a template, it is a text to continue.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    /// The prompt; stdin if it is left out.
    #[arg(long, short)]
    prompt: Option<String>,
    /// A system message for the chat template.
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,
    /// Continue the prompt as plain text, without the chat template.
    #[arg(long)]
    raw: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Print one JSON object a line instead of text: tokens with the log-probabilities of the N
    /// most likely ones, then reason and usage.
    #[arg(long, value_name = "N")]
    logprobs: Option<usize>,
    /// Print tokens and times to stderr at the end.
    #[arg(long)]
    stats: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let model = load(&args.source, &args.compute)?;
    let prompt = match &args.prompt {
        Some(prompt) => prompt.clone(),
        None => {
            std::io::read_to_string(std::io::stdin()).context("reading the prompt from stdin")?
        }
    };
    let mut request = prompt_request(&model, args, &prompt)?;
    request.params = args.sampling.params(model.default_sampling());
    request.max_new_tokens = args.sampling.max_new_tokens;
    request.stop_ids = model.stop_ids().to_vec();
    request.stop_strings.clone_from(&args.sampling.stop);
    request.logprobs = args.logprobs;
    interrupt::cancels(&request.cancel)?;

    let mut generator = Generator::new(model.model().as_ref(), model.tokenizer()?);
    generator.add(request)?;
    for event in generator {
        let event = event?;
        match (args.logprobs, &event.kind) {
            (None, _) => output::print(event.text())?,
            (Some(_), EventKind::Token(token)) => {
                output::print(&format!("{}\n", token_json(token)))?
            }
            (Some(_), EventKind::Finished(end)) => output::print(&format!("{}\n", end_json(end)))?,
        }
        if let EventKind::Finished(finished) = &event.kind {
            if args.logprobs.is_none() {
                output::print("\n")?;
            }
            if args.stats {
                eprintln!("{}", output::usage_line(&finished.usage));
            }
        }
    }
    interrupt::exit_if_interrupted()
}

fn prompt_request(model: &LanguageModel, args: &Args, prompt: &str) -> Result<Request> {
    let tokenizer = model.tokenizer()?;
    let template = match args.raw {
        true => None,
        // A system message cannot be dropped silently, so then the template must be there.
        false if args.system.is_some() => Some(model.chat_template()?),
        false => model.chat_template().ok(),
    };
    let Some(template) = template else {
        let mut request = Request::new(tokenizer.encode(prompt, true)?);
        request.continues_prompt = true;
        return Ok(request);
    };
    let mut messages: Vec<Message> = args
        .system
        .iter()
        .map(|text| Message::system(text.as_str()))
        .collect();
    messages.push(Message::user(prompt));
    let rendered = template.render(&messages, true)?;
    Ok(Request::new(tokenizer.encode_chat(&rendered)?))
}

fn token_json(token: &Token) -> Value {
    json!({
        "id": token.id,
        "text": token.text,
        "logprob": token.logprob,
        "top_logprobs": token.top_logprobs,
    })
}

fn end_json(finished: &Finished) -> Value {
    let usage = &finished.usage;
    json!({
        "text": finished.text,
        "finish_reason": format!("{:?}", finished.reason),
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "prefill_seconds": usage.prefill_time.as_secs_f64(),
        "decode_seconds": usage.decode_time.as_secs_f64(),
    })
}
