//! Block-sparse attention against its definition in f64, on pages of which those that nobody can
//! see are absent.

use half::f16;
use phi3_kernels::testing::Random;
use phi3_kernels::{
    AttentionJob, AttentionShape, BlockSparseLayout, KvPage, KvPages, attend_packed, f32_to_f16,
    set_num_threads,
};
use proptest::prelude::*;
use proptest::sample::select;

/// Error with values up to 1 and scores up to 1; measured 2.5e-7.
const TOLERANCE: f64 = 1e-6;

struct Case {
    layout: BlockSparseLayout,
    kv_heads: usize,
    d: usize,
    /// Position of the first query.
    start: usize,
    /// Keys: those of positions from 0 on.
    len: usize,
    q: Vec<f32>,
    /// `[s, k, d]` each.
    keys: Vec<f32>,
    values: Vec<f32>,
    half: bool,
}

impl Case {
    fn random(
        layout: BlockSparseLayout,
        kv_heads: usize,
        d: usize,
        (start, l, len): (usize, usize, usize),
        half: bool,
        seed: u64,
    ) -> Self {
        let mut random = Random(seed);
        let round = |v: f32| if half { f16::from_f32(v).to_f32() } else { v };
        let mut rounded = |len| random.units(len).into_iter().map(round).collect();
        Self {
            layout,
            kv_heads,
            d,
            start,
            len,
            q: rounded(l * layout.num_heads() * d),
            keys: rounded(len * kv_heads * d),
            values: rounded(len * kv_heads * d),
            half,
        }
    }

    fn group(&self) -> usize {
        self.layout.num_heads() / self.kv_heads
    }

    /// The page of each block and key/value head; NaN where no key is.
    fn pages(&self, rows: &[f32], from: usize) -> Vec<Vec<f32>> {
        let (size, k, d) = (self.layout.block_size(), self.kv_heads, self.d);
        let mut pages = Vec::new();
        for block in 0..self.len.div_ceil(size) {
            for head in 0..k {
                let heads = head * self.group()..(head + 1) * self.group();
                let mut page = Vec::new();
                if self.layout.reaches(heads, from / size, block) {
                    page.resize(size * d, f32::NAN);
                    for j in block * size..self.len.min((block + 1) * size) {
                        page[j % size * d..][..d].copy_from_slice(&rows[(j * k + head) * d..][..d]);
                    }
                }
                pages.push(page);
            }
        }
        pages
    }

    /// The outputs of the queries from the one at `first` on, which are a call of their own.
    fn run(&self, first: usize, count: usize) -> Vec<f32> {
        let width = self.layout.num_heads() * self.d;
        let start = self.start + first;
        let (keys, values) = (
            self.pages(&self.keys, start),
            self.pages(&self.values, start),
        );
        let mut out = vec![f32::NAN; count * width];
        let mut attend = |pages: KvPages<'_>| {
            attend_packed(&mut [AttentionJob {
                q: &self.q[first * width..(first + count) * width],
                out: &mut out,
                pages,
                page_heads: 1,
                page_len: self.layout.block_size(),
                len: self.len,
                num_heads: self.layout.num_heads(),
                num_kv_heads: self.kv_heads,
                shape: AttentionShape {
                    head_dim: self.d,
                    q_start: start,
                    k_start: 0,
                    window: None,
                    scale: 1.0 / self.d as f32,
                },
                layout: Some(self.layout),
            }]);
        };
        if self.half {
            let halves = |page: &Vec<f32>| {
                let mut halves = vec![0; page.len()];
                f32_to_f16(page, &mut halves);
                halves
            };
            let keys: Vec<_> = keys.iter().map(halves).collect();
            let values: Vec<_> = values.iter().map(halves).collect();
            attend(KvPages::F16(&views(&keys, &values)));
        } else {
            attend(KvPages::F32(&views(&keys, &values)));
        }
        out
    }

    fn expected(&self) -> Vec<f64> {
        let (h, d, size) = (self.layout.num_heads(), self.d, self.layout.block_size());
        let row = |rows: &[f32], j: usize, head: usize| -> Vec<f64> {
            let row = &rows[(j * self.kv_heads + head / self.group()) * d..][..d];
            row.iter().map(|v| f64::from(*v)).collect()
        };
        let mut out = vec![0.0; self.q.len()];
        for (i, (out, q)) in out.chunks_mut(d).zip(self.q.chunks(d)).enumerate() {
            let (position, head) = (self.start + i / h, i % h);
            let mut sum = 0.0;
            for j in 0..self.len.min(position + 1) {
                if self.layout.sees(head, position / size, j / size) {
                    let key = row(&self.keys, j, head);
                    let score: f64 = q.iter().zip(key).map(|(q, k)| f64::from(*q) * k).sum();
                    let weight = (score / d as f64).exp();
                    sum += weight;
                    for (out, value) in out.iter_mut().zip(row(&self.values, j, head)) {
                        *out += weight * value;
                    }
                }
            }
            if sum > 0.0 {
                out.iter_mut().for_each(|out| *out /= sum);
            }
        }
        out
    }
}

fn views<'p, T>(keys: &'p [Vec<T>], values: &'p [Vec<T>]) -> Vec<KvPage<'p, T>> {
    let pages = keys.iter().zip(values);
    pages
        .map(|(keys, values)| KvPage { keys, values })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// All queries at once, then each piece of them alone: as defined, and the same bits.
    #[test]
    fn queries_see_the_blocks_of_their_layout(
        kv_heads in 1usize..4,
        group in 1usize..6,
        block_size in select(vec![1usize, 4, 16, 64, 100, 300]),
        local in 1usize..7,
        stride in 1usize..9,
        homogeneous: bool,
        d in select(vec![5usize, 8, 24, 64]),
        start in 0usize..700,
        l in select(vec![1usize, 3, 50, 150]),
        missing in select(vec![0usize, 0, 0, 1, 80]),
        half: bool,
        seed: u64,
    ) {
        let heads = kv_heads * group;
        let Some(layout) = BlockSparseLayout::new(heads, block_size, local, stride, homogeneous)
        else {
            return Err(TestCaseError::fail("a layout of nothing"));
        };
        // Now and then the last queries come after the last key.
        let len = (start + l).saturating_sub(missing);
        let case = Case::random(layout, kv_heads, d, (start, l, len), half, seed);
        let found = case.run(0, l);
        for (i, (found, expected)) in found.iter().zip(case.expected()).enumerate() {
            prop_assert!(
                (f64::from(*found) - expected).abs() <= TOLERANCE,
                "{layout:?} element {i}: {found}, expected {expected}"
            );
        }
        let cut = seed as usize % l;
        for (first, count) in [(0, cut), (cut, 1), (cut, l - cut)] {
            let width = heads * d;
            let alone = case.run(first, count);
            prop_assert_eq!(&alone[..], &found[first * width..][..count * width], "{:?}", layout);
        }
    }
}

/// The shape of Phi-3-small, where a token's keys are split between threads.
#[test]
fn threads_do_not_matter() {
    for (start, l) in [(4000, 1), (1990, 130)] {
        let layout = BlockSparseLayout::new(4, 64, 16, 8, false).unwrap();
        let case = Case::random(layout, 1, 128, (start, l, start + l), true, 5);
        set_num_threads(1);
        let expected = case.run(0, l);
        for threads in [2, 3] {
            set_num_threads(threads);
            assert_eq!(case.run(0, l), expected, "{threads} threads");
        }
    }
    set_num_threads(0);
}

#[test]
#[should_panic(expected = "does not fit 2 heads, pages of 4 positions")]
fn a_layout_of_other_heads_panics() {
    let layout = BlockSparseLayout::new(3, 4, 1, 2, false).unwrap();
    let page = KvPage {
        keys: &[0.0; 32][..],
        values: &[0.0; 32][..],
    };
    attend_packed(&mut [AttentionJob {
        q: &[0.0; 16],
        out: &mut [0.0; 16],
        pages: KvPages::F32(&[page]),
        page_heads: 1,
        page_len: 4,
        len: 4,
        num_heads: 2,
        num_kv_heads: 1,
        shape: AttentionShape {
            head_dim: 8,
            q_start: 0,
            k_start: 0,
            window: None,
            scale: 1.0,
        },
        layout: Some(layout),
    }]);
}
