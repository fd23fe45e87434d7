//! An image becomes crops, as the reference's `Phi3VImageProcessor` makes them, in every byte.
//!
//! The processor takes RGB pixels. What turns a file into pixels is not a model's business: it
//! lives in the crate `phi3-image`.

mod global;
mod hd;
mod prompt;
mod resize;

use std::fmt;

use global::Bicubic;
use serde::Deserialize;

pub use hd::{CROP, Layout};
pub use prompt::{ImageTag, PromptPart, prompt_ids, split_prompt, tags};

/// More crops than any image needs: the reference's checkpoints say 4 and 16. The bound keeps the
/// crops of one image below 90 MB of floats.
pub const MOST_CROPS: usize = 64;

/// Values of one crop.
const CROP_VALUES: usize = 3 * CROP * CROP;

/// Why an image or a prompt cannot be processed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An image without pixels.
    #[error("the image is {width}x{height} pixels: there is nothing in it")]
    Empty {
        /// Its width.
        width: usize,
        /// Its height.
        height: usize,
    },
    /// The number of pixels is not that of the size.
    #[error("an RGB image of {width}x{height} pixels does not have {bytes} bytes")]
    Size {
        /// Claimed width.
        width: usize,
        /// Claimed height.
        height: usize,
        /// Bytes given.
        bytes: usize,
    },
    /// Nothing would remain of the short side.
    #[error(
        "the image is {width}x{height} pixels: so narrow that nothing of its short side would remain; cut it, or allow more crops (num_crops)"
    )]
    TooNarrow {
        /// Its width.
        width: usize,
        /// Its height.
        height: usize,
    },
    /// A number of crops that no image can have.
    #[error("num_crops is {0}; it must be 1 to {MOST_CROPS}")]
    NumCrops(usize),
    /// preprocessor_config.json is malformed.
    #[error("preprocessor_config.json: {0}")]
    Config(String),
    /// The tags of a prompt and its images do not belong together.
    #[error("{0}")]
    Tags(String),
}

/// Result with this module's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Pixels, row by row, three bytes each.
#[derive(Clone, PartialEq, Eq)]
pub struct RgbImage {
    width: usize,
    height: usize,
    pixels: Vec<u8>,
}

impl fmt::Debug for RgbImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RgbImage({}x{})", self.width, self.height)
    }
}

impl RgbImage {
    /// An image of `width` x `height` pixels.
    ///
    /// # Errors
    /// [`Error::Empty`], or [`Error::Size`] if the bytes are not `3 * width * height`.
    pub fn new(width: usize, height: usize, pixels: Vec<u8>) -> Result<Self> {
        if width == 0 || height == 0 {
            return Err(Error::Empty { width, height });
        }
        let expected = width.checked_mul(height).and_then(|n| n.checked_mul(3));
        if expected != Some(pixels.len()) {
            return Err(Error::Size {
                width,
                height,
                bytes: pixels.len(),
            });
        }
        Ok(Self {
            width,
            height,
            pixels,
        })
    }

    /// Width in pixels.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Height in pixels.
    pub fn height(&self) -> usize {
        self.height
    }

    /// Red, green and blue of every pixel.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }
}

/// preprocessor_config.json, with the defaults of the reference's class where it says nothing.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct Processor {
    /// Most crops of one image, the global view not counted.
    pub num_crops: usize,
    /// Mean of each channel, of values from 0 to 1.
    pub image_mean: [f32; 3],
    /// Standard deviation of each channel.
    pub image_std: [f32; 3],
}

impl Default for Processor {
    fn default() -> Self {
        Self {
            num_crops: 1,
            image_mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
            image_std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
        }
    }
}

impl Processor {
    /// Reads and checks preprocessor_config.json.
    ///
    /// # Errors
    /// [`Error::Config`] naming the field.
    pub fn from_json(config: &serde_json::Value) -> Result<Self> {
        if !config.is_object() {
            return Err(Error::Config("it is not an object".to_owned()));
        }
        let processor =
            Self::deserialize(config).map_err(|error| Error::Config(error.to_string()))?;
        let num_crops = processor.num_crops;
        let processor = processor
            .with_num_crops(num_crops)
            .map_err(|error| Error::Config(error.to_string()))?;
        let means = processor.image_mean.iter().all(|mean| mean.is_finite());
        let deviations = processor.image_std.iter();
        if !means || !deviations.copied().all(|it| it.is_finite() && it > 0.0) {
            return Err(Error::Config(
                "image_mean and image_std must be finite, and image_std positive".to_owned(),
            ));
        }
        Ok(processor)
    }

    /// The same with another number of crops.
    ///
    /// # Errors
    /// [`Error::NumCrops`] for 0 or more than [`MOST_CROPS`].
    pub fn with_num_crops(mut self, num_crops: usize) -> Result<Self> {
        if num_crops == 0 || num_crops > MOST_CROPS {
            return Err(Error::NumCrops(num_crops));
        }
        self.num_crops = num_crops;
        Ok(self)
    }

    /// What becomes of an image of this size.
    ///
    /// # Errors
    /// Those of [`Layout::new`].
    pub fn layout(&self, width: usize, height: usize) -> Result<Layout> {
        Layout::new(width, height, self.num_crops)
    }

    /// The image resized and padded to whole crops, as 8-bit pixels.
    ///
    /// # Errors
    /// Those of [`Layout::new`].
    pub fn hd_image(&self, image: &RgbImage) -> Result<RgbImage> {
        let layout = self.layout(image.width, image.height)?;
        Ok(hd::transform(image, &layout))
    }

    /// The crops of an image, normalized.
    ///
    /// # Errors
    /// Those of [`Layout::new`].
    pub fn process(&self, image: &RgbImage) -> Result<ProcessedImage> {
        let layout = self.layout(image.width, image.height)?;
        let hd = hd::transform(image, &layout);
        let tables = self.tables();
        let mut pixel_values = Vec::with_capacity((layout.crops() + 1) * CROP_VALUES);
        let global = Bicubic::new(hd.width, hd.height, CROP);
        for (channel, table) in tables.iter().enumerate() {
            global.view(&hd.pixels, channel, table, &mut pixel_values);
        }
        for crop in 0..layout.crops() {
            let left = crop % layout.crop_columns * CROP;
            let top = crop / layout.crop_columns * CROP;
            for (channel, table) in tables.iter().enumerate() {
                for line in hd.pixels.chunks_exact(hd.width * 3).skip(top).take(CROP) {
                    let line = line.get(left * 3 + channel..(left + CROP) * 3);
                    let samples = line.unwrap_or_default().iter().step_by(3);
                    let value = |sample: &u8| table.get(usize::from(*sample)).copied();
                    pixel_values.extend(samples.map(|sample| value(sample).unwrap_or_default()));
                }
            }
        }
        Ok(ProcessedImage {
            layout,
            pixel_values,
        })
    }

    /// For each channel what a byte becomes.
    fn tables(&self) -> [[f32; 256]; 3] {
        let mut moments = self.image_mean.into_iter().zip(self.image_std);
        std::array::from_fn(|_| {
            let (mean, std) = moments.next().unwrap_or((0.0, 1.0));
            std::array::from_fn(|value| (value as f32 / 255.0 - mean) / std)
        })
    }
}

/// An image ready for the tower.
#[derive(Clone, Debug)]
pub struct ProcessedImage {
    /// Its crops and tokens.
    pub layout: Layout,
    /// `[crops + 1, 3, 336, 336]`: the global view, then the crops row by row. The zero crops with
    /// which the reference fills a batch are left out; [`ProcessedImage::filled`] has them.
    pub pixel_values: Vec<f32>,
}

impl ProcessedImage {
    /// The reference's `pixel_values` of the image, `[num_crops + 1, 3, 336, 336]`: zeros follow the
    /// crops that there are. `num_crops` is that of the processor.
    pub fn filled(&self, num_crops: usize) -> Vec<f32> {
        let mut values = self.pixel_values.clone();
        values.resize(values.len().max((num_crops + 1) * CROP_VALUES), 0.0);
        values
    }
}
