//! From the bytes of a file to pixels.

use std::io::Cursor;

use image::error::{ImageError, LimitErrorKind};
use image::{DynamicImage, ImageDecoder, ImageEncoder, ImageFormat, ImageReader};

use crate::{Error, Limits, Result, Rgb, gif};

/// Decodes the content of a file.
///
/// # Errors
/// [`Error::Format`], [`Error::TooLong`], [`Error::TooLarge`], [`Error::Empty`],
/// [`Error::Truncated`] or [`Error::Decode`].
pub fn decode(bytes: &[u8], limits: &Limits) -> Result<Rgb> {
    check_length(bytes, limits)?;
    let format = image::guess_format(bytes).map_err(|_| Error::Format)?;
    let name = name(format).ok_or(Error::Format)?;
    if format == ImageFormat::Jpeg && !has_end_of_jpeg(bytes) {
        return Err(Error::Truncated { format: name });
    }
    if format == ImageFormat::WebP && !has_all_of_webp(bytes) {
        return Err(Error::Truncated { format: name });
    }
    if format == ImageFormat::Gif
        && let Some(picture) = gif::decode_partial(bytes, limits)?
    {
        return Ok(picture);
    }
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    reader.limits(image_limits(limits));
    let decoder = reader.into_decoder().map_err(|it| error(name, &it))?;
    let (width, height) = decoder.dimensions();
    if format == ImageFormat::WebP && (width == 0 || height == 0) {
        // A side of a WebP file is never 0; of its 14 bits the decoder takes the largest number for that.
        return Err(Error::Decode {
            format: name,
            message: "a side has 16384 pixels, one more than is supported".to_owned(),
        });
    }
    check_size(width, height, limits)?;
    #[cfg(feature = "libjpeg")]
    if format == ImageFormat::Jpeg {
        return crate::libjpeg::decode(bytes, limits);
    }
    let image = DynamicImage::from_decoder(decoder).map_err(|it| error(name, &it))?;
    let (width, height) = (image.width() as usize, image.height() as usize);
    let pixels = rgb_bytes(image).ok_or(Error::Decode {
        format: name,
        message: "its samples are neither bytes nor 16-bit integers".to_owned(),
    })?;
    Ok(Rgb {
        width,
        height,
        pixels,
    })
}

/// The picture as a PNG file.
///
/// # Errors
/// [`Error::Size`] if the pixels are not those of the size, or there are none.
pub fn encode_png(width: usize, height: usize, pixels: &[u8]) -> Result<Vec<u8>> {
    let wrong = || Error::Size {
        width,
        height,
        bytes: pixels.len(),
    };
    let expected = width.checked_mul(height).and_then(|n| n.checked_mul(3));
    let sides = (u32::try_from(width).ok(), u32::try_from(height).ok());
    let (Some(w), Some(h)) = sides else {
        return Err(wrong());
    };
    if expected != Some(pixels.len()) || pixels.is_empty() {
        return Err(wrong());
    }
    let mut file = Vec::new();
    image::codecs::png::PngEncoder::new(&mut file)
        .write_image(pixels, w, h, image::ExtendedColorType::Rgb8)
        .map_err(|it| error("PNG", &it))?;
    Ok(file)
}

pub(crate) fn check_length(bytes: &[u8], limits: &Limits) -> Result<()> {
    if bytes.len() as u64 > limits.max_bytes {
        return Err(Error::TooLong {
            limit: limits.max_bytes,
        });
    }
    Ok(())
}

pub(crate) fn check_size(width: u32, height: u32, limits: &Limits) -> Result<()> {
    if width == 0 || height == 0 {
        return Err(Error::Empty { width, height });
    }
    if u64::from(width) * u64::from(height) > limits.max_pixels {
        return Err(Error::TooLarge {
            width,
            height,
            limit: limits.max_pixels,
        });
    }
    Ok(())
}

/// What the decoders may allocate: an image of the widest samples, and some room for their tables.
pub(crate) fn image_limits(limits: &Limits) -> image::Limits {
    let mut own = image::Limits::no_limits();
    own.max_alloc = Some(limits.max_pixels.saturating_mul(8).saturating_add(16 << 20));
    own
}

fn name(format: ImageFormat) -> Option<&'static str> {
    match format {
        ImageFormat::Png => Some("PNG"),
        ImageFormat::Jpeg => Some("JPEG"),
        ImageFormat::WebP => Some("WebP"),
        ImageFormat::Gif => Some("GIF"),
        ImageFormat::Bmp => Some("BMP"),
        _ => None,
    }
}

pub(crate) fn error(format: &'static str, error: &ImageError) -> Error {
    let truncated = |error: &std::io::Error| error.kind() == std::io::ErrorKind::UnexpectedEof;
    match error {
        ImageError::IoError(io) if truncated(io) => Error::Truncated { format },
        ImageError::Limits(limit) if limit.kind() == LimitErrorKind::InsufficientMemory => {
            Error::Decode {
                format,
                message: "it takes more memory than is allowed for a picture".to_owned(),
            }
        }
        other => Error::Decode {
            format,
            message: other.to_string(),
        },
    }
}

/// Whether an end marker follows the first scan. The decoder fills what is missing with gray, which
/// nobody would notice; Pillow refuses such a file.
fn has_end_of_jpeg(bytes: &[u8]) -> bool {
    const SCAN: u8 = 0xDA;
    const END: [u8; 2] = [0xFF, 0xD9];
    let mut rest = bytes.get(2..).unwrap_or_default();
    // Segments carry their length, so that a thumbnail in one of them is passed over.
    while let [0xFF, marker, tail @ ..] = rest {
        match marker {
            0xFF => rest = rest.get(1..).unwrap_or_default(),
            0x01 | 0xD0..=0xD8 => rest = tail,
            _ => {
                let [high, low, ..] = tail else { return false };
                let length = usize::from(u16::from_be_bytes([*high, *low]));
                rest = tail.get(length..).unwrap_or_default();
                if *marker == SCAN {
                    break;
                }
            }
        }
    }
    rest.windows(2).any(|pair| pair == END)
}

/// Whether the file is as long as its RIFF header says. Of a lossy picture that ends early the decoder
/// makes something; Pillow refuses such a file.
fn has_all_of_webp(bytes: &[u8]) -> bool {
    const HEADER: u64 = 8;
    let Some([_, _, _, _, size @ ..]) = bytes.first_chunk::<8>() else {
        return false;
    };
    HEADER + u64::from(u32::from_le_bytes(*size)) <= bytes.len() as u64
}

/// Samples as RGB bytes, within the same allocation where that is large enough.
fn rgb_bytes(image: DynamicImage) -> Option<Vec<u8>> {
    let high = |sample: &u16| (sample >> 8) as u8;
    Some(match image {
        DynamicImage::ImageRgb8(image) => image.into_raw(),
        DynamicImage::ImageRgba8(image) => {
            let mut pixels = image.into_raw();
            let count = pixels.len() / 4;
            for i in 0..count {
                pixels.copy_within(i * 4..i * 4 + 3, i * 3);
            }
            pixels.truncate(count * 3);
            pixels
        }
        DynamicImage::ImageLuma8(image) => replicate(image.as_raw().iter().copied()),
        DynamicImage::ImageLumaA8(image) => replicate(image.as_raw().iter().step_by(2).copied()),
        DynamicImage::ImageRgb16(image) => image.as_raw().iter().map(high).collect(),
        DynamicImage::ImageRgba16(image) => {
            let (pixels, _) = image.as_raw().as_chunks::<4>();
            let colors = pixels.iter().flat_map(|[r, g, b, _]| [r, g, b]);
            colors.map(high).collect()
        }
        DynamicImage::ImageLuma16(image) => {
            replicate(image.as_raw().iter().map(|gray| (*gray).min(255) as u8))
        }
        DynamicImage::ImageLumaA16(image) => replicate(image.as_raw().iter().step_by(2).map(high)),
        _ => return None,
    })
}

fn replicate(grays: impl Iterator<Item = u8>) -> Vec<u8> {
    grays.flat_map(|gray| [gray; 3]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_marker_counts_only_behind_a_scan() {
        let thumbnail = [0xFF, 0xD8, 0xFF, 0xE1, 0, 4, 0xFF, 0xD9];
        let scan = [0xFF, 0xDA, 0, 3, 0, 1, 2, 3];
        assert!(!has_end_of_jpeg(&[&thumbnail[..], &scan].concat()));
        assert!(has_end_of_jpeg(
            &[&thumbnail[..], &scan, &[0xFF, 0xD9]].concat()
        ));
        assert!(!has_end_of_jpeg(&thumbnail[..5]));
        assert!(!has_end_of_jpeg(&[]));
    }

    #[test]
    fn a_webp_file_is_as_long_as_it_says() {
        assert!(has_all_of_webp(b"RIFF\x04\0\0\0WEBP"));
        assert!(!has_all_of_webp(b"RIFF\x05\0\0\0WEBP"));
        assert!(!has_all_of_webp(b"RIFF\xff\xff\xff\xffWEBP"));
        assert!(!has_all_of_webp(b"RIFF"));
    }

    #[test]
    fn a_written_picture_reads_back() {
        let pixels: Vec<u8> = (0..=255).cycle().take(3 * 7 * 5).collect();
        let file = encode_png(7, 5, &pixels).unwrap();
        let back = decode(&file, &Limits::default()).unwrap();
        assert!((back.width, back.height) == (7, 5) && back.pixels == pixels);
        assert!(matches!(encode_png(7, 6, &pixels), Err(Error::Size { .. })));
        assert!(matches!(encode_png(0, 0, &[]), Err(Error::Size { .. })));
    }
}
