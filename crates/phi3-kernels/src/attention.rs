//! Attention of one head.

use std::ops::Range;

use crate::{dispatch, threads};

/// What the slices of [`attend`] mean.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Elements of a query, key or value: d.
    pub head_dim: usize,
    /// Absolute position of the first query, in tokens; the others follow one by one.
    pub q_start: usize,
    /// Absolute position of the first key, in tokens; the others follow one by one.
    pub k_start: usize,
    /// A query sees itself and the `window - 1` positions before it; `None`: all before it.
    pub window: Option<usize>,
    /// Factor on `q · k`, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
}

impl AttentionShape {
    /// Which of `s` keys query row `i` sees: key j is visible when it is not later than the
    /// query and less than `window` positions earlier.
    pub(crate) fn visible_keys(&self, i: usize, s: usize) -> Range<usize> {
        // One past the query; `attend` checked that positions do not overflow.
        let end = self.q_start + i + 1;
        let start = self.window.map_or(0, |w| end.saturating_sub(w));
        let end = end.saturating_sub(self.k_start).min(s);
        start.saturating_sub(self.k_start).min(end)..end
    }
}

/// Causal attention of one head, with an optional sliding window:
/// `out[i] = sum_j softmax_j(scale * q[i] · keys[j]) * values[j]` over the visible keys j, where
/// key j is visible to query i iff its position `k_start + j` is not after `q_start + i` and,
/// with a window, less than `window` positions before it.
///
/// `q` and `out` are `[l, head_dim]`, `keys` and `values` `[s, head_dim]`, contiguous. Scores,
/// softmax and sums are f32. A query that sees no key gets zeros. A query's result depends
/// neither on the other queries of the call nor on keys that it does not see.
///
/// # Panics
/// When `head_dim` is 0, a slice is not a whole number of rows, `q` and `out` or `keys` and
/// `values` differ in length, or a position is larger than `usize::MAX - 1`.
pub fn attend(q: &[f32], keys: &[f32], values: &[f32], shape: AttentionShape, out: &mut [f32]) {
    let d = shape.head_dim;
    assert!(d > 0, "attend: head_dim is 0");
    assert!(
        q.len() == out.len() && q.len().is_multiple_of(d),
        "attend: q has {} elements, out {}; expected the same multiple of head_dim {d}",
        q.len(),
        out.len()
    );
    assert!(
        keys.len() == values.len() && keys.len().is_multiple_of(d),
        "attend: keys have {} elements, values {}; expected the same multiple of head_dim {d}",
        keys.len(),
        values.len()
    );
    let (l, s) = (q.len() / d, keys.len() / d);
    assert!(
        shape.q_start.checked_add(l + 1).is_some() && shape.k_start.checked_add(s + 1).is_some(),
        "attend: positions from {} or {} overflow",
        shape.q_start,
        shape.k_start
    );

    let backend = dispatch::backend();
    let seen = shape.window.unwrap_or(s).min(s);
    let work = l.saturating_mul(seen).saturating_mul(2 * d);
    threads::for_each_part(out, d, work, |first, out| {
        let q = &q[first * d..][..out.len()];
        backend.attend_rows(q, keys, values, shape, first, out);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn visible_keys_follow_the_definition() {
        for q_start in 0..6 {
            for k_start in 0..6 {
                for window in [None, Some(0), Some(1), Some(3), Some(usize::MAX)] {
                    let shape = AttentionShape {
                        head_dim: 1,
                        q_start,
                        k_start,
                        window,
                        scale: 1.0,
                    };
                    for i in 0..4 {
                        let (q, s) = (q_start + i, 5);
                        let expected: Vec<usize> = (0..s)
                            .filter(|j| {
                                let k = k_start + j;
                                k <= q && window.is_none_or(|w| q - k < w)
                            })
                            .collect();
                        let found: Vec<usize> = shape.visible_keys(i, s).collect();
                        assert_eq!(found, expected, "{shape:?} row {i}");
                    }
                }
            }
        }
    }

    /// Two equal keys: the output is the mean of their values.
    #[test]
    fn equal_scores_average() {
        let shape = AttentionShape {
            head_dim: 2,
            q_start: 1,
            k_start: 0,
            window: None,
            scale: 0.5,
        };
        let mut out = [0.0; 2];
        attend(
            &[1.0, 1.0],
            &[3.0, 0.0, 0.0, 3.0],
            &[1.0, 2.0, 5.0, 10.0],
            shape,
            &mut out,
        );
        assert_eq!(out, [3.0, 6.0]);
        // Before the first key nothing is visible.
        let shape = AttentionShape {
            k_start: 2,
            ..shape
        };
        attend(&[1.0, 1.0], &[3.0, 0.0], &[1.0, 2.0], shape, &mut out);
        assert_eq!(out, [0.0, 0.0]);
    }
}
