//! Keys and values of one layer, as `[k, s, d]` of the positions kept.

use candle_core::{DType, Tensor};

use crate::error::{Error, Result};
use crate::host;
use crate::kv_cache::CacheSpec;
use crate::weights::Backend;

/// Keys and values of one layer.
#[derive(Clone, Debug)]
pub(crate) struct LayerCache {
    /// Position of the first key that is kept.
    first: usize,
    store: Store,
}

/// What attention reads of a layer's cache.
pub(crate) enum LayerView<'c> {
    /// Per key/value head its keys and values, `[s, d]` each.
    Host {
        keys: &'c [Vec<f32>],
        values: &'c [Vec<f32>],
    },
    /// `[k, s, d]`.
    Device {
        keys: &'c Tensor,
        values: &'c Tensor,
    },
}

#[derive(Clone, Debug)]
enum Store {
    /// One buffer `[s, d]` per key/value head.
    Host {
        keys: Vec<Vec<f32>>,
        values: Vec<Vec<f32>>,
        head_dim: usize,
    },
    /// `[k, s, d]` on the device.
    Device {
        keys: Option<Tensor>,
        values: Option<Tensor>,
        dtype: DType,
    },
}

impl LayerCache {
    pub(crate) fn new(spec: &CacheSpec) -> Self {
        let store = if spec.backend == Backend::Kernels {
            Store::Host {
                keys: vec![Vec::new(); spec.num_key_value_heads],
                values: vec![Vec::new(); spec.num_key_value_heads],
                head_dim: spec.head_dim,
            }
        } else {
            Store::Device {
                keys: None,
                values: None,
                dtype: spec.dtype,
            }
        };
        Self { first: 0, store }
    }

    /// Position of the first key kept.
    pub(crate) fn first(&self) -> usize {
        self.first
    }

    /// The keys and values that are kept.
    pub(crate) fn view(&self) -> Result<LayerView<'_>> {
        match &self.store {
            Store::Host { keys, values, .. } => Ok(LayerView::Host { keys, values }),
            Store::Device {
                keys: Some(keys),
                values: Some(values),
                ..
            } => Ok(LayerView::Device { keys, values }),
            Store::Device { .. } => Err(Error::Batch("the cache holds no key yet".to_owned())),
        }
    }

    pub(crate) fn append(
        &mut self,
        start: usize,
        new_keys: &Tensor,
        new_values: &Tensor,
    ) -> Result<()> {
        let kept = start.checked_sub(self.first).ok_or_else(|| {
            Error::Batch(format!(
                "position {start} lies before the window kept from {}",
                self.first
            ))
        })?;
        match &mut self.store {
            Store::Host {
                keys,
                values,
                head_dim,
            } => {
                append_host(keys, new_keys, kept, *head_dim)?;
                append_host(values, new_values, kept, *head_dim)
            }
            Store::Device {
                keys,
                values,
                dtype,
            } => {
                append_device(keys, new_keys, kept, *dtype)?;
                append_device(values, new_values, kept, *dtype)
            }
        }
    }

    /// Drops the positions before `first` once more than `slack` of them have gathered.
    pub(crate) fn drop_before(&mut self, first: usize, slack: usize) -> Result<()> {
        let excess = first.saturating_sub(self.first);
        if excess <= slack {
            return Ok(());
        }
        match &mut self.store {
            Store::Host {
                keys,
                values,
                head_dim,
            } => {
                for head in keys.iter_mut().chain(values) {
                    head.drain(..(excess * *head_dim).min(head.len()));
                    // A long prompt's peak is given back; a little headroom stays for decoding.
                    head.shrink_to(head.len() + 2 * slack * *head_dim);
                }
            }
            Store::Device { keys, values, .. } => {
                for tensor in [keys, values].into_iter().flatten() {
                    let rows = tensor.dim(1)?;
                    *tensor = tensor.narrow(1, excess, rows - excess)?.contiguous()?;
                }
            }
        }
        self.first = first;
        Ok(())
    }

    pub(crate) fn size_in_bytes(&self) -> usize {
        match &self.store {
            Store::Host { keys, values, .. } => {
                let held = keys.iter().chain(values).map(Vec::capacity).sum::<usize>();
                held * size_of::<f32>()
            }
            Store::Device {
                keys,
                values,
                dtype,
            } => {
                let held = [keys, values].into_iter().flatten().map(Tensor::elem_count);
                held.sum::<usize>() * dtype.size_in_bytes()
            }
        }
    }
}

fn append_host(heads: &mut [Vec<f32>], new: &Tensor, kept: usize, head_dim: usize) -> Result<()> {
    let (rows, num_heads, width) = new.dims3()?; // [l, k, d]
    if num_heads != heads.len() || width != head_dim {
        return Err(Error::Batch(format!(
            "keys of {num_heads} heads of {width} do not fit a cache of {} heads of {head_dim}",
            heads.len()
        )));
    }
    if heads.iter().any(|head| head.len() < kept * head_dim) {
        return Err(missing_keys(kept));
    }
    host::with_f32(new, |new| {
        for (head_idx, head) in heads.iter_mut().enumerate() {
            head.truncate(kept * head_dim);
            head.reserve(rows * head_dim);
            for row in new.chunks_exact(num_heads * head_dim) {
                head.extend_from_slice(&row[head_idx * head_dim..(head_idx + 1) * head_dim]);
            }
        }
    })
}

fn append_device(held: &mut Option<Tensor>, new: &Tensor, kept: usize, dtype: DType) -> Result<()> {
    let new = new.transpose(0, 1)?.to_dtype(dtype)?.contiguous()?; // [k, l, d]
    *held = Some(match held.take() {
        None if kept > 0 => return Err(missing_keys(kept)),
        Some(old) if kept > 0 => Tensor::cat(&[&old.narrow(1, 0, kept)?, &new], 1)?,
        _ => new,
    });
    Ok(())
}

fn missing_keys(kept: usize) -> Error {
    Error::Batch(format!(
        "the cache lacks some of the {kept} keys before this span; a pass that tracks gradients stores none"
    ))
}
