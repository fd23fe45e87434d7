//! `PHI3_KERNELS`: whichever kernels compute, the same greedy text.

use std::path::Path;

use anyhow::{Result, ensure};

use crate::support::{DONE, USAGE, arg, command, fixture, run_with};
use crate::tiny::Tiny;

/// What a model answers with the kernels of a name; `None`: the best that the processor has.
fn answer(model: &str, prompt: &str, kernels: Option<&str>) -> Result<String> {
    let mut command = command(["generate", "--model", model, "--prompt", prompt, "-v"]);
    command.args(["--max-new-tokens", "8", "--temperature", "0"]);
    if let Some(kernels) = kernels {
        command.env("PHI3_KERNELS", kernels);
    }
    let run = run_with(b"", &mut command)?;
    ensure!(
        run.code == Some(DONE) && !run.stdout.trim().is_empty(),
        "{run:?}"
    );
    let named = kernels.is_none_or(|name| run.stderr.contains(&format!("{name} kernels")));
    ensure!(named, "other kernels were used: {}", run.stderr);
    Ok(run.stdout)
}

#[test]
fn a_tiny_model_writes_the_same_with_scalar_kernels() -> Result<()> {
    let tiny = Tiny::new()?;
    let model = arg(tiny.path());
    let best = answer(&model, "one hen", None)?;
    ensure!(answer(&model, "one hen", Some("scalar"))? == best);
    Ok(())
}

#[test]
fn a_trained_model_writes_the_same_with_scalar_kernels() -> Result<()> {
    let path = fixture("../../.demo/SmolLM2-135M-Instruct.Q4_1.gguf");
    if !Path::new(&path).exists() {
        eprintln!(
            "skipped: {} is absent; scripts/check.sh model fetches it",
            path.display()
        );
        return Ok(());
    }
    let (model, prompt) = (arg(&path), "What is the capital of France?");
    let best = answer(&model, prompt, None)?;
    ensure!(best.contains("Paris"), "{best}");
    ensure!(answer(&model, prompt, Some("scalar"))? == best);
    Ok(())
}

#[test]
fn kernels_that_do_not_exist_are_named() -> Result<()> {
    let tiny = Tiny::new()?;
    let mut command = command(tiny.args("generate", &["--prompt", "no"]));
    let run = run_with(b"", command.env("PHI3_KERNELS", "mmx"))?;
    run.says(USAGE, &["PHI3_KERNELS", "mmx", "scalar"])
}
