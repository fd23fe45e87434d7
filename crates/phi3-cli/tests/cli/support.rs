//! Running the program, and reading what it writes.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// Exit codes as main.rs documents them.
pub const DONE: i32 = 0;
pub const FAILED: i32 = 1;
pub const USAGE: i32 = 2;
pub const NO_MODEL: i32 = 3;
pub const INTERRUPTED: i32 = 130;

/// What a run left.
#[derive(Debug)]
pub struct Run {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// The program with arguments, in an environment that this machine's settings do not reach.
pub fn command(args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_phi3"));
    command
        .args(args)
        .env("HF_HUB_OFFLINE", "1")
        .env("PHI3_HISTORY", "");
    for variable in [
        "HF_TOKEN",
        "HF_HOME",
        "HF_HUB_CACHE",
        "HF_ENDPOINT",
        "PHI3_LOG",
        "PHI3_THREADS",
        "PHI3_KERNELS",
    ] {
        command.env_remove(variable);
    }
    command
}

/// Runs it with `stdin` as its whole input.
pub fn run_with(stdin: &[u8], command: &mut Command) -> Result<Run> {
    let mut child = spawn(command)?;
    let mut pipe = child.stdin.take().context("stdin")?;
    let stdin = stdin.to_vec();
    // A program that does not read its input closes the pipe, which is not this test's concern.
    let writer = std::thread::spawn(move || pipe.write_all(&stdin).is_ok());
    let output = child.wait_with_output()?;
    let _ = writer.join();
    Ok(Run {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).context("stdout is UTF-8")?,
        stderr: String::from_utf8(output.stderr).context("stderr is UTF-8")?,
    })
}

/// Starts it with all three streams piped.
pub fn spawn(command: &mut Command) -> Result<Child> {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("starting phi3")
}

/// Runs it without input.
pub fn run(args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<Run> {
    run_with(b"", &mut command(args))
}

/// stdout of a run that must succeed.
pub fn stdout(args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<String> {
    let run = run(args)?;
    ensure!(run.code == Some(DONE), "{run:?}");
    Ok(run.stdout)
}

impl Run {
    /// Fails unless the run ended with `code`, wrote nothing to stdout, did not panic, and said all
    /// of `words` on stderr.
    pub fn says(&self, code: i32, words: &[&str]) -> Result<()> {
        ensure!(self.code == Some(code), "exit code is not {code}: {self:?}");
        ensure!(
            self.stdout.is_empty(),
            "an error belongs on stderr: {self:?}"
        );
        ensure!(!self.stderr.contains("panicked"), "{self:?}");
        match words.iter().find(|word| !self.stderr.contains(**word)) {
            Some(word) => bail!("the message lacks {word:?}: {}", self.stderr),
            None => Ok(()),
        }
    }
}

/// The folder of fixtures that the repository carries.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/fixtures")
        .join(name)
}

/// A path as an argument.
pub fn arg(path: &Path) -> String {
    path.display().to_string()
}

/// A tensor of a safetensors file.
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    Ids(Vec<i64>),
    Floats(Vec<f32>),
}

/// The tensors of a safetensors file, read by another implementation than the project's own.
pub struct Tensors(BTreeMap<String, (Vec<usize>, Values)>);

impl Tensors {
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        let mut tensors = BTreeMap::new();
        for (name, view) in SafeTensors::deserialize(&bytes)?.tensors() {
            let data = view.data();
            let values = match view.dtype() {
                Dtype::I64 => {
                    let (words, _) = data.as_chunks::<8>();
                    Values::Ids(words.iter().map(|word| i64::from_le_bytes(*word)).collect())
                }
                Dtype::U8 => Values::Ids(data.iter().map(|byte| i64::from(*byte)).collect()),
                Dtype::F32 => {
                    let (words, _) = data.as_chunks::<4>();
                    Values::Floats(words.iter().map(|word| f32::from_le_bytes(*word)).collect())
                }
                other => bail!("{name} is {other:?}"),
            };
            tensors.insert(name, (view.shape().to_vec(), values));
        }
        Ok(Self(tensors))
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self
            .0
            .get(name)
            .with_context(|| format!("no tensor {name}"))?
            .0)
    }

    pub fn floats(&self, name: &str) -> Option<&[f32]> {
        match self.0.get(name) {
            Some((_, Values::Floats(floats))) => Some(floats),
            _ => None,
        }
    }

    pub fn ids(&self, name: &str) -> Option<&[i64]> {
        match self.0.get(name) {
            Some((_, Values::Ids(ids))) => Some(ids),
            _ => None,
        }
    }
}

/// Writes ids as the program reads them.
pub fn write_ids(folder: &Path, stem: &str, ids: &[i64]) -> Result<PathBuf> {
    let path = folder.join(format!("{stem}.json"));
    std::fs::write(&path, serde_json::to_string(ids)?)?;
    Ok(path)
}

/// Largest difference to a golden, as a share of the golden's standard deviation.
pub const TOLERANCE: f32 = 2e-4;

/// Fails if a value differs from its golden by more than [`TOLERANCE`] allows.
pub fn assert_close(what: &str, found: &[f32], golden: &[f32]) -> Result<()> {
    ensure!(
        found.len() == golden.len(),
        "{what}: {} values instead of {}",
        found.len(),
        golden.len()
    );
    // Tokens that a model never chooses have the lowest logit that there is.
    let chosen = || golden.iter().filter(|&&x| x > f32::MIN);
    let n = chosen().count() as f64;
    let mean = chosen().map(|&x| f64::from(x)).sum::<f64>() / n;
    let variance = chosen()
        .map(|&x| (f64::from(x) - mean).powi(2))
        .sum::<f64>()
        / n;
    let limit = TOLERANCE * variance.sqrt() as f32;
    for (idx, (found, golden)) in found.iter().zip(golden).enumerate() {
        // Written so that a NaN fails.
        ensure!(
            (found - golden).abs() <= limit,
            "{what}: value {idx} is {found}, its golden {golden} (limit {limit:e})"
        );
    }
    Ok(())
}

/// The JSON values of a text, one a line.
pub fn json_lines(text: &str) -> Result<Vec<Value>> {
    text.lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("{line:?} is no JSON")))
        .collect()
}
