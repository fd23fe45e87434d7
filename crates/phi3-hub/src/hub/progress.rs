//! Telling someone how far a download is.

use std::collections::HashMap;
use std::io::{IsTerminal, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Is told how far a download is. Files come one after the other; a file that is begun anew is
/// started again.
pub trait Progress: Send + Sync {
    /// A transfer begins: `total` bytes in all, of which `already` are here from an earlier attempt.
    fn start(&self, file: &str, total: u64, already: u64);
    /// `bytes` more have come.
    fn advance(&self, file: &str, bytes: u64);
    /// The file is complete and verified.
    fn finish(&self, file: &str);
    /// The transfer failed; an error follows.
    fn fail(&self, _file: &str) {}
}

/// Tells nobody.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn start(&self, _file: &str, _total: u64, _already: u64) {}
    fn advance(&self, _file: &str, _bytes: u64) {}
    fn finish(&self, _file: &str) {}
}

/// A bar on stderr with speed and time left; without a terminal nothing, or plain lines if asked.
#[derive(Debug)]
pub struct TerminalProgress {
    form: Form,
    running: Mutex<HashMap<String, Running>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Bar,
    Lines,
    Silent,
}

#[derive(Debug)]
enum Running {
    Bar(ProgressBar),
    Lines(Lines),
}

/// A line every so often, for logs.
#[derive(Debug)]
struct Lines {
    total: u64,
    already: u64,
    done: u64,
    begun: Instant,
    shown: Instant,
}

/// Time between two lines.
const INTERVAL: Duration = Duration::from_secs(10);

impl TerminalProgress {
    /// A bar if stderr is a terminal, silent otherwise.
    pub fn new() -> Self {
        Self::with(if std::io::stderr().is_terminal() {
            Form::Bar
        } else {
            Form::Silent
        })
    }

    /// A bar if stderr is a terminal, otherwise a line per file and every ten seconds.
    pub fn always() -> Self {
        Self::with(if std::io::stderr().is_terminal() {
            Form::Bar
        } else {
            Form::Lines
        })
    }

    fn with(form: Form) -> Self {
        Self {
            form,
            running: Mutex::new(HashMap::new()),
        }
    }

    fn on(&self, file: &str, act: impl FnOnce(&mut Running)) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = running.get_mut(file) {
            act(running);
        }
    }

    fn forget(&self, file: &str) {
        self.running
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(file);
    }
}

impl Default for TerminalProgress {
    fn default() -> Self {
        Self::new()
    }
}

impl Progress for TerminalProgress {
    fn start(&self, file: &str, total: u64, already: u64) {
        let new = match self.form {
            Form::Silent => return,
            Form::Bar => Running::Bar(bar(file, total, already)),
            Form::Lines => {
                let now = Instant::now();
                Running::Lines(Lines {
                    total,
                    already,
                    done: already,
                    begun: now,
                    shown: now,
                })
            }
        };
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Running::Bar(old)) = running.insert(file.to_owned(), new) {
            old.finish_and_clear();
        }
    }

    fn advance(&self, file: &str, bytes: u64) {
        self.on(file, |running| match running {
            Running::Bar(bar) => bar.inc(bytes),
            Running::Lines(lines) => {
                lines.done += bytes;
                if lines.shown.elapsed() >= INTERVAL {
                    lines.shown = Instant::now();
                    say(&lines.line(file));
                }
            }
        });
    }

    fn finish(&self, file: &str) {
        self.on(file, |running| match running {
            Running::Bar(bar) => bar.finish(),
            Running::Lines(lines) => say(&format!("{file}: {} done", HumanBytes(lines.total))),
        });
        self.forget(file);
    }

    fn fail(&self, file: &str) {
        self.on(file, |running| {
            if let Running::Bar(bar) = running {
                bar.abandon();
            }
        });
        self.forget(file);
    }
}

/// Name, bar, bytes, speed and time left, in 100 columns.
const TEMPLATE: &str =
    "{msg:32!} {bar:30} {bytes:>11} of {total_bytes:<11} {bytes_per_sec:>13}, {eta} left";

fn bar(file: &str, total: u64, already: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template(TEMPLATE) {
        bar.set_style(style);
    }
    bar.set_message(file.to_owned());
    // Bytes from an earlier attempt are no measure of the speed of this one.
    bar.set_position(already);
    bar.reset_eta();
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

impl Lines {
    fn line(&self, file: &str) -> String {
        let seconds = self.begun.elapsed().as_secs_f64().max(1e-3);
        let speed = self.done.saturating_sub(self.already) as f64 / seconds;
        let left = self.total.saturating_sub(self.done) as f64 / speed.max(1.0);
        // A stalled transfer has no end in sight; a year stands for that.
        let left = Duration::from_secs_f64(left.min(31_536_000.0));
        format!(
            "{file}: {} of {}, {}/s, {} left",
            HumanBytes(self.done),
            HumanBytes(self.total),
            HumanBytes(speed as u64),
            HumanDuration(left)
        )
    }
}

/// A log line; if stderr is gone there is nobody to tell.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_speed_does_not_count_what_was_here_before() {
        let begun = Instant::now().checked_sub(Duration::from_secs(10)).unwrap();
        let lines = Lines {
            total: 100 << 20,
            already: 50 << 20,
            done: 70 << 20,
            begun,
            shown: begun,
        };
        let line = lines.line("model.safetensors");
        assert!(line.contains("70.00 MiB of 100.00 MiB"), "{line}");
        assert!(line.contains("2.00 MiB/s"), "{line}");
        assert!(line.contains("15 seconds left"), "{line}");
    }

    #[test]
    fn a_transfer_that_brings_nothing_has_a_finite_line() {
        let now = Instant::now();
        let lines = Lines {
            total: u64::MAX,
            already: 0,
            done: 0,
            begun: now,
            shown: now,
        };
        assert!(lines.line("x").contains("left"));
    }

    #[test]
    fn files_can_start_again_and_finish() {
        for form in [Form::Bar, Form::Lines, Form::Silent] {
            let progress = TerminalProgress::with(form);
            progress.start("a", 10, 0);
            progress.advance("a", 4);
            progress.start("a", 10, 0);
            progress.advance("unknown", 4);
            progress.finish("a");
            progress.start("b", 10, 0);
            progress.fail("b");
            assert!(progress.running.lock().unwrap().is_empty());
        }
    }

    #[test]
    fn the_template_is_one() {
        assert!(ProgressStyle::with_template(TEMPLATE).is_ok());
    }
}
