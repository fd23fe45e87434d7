//! Attention of packed sequences against the naive f64 oracle, and the promise that a query's
//! result depends on nothing but itself and the keys that it sees.

use half::f16;
use phi3_kernels::testing::{self, Random};
use phi3_kernels::{
    AttentionJob, AttentionShape, KvPage, KvPages, attend, attend_packed, f32_to_f16,
    set_num_threads,
};
use proptest::prelude::*;
use proptest::sample::select;

/// Error with values up to 1 and scores up to 1; measured 2.4e-7, and growing with the scores.
const TOLERANCE: f64 = 1e-6;

/// One sequence, its keys and values head-major in pages.
struct Sequence {
    num_heads: usize,
    num_kv_heads: usize,
    /// Heads of a page: all of them, or as a test says.
    page_heads: usize,
    page_len: usize,
    len: usize,
    shape: AttentionShape,
    q: Vec<f32>,
    /// `[k, s, d]` each.
    keys: Vec<f32>,
    values: Vec<f32>,
    half: bool,
}

impl Sequence {
    fn random(
        (num_kv_heads, group): (usize, usize),
        (l, len): (usize, usize),
        page_len: usize,
        half: bool,
        shape: AttentionShape,
        seed: u64,
    ) -> Self {
        let mut random = Random(seed);
        let num_heads = num_kv_heads * group;
        let mut rounded = |len: usize| -> Vec<f32> {
            let round = |v: f32| if half { f16::from_f32(v).to_f32() } else { v };
            random.units(len).into_iter().map(round).collect()
        };
        let kv_len = num_kv_heads * len * shape.head_dim;
        Self {
            num_heads,
            num_kv_heads,
            page_heads: num_kv_heads,
            page_len,
            len,
            shape,
            keys: rounded(kv_len),
            values: rounded(kv_len),
            q: rounded(l * num_heads * shape.head_dim),
            half,
        }
    }

    /// `[k, s, d]` to pages of `[page_heads, page_len, d]`; NaN where no key is. Pages that no
    /// window reaches are absent.
    fn pages(&self, rows: &[f32]) -> Vec<Vec<f32>> {
        let (k, d) = (self.num_kv_heads, self.shape.head_dim);
        let per_row = k / self.page_heads;
        let page = vec![f32::NAN; self.page_heads * self.page_len * d];
        let mut pages = vec![page; self.len.div_ceil(self.page_len) * per_row];
        for head in 0..k {
            for j in 0..self.len {
                let page = j / self.page_len * per_row + head / self.page_heads;
                let to = (head % self.page_heads * self.page_len + j % self.page_len) * d;
                let from = (head * self.len + j) * d;
                pages[page][to..to + d].copy_from_slice(&rows[from..from + d]);
            }
        }
        let window = self.shape.window.unwrap_or(usize::MAX);
        let seen =
            (self.shape.q_start + 1).saturating_sub(window.saturating_add(self.shape.k_start));
        for page in &mut pages[..(seen / self.page_len).min(self.len / self.page_len) * per_row] {
            page.clear();
        }
        pages
    }

    fn with_job(&self, f: &mut dyn FnMut(AttentionJob<'_>)) {
        let (keys, values) = (self.pages(&self.keys), self.pages(&self.values));
        let mut out = vec![f32::NAN; self.q.len()];
        let job = |pages, out| AttentionJob {
            q: &self.q,
            out,
            pages,
            page_heads: self.page_heads,
            page_len: self.page_len,
            len: self.len,
            num_heads: self.num_heads,
            num_kv_heads: self.num_kv_heads,
            layout: None,
            shape: self.shape,
        };
        if self.half {
            let halves = |page: &Vec<f32>| {
                let mut halves = vec![0; page.len()];
                f32_to_f16(page, &mut halves);
                halves
            };
            let keys: Vec<Vec<u16>> = keys.iter().map(halves).collect();
            let values: Vec<Vec<u16>> = values.iter().map(halves).collect();
            let pages: Vec<_> = keys
                .iter()
                .zip(&values)
                .map(|(keys, values)| KvPage { keys, values })
                .collect();
            f(job(KvPages::F16(&pages), &mut out));
        } else {
            let pages: Vec<_> = keys
                .iter()
                .zip(&values)
                .map(|(keys, values)| KvPage { keys, values })
                .collect();
            f(job(KvPages::F32(&pages), &mut out));
        }
    }

    fn run(&self) -> Vec<f32> {
        let mut found = Vec::new();
        self.with_job(&mut |mut job| {
            attend_packed(std::slice::from_mut(&mut job));
            found = job.out.to_vec();
        });
        found
    }

    fn expected(&self) -> Vec<f64> {
        let (h, d) = (self.num_heads, self.shape.head_dim);
        let mut out = vec![0.0; self.q.len()];
        for head in 0..h {
            let kv_head = head / (h / self.num_kv_heads) * self.len * d;
            let kv = kv_head..kv_head + self.len * d;
            let rows = self.q.chunks(h * d);
            let q: Vec<f32> = rows.flat_map(|q| q[head * d..][..d].to_vec()).collect();
            let attended =
                testing::attend(&q, &self.keys[kv.clone()], &self.values[kv], self.shape);
            for (out, attended) in out.chunks_mut(h * d).zip(attended.chunks(d)) {
                out[head * d..][..d].copy_from_slice(attended);
            }
        }
        out
    }

    /// Only query `i`, and only the keys from `first` to the one behind its last visible one.
    fn alone(&self, i: usize, first: usize, page_len: usize) -> Self {
        let (h, k, d) = (self.num_heads, self.num_kv_heads, self.shape.head_dim);
        let end = (self.shape.q_start + i + 1).saturating_sub(self.shape.k_start);
        let end = end.min(self.len).max(first);
        let cut = |rows: &[f32]| -> Vec<f32> {
            let heads = (0..k).map(|head| &rows[(head * self.len + first) * d..]);
            heads
                .flat_map(|head| head[..(end - first) * d].to_vec())
                .collect()
        };
        Self {
            shape: AttentionShape {
                q_start: self.shape.q_start + i,
                k_start: self.shape.k_start + first,
                ..self.shape
            },
            q: self.q[i * h * d..(i + 1) * h * d].to_vec(),
            keys: cut(&self.keys),
            values: cut(&self.values),
            len: end - first,
            page_heads: 1,
            page_len,
            num_heads: h,
            num_kv_heads: k,
            half: self.half,
        }
    }
}

fn shape(head_dim: usize, q_start: usize, k_start: usize, window: Option<usize>) -> AttentionShape {
    AttentionShape {
        head_dim,
        q_start,
        k_start,
        window,
        scale: 1.0 / (head_dim as f32).sqrt(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn packed_attention_is_softmax_of_visible_keys(
        head_dim in select(vec![1usize, 5, 8, 12, 40, 64, 80, 96, 100, 128]),
        kv_heads in 1usize..4,
        group in select(vec![1usize, 2, 3, 4, 5, 8]),
        l in 0usize..40,
        behind in 0usize..700,
        k_start in 0usize..600,
        page_len in select(vec![1usize, 7, 16, 64, 256, 1000]),
        paged_by_head: bool,
        window in proptest::option::of(select(vec![0usize, 1, 30, 64, 257, 400])),
        half: bool,
        sharpness in select(vec![1.0f32, 50.0]),
        seed: u64,
    ) {
        // Queries stand at the end of the keys, as in a model, or now and then a little off.
        let len = l + behind;
        let shift = if seed.is_multiple_of(4) { seed as usize % 50 } else { 0 };
        let mut shape = shape(head_dim, k_start + behind + shift, k_start, window);
        shape.scale *= sharpness;
        let mut sequence =
            Sequence::random((kv_heads, group), (l, len), page_len, half, shape, seed);
        if paged_by_head {
            sequence.page_heads = 1;
        }
        let found = sequence.run();
        let tolerance = TOLERANCE * f64::from(sharpness);
        for (i, (found, expected)) in found.iter().zip(sequence.expected()).enumerate() {
            prop_assert!(
                (f64::from(*found) - expected).abs() <= tolerance,
                "{shape:?} element {i}: {found}, expected {expected}"
            );
        }
    }
}

/// Alone, among others, behind other pages, without the keys it does not see, on any number of
/// threads: the same bits.
#[test]
fn a_query_depends_on_nothing_but_what_it_sees() {
    // (head_dim, kv heads, group, queries, keys before them, window, half): a prompt, several
    // tokens, one token whose keys are split between threads, a window, an odd width.
    let cases = [
        (96, 2, 1, 130, 700, None, true),
        (64, 1, 4, 5, 3000, None, true),
        (128, 1, 1, 1, 9000, None, true),
        (96, 1, 1, 3, 9000, None, false),
        (80, 2, 2, 150, 300, Some(270), true),
        (64, 2, 3, 140, 400, Some(100), false),
        (5, 1, 2, 60, 500, None, true),
    ];
    for (head_dim, kv_heads, group, l, behind, window, half) in cases {
        let shape = shape(head_dim, 50 + behind, 50, window);
        let sequence = Sequence::random(
            (kv_heads, group),
            (l, l + behind),
            256,
            half,
            shape,
            l as u64,
        );
        set_num_threads(1);
        let together = sequence.run();
        for threads in [2, 3] {
            set_num_threads(threads);
            assert_eq!(sequence.run(), together, "{threads} threads {shape:?}");
        }
        let width = sequence.num_heads * head_dim;
        for i in (0..l).step_by(if l > 20 { 17 } else { 1 }) {
            let seen = window.map_or(0, |w| (behind + i + 1).saturating_sub(w));
            for (first, page_len) in [(0, 64), (seen, 256), (seen, 100)] {
                let alone = sequence.alone(i, first, page_len).run();
                assert_eq!(alone, together[i * width..][..width], "query {i} {shape:?}");
            }
        }
    }
    set_num_threads(0);
}

/// Sequences of different length, width of group and element type in one call.
#[test]
fn sequences_attend_together_as_alone() {
    let sequences: Vec<Sequence> = [
        ((2, 3), (1, 900), 256, true, shape(96, 899, 0, None)),
        ((2, 3), (70, 70), 256, false, shape(96, 0, 0, None)),
        ((1, 1), (0, 10), 16, false, shape(8, 10, 0, None)),
        ((4, 2), (3, 500), 64, true, shape(40, 497, 0, Some(90))),
    ]
    .into_iter()
    .zip(1..)
    .map(|((heads, rows, page_len, half, shape), seed)| {
        Sequence::random(heads, rows, page_len, half, shape, seed)
    })
    .collect();
    let expected: Vec<Vec<f32>> = sequences.iter().map(Sequence::run).collect();
    sequences[0].with_job(&mut |a| {
        sequences[1].with_job(&mut |b| {
            sequences[2].with_job(&mut |c| {
                sequences[3].with_job(&mut |d| {
                    // Reborrowed, to give the four jobs one lifetime.
                    let mut jobs = [shorter(&a), shorter(&b), shorter(&c), shorter(&d)];
                    let mut outs: Vec<Vec<f32>> =
                        jobs.iter().map(|job| vec![f32::NAN; job.q.len()]).collect();
                    for (job, out) in jobs.iter_mut().zip(&mut outs) {
                        job.out = out;
                    }
                    attend_packed(&mut jobs);
                    assert_eq!(outs, expected);
                });
            });
        });
    });
}

fn shorter<'s>(job: &'s AttentionJob<'_>) -> AttentionJob<'s> {
    AttentionJob {
        q: job.q,
        out: &mut [],
        pages: job.pages,
        ..*job
    }
}

/// What is not finite in keys that a query does not see does not reach it; in a key that it sees
/// it does.
#[test]
fn hidden_keys_do_not_leak() {
    for half in [false, true] {
        for (l, group) in [(20, 1), (7, 3), (2, 1)] {
            let shape = shape(16, 300, 0, Some(290));
            let mut sequence = Sequence::random((1, group), (l, 300 + l), 256, half, shape, 9);
            let clean = sequence.run();
            // The first key, which the window of no query reaches, and the last one's own.
            for value in [f32::NAN, f32::INFINITY] {
                for j in [0, 299 + l] {
                    sequence.keys[j * 16..][..16].fill(value);
                    sequence.values[j * 16..][..16].fill(value);
                }
                let found = sequence.run();
                let width = group * 16;
                let last = (l - 1) * width;
                assert_eq!(found[..last], clean[..last], "{l} queries, half {half}");
                assert!(found[last..].iter().all(|v| v.is_nan()), "{l} queries");
            }
        }
    }
}

#[test]
fn no_query_or_no_key_is_no_panic() {
    let shape = shape(8, 3, 0, None);
    let mut out = [7.0; 16];
    attend(&[1.0; 16], &[], &[], shape, &mut out);
    assert_eq!(out, [0.0; 16]);
    attend(&[], &[1.0; 8], &[1.0; 8], shape, &mut []);
    attend_packed(&mut []);
}

#[test]
#[should_panic(expected = "attend: 3 query heads cannot share 2 key/value heads")]
fn heads_that_do_not_divide_panic() {
    let sequence = Sequence::random((1, 1), (1, 1), 1, false, shape(8, 0, 0, None), 1);
    sequence.with_job(&mut |mut job| {
        (job.num_heads, job.num_kv_heads) = (3, 2);
        attend_packed(std::slice::from_mut(&mut job));
    });
}

#[test]
#[should_panic(expected = "attend: 2 keys in 1 pages of 1")]
fn more_keys_than_pages_panic() {
    let sequence = Sequence::random((1, 1), (1, 1), 1, false, shape(8, 0, 0, None), 1);
    sequence.with_job(&mut |mut job| {
        job.len = 2;
        attend_packed(std::slice::from_mut(&mut job));
    });
}

#[test]
#[should_panic(expected = "out of range")]
fn a_query_that_sees_an_absent_page_panics() {
    let page = [1.0; 40];
    let (absent, present) = (&[][..], &page[..]);
    let pages = [absent, present].map(|page| KvPage {
        keys: page,
        values: page,
    });
    attend_packed(&mut [AttentionJob {
        q: &[1.0; 8],
        out: &mut [0.0; 8],
        pages: KvPages::F32(&pages),
        page_heads: 1,
        page_len: 5,
        len: 10,
        num_heads: 1,
        num_kv_heads: 1,
        layout: None,
        shape: shape(8, 9, 0, None),
    }]);
}
