//! `phi3 image-info`: what a picture becomes before a model sees it.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use phi3::image::{CROP, Image, Layout, Limits, Processor, encode_png};

use crate::output;

/// Draw how a picture is cut into crops, and state the tokens it takes.
///
/// Padding is drawn as dots. Nothing is downloaded and no model is loaded.
#[derive(clap::Args)]
pub struct Args {
    /// PNG, JPEG, WebP, GIF or BMP.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Most crops of a picture; Phi-3.5-vision's own number is 4, Phi-3-vision's 16.
    #[arg(long, value_name = "N", default_value_t = 4)]
    num_crops: usize,
    /// Also write the padded picture, its crops and the global view as PNG files to this folder.
    #[arg(long, value_name = "DIR")]
    save: Option<PathBuf>,
}

pub fn run(args: &Args) -> Result<()> {
    let processor = processor(args.num_crops)?;
    if args.save.is_some() {
        let mut stems = HashSet::new();
        for file in &args.files {
            let stem = file.file_stem().unwrap_or_default();
            ensure!(
                stems.insert(stem),
                "--save: two files are called {}; the PNG files of one would replace the other's",
                stem.to_string_lossy()
            );
        }
    }
    // One file that is no picture shall not hide what the others are.
    let mut failed = 0;
    for file in &args.files {
        if let Err(error) = show(file, &processor, args.save.as_deref()) {
            if args.files.len() == 1 {
                return Err(error);
            }
            output::report(&error);
            failed += 1;
        }
    }
    ensure!(failed == 0, "{failed} of {} files failed", args.files.len());
    Ok(())
}

/// Prints what one file becomes, and saves it where that is wanted.
fn show(file: &Path, processor: &Processor, folder: Option<&Path>) -> Result<()> {
    let image = Image::path(file).open(&Limits::default())?;
    let layout = processor
        .layout(image.width(), image.height())
        .with_context(|| file.display().to_string())?;
    let mut text = describe(file, image.width(), image.height(), &layout);
    text.push_str(&grid(&layout));
    output::print(&text)?;
    if let Some(folder) = folder {
        save(folder, file, &image, processor, &layout)?;
    }
    Ok(())
}

fn processor(num_crops: usize) -> Result<Processor> {
    Processor::default()
        .with_num_crops(num_crops)
        .context("--num-crops")
}

fn describe(file: &Path, width: usize, height: usize, layout: &Layout) -> String {
    let (mut w, mut h) = (layout.resized_width, layout.resized_height);
    if layout.transposed {
        (w, h) = (h, w);
    }
    let plural = if layout.crops() == 1 { "crop" } else { "crops" };
    format!(
        "{}: {width}x{height}, resized to {w}x{h}, padded to {}x{}\n{} {plural} of {CROP}x{CROP} and \
         the global view: {} tokens\n",
        file.display(),
        layout.width(),
        layout.height(),
        layout.crops(),
        layout.tokens()
    )
}

/// The crops with their numbers, padding as dots.
fn grid(layout: &Layout) -> String {
    let cell = (96 / layout.crop_columns).clamp(3, 9) - 1;
    let lines = cell.div_ceil(2);
    // The long side is filled; padding lies evenly before and after on the other.
    let padded = if layout.transposed {
        layout.width()
    } else {
        layout.height()
    };
    let before = (padded - layout.resized_height) / 2;
    let filled = before..before + layout.resized_height;
    let mut text = String::new();
    let border = format!(
        "{}+\n",
        format!("+{}", "-".repeat(cell)).repeat(layout.crop_columns)
    );
    for row in 0..layout.crop_rows {
        text.push_str(&border);
        for line in 0..lines {
            for column in 0..layout.crop_columns {
                text.push('|');
                let number = format!("{}", row * layout.crop_columns + column + 1);
                for place in 0..cell {
                    // The pixel at the middle of this character.
                    let x = column * CROP + (2 * place + 1) * CROP / (2 * cell);
                    let y = row * CROP + (2 * line + 1) * CROP / (2 * lines);
                    let across = if layout.transposed { x } else { y };
                    let digit = place.checked_sub(1).and_then(|i| number.chars().nth(i));
                    let digit = digit.filter(|_| line == lines / 2);
                    let empty = if filled.contains(&across) { ' ' } else { '.' };
                    text.push(digit.unwrap_or(empty));
                }
            }
            text.push_str("|\n");
        }
    }
    text.push_str(&border);
    text
}

fn save(
    folder: &Path,
    file: &Path,
    image: &phi3::image::RgbImage,
    processor: &Processor,
    layout: &Layout,
) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    let write = |what: &str, width: usize, height: usize, pixels: &[u8]| -> Result<()> {
        let path = folder.join(format!("{stem}-{what}.png"));
        let png = encode_png(width, height, pixels)?;
        std::fs::write(&path, png).with_context(|| format!("writing {}", path.display()))?;
        output::note(&format!("wrote {}", path.display()));
        Ok(())
    };
    let padded = processor.hd_image(image)?;
    write("padded", padded.width(), padded.height(), padded.pixels())?;
    let values = processor.process(image)?.pixel_values;
    for (index, crop) in values.chunks_exact(3 * CROP * CROP).enumerate() {
        let name = match index {
            0 => "global".to_owned(),
            _ => format!("crop{index:02}"),
        };
        write(&name, CROP, CROP, &bytes_of(crop, processor)?)?;
    }
    ensure!(values.len() == (layout.crops() + 1) * 3 * CROP * CROP);
    Ok(())
}

/// Normalized planes as RGB bytes; what bicubic interpolation drove beyond white or black is cut.
fn bytes_of(planes: &[f32], processor: &Processor) -> Result<Vec<u8>> {
    let mut bytes = vec![0; planes.len()];
    for (channel, plane) in planes.chunks_exact(CROP * CROP).enumerate() {
        let mean = processor.image_mean.get(channel).context("three means")?;
        let std = processor
            .image_std
            .get(channel)
            .context("three deviations")?;
        let samples = bytes.iter_mut().skip(channel).step_by(3);
        for (byte, value) in samples.zip(plane) {
            *byte = ((value * std + mean) * 255.0).round().clamp(0.0, 255.0) as u8;
        }
    }
    Ok(bytes)
}
