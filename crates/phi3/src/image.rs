//! Pictures for a model that sees: where they come from, and what becomes of them.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

pub use phi_3_5_vision::processor::{
    CROP, Layout, ProcessedImage, Processor, RgbImage, tags as image_tags,
};
pub use phi3_image::{
    Limits, animation_frames, encode_png, evenly_spaced, folder_files, folder_frames,
};

use phi3_text::ImageSource;

use crate::error::{Error, Result};

/// Gets the bytes behind a URL. The library itself never goes to the network for a picture.
pub type Fetch = dyn Fn(&str) -> std::result::Result<Vec<u8>, Box<dyn std::error::Error + Send + Sync>>
    + Send
    + Sync;

/// Where a picture comes from.
///
/// ```
/// use phi3::image::{Image, Limits};
/// let picture = Image::pixels(2, 1, vec![255, 0, 0, 0, 0, 255])?;
/// assert_eq!(picture.open(&Limits::default())?.width(), 2);
/// assert!(Image::path("no/such/file.png").open(&Limits::default()).is_err());
/// # Ok::<(), phi3::Error>(())
/// ```
#[derive(Clone)]
pub struct Image(Source);

#[derive(Clone)]
enum Source {
    Path(PathBuf),
    Bytes(Arc<[u8]>),
    Pixels(RgbImage),
    Url(String, Arc<Fetch>),
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Source::Path(path) => write!(f, "Image({})", path.display()),
            Source::Bytes(bytes) => write!(f, "Image({} bytes)", bytes.len()),
            Source::Pixels(pixels) => write!(f, "Image({pixels:?})"),
            Source::Url(url, _) => write!(f, "Image({url})"),
        }
    }
}

impl Image {
    /// A file: PNG, JPEG, WebP, GIF or BMP.
    pub fn path(path: impl Into<PathBuf>) -> Self {
        Self(Source::Path(path.into()))
    }

    /// The content of such a file.
    pub fn bytes(bytes: Vec<u8>) -> Self {
        Self(Source::Bytes(bytes.into()))
    }

    /// RGB pixels, row by row.
    ///
    /// # Errors
    /// [`Error::Pixels`] if the bytes are not `3 * width * height`, or there are none.
    pub fn pixels(width: usize, height: usize, rgb: Vec<u8>) -> Result<Self> {
        Ok(Self(Source::Pixels(RgbImage::new(width, height, rgb)?)))
    }

    /// What `fetch` gives for a URL.
    pub fn url(url: impl Into<String>, fetch: Arc<Fetch>) -> Self {
        Self(Source::Url(url.into(), fetch))
    }

    /// The picture of a message's part. One behind a URL needs `fetch`.
    ///
    /// # Errors
    /// [`Error::NoFetcher`] if it is behind a URL and there is none.
    pub fn from_source(source: &ImageSource, fetch: Option<&Arc<Fetch>>) -> Result<Self> {
        match (source, fetch) {
            (ImageSource::Path(path), _) => Ok(Self::path(path)),
            (ImageSource::Bytes(bytes), _) => Ok(Self(Source::Bytes(Arc::clone(bytes)))),
            (ImageSource::Url(url), Some(fetch)) => Ok(Self::url(url, Arc::clone(fetch))),
            (ImageSource::Url(url), None) => Err(Error::NoFetcher { url: url.clone() }),
        }
    }

    /// The picture as a part of a message; pixels become a PNG file, which keeps them all.
    ///
    /// # Errors
    /// [`Error::Picture`] if that cannot be made.
    pub fn source(&self) -> Result<ImageSource> {
        Ok(match &self.0 {
            Source::Path(path) => ImageSource::Path(path.clone()),
            Source::Bytes(bytes) => ImageSource::Bytes(Arc::clone(bytes)),
            Source::Pixels(image) => {
                let png = encode_png(image.width(), image.height(), image.pixels())?;
                ImageSource::Bytes(png.into())
            }
            Source::Url(url, _) => ImageSource::Url(url.clone()),
        })
    }

    /// Its pixels.
    ///
    /// # Errors
    /// [`Error::Image`] if it cannot be read or decoded, [`Error::Fetch`] if it cannot be fetched.
    pub fn open(&self, limits: &Limits) -> Result<RgbImage> {
        let rgb = match &self.0 {
            Source::Pixels(pixels) => return Ok(pixels.clone()),
            Source::Path(path) => phi3_image::read(path, limits),
            Source::Bytes(bytes) => phi3_image::decode(bytes, limits),
            Source::Url(url, fetch) => {
                let bytes = fetch(url).map_err(|source| Error::Fetch {
                    url: url.clone(),
                    source,
                })?;
                phi3_image::decode(&bytes, limits)
            }
        };
        let rgb = rgb.map_err(|source| Error::Image {
            name: self.name(),
            source,
        })?;
        Ok(RgbImage::new(rgb.width, rgb.height, rgb.pixels)?)
    }

    /// Whether its bytes come through somebody else's function, which is better called once.
    pub(crate) fn is_fetched(&self) -> bool {
        matches!(self.0, Source::Url(..))
    }

    /// How messages call it.
    pub(crate) fn name(&self) -> String {
        match &self.0 {
            Source::Path(path) => path.display().to_string(),
            Source::Bytes(_) | Source::Pixels(_) => "the image".to_owned(),
            Source::Url(url, _) => url.clone(),
        }
    }
}

impl From<phi3_image::Rgb> for Image {
    /// A decoded picture, such as a frame of a video.
    fn from(rgb: phi3_image::Rgb) -> Self {
        match RgbImage::new(rgb.width, rgb.height, rgb.pixels) {
            Ok(pixels) => Self(Source::Pixels(pixels)),
            // Its fields were changed by hand; opening it says what is wrong.
            Err(_) => Self(Source::Bytes(Arc::new([]))),
        }
    }
}
