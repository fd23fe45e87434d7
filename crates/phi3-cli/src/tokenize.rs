//! `phi3 tokenize`: a text as token ids.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use phi3::hub::Checkpoint;
use phi3::text::{Content, Message, Part, Tokenizer};
use phi3::{load_template, load_tokenizer, with_image_tags, without_marks};

use crate::args::{SourceArgs, open_by};
use crate::{input, output};

/// Show how a text is split into tokens.
///
/// Prints one line per token: its id, and the token as it stands in the vocabulary. The weights of a model are not needed, and not fetched, unless it is a .gguf file.
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
    /// Instead of a text, a conversation: a JSON array of {"role": …, "content": …}, as the model's
    /// chat template renders it. Of a model that sees content may be a list of parts, text and images,
    /// whose tags --rendered shows; how many tokens an image takes its pixels decide.
    #[arg(long, value_name = "FILE.json", conflicts_with_all = ["prompt", "add_special"])]
    chat: Option<PathBuf>,
    /// Leave out the opening of the assistant's turn with which a rendered conversation ends.
    #[arg(long, requires = "chat")]
    no_generation_prompt: bool,
    /// Print the rendered conversation instead of its tokens.
    #[arg(long, requires = "chat", conflicts_with = "json")]
    rendered: bool,
    /// Print one JSON array of ids instead.
    #[arg(long)]
    json: bool,
    /// The other way: decode this JSON array of ids to text.
    #[arg(long, value_name = "IDS", conflicts_with_all = ["prompt", "add_special", "chat", "json"])]
    decode: Option<String>,
}

pub fn run(args: &Args) -> Result<()> {
    let checkpoint = open_by(phi3::hub::open_without_weights, &args.source)?;
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
    let ids = match &args.chat {
        Some(path) => {
            let rendered = render(&checkpoint, &tokenizer, path, !args.no_generation_prompt)?;
            if args.rendered {
                return output::print(&rendered.text);
            }
            if rendered.pictures {
                let name = path.display();
                bail!(
                    "{name} shows images, whose tokens hang on their pixels; --rendered shows the text"
                );
            }
            let rendered = rendered.text;
            tokenizer.encode_chat(&rendered)?
        }
        None => {
            let text = input::prompt(args.prompt.as_deref())?;
            tokenizer.encode(&text, args.add_special)?
        }
    };
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

/// A conversation as one text.
struct Rendered {
    text: String,
    /// Whether images are part of it.
    pictures: bool,
}

/// The conversation in `path`.
fn render(
    checkpoint: &Checkpoint,
    tokenizer: &Tokenizer,
    path: &Path,
    add_generation_prompt: bool,
) -> Result<Rendered> {
    let name = path.display();
    let json = std::fs::read_to_string(path).with_context(|| format!("reading {name}"))?;
    let mut messages: Vec<Message> = serde_json::from_str(&json).with_context(|| {
        format!("{name} must be a JSON array of messages with role and content")
    })?;
    let template = load_template(checkpoint, Some(tokenizer))?;
    let template = template.ok_or_else(|| phi3::Error::NoChatTemplate {
        origin: checkpoint.origin.clone(),
    })?;
    let parts = messages
        .iter()
        .filter_map(|message| match &message.content {
            Content::Parts(parts) => Some(parts),
            Content::Text(_) | Content::None => None,
        });
    let sees = checkpoint
        .config
        .get("model_type")
        .and_then(|it| it.as_str())
        == Some("phi3_v");
    let pictures = sees
        && parts
            .flatten()
            .any(|part| !matches!(part, Part::Text { .. }));
    if sees {
        messages = with_image_tags(&messages);
    }
    let text = without_marks(&template.render(&messages, add_generation_prompt)?);
    Ok(Rendered { text, pictures })
}
