//! Which blocks of keys a block of queries sees in block-sparse attention.
//!
//! Positions are cut into blocks of `block_size` at absolute positions. A query block r of head h
//! sees, among the key blocks c that are not after it,
//!
//! - the `num_local_blocks` nearest ones, itself included: `r - c < num_local_blocks`;
//! - every `vert_stride`-th one, however far back: `(c + offset + 1)` is a multiple of
//!   `vert_stride`, with an offset that moves from head to head, so that the heads together see
//!   everything.
//!
//! Inside a visible block a query sees the keys that are not after it. The toy example of the
//! Phi-3 report has 2 local blocks and a stride of 3. Its first three heads, queries downward,
//! keys to the right, `#` local and `|` vertical:
//!
//! ```text
//!      head 0             head 1             head 2
//! 0  # . . . . . . .    # . . . . . . .    # . . . . . . .
//! 1  # # . . . . . .    # # . . . . . .    # # . . . . . .
//! 2  . # # . . . . .    . # # . . . . .    | # # . . . . .
//! 3  . . # # . . . .    . | # # . . . .    | . # # . . . .
//! 4  . . | # # . . .    . | . # # . . .    | . . # # . . .
//! 5  . . | . # # . .    . | . . # # . .    | . . | # # . .
//! 6  . . | . . # # .    . | . . | # # .    | . . | . # # .
//! 7  . . | . . | # #    . | . . | . # #    | . . | . . # #
//! ```
//!
//! Source: Phi-3 Technical Report, arXiv:2404.14219, section 2.1, and the mask of
//! microsoft/Phi-3-small-8k-instruct.

use std::ops::Range;

/// The block-sparse pattern of all heads of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSparseLayout {
    num_heads: usize,
    block_size: usize,
    num_local_blocks: usize,
    vert_stride: usize,
    /// What a head's offset is more than that of the head before it.
    head_step: usize,
}

impl BlockSparseLayout {
    /// The pattern of `num_heads` query heads. Where there are fewer heads than `vert_stride`
    /// their offsets are spread over it; `homogeneous` gives all heads the offset 0.
    ///
    /// `None` if a number is 0.
    pub fn new(
        num_heads: usize,
        block_size: usize,
        num_local_blocks: usize,
        vert_stride: usize,
        homogeneous: bool,
    ) -> Option<Self> {
        let numbers = [num_heads, block_size, num_local_blocks, vert_stride];
        let head_step = if homogeneous {
            0
        } else {
            vert_stride.checked_div(num_heads)?.max(1)
        };
        (!numbers.contains(&0)).then_some(Self {
            num_heads,
            block_size,
            num_local_blocks,
            vert_stride,
            head_step,
        })
    }

    /// Query heads.
    pub fn num_heads(&self) -> usize {
        self.num_heads
    }

    /// Positions of a block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Nearest blocks that a query sees, its own included.
    pub fn num_local_blocks(&self) -> usize {
        self.num_local_blocks
    }

    /// Distance between the far blocks that a head sees.
    pub fn vert_stride(&self) -> usize {
        self.vert_stride
    }

    /// Whether query block `q_block` of query head `head` sees key block `k_block`.
    ///
    /// ```
    /// let layout = phi3_kernels::BlockSparseLayout::new(3, 64, 2, 3, false).unwrap();
    /// let row = |head| (0..=7).map(|c| layout.sees(head, 7, c) as u8).collect::<Vec<_>>();
    /// assert_eq!(row(0), [0, 0, 1, 0, 0, 1, 1, 1]);
    /// assert_eq!(row(1), [0, 1, 0, 0, 1, 0, 1, 1]);
    /// assert_eq!(row(2), [1, 0, 0, 1, 0, 0, 1, 1]);
    /// assert!(!layout.sees(0, 7, 8));
    /// ```
    pub fn sees(&self, head: usize, q_block: usize, k_block: usize) -> bool {
        k_block <= q_block
            && (q_block - k_block < self.num_local_blocks || self.is_vertical(head, k_block))
    }

    /// Whether `head` sees `k_block` from however far.
    pub fn is_vertical(&self, head: usize, k_block: usize) -> bool {
        k_block % self.vert_stride == self.first_vertical(head)
    }

    /// The first block that `head` sees from however far; the others follow at the stride.
    pub fn first_vertical(&self, head: usize) -> usize {
        let stride = self.vert_stride;
        // Reduced before each product, so that nothing overflows.
        let offset = (head % stride) * (self.head_step % stride) % stride;
        stride - 1 - offset
    }

    /// The blocks from which on `q_block` sees everything that is not after it.
    pub fn first_local(&self, q_block: usize) -> usize {
        q_block
            .saturating_add(1)
            .saturating_sub(self.num_local_blocks)
    }

    /// Whether a query in `q_block` or after it, of any of `heads`, sees `k_block`: a cache that
    /// these heads share may free it otherwise.
    pub fn reaches(&self, mut heads: Range<usize>, q_block: usize, k_block: usize) -> bool {
        k_block >= self.first_local(q_block) || heads.any(|head| self.is_vertical(head, k_block))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rule as it is written, without the shortcuts.
    fn rule(step: usize, local: usize, stride: usize, h: usize, r: usize, c: usize) -> bool {
        c <= r && (r - c < local || (c + h * step + 1).is_multiple_of(stride))
    }

    #[test]
    fn the_rule_holds_and_a_block_is_reachable_as_long_as_a_later_row_sees_it() {
        for (heads, local, stride) in [(4, 2, 3), (3, 1, 8), (8, 3, 4), (1, 2, 1), (2, 16, 5)] {
            for homogeneous in [false, true] {
                let layout = BlockSparseLayout::new(heads, 8, local, stride, homogeneous).unwrap();
                let step = if homogeneous {
                    0
                } else {
                    (stride / heads).max(1)
                };
                let rows = 40;
                for (r, c) in (0..rows).flat_map(|r| (0..rows).map(move |c| (r, c))) {
                    for h in 0..heads {
                        let expected = rule(step, local, stride, h, r, c);
                        assert_eq!(layout.sees(h, r, c), expected, "{layout:?} {h} {r} {c}");
                    }
                    let group = heads / 2..heads;
                    let later = (r..r + 2 * rows)
                        .any(|r| group.clone().any(|h| rule(step, local, stride, h, r, c)));
                    assert_eq!(layout.reaches(group, r, c), later, "{layout:?} {r} {c}");
                }
            }
        }
        assert_eq!(BlockSparseLayout::new(4, 0, 1, 1, false), None);
        assert_eq!(BlockSparseLayout::new(0, 1, 1, 1, false), None);
    }
}
