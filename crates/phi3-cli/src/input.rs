//! What the user says: a prompt, or line after line of a conversation.

use std::io::{BufRead, IsTerminal};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::DefaultHistory;
use rustyline::validate::Validator;
use rustyline::{Behavior, CompletionType, Config, Editor, Helper};

use crate::output;

/// The prompt of the command line, else all of stdin but its last line break.
pub fn prompt(given: Option<&str>) -> Result<String> {
    if let Some(given) = given {
        return Ok(given.to_owned());
    }
    let stdin = std::io::stdin();
    if stdin.is_terminal() {
        output::note("(reading the prompt from the terminal: Ctrl-D on a line of its own ends it)");
    }
    let mut text = std::io::read_to_string(stdin).context("reading the prompt from stdin")?;
    cut_line_break(&mut text);
    Ok(text)
}

fn cut_line_break(text: &mut String) {
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
}

/// What came instead of, or as, a message.
#[derive(Debug, PartialEq)]
pub enum Input {
    /// A message; it may have several lines.
    Message(String),
    /// Ctrl-C.
    Interrupted,
    /// Ctrl-D, or the end of a pipe.
    End,
}

/// The user's side of a conversation.
pub enum Conversation {
    /// Line editing and a history that is kept.
    Terminal(Box<Terminal>),
    /// A pipe or file, a message a line.
    Piped,
}

/// An editor and where its history is kept.
pub struct Terminal {
    editor: Editor<Commands, DefaultHistory>,
    history: Option<PathBuf>,
}

/// Entries that the history keeps.
const HISTORY: usize = 1000;

impl Conversation {
    /// An editor on a terminal that completes `commands`, else plain lines.
    pub fn new(commands: &'static [&'static str], history: Option<PathBuf>) -> Result<Self> {
        if !std::io::stdin().is_terminal() {
            return Ok(Self::Piped);
        }
        let config = Config::builder()
            .max_history_size(HISTORY)?
            .history_ignore_dups(true)?
            .completion_type(CompletionType::List)
            // stdout may be a file that should hold nothing but the answers.
            .behavior(Behavior::PreferTerm)
            .build();
        let mut editor = Editor::with_config(config).context("opening the terminal")?;
        editor.set_helper(Some(Commands(commands)));
        if let Some(history) = &history {
            // A first conversation has none yet.
            let _ = editor.load_history(history);
        }
        Ok(Self::Terminal(Box::new(Terminal { editor, history })))
    }

    /// Whether someone is sitting there.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal(_))
    }

    /// The next message. A line that ends in a backslash goes on in the next one.
    pub fn next(&mut self) -> Result<Input> {
        let mut message = String::new();
        loop {
            let line = match self {
                Self::Terminal(terminal) => terminal.line(message.is_empty())?,
                Self::Piped => piped_line()?,
            };
            match line {
                Input::Message(line) => match line.strip_suffix('\\') {
                    Some(begun) => {
                        message.push_str(begun);
                        message.push('\n');
                    }
                    None => {
                        message.push_str(&line);
                        break;
                    }
                },
                Input::End if !message.is_empty() => break,
                other => return Ok(other),
            }
        }
        if let Self::Terminal(terminal) = self {
            terminal.remember(message.trim());
        }
        Ok(Input::Message(message))
    }
}

fn piped_line() -> Result<Input> {
    let mut line = String::new();
    let read = std::io::stdin().lock().read_line(&mut line);
    if read.context("reading a message from stdin")? == 0 {
        return Ok(Input::End);
    }
    cut_line_break(&mut line);
    Ok(Input::Message(line))
}

impl Terminal {
    fn line(&mut self, first: bool) -> Result<Input> {
        match self.editor.readline(if first { "> " } else { ". " }) {
            Ok(line) => Ok(Input::Message(line)),
            Err(ReadlineError::Interrupted) => Ok(Input::Interrupted),
            Err(ReadlineError::Eof) => Ok(Input::End),
            Err(error) => Err(error).context("reading a line from the terminal"),
        }
    }

    /// Adds to the history, on disk at once: a program that is killed loses nothing, and two
    /// conversations side by side keep each other's lines.
    fn remember(&mut self, message: &str) {
        if message.is_empty() || !matches!(self.editor.add_history_entry(message), Ok(true)) {
            return;
        }
        let Some(path) = &self.history else {
            return;
        };
        if let Err(error) = append_history(&mut self.editor, path) {
            tracing::warn!("the history cannot be saved to {}: {error}", path.display());
            self.history = None; // said once
        }
    }
}

fn append_history(
    editor: &mut Editor<Commands, DefaultHistory>,
    path: &Path,
) -> rustyline::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    editor.append_history(path)
}

/// Completes the commands at the start of a line.
struct Commands(&'static [&'static str]);

impl Completer for Commands {
    type Candidate = String;

    fn complete(
        &self,
        line: &str,
        position: usize,
        _: &rustyline::Context<'_>,
    ) -> rustyline::Result<(usize, Vec<String>)> {
        let begun = line.get(..position).unwrap_or_default();
        let matching = |command: &&&str| begun.starts_with('/') && command.starts_with(begun);
        let commands = self.0.iter().filter(matching);
        Ok((0, commands.map(|command| (*command).to_owned()).collect()))
    }
}

impl Hinter for Commands {
    type Hint = String;
}
impl Highlighter for Commands {}
impl Validator for Commands {}
impl Helper for Commands {}
