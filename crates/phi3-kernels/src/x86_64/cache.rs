//! Keys and values in eight bits.

use std::arch::x86_64::*;

use super::Avx2;
use super::vector::store_f32;
use crate::attention::{GROUP, GROUP_BYTES};
use crate::scalar::attention as scalar;

impl Avx2 {
    pub(crate) fn widen_q8_0(self, row: &[u8], out: &mut [f32]) {
        // SAFETY: `self` exists only where `new` detected the features.
        unsafe { widen_q8_0(row, out) }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn widen_q8_0(row: &[u8], out: &mut [f32]) {
    let (groups, _) = row.as_chunks::<GROUP_BYTES>();
    let (out, tail) = out.as_chunks_mut::<GROUP>();
    for ([low, high, q @ ..], out) in groups.iter().zip(&mut *out) {
        let half = i32::from(u16::from_le_bytes([*low, *high]));
        let scale = _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(half)));
        let (q, _) = q.as_chunks::<8>();
        let (out, _) = out.as_chunks_mut::<8>();
        for (q, out) in q.iter().zip(out) {
            let q = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(i64::from_le_bytes(*q)));
            *out = store_f32(_mm256_mul_ps(_mm256_cvtepi32_ps(q), scale));
        }
    }
    scalar::widen_q8_0(&row[out.len() * GROUP_BYTES..], tail);
}
