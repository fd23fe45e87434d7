//! `phi3 download`: fetch a model's files.

use anyhow::{Context, Result};
use phi3::hub::{Source, download};

use crate::args::PositionalSourceArgs;
use crate::output;

/// Fetches config, tokenizer and weights, checks them, and prints the folder they are in.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: PositionalSourceArgs,
}

pub fn run(args: &Args) -> Result<()> {
    let args = args.source.source();
    let source = Source::parse(&args.model, args.hub.revision.as_deref())?;
    let path = download(&source, &args.hub.options())
        .with_context(|| format!("downloading {}", args.model))?;
    output::print(&format!("{}\n", path.display()))
}
