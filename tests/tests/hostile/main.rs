//! Hostile inputs, as a user meets them: a good model with one thing broken ends in an error that
//! names the thing, soon, without a panic and without memory for what a number claims.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "all of this is test code, helpers included"
)]

mod config;
mod folder;
mod gguf;
mod run;
mod text;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use phi3::{LanguageModel, LoadOptions, SamplingParams};
use phi3_tests::hostile::{Folder, Gguf};

/// Longest time that an error may take. Measured: below 0.1 s, in templates that run into their
/// limits.
const TIME_LIMIT: Duration = Duration::from_secs(2);

/// Most address space that a case may add, in bytes. Measured: 68 MB.
const MEMORY_LIMIT: u64 = 1 << 30;

/// A folder with one thing broken.
pub struct Case {
    /// What is broken.
    pub name: &'static str,
    /// Breaks it.
    pub damage: fn(&Folder) -> Result<()>,
    /// Texts that the error, with its sources, must contain.
    pub says: &'static [&'static str],
}

/// What is tried with a model.
pub type Attempt = fn(&LanguageModel) -> Result<()>;

/// Nothing but loading.
pub const LOAD: Attempt = |_| Ok(());

/// A few tokens, chosen greedily.
pub const COMPLETE: Attempt = |model| complete(model, "hi", SamplingParams::greedy());

/// The answer to a question.
pub const CHAT: Attempt = |model| ask(model, "hi");

/// A few tokens that continue `text`.
pub fn complete(model: &LanguageModel, text: &str, sampling: SamplingParams) -> Result<()> {
    model.complete(text, sampling, 4)?;
    Ok(())
}

/// A few tokens of an answer to `question`.
pub fn ask(model: &LanguageModel, question: &str) -> Result<()> {
    let mut chat = model.chat()?;
    chat.settings.max_new_tokens = 4;
    chat.send(question)?.text()?;
    Ok(())
}

/// Damages a good folder in each of these ways, and tries `attempt` with it.
pub fn check_folders(attempt: Attempt, cases: &[Case]) {
    let mut failures = Vec::new();
    for case in cases {
        let folder = Folder::good().unwrap();
        (case.damage)(&folder).unwrap_or_else(|error| panic!("{}: {error:#}", case.name));
        failures.extend(refused(case.name, folder.path(), attempt, case.says));
    }
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}

/// Tries `attempt` with the model at `path`. `None` if it ends as it must, else what is wrong.
pub fn refused(name: &str, path: &Path, attempt: Attempt, says: &[&str]) -> Option<String> {
    let model = path.to_str().expect("temporary folders have UTF-8 names");
    let (memory, start) = (address_space(), cpu_time());
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        attempt(&phi3::load_with(model, &LoadOptions::default())?)
    }));
    let (memory, time) = (address_space() - memory, cpu_time() - start);
    let error = match outcome {
        Err(_) => return Some(format!("{name}: panics")),
        Ok(Ok(())) => return Some(format!("{name}: is accepted")),
        Ok(Err(error)) => chain(&error),
    };
    println!("{name} ({time:?}, {} MB)\n    {error}", memory >> 20);
    if let Some(missing) = says.iter().find(|text| !error.contains(**text)) {
        return Some(format!("{name}: {missing:?} is not in: {error}"));
    }
    if time > TIME_LIMIT {
        return Some(format!("{name}: takes {time:?}"));
    }
    (memory > MEMORY_LIMIT).then(|| format!("{name}: takes {memory} bytes"))
}

/// An error with all its sources, but for those that it repeats, as the command line prints them.
fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !text.contains(&cause) {
            text = if text.is_empty() {
                cause
            } else {
                format!("{text}: {cause}")
            };
        }
    }
    text
}

/// Time that this thread has run, which does not depend on what else the machine does; where the
/// system does not tell, the time of the clock.
fn cpu_time() -> Duration {
    thread_local!(static START: Instant = Instant::now());
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat");
    let nanos = stat.ok().and_then(|s| s.split(' ').next()?.parse().ok());
    nanos.map_or_else(|| START.with(Instant::elapsed), Duration::from_nanos)
}

/// Largest address space of this process so far, in bytes; 0 where the system does not tell. Other
/// than memory in use it also counts what is allocated and never touched.
fn address_space() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:"));
    let kilobytes = line.and_then(|line| line.strip_suffix("kB")?.trim().parse().ok());
    kilobytes.unwrap_or(0u64) * 1024
}

#[test]
fn undamaged_models_load_complete_and_chat() {
    let folder = Folder::good().unwrap();
    let files = tempfile::tempdir().unwrap();
    let path = files.path().join("model.gguf");
    std::fs::write(&path, Gguf::good().to_bytes().unwrap()).unwrap();
    let byte_level = files.path().join("byte-level.gguf");
    let mut gguf = Gguf::good();
    gguf.set_byte_level();
    std::fs::write(&byte_level, gguf.to_bytes().unwrap()).unwrap();
    for model in [folder.path(), &path, &byte_level] {
        let loaded = phi3::load(model.to_str().unwrap()).unwrap();
        COMPLETE(&loaded).unwrap();
        CHAT(&loaded).unwrap();
    }
}

#[test]
fn the_limits_of_these_tests_are_measured() {
    // Less than the limit: the tests may share one process.
    let untouched = Vec::<u8>::with_capacity(600 << 20);
    if cfg!(target_os = "linux") {
        assert!(address_space() >= 600 << 20);
    }
    drop(untouched);
    let start = cpu_time();
    let clock = Instant::now();
    while clock.elapsed() < Duration::from_millis(50) {}
    assert!(cpu_time() > start);
}
