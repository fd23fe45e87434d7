//! Answers one prompt about pictures with a `phi3_v` checkpoint, straight on the crates below the
//! facade:
//!
//! ```sh
//! cargo run --release -p phi-3-5-vision --example generate-phi-3-5-vision -- \
//!     --model microsoft/Phi-3.5-vision-instruct --image cat.jpg --prompt "What is in the picture?"
//! ```

#[path = "../../example.rs"]
mod example;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Parser;
use phi_3_5_vision::processor::{ProcessedImage, Processor, RgbImage, prompt_ids};
use phi_3_5_vision::{Config, Model};
use phi3_text::Request;

#[derive(Parser)]
struct Args {
    #[command(flatten)]
    shared: example::Args,
    /// A picture; may be given several times. A prompt without tags has theirs, `<|image_1|>`, …, put
    /// before it.
    #[arg(long)]
    image: Vec<PathBuf>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let (checkpoint, weights) = args.shared.open()?;
    let model = Model::new(&Config::from_json(&checkpoint.config)?, weights)?;
    let tokenizer = example::tokenizer(&checkpoint)?;
    let tags: String = (1..=args.image.len())
        .map(|number| format!("<|image_{number}|>\n"))
        .collect();
    let prompt = match &args.shared.prompt {
        prompt if prompt.contains("<|image_1|>") => prompt.clone(),
        prompt => tags + prompt,
    };
    let rendered = example::render(&checkpoint, &tokenizer, &prompt)?;

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
    args.shared.answer(&model, &checkpoint, &tokenizer, request)
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
