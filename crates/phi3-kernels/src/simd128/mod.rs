//! Kernels for vectors of 128 bits, written once for the instruction sets that have them.
//!
//! A type that implements [`Vectors`] is a token: it exists only where its instructions do.
//! Functions of this module are compiled into the function that the backend enters with those
//! instructions turned on, which is why they are all inlined. They are loops rather than iterators
//! with closures wherever the instructions matter.

pub(crate) mod attention;
pub(crate) mod int8;
#[cfg(target_arch = "aarch64")]
pub(crate) mod pairs;
pub(crate) mod rows;

/// Vectors of four f32, and what the kernels do with them.
pub(crate) trait Vectors: Copy + Send + Sync {
    /// Four f32.
    type F32: Copy;

    fn load(self, four: &[f32; 4]) -> Self::F32;
    fn store(self, v: Self::F32) -> [f32; 4];
    fn splat(self, x: f32) -> Self::F32;

    /// Four half-precision numbers, exactly.
    fn load_f16(self, four: &[u16; 4]) -> Self::F32;
    /// To half precision, rounded to nearest, ties to even; finite values stay finite.
    fn to_f16(self, v: Self::F32) -> [u16; 4];

    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b + c`, fused where that is as fast.
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;

    /// The larger of both; `b` where `a` is NaN.
    fn larger(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// The larger of both; NaN where one is.
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// 0 where `x < limit`, else `v`.
    fn zero_where_less(self, v: Self::F32, x: Self::F32, limit: Self::F32) -> Self::F32;
    /// The nearest integer, ties to even.
    fn round(self, v: Self::F32) -> Self::F32;
    /// 2 to the power of integers from -126 to 127.
    fn power_of_2(self, integers: Self::F32) -> Self::F32;

    /// Lane i is the sum of the lanes of vector i, in an order of the implementation's.
    fn sum_each(self, v: [Self::F32; 4]) -> Self::F32;
}
