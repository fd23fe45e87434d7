//! Ctrl-C: ends the answer that is running; where none is, the program.

use std::sync::{Mutex, MutexGuard, Once, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use phi3::text::CancelToken;

use crate::output;

static STATE: Mutex<State> = Mutex::new(State {
    running: None,
    presses: 0,
    in_chat: false,
});

struct State {
    /// The answer under way.
    running: Option<CancelToken>,
    /// How often Ctrl-C was pressed during it.
    presses: u32,
    /// Whether a conversation would be lost with the program.
    in_chat: bool,
}

/// What a shell expects of a program that Ctrl-C ended: 128 + SIGINT.
const EXIT_INTERRUPTED: i32 = 130;

/// How long Ctrl-C may seem to do nothing: looking at pictures, or quantizing a tensor, can take longer.
const PATIENCE: Duration = Duration::from_secs(1);

/// From now on Ctrl-C cancels this answer; pressed again before the answer has stopped it ends the
/// program, in a conversation after a warning.
pub fn cancels(answer: &CancelToken) -> Result<()> {
    install()?;
    let mut state = state();
    state.presses = 0;
    state.running = Some(answer.clone());
    Ok(())
}

/// From now on Ctrl-C between answers changes nothing: a keystroke that comes just after the end of
/// an answer must not cost the conversation.
pub fn spares_the_program() -> Result<()> {
    state().in_chat = true;
    install()
}

/// The answer has ended: Ctrl-C ends the program again. Tells whether it was interrupted.
pub fn done() -> bool {
    let mut state = state();
    state.running = None;
    std::mem::take(&mut state.presses) > 0
}

/// Ends the program with the exit code of an interrupted one, if it was.
pub fn exit_if_interrupted() {
    if done() {
        std::process::exit(EXIT_INTERRUPTED);
    }
}

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn install() -> Result<()> {
    static INSTALL: Once = Once::new();
    static FAILURE: OnceLock<String> = OnceLock::new();
    INSTALL.call_once(|| {
        if let Err(error) = ctrlc::set_handler(pressed) {
            let _ = FAILURE.set(error.to_string());
        }
    });
    match FAILURE.get() {
        Some(error) => Err(anyhow::anyhow!("{error}")).context("watching for Ctrl-C"),
        None => Ok(()),
    }
}

fn pressed() {
    let mut state = state();
    let Some(running) = &state.running else {
        if !state.in_chat {
            std::process::exit(EXIT_INTERRUPTED);
        }
        return;
    };
    running.cancel();
    state.presses += 1;
    match (state.in_chat, state.presses) {
        (_, 1) => {
            // Not in this thread, which takes the next press.
            std::thread::spawn(|| {
                std::thread::sleep(PATIENCE);
                let state = self::state();
                if state.running.is_some() && state.presses == 1 {
                    output::note("(stopping after the step under way)");
                }
            });
        }
        (true, 2) => output::note("(stopping; Ctrl-C once more ends the program)"),
        _ => std::process::exit(EXIT_INTERRUPTED),
    }
}
