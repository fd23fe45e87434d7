//! Heads taken out of the rows of a projection, and rotated.

use crate::{scalar, threads};

/// Which heads are taken out of a row, in the order that they get.
#[derive(Clone, Copy, Debug)]
pub struct Heads<'a> {
    /// Elements of a head.
    pub head_dim: usize,
    /// Heads of a row, those that are not taken included.
    pub in_row: usize,
    /// The number of each that is taken, counted from the start of a row.
    pub taken: &'a [usize],
}

/// Rotary position embedding: the angles of every row.
#[derive(Clone, Copy, Debug)]
pub struct Rotation<'a> {
    /// Cosines `[n, half]`, with whatever factor the rope variant puts on them.
    pub cos: &'a [f32],
    /// Sines, likewise.
    pub sin: &'a [f32],
    /// Pairs of a head that are rotated.
    pub half: usize,
}

/// Takes heads out of the rows of `x`, `[n, in_row * head_dim]`, to `out`, `[n, taken, head_dim]`, and
/// rotates them if there is a `rotation`.
///
/// The layout of pairs is that of GPT-NeoX (`rotate_half`): in every head, `(x[j], x[j + half])` is
/// rotated by the angle whose cosine and sine are `cos[t, j]` and `sin[t, j]`; elements from `2 * half`
/// on stay as they are.
///
/// # Panics
/// When `2 * half` is larger than `head_dim`, a head is not in the row, or the lengths do not fit one n.
pub fn take_heads(x: &[f32], heads: Heads<'_>, rotation: Option<Rotation<'_>>, out: &mut [f32]) {
    let Heads {
        head_dim,
        in_row,
        taken,
    } = heads;
    let (row, width) = (in_row * head_dim, taken.len() * head_dim);
    let n = x.len().checked_div(row).unwrap_or(0);
    assert!(
        n * row == x.len() && n * width == out.len(),
        "heads: {} elements are no {n} rows of {row}, or {} none of {width}",
        x.len(),
        out.len()
    );
    assert!(
        taken.iter().all(|head| *head < in_row),
        "heads: {taken:?} of {in_row}"
    );
    let half = rotation.map_or(0, |rotation| rotation.half);
    assert!(
        half <= head_dim / 2,
        "rope: two halves of {half} do not fit a head of {head_dim}"
    );
    let angles = rotation.map(|rotation| [rotation.cos, rotation.sin]);
    for angles in angles.iter().flatten() {
        assert!(
            angles.len() == n * half,
            "rope: {} angles; expected {n} rows of {half}",
            angles.len()
        );
    }
    let work = out.len().saturating_mul(2);
    threads::for_each_part(out, width, work, |first, out| {
        for (t, out) in (first..).zip(out.chunks_exact_mut(width)) {
            let x = &x[t * row..][..row];
            for (head, out) in taken.iter().zip(out.chunks_exact_mut(head_dim)) {
                out.copy_from_slice(&x[head * head_dim..][..head_dim]);
                if let Some([cos, sin]) = angles {
                    let own = t * half..(t + 1) * half;
                    scalar::rope_head(out, &cos[own.clone()], &sin[own]);
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADS: Heads<'_> = Heads {
        head_dim: 2,
        in_row: 3,
        taken: &[2, 0],
    };

    #[test]
    fn heads_come_in_the_order_that_is_asked_for() {
        let x: Vec<f32> = (0u8..12).map(f32::from).collect();
        let mut out = [0.0; 8];
        take_heads(&x, HEADS, None, &mut out);
        assert_eq!(out, [4.0, 5.0, 0.0, 1.0, 10.0, 11.0, 6.0, 7.0]);
        // A quarter turn in the first row, none in the second.
        let quarter = Rotation {
            cos: &[0.0, 1.0],
            sin: &[1.0, 0.0],
            half: 1,
        };
        take_heads(&x, HEADS, Some(quarter), &mut out);
        assert_eq!(out, [-5.0, 4.0, -1.0, 0.0, 10.0, 11.0, 6.0, 7.0]);
        take_heads(&[], HEADS, None, &mut []);
        let none = Heads {
            taken: &[],
            ..HEADS
        };
        take_heads(&x, none, Some(quarter), &mut []);
    }

    #[test]
    #[should_panic(expected = "heads: [2, 0] of 2")]
    fn a_head_that_is_not_there_panics() {
        let heads = Heads { in_row: 2, ..HEADS };
        take_heads(&[0.0; 4], heads, None, &mut [0.0; 4]);
    }
}
