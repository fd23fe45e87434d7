//! Speed of the image tower, and from images to the first token, on the CPU:
//!
//! ```text
//! vision-speed --model DIR --decoder q4_0.gguf --crops crops.f32 --out features.f32
//! vision-speed --model DIR --decoder q4_0.gguf --images 4 --per-image 4
//! ```
//!
//! `DIR` holds config.json of a `phi3_v` model and safetensors of its image tower and projection. The
//! decoder comes from a GGUF file, which is made of random weights in phi-3-mini's shape if it is not
//! there. The first form sends crops, f32 of `[n, 3, 336, 336]`, through the tower and writes the
//! features. scripts/bench_vision.py runs both beside transformers.
#![expect(clippy::print_stdout, reason = "a program that prints figures")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use candle_core::Tensor;
use clap::Parser;
use phi_3_5_vision::processor::{Layout, ProcessedImage, Processor, RgbImage};
use phi_3_5_vision::{Config, Model};
use phi3_hub::gguf::random::RandomModel;
use phi3_hub::{Checkpoint, HubOptions, Source, open};
use phi3_nn::{
    CacheType, CausalLm, DeviceSpec, Input, Observer, Span, StoredTensor, TensorSource, Weights,
    device::default_dtype,
};

#[derive(Parser)]
struct Args {
    /// Folder of config.json and the tower.
    #[arg(long)]
    model: String,
    #[arg(long, requires = "out")]
    crops: Option<PathBuf>,
    /// Where the features go, f32 of `[n, 576, C]`.
    #[arg(long)]
    out: Option<PathBuf>,
    #[arg(long, default_value_t = 3)]
    repeat: usize,
    /// The decoder, q4_0 in phi-3-mini's shape; made if it is not there.
    #[arg(long)]
    decoder: PathBuf,
    #[arg(long, default_value_t = 1)]
    images: usize,
    /// Crops of an image, the global view not counted: a square number.
    #[arg(long, default_value_t = 4)]
    per_image: usize,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let tower = open_source(&args.model)?;
    make_decoder(&args.decoder)?;
    let decoder = open_source(&args.decoder.display().to_string())?;
    let sources = Sources(vec![Arc::clone(&tower.weights), decoder.weights]);
    match (&args.crops, &args.out) {
        (Some(crops), Some(out)) => {
            let model = build(&tower, sources, Some(1))?;
            features(&model, crops, out, args.repeat)
        }
        _ => first_token(&args, &build(&tower, sources, None)?),
    }
}

fn open_source(model: &str) -> Result<Checkpoint> {
    let source = Source::parse(model, None)?;
    open(&source, &HubOptions::from_env()).with_context(|| format!("opening {model}"))
}

fn make_decoder(path: &Path) -> Result<()> {
    let random = RandomModel::new("phi-3-mini", "q4_0".parse()?, None, 1)?;
    if !random.is_at(path) {
        random.write(path, |_| ())?;
    }
    Ok(())
}

/// Tensors of the first source that has them.
struct Sources(Vec<Arc<dyn TensorSource>>);

impl TensorSource for Sources {
    fn tensor(
        &self,
        name: &str,
    ) -> std::result::Result<Option<StoredTensor>, Box<dyn std::error::Error + Send + Sync>> {
        for source in &self.0 {
            if let Some(tensor) = source.tensor(name)? {
                return Ok(Some(tensor));
            }
        }
        Ok(None)
    }

    fn names(&self) -> Vec<String> {
        self.0.iter().flat_map(|source| source.names()).collect()
    }

    fn origin(&self) -> String {
        self.0.first().map(|it| it.origin()).unwrap_or_default()
    }
}

fn build(tower: &Checkpoint, sources: Sources, decoder_layers: Option<usize>) -> Result<Model> {
    let device = DeviceSpec::Cpu.open()?;
    let dtype = default_dtype(&device);
    let mut config = tower.config.clone();
    if let Some(layers) = decoder_layers {
        config["num_hidden_layers"] = layers.into();
    }
    let weights = Weights::new(Arc::new(sources), device, dtype).with_cache_type(CacheType::F16);
    Ok(Model::new(&Config::from_json(&config)?, weights)?)
}

/// Notes when the features came, and keeps them.
struct Features {
    came: Option<Instant>,
    values: Option<Tensor>,
}

impl Observer for Features {
    fn wants(&self, name: &str) -> bool {
        name == "clip_hidden_m2"
    }

    fn observe(&mut self, _name: &str, value: &Tensor) -> phi3_nn::Result<()> {
        (self.came, self.values) = (Some(Instant::now()), Some(value.clone()));
        Ok(())
    }
}

fn features(model: &Model, crops: &Path, out: &Path, repeat: usize) -> Result<()> {
    let bytes = std::fs::read(crops).with_context(|| format!("reading {}", crops.display()))?;
    let floats = bytes.as_chunks::<4>().0.iter();
    let pixel_values: Vec<f32> = floats.map(|c| f32::from_le_bytes(*c)).collect();
    let n = pixel_values.len() / (3 * 336 * 336);
    ensure!(n >= 2, "an image has two crops or more");
    let layout = Layout::new((n - 1) * 336, 336, (n - 1).max(1))?;
    ensure!(
        layout.crops() == n - 1,
        "{n} crops are not one line and a global view"
    );
    let image = ProcessedImage {
        layout,
        pixel_values,
    };
    for _ in 0..repeat {
        let mut observer = Features {
            came: None,
            values: None,
        };
        let start = Instant::now();
        model.encode_images(&[&image], Some(&mut observer))?;
        let end = Instant::now();
        let came = observer.came.context("no features")?;
        println!(
            "{}",
            serde_json::json!({
                "crops": n,
                "tower_seconds": (came - start).as_secs_f64(),
                "merge_and_project_seconds": (end - came).as_secs_f64(),
                "peak_memory_bytes": peak_memory(),
            })
        );
        let values: Vec<f32> = observer
            .values
            .context("no features")?
            .flatten_all()?
            .to_vec1()?;
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        std::fs::write(out, bytes).with_context(|| format!("writing {}", out.display()))?;
    }
    Ok(())
}

fn first_token(args: &Args, model: &Model) -> Result<()> {
    let side = args.per_image.isqrt();
    ensure!(
        side * side == args.per_image,
        "--per-image is not a square number"
    );
    let processor = Processor::default().with_num_crops(args.per_image)?;
    let images = (0..args.images).map(|seed| {
        let size = side * 336;
        let pixel = |i: usize| (i.wrapping_mul(2_654_435_761).rotate_left(9) / (seed + 3)) as u8;
        RgbImage::new(size, size, (0..3 * size * size).map(pixel).collect())
    });
    let images = images.collect::<std::result::Result<Vec<_>, _>>()?;

    let start = Instant::now();
    let images = images.iter().map(|image| processor.process(image));
    let images = images.collect::<std::result::Result<Vec<_>, _>>()?;
    let processed = Instant::now();
    let features = model.encode_images(&images.iter().collect::<Vec<_>>(), None)?;
    let encoded = Instant::now();
    let mut ids = vec![1, 32010, 29871, 13];
    for (image, number) in features.iter().zip(1..) {
        ids.extend(std::iter::repeat_n(-number, image.tokens()));
    }
    ids.extend([1, 29871, 13, 5618, 338, 445, 29973, 32007, 29871, 13, 32001]);
    let rows = model.embed_prompt(&ids, &features)?;
    let mut cache = model.new_cache();
    let mut logits = None;
    for first in (0..ids.len()).step_by(512) {
        let chunk = rows.narrow(0, first, 512.min(ids.len() - first))?;
        let span = Span::new(chunk.dim(0)?, &mut cache).reaching(ids.len());
        logits = Some(model.forward(Input::Embeddings(&chunk), &mut [span], None)?);
    }
    let logits: Vec<f32> = logits.context("no prompt")?.flatten_all()?.to_vec1()?;
    let end = Instant::now();
    ensure!(
        logits.iter().all(|logit| logit.is_finite()),
        "a logit is not finite"
    );
    let seconds = |from: Instant, to: Instant| Duration::as_secs_f64(&(to - from));
    println!(
        "{}",
        serde_json::json!({
            "images": args.images,
            "crops": images.iter().map(|it| it.layout.crops() + 1).sum::<usize>(),
            "prompt_tokens": ids.len(),
            "pixels_seconds": seconds(start, processed),
            "tower_and_projection_seconds": seconds(processed, encoded),
            "decoder_seconds": seconds(encoded, end),
            "first_token_seconds": seconds(start, end),
            "peak_memory_bytes": peak_memory(),
        })
    );
    Ok(())
}

/// The most memory that this process has held, mapped files included; 0 where the system does not say.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kilobytes.unwrap_or(0) * 1024
}
