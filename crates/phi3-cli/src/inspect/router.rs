//! `phi3 inspect --router PROMPT`: which experts a prompt takes.

use std::fmt::Write as _;

use anyhow::{Context, Result};
use phi3::nn::{Input, LogitRows, Span};
use phi3::{CacheType, LanguageModel, LoadOptions, ModelConfig, RouterTrace};
use serde::Serialize;

use crate::output::{self, UsageError};
use phi3::hub::Checkpoint;

/// Tokens that run at once, as many as `generate` reads at a time.
const CHUNK: usize = 512;

/// How many tokens of the prompt chose each expert, layer by layer.
#[derive(Serialize)]
struct Histogram {
    model: String,
    tokens: usize,
    experts_per_token: usize,
    layers: Vec<Vec<usize>>,
}

/// Reads `prompt` and prints the load of every expert.
pub fn run(checkpoint: &Checkpoint, prompt: &str, json: bool) -> Result<()> {
    let config = ModelConfig::from_json(&checkpoint.config)?;
    let ModelConfig::PhiMoe(moe) = &config else {
        return Err(UsageError(format!(
            "--router: {} is a {}, which has no router",
            checkpoint.origin,
            config.info().model_type
        ))
        .into());
    };
    let options = LoadOptions {
        device: "cpu".parse()?,
        cache_type: CacheType::F32,
        ..LoadOptions::default()
    };
    let model = LanguageModel::from_checkpoint(checkpoint, &options)
        .with_context(|| format!("loading {}", checkpoint.origin))?;
    let ids = model.tokenizer()?.encode(prompt, true)?;
    if ids.is_empty() {
        return Err(UsageError("--router: the prompt has no token".to_owned()).into());
    }
    let mut trace = RouterTrace::new(moe.num_local_experts);
    let mut cache = model.model().new_cache();
    for chunk in ids.chunks(CHUNK) {
        let span = Span::new(chunk.len(), &mut cache)
            .reaching(ids.len())
            .with_logits(LogitRows::None);
        let observer = Some(&mut trace as _);
        model
            .model()
            .forward(Input::Ids(chunk), &mut [span], observer)?;
    }
    let histogram = Histogram {
        model: checkpoint.origin.clone(),
        tokens: ids.len(),
        experts_per_token: moe.num_experts_per_tok,
        layers: trace.layers().iter().map(|layer| layer.load()).collect(),
    };
    match json {
        true => output::print(&format!("{}\n", serde_json::to_string_pretty(&histogram)?)),
        false => output::print(&histogram.to_text()),
    }
}

impl Histogram {
    /// A line a layer, a column an expert.
    fn to_text(&self) -> String {
        let most = self.layers.iter().flatten().max().copied().unwrap_or(0);
        let experts = self.layers.first().map_or(0, Vec::len);
        let width = most.to_string().len().max(experts.to_string().len()) + 1;
        let mut text = format!(
            "{}: {} tokens, each through {} of {experts} experts\n\nlayer",
            self.model, self.tokens, self.experts_per_token
        );
        // Writing to a string cannot fail.
        for expert in 0..experts {
            let _ = write!(text, "{expert:>width$}");
        }
        text.push_str("  unused\n");
        for (layer, load) in self.layers.iter().enumerate() {
            let _ = write!(text, "{layer:>5}");
            for count in load {
                let _ = write!(text, "{count:>width$}");
            }
            let unused = load.iter().filter(|count| **count == 0).count();
            let _ = writeln!(text, "  {unused}");
        }
        text
    }
}
