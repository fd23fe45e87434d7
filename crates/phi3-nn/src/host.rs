//! Plain f32 slices of CPU tensors, the form that the kernels take.

use std::sync::Once;

use candle_core::{CpuStorage, DType, Device, Storage, Tensor};

use crate::error::{Error, Result};

/// Calls `f` with the values of `x`, row-major; copies them only if they are not f32 in order.
pub(crate) fn with_f32<R>(x: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let x = x
        .to_device(&Device::Cpu)?
        .to_dtype(DType::F32)?
        .contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(values)), Some((start, end))) => {
            Ok(f(values.get(start..end).unwrap_or_default()))
        }
        _ => Err(Error::Candle(candle_core::Error::Msg(
            "a contiguous f32 tensor on the CPU was expected".to_owned(),
        ))),
    }
}

/// The values of `x` in a vector of their own.
#[cfg(test)]
pub(crate) fn to_vec_f32(x: &Tensor) -> Result<Vec<f32>> {
    with_f32(x, <[f32]>::to_vec)
}

/// Has the C library's allocator keep the memory of activations for the next layer. glibc gives large
/// blocks back to the system as they are freed, which then clears every page anew: a tenth of an image
/// tower's time, a fortieth of a long prompt's. How large it learns from the largest block that comes
/// back, up to 32 MB.
pub(crate) fn keep_freed_memory() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| drop(std::hint::black_box(vec![0u8; 31 << 20])));
}
