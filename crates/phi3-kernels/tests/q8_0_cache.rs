//! Keys and values in eight bits.

use phi3_kernels::testing::Random;
use phi3_kernels::{
    AttentionJob, AttentionShape, BlockType, KvPage, KvPages, attend_packed, dequantize,
    f32_to_q8_0, q8_0_row_bytes,
};
use proptest::prelude::*;
use proptest::sample::select;

/// Rows of `d` numbers, stored.
fn stored(rows: &[f32], d: usize) -> Vec<u8> {
    let bytes = q8_0_row_bytes(d);
    let mut stored = vec![0; rows.len() / d * bytes];
    for (row, out) in rows.chunks(d).zip(stored.chunks_mut(bytes)) {
        f32_to_q8_0(row, out);
    }
    stored
}

/// What stored rows mean, by the format's own decoder.
fn meaning(stored: &[u8], d: usize) -> Vec<f32> {
    let mut rows = Vec::new();
    for row in stored.chunks(q8_0_row_bytes(d)) {
        let mut padded = vec![0.0; d.next_multiple_of(32)];
        dequantize(BlockType::Q8_0, row, &mut padded).expect("whole blocks");
        rows.extend_from_slice(&padded[..d]);
    }
    rows
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// The same bits as from an f32 cache that holds what the bytes mean.
    #[test]
    fn attention_reads_what_the_bytes_mean(
        d in select(vec![1usize, 8, 32, 40, 64, 96, 100, 128]),
        kv_heads in 1usize..3,
        group in 1usize..4,
        l in select(vec![1usize, 2, 5, 20, 130]),
        behind in 0usize..700,
        page_len in select(vec![7usize, 64, 256]),
        seed: u64,
    ) {
        let mut random = Random(seed);
        let (heads, len) = (kv_heads * group, l + behind);
        let q = random.units(l * heads * d);
        let pages: Vec<[Vec<f32>; 2]> = (0..len.div_ceil(page_len))
            .map(|_| [(); 2].map(|()| random.units(kv_heads * page_len * d)))
            .collect();
        let bytes: Vec<_> = pages.iter().map(|page| page.each_ref().map(|rows| stored(rows, d))).collect();
        let meant: Vec<_> = bytes.iter().map(|page| page.each_ref().map(|rows| meaning(rows, d))).collect();
        let run = |pages: KvPages<'_>| {
            let mut out = vec![f32::NAN; q.len()];
            attend_packed(&mut [AttentionJob {
                q: &q,
                out: &mut out,
                pages,
                page_heads: kv_heads,
                page_len,
                len,
                num_heads: heads,
                num_kv_heads: kv_heads,
                layout: None,
                shape: AttentionShape {
                    head_dim: d,
                    q_start: behind,
                    k_start: 0,
                    window: None,
                    scale: 1.0 / (d as f32).sqrt(),
                },
            }]);
            out
        };
        let bytes: Vec<_> = bytes.iter().map(|[keys, values]| KvPage { keys: &keys[..], values: &values[..] }).collect();
        let meant: Vec<_> = meant.iter().map(|[keys, values]| KvPage { keys: &keys[..], values: &values[..] }).collect();
        prop_assert_eq!(run(KvPages::Q8_0(&bytes)), run(KvPages::F32(&meant)));
    }

    /// At most half a step, and what the scale loses as a half, subnormal or not.
    #[test]
    fn rounding_is_to_nearest(d in 1usize..100, exponent in -3i32..4, seed: u64) {
        let scale = 10f32.powi(exponent);
        let row: Vec<f32> = Random(seed).units(d).iter().map(|v| v * scale).collect();
        let back = meaning(&stored(&row, d), d);
        for (row, back) in row.chunks(32).zip(back.chunks(32)) {
            let largest = row.iter().fold(0f32, |largest, v| largest.max(v.abs()));
            let step = largest / 127.0;
            for (x, y) in row.iter().zip(back) {
                prop_assert!((x - y).abs() <= step * 0.5 + largest / 2000.0 + 127.0 * 2f32.powi(-25), "{x} became {y}, largest {largest}");
            }
        }
    }
}

#[test]
fn what_is_not_finite_is_not_lost() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut row = [127.0; 40];
        row[3] = value;
        let back = meaning(&stored(&row, 40), 40);
        assert!(back[..32].iter().all(|v| v.is_nan()), "{value}: {back:?}");
        assert_eq!(back[32..], [127.0; 8]);
    }
    assert_eq!(meaning(&stored(&[0.0; 8], 8), 8), [0.0; 8]);
    let huge = meaning(&stored(&[f32::MAX, 0.0], 2), 2);
    assert!(huge[0].is_finite() && huge[1] == 0.0, "{huge:?}");
}
