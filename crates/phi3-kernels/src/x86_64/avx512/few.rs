//! Products of quantized weights with up to twelve tokens.
//!
//! The bytes of sixteen rows are turned as in [`panel`](super::panel), but multiplied out of the registers
//! that they are turned in.

use super::panel::{
    High, NO_FACTORS, PANEL_ROWS, columns, group, low, lows, sixteen_factors, unpack_factors,
};
use super::products::{
    Lanes, NO_LANES, Sums, add, add_block, add_group, load_lanes, of_one_length, offsets, scale,
    store_lanes,
};
use crate::MatrixRef;
use crate::activations::Quantized;
use crate::x86_64::gemm::Ahead;
use crate::x86_64::layouts::{LANES, Layouts, SuperTile, TILE, Tile};
use crate::x86_64::panel::{PanelRows, put_rows};

/// The most tiles whose integers stay in registers beside the weights of a block.
const MAX_TILES: usize = 3;

/// The most tokens that are multiplied here.
pub(super) const MAX_TOKENS: usize = MAX_TILES * TILE;

/// How blocks of a kind of type, of `BYTES` bytes, are multiplied.
trait Format<const BYTES: usize> {
    type Tile;

    fn tiles(x: &Quantized) -> &[Self::Tile];

    /// Adds the products of a block of sixteen rows to `sums`.
    ///
    /// # Safety
    /// The processor has what [`Avx512Vnni`](super::Avx512Vnni) stands for.
    unsafe fn multiply<const G: usize>(
        blocks: [&[u8; BYTES]; PANEL_ROWS],
        x: [&Self::Tile; G],
        sums: &mut Sums<G>,
    );
}

/// Blocks of 32.
struct Blocks<const ID: u32>;

impl<const ID: u32, const BYTES: usize> Format<BYTES> for Blocks<ID> {
    type Tile = Tile;

    fn tiles(x: &Quantized) -> &[Tile] {
        Layouts::tiles(x)
    }

    #[inline(always)]
    unsafe fn multiply<const G: usize>(
        blocks: [&[u8; BYTES]; PANEL_ROWS],
        x: [&Tile; G],
        sums: &mut Sums<G>,
    ) {
        // SAFETY: the caller vouches for the instructions.
        unsafe {
            let q = columns::<ID, BYTES>(blocks);
            let factors = sixteen_factors::<ID, BYTES>(blocks);
            add_block::<ID, G>(&q, factors, x, sums);
        }
    }
}

/// Blocks of 256.
struct Superblocks<const ID: u32>;

impl<const ID: u32, const BYTES: usize> Format<BYTES> for Superblocks<ID> {
    type Tile = SuperTile;

    fn tiles(x: &Quantized) -> &[SuperTile] {
        Layouts::supertiles(x)
    }

    #[inline(always)]
    unsafe fn multiply<const G: usize>(
        blocks: [&[u8; BYTES]; PANEL_ROWS],
        x: [&SuperTile; G],
        sums: &mut Sums<G>,
    ) {
        // SAFETY: the caller vouches for the instructions.
        unsafe {
            let mut factors = NO_FACTORS;
            unpack_factors::<ID, BYTES>(blocks, &mut factors);
            let mut a = offsets::<ID, G>(&factors, x);
            let high = High::new::<ID, BYTES>(blocks);
            for i in 0..lows(ID) {
                let low = low::<ID, BYTES>(blocks, i);
                for k in 0..8 / lows(ID) {
                    let g = group(ID, i, k);
                    let q = high.with::<ID>(low, k, g);
                    add_group::<ID, G>(&q, &factors, x, g, &mut a);
                }
            }
            scale::<ID, G>(a, &factors, x, sums);
        }
    }
}

/// [`int8_rows`](super::int8_rows) of types with blocks of 32.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn rows<const ID: u32, const BYTES: usize>(
    x: &Quantized,
    w: MatrixRef<'_>,
    first_row: usize,
    out: &mut [&mut [f32]],
) {
    panels::<Blocks<ID>, BYTES>(x, w, first_row, out);
}

/// [`int8_rows`](super::int8_rows) of types with blocks of 256.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn super_rows<const ID: u32, const BYTES: usize>(
    x: &Quantized,
    w: MatrixRef<'_>,
    first_row: usize,
    out: &mut [&mut [f32]],
) {
    panels::<Superblocks<ID>, BYTES>(x, w, first_row, out);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn panels<F: Format<BYTES>, const BYTES: usize>(
    x: &Quantized,
    w: MatrixRef<'_>,
    first_row: usize,
    out: &mut [&mut [f32]],
) {
    assert!(x.n <= MAX_TOKENS, "at most three tiles");
    let groups = x.groups();
    let tiles = F::tiles(x);
    let rows = out.first().map_or(0, |out| out.len());
    for start in (0..rows).step_by(PANEL_ROWS) {
        let row = first_row + start;
        let of_rows = PanelRows::new(w, row, rows - start);
        let ahead = Ahead::new(w, row, groups);
        let mut sums = [NO_LANES; MAX_TILES];
        let of = |tile: usize| &tiles[tile * groups..][..groups];
        match x.n.div_ceil(TILE) {
            1 => sums[..1].copy_from_slice(&panel::<F, BYTES, 1>([tiles], &of_rows, ahead)),
            2 => {
                let x = [of(0), of(1)];
                sums[..2].copy_from_slice(&panel::<F, BYTES, 2>(x, &of_rows, ahead));
            }
            _ => {
                let x = [of(0), of(1), of(2)];
                sums = panel::<F, BYTES, MAX_TILES>(x, &of_rows, ahead);
            }
        }
        for (t, out) in out.iter_mut().enumerate() {
            put_rows(&sums[t / TILE].0[t % TILE], start, out);
        }
    }
}

/// The products of the tokens and sixteen rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn panel<F: Format<BYTES>, const BYTES: usize, const G: usize>(
    x: [&[F::Tile]; G],
    w: &PanelRows<'_, BYTES>,
    mut ahead: Ahead,
) -> [Lanes; G] {
    let x = of_one_length(x, x[0].len());
    let mut lanes = [[NO_LANES; G]; LANES];
    for block in 0..x[0].len() {
        ahead.go_on();
        let mut of_block = [&x[0][block]; G];
        for g in 0..G {
            of_block[g] = &x[g][block];
        }
        let lanes = &mut lanes[block % LANES];
        let mut partial = load_lanes(lanes);
        // SAFETY: this function is compiled with the features.
        unsafe { F::multiply(w.sixteen(block), of_block, &mut partial) };
        store_lanes(partial, lanes);
    }
    let mut sums = [NO_LANES; G];
    for lanes in &lanes {
        add(lanes, &mut sums);
    }
    sums
}
