//! `phi3 chat`: a conversation in the terminal.

use std::path::{Path, PathBuf};

use anyhow::Result;
use phi3::image::Image;
use phi3::text::{CancelToken, FinishReason};
use phi3::{Chat, LanguageModel};

use crate::args::{ComputeArgs, ImageArgs, SourceArgs, load};
use crate::input::{Conversation, Input};
use crate::sampling::SamplingArgs;
use crate::{interrupt, output, system};

/// Talk with a model.
///
/// Ctrl-C stops an answer, Ctrl-D leaves. From a pipe or file each line is a message; answers go to stdout, one after the other.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    #[command(flatten)]
    images: ImageArgs,
    /// A system message to begin with; /system changes it.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Say this first, then go on.
    #[arg(long, short, value_name = "TEXT")]
    prompt: Option<String>,
    /// Print tokens per second after each answer; /stats switches it.
    #[arg(long)]
    stats: bool,
    /// Where to keep the history of what was typed [default: PHI3_HISTORY, else
    /// $XDG_STATE_HOME/phi3/history, else ~/.local/state/phi3/history; none if PHI3_HISTORY is
    /// empty].
    #[arg(long, value_name = "FILE")]
    history: Option<PathBuf>,
    #[command(flatten)]
    sampling: SamplingArgs,
}

const HELP: &str = "\
/reset          forget the conversation, not the system message
/system TEXT    set the system message (no TEXT: remove it) and forget the conversation
/stats          print tokens per second after each answer, or stop doing so
/image FILE     show a picture with the next message
/help           this list
/exit           leave, as Ctrl-D does
A line that ends in \\ goes on in the next one; Ctrl-C stops an answer.";

const COMMANDS: [&str; 7] = [
    "/reset", "/system ", "/stats", "/image ", "/help", "/exit", "/quit",
];

pub fn run(args: &Args) -> Result<()> {
    let mut model = load(&args.source, &args.compute)?;
    args.images.prepare(&mut model)?;
    let model = model;
    let mut chat = model.chat()?;
    chat.settings.sampling = args.sampling.params(model.default_sampling());
    chat.settings.max_new_tokens = args.sampling.max_new_tokens;
    chat.settings.stop_strings.clone_from(&args.sampling.stop);
    chat.settings.sampling.validate()?;
    let mut session = Session {
        model: &model,
        chat,
        system: String::new(),
        stats: args.stats,
    };
    if let Some(system) = &args.system {
        session.set_system(system);
    }
    for image in args.images.images()? {
        session.chat.show(&image)?;
    }
    let history = args.history.clone().or_else(default_history);
    let mut conversation = Conversation::new(&COMMANDS, history)?;
    if conversation.is_terminal() {
        interrupt::spares_the_program()?;
        output::note(&format!(
            "{} ({} tokens of context). /help lists the commands, Ctrl-D leaves.",
            args.source.model,
            model.config().info().max_position_embeddings
        ));
    }
    if let Some(prompt) = &args.prompt {
        if conversation.is_terminal() {
            output::note(&format!("> {prompt}"));
        }
        session.say(prompt)?;
    }
    loop {
        match conversation.next()? {
            Input::Message(message) => {
                let message = message.trim();
                if !message.is_empty() && session.handle(message)? == Next::Leave {
                    return Ok(());
                }
            }
            Input::Interrupted => output::note("(Ctrl-D or /exit leaves)"),
            Input::End => return Ok(()),
        }
    }
}

#[derive(PartialEq)]
enum Next {
    Go,
    Leave,
}

struct Session<'m> {
    model: &'m LanguageModel,
    chat: Chat<'m>,
    system: String,
    stats: bool,
}

impl Session<'_> {
    fn handle(&mut self, message: &str) -> Result<Next> {
        let (command, rest) = message
            .split_once(char::is_whitespace)
            .unwrap_or((message, ""));
        match command {
            "/exit" | "/quit" => return Ok(Next::Leave),
            "/help" => output::note(HELP),
            "/reset" => {
                self.chat.reset();
                self.chat.set_system(&self.system);
                output::note("(the conversation starts anew)");
            }
            "/system" => {
                self.chat.reset();
                self.set_system(rest.trim());
                output::note(match self.system.is_empty() {
                    true => "(no system message; the conversation starts anew)",
                    false => "(system message set; the conversation starts anew)",
                });
            }
            "/stats" => {
                self.stats = !self.stats;
                output::note(match self.stats {
                    true => "(tokens per second: on)",
                    false => "(tokens per second: off)",
                });
            }
            "/image" => self.show(rest.trim()),
            _ if is_command(command) => {
                output::note(&format!("{command} is no command; /help lists them"));
            }
            _ => self.say(message)?,
        }
        Ok(Next::Go)
    }

    fn set_system(&mut self, text: &str) {
        text.clone_into(&mut self.system);
        self.chat.set_system(text);
        if let Ok(template) = self.model.chat_template() {
            system::warn_if_ignored(template, text);
        }
    }

    /// A picture for the next message.
    fn show(&mut self, file: &str) {
        if file.is_empty() {
            output::note("(/image FILE shows a picture with the next message)");
            return;
        }
        let path = typed_path(file);
        if path.is_dir() {
            output::note(
                "(that is a folder; /image takes a file, --frames N of a folder's pictures)",
            );
            return;
        }
        let token = CancelToken::new();
        if let Err(error) = interrupt::cancels(&token) {
            output::report(&error);
        }
        let shown = self.chat.show(&Image::path(path));
        if interrupt::done() {
            output::note("(a picture is looked at to its end; /reset forgets it)");
        }
        match shown {
            Ok(layout) => output::note(&format!(
                "(image {}: {} crops, {} tokens; it goes with the next message)",
                self.chat.images().len(),
                layout.crops(),
                layout.tokens()
            )),
            Err(error) => output::report(&error.into()),
        }
    }

    /// One turn. What goes wrong with it is said, and the conversation goes on.
    fn say(&mut self, text: &str) -> Result<()> {
        let mut answer = match self.chat.send(text) {
            Ok(answer) => answer,
            Err(error) => {
                let too_long = is_too_long(&error);
                output::report(&error.into());
                if too_long {
                    output::note("(/reset starts a new conversation)");
                }
                return Ok(());
            }
        };
        interrupt::cancels(&answer.cancel_token())?;
        let mut failure = None;
        let mut said_something = false;
        for piece in answer.by_ref() {
            match piece {
                Ok(piece) => {
                    said_something |= !piece.is_empty();
                    output::answer(&piece)?;
                }
                Err(error) => failure = Some(error),
            }
        }
        interrupt::done();
        output::print("\n")?;
        if let Some(error) = failure {
            output::report(&error.into());
            return Ok(());
        }
        match answer.finish_reason() {
            Some(FinishReason::Cancelled) if said_something => output::note("(stopped)"),
            Some(FinishReason::Cancelled) => {
                output::note("(stopped before the first word; the message is forgotten)");
            }
            Some(FinishReason::Length) => output::note("(cut at --max-new-tokens)"),
            Some(FinishReason::ContextFull) => {
                output::note("(the context is full: /reset starts anew)");
            }
            _ => {}
        }
        if let (true, Some(usage)) = (self.stats, answer.usage()) {
            output::note(&format!("({})", output::usage_line(&usage)));
        }
        Ok(())
    }
}

/// Whether a word is meant as a command: a path or a fraction is not.
/// A path as somebody types it, or a terminal into which a file is dropped: perhaps in quotes, or with
/// backslashes before what a shell would not take as it is, and with the home folder as `~`.
fn typed_path(typed: &str) -> PathBuf {
    let quoted = ['\'', '"'].iter().find_map(|quote| {
        let inner = typed.strip_prefix(*quote)?.strip_suffix(*quote)?;
        Some(inner.to_owned())
    });
    let is_there = Path::new(typed).exists();
    let path = match quoted {
        _ if is_there => typed.to_owned(),
        Some(inner) => inner,
        None if cfg!(windows) => typed.to_owned(),
        None => unescaped(typed),
    };
    let home = || path.strip_prefix("~/").zip(std::env::home_dir());
    match home() {
        Some((rest, home)) if !is_there => home.join(rest),
        _ => path.into(),
    }
}

/// Without the backslashes that precede another character.
fn unescaped(typed: &str) -> String {
    let mut chars = typed.chars();
    let next = || {
        Some(match chars.next()? {
            '\\' => chars.next().unwrap_or('\\'),
            other => other,
        })
    };
    std::iter::from_fn(next).collect()
}

fn is_command(word: &str) -> bool {
    word.strip_prefix('/')
        .is_some_and(|name| !name.is_empty() && name.chars().all(char::is_alphabetic))
}

fn is_too_long(error: &phi3::Error) -> bool {
    matches!(
        error,
        phi3::Error::Text(text) if matches!(**text, phi3::text::Error::PromptTooLong { .. })
    )
}

fn default_history() -> Option<PathBuf> {
    let state = || {
        let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from);
        state.or_else(|| Some(std::env::home_dir()?.join(".local/state")))
    };
    match std::env::var_os("PHI3_HISTORY") {
        Some(path) => (!path.is_empty()).then(|| path.into()),
        None => Some(state()?.join("phi3/history")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn a_path_is_taken_as_terminals_write_it() {
        for typed in ["a b.png", "a\\ b.png", "'a b.png'", "\"a b.png\""] {
            assert_eq!(typed_path(typed), Path::new("a b.png"), "{typed}");
        }
        assert_eq!(typed_path("\\\\"), Path::new("\\"));
        assert_eq!(typed_path("'"), Path::new("'"));
        let home = std::env::home_dir().unwrap_or_default();
        assert_eq!(typed_path("~/c.png"), home.join("c.png"));
    }
}
