//! Answers one prompt about pictures with a `phi3_v` checkpoint, straight on the crates below the
//! facade:
//!
//! ```sh
//! cargo run --release -p phi-3-5-vision --example generate-phi-3-5-vision -- \
//!     --model microsoft/Phi-3.5-vision-instruct --image cat.jpg --prompt "What is in the picture?"
//! ```

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Parser;
use phi_3_5_vision::processor::{ProcessedImage, Processor, RgbImage, prompt_ids};
use phi_3_5_vision::{Config, Model};
use phi3_hub::{HubOptions, Source, open};
use phi3_nn::{DeviceSpec, Weights, device::default_dtype};
use phi3_text::{ChatTemplate, Generator, Message, Request, SamplingParams, Tokenizer, stop_ids};

#[derive(Parser)]
struct Args {
    /// A repo id on the hub, a folder, or a .gguf file.
    #[arg(long)]
    model: String,
    #[arg(long)]
    revision: Option<String>,
    /// auto, cpu, cuda, cuda:N or metal.
    #[arg(long, default_value = "auto")]
    device: DeviceSpec,
    #[arg(long)]
    prompt: String,
    /// A picture; may be given several times. A prompt without tags has theirs, `<|image_1|>`, …, put
    /// before it.
    #[arg(long)]
    image: Vec<PathBuf>,
    #[arg(long, default_value_t = 256)]
    max_new_tokens: usize,
    /// 0 is greedy.
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    #[arg(long)]
    top_p: Option<f32>,
    #[arg(long)]
    seed: Option<u64>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let source = Source::parse(&args.model, args.revision.as_deref())?;
    let checkpoint = open(&source, &HubOptions::from_env()).context("opening the checkpoint")?;
    let device = args.device.open()?;
    let dtype = default_dtype(&device);
    let weights = Weights::new(checkpoint.weights.clone(), device, dtype);
    let model = Model::new(&Config::from_json(&checkpoint.config)?, weights)?;

    let files = &checkpoint.tokenizer;
    let json = files
        .tokenizer_json
        .as_deref()
        .context("the checkpoint has no tokenizer.json")?;
    let tokenizer = Tokenizer::from_json(json, files.tokenizer_config.as_ref())?;
    let template = checkpoint
        .chat_template
        .as_ref()
        .context("the checkpoint has no template")?;
    let tokens = tokenizer.special_tokens().clone();
    let tags: String = (1..=args.image.len())
        .map(|number| format!("<|image_{number}|>\n"))
        .collect();
    let prompt = match args.prompt.contains("<|image_1|>") {
        true => args.prompt,
        false => tags + &args.prompt,
    };
    let rendered =
        ChatTemplate::parse(&template.text, tokens)?.render(&[Message::user(prompt)], true)?;

    let processor = match &checkpoint.preprocessor_config {
        Some(config) => Processor::from_json(config)?,
        None => Processor::default().with_num_crops(4)?,
    };
    let images = args.image.iter().map(|path| open_image(path, &processor));
    let images = images.collect::<Result<Vec<_>>>()?;
    let features = model.encode_images(&images.iter().collect::<Vec<_>>(), None)?;
    let counts: Vec<usize> = features.iter().map(|image| image.tokens()).collect();
    // An id of an image's token is minus the number of its tag.
    let ids = prompt_ids(&rendered, &counts, |text| -> Result<Vec<u32>> {
        Ok(tokenizer.encode(text, true)?)
    })?;
    let rows = model.embed_prompt(&ids, &features)?;

    // Ids only tell rows of a cache apart, where embeddings are given.
    let place = |id: &i64| u32::try_from(*id).unwrap_or(u32::MAX);
    let mut request = Request::new(ids.iter().map(place).collect());
    request.embeddings = Some(rows);
    request.max_new_tokens = args.max_new_tokens;
    request.params = SamplingParams {
        temperature: args.temperature,
        top_p: args.top_p,
        seed: args.seed,
        ..SamplingParams::default()
    };
    request.stop_ids = stop_ids(
        checkpoint.generation_config.as_ref(),
        Some(&checkpoint.config),
        Some(&template.text),
        &tokenizer,
    )?;
    let mut generator = Generator::new(&model, &tokenizer);
    generator.add(request)?;
    let mut stdout = std::io::stdout().lock();
    for event in generator {
        stdout.write_all(event?.text().as_bytes())?;
        stdout.flush()?;
    }
    Ok(writeln!(stdout)?)
}

/// The crate phi3-image does this as the reference's Pillow does; of pictures with 8 bits a sample its
/// pixels are these.
fn open_image(path: &Path, processor: &Processor) -> Result<ProcessedImage> {
    let open = || -> Result<ProcessedImage> {
        let reader = image::ImageReader::open(path)?.with_guessed_format()?;
        let rgb = reader.decode()?.into_rgb8();
        let (width, height) = (rgb.width() as usize, rgb.height() as usize);
        Ok(processor.process(&RgbImage::new(width, height, rgb.into_raw())?)?)
    };
    open().with_context(|| format!("opening {}", path.display()))
}
