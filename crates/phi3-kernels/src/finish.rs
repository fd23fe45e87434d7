//! What follows a product, in one pass over its outputs.

use crate::{dispatch, threads};

/// Work of one exponential and what surrounds it, in multiply-adds.
const EXP_WORK: usize = 16;

/// What is done to outputs that have their bias.
#[derive(Clone, Copy, Debug)]
pub enum Finish<'a> {
    /// Nothing more.
    Nothing,
    /// CLIP's activation, as [`quick_gelu`](crate::quick_gelu).
    QuickGelu,
    /// As many numbers are added, one to each.
    Add(&'a [f32]),
}

/// Adds `bias`, if there is one, to every row of `y`, `[n, width]`, and finishes the row while it is in
/// the caches. To the last bit what one operation after the other gives.
///
/// ```
/// use phi3_kernels::{Finish, finish_rows};
/// let mut y = [1.0, 2.0, 3.0, 4.0];
/// finish_rows(&mut y, 2, Some(&[10.0, 20.0]), Finish::Add(&[100.0, 200.0, 300.0, 400.0]));
/// assert_eq!(y, [111.0, 222.0, 313.0, 424.0]);
/// ```
///
/// # Panics
/// When `y` is not a whole number of rows, the bias not one row, or what is to be added not as long as
/// `y`.
pub fn finish_rows(y: &mut [f32], width: usize, bias: Option<&[f32]>, finish: Finish<'_>) {
    let found = y.len();
    assert!(
        found.checked_rem(width).unwrap_or(found) == 0,
        "finish_rows: {found} elements are no rows of {width}"
    );
    if let Some(bias) = bias {
        let found = bias.len();
        assert!(
            found == width,
            "finish_rows: a bias of {found} for rows of {width}"
        );
    }
    if let Finish::Add(terms) = finish {
        let terms = terms.len();
        assert!(
            terms == found,
            "finish_rows: {terms} terms for {found} elements"
        );
    }
    let work = match (bias, finish) {
        (None, Finish::Nothing) => return,
        (_, Finish::QuickGelu) => found.saturating_mul(EXP_WORK),
        _ => found,
    };
    let backend = dispatch::backend();
    threads::for_each_part(y, width, work, |first, y| {
        for (row, y) in (first..).zip(y.chunks_exact_mut(width)) {
            if let Some(bias) = bias {
                add(y, bias);
            }
            match finish {
                Finish::Nothing => {}
                Finish::QuickGelu => backend.quick_gelu(y),
                Finish::Add(terms) => add(y, &terms[row * width..][..width]),
            }
        }
    });
}

fn add(y: &mut [f32], terms: &[f32]) {
    for (y, term) in y.iter_mut().zip(terms) {
        *y += term;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quick_gelu;
    use crate::testing::Random;

    /// Rows enough for several threads, and of a width that is no whole number of vectors.
    #[test]
    fn one_pass_is_what_the_operations_give_one_by_one() {
        let mut random = Random(3);
        let (n, width) = (211, 331);
        let (y, terms) = (random.units(n * width), random.units(n * width));
        let bias = random.units(width);
        let with_bias: Vec<f32> = y
            .iter()
            .zip(bias.iter().cycle())
            .map(|(y, b)| y + b)
            .collect();
        let finished = |bias, finish| {
            let mut y = y.clone();
            finish_rows(&mut y, width, bias, finish);
            y
        };
        assert_eq!(finished(None, Finish::Nothing), y);
        assert_eq!(finished(Some(&bias), Finish::Nothing), with_bias);
        let sums = |y: &[f32]| -> Vec<f32> { y.iter().zip(&terms).map(|(y, t)| y + t).collect() };
        assert_eq!(finished(None, Finish::Add(&terms)), sums(&y));
        assert_eq!(finished(Some(&bias), Finish::Add(&terms)), sums(&with_bias));
        let mut activated = vec![0.0; n * width];
        quick_gelu(&with_bias, &mut activated);
        assert_eq!(finished(Some(&bias), Finish::QuickGelu), activated);
        finish_rows(&mut [], 0, Some(&[]), Finish::QuickGelu);
    }

    #[test]
    #[should_panic(expected = "3 terms for 4 elements")]
    fn every_output_has_its_term() {
        finish_rows(&mut [0.0; 4], 2, None, Finish::Add(&[0.0; 3]));
    }
}
