//! The HD transform: how large an image becomes, and where its crops lie.

use super::{Error, Result, RgbImage, resize};

/// Side of a crop, in pixels.
pub const CROP: usize = 336;

/// Tokens of one crop: 24 x 24 patches, merged by two in each direction.
const CROP_TOKENS: usize = 144;

/// Tokens along a side of a crop.
const SIDE_TOKENS: usize = 12;

/// What becomes of an image of some size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Width after resizing, before padding; of the transposed image if that is set.
    pub resized_width: usize,
    /// Height after resizing, before padding.
    pub resized_height: usize,
    /// Whether the image is taller than wide, and therefore handled lying on its side.
    pub transposed: bool,
    /// Columns of crops of the finished image.
    pub crop_columns: usize,
    /// Rows of crops.
    pub crop_rows: usize,
}

impl Layout {
    /// The layout of an image of `width` x `height` in at most `num_crops` crops.
    ///
    /// # Errors
    /// [`Error::Empty`], [`Error::TooNarrow`] for a ratio so extreme that nothing of the short side
    /// remains (the reference fails too), [`Error::NumCrops`].
    pub fn new(width: usize, height: usize, num_crops: usize) -> Result<Self> {
        if width == 0 || height == 0 {
            return Err(Error::Empty { width, height });
        }
        if num_crops == 0 || num_crops > super::MOST_CROPS {
            return Err(Error::NumCrops(num_crops));
        }
        let transposed = width < height;
        let (long, short) = (width.max(height), width.min(height));
        let ratio = long as f64 / short as f64;
        let mut scale = 1usize;
        while scale as f64 * (scale as f64 / ratio).ceil() <= num_crops as f64 {
            scale += 1;
        }
        scale -= 1;
        let resized_width = scale * CROP;
        let resized_height = (resized_width as f64 / ratio) as usize;
        if resized_height == 0 {
            return Err(Error::TooNarrow { width, height });
        }
        let (along, across) = (scale, resized_height.div_ceil(CROP));
        Ok(Self {
            resized_width,
            resized_height,
            transposed,
            crop_columns: if transposed { across } else { along },
            crop_rows: if transposed { along } else { across },
        })
    }

    /// Width of the finished image.
    pub fn width(&self) -> usize {
        self.crop_columns * CROP
    }

    /// Height of the finished image.
    pub fn height(&self) -> usize {
        self.crop_rows * CROP
    }

    /// Crops of the image, without the global view.
    pub fn crops(&self) -> usize {
        self.crop_columns * self.crop_rows
    }

    /// Tokens that the image takes: its crops and the global view, a separator behind each row of
    /// tokens, and one between the two parts.
    pub fn tokens(&self) -> usize {
        (self.crops() + 1) * CROP_TOKENS + 1 + (self.crop_rows + 1) * SIDE_TOKENS
    }
}

/// The finished image: resized, and padded with white to whole crops.
pub(super) fn transform(image: &RgbImage, layout: &Layout) -> RgbImage {
    let turned = layout.transposed.then(|| transpose(image));
    let lying = turned.as_ref().unwrap_or(image);
    let resized = resize::bilinear(lying, layout.resized_width, layout.resized_height);
    let padded_height = layout.resized_height.div_ceil(CROP) * CROP;
    let padded = pad(resized, padded_height);
    if layout.transposed {
        transpose(&padded)
    } else {
        padded
    }
}

fn pad(image: RgbImage, height: usize) -> RgbImage {
    let stride = image.width * 3;
    let top = (height - image.height) / 2;
    let mut pixels = vec![255; stride * height];
    if let Some(middle) = pixels.get_mut(top * stride..(top + image.height) * stride) {
        middle.copy_from_slice(&image.pixels);
    }
    RgbImage {
        width: image.width,
        height,
        pixels,
    }
}

/// Rows become columns.
fn transpose(image: &RgbImage) -> RgbImage {
    let (rows, _) = image.pixels.as_chunks::<3>();
    let mut pixels = Vec::with_capacity(image.pixels.len());
    for x in 0..image.width {
        for row in rows.chunks_exact(image.width) {
            pixels.extend(row.get(x).copied().unwrap_or_default());
        }
    }
    RgbImage {
        width: image.height,
        height: image.width,
        pixels,
    }
}
