//! Bytes that may be a picture: what decodes is processed, crops and tokens as its layout says.
//!
//! The first byte chooses the number of crops, mostly a small one: a crop takes milliseconds. With its
//! high bit set the next four are width and
//! height and the rest the pixels, repeated, so that the processor meets every shape; otherwise the
//! rest is a file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use phi3::image::{CROP, Image, Limits, Processor, RgbImage};

const LIMITS: Limits = Limits {
    max_pixels: 1 << 20,
    max_bytes: 1 << 20,
};

const NUM_CROPS: [usize; 8] = [0, 1, 1, 2, 3, 4, 16, 65];

fuzz_target!(init: phi3_fuzz::start(seeds), |data: &[u8]| {
    let [choice, rest @ ..] = data else {
        return;
    };
    let num_crops = NUM_CROPS[usize::from(choice & 7)];
    let processor = Processor::default().with_num_crops(num_crops);
    assert_eq!(processor.is_ok(), (1..=64).contains(&num_crops));
    let Ok(processor) = processor else {
        return;
    };
    if choice & 0x80 == 0 {
        match Image::bytes(rest.to_vec()).open(&LIMITS) {
            Ok(image) => check(&processor, &image),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    } else if let [a, b, c, d, rest @ ..] = rest {
        let width = usize::from(u16::from_le_bytes([*a, *b]));
        let height = usize::from(u16::from_le_bytes([*c, *d]));
        let bytes = width * height * 3;
        if bytes <= 1 << 21 {
            let pixels = rest.iter().copied().chain([0]).cycle().take(bytes).collect();
            match RgbImage::new(width, height, pixels) {
                Ok(image) => check(&processor, &image),
                Err(_) => assert_eq!(bytes, 0),
            }
        }
    }
});

fn check(processor: &Processor, image: &RgbImage) {
    let Ok(processed) = processor.process(image) else {
        // Only a side that would vanish.
        let (long, short) = (image.width().max(image.height()), image.width().min(image.height()));
        assert!(long / short >= CROP);
        return;
    };
    let layout = &processed.layout;
    assert!((1..=processor.num_crops).contains(&layout.crops()));
    assert_eq!(processed.pixel_values.len(), (layout.crops() + 1) * 3 * CROP * CROP);
    assert!(processed.pixel_values.iter().all(|value| value.is_finite()));
    assert_eq!(
        layout.tokens(),
        (layout.crops() + 1) * 144 + 1 + (layout.crop_rows + 1) * 12
    );
}

fn seeds() -> Vec<Vec<u8>> {
    let folder = phi3_tests::fixtures().join("image-formats");
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths: Vec<_> = files.map(|file| file.path()).collect();
    paths.sort();
    let small = paths.iter().filter_map(|path| std::fs::read(path).ok());
    let mut seeds: Vec<Vec<u8>> = small
        .filter(|file| file.len() < 8000)
        .map(|file| [&[1][..], &file].concat())
        .collect();
    for (choice, width, height) in [(1u8, 1u16, 1u16), (6, 1, 300), (5, 900, 3), (4, 17, 400)] {
        let [a, b] = width.to_le_bytes();
        let [c, d] = height.to_le_bytes();
        seeds.push(vec![0x80 | choice, a, b, c, d, 1, 200, 77, 13]);
    }
    seeds
}
