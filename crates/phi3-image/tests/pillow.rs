//! Pixels are Pillow's.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "fixtures are there, and a test may panic"
)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use phi3_image::{Limits, Rgb, animation_frames, folder_frames, read};
use serde_json::Value;
use sha2::{Digest, Sha256};

fn fixture(name: &str) -> PathBuf {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures");
    fixtures.join(name)
}

fn open(path: &Path) -> Rgb {
    read(path, &Limits::default()).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// What Pillow makes of each picture of a folder.
fn listing(folder: &str, file: &str) -> BTreeMap<String, Value> {
    let text = std::fs::read_to_string(fixture(folder).join(file)).unwrap();
    let json: Value = serde_json::from_str(&text).unwrap();
    let images = json["images"].as_object().unwrap().clone();
    images.into_iter().collect()
}

fn hash(image: &Rgb) -> String {
    let digest = Sha256::digest(&image.pixels);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn is_jpeg(name: &str) -> bool {
    name.ends_with(".jpg")
}

/// Largest and mean difference.
fn difference(a: &Rgb, b: &Rgb) -> (u8, f64) {
    assert_eq!((a.width, a.height), (b.width, b.height));
    let each = a.pixels.iter().zip(&b.pixels).map(|(a, b)| a.abs_diff(*b));
    let (mut most, mut sum) = (0, 0);
    for difference in each {
        most = most.max(difference);
        sum += u64::from(difference);
    }
    (most, sum as f64 / a.pixels.len() as f64)
}

#[test]
fn lossless_formats_agree_in_every_byte() {
    let mut exact = 0;
    for (folder, file) in [("images", "images.json"), ("image-formats", "formats.json")] {
        for (name, expected) in listing(folder, file) {
            if is_jpeg(&name) || name.starts_with("lossy") {
                continue;
            }
            let image = open(&fixture(folder).join(&name));
            assert_eq!(image.width as u64, expected["width"], "{name}");
            assert_eq!(image.height as u64, expected["height"], "{name}");
            assert_eq!(hash(&image).as_str(), expected["rgb_sha256"], "{name}");
            exact += 1;
        }
    }
    assert_eq!(exact, 37);
}

/// Files, largest and mean difference of samples from Pillow's that are allowed. Measured by
/// `--nocapture`; the bounds are half as large again.
fn lossy() -> Vec<(&'static str, u8, f64)> {
    #[cfg(feature = "libjpeg")]
    let jpeg = |_: u8, _: f64| (0, 0.0);
    #[cfg(not(feature = "libjpeg"))]
    let jpeg = |most: u8, mean: f64| (most, mean);
    let all: Vec<(&str, (u8, f64))> = vec![
        ("images/photo.jpg", jpeg(6, 0.25)),
        ("images/gradient.jpg", jpeg(5, 0.02)),
        ("images/gray.jpg", jpeg(2, 0.01)),
        ("images/exif_rotated.jpg", jpeg(14, 0.27)),
        ("image-formats/rgb_444.jpg", jpeg(3, 0.03)),
        ("image-formats/rgb_422.jpg", jpeg(5, 0.2)),
        ("image-formats/rgb_420.jpg", jpeg(5, 0.55)),
        ("image-formats/progressive.jpg", jpeg(5, 0.55)),
        ("image-formats/restart.jpg", jpeg(5, 0.5)),
        ("image-formats/gray.jpg", jpeg(2, 0.02)),
        ("image-formats/cmyk.jpg", jpeg(2, 0.02)),
        ("image-formats/one_pixel.jpg", jpeg(0, 0.0)),
        ("image-formats/high_quality.jpg", jpeg(5, 0.26)),
        ("image-formats/low_quality.jpg", jpeg(5, 0.6)),
        ("image-formats/lossy.webp", (0, 0.0)),
        ("image-formats/lossy_alpha.webp", (0, 0.0)),
    ];
    let flat = |(name, (most, mean))| (name, most, mean);
    all.into_iter().map(flat).collect()
}

#[test]
fn lossy_formats_differ_by_no_more_than_is_stated() {
    let mut complaints = Vec::new();
    for (name, most, mean) in lossy() {
        let image = open(&fixture(name));
        let pillow = open(&fixture(&format!("{name}.rgb.png")));
        let measured = difference(&image, &pillow);
        println!("{name}: at most {}, mean {:.3}", measured.0, measured.1);
        if measured.0 > most || measured.1 > mean {
            complaints.push(format!("{name}: {measured:?}"));
        }
    }
    assert!(complaints.is_empty(), "{complaints:#?}");
}

#[test]
fn every_lossy_file_is_compared() {
    let mut names = Vec::new();
    for (folder, file) in [("images", "images.json"), ("image-formats", "formats.json")] {
        let lossy = |name: &String| is_jpeg(name) || name.starts_with("lossy");
        let found = listing(folder, file).into_keys().filter(lossy);
        names.extend(found.map(|name| format!("{folder}/{name}")));
    }
    let mut compared: Vec<&str> = lossy().into_iter().map(|(name, ..)| name).collect();
    compared.sort_unstable();
    names.sort_unstable();
    assert_eq!(names, compared);
}

#[test]
fn frames_of_an_animation_are_evenly_spaced() {
    let limits = Limits::default();
    for (name, count) in [("animated.gif", 10), ("animated.webp", 2), ("rgb.bmp", 1)] {
        let path = fixture("image-formats").join(name);
        let all = animation_frames(&path, 100, &limits).unwrap();
        assert_eq!(all.len(), count, "{name}");
        assert!(
            all[0] == open(&path),
            "{name}: the first frame is the picture"
        );
        let two = animation_frames(&path, 2, &limits).unwrap();
        if count == 10 {
            assert!(two == [all[2].clone(), all[7].clone()]);
            assert!(two[0] != two[1]);
        }
    }
}

#[test]
fn frames_of_a_folder_follow_the_numbers_in_their_names() {
    let folder = tempfile::tempdir().unwrap();
    for number in 1..=12u8 {
        let png = phi3_image::encode_png(1, 1, &[number; 3]).unwrap();
        std::fs::write(folder.path().join(format!("frame{number}.png")), png).unwrap();
    }
    std::fs::write(folder.path().join("notes.txt"), "no picture").unwrap();
    let frames = folder_frames(folder.path(), 4, &Limits::default()).unwrap();
    let first: Vec<u8> = frames.iter().map(|frame| frame.pixels[0]).collect();
    assert_eq!(first, [2, 5, 8, 11]);
    let empty = tempfile::tempdir().unwrap();
    assert!(folder_frames(empty.path(), 4, &Limits::default()).is_err());
}
