//! GIF files whose first frame does not cover the screen exactly.

use std::num::NonZeroU64;

use ::gif::{ColorOutput, DecodeOptions, DecodingError, MemoryLimit};

use crate::decode::check_size;
use crate::{Error, Limits, Result, Rgb};

/// The first frame as Pillow shows it: what it does not cover has the color of the transparent index, if
/// there is one, or else of index 0, and a frame that goes beyond the screen makes the picture larger.
/// None where the frame covers the screen or one of them is empty, and for what is no GIF file.
pub(crate) fn decode_partial(bytes: &[u8], limits: &Limits) -> Result<Option<Rgb>> {
    let mut options = DecodeOptions::new();
    options.set_color_output(ColorOutput::Indexed);
    if let Some(most) = NonZeroU64::new(limits.max_pixels) {
        options.set_memory_limit(MemoryLimit::Bytes(most));
    }
    let Ok(mut decoder) = options.read_info(bytes) else {
        return Ok(None);
    };
    let screen = [decoder.width(), decoder.height()].map(u32::from);
    let Ok(Some(frame)) = decoder.next_frame_info() else {
        return Ok(None);
    };
    let start = [frame.left, frame.top].map(u32::from);
    let size = [frame.width, frame.height].map(u32::from);
    let background = frame.transparent.unwrap_or(0);
    if size.contains(&0) || screen.contains(&0) || (start, size) == ([0, 0], screen) {
        return Ok(None);
    }
    let [width, height] = [0, 1].map(|i| screen[i].max(start[i] + size[i]));
    check_size(width, height, limits)?;
    let palette = decoder.palette().unwrap_or_default().to_vec();
    let mut indices = vec![0; decoder.buffer_size()];
    decoder
        .read_into_buffer(&mut indices)
        .map_err(|it| error(&it))?;

    // What lies outside the palette is black in Pillow.
    let colors = palette.as_chunks::<3>().0;
    let color = |index: u8| colors.get(usize::from(index)).copied().unwrap_or_default();
    let [width, height] = [width, height].map(|side| side as usize);
    let mut pixels = color(background).repeat(width * height);
    let [left, top] = start.map(|side| side as usize);
    let rows = pixels.chunks_exact_mut(3 * width).skip(top);
    for (row, indices) in rows.zip(indices.chunks_exact(size[0] as usize)) {
        let (row, _) = row.as_chunks_mut::<3>();
        for (pixel, index) in row.iter_mut().skip(left).zip(indices) {
            *pixel = color(*index);
        }
    }
    Ok(Some(Rgb {
        width,
        height,
        pixels,
    }))
}

fn error(error: &DecodingError) -> Error {
    let truncated = match error {
        DecodingError::UnexpectedEof => true,
        DecodingError::Io(io) => io.kind() == std::io::ErrorKind::UnexpectedEof,
        _ => false,
    };
    match truncated {
        true => Error::Truncated { format: "GIF" },
        false => Error::Decode {
            format: "GIF",
            message: error.to_string(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLORS: [u8; 12] = [9, 8, 7, 60, 61, 62, 120, 121, 122, 1, 2, 3];

    /// A file with a screen of 4x3 pixels and one frame of 2x2 at `left`, 1.
    fn file(left: u16, transparent: Option<u8>) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut encoder = ::gif::Encoder::new(&mut bytes, 4, 3, &COLORS).unwrap();
        let frame = ::gif::Frame {
            left,
            top: 1,
            width: 2,
            height: 2,
            transparent,
            buffer: vec![1, 2, 3, 1].into(),
            ..Default::default()
        };
        encoder.write_frame(&frame).unwrap();
        drop(encoder);
        bytes
    }

    #[test]
    fn what_a_frame_leaves_has_the_color_that_pillow_gives_it() {
        let limits = Limits::default();
        for (transparent, color) in [(None, [9, 8, 7]), (Some(2), [120, 121, 122])] {
            let picture = crate::decode(&file(1, transparent), &limits).unwrap();
            assert_eq!((picture.width, picture.height), (4, 3));
            let (pixels, _) = picture.pixels.as_chunks::<3>();
            assert_eq!(pixels[..5], [color; 5]);
            assert_eq!(pixels[5..8], [[60, 61, 62], [120, 121, 122], color]);
            assert_eq!(pixels[8..], [color, [1, 2, 3], [60, 61, 62], color]);
        }
        // Beyond the right edge.
        let picture = crate::decode(&file(3, None), &limits).unwrap();
        assert_eq!((picture.width, picture.height), (5, 3));
        let small = Limits {
            max_pixels: 14,
            ..limits
        };
        let error = crate::decode(&file(3, None), &small).unwrap_err();
        assert!(matches!(error, Error::TooLarge { width: 5, .. }), "{error}");
    }

    #[test]
    fn a_frame_that_ends_early_is_an_error() {
        let whole = file(1, None);
        for len in 0..whole.len() - 2 {
            assert!(
                crate::decode(&whole[..len], &Limits::default()).is_err(),
                "{len}"
            );
        }
    }
}
