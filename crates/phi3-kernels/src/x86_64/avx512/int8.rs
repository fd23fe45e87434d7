//! Products of quantized weights with more tokens than [`few`] by VNNI, which adds four products of bytes to a
//! dword at once.
//!
//! As in [`gemm`](crate::x86_64::gemm), sixteen rows are unpacked to bytes, as many blocks at a time
//! as stay in the first-level cache, and multiplied with all tokens: up to twelve at a time, whose
//! sums of integers and of floats fill 24 of the 32 registers.

use std::ops::Range;

use super::gemv::super_rows;
use super::panel::{
    EMPTY_PANEL, EMPTY_SUPER_PANEL, PANEL_ROWS, Panel, SuperPanel, unpack, unpack_super,
};
use super::products::{
    Lanes, NO_LANES, Sums, add, add_block, add_group, add_lanes, load_lanes, of_one_length,
    offsets, scale, store_lanes,
};
use super::vector::load_f32;
use super::{Avx512Vnni, few};
use crate::activations::Quantized;
use crate::backend::Kernels;
use crate::x86_64::blocks::{self, Q2_K, Q4_K};
use crate::x86_64::gemm::Ahead;
use crate::x86_64::layouts::{LANES, Layouts, SuperTile, TILE, Tile, class_len, few_tiles};
use crate::x86_64::panel::{PanelRows, put_rows};
use crate::x86_64::vector::ask_for_rows;
use crate::{BlockType, MatrixRef};

/// Tiles that are multiplied at a time.
const MAX_TILES: usize = 3;

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
    // Types of which AVX2 multiplies what is not worth a panel.
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

    /// Blocks that are unpacked at once, for many tokens and for few: whole rounds of the partial sums.
    const AT_ONCE: usize;
    const FEW_AT_ONCE: usize;

    fn tiles(x: &Quantized) -> &[Self::Tile];

    /// # Safety
    /// The processor has what [`Avx512Vnni`] stands for.
    unsafe fn unpack(blocks: [&[u8; BYTES]; PANEL_ROWS], panel: &mut Self::Panel);

    /// Adds every `STEP`th block of `w`, in order, to `sums` of `G` tiles, whose blocks are `x[g]`.
    ///
    /// # Safety
    /// The processor has what [`Avx512Vnni`] stands for.
    unsafe fn multiply<const G: usize, const STEP: usize>(
        w: &[Self::Panel],
        x: [&[Self::Tile]; G],
        sums: &mut Sums<G>,
    );
}

/// Blocks of 32.
struct Blocks<const ID: u32, const BYTES: usize>;

impl<const ID: u32, const BYTES: usize> Format<BYTES> for Blocks<ID, BYTES> {
    type Panel = Panel;
    type Tile = Tile;

    const EMPTY: Panel = EMPTY_PANEL;
    const AT_ONCE: usize = 32;
    const FEW_AT_ONCE: usize = 4 * LANES;

    fn tiles(x: &Quantized) -> &[Tile] {
        Layouts::tiles(x)
    }

    #[inline(always)]
    unsafe fn unpack(blocks: [&[u8; BYTES]; PANEL_ROWS], panel: &mut Panel) {
        // SAFETY: the caller vouches for the instructions.
        unsafe { unpack::<ID, BYTES>(blocks, panel) }
    }

    #[inline(always)]
    unsafe fn multiply<const G: usize, const STEP: usize>(
        w: &[Panel],
        x: [&[Tile]; G],
        sums: &mut Sums<G>,
    ) {
        // SAFETY: the caller vouches for the instructions.
        unsafe { multiply::<ID, G, STEP>(w, x, sums) }
    }
}

/// Blocks of 256.
struct Superblocks<const ID: u32, const BYTES: usize>;

impl<const ID: u32, const BYTES: usize> Format<BYTES> for Superblocks<ID, BYTES> {
    type Panel = SuperPanel;
    type Tile = SuperTile;

    const EMPTY: SuperPanel = EMPTY_SUPER_PANEL;
    const AT_ONCE: usize = 4;
    const FEW_AT_ONCE: usize = LANES;

    fn tiles(x: &Quantized) -> &[SuperTile] {
        Layouts::supertiles(x)
    }

    #[inline(always)]
    unsafe fn unpack(blocks: [&[u8; BYTES]; PANEL_ROWS], panel: &mut SuperPanel) {
        // SAFETY: the caller vouches for the instructions.
        unsafe { unpack_super::<ID, BYTES>(blocks, panel) }
    }

    #[inline(always)]
    unsafe fn multiply<const G: usize, const STEP: usize>(
        w: &[SuperPanel],
        x: [&[SuperTile]; G],
        sums: &mut Sums<G>,
    ) {
        // SAFETY: the caller vouches for the instructions.
        unsafe { multiply_super::<ID, G, STEP>(w, x, sums) }
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
    let rounds = match few {
        true => groups / at_once * LANES + LANES.min(groups % at_once),
        false => (0..LANES)
            .map(|class| class_len(groups, class).div_ceil(at_once))
            .sum(),
    };
    let pieces = rounds * tiles.div_ceil(MAX_TILES);
    for start in (0..rows).step_by(PANEL_ROWS) {
        let of_rows = PanelRows::<BYTES>::new(w, first_row + start, rows - start);
        // Asked for between the products: while rows are unpacked there would be too many lines at a time.
        let mut ahead = Ahead::new(w, first_row + start, pieces);
        sums.fill(NO_LANES);
        if few {
            lanes.fill(NO_LANES);
            for first in (0..groups).step_by(at_once) {
                let panel = &mut panel[..at_once.min(groups - first)];
                for (i, panel) in panel.iter_mut().enumerate() {
                    // SAFETY: this function is compiled with the features.
                    unsafe { F::unpack(of_rows.sixteen(first + i), panel) };
                }
                for class in 0..LANES.min(panel.len()) {
                    let lanes = &mut lanes[class * tiles..][..tiles];
                    let (panel, x) = (&panel[class..], &x[first + class..]);
                    let partial = Partial {
                        lanes,
                        first: false,
                        last: false,
                        sums: &mut [],
                    };
                    multiply_tiles::<F, BYTES, LANES>(
                        panel,
                        x,
                        groups,
                        partial,
                        &mut ahead,
                        NOTHING_WRITTEN,
                    );
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
                for first in (0..len).step_by(at_once) {
                    let panel = &mut panel[..at_once.min(len - first)];
                    let last = first + panel.len() == len;
                    for (i, panel) in panel.iter_mut().enumerate() {
                        let block = class + (first + i) * LANES;
                        // SAFETY: as above.
                        unsafe { F::unpack(of_rows.sixteen(block), panel) };
                    }
                    // Rows of outputs lie far apart, and all of them are written when this panel is done.
                    let all = last && class + 1 == LANES.min(groups);
                    let written = if all { &*out } else { &[] };
                    let columns = start..rows.min(start + PANEL_ROWS);
                    let x = &of_class[first..];
                    let partial = Partial {
                        lanes: &mut lanes,
                        first: first == 0,
                        last,
                        sums: &mut sums,
                    };
                    multiply_tiles::<F, BYTES, 1>(
                        panel,
                        x,
                        len,
                        partial,
                        &mut ahead,
                        (written, &columns),
                    );
                }
            }
        }
        for (t, out) in out.iter_mut().enumerate() {
            put_rows(&sums[t / TILE].0[t % TILE], start, out);
        }
    }
}

/// Outputs that are written soon, and of which columns.
type Written<'a> = (&'a [&'a mut [f32]], &'a Range<usize>);

const NOTHING_WRITTEN: Written<'_> = (&[], &(0..0));

/// Where the products of some blocks of a partial sum go.
struct Partial<'a> {
    /// The blocks before them of each tile, unless these are the `first`; what they add up to with these,
    /// unless these are the `last`.
    lanes: &'a mut [Lanes],
    first: bool,
    last: bool,
    /// What the whole partial sum is added to.
    sums: &'a mut [Lanes],
}

/// [`Format::multiply`] of all tiles; those of `x` begin `stride` elements behind one another. Asks for
/// the rows `ahead` and for what is `written` soon.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn multiply_tiles<F: Format<BYTES>, const BYTES: usize, const STEP: usize>(
    w: &[F::Panel],
    x: &[F::Tile],
    stride: usize,
    mut partial: Partial<'_>,
    ahead: &mut Ahead,
    (written, columns): Written<'_>,
) {
    let at = |tile: usize| &x[tile * stride..][..w.len()];
    let (tiles, mut tile) = (partial.lanes.len(), 0);
    while tile < tiles {
        let g = match tiles - tile {
            1 => 1,
            2 | 4 => 2,
            _ => MAX_TILES,
        };
        let tokens = (tile * TILE).min(written.len())..((tile + g) * TILE).min(written.len());
        ask_for_rows(&written[tokens], columns);
        ahead.go_on();
        let to = &mut partial;
        match g {
            1 => multiply_some::<F, BYTES, 1, STEP>(w, [at(tile)], tile, to),
            2 => multiply_some::<F, BYTES, 2, STEP>(w, [at(tile), at(tile + 1)], tile, to),
            _ => {
                let x = [at(tile), at(tile + 1), at(tile + 2)];
                multiply_some::<F, BYTES, MAX_TILES, STEP>(w, x, tile, to);
            }
        }
        tile += g;
    }
}

/// [`multiply_tiles`] of `G` tiles from `tile` on. What is stored is stored once: a vector that is stored keeps
/// a multiplier from reading its third operand.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn multiply_some<F: Format<BYTES>, const BYTES: usize, const G: usize, const STEP: usize>(
    w: &[F::Panel],
    x: [&[F::Tile]; G],
    tile: usize,
    to: &mut Partial<'_>,
) {
    let Some(lanes) = to.lanes[tile..].first_chunk_mut() else {
        return;
    };
    let mut products = load_lanes(if to.first { &[NO_LANES; G] } else { lanes });
    // SAFETY: this function is compiled with the features.
    unsafe { F::multiply::<G, STEP>(w, x, &mut products) };
    if to.last {
        add_lanes(&products, &mut to.sums[tile..][..G]);
    } else {
        store_lanes(products, lanes);
    }
}

/// [`Format::multiply`] of blocks of 32.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
fn multiply<const ID: u32, const G: usize, const STEP: usize>(
    w: &[Panel],
    x: [&[Tile]; G],
    sums: &mut Sums<G>,
) {
    let x = of_one_length(x, w.len());
    for i in (0..w.len()).step_by(STEP) {
        let w = &w[i];
        let mut of_block = [&x[0][i]; G];
        for g in 0..G {
            of_block[g] = &x[g][i];
        }
        let factors = (load_f32(&w.d), load_f32(&w.m));
        add_block::<ID, G>(&w.q, factors, of_block, sums);
    }
}

/// [`Format::multiply`] of blocks of 256.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
fn multiply_super<const ID: u32, const G: usize, const STEP: usize>(
    w: &[SuperPanel],
    x: [&[SuperTile]; G],
    sums: &mut Sums<G>,
) {
    let x = of_one_length(x, w.len());
    for i in (0..w.len()).step_by(STEP) {
        let w = &w[i];
        let mut of_block = [&x[0][i]; G];
        for g in 0..G {
            of_block[g] = &x[g][i];
        }
        let mut a = offsets::<ID, G>(&w.factors, of_block);
        for s in 0..8 {
            add_group::<ID, G>(&w.q[s], &w.factors, of_block, s, &mut a);
        }
        scale::<ID, G>(a, &w.factors, of_block, sums);
    }
}
