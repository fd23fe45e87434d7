//! `phi3 eval`: how good a model is, in numbers.

use std::ops::ControlFlow;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use phi3::eval::{Comparison, EvalOptions, compare_all};
use phi3::text::CancelToken;

use crate::args::{ComputeArgs, HubArgs, SourceArgs, load_exactly};
use crate::interrupt;
use crate::output;

/// Measure how good a model is.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    Kl(KlArgs),
}

/// How far a model is from another one, such as a quantized one from its original.
///
/// Prints perplexities, the divergence of the next token's distribution (mean, median, 99.9 %,
/// largest) and how often both models prefer the same token. The text is cut into windows that do not overlap; the second half of each is scored.
#[derive(clap::Args)]
struct KlArgs {
    /// The model: a repo id on the hub, a folder, or a .gguf file. Several models, each with its own
    /// --model, are held in memory together, and the reference runs once for all.
    #[arg(long, short, value_name = "MODEL", required = true)]
    model: Vec<String>,
    /// What it should be like, in the same forms.
    #[arg(long, value_name = "MODEL")]
    reference: String,
    #[command(flatten)]
    hub: HubArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    /// A text in UTF-8.
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Tokens of a window.
    #[arg(long, value_name = "N", default_value_t = 512)]
    window: usize,
    /// Windows that run at once.
    #[arg(long, short, value_name = "N", default_value_t = 2)]
    batch: usize,
    /// Use only so many tokens of the text.
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    /// Print JSON: an object, or an array of them for several models.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<()> {
    match &args.what {
        What::Kl(args) => kl(args),
    }
}

fn kl(args: &KlArgs) -> Result<()> {
    let path = args.text.display();
    let text = std::fs::read_to_string(&args.text).with_context(|| format!("reading {path}"))?;
    let source = |model: &str| SourceArgs {
        model: model.to_owned(),
        hub: args.hub.clone(),
    };
    let models = args
        .model
        .iter()
        .map(|model| load_exactly(&source(model), &args.compute))
        .collect::<Result<Vec<_>>>()?;
    let reference = load_exactly(&source(&args.reference), &args.compute)?;
    let mut ids = reference.tokenizer()?.encode(&text, false)?;
    let start: String = text.chars().take(20_000).collect();
    for (name, model) in args.model.iter().zip(&models) {
        if let Ok(tokenizer) = model.tokenizer() {
            ensure!(
                tokenizer.encode(&start, false)? == reference.tokenizer()?.encode(&start, false)?,
                "the tokenizers of {name} and {} split {path} differently",
                args.reference
            );
        }
    }
    ids.truncate(args.max_tokens.unwrap_or(usize::MAX));

    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} tokens {eta}")
        .context("the progress bar's template")?;
    let bar = ProgressBar::with_draw_target(Some(ids.len() as u64), ProgressDrawTarget::stderr())
        .with_style(style);
    let cancel = CancelToken::new();
    interrupt::cancels(&cancel)?;
    let options = EvalOptions {
        window: args.window,
        batch: args.batch,
    };
    let compared: Vec<_> = models.iter().map(|model| model.model().as_ref()).collect();
    let found = compare_all(
        &compared,
        reference.model().as_ref(),
        &ids,
        options,
        |done, _| {
            bar.set_position(done as u64);
            if cancel.is_cancelled() {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        },
    );
    bar.finish_and_clear();
    let found = found?;
    if interrupt::done() {
        output::note("(interrupted: the numbers are those of the tokens done)");
    }
    match (args.json, found.as_slice()) {
        (true, [one]) => output::print(&format!("{}\n", serde_json::to_string_pretty(one)?)),
        (true, several) => output::print(&format!("{}\n", serde_json::to_string_pretty(several)?)),
        (false, [one]) => output::print(&table(one)),
        (false, several) => {
            let tables = args.model.iter().zip(several);
            let tables: Vec<_> = tables
                .map(|(name, one)| format!("{name}\n{}", table(one)))
                .collect();
            output::print(&tables.join("\n"))
        }
    }
}

fn table(found: &Comparison) -> String {
    let mut lines = String::new();
    for (name, value) in [
        ("tokens scored", found.tokens.to_string()),
        ("perplexity", format!("{:.4}", found.perplexity)),
        ("reference's", format!("{:.4}", found.reference_perplexity)),
        (
            "KL divergence, mean",
            format!("{:.6} ± {:.6}", found.mean_kl, found.mean_kl_error),
        ),
        ("median", format!("{:.6}", found.median_kl)),
        ("99.9 %", format!("{:.6}", found.kl_99_9)),
        ("largest", format!("{:.6}", found.max_kl)),
        ("same top token", format!("{:.3} %", 100.0 * found.same_top)),
    ] {
        lines.push_str(&format!("{name:<24} {value}\n"));
    }
    lines
}
