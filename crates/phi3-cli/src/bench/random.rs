//! The model that `--random` makes.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use phi3::hub::gguf::random::{Error, RandomModel};
use phi3::hub::quantize::Mix;

use crate::output::{UsageError, note};

/// A model with random weights in the shape of a real one.
#[derive(clap::Args)]
pub struct RandomArgs {
    /// Make a model of this shape with random weights, and measure it: phi-3-mini, phi-3-medium,
    /// phi-3.5-mini, phi-4-mini, phi-3-small, phi-3.5-moe, and phi-3-mini-4k and phi-3-medium-4k with a
    /// window of 2047 and phi-3-small-8k.
    #[arg(long, value_name = "SHAPE")]
    pub random: Option<String>,
    /// Type of the weights, as in `phi3 quantize`.
    #[arg(
        long = "type",
        value_name = "TYPE",
        default_value = "Q4_0",
        conflicts_with = "model"
    )]
    pub r#type: Mix,
    /// Make only so many of the shape's layers.
    #[arg(long, value_name = "N", conflicts_with = "model")]
    pub layers: Option<usize>,
    /// Seed of the weights.
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "model")]
    pub seed: u64,
    /// Where to write it [default: a file in the user's cache folder, used again next time].
    #[arg(long, value_name = "FILE.gguf", conflicts_with = "model")]
    pub out: Option<PathBuf>,
    /// Only make the model, and print where it is.
    #[arg(long, conflicts_with = "model")]
    pub make_only: bool,
}

impl RandomArgs {
    /// The model that the flags describe, not made yet.
    pub fn model(&self) -> Result<Option<RandomModel>> {
        let Some(shape) = &self.random else {
            return Ok(None);
        };
        RandomModel::new(shape, self.r#type, self.layers, self.seed)
            .map(Some)
            .map_err(|error| match error {
                Error::Shape { .. } => UsageError(format!("--random: {error}")).into(),
                Error::Layers { .. } => UsageError(format!("--layers: {error}")).into(),
                error => error.into(),
            })
    }

    /// Makes it where it is not there yet.
    pub fn make(&self, model: &RandomModel) -> Result<PathBuf> {
        let path = match &self.out {
            Some(path) => path.clone(),
            None => cache_folder()?.join(model.file_name()),
        };
        if model.is_at(&path) {
            return Ok(path);
        }
        if path.exists() && self.out.is_some() {
            bail!(
                "--out: {} exists and is not the {}: remove it or choose another name",
                path.display(),
                model.description()
            );
        }
        if !std::io::stderr().is_terminal() {
            note(&format!("making {}", model.description()));
        }
        write(model, &path).with_context(|| format!("making the {}", model.description()))?;
        Ok(path)
    }
}

fn write(model: &RandomModel, path: &Path) -> Result<()> {
    let bar = ProgressBar::with_draw_target(Some(model.size()), ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template("{msg}  {bar:20}  {bytes} of {total_bytes}") {
        bar.set_style(style);
    }
    bar.set_message(model.description());
    let result = model.write(path, |written| bar.set_position(written));
    bar.finish_and_clear();
    Ok(result?)
}

/// `phi3/bench` in the user's cache folder; in the system's temporary folder where there is none.
fn cache_folder() -> Result<PathBuf> {
    let variable = |name: &str| {
        let value = std::env::var_os(name).map(PathBuf::from);
        value.filter(|path| path.is_absolute())
    };
    let below_home = |folder: &str| variable("HOME").map(|home| home.join(folder));
    let caches = match std::env::consts::OS {
        "macos" => below_home("Library/Caches"),
        "windows" => variable("LOCALAPPDATA"),
        _ => variable("XDG_CACHE_HOME").or_else(|| below_home(".cache")),
    };
    let folder = caches.unwrap_or_else(std::env::temp_dir);
    let folder = folder.join("phi3").join("bench");
    std::fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    Ok(folder)
}
