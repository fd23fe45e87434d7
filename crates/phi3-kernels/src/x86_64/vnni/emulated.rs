//! Portable code in place of the instructions, so that the rest can be tested on any machine.

use super::lanes::{Lanes, Vnni, products};
use super::{Integers, Part, TILE, Weights, int8_rows};
use crate::MatrixRef;
use crate::activations::Quantized;
use crate::backend::Kernels;
use crate::x86_64::Avx2;

/// What has AVX2 but does as if it had VNNI.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Emulated {
    avx2: Avx2,
}

impl Emulated {
    pub(crate) fn new() -> Option<Self> {
        Avx2::new().map(|avx2| Self { avx2 })
    }
}

impl Vnni for Emulated {
    fn avx2(self) -> Avx2 {
        self.avx2
    }

    fn products<const SCALED: bool>(self, w: &[Part], x: &[[[i32; TILE]; 8]]) -> Integers {
        products::<_, SCALED>(self, w, x)
    }
}

impl Lanes for Emulated {
    type I32 = [[i32; 8]; 2];

    fn zero(self) -> Self::I32 {
        [[0; 8]; 2]
    }

    /// As the manual defines VPDPBUSD.
    fn dot(self, mut sum: Self::I32, w: &Weights, x: i32) -> Self::I32 {
        for (sums, w) in sum.iter_mut().zip(w) {
            for (sum, w) in sums.iter_mut().zip(w.as_chunks::<4>().0) {
                for (w, x) in w.iter().zip(x.to_le_bytes()) {
                    *sum += i32::from(*w) * i32::from(x.cast_signed());
                }
            }
        }
        sum
    }

    fn add_scaled(self, sum: Self::I32, v: Self::I32, scales: &[[i32; 8]; 2]) -> Self::I32 {
        let at = |half: usize, i: usize| sum[half][i] + v[half][i] * scales[half][i];
        [0, 1].map(|half| std::array::from_fn(|i| at(half, i)))
    }

    fn store(self, v: Self::I32) -> [[i32; 8]; 2] {
        v
    }
}

impl Kernels for Emulated {
    fn name(&self) -> &'static str {
        "emulated-vnni"
    }

    fn base(&self) -> &dyn Kernels {
        &self.avx2
    }

    fn int8_rows(&self, x: &Quantized, w: MatrixRef<'_>, first_row: usize, out: &mut [&mut [f32]]) {
        int8_rows(*self, x, w, first_row, out);
    }
}
