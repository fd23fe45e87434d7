//! `phi3 tokenize`: a text as token ids.

use anyhow::{Context, Result, bail};
use phi3::load_tokenizer;

use crate::args::{SourceArgs, open};
use crate::{input, output};

/// Prints one line per token: its id, and the token as it stands in the vocabulary.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: SourceArgs,
    /// The text; if it is left out, stdin without its last line break.
    #[arg(long, short, value_name = "TEXT")]
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
    let checkpoint = open(&args.source)?;
    let tokenizer = load_tokenizer(&checkpoint)?.ok_or_else(|| phi3::Error::NoTokenizer {
        origin: checkpoint.origin.clone(),
    })?;
    if let Some(ids) = &args.decode {
        let ids: Vec<u32> =
            serde_json::from_str(ids).context("reading --decode as a JSON array of ids")?;
        // The decoder leaves out what it does not know.
        if let Some(id) = ids.iter().find(|id| tokenizer.id_to_token(**id).is_none()) {
            bail!("--decode: {id} is no id of the vocabulary");
        }
        return output::print(&format!("{}\n", tokenizer.decode(&ids, false)?));
    }
    let text = input::prompt(args.prompt.as_deref())?;
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
