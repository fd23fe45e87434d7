//! A video as pictures: some frames of a folder or an animation, evenly spaced.

use std::io::Cursor;
use std::path::{Path, PathBuf};

use image::codecs::gif::GifDecoder;
use image::codecs::webp::WebPDecoder;
use image::{AnimationDecoder, Frames, ImageDecoder, ImageFormat};

use crate::decode::{check_length, check_size, error, image_limits};
use crate::{Error, Limits, Result, Rgb, decode, read_bytes};

/// Names of pictures in a folder of frames.
const EXTENSIONS: [&str; 6] = ["png", "jpg", "jpeg", "webp", "gif", "bmp"];

/// More frames than any animation has that somebody looks at; a longer one is an error, because all
/// of its frames would have to be decoded.
const MOST_FRAMES: usize = 100_000;

/// How many times [`Limits::max_pixels`] the frames of an animation may have together, for the same
/// reason: half an hour of high definition, and not the days that a small file can claim.
const MOST_PICTURES: u64 = 1000;

/// Which `wanted` of `count` frames to take: each from the middle of an equal share of them, all of
/// them if there are no more.
///
/// ```
/// assert_eq!(phi3_image::evenly_spaced(10, 3), [1, 5, 8]);
/// assert_eq!(phi3_image::evenly_spaced(2, 3), [0, 1]);
/// ```
pub fn evenly_spaced(count: usize, wanted: usize) -> Vec<usize> {
    if wanted >= count {
        return (0..count).collect();
    }
    let middle = |i: usize| (2 * i as u128 + 1) * count as u128 / (2 * wanted as u128);
    (0..wanted).map(|i| middle(i) as usize).collect()
}

/// The pictures of [`folder_files`], decoded.
///
/// # Errors
/// Those of [`folder_files`] and of [`crate::read`].
pub fn folder_frames(folder: &Path, wanted: usize, limits: &Limits) -> Result<Vec<Rgb>> {
    let files = folder_files(folder, wanted)?;
    files.iter().map(|path| crate::read(path, limits)).collect()
}

/// `wanted` pictures of a folder, evenly spaced in the order of their names; numbers in names count
/// as numbers, so that `frame10` follows `frame9`. What is no picture by its name is passed over.
///
/// # Errors
/// [`Error::Io`] or [`Error::NoPictures`].
pub fn folder_files(folder: &Path, wanted: usize) -> Result<Vec<PathBuf>> {
    let io = |source| Error::Io {
        path: folder.to_owned(),
        source,
    };
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let path = entry.map_err(io)?.path();
        let extension = path.extension().and_then(|it| it.to_str());
        let extension = extension.unwrap_or_default().to_ascii_lowercase();
        if EXTENSIONS.contains(&extension.as_str()) && path.is_file() {
            files.push(path);
        }
    }
    if files.is_empty() {
        return Err(Error::NoPictures {
            path: folder.to_owned(),
        });
    }
    files.sort_by_cached_key(|path| natural_key(&path.to_string_lossy()));
    let chosen = evenly_spaced(files.len(), wanted).into_iter();
    Ok(chosen.filter_map(|i| files.get(i).cloned()).collect())
}

/// `wanted` frames of an animated GIF or WebP file, evenly spaced; a file of one picture is that.
///
/// The file is decoded twice, so that only the frames that are taken are held.
///
/// # Errors
/// Those of [`crate::read`].
pub fn animation_frames(path: &Path, wanted: usize, limits: &Limits) -> Result<Vec<Rgb>> {
    let bytes = read_bytes(path, limits)?;
    check_length(&bytes, limits)?;
    let animated = matches!(
        image::guess_format(&bytes),
        Ok(ImageFormat::Gif | ImageFormat::WebP)
    );
    let count = if animated { count(&bytes, limits)? } else { 0 };
    if count <= 1 {
        return Ok(vec![decode(&bytes, limits)?]);
    }
    let chosen = evenly_spaced(count, wanted);
    let mut taken = Vec::with_capacity(chosen.len());
    for_each_frame(&bytes, limits, |index, frame| {
        if chosen.binary_search(&index).is_ok() {
            let (width, height) = (frame.width() as usize, frame.height() as usize);
            let (pixels, _) = frame.as_raw().as_chunks::<4>();
            taken.push(Rgb {
                width,
                height,
                pixels: pixels
                    .iter()
                    .flat_map(|[r, g, b, _]| [*r, *g, *b])
                    .collect(),
            });
        }
        taken.len() < chosen.len()
    })?;
    Ok(taken)
}

fn count(bytes: &[u8], limits: &Limits) -> Result<usize> {
    let mut count = 0;
    for_each_frame(bytes, limits, |index, _| {
        count = index + 1;
        true
    })?;
    Ok(count)
}

/// Calls `take` with the frames until it says no.
fn for_each_frame(
    bytes: &[u8],
    limits: &Limits,
    mut take: impl FnMut(usize, &image::RgbaImage) -> bool,
) -> Result<()> {
    let reader = Cursor::new(bytes);
    let (name, frames): (&str, Frames<'_>) = if bytes.starts_with(b"GIF") {
        let mut decoder = GifDecoder::new(reader).map_err(|it| error("GIF", &it))?;
        let (width, height) = decoder.dimensions();
        check_size(width, height, limits)?;
        let own = image_limits(limits);
        decoder.set_limits(own).map_err(|it| error("GIF", &it))?;
        ("GIF", decoder.into_frames())
    } else {
        let decoder = WebPDecoder::new(reader).map_err(|it| error("WebP", &it))?;
        let (width, height) = decoder.dimensions();
        check_size(width, height, limits)?;
        if !decoder.has_animation() {
            return Ok(());
        }
        ("WebP", decoder.into_frames())
    };
    for (index, frame) in frames.enumerate() {
        let frame = frame.map_err(|it| error(name, &it))?;
        let pixels = u64::from(frame.buffer().width()) * u64::from(frame.buffer().height());
        let all = pixels.saturating_mul(index as u64);
        if index >= MOST_FRAMES || all > limits.max_pixels.saturating_mul(MOST_PICTURES) {
            return Err(Error::Decode {
                format: name,
                message: format!("it has more than {index} frames, too many to look through"),
            });
        }
        if !take(index, frame.buffer()) {
            break;
        }
    }
    Ok(())
}

/// Text and numbers of a name in turn, a number as its digits without leading zeros, the shorter
/// first.
fn natural_key(name: &str) -> Vec<(usize, String)> {
    let mut parts = Vec::new();
    let mut rest = name;
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(rest.len());
        let (number, tail) = rest.split_at(digits);
        let number = number.trim_start_matches('0');
        let text = tail
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(tail.len());
        let (text, tail) = tail.split_at(text);
        parts.push((number.len(), number.to_owned()));
        parts.push((0, text.to_owned()));
        rest = tail;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_in_the_order_of_their_numbers() {
        let mut names = [
            "f10.png",
            "f9.png",
            "f1.png",
            "f0010b.png",
            "e.png",
            "f.png",
        ];
        names.sort_by_cached_key(|name| natural_key(name));
        assert_eq!(
            names,
            [
                "e.png",
                "f1.png",
                "f9.png",
                "f10.png",
                "f0010b.png",
                "f.png"
            ]
        );
    }

    #[test]
    fn frames_are_taken_from_the_middle_of_equal_shares() {
        assert_eq!(evenly_spaced(9, 3), [1, 4, 7]);
        assert_eq!(evenly_spaced(100, 1), [50]);
        assert!(evenly_spaced(0, 4).is_empty() && evenly_spaced(4, 0).is_empty());
    }
}
