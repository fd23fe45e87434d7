use super::*;
use crate::cache_type::CacheStore;
use crate::kv_cache::Recompute;

const HEADS: usize = 2;
const D: usize = 3;

fn layer(pattern: AttentionPattern) -> LayerPages {
    let spec = CacheSpec {
        patterns: vec![pattern],
        num_key_value_heads: HEADS,
        head_dim: D,
        rope_limit: None,
        recompute: Recompute::Always,
        max_len: usize::MAX,
        store: CacheStore::Pages(CacheType::F32),
    };
    LayerPages::new(&spec, pattern, CacheType::F32)
}

/// Rows that tell position, head and column.
fn rows(positions: std::ops::Range<usize>, sign: f32) -> Vec<f32> {
    let row = |position| (0..HEADS * D).map(move |i| sign * (position * 10 + i) as f32);
    positions.flat_map(row).collect()
}

fn append(layer: &mut LayerPages, positions: std::ops::Range<usize>) -> Result<()> {
    let (keys, values) = (rows(positions.clone(), 1.0), rows(positions.clone(), -1.0));
    layer.append(positions.start, &keys, &values)
}

fn key(layer: &LayerPages, position: usize, head: usize) -> Option<Vec<f32>> {
    let PageViews::F32(pages) = layer.view() else {
        return None;
    };
    let page = pages.get(position / PAGE_LEN)?;
    let start = (head * PAGE_LEN + position % PAGE_LEN) * D;
    let (key, value) = (
        page.keys.get(start..start + D)?,
        page.values.get(start..start + D)?,
    );
    assert!(key.iter().zip(value).all(|(key, value)| *key == -value));
    Some(key.to_vec())
}

#[test]
fn rows_lie_head_major_in_pages() -> Result<()> {
    let mut layer = layer(AttentionPattern::Causal);
    for range in [0..1, 1..300, 300..301, 301..1000] {
        append(&mut layer, range)?;
    }
    for position in 0..1000 {
        for head in 0..HEADS {
            let expected = &rows(position..position + 1, 1.0)[head * D..][..D];
            assert_eq!(key(&layer, position, head).as_deref(), Some(expected));
        }
    }
    Ok(())
}

#[test]
fn clones_share_pages_until_they_write() -> Result<()> {
    let mut one = layer(AttentionPattern::Causal);
    append(&mut one, 0..300)?;
    let mut two = one.clone();
    let same = |a: &LayerPages, b: &LayerPages, page: usize| {
        let (PageViews::F32(a), PageViews::F32(b)) = (a.view(), b.view()) else {
            return false;
        };
        std::ptr::eq(a[page].keys, b[page].keys)
    };
    assert!(same(&one, &two, 0) && same(&one, &two, 1));
    assert!(!same(&one, &one.unshared(), 0));
    two.append(299, &[7.0; HEADS * D], &[-7.0; HEADS * D])?;
    assert!(same(&one, &two, 0) && !same(&one, &two, 1));
    assert_eq!(key(&two, 299, 1), Some(vec![7.0; D]));
    assert_eq!(
        key(&one, 299, 0).as_deref(),
        Some(&rows(299..300, 1.0)[..D])
    );
    assert_eq!(key(&two, 298, 0), key(&one, 298, 0));
    Ok(())
}

#[test]
fn a_window_frees_whole_pages_and_keeps_what_it_reaches() -> Result<()> {
    let pattern = AttentionPattern::SlidingWindow(100);
    let mut layer = layer(pattern);
    for position in 0..1000 {
        append(&mut layer, position..position + 1)?;
        let len = position + 1;
        let first = pattern.first_reachable(len);
        layer.drop_unreachable(pattern, len);
        let held = PageShape::of(pattern, HEADS).rows_held(pattern, HEADS, len);
        let bytes = held * D * 2 * size_of::<f32>();
        assert_eq!(layer.size_in_bytes(), bytes, "{len}");
        assert!(!layer.lacks(pattern, len));
        assert_eq!(layer.lacks(pattern, 10), first >= 256);
        assert!((first..len).all(|position| key(&layer, position, 0).is_some()));
    }
    assert_eq!(key(&layer, 700, 0), None);
    // What is gone cannot be written again, nor behind a gap.
    assert!(append(&mut layer, 700..701).is_err());
    assert!(append(&mut layer, 1001..1002).is_err());
    Ok(())
}

/// After every token exactly the pages are there that a later query of their head's group
/// reaches, and they hold what was written.
#[test]
fn a_sparse_layer_holds_the_blocks_that_can_be_reached() -> Result<()> {
    const BLOCK: usize = 4;
    for (num_heads, local, stride, homogeneous) in [
        (4, 3, 8, false),
        (2, 2, 3, false),
        (6, 1, 4, false),
        (8, 2, 5, true),
        (4, 2, 1, false),
    ] {
        let layout = BlockSparseLayout::new(num_heads, BLOCK, local, stride, homogeneous)
            .ok_or_else(|| Error::Batch("a layout".to_owned()))?;
        let pattern = AttentionPattern::BlockSparse(layout);
        let shape = PageShape::of(pattern, HEADS);
        let mut layer = layer(pattern);
        for len in 1..200 {
            append(&mut layer, len - 1..len)?;
            layer.drop_unreachable(pattern, len);
            let PageViews::F32(pages) = layer.view() else {
                return Err(Error::Batch("pages".to_owned()));
            };
            assert_eq!(pages.len(), len.div_ceil(BLOCK) * HEADS);
            for (entry, page) in pages.iter().enumerate() {
                let (block, kv_head) = (entry / HEADS, entry % HEADS);
                let heads = kv_head * num_heads / HEADS..(kv_head + 1) * num_heads / HEADS;
                let reached = layout.reaches(heads, len / BLOCK, block);
                assert_eq!(!page.keys.is_empty(), reached, "{pattern:?} {len} {entry}");
                if reached {
                    let position = block * BLOCK;
                    let key = &rows(position..position + 1, 1.0)[kv_head * D..][..D];
                    assert_eq!(&page.keys[..D], key);
                }
            }
            let bytes = shape.rows_held(pattern, HEADS, len) * D * 2 * size_of::<f32>();
            assert_eq!(layer.size_in_bytes(), bytes, "{pattern:?} {len}");
            assert!(!layer.lacks(pattern, len));
        }
        // Far back something is gone, unless every block is seen from far.
        let gone = (1..150).any(|len| layer.lacks(pattern, len));
        assert_eq!(gone, stride > 1, "{pattern:?}");
        assert!(!layer.lacks(pattern, 0));
        // Within the same block nothing is, and what is written then is freed in its turn.
        layer.truncate(197);
        assert!(!layer.lacks(pattern, 197));
        append(&mut layer, 197..260)?;
        layer.drop_unreachable(pattern, 260);
        let bytes = shape.rows_held(pattern, HEADS, 260) * D * 2 * size_of::<f32>();
        assert_eq!(layer.size_in_bytes(), bytes, "{pattern:?}");
    }
    Ok(())
}

/// The memory of freed pages is used again: the process grows by what is held, not by what was
/// written.
#[test]
#[cfg(target_os = "linux")]
fn the_process_holds_what_is_stated() -> Result<()> {
    fn resident() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        let kilobytes = line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
        1024 * kilobytes.unwrap_or(0)
    }
    let (heads, kv_heads, d) = (32, 8, 128);
    let layout = BlockSparseLayout::new(heads, 64, 16, 8, false)
        .ok_or_else(|| Error::Batch("a layout".to_owned()))?;
    let pattern = AttentionPattern::BlockSparse(layout);
    let spec = CacheSpec {
        patterns: vec![pattern],
        num_key_value_heads: kv_heads,
        head_dim: d,
        rope_limit: None,
        recompute: Recompute::Always,
        max_len: usize::MAX,
        store: CacheStore::Pages(CacheType::F16),
    };
    let mut layer = LayerPages::new(&spec, pattern, CacheType::F16);
    let rows = vec![0.5; 512 * kv_heads * d];
    let before = resident();
    let len = 1 << 15;
    for start in (0..len).step_by(512) {
        layer.append(start, &rows, &rows)?;
        layer.drop_unreachable(pattern, start + 512);
    }
    let grown = resident() - before;
    let stated = spec.bytes_at(len);
    assert_eq!(layer.size_in_bytes(), stated);
    assert!(stated * 100 < len * kv_heads * d * 4 * 53, "{stated} bytes");
    assert!(
        grown * 100 > stated * 95 && grown * 100 < stated * 110,
        "the process grew by {grown} bytes for {stated}"
    );
    Ok(())
}

#[test]
fn truncation_frees_pages() -> Result<()> {
    let mut layer = layer(AttentionPattern::Causal);
    append(&mut layer, 0..600)?;
    let three = layer.size_in_bytes();
    layer.truncate(512);
    assert_eq!(layer.size_in_bytes() * 3, three * 2);
    assert!(append(&mut layer, 513..514).is_err());
    // Rows that a failed call left behind are overwritten, their pages freed.
    append(&mut layer, 512..1500)?;
    append(&mut layer, 10..11)?;
    assert_eq!(layer.size_in_bytes() * 3, three);
    Ok(())
}
