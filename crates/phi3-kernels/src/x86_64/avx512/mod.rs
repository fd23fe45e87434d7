//! AVX-512 with VNNI: products of quantized weights, and the register tile of f32 products.
//!
//! What is not here is done by [`Avx2`](super::Avx2).

mod few;
mod gemv;
mod int8;
mod panel;
mod products;
mod tile;
mod vector;

pub(super) use int8::int8_rows;
pub(super) use tile::TwelveRows;

use super::Avx2;

/// Proof that this processor has AVX-512 F, BW and VL, its VNNI, and what [`Avx2`] has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512Vnni {
    pub(in crate::x86_64) avx2: Avx2,
}

impl Avx512Vnni {
    /// `None` on a processor that lacks one of them.
    pub(crate) fn new() -> Option<Self> {
        let avx2 = Avx2::new()?;
        let detected = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni");
        detected.then_some(Self { avx2 })
    }
}
