//! `phi3 download`: fetch a model's files.

use std::sync::Arc;

use anyhow::{Context, Result};
use phi3::hub::{Source, TerminalProgress, download};

use crate::args::PositionalSourceArgs;
use crate::output;

/// Fetch a model from the hub into the local cache, and print where it is.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: PositionalSourceArgs,
}

pub fn run(args: &Args) -> Result<()> {
    let args = args.source.source();
    let fetch = || {
        let source = Source::parse(&args.model, args.hub.revision.as_deref())?;
        let mut options = args.hub.options();
        // A log wants to see how far a long download is.
        options.progress = Arc::new(TerminalProgress::always());
        download(&source, &options)
    };
    let path = fetch().with_context(|| format!("downloading {}", args.model))?;
    output::print(&format!("{}\n", path.display()))
}
