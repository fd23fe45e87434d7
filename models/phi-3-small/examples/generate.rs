//! Answers one prompt with a `phi3small` checkpoint, straight on the crates below the facade:
//!
//! ```sh
//! cargo run --release -p phi-3-small --example generate-phi-3-small -- \
//!     --model microsoft/Phi-3-small-8k-instruct --prompt "What is the capital of France?"
//! ```

use std::io::Write;

use anyhow::{Context, Result};
use clap::Parser;
use phi_3_small::{Config, Model};
use phi3_hub::{HubOptions, Source, open};
use phi3_nn::{DeviceSpec, Weights, device::default_dtype};
use phi3_text::{ChatTemplate, Generator, Message, Request, SamplingParams, Tokenizer, stop_ids};

#[derive(Parser)]
struct Args {
    /// A repo id on the hub, a folder, or a .gguf file.
    #[arg(long)]
    model: String,
    #[arg(long)]
    revision: Option<String>,
    /// auto, cpu, cuda, cuda:N or metal.
    #[arg(long, default_value = "auto")]
    device: DeviceSpec,
    #[arg(long)]
    prompt: String,
    #[arg(long, default_value_t = 256)]
    max_new_tokens: usize,
    /// 0 is greedy.
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    #[arg(long)]
    top_p: Option<f32>,
    #[arg(long)]
    seed: Option<u64>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let source = Source::parse(&args.model, args.revision.as_deref())?;
    let checkpoint = open(&source, &HubOptions::from_env()).context("opening the checkpoint")?;
    let device = args.device.open()?;
    let dtype = default_dtype(&device);
    let weights = Weights::new(checkpoint.weights.clone(), device, dtype);
    let model = Model::new(&Config::from_json(&checkpoint.config)?, weights)?;

    // Its repository has ranks instead of a tokenizer.json.
    let json = checkpoint
        .tokenizer_json()?
        .context("the checkpoint has no tokenizer")?;
    let tokenizer_config = checkpoint.tokenizer.tokenizer_config.as_ref();
    let tokenizer = Tokenizer::from_json(&json, tokenizer_config)?;
    let template = checkpoint
        .chat_template
        .as_ref()
        .context("the checkpoint has no template")?;
    let tokens = tokenizer.special_tokens().clone();
    let rendered =
        ChatTemplate::parse(&template.text, tokens)?.render(&[Message::user(args.prompt)], true)?;

    let mut request = Request::new(tokenizer.encode_chat(&rendered)?);
    request.max_new_tokens = args.max_new_tokens;
    request.params = SamplingParams {
        temperature: args.temperature,
        top_p: args.top_p,
        seed: args.seed,
        ..SamplingParams::default()
    };
    request.stop_ids = stop_ids(
        checkpoint.generation_config.as_ref(),
        Some(&checkpoint.config),
        Some(&template.text),
        &tokenizer,
    )?;
    let mut generator = Generator::new(&model, &tokenizer);
    generator.add(request)?;
    let mut stdout = std::io::stdout().lock();
    for event in generator {
        stdout.write_all(event?.text().as_bytes())?;
        stdout.flush()?;
    }
    Ok(writeln!(stdout)?)
}
