//! Backends for x86-64.

mod attention;
mod avx2;
mod avx512;
mod blocks;
mod cache;
mod dots;
mod float;
mod gemm;
mod gemv;
mod groups;
mod int8;
mod kernels;
mod layouts;
mod many;
mod micro;
mod narrow;
mod panel;
mod tile;
mod vector;
mod vnni;
mod wide;

pub(crate) use avx2::Avx2;
pub(crate) use avx512::Avx512Vnni;
pub(crate) use layouts::Layouts;
pub(crate) use vnni::AvxVnni;
#[cfg(test)]
pub(crate) use vnni::Emulated;
