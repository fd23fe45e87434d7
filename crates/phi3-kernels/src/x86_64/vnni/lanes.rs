//! The instructions, and the sums that they are used for.

#![expect(
    clippy::needless_range_loop,
    reason = "one index into several arrays; closures in iterators would lose the target features"
)]

use std::arch::x86_64::*;

use super::{Integers, Part, TILE, Weights};
use crate::x86_64::Avx2;
use crate::x86_64::vector::{load, store_i32};

/// Proof that this processor has AVX-VNNI and what [`Avx2`] has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AvxVnni {
    pub(in crate::x86_64) avx2: Avx2,
}

impl AvxVnni {
    /// `None` on a processor that lacks one of them.
    pub(crate) fn new() -> Option<Self> {
        let avx2 = Avx2::new()?;
        is_x86_feature_detected!("avxvnni").then_some(Self { avx2 })
    }
}

/// What a backend with VNNI adds to [`Avx2`].
pub(in crate::x86_64) trait Vnni: Copy {
    fn avx2(self) -> Avx2;

    /// The sums over the columns of `w` and `x`, as many parts of each: for sixteen rows and four
    /// tokens, times the scales where `SCALED`.
    fn products<const SCALED: bool>(self, w: &[Part], x: &[[[i32; TILE]; 8]]) -> Integers;
}

impl Vnni for AvxVnni {
    fn avx2(self) -> Avx2 {
        self.avx2
    }

    fn products<const SCALED: bool>(self, w: &[Part], x: &[[[i32; TILE]; 8]]) -> Integers {
        #[target_feature(enable = "avx2,avxvnni")]
        fn with_vnni<const SCALED: bool>(
            vnni: AvxVnni,
            w: &[Part],
            x: &[[[i32; TILE]; 8]],
        ) -> Integers {
            products::<_, SCALED>(AvxLanes(vnni), w, x)
        }
        // SAFETY: `self` exists only where `new` detected the features.
        unsafe { with_vnni::<SCALED>(self, w, x) }
    }
}

/// Vectors of an i32 for each row of a panel.
pub(super) trait Lanes: Copy {
    type I32: Copy;

    fn zero(self) -> Self::I32;
    /// To each row's sum four products of its unsigned bytes with the signed bytes of `x`.
    fn dot(self, sum: Self::I32, w: &Weights, x: i32) -> Self::I32;
    /// `sum + v * scales`.
    fn add_scaled(self, sum: Self::I32, v: Self::I32, scales: &[[i32; 8]; 2]) -> Self::I32;
    fn store(self, v: Self::I32) -> [[i32; 8]; 2];
}

/// [`Vnni::products`] with the instructions of `L`.
#[inline(always)]
pub(super) fn products<L: Lanes, const SCALED: bool>(
    l: L,
    w: &[Part],
    x: &[[[i32; TILE]; 8]],
) -> Integers {
    let mut sums = [l.zero(); TILE];
    for (w, x) in w.iter().zip(x) {
        for half in 0..2 {
            let mut a = if SCALED { [l.zero(); TILE] } else { sums };
            for c in 4 * half..4 * half + 4 {
                for t in 0..TILE {
                    a[t] = l.dot(a[t], &w.q[c], x[c][t]);
                }
            }
            for t in 0..TILE {
                sums[t] = if SCALED {
                    l.add_scaled(sums[t], a[t], &w.scales[half])
                } else {
                    a[t]
                };
            }
        }
    }
    let mut integers = [[[0; 8]; 2]; TILE];
    for t in 0..TILE {
        integers[t] = l.store(sums[t]);
    }
    integers
}

/// Eight rows to a vector.
#[derive(Clone, Copy)]
struct AvxLanes(AvxVnni);

impl Lanes for AvxLanes {
    type I32 = [__m256i; 2];

    #[inline(always)]
    fn zero(self) -> [__m256i; 2] {
        // SAFETY: the token exists only where the features were detected.
        unsafe { [_mm256_setzero_si256(); 2] }
    }

    #[inline(always)]
    fn dot(self, [a, b]: [__m256i; 2], w: &Weights, x: i32) -> [__m256i; 2] {
        // SAFETY: the token exists only where the features were detected.
        unsafe {
            let x = _mm256_set1_epi32(x);
            [
                _mm256_dpbusd_avx_epi32(a, load(&w[0]), x),
                _mm256_dpbusd_avx_epi32(b, load(&w[1]), x),
            ]
        }
    }

    #[inline(always)]
    fn add_scaled(
        self,
        sum: [__m256i; 2],
        v: [__m256i; 2],
        scales: &[[i32; 8]; 2],
    ) -> [__m256i; 2] {
        // SAFETY: the token exists only where the features were detected.
        unsafe { add_scaled(sum, v, scales) }
    }

    #[inline(always)]
    fn store(self, v: [__m256i; 2]) -> [[i32; 8]; 2] {
        // SAFETY: the token exists only where the features were detected.
        unsafe { [store_i32(v[0]), store_i32(v[1])] }
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn add_scaled(sum: [__m256i; 2], v: [__m256i; 2], scales: &[[i32; 8]; 2]) -> [__m256i; 2] {
    let low = _mm256_mullo_epi32(v[0], load(&scales[0]));
    let high = _mm256_mullo_epi32(v[1], load(&scales[1]));
    [
        _mm256_add_epi32(sum[0], low),
        _mm256_add_epi32(sum[1], high),
    ]
}
