//! `phi3 quantize`: a model as one GGUF file, in fewer bits.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use phi3::hub::Checkpoint;
use phi3::hub::quantize::{Error, Importance, Mix, Options, write_gguf};
use phi3::text::CancelToken;
use phi3::{CacheType, DeviceSpec, LanguageModel, LoadOptions};

use crate::args::{HubArgs, SourceArgs, open};
use crate::interrupt;
use crate::output::{self, UsageError};

/// Write a model as one GGUF file, in fewer bits.
///
/// Tokenizer and chat template are included. llama.cpp reads the file too, but for Phi-3-small, which it
/// does not know.
///
/// Types: F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q5_K_S, Q5_1, Q5_0, Q4_K_M, Q4_K_S, Q4_1, IQ4_NL,
/// Q4_0, INT4, Q3_K_L, Q3_K_M, Q3_K_S, Q2_K, largest first. INT4 is the smallest of four bits and this
/// program's own: llama.cpp refuses its files. Q4_K_M is what most people want. Rows that
/// are no whole blocks of a type get another of about its size, as in llama.cpp. The file appears
/// when it is complete; an interrupted run leaves nothing behind and is simply run again, and what
/// a killed one left is removed by the next.
#[derive(clap::Args)]
pub struct Args {
    /// A repo id on the hub, a folder, or a .gguf file; then the file to write.
    #[arg(value_name = "MODEL> <OUT.gguf", required = true, num_args = 1..=2)]
    paths: Vec<String>,
    /// The model, as in the other commands.
    #[arg(long, short, value_name = "MODEL")]
    model: Option<String>,
    #[command(flatten)]
    hub: HubArgs,
    /// How to store the weights.
    #[arg(long, short, value_name = "TYPE")]
    r#type: Mix,
    /// Weigh errors by how much each column matters on this text, in UTF-8: the model is run on it
    /// first, as it is stored. A few hundred kilobytes of what the model will be used for suffice.
    #[arg(long, value_name = "FILE.txt")]
    imatrix: Option<PathBuf>,
    /// Use only so many tokens of that text.
    #[arg(long, value_name = "N", default_value_t = 50_000, requires = "imatrix")]
    imatrix_tokens: usize,
    /// Replace OUT.gguf if it exists.
    #[arg(long)]
    force: bool,
    /// Leave tokenizer and chat template out.
    #[arg(long)]
    no_tokenizer: bool,
    /// What computes the importance: auto, cpu, cuda, cuda:N or metal.
    #[arg(long, default_value = "auto")]
    device: DeviceSpec,
    /// Threads [default: PHI3_THREADS, else one per physical core].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

impl Args {
    /// The model and the file to write.
    fn places(&self) -> Result<(String, PathBuf), UsageError> {
        match (&self.model, self.paths.as_slice()) {
            (None, [model, out]) | (Some(model), [out]) => Ok((model.clone(), out.into())),
            (None, _) => Err(UsageError(
                "quantize needs the model and the file to write: phi3 quantize MODEL --type T OUT.gguf"
                    .to_owned(),
            )),
            (Some(_), _) => Err(UsageError(
                "the model is given twice, by --model and by its place".to_owned(),
            )),
        }
    }
}

pub fn run(args: &Args) -> Result<()> {
    let (model, out) = args.places()?;
    if let Some(threads) = args.threads {
        phi3::set_num_threads(threads.into());
    }
    let checkpoint = open(&SourceArgs {
        model: model.clone(),
        hub: args.hub.clone(),
    })?;
    let options = Options {
        force: args.force,
        without_tokenizer: args.no_tokenizer,
        importance: match &args.imatrix {
            Some(text) => Some(measured(args, &checkpoint, text)?),
            None => None,
        },
    };
    let bar = bar()?;
    let cancel = CancelToken::new();
    interrupt::cancels(&cancel)?;
    let start = Instant::now();
    let written = write_gguf(
        &checkpoint,
        args.r#type,
        &out,
        &options,
        &mut |tensor, done, total| {
            bar.set_length(total);
            bar.set_position(done);
            bar.set_message(tensor.name.clone());
            if cancel.is_cancelled() {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        },
    );
    bar.finish_and_clear();
    if matches!(written, Err(Error::Interrupted)) {
        interrupt::exit_if_interrupted();
    }
    interrupt::done();
    let written = written.with_context(|| format!("quantizing {model}"))?;
    output::note(&format!(
        "{}: {} tensors, {:.2} bits a weight, {:.1} MB, in {:.1} s",
        out.display(),
        written.tensors,
        8.0 * written.bytes as f64 / written.weights as f64,
        written.bytes as f64 / 1e6,
        start.elapsed().as_secs_f64(),
    ));
    Ok(())
}

/// Tokens that run at once while importance is measured.
const WINDOW: usize = 512;

fn measured(args: &Args, checkpoint: &Checkpoint, path: &Path) -> Result<Importance> {
    let name = path.display();
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {name}"))?;
    let options = LoadOptions {
        device: args.device,
        cache_type: CacheType::F32,
        ..LoadOptions::default()
    };
    let model = LanguageModel::from_checkpoint(checkpoint, &options)?;
    let mut ids = model.tokenizer()?.encode(&text, false)?;
    ids.truncate(args.imatrix_tokens);
    let style = ProgressStyle::with_template("importance {bar:30} {pos}/{len} tokens {eta}")
        .context("the progress bar's template")?;
    let bar = ProgressBar::with_draw_target(Some(ids.len() as u64), ProgressDrawTarget::stderr())
        .with_style(style);
    let window = WINDOW.min(model.model().info().max_position_embeddings);
    let found = phi3::importance(model.model().as_ref(), &ids, window, |done, _| {
        bar.set_position(done as u64);
        ControlFlow::Continue(())
    });
    bar.finish_and_clear();
    Ok(found?)
}

/// A bar on a terminal; elsewhere nothing.
fn bar() -> Result<ProgressBar> {
    let style = ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {eta} {msg}")
        .context("the progress bar's template")?;
    Ok(ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr()).with_style(style))
}
