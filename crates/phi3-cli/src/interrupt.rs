//! Ctrl-C: ends the answer that is running; where none is, the program.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use phi3::text::CancelToken;

static RUNNING: Mutex<Option<CancelToken>> = Mutex::new(None);
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// What a shell expects of a program that Ctrl-C ended: 128 + SIGINT.
const EXIT_INTERRUPTED: i32 = 130;

/// From now on Ctrl-C cancels this answer; a second one ends the program.
pub fn cancels(answer: &CancelToken) -> Result<()> {
    install()?;
    INTERRUPTED.store(false, Ordering::Relaxed);
    *RUNNING.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer.clone());
    Ok(())
}

/// The answer has ended: Ctrl-C ends the program again. Tells whether it was interrupted.
pub fn done() -> bool {
    *RUNNING.lock().unwrap_or_else(PoisonError::into_inner) = None;
    INTERRUPTED.swap(false, Ordering::Relaxed)
}

/// Ends the program with the exit code of an interrupted one, if it was.
pub fn exit_if_interrupted() -> Result<()> {
    if done() {
        std::process::exit(EXIT_INTERRUPTED);
    }
    Ok(())
}

fn install() -> Result<()> {
    static INSTALLED: AtomicBool = AtomicBool::new(false);
    if INSTALLED.swap(true, Ordering::Relaxed) {
        return Ok(());
    }
    ctrlc::set_handler(|| {
        let running = RUNNING
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        match running {
            Some(answer) => {
                INTERRUPTED.store(true, Ordering::Relaxed);
                answer.cancel();
            }
            None => std::process::exit(EXIT_INTERRUPTED),
        }
    })
    .context("watching for Ctrl-C")
}
