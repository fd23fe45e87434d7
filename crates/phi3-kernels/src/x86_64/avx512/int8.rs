//! Products of quantized weights with several tokens by VNNI, which adds four products of bytes to a
//! dword at once.
//!
//! As in [`gemm`](crate::x86_64::gemm), sixteen rows are unpacked to bytes, as many blocks at a time
//! as stay in the first-level cache, and multiplied with all tokens: up to twelve at a time, whose
//! sums of integers and of floats fill 24 of the 32 registers.

#![expect(
    clippy::needless_range_loop,
    reason = "one index into several arrays; closures in iterators would lose the target features"
)]

use std::arch::x86_64::*;

use super::gemv::super_rows;
use super::panel::{
    EMPTY_PANEL, EMPTY_SUPER_PANEL, Factors, PANEL_ROWS, Panel, SuperPanel, offset, unpack,
    unpack_super,
};
use super::vector::{Bytes64, load, load_f32, store_f32};
use super::{Avx512Vnni, few};
use crate::activations::Quantized;
use crate::backend::Kernels;
use crate::x86_64::blocks::{self, INT4, Q2_K, Q4_K, has_minimum, offset_shift};
use crate::x86_64::gemm::Ahead;
use crate::x86_64::layouts::{LANES, Layouts, SuperTile, TILE, Tile, class_len, few_tiles};
use crate::x86_64::panel::{PanelRows, groups_of_32};
use crate::{BlockType, MatrixRef};

/// Tiles that are multiplied at a time.
const MAX_TILES: usize = 3;

/// Sums of a panel and a tile: a lane to a row.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Lanes(pub(super) [[f32; PANEL_ROWS]; TILE]);

/// Sums of nothing.
pub(super) const NO_LANES: Lanes = Lanes([[0.0; PANEL_ROWS]; TILE]);

/// [`scalar::int8_rows`](crate::scalar::int8_rows), the same to the last bit.
pub(in crate::x86_64) fn int8_rows(
    vnni: Avx512Vnni,
    x: &Quantized,
    w: MatrixRef<'_>,
    first_row: usize,
    out: &mut [&mut [f32]],
) {
    macro_rules! rows {
        ($format:ident, $id:ident, $bytes:literal, $dots:expr, $few:ident::$few_rows:ident) => {
            if x.n <= max_dots(blocks::$id) {
                $dots
            } else {
                // SAFETY: `vnni` exists only where the features were detected.
                unsafe {
                    if x.n <= few::MAX_TOKENS {
                        $few::$few_rows::<{ blocks::$id }, $bytes>(x, w, first_row, out)
                    } else {
                        rows::<$format<{ blocks::$id }, $bytes>, $bytes>(x, w, first_row, out)
                    }
                }
            }
        };
    }
    // Types of which AVX2 multiplies one token or two.
    macro_rules! blocks {
        ($id:ident, $bytes:literal) => {
            rows!(
                Blocks,
                $id,
                $bytes,
                Kernels::int8_rows(&vnni.avx2, x, w, first_row, out),
                few::rows
            )
        };
    }
    macro_rules! by_avx2 {
        ($id:ident, $bytes:literal) => {
            rows!(
                Superblocks,
                $id,
                $bytes,
                Kernels::int8_rows(&vnni.avx2, x, w, first_row, out),
                few::super_rows
            )
        };
    }
    macro_rules! superblocks {
        ($id:ident, $bytes:literal) => {
            rows!(
                Superblocks,
                $id,
                $bytes,
                // SAFETY: `vnni` exists only where the features were detected.
                unsafe { super_rows::<{ blocks::$id }, $bytes>(x, w, first_row, out) },
                few::super_rows
            )
        };
    }
    match w.block_type() {
        BlockType::F32 | BlockType::F16 | BlockType::BF16 => {
            Kernels::int8_rows(&vnni.avx2, x, w, first_row, out);
        }
        BlockType::Q4_0 => blocks!(Q4_0, 18),
        BlockType::Q4_1 => blocks!(Q4_1, 20),
        BlockType::Q5_0 => blocks!(Q5_0, 22),
        BlockType::Q5_1 => blocks!(Q5_1, 24),
        BlockType::Q8_0 => blocks!(Q8_0, 34),
        BlockType::IQ4NL => blocks!(IQ4_NL, 18),
        BlockType::Q2K => by_avx2!(Q2_K, 84),
        BlockType::Q3K => by_avx2!(Q3_K, 110),
        BlockType::Q4K => superblocks!(Q4_K, 144),
        BlockType::Q5K => superblocks!(Q5_K, 176),
        BlockType::Int4 => superblocks!(INT4, 130),
        BlockType::Q6K => superblocks!(Q6_K, 210),
    }
}

/// How many tokens take less time where a lane is no row, of a type.
const fn max_dots(id: u32) -> usize {
    match id {
        // Their bytes are unpacked fastest.
        Q2_K | Q4_K => 1,
        _ => 2,
    }
}

/// Blocks of a kind of type, of `BYTES` bytes.
trait Format<const BYTES: usize> {
    type Panel: Copy;
    type Tile: Copy;

    const EMPTY: Self::Panel;

    /// Blocks that are unpacked at once, for many tokens and for few.
    const AT_ONCE: usize;
    const FEW_AT_ONCE: usize;

    fn tiles(x: &Quantized) -> &[Self::Tile];

    /// # Safety
    /// The processor has what [`Avx512Vnni`] stands for.
    unsafe fn unpack(blocks: [&[u8; BYTES]; PANEL_ROWS], panel: &mut Self::Panel);

    /// Adds blocks of a partial sum, in order, to `lanes` of `G` tiles, whose blocks are `x[g]`.
    ///
    /// # Safety
    /// The processor has what [`Avx512Vnni`] stands for.
    unsafe fn multiply<const G: usize>(
        w: &[Self::Panel],
        x: [&[Self::Tile]; G],
        lanes: &mut [Lanes; G],
    );
}

/// Blocks of 32.
struct Blocks<const ID: u32, const BYTES: usize>;

impl<const ID: u32, const BYTES: usize> Format<BYTES> for Blocks<ID, BYTES> {
    type Panel = Panel;
    type Tile = Tile;

    const EMPTY: Panel = EMPTY_PANEL;
    const AT_ONCE: usize = 32;
    const FEW_AT_ONCE: usize = LANES;

    fn tiles(x: &Quantized) -> &[Tile] {
        Layouts::tiles(x)
    }

    #[inline(always)]
    unsafe fn unpack(blocks: [&[u8; BYTES]; PANEL_ROWS], panel: &mut Panel) {
        // SAFETY: the caller vouches for the instructions.
        unsafe { unpack::<ID, BYTES>(blocks, panel) }
    }

    #[inline(always)]
    unsafe fn multiply<const G: usize>(w: &[Panel], x: [&[Tile]; G], lanes: &mut [Lanes; G]) {
        // SAFETY: the caller vouches for the instructions.
        unsafe { multiply::<ID, G>(w, x, lanes) }
    }
}

/// Blocks of 256.
struct Superblocks<const ID: u32, const BYTES: usize>;

impl<const ID: u32, const BYTES: usize> Format<BYTES> for Superblocks<ID, BYTES> {
    type Panel = SuperPanel;
    type Tile = SuperTile;

    const EMPTY: SuperPanel = EMPTY_SUPER_PANEL;
    const AT_ONCE: usize = 4;
    const FEW_AT_ONCE: usize = 1;

    fn tiles(x: &Quantized) -> &[SuperTile] {
        Layouts::supertiles(x)
    }

    #[inline(always)]
    unsafe fn unpack(blocks: [&[u8; BYTES]; PANEL_ROWS], panel: &mut SuperPanel) {
        // SAFETY: the caller vouches for the instructions.
        unsafe { unpack_super::<ID, BYTES>(blocks, panel) }
    }

    #[inline(always)]
    unsafe fn multiply<const G: usize>(
        w: &[SuperPanel],
        x: [&[SuperTile]; G],
        lanes: &mut [Lanes; G],
    ) {
        // SAFETY: the caller vouches for the instructions.
        unsafe { multiply_super::<ID, G>(w, x, lanes) }
    }
}

/// Panel by panel. Many tokens take the blocks of one partial sum after those of the other; few take
/// them as they lie, because their partial sums stay in the first-level cache.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn rows<F: Format<BYTES>, const BYTES: usize>(
    x: &Quantized,
    w: MatrixRef<'_>,
    first_row: usize,
    out: &mut [&mut [f32]],
) {
    let groups = x.groups();
    let tiles = x.n.div_ceil(TILE);
    let few = few_tiles(tiles);
    let x = F::tiles(x);
    let rows = out.first().map_or(0, |out| out.len());
    let at_once = if few { F::FEW_AT_ONCE } else { F::AT_ONCE };
    let mut panel = vec![F::EMPTY; groups.min(at_once)];
    let mut sums = vec![NO_LANES; tiles];
    let mut lanes = vec![NO_LANES; if few { tiles * LANES } else { tiles }];
    for start in (0..rows).step_by(PANEL_ROWS) {
        let of_rows = PanelRows::<BYTES>::new(w, first_row + start, rows - start);
        let mut ahead = Ahead::new(w, first_row + start, groups);
        sums.fill(NO_LANES);
        if few {
            lanes.fill(NO_LANES);
            for first in (0..groups).step_by(at_once) {
                let panel = &mut panel[..at_once.min(groups - first)];
                for (i, panel) in panel.iter_mut().enumerate() {
                    ahead.go_on();
                    // SAFETY: this function is compiled with the features.
                    unsafe { F::unpack(of_rows.sixteen(first + i), panel) };
                }
                for (i, panel) in panel.chunks(1).enumerate() {
                    let class = (first + i) % LANES;
                    let lanes = &mut lanes[class * tiles..][..tiles];
                    multiply_tiles::<F, BYTES>(panel, &x[first + i..], groups, lanes);
                }
            }
            for lanes in lanes.chunks_exact(tiles) {
                add(lanes, &mut sums);
            }
        } else {
            let mut rest = x;
            for class in 0..LANES.min(groups) {
                let len = class_len(groups, class);
                let of_class;
                (of_class, rest) = rest.split_at(len * tiles);
                lanes.fill(NO_LANES);
                for first in (0..len).step_by(at_once) {
                    let panel = &mut panel[..at_once.min(len - first)];
                    for (i, panel) in panel.iter_mut().enumerate() {
                        ahead.go_on();
                        let block = class + (first + i) * LANES;
                        // SAFETY: as above.
                        unsafe { F::unpack(of_rows.sixteen(block), panel) };
                    }
                    let x = &of_class[first..];
                    multiply_tiles::<F, BYTES>(panel, x, len, &mut lanes);
                }
                add(&lanes, &mut sums);
            }
        }
        for (t, out) in out.iter_mut().enumerate() {
            let sums = &sums[t / TILE].0[t % TILE];
            let rows = PANEL_ROWS.min(out.len() - start);
            out[start..start + rows].copy_from_slice(&sums[..rows]);
        }
    }
}

/// [`Format::multiply`] of all tiles; those of `x` begin `stride` elements behind one another.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn multiply_tiles<F: Format<BYTES>, const BYTES: usize>(
    w: &[F::Panel],
    x: &[F::Tile],
    stride: usize,
    lanes: &mut [Lanes],
) {
    let at = |tile: usize| &x[tile * stride..][..w.len()];
    let (mut rest, mut tile) = (lanes, 0);
    while !rest.is_empty() {
        let g = match rest.len() {
            1 => 1,
            2 | 4 => 2,
            _ => MAX_TILES,
        };
        let (some, after) = rest.split_at_mut(g);
        // SAFETY: this function is compiled with the features.
        unsafe {
            match some {
                [a] => F::multiply(w, [at(tile)], std::array::from_mut(a)),
                some => match some.as_chunks_mut() {
                    ([two], []) => F::multiply::<2>(w, [at(tile), at(tile + 1)], two),
                    _ => {
                        if let Some(three) = some.first_chunk_mut() {
                            let x = [at(tile), at(tile + 1), at(tile + 2)];
                            F::multiply::<MAX_TILES>(w, x, three);
                        }
                    }
                },
            }
        }
        (rest, tile) = (after, tile + g);
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn add(lanes: &[Lanes], sums: &mut [Lanes]) {
    for (sums, lanes) in sums.iter_mut().zip(lanes) {
        for t in 0..TILE {
            let sum = _mm512_add_ps(load_f32(&sums.0[t]), load_f32(&lanes.0[t]));
            store_f32(sum, &mut sums.0[t]);
        }
    }
}

/// [`Format::multiply`] of blocks of 32.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
fn multiply<const ID: u32, const G: usize>(w: &[Panel], x: [&[Tile]; G], lanes: &mut [Lanes; G]) {
    let x = of_one_length(x, w.len());
    let mut sums = load_lanes(lanes);
    for i in 0..w.len() {
        let w = &w[i];
        let mut of_block = [&x[0][i]; G];
        for g in 0..G {
            of_block[g] = &x[g][i];
        }
        let factors = (load_f32(&w.d), load_f32(&w.m));
        add_block::<ID, G>(&w.q, factors, of_block, &mut sums);
    }
    store_lanes(sums, lanes);
}

/// Adds the products of one block of sixteen rows, whose factors are `d` and `m`, to `sums`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
#[inline]
pub(super) fn add_block<const ID: u32, const G: usize>(
    q: &[impl Bytes64; 8],
    (d, m): (__m512, __m512),
    x: [&Tile; G],
    sums: &mut [[__m512; TILE]; G],
) {
    let mut a = [[_mm512_setzero_si512(); TILE]; G];
    if let Some(offset) = offset(ID) {
        for g in 0..G {
            for t in 0..TILE {
                a[g][t] = _mm512_set1_epi32(x[g].offsets[offset][t]);
            }
        }
    }
    for c in 0..8 {
        let q = load(&q[c]);
        for g in 0..G {
            for t in 0..TILE {
                let x = _mm512_set1_epi32(x[g].values[c][t]);
                a[g][t] = _mm512_dpbusd_epi32(a[g][t], q, x);
            }
        }
    }
    for g in 0..G {
        for t in 0..TILE {
            let scale = _mm512_set1_ps(x[g].scales[t]);
            let a = _mm512_cvtepi32_ps(a[g][t]);
            let factor = _mm512_mul_ps(d, scale);
            sums[g][t] = _mm512_fmadd_ps(factor, a, sums[g][t]);
            if has_minimum(ID) {
                let factor = _mm512_mul_ps(m, scale);
                let x_sum = _mm512_cvtepi32_ps(_mm512_set1_epi32(x[g].sums[t]));
                sums[g][t] = _mm512_fmadd_ps(factor, x_sum, sums[g][t]);
            }
        }
    }
}

/// [`Format::multiply`] of blocks of 256.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
fn multiply_super<const ID: u32, const G: usize>(
    w: &[SuperPanel],
    x: [&[SuperTile]; G],
    lanes: &mut [Lanes; G],
) {
    let x = of_one_length(x, w.len());
    for i in 0..w.len() {
        let w = &w[i];
        let mut of_block = [&x[0][i]; G];
        for g in 0..G {
            of_block[g] = &x[g][i];
        }
        let mut a = offsets::<ID, G>(&w.factors, of_block);
        for s in 0..8 {
            add_group::<ID, G>(&w.q[s], &w.factors, of_block, s, &mut a);
        }
        scale::<ID, G>(a, &w.factors, of_block, lanes);
    }
}

/// What the offset of the weight bytes of sixteen rows adds too much, to be added; else zeros.
#[target_feature(enable = "avx512f,avx512vnni")]
#[inline]
pub(super) fn offsets<const ID: u32, const G: usize>(
    factors: &Factors,
    x: [&SuperTile; G],
) -> Integers<G> {
    let mut a = [[_mm512_setzero_si512(); TILE]; G];
    if offset_shift(ID).is_some() {
        add_minima::<ID, G>(factors, x, &mut a);
    }
    a
}

/// Integers of the rows of a panel and the tokens of tiles.
pub(super) type Integers<const G: usize> = [[__m512i; TILE]; G];

/// Adds the products of the 32 columns `s`, times their scales.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
pub(super) fn add_group<const ID: u32, const G: usize>(
    q: &[impl Bytes64; 8],
    factors: &Factors,
    x: [&SuperTile; G],
    s: usize,
    a: &mut Integers<G>,
) {
    if ID == INT4 {
        for c in 0..8 {
            add_columns(&q[c], x, (s, c), a);
        }
        return;
    }
    let columns = if groups_of_32(ID) { 8 } else { 4 };
    for part in 0..8 / columns {
        let mut products = [[_mm512_setzero_si512(); TILE]; G];
        for c in part * columns..(part + 1) * columns {
            add_columns(&q[c], x, (s, c), &mut products);
        }
        let scales = load(&factors.scales[s * 8 / columns + part]);
        for g in 0..G {
            for t in 0..TILE {
                let scaled = _mm512_mullo_epi32(products[g][t], scales);
                a[g][t] = _mm512_add_epi32(a[g][t], scaled);
            }
        }
    }
}

/// Adds the integers `a` of a block, times its factors, to `lanes`.
#[target_feature(enable = "avx512f,avx512vnni")]
#[inline]
pub(super) fn scale<const ID: u32, const G: usize>(
    a: Integers<G>,
    factors: &Factors,
    x: [&SuperTile; G],
    lanes: &mut [Lanes; G],
) {
    let mut b = [[_mm512_setzero_si512(); TILE]; G];
    if has_minimum(ID) {
        add_minima::<ID, G>(factors, x, &mut b);
    }
    let (d, dmin) = (load_f32(&factors.d), load_f32(&factors.dmin));
    for g in 0..G {
        for t in 0..TILE {
            let scale = _mm512_set1_ps(x[g].scales[t]);
            let mut sum = load_f32(&lanes[g].0[t]);
            let factor = _mm512_mul_ps(d, scale);
            sum = _mm512_fmadd_ps(factor, _mm512_cvtepi32_ps(a[g][t]), sum);
            if has_minimum(ID) {
                let factor = _mm512_mul_ps(dmin, scale);
                sum = _mm512_fnmadd_ps(factor, _mm512_cvtepi32_ps(b[g][t]), sum);
            }
            store_f32(sum, &mut lanes[g].0[t]);
        }
    }
}

/// Adds the products of columns `c` of the 32 columns `s`.
#[target_feature(enable = "avx512f,avx512vnni")]
#[inline]
fn add_columns<const G: usize>(
    q: &impl Bytes64,
    x: [&SuperTile; G],
    (s, c): (usize, usize),
    sums: &mut Integers<G>,
) {
    let q = load(q);
    for g in 0..G {
        for t in 0..TILE {
            let x = _mm512_set1_epi32(x[g].values[s][c][t]);
            sums[g][t] = _mm512_dpbusd_epi32(sums[g][t], q, x);
        }
    }
}

/// Adds the products of minima and the sums of activations that they belong to.
#[target_feature(enable = "avx512f,avx512vnni")]
#[inline]
fn add_minima<const ID: u32, const G: usize>(
    factors: &Factors,
    x: [&SuperTile; G],
    sums: &mut Integers<G>,
) {
    let pairs = if groups_of_32(ID) { 4 } else { 8 };
    for pair in 0..pairs {
        let minima = load(&factors.minima[pair]);
        for g in 0..G {
            for t in 0..TILE {
                let x = if groups_of_32(ID) {
                    x[g].sums_32[pair][t]
                } else {
                    x[g].sums_16[pair][t]
                };
                sums[g][t] = _mm512_dpwssd_epi32(sums[g][t], minima, _mm512_set1_epi32(x));
            }
        }
    }
}

/// Slices of `len` elements, so that loops need no check.
#[inline(always)]
pub(super) fn of_one_length<T, const G: usize>(x: [&[T]; G], len: usize) -> [&[T]; G] {
    x.map(|x| &x[..len])
}

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn load_lanes<const G: usize>(lanes: &[Lanes; G]) -> [[__m512; TILE]; G] {
    let mut sums = [[_mm512_setzero_ps(); TILE]; G];
    for g in 0..G {
        for t in 0..TILE {
            sums[g][t] = load_f32(&lanes[g].0[t]);
        }
    }
    sums
}

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn store_lanes<const G: usize>(sums: [[__m512; TILE]; G], lanes: &mut [Lanes; G]) {
    for g in 0..G {
        for t in 0..TILE {
            store_f32(sums[g][t], &mut lanes[g].0[t]);
        }
    }
}
