//! The global view: the whole image in one crop, as torch's `interpolate(mode="bicubic")` makes it.

/// Sharpness of torch's cubic kernel.
const A: f32 = -0.75;

/// One channel of an image `[height, width, 3]`, read through `values`, in `size` x `size`:
/// centers aligned, no antialiasing, borders repeated, nothing clamped.
///
/// torch sums along a row first and the four rows after that, in f32; so do we.
pub(super) struct Bicubic {
    width: usize,
    columns: Vec<Taps>,
    rows: Vec<Taps>,
}

/// Four input positions and their weights.
type Taps = [(usize, f32); 4];

impl Bicubic {
    pub(super) fn new(width: usize, height: usize, size: usize) -> Self {
        Self {
            width,
            columns: taps(width, size),
            rows: taps(height, size),
        }
    }

    /// Appends the view of one channel.
    pub(super) fn view(
        &self,
        pixels: &[u8],
        channel: usize,
        values: &[f32; 256],
        out: &mut Vec<f32>,
    ) {
        let stride = self.width * 3;
        let value = |line: &[u8], column: usize| {
            let byte = line.get(column * 3 + channel).copied().unwrap_or_default();
            values.get(usize::from(byte)).copied().unwrap_or_default()
        };
        for rows in &self.rows {
            let lines = rows.map(|(row, weight)| {
                let line = pixels.get(row * stride..(row + 1) * stride);
                (line.unwrap_or_default(), weight)
            });
            out.extend(self.columns.iter().map(|columns| {
                sum(lines.map(|(line, weight)| {
                    sum(columns.map(|(column, weight)| value(line, column) * weight)) * weight
                }))
            }));
        }
    }
}

fn sum([a, b, c, d]: [f32; 4]) -> f32 {
    a + b + c + d
}

/// For each output position what it reads.
fn taps(input: usize, output: usize) -> Vec<Taps> {
    let scale = input as f32 / output as f32;
    let last = input.saturating_sub(1) as i64;
    let tap = |out: usize| {
        let real = scale * (out as f32 + 0.5) - 0.5;
        let floor = real.floor();
        let t = real - floor;
        let index = |offset: i64| (floor as i64 + offset).clamp(0, last) as usize;
        [
            (index(-1), outer(t + 1.0)),
            (index(0), inner(t)),
            (index(1), inner(1.0 - t)),
            (index(2), outer(2.0 - t)),
        ]
    };
    (0..output).map(tap).collect()
}

/// The kernel within one sample of its center.
fn inner(x: f32) -> f32 {
    ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
}

/// The kernel one to two samples from its center.
fn outer(x: f32) -> f32 {
    ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_weights_of_every_position_add_up_to_one() {
        for taps in taps(672, 336).into_iter().chain(taps(100, 336)) {
            assert!((taps.iter().map(|(_, weight)| weight).sum::<f32>() - 1.0).abs() < 1e-6);
        }
    }

    #[test]
    fn halving_weighs_four_samples_as_the_kernel_says() {
        let values = std::array::from_fn(|value| value as f32);
        let row = [0u8, 10, 20, 255, 40, 50, 60, 70].map(|value| [value; 3]);
        let mut out = Vec::new();
        Bicubic::new(8, 1, 4).view(row.as_flattened(), 1, &values, &mut out);
        // Between two samples the kernel is -3/32, 19/32, 19/32, -3/32; a row above repeats itself.
        let expected = (-3.0 * 10.0 + 19.0 * 20.0 + 19.0 * 255.0 - 3.0 * 40.0) / 32.0;
        assert_eq!(out.len(), 16);
        assert!((out[1] - expected).abs() < 1e-4, "{out:?}");
    }
}
