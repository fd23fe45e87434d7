//! The tokens still in the running at one step.

use std::cmp::Ordering;

/// Tokens with their logits, and how far they are in order.
///
/// A vocabulary has up to 200,000 entries and a nucleus usually some dozens of them, so nothing is
/// sorted but what is looked at: the first `sorted` entries are the most likely ones in order, the
/// rest is unordered and less likely.
#[derive(Clone, Debug, Default)]
pub(super) struct Candidates {
    /// Logit divided by the temperature, and id.
    entries: Vec<(f32, u32)>,
    sorted: usize,
}

/// Most likely first, of equal ones the lower id first.
fn order(a: &(f32, u32), b: &(f32, u32)) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

impl Candidates {
    /// Takes all tokens whose logit is above minus infinity.
    pub(super) fn fill(&mut self, logits: &[f32], temperature: f32) {
        self.sorted = 0;
        self.entries.clear();
        // Adding 0 turns -0 into 0: equal logits must compare equal.
        let entries = (0u32..)
            .zip(logits)
            .filter(|(_, logit)| **logit > f32::NEG_INFINITY)
            .map(|(id, &logit)| (logit / temperature + 0.0, id));
        self.entries.extend(entries);
        // A tiny temperature may push logits out of range: what is highest then is all there is.
        let overflowed = |entry: &(f32, u32)| entry.0.is_infinite() || entry.0.is_nan();
        if self.entries.iter().any(overflowed) {
            self.rescale(logits, temperature);
        }
    }

    /// As `fill`, with the highest logit moved to 0 before the division.
    fn rescale(&mut self, logits: &[f32], temperature: f32) {
        let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        self.entries.clear();
        let entries = (0u32..)
            .zip(logits)
            .filter(|(_, logit)| **logit > f32::NEG_INFINITY)
            .map(|(id, &logit)| {
                let below = (f64::from(logit) - f64::from(highest)) / f64::from(temperature);
                (below.max(f64::from(f32::MIN)) as f32 + 0.0, id)
            });
        self.entries.extend(entries);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Keeps the `count` most likely.
    pub(super) fn keep_top(&mut self, count: usize) {
        self.sort_first(count);
        self.entries.truncate(count);
    }

    /// Keeps the fewest most likely ones whose probabilities reach `mass`.
    pub(super) fn keep_mass(&mut self, mass: f64) {
        let highest = self.highest();
        let total: f64 = self
            .entries
            .iter()
            .map(|entry| weight(entry, highest))
            .sum();
        let mut sum = 0.0;
        let mut kept = 0;
        let mut look_at = 64;
        while kept < self.entries.len() && sum < mass * total {
            if kept == self.sorted {
                self.sort_first(look_at);
                look_at *= 8;
            }
            if let Some(entry) = self.entries.get(kept) {
                sum += weight(entry, highest);
            }
            kept += 1;
        }
        self.entries.truncate(kept.max(1));
        self.sorted = self.sorted.min(self.entries.len());
    }

    /// Keeps those at least `ratio` times as likely as the most likely.
    pub(super) fn keep_likely(&mut self, ratio: f64) {
        let highest = self.highest();
        let before = self.sorted;
        let mut index = 0;
        let mut sorted = 0;
        self.entries.retain(|entry| {
            let kept = weight(entry, highest) >= ratio;
            sorted += usize::from(kept && index < before);
            index += 1;
            kept
        });
        self.sorted = sorted;
    }

    /// The token at which the running sum of probabilities passes `draw`, in [0, 1).
    pub(super) fn pick(&self, draw: f64) -> Option<u32> {
        let highest = self.highest();
        let total: f64 = self
            .entries
            .iter()
            .map(|entry| weight(entry, highest))
            .sum();
        let mut left = draw * total;
        let mut last = None;
        for entry in &self.entries {
            let weight = weight(entry, highest);
            if weight > 0.0 {
                last = Some(entry.1);
                if left < weight {
                    break;
                }
            }
            left -= weight;
        }
        last
    }

    /// All of them in order, after `keep_top`.
    pub(super) fn sorted(&self) -> impl Iterator<Item = (u32, f32)> + '_ {
        self.entries.iter().map(|&(logit, id)| (id, logit))
    }

    /// Brings the `count` most likely to the front, in order.
    fn sort_first(&mut self, count: usize) {
        let count = count.min(self.entries.len());
        if count <= self.sorted {
            return;
        }
        let Some(rest) = self.entries.get_mut(self.sorted..) else {
            return;
        };
        let more = count - self.sorted;
        if more < rest.len() {
            rest.select_nth_unstable_by(more, order);
        }
        if let Some(front) = rest.get_mut(..more) {
            front.sort_unstable_by(order);
        }
        self.sorted = count;
    }

    fn highest(&self) -> f32 {
        let front = self.entries.first().filter(|_| self.sorted > 0);
        front.map_or_else(
            || {
                let logits = self.entries.iter().map(|entry| entry.0);
                logits.fold(f32::NEG_INFINITY, f32::max)
            },
            |entry| entry.0,
        )
    }
}

/// Probability relative to the most likely token's.
fn weight(entry: &(f32, u32), highest: f32) -> f64 {
    (f64::from(entry.0) - f64::from(highest)).exp()
}
