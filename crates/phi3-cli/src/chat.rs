//! `phi3 chat`: a conversation in the terminal.

use std::path::PathBuf;

use anyhow::{Context, Result};
use phi3::Chat;
use phi3::text::FinishReason;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use crate::args::{ComputeArgs, SourceArgs, load};
use crate::interrupt;
use crate::output;
use crate::sampling::SamplingArgs;

/// Talks with a model, turn by turn. Ctrl-C stops an answer, Ctrl-D leaves.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    /// A system message to begin with.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Say this first, then go on.
    #[arg(long, short)]
    prompt: Option<String>,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Print tokens per second after each answer; /stats switches it.
    #[arg(long)]
    stats: bool,
    /// Where to keep the history of what was typed [default: PHI3_HISTORY, else
    /// ~/.local/state/phi3/history].
    #[arg(long, value_name = "FILE")]
    history: Option<PathBuf>,
}

const HELP: &str = "\
/reset          forget the conversation
/system TEXT    set the system message (empty: remove it) and forget the conversation
/stats          print tokens per second after each answer, or stop doing so
/help           this list
/exit           leave (or Ctrl-D); Ctrl-C stops an answer
";

pub fn run(args: &Args) -> Result<()> {
    let model = load(&args.source, &args.compute)?;
    let mut chat = model.chat()?;
    chat.settings.sampling = args.sampling.params(model.default_sampling());
    chat.settings.max_new_tokens = args.sampling.max_new_tokens;
    chat.settings.stop_strings.clone_from(&args.sampling.stop);
    chat.settings.sampling.validate()?;
    if let Some(system) = &args.system {
        chat.set_system(system);
    }
    let mut session = Session {
        chat,
        system: args.system.clone().unwrap_or_default(),
        stats: args.stats,
    };
    eprintln!("{} is ready. /help lists the commands.", model.origin());
    if let Some(prompt) = &args.prompt {
        session.say(prompt)?;
    }

    let mut editor = DefaultEditor::new().context("opening the terminal")?;
    let history = args.history.clone().or_else(default_history);
    if let Some(history) = &history {
        // A first session has none yet.
        let _ = editor.load_history(history);
    }
    loop {
        match editor.readline("> ") {
            Ok(line) => {
                let line = line.trim();
                if line.is_empty() {
                    continue;
                }
                let _ = editor.add_history_entry(line);
                if session.handle(line)? == Next::Leave {
                    break;
                }
            }
            Err(ReadlineError::Interrupted) => eprintln!("(Ctrl-D or /exit leaves)"),
            Err(ReadlineError::Eof) => break,
            Err(error) => return Err(error).context("reading a line"),
        }
    }
    if let Some(history) = &history {
        save_history(&mut editor, history);
    }
    Ok(())
}

#[derive(PartialEq)]
enum Next {
    Go,
    Leave,
}

struct Session<'m> {
    chat: Chat<'m>,
    system: String,
    stats: bool,
}

impl Session<'_> {
    fn handle(&mut self, line: &str) -> Result<Next> {
        let (command, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match command {
            "/exit" | "/quit" => return Ok(Next::Leave),
            "/help" => eprint!("{HELP}"),
            "/reset" => self.reset(),
            "/system" => {
                self.system = rest.trim().to_owned();
                self.reset();
            }
            "/stats" => {
                self.stats = !self.stats;
                eprintln!(
                    "(tokens per second: {})",
                    if self.stats { "on" } else { "off" }
                );
            }
            _ if command.starts_with('/') && command[1..].chars().all(char::is_alphabetic) => {
                eprintln!("{command} is no command; /help lists them");
            }
            _ => self.say(line)?,
        }
        Ok(Next::Go)
    }

    fn reset(&mut self) {
        self.chat.reset();
        self.chat.set_system(&self.system);
        eprintln!("(the conversation starts anew)");
    }

    /// One turn. What goes wrong with it is said, and the conversation goes on.
    fn say(&mut self, text: &str) -> Result<()> {
        let mut answer = match self.chat.send(text) {
            Ok(answer) => answer,
            Err(error) => {
                output::report(&error.into());
                return Ok(());
            }
        };
        interrupt::cancels(&answer.cancel_token())?;
        for piece in answer.by_ref() {
            match piece {
                Ok(piece) => output::print(&piece)?,
                Err(error) => {
                    output::print("\n")?;
                    output::report(&error.into());
                    interrupt::done();
                    return Ok(());
                }
            }
        }
        interrupt::done();
        output::print("\n")?;
        match answer.finish_reason() {
            Some(FinishReason::Cancelled) => eprintln!("(stopped)"),
            Some(FinishReason::Length) => eprintln!("(cut at --max-new-tokens)"),
            Some(FinishReason::ContextFull) => {
                eprintln!("(the context is full: /reset starts anew)");
            }
            _ => {}
        }
        if let (true, Some(usage)) = (self.stats, answer.usage()) {
            eprintln!("({})", output::usage_line(&usage));
        }
        Ok(())
    }
}

fn default_history() -> Option<PathBuf> {
    let state = || {
        let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from);
        state.or_else(|| Some(std::env::home_dir()?.join(".local/state")))
    };
    std::env::var_os("PHI3_HISTORY")
        .map(PathBuf::from)
        .or_else(|| Some(state()?.join("phi3/history")))
}

fn save_history(editor: &mut DefaultEditor, path: &std::path::Path) {
    let folder = path.parent().map_or(Ok(()), std::fs::create_dir_all);
    let saved = folder
        .map_err(ReadlineError::from)
        .and_then(|()| editor.save_history(path));
    if let Err(error) = saved {
        tracing::warn!("the history was not saved to {}: {error}", path.display());
    }
}
