//! The tokens that several matrices multiply, quantized once for all of them.

use std::borrow::Cow;
use std::cell::Cell;
use std::sync::OnceLock;

use crate::backend::{Kernels, Tokens};
use crate::{BlockType, dispatch, threads};

/// Activations that share a scale where weights come in blocks of 32: the groups of ggml's Q8_0.
/// A group as long as the weights' block needs no further scale inside the block.
pub(crate) const BLOCK_GROUP: usize = 32;

/// Activations that share a scale where weights come in blocks of 256: the groups of ggml's
/// Q8_K. The sums inside a block then stay integers, scales of the block's parts included.
pub(crate) const SUPERBLOCK_GROUP: usize = 256;

/// Quantized activations whose sum is kept, because offsets and minima of weights multiply it:
/// the shortest group of weights with a factor of its own.
pub(crate) const SUM_GROUP: usize = 16;

/// Largest magnitude of a quantized activation.
pub(crate) const MAX_QUANTIZED: f32 = 127.0;

/// Tokens shorter than this stay f32 for quantized weights too. Models this narrow are fast enough
/// without eight bits, and small ones often decide between close calls: SmolLM2-135M (576 wide)
/// chooses the reference's token at all of 287 positions with f32 activations and at some 282 with
/// eight-bit ones. The narrowest checkpoint of the family is 3072 wide. The rule looks at nothing
/// but the width, so that one token, many, and every matrix of a layer go the same way.
pub const MIN_INT8_COLS: usize = 2048;

/// Tokens `[n, cols]` that matrices multiply ([`linear`](crate::linear)).
///
/// Matrices of quantized weights read them as eight-bit integers. That form is made when the
/// first such matrix asks for it, and kept: one value for every matrix, or part of one, that
/// reads the same input.
#[derive(Debug)]
pub struct Activations<'a> {
    x: Cow<'a, [f32]>,
    n: usize,
    cols: usize,
    by_block: OnceLock<Quantized>,
    by_superblock: OnceLock<Quantized>,
    /// [`Tokens::blocks`].
    by_columns: OnceLock<Vec<f32>>,
}

impl<'a> Activations<'a> {
    /// `n` tokens of `cols` elements.
    ///
    /// # Panics
    /// When `x` is not `n * cols` long.
    pub fn new(x: &'a [f32], n: usize, cols: usize) -> Self {
        assert!(
            n.checked_mul(cols) == Some(x.len()),
            "activations have {} elements; expected {n} tokens of {cols}",
            x.len()
        );
        Self {
            x: Cow::Borrowed(x),
            n,
            cols,
            by_block: OnceLock::new(),
            by_superblock: OnceLock::new(),
            by_columns: OnceLock::new(),
        }
    }

    /// The tokens as they were given.
    pub fn values(&self) -> &[f32] {
        &self.x
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.n
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.n == 0
    }

    /// Elements of a token.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The tokens `rows`, in that order, with the eight-bit forms that weights of `block_types` multiply:
    /// made of the whole at most once, and then copied, so that a token that several experts take is
    /// rounded once.
    ///
    /// # Panics
    /// When a row is not among the tokens.
    pub fn select(
        &self,
        rows: &[u32],
        block_types: impl IntoIterator<Item = BlockType>,
    ) -> Activations<'static> {
        for block_type in block_types {
            self.quantized(block_type);
        }
        let form = |form: &OnceLock<Quantized>| match form.get() {
            Some(form) => OnceLock::from(form.select(rows)),
            None => OnceLock::new(),
        };
        Activations {
            x: Cow::Owned(select(&self.x, self.cols, rows)),
            n: rows.len(),
            cols: self.cols,
            by_block: form(&self.by_block),
            by_superblock: form(&self.by_superblock),
            by_columns: OnceLock::new(),
        }
    }

    /// The form that weights of `block_type` multiply; `None` where they multiply f32: float types
    /// and rows shorter than [`MIN_INT8_COLS`].
    pub(crate) fn quantized(&self, block_type: BlockType) -> Option<&Quantized> {
        if self.cols < MIN_INT8_COLS {
            return None;
        }
        let (form, group) = match block_type.block_len() {
            BLOCK_GROUP => (&self.by_block, BLOCK_GROUP),
            SUPERBLOCK_GROUP => (&self.by_superblock, SUPERBLOCK_GROUP),
            _ => return None,
        };
        Some(form.get_or_init(|| Quantized::new(&self.x, self.n, self.cols, group)))
    }

    /// The tokens as `backend`, always the same one, multiplies them in f32 with weights of a type.
    pub(crate) fn tokens(&self, backend: &dyn Kernels, block_type: BlockType) -> Tokens<'_> {
        let blocks = backend.column_block(self.n, block_type).map(|block| {
            let made = || column_blocks(&self.x, self.n, self.cols, block);
            self.by_columns.get_or_init(made).as_slice()
        });
        Tokens {
            values: &self.x,
            blocks,
        }
    }
}

impl Drop for Activations<'_> {
    fn drop(&mut self) {
        if let Some(blocks) = self.by_columns.take()
            && blocks.len() <= BLOCKS_KEPT
        {
            BLOCKS.set(blocks);
        }
    }
}

/// Elements of [`BLOCKS`] that a thread keeps: 40 MiB, enough for 1024 tokens of any model of the family.
const BLOCKS_KEPT: usize = 10 << 20;

thread_local! {
    /// What the last activations' [`Tokens::blocks`] lay in, so that those of the next need not be asked of
    /// the system, nor cleared.
    static BLOCKS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// [`Tokens::blocks`] of `x`, `[n, cols]`.
fn column_blocks(x: &[f32], n: usize, cols: usize, block: usize) -> Vec<f32> {
    let mut blocks = BLOCKS.take();
    blocks.resize(cols.div_ceil(block) * n * block, 0.0);
    let work = blocks.len();
    threads::for_each_part(&mut blocks, block, work, |first, part| {
        for (i, part) in (first..).zip(part.chunks_exact_mut(block)) {
            let (first_col, t) = (i / n * block, i % n);
            let some = block.min(cols - first_col);
            let (values, padding) = part.split_at_mut(some);
            values.copy_from_slice(&x[t * cols + first_col..][..some]);
            padding.fill(0.0);
        }
    });
    blocks
}

/// What a number that is rounded takes, in multiply-adds.
const WORK_OF_A_NUMBER: usize = 2;

/// Tokens as eight-bit integers with a scale for each group of elements:
/// `x[t, c] ≈ scales[t, c / group] * values[t, c]`.
#[derive(Debug)]
pub(crate) struct Quantized {
    /// Elements that share a scale.
    pub(crate) group: usize,
    /// Number of tokens.
    pub(crate) n: usize,
    /// Elements of a token, a multiple of `group`.
    pub(crate) cols: usize,
    /// `[n, cols]`, from -127 to 127.
    pub(crate) values: Vec<i8>,
    /// `[n, cols / group]`.
    pub(crate) scales: Vec<f32>,
    /// `[n, cols / SUM_GROUP]`, sums of `values`.
    pub(crate) sums: Vec<i16>,
    /// The same once more, as the backend in use reads them fastest.
    #[cfg(target_arch = "x86_64")]
    pub(crate) avx2: crate::x86_64::Layouts,
}

impl Quantized {
    /// Quantizes `[n, cols]` in groups of `group`, a multiple of `SUM_GROUP` that divides `cols`.
    pub(crate) fn new(x: &[f32], n: usize, cols: usize, group: usize) -> Self {
        let mut quantized = Self {
            group,
            n,
            cols,
            values: vec![0; n * cols],
            scales: vec![0.0; n * cols / group],
            sums: vec![0; n * cols / SUM_GROUP],
            #[cfg(target_arch = "x86_64")]
            avx2: crate::x86_64::Layouts::default(),
        };
        if x.is_empty() {
            return quantized;
        }
        let backend = dispatch::backend();
        let groups = threads::chunk_len(n * cols / group, WORK_OF_A_NUMBER * x.len());
        if groups * group >= x.len() {
            let (values, scales) = (&mut quantized.values, &mut quantized.scales);
            backend.quantize(x, group, values, scales, &mut quantized.sums);
        } else {
            let parts = x
                .chunks(groups * group)
                .zip(quantized.values.chunks_mut(groups * group))
                .zip(quantized.scales.chunks_mut(groups))
                .zip(quantized.sums.chunks_mut(groups * group / SUM_GROUP));
            threads::for_each(&mut parts.collect::<Vec<_>>(), |_, part| {
                let (((x, values), scales), sums) = part;
                backend.quantize(x, group, values, scales, sums);
            });
        }
        quantized
    }

    /// The tokens `rows`.
    fn select(&self, rows: &[u32]) -> Self {
        Self {
            group: self.group,
            n: rows.len(),
            cols: self.cols,
            values: select(&self.values, self.cols, rows),
            scales: select(&self.scales, self.groups(), rows),
            sums: select(&self.sums, self.cols / SUM_GROUP, rows),
            #[cfg(target_arch = "x86_64")]
            avx2: crate::x86_64::Layouts::default(),
        }
    }

    /// Groups of a token.
    pub(crate) fn groups(&self) -> usize {
        self.cols / self.group
    }
}

/// The rows `rows` of `[n, cols]`, in that order.
fn select<T: Copy>(from: &[T], cols: usize, rows: &[u32]) -> Vec<T> {
    let mut selected = Vec::with_capacity(rows.len() * cols);
    for &row in rows {
        let start = row as usize * cols;
        selected.extend_from_slice(&from[start..start + cols]);
    }
    selected
}
