//! What the models' examples share: flags, and the way from a checkpoint's files to a printed answer.

use std::io::Write;

use anyhow::{Context, Result};
use clap::Parser;
use phi3_hub::{Checkpoint, HubOptions, Source, open};
use phi3_nn::{CausalLm, DeviceSpec, Weights, device::default_dtype};
use phi3_text::{ChatTemplate, Generator, Message, Request, SamplingParams, Tokenizer, stop_ids};

#[derive(Parser)]
pub struct Args {
    /// A repo id on the hub, a folder, or a .gguf file.
    #[arg(long)]
    model: String,
    #[arg(long)]
    revision: Option<String>,
    /// auto, cpu, cuda, cuda:N or metal.
    #[arg(long, default_value = "auto")]
    device: DeviceSpec,
    #[arg(long)]
    pub prompt: String,
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

impl Args {
    /// The checkpoint, and its weights on the device.
    pub fn open(&self) -> Result<(Checkpoint, Weights)> {
        let source = Source::parse(&self.model, self.revision.as_deref())?;
        let checkpoint =
            open(&source, &HubOptions::from_env()).context("opening the checkpoint")?;
        let device = self.device.open()?;
        let dtype = default_dtype(&device);
        let weights = Weights::new(checkpoint.weights.clone(), device, dtype);
        Ok((checkpoint, weights))
    }

    /// Prints the answer to a prompt, token by token.
    pub fn answer(
        &self,
        model: &dyn CausalLm,
        checkpoint: &Checkpoint,
        tokenizer: &Tokenizer,
        mut request: Request,
    ) -> Result<()> {
        request.max_new_tokens = self.max_new_tokens;
        request.params = SamplingParams {
            temperature: self.temperature,
            top_p: self.top_p,
            seed: self.seed,
            ..SamplingParams::default()
        };
        let template = checkpoint.chat_template.as_ref();
        request.stop_ids = stop_ids(
            checkpoint.generation_config.as_ref(),
            Some(&checkpoint.config),
            template.map(|template| template.text.as_str()),
            tokenizer,
        )?;
        let mut generator = Generator::new(model, tokenizer);
        generator.add(request)?;
        let mut stdout = std::io::stdout().lock();
        for event in generator {
            stdout.write_all(event?.text().as_bytes())?;
            stdout.flush()?;
        }
        Ok(writeln!(stdout)?)
    }
}

/// The checkpoint's tokenizer; Phi-3-small's repository has ranks instead of a tokenizer.json.
pub fn tokenizer(checkpoint: &Checkpoint) -> Result<Tokenizer> {
    let json = checkpoint
        .tokenizer_json()?
        .context("the checkpoint has no tokenizer")?;
    let config = checkpoint.tokenizer.tokenizer_config.as_ref();
    Ok(Tokenizer::from_json(&json, config)?)
}

/// The prompt as the first turn of a conversation, up to the place of the answer.
pub fn render(checkpoint: &Checkpoint, tokenizer: &Tokenizer, prompt: &str) -> Result<String> {
    let template = checkpoint
        .chat_template
        .as_ref()
        .context("the checkpoint has no template")?;
    let template = ChatTemplate::parse(&template.text, tokenizer.special_tokens().clone())?;
    Ok(template.render(&[Message::user(prompt)], true)?)
}
