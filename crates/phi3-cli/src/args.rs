//! Flags that mean the same in every command.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::DType;
use clap::ValueEnum;
use phi3::hub::quantize::Mix;
use phi3::hub::{Checkpoint, HubOptions, Source, TerminalProgress};
use phi3::image::{Image, Limits, animation_frames, folder_files};
use phi3::{CacheType, ContextExtension, DeviceSpec, LanguageModel, LoadOptions};

use crate::output::UsageError;

/// Which model, and from where.
#[derive(Clone, Debug, clap::Args)]
pub struct SourceArgs {
    /// A repo id on the hub (microsoft/Phi-3-mini-4k-instruct), a folder, or a .gguf file.
    #[arg(long, short, value_name = "MODEL")]
    pub model: String,
    #[command(flatten)]
    pub hub: HubArgs,
}

/// The same for commands that also take the model as their argument.
#[derive(Clone, Debug, clap::Args)]
pub struct PositionalSourceArgs {
    /// A repo id on the hub (microsoft/Phi-3-mini-4k-instruct), a folder, or a .gguf file.
    #[arg(value_name = "MODEL", required_unless_present = "model")]
    pub positional: Option<String>,
    /// The model, as in the other commands.
    #[arg(long, short, value_name = "MODEL", conflicts_with = "positional")]
    pub model: Option<String>,
    #[command(flatten)]
    pub hub: HubArgs,
}

impl PositionalSourceArgs {
    /// The model, however it was given.
    pub fn source(&self) -> SourceArgs {
        let model = self.positional.clone().or_else(|| self.model.clone());
        SourceArgs {
            model: model.unwrap_or_default(),
            hub: self.hub.clone(),
        }
    }
}

/// How to reach the hub.
#[derive(Clone, Debug, clap::Args)]
pub struct HubArgs {
    /// Branch, tag or commit on the hub [default: main].
    #[arg(long)]
    pub revision: Option<String>,
    /// Make no request: use only what is in the cache (as HF_HUB_OFFLINE=1 does).
    #[arg(long)]
    pub offline: bool,
    /// Cache folder [default: HF_HUB_CACHE, else HF_HOME/hub, else ~/.cache/huggingface/hub].
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
}

impl HubArgs {
    /// The environment's options, and what the flags change.
    pub fn options(&self) -> HubOptions {
        let mut options = HubOptions::from_env();
        options.offline |= self.offline;
        if self.cache_dir.is_some() {
            options.cache_dir.clone_from(&self.cache_dir);
        }
        options.progress = Arc::new(TerminalProgress::new());
        options
    }
}

/// What computes.
#[derive(Clone, Debug, clap::Args)]
pub struct ComputeArgs {
    /// auto, cpu, cuda, cuda:N or metal; auto is a GPU that this build supports, else the CPU.
    #[arg(long, default_value = "auto")]
    pub device: DeviceSpec,
    /// Dtype of dense weights and activations on a GPU [default: bf16 on CUDA, f16 on Metal]; the
    /// CPU computes in f32 on weights as they are stored.
    #[arg(
        long,
        ignore_case = true,
        hide_possible_values = true,
        value_name = "f32|f16|bf16"
    )]
    pub dtype: Option<DTypeArg>,
    /// Type of keys and values on the CPU, f16, f32 or q8_0 [default: f16, but f32 where models are
    /// compared]; a GPU keeps them in --dtype.
    #[arg(long, value_name = "TYPE")]
    pub cache_type: Option<CacheType>,
    /// Store the weights in fewer bits while they are loaded, as `phi3 quantize` does: Q4_0, Q4_K_M, …
    #[arg(long, value_name = "TYPE")]
    pub quantize: Option<Mix>,
    /// The same for the image tower of a model that sees, which --quantize leaves as it is.
    #[arg(long, value_name = "TYPE")]
    pub quantize_vision: Option<Mix>,
    /// Keep the weights of a mixture of experts within so much memory (12GiB), caches included: experts
    /// by recent use, the others are read from disk when a router chooses them.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub memory_budget: Option<u64>,
    /// Run a checkpoint without LongRoPE factors beyond its trained length: power:TOKENS or
    /// piecewise:TOKENS.
    #[arg(long, value_name = "RULE:TOKENS")]
    pub extend_context: Option<ContextExtension>,
    /// Threads [default: PHI3_THREADS, else one per physical core].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
}

/// A number of bytes, with a unit or without: 12GiB, 500 MB, 1073741824.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let at = text.find(|c: char| !c.is_ascii_digit() && c != '.');
    let (number, unit) = text.split_at(at.unwrap_or(text.len()));
    let unit: f64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1_048_576.0,
        "g" | "gib" => 1_073_741_824.0,
        "t" | "tib" => 1_099_511_627_776.0,
        other => {
            return Err(format!(
                "{other:?} is no unit of bytes: give MB, GB, MiB or GiB"
            ));
        }
    };
    let number: f64 = number
        .parse()
        .map_err(|_| format!("{number:?} is no number"))?;
    // Beyond 2^64 there is no such memory, and the conversion takes the largest number.
    Ok((number * unit) as u64)
}

/// Pictures that a prompt shows.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct ImageArgs {
    /// Show this picture (PNG, JPEG, WebP, GIF or BMP) with the prompt; may be given several times.
    #[arg(long, value_name = "FILE")]
    pub image: Vec<PathBuf>,
    /// Of an --image that is a folder of pictures or an animated GIF or WebP show N frames, evenly
    /// spaced.
    #[arg(long, value_name = "N", requires = "image")]
    pub frames: Option<NonZeroUsize>,
    /// Most crops of a picture [default: the checkpoint's number].
    #[arg(long, value_name = "N")]
    pub num_crops: Option<usize>,
}

impl ImageArgs {
    /// Sets the number of crops, and says before anything is computed if there is nothing to see with.
    pub fn prepare(&self, model: &mut LanguageModel) -> Result<()> {
        if let Some(num_crops) = self.num_crops {
            model.set_num_crops(num_crops)?;
        }
        if !self.image.is_empty() {
            model.image_processor()?;
        }
        Ok(())
    }

    /// The pictures.
    pub fn images(&self) -> Result<Vec<Image>> {
        let mut images = Vec::new();
        for path in &self.image {
            let Some(wanted) = self.frames else {
                if path.is_dir() {
                    let name = path.display();
                    let message =
                        format!("--image: {name} is a folder; --frames N takes N of its pictures");
                    return Err(UsageError(message).into());
                }
                images.push(Image::path(path));
                continue;
            };
            let name = || path.display().to_string();
            if path.is_dir() {
                let files = folder_files(path, wanted.get()).with_context(name)?;
                images.extend(files.into_iter().map(Image::path));
            } else {
                let frames = animation_frames(path, wanted.get(), &Limits::default());
                images.extend(frames.with_context(name)?.into_iter().map(Image::from));
            }
        }
        Ok(images)
    }
}

/// A dtype by name.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum DTypeArg {
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl From<DTypeArg> for DType {
    fn from(dtype: DTypeArg) -> Self {
        match dtype {
            DTypeArg::F32 => DType::F32,
            DTypeArg::F16 => DType::F16,
            DTypeArg::Bf16 => DType::BF16,
        }
    }
}

/// Opens the files of the model that the flags name, downloading what is missing.
pub fn open(source: &SourceArgs) -> Result<Checkpoint> {
    open_by(phi3::hub::open, source)
}

/// [`open`] in one of the forms that leave weights out.
pub fn open_by(
    form: fn(&Source, &HubOptions) -> Result<Checkpoint, phi3::hub::Error>,
    source: &SourceArgs,
) -> Result<Checkpoint> {
    let open = || {
        let parsed = Source::parse(&source.model, source.hub.revision.as_deref())?;
        form(&parsed, &source.hub.options())
    };
    open().with_context(|| format!("opening {}", source.model))
}

/// Loads the model that the flags name, to use it: keys and values are f16 unless a flag says
/// otherwise.
pub fn load(source: &SourceArgs, compute: &ComputeArgs) -> Result<LanguageModel> {
    load_with(source, compute, CacheType::F16)
}

/// Loads the model that the flags name, to compare its numbers: keys and values are f32 unless a
/// flag says otherwise.
pub fn load_exactly(source: &SourceArgs, compute: &ComputeArgs) -> Result<LanguageModel> {
    load_with(source, compute, CacheType::F32)
}

fn load_with(
    source: &SourceArgs,
    compute: &ComputeArgs,
    cache_type: CacheType,
) -> Result<LanguageModel> {
    if let Some(threads) = compute.threads {
        phi3::set_num_threads(threads.into());
    }
    if compute.dtype.is_some_and(|dtype| dtype != DTypeArg::F32)
        && compute.device.open().is_ok_and(|device| device.is_cpu())
    {
        tracing::warn!("--dtype changes nothing on the CPU, which computes in f32");
    }
    let options = LoadOptions {
        device: compute.device,
        dtype: compute.dtype.map(DType::from),
        cache_type: compute.cache_type.unwrap_or(cache_type),
        revision: source.hub.revision.clone(),
        extend: compute.extend_context,
        quantize: compute.quantize,
        quantize_vision: compute.quantize_vision,
        memory_budget: compute.memory_budget,
        hub: Some(source.hub.options()),
    };
    let begun = Instant::now();
    let model = phi3::load_with(&source.model, &options)
        .with_context(|| format!("loading {}", source.model))?;
    tracing::info!(
        "{} loaded in {:.2} s; the CPU has {} threads and {} kernels",
        model.origin(),
        begun.elapsed().as_secs_f64(),
        phi3::num_threads(),
        phi3::backend_name()
    );
    Ok(model)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [
            ("0", 0),
            ("1073741824", 1 << 30),
            ("12GiB", 12 << 30),
            ("12 gib", 12 << 30),
            ("1.5GB", 1_500_000_000),
            ("500m", 500 << 20),
            ("7b", 7),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "GiB", "-1", "1 potato", "1..5GB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
