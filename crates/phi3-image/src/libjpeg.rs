//! JPEG by libjpeg-turbo's code, in the way Pillow calls it: the accurate integer transform, smooth
//! upsampling of chroma.

use std::panic::{AssertUnwindSafe, catch_unwind};

use mozjpeg::{ColorSpace, Decompress};

use crate::decode::check_size;
use crate::{Error, Limits, Result, Rgb};

pub(crate) fn decode(bytes: &[u8], limits: &Limits) -> Result<Rgb> {
    // The library's error exit unwinds; it is the one way that its errors take.
    let decoded = catch_unwind(AssertUnwindSafe(|| decode_unguarded(bytes, limits)));
    decoded.unwrap_or_else(|_| Err(malformed("its data is malformed")))
}

fn malformed(message: &str) -> Error {
    Error::Decode {
        format: "JPEG",
        message: message.to_owned(),
    }
}

fn decode_unguarded(bytes: &[u8], limits: &Limits) -> Result<Rgb> {
    let io = |error: std::io::Error| malformed(&error.to_string());
    let decompress = Decompress::new_mem(bytes).map_err(io)?;
    let (width, height) = decompress.size();
    let side = |side: usize| u32::try_from(side).unwrap_or(u32::MAX);
    check_size(side(width), side(height), limits)?;
    let four = matches!(
        decompress.color_space(),
        ColorSpace::JCS_CMYK | ColorSpace::JCS_YCCK
    );
    let pixels = if four {
        let mut decoder = decompress.to_colorspace(ColorSpace::JCS_CMYK).map_err(io)?;
        let inks: Vec<[u8; 4]> = decoder.read_scanlines().map_err(io)?;
        decoder.finish().map_err(io)?;
        inks.into_iter().flat_map(from_cmyk).collect()
    } else {
        let mut decoder = decompress.rgb().map_err(io)?;
        let pixels: Vec<[u8; 3]> = decoder.read_scanlines().map_err(io)?;
        decoder.finish().map_err(io)?;
        pixels.into_flattened()
    };
    if pixels.len() != width * height * 3 {
        return Err(Error::Truncated { format: "JPEG" });
    }
    Ok(Rgb {
        width,
        height,
        pixels,
    })
}

/// Pillow's conversion. Files with four inks store them inverted, as Adobe does, so that 255 is none.
fn from_cmyk([c, m, y, k]: [u8; 4]) -> [u8; 3] {
    let k = u32::from(k);
    [c, m, y].map(|ink| {
        // ink · k / 255 in Pillow's rounding.
        let ink = u32::from(255 - ink) * k + 128;
        k.saturating_sub(((ink >> 8) + ink) >> 8) as u8
    })
}
