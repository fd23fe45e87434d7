//! Image files become RGB pixels, as Pillow's `Image.open(…).convert("RGB")` makes them.
//!
//! - PNG, JPEG, WebP (the first frame), GIF (the first frame) and BMP, told apart by their content.
//! - Alpha is dropped, not blended; gray is replicated; palettes are looked up, whatever they say
//!   about transparency. Of 16 bits the high byte counts, but a gray image of 16 bits is clipped at
//!   255: so does Pillow.
//! - EXIF orientation is not applied.
//! - A picture of more than [`Limits::max_pixels`] pixels, or a file of more than
//!   [`Limits::max_bytes`] bytes, is an error before anything of its size is allocated. Decoding
//!   takes at most 9 bytes for each pixel besides the file itself, 16 for an animation, and what a color
//!   profile in it takes, which is within the same limit.
//! - A file that ends early is an error.
//!
//! PNG, BMP, GIF and lossless WebP agree with Pillow in every byte. JPEG does with the feature
//! `libjpeg`, which builds libjpeg-turbo's C code and rests on the work of the Independent JPEG Group;
//! without it samples differ, by 0.4 of 255 in the
//! mean and by 9 at most in the tests, which state it for each picture. Lossy WebP agrees in the
//! tests.
#![forbid(unsafe_code)]

mod decode;
mod frames;
mod gif;
#[cfg(feature = "libjpeg")]
mod libjpeg;

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};

pub use decode::{decode, encode_png};
pub use frames::{animation_frames, evenly_spaced, folder_files, folder_frames};

/// What a picture may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most pixels of a picture.
    pub max_pixels: u64,
    /// Most bytes of a file.
    pub max_bytes: u64,
}

impl Default for Limits {
    /// 89478485 pixels, where Pillow begins to warn of decompression bombs, in 256 MiB of file.
    fn default() -> Self {
        Self {
            max_pixels: 89_478_485,
            max_bytes: 256 << 20,
        }
    }
}

/// Why a file gives no picture.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file cannot be read.
    #[error("reading {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// More bytes than allowed.
    #[error("the file has more than the {limit} bytes that are allowed for a picture")]
    TooLong {
        /// [`Limits::max_bytes`].
        limit: u64,
    },
    /// More pixels than allowed.
    #[error("the picture is {width}x{height} pixels; at most {limit} pixels are allowed")]
    TooLarge {
        /// Its width.
        width: u32,
        /// Its height.
        height: u32,
        /// [`Limits::max_pixels`].
        limit: u64,
    },
    /// Not one of the formats.
    #[error("not a PNG, JPEG, WebP, GIF or BMP file")]
    Format,
    /// A picture without pixels.
    #[error("the picture is {width}x{height} pixels: there is nothing in it")]
    Empty {
        /// Its width.
        width: u32,
        /// Its height.
        height: u32,
    },
    /// The file ends before the picture does.
    #[error("the {format} file ends before its picture does")]
    Truncated {
        /// The format.
        format: &'static str,
    },
    /// Its content is malformed, or a variant that is not supported.
    #[error("the {format} file cannot be decoded: {message}")]
    Decode {
        /// The format.
        format: &'static str,
        /// What is wrong.
        message: String,
    },
    /// There are no pictures in a folder or animation.
    #[error("{} has no picture", path.display())]
    NoPictures {
        /// The folder or file.
        path: PathBuf,
    },
    /// The pixels do not fit their size.
    #[error("{bytes} bytes are not {width}x{height} RGB pixels")]
    Size {
        /// Claimed width.
        width: usize,
        /// Claimed height.
        height: usize,
        /// Bytes given.
        bytes: usize,
    },
}

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Pixels, row by row, three bytes each.
#[derive(Clone, PartialEq, Eq)]
pub struct Rgb {
    /// Width in pixels, positive.
    pub width: usize,
    /// Height in pixels, positive.
    pub height: usize,
    /// `3 * width * height` bytes.
    pub pixels: Vec<u8>,
}

impl fmt::Debug for Rgb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Rgb({}x{})", self.width, self.height)
    }
}

/// Reads and decodes a file.
///
/// # Errors
/// [`Error::Io`] naming the file, and those of [`decode`].
pub fn read(path: &Path, limits: &Limits) -> Result<Rgb> {
    decode(&read_bytes(path, limits)?, limits)
}

/// The content of a file of bounded size.
pub(crate) fn read_bytes(path: &Path, limits: &Limits) -> Result<Vec<u8>> {
    let io = |source| Error::Io {
        path: path.to_owned(),
        source,
    };
    let file = std::fs::File::open(path).map_err(io)?;
    let mut bytes = Vec::new();
    let most = limits.max_bytes.saturating_add(1);
    file.take(most).read_to_end(&mut bytes).map_err(io)?;
    Ok(bytes)
}
