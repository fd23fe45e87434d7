//! Bilinear resizing in the fixed-point arithmetic of Pillow's `Image.resize(…, BILINEAR)`.
//!
//! A triangle filter as wide as the reduction, horizontally and then vertically. Each pass sums
//! 8-bit samples times coefficients of 22 fractional bits and rounds to 8 bits; a different order
//! or precision changes pixels.

use std::collections::VecDeque;

use super::RgbImage;

/// Fractional bits of a coefficient: 32 less 8 for a sample and 2 for headroom.
const PRECISION: u32 = 22;

/// What one output sample reads: the first input sample and a coefficient for each.
struct Window {
    first: usize,
    coefficients: Vec<i32>,
}

/// `image` in `width` x `height`, both positive.
///
/// Rows of the horizontal pass live only while a row of the vertical pass reads them, so that
/// besides the result nothing is larger than a few rows of the input.
pub(super) fn bilinear(image: &RgbImage, width: usize, height: usize) -> RgbImage {
    let columns = (width != image.width).then(|| windows(image.width, width));
    let mut input = image.pixels.chunks_exact(image.width * 3);
    let mut pixels = Vec::with_capacity(width * height * 3);
    let mut rows: VecDeque<Vec<u8>> = VecDeque::new();
    let mut first_row = 0;
    let mut sums = vec![0i32; width * 3];
    // For an unchanged height, where Pillow skips this pass, the coefficients are a 1 between zeros.
    for window in windows(image.height, height) {
        let end = window.first + window.coefficients.len();
        while first_row + rows.len() < end {
            let row = input.next().unwrap_or_default();
            rows.push_back(match &columns {
                Some(columns) => resize_row(row, columns),
                None => row.to_vec(),
            });
        }
        while first_row < window.first && rows.pop_front().is_some() {
            first_row += 1;
        }
        sums.fill(1 << (PRECISION - 1));
        for (row, k) in rows.iter().zip(&window.coefficients) {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += i32::from(*value) * k;
            }
        }
        pixels.extend(sums.iter().map(|sum| rounded(*sum)));
    }
    RgbImage {
        width,
        height,
        pixels,
    }
}

fn windows(input: usize, output: usize) -> Vec<Window> {
    let scale = input as f64 / output as f64;
    let filter_scale = scale.max(1.0);
    let support = filter_scale; // the triangle's radius is 1
    let window = |out: usize| {
        let center = (out as f64 + 0.5) * scale;
        // Truncation towards zero, as a C cast does it; negative starts are clipped.
        let first = ((center - support + 0.5) as i64).max(0) as usize;
        let end = ((center + support + 0.5) as i64).clamp(0, input as i64) as usize;
        let weights: Vec<f64> = (first..end.max(first))
            .map(|x| {
                let distance = ((x as f64 - center + 0.5) * (1.0 / filter_scale)).abs();
                if distance < 1.0 { 1.0 - distance } else { 0.0 }
            })
            .collect();
        let sum: f64 = weights.iter().sum();
        let one = f64::from(1u32 << PRECISION);
        let fixed = |weight: &f64| {
            let weight = if sum == 0.0 { *weight } else { weight / sum };
            (0.5 + weight * one) as i32 // the triangle has no negative part
        };
        Window {
            first,
            coefficients: weights.iter().map(fixed).collect(),
        }
    };
    (0..output).map(window).collect()
}

fn rounded(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}

fn resize_row(row: &[u8], windows: &[Window]) -> Vec<u8> {
    let (samples, _) = row.as_chunks::<3>();
    let mut out = Vec::with_capacity(windows.len() * 3);
    for window in windows {
        let mut sums = [1i32 << (PRECISION - 1); 3];
        let samples = samples.get(window.first..).unwrap_or_default();
        for (sample, k) in samples.iter().zip(&window.coefficients) {
            for (sum, value) in sums.iter_mut().zip(sample) {
                *sum += i32::from(*value) * k;
            }
        }
        out.extend(sums.map(rounded));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_doubled_row_is_the_one_that_pillow_gives() {
        let image = RgbImage {
            width: 2,
            height: 1,
            pixels: vec![0, 10, 255, 100, 20, 0],
        };
        let wide = bilinear(&image, 4, 1);
        // Weights 1, 3/4, 1/4 and 0 of the left pixel.
        assert_eq!(
            wide.pixels,
            [0, 10, 255, 25, 13, 191, 75, 18, 64, 100, 20, 0]
        );
    }

    #[test]
    fn an_unchanged_side_is_not_touched() {
        let pixels: Vec<u8> = (0..=255).cycle().take(3 * 17 * 13).collect();
        let image = RgbImage {
            width: 17,
            height: 13,
            pixels,
        };
        assert!(bilinear(&image, 17, 13) == image);
    }

    #[test]
    fn a_flat_image_stays_flat_at_every_size() {
        let image = RgbImage {
            width: 1001,
            height: 3,
            pixels: [7, 128, 255].repeat(3003),
        };
        for (width, height) in [(1, 1), (336, 1), (2000, 50), (999, 3)] {
            let flat = bilinear(&image, width, height);
            assert!(flat.pixels == [7, 128, 255].repeat(width * height));
        }
    }
}
