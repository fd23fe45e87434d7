//! Pictures that somebody made to do harm, or by accident: right or a clear error, never a panic.
#![expect(
    clippy::unwrap_used,
    reason = "fixtures are there, and a test may panic"
)]

use std::path::{Path, PathBuf};

use phi3_image::{Error, Limits, Result, Rgb, decode, encode_png};

fn fixture(name: &str) -> PathBuf {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures");
    fixtures.join(name)
}

fn bytes(name: &str) -> Vec<u8> {
    std::fs::read(fixture(name)).unwrap()
}

fn open(bytes: &[u8]) -> Result<Rgb> {
    decode(bytes, &Limits::default())
}

/// A picture of one color.
fn flat(width: usize, height: usize) -> Vec<u8> {
    encode_png(width, height, &vec![200; width * height * 3]).unwrap()
}

/// A PNG file whose header claims another size, with a checksum that fits.
fn png_claiming(width: u32, height: u32) -> Vec<u8> {
    let mut file = flat(4, 4);
    file[16..20].copy_from_slice(&width.to_be_bytes());
    file[20..24].copy_from_slice(&height.to_be_bytes());
    let checksum = crc32(&file[12..29]);
    file[29..33].copy_from_slice(&checksum.to_be_bytes());
    file
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg())
        })
    })
}

/// The first bytes of a file.
fn cut(name: &str, share: f64) -> Vec<u8> {
    let mut file = bytes(name);
    file.truncate((file.len() as f64 * share) as usize);
    file
}

fn assert_refused(file: &[u8], what: &str) -> String {
    let error = open(file).expect_err(what);
    let message = error.to_string();
    assert!(
        message.len() < 300 && !message.contains('\0'),
        "{what}: {message}"
    );
    message
}

#[test]
fn text_named_png_is_not_a_picture() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("text.png");
    std::fs::write(&path, "This is not a picture.\n").unwrap();
    let error = phi3_image::read(&path, &Limits::default()).unwrap_err();
    assert!(matches!(error, Error::Format), "{error}");
}

#[test]
fn an_empty_file_is_not_a_picture() {
    assert!(matches!(open(&[]), Err(Error::Format)));
}

#[test]
fn a_signature_alone_is_not_a_picture() {
    for signature in [
        &b"\x89PNG\r\n\x1a\n"[..],
        b"\xff\xd8\xff",
        b"GIF89a",
        b"BM",
        b"RIFF\0\0\0\0WEBP",
    ] {
        assert_refused(signature, "a signature");
    }
}

#[test]
fn a_missing_file_is_named() {
    let error = phi3_image::read(Path::new("no/such.png"), &Limits::default()).unwrap_err();
    assert!(error.to_string().contains("no/such.png"));
}

#[test]
fn a_folder_is_no_file() {
    assert!(phi3_image::read(&fixture("images"), &Limits::default()).is_err());
}

#[test]
fn truncated_png() {
    for share in [0.05, 0.5, 0.95] {
        assert_refused(&cut("images/photo2.png", share), "png");
    }
}

#[test]
fn truncated_jpeg() {
    for share in [0.01, 0.2, 0.5, 0.999] {
        assert_refused(&cut("images/photo.jpg", share), "jpeg");
    }
}

#[test]
fn truncated_progressive_jpeg() {
    assert_refused(
        &cut("image-formats/progressive.jpg", 0.6),
        "progressive jpeg",
    );
}

#[test]
fn truncated_gif() {
    assert_refused(&cut("image-formats/plain.gif", 0.5), "gif");
}

#[test]
fn truncated_webp() {
    for name in ["lossless.webp", "lossy.webp", "animated.webp"] {
        assert_refused(&cut(&format!("image-formats/{name}"), 0.4), name);
    }
}

#[test]
fn truncated_bmp() {
    for name in ["rgb.bmp", "palette.bmp", "onebit.bmp"] {
        assert_refused(&cut(&format!("image-formats/{name}"), 0.5), name);
    }
}

#[test]
fn every_prefix_of_small_files_is_refused_or_whole() {
    let folder = fixture("image-formats");
    for name in [
        "gray.gif",
        "onebit.bmp",
        "one_pixel.jpg",
        "lossless.webp",
        "palette4.png",
    ] {
        let file = bytes(&format!("image-formats/{name}"));
        let whole = open(&file).unwrap();
        for length in 0..file.len() {
            if let Ok(image) = open(&file[..length]) {
                let same = (image.width, image.height) == (whole.width, whole.height);
                assert!(same, "{}: {length}", folder.join(name).display());
            }
        }
    }
}

#[test]
fn every_single_byte_may_be_wrong() {
    for name in [
        "gray.gif",
        "onebit.bmp",
        "one_pixel.jpg",
        "gray2_transparent.png",
    ] {
        let file = bytes(&format!("image-formats/{name}"));
        for position in 0..file.len() {
            for value in [0, 1, 0x7F, 0x80, 0xFF] {
                let mut file = file.clone();
                file[position] = value;
                let limits = Limits {
                    max_pixels: 1 << 20,
                    ..Limits::default()
                };
                if let Ok(image) = decode(&file, &limits) {
                    assert_eq!(image.pixels.len(), image.width * image.height * 3);
                }
            }
        }
    }
}

#[test]
fn a_png_of_4_billion_pixels() {
    let message = assert_refused(&png_claiming(65_536, 65_536), "bomb");
    assert!(
        message.contains("65536x65536") && message.contains("89478485"),
        "{message}"
    );
}

#[test]
fn a_png_of_the_largest_size_there_is() {
    assert_refused(&png_claiming(0x7FFF_FFFF, 0x7FFF_FFFF), "bomb");
    assert_refused(&png_claiming(u32::MAX, u32::MAX), "bomb");
}

#[test]
fn a_png_that_claims_what_it_does_not_have() {
    assert_refused(&png_claiming(5000, 5000), "claim");
}

#[test]
fn a_png_of_zero_width_or_height() {
    for (width, height) in [(0, 4), (4, 0), (0, 0)] {
        assert_refused(&png_claiming(width, height), "zero");
    }
}

#[test]
fn a_real_bomb_is_refused_by_its_size() {
    let file = flat(6000, 6000);
    let limits = Limits {
        max_pixels: 10_000_000,
        ..Limits::default()
    };
    assert!(matches!(
        decode(&file, &limits),
        Err(Error::TooLarge { width: 6000, .. })
    ));
}

#[test]
fn a_file_that_is_too_long() {
    let limits = Limits {
        max_bytes: 100,
        ..Limits::default()
    };
    let path = fixture("images/photo.jpg");
    let error = phi3_image::read(&path, &limits).unwrap_err();
    assert!(matches!(error, Error::TooLong { limit: 100 }));
}

#[test]
fn a_jpeg_of_zero_height() {
    let mut file = bytes("image-formats/rgb_444.jpg");
    let frame = file
        .windows(2)
        .position(|pair| pair == [0xFF, 0xC0])
        .unwrap();
    file[frame + 5..frame + 7].copy_from_slice(&[0, 0]);
    assert_refused(&file, "zero height");
}

#[test]
fn a_jpeg_that_claims_65535_squared() {
    let mut file = bytes("image-formats/rgb_444.jpg");
    let frame = file
        .windows(2)
        .position(|pair| pair == [0xFF, 0xC0])
        .unwrap();
    file[frame + 5..frame + 9].copy_from_slice(&[0xFF; 4]);
    let message = assert_refused(&file, "bomb");
    assert!(message.contains("65535x65535"), "{message}");
}

#[test]
fn a_gif_whose_screen_is_a_bomb() {
    let mut file = bytes("image-formats/gray.gif");
    file[6..10].copy_from_slice(&[0xFF; 4]);
    let message = assert_refused(&file, "bomb");
    assert!(message.contains("65535x65535"), "{message}");
}

#[test]
fn a_gif_frame_outside_its_screen() {
    let mut file = bytes("image-formats/gray.gif");
    file[6..10].copy_from_slice(&[3, 0, 2, 0]);
    // It makes the picture as large as the frame is.
    let (image, whole) = (
        open(&file).unwrap(),
        open(&bytes("image-formats/gray.gif")).unwrap(),
    );
    assert_eq!((image.width, image.height), (whole.width, whole.height));
    assert!(image.pixels == whole.pixels);
}

#[test]
fn a_gif_of_zero_size() {
    let mut file = bytes("image-formats/gray.gif");
    file[6..10].copy_from_slice(&[0; 4]);
    assert_refused(&file, "zero size");
}

#[test]
fn a_bmp_of_negative_or_huge_size() {
    let mut file = bytes("image-formats/rgb.bmp");
    file[18..22].copy_from_slice(&(-61i32).to_le_bytes());
    assert_refused(&file, "negative width");
    file[18..22].copy_from_slice(&i32::MAX.to_le_bytes());
    file[22..26].copy_from_slice(&i32::MAX.to_le_bytes());
    assert_refused(&file, "huge");
    file[22..26].copy_from_slice(&i32::MIN.to_le_bytes());
    assert_refused(&file, "the most negative height");
}

#[test]
fn a_webp_that_claims_16383_squared() {
    let mut file = bytes("image-formats/lossless.webp");
    let header = file.windows(4).position(|it| it == b"VP8L").unwrap() + 9;
    // Twice 14 bits of a side less 1.
    let sides = 0x3FFEu32 | 0x3FFE << 14;
    file[header..header + 4].copy_from_slice(&sides.to_le_bytes());
    let message = assert_refused(&file, "bomb");
    assert!(message.contains("16383x16383"), "{message}");
}

#[test]
fn pictures_of_extreme_ratio_are_right() {
    for (width, height) in [(1, 10_000), (10_000, 1), (1, 1)] {
        let image = open(&flat(width, height)).unwrap();
        assert_eq!((image.width, image.height), (width, height));
        assert!(image.pixels.iter().all(|sample| *sample == 200));
    }
}

#[test]
fn a_palette_index_outside_the_palette() {
    // Two bits for each pixel, two colors: indices 2 and 3 name none. Pillow shows black.
    let mut file = b"\x89PNG\r\n\x1a\n".to_vec();
    let mut chunk = |kind: &[u8; 4], data: &[u8]| {
        file.extend((data.len() as u32).to_be_bytes());
        let body = [&kind[..], data].concat();
        file.extend(&body);
        file.extend(crc32(&body).to_be_bytes());
    };
    chunk(b"IHDR", &[0, 0, 0, 4, 0, 0, 0, 1, 2, 3, 0, 0, 0]);
    chunk(b"PLTE", &[1, 2, 3, 4, 5, 6]);
    // A stored block: filter 0, then 0b00011011.
    chunk(
        b"IDAT",
        &[0x78, 1, 1, 2, 0, 0xFD, 0xFF, 0, 0x1B, 0, 0x1D, 0, 0x1C],
    );
    chunk(b"IEND", &[]);
    match open(&file) {
        Ok(image) => assert_eq!(image.pixels, [1, 2, 3, 4, 5, 6, 0, 0, 0, 0, 0, 0]),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn formats_that_are_not_supported_are_named_so() {
    for signature in [
        &b"II*\0\x08\0\0\0\0\0\0\0\0\0"[..],
        b"8BPS\0\x01\0\0\0\0",
        b"\0\0\x01\0\x01\0\x10\x10\0\0",
    ] {
        assert!(matches!(open(signature), Err(Error::Format)));
    }
}

#[test]
fn garbage_behind_a_picture_is_ignored() {
    for name in [
        "images/tiny.png",
        "image-formats/rgb_420.jpg",
        "image-formats/plain.gif",
    ] {
        let file = bytes(name);
        let longer = [&file[..], &[0xAB; 1000]].concat();
        assert!(open(&file).unwrap() == open(&longer).unwrap(), "{name}");
    }
}

/// The longest side that WebP can say is 16384. libwebp, and so Pillow, writes none longer than 16383.
#[test]
fn a_webp_with_sides_of_16383_is_right_and_longer_ones_are_refused() {
    for (width, height, right) in [
        (16_383, 2, true),
        (2, 16_383, true),
        (16_384, 2, false),
        (2, 16_384, false),
    ] {
        let pixels: Vec<u8> = (0..=255).cycle().take(3 * width * height).collect();
        let mut file = Vec::new();
        let color = image::ExtendedColorType::Rgb8;
        image::codecs::webp::WebPEncoder::new_lossless(&mut file)
            .encode(&pixels, width as u32, height as u32, color)
            .unwrap();
        if right {
            let found = open(&file).unwrap();
            assert_eq!((found.width, found.height), (width, height));
            assert!(found.pixels == pixels);
        } else {
            let message = assert_refused(&file, "too long a side");
            assert!(message.contains("16384"), "{message}");
        }
    }
}

#[test]
fn an_animation_without_end_is_not_looked_through() {
    let limits = Limits {
        max_pixels: 2,
        ..Limits::default()
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("long.gif");
    for (frames, right) in [(1000, true), (1002, false)] {
        let mut file = Vec::new();
        let mut encoder = image::codecs::gif::GifEncoder::new(&mut file);
        let frame = || image::Frame::new(image::RgbaImage::new(2, 1));
        encoder
            .encode_frames(std::iter::repeat_with(frame).take(frames))
            .unwrap();
        drop(encoder);
        std::fs::write(&path, file).unwrap();
        let found = phi3_image::animation_frames(&path, 3, &limits);
        match found {
            Ok(frames) => assert!(right && frames.len() == 3),
            Err(error) => assert!(!right && error.to_string().contains("frames"), "{error}"),
        }
    }
}
