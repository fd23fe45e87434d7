//! `phi3 tokenize`: a text as token ids.

use anyhow::{Context, Result};
use phi3::hub::{Source, open};
use phi3::load_tokenizer;

use crate::args::SourceArgs;
use crate::output;

/// Prints one line per token: id, token as it stands in the vocabulary.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: SourceArgs,
    /// The text; stdin if it is left out.
    #[arg(long, short)]
    prompt: Option<String>,
    /// Add the tokens that the model's tokenizer puts before a text (BOS).
    #[arg(long)]
    add_special: bool,
    /// Print one JSON array of ids instead.
    #[arg(long)]
    json: bool,
    /// The other way: decode this JSON array of ids to text.
    #[arg(long, value_name = "IDS", conflicts_with_all = ["prompt", "add_special", "json"])]
    decode: Option<String>,
}

pub fn run(args: &Args) -> Result<()> {
    let hub = &args.source.hub;
    let source = Source::parse(&args.source.model, hub.revision.as_deref())?;
    let checkpoint =
        open(&source, &hub.options()).with_context(|| format!("opening {}", args.source.model))?;
    let tokenizer = load_tokenizer(&checkpoint)?.ok_or_else(|| phi3::Error::NoTokenizer {
        origin: checkpoint.origin.clone(),
    })?;
    if let Some(ids) = &args.decode {
        let ids: Vec<u32> =
            serde_json::from_str(ids).context("reading --decode as a JSON array of ids")?;
        return output::print(&format!("{}\n", tokenizer.decode(&ids, false)?));
    }
    let text = match &args.prompt {
        Some(text) => text.clone(),
        None => std::io::read_to_string(std::io::stdin()).context("reading the text from stdin")?,
    };
    let ids = tokenizer.encode(&text, args.add_special)?;
    if args.json {
        return output::print(&format!("{}\n", serde_json::to_string(&ids)?));
    }
    let mut lines = String::new();
    for id in ids {
        let token = tokenizer.id_to_token(id).unwrap_or_default();
        lines.push_str(&format!("{id:>7}  {}\n", token.escape_debug()));
    }
    output::print(&lines)
}
