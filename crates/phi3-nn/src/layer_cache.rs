//! Keys and values of one layer: pages for the kernels, tensors `[k, s, d]` for candle.

use candle_core::{DType, Tensor};

use crate::attention::AttentionPattern;
use crate::cache_type::CacheStore;
use crate::error::{Error, Result};
use crate::kv_cache::{CacheSpec, window_slack};
use crate::kv_pages::LayerPages;

/// Keys and values of one layer.
#[derive(Clone, Debug)]
pub(crate) enum LayerCache {
    /// For the kernels.
    Pages(LayerPages),
    /// For candle.
    Tensors(LayerTensors),
}

/// `[k, s, d]` on a device.
#[derive(Clone, Debug)]
pub(crate) struct LayerTensors {
    /// Position of the first key that is kept.
    first: usize,
    keys: Option<Tensor>,
    values: Option<Tensor>,
    dtype: DType,
}

impl LayerCache {
    pub(crate) fn new(spec: &CacheSpec, pattern: AttentionPattern) -> Self {
        match spec.store {
            CacheStore::Pages(cache_type) => {
                Self::Pages(LayerPages::new(spec, pattern, cache_type))
            }
            CacheStore::Tensors(dtype) => Self::Tensors(LayerTensors {
                first: 0,
                keys: None,
                values: None,
                dtype,
            }),
        }
    }

    /// Whether a query at `len`, or one behind it, reaches a key before it that was freed.
    pub(crate) fn lacks(&self, pattern: AttentionPattern, len: usize) -> bool {
        match self {
            Self::Pages(pages) => pages.lacks(pattern, len),
            Self::Tensors(tensors) => tensors.first > pattern.first_reachable(len),
        }
    }

    /// Frees the pages behind the first `len` positions. Tensors stay: the next append, which
    /// makes new ones, leaves out what is behind.
    pub(crate) fn truncate(&mut self, len: usize) {
        match self {
            Self::Pages(pages) => pages.truncate(len),
            Self::Tensors(_) => {}
        }
    }

    /// Frees what no query of the layer reaches any more now that the sequence has `len` tokens.
    pub(crate) fn drop_unreachable(&mut self, pattern: AttentionPattern, len: usize) -> Result<()> {
        match self {
            Self::Pages(pages) => {
                pages.drop_unreachable(pattern, len);
                Ok(())
            }
            Self::Tensors(tensors) => {
                let first = pattern.first_reachable(len);
                let slack = pattern.window().map_or(0, window_slack);
                tensors.drop_before(first, slack)
            }
        }
    }

    pub(crate) fn size_in_bytes(&self) -> usize {
        match self {
            Self::Pages(pages) => pages.size_in_bytes(),
            Self::Tensors(tensors) => tensors.size_in_bytes(),
        }
    }
}

impl LayerTensors {
    /// Appends `[l, k, d]` behind the positions before `start`; what an earlier failed call left
    /// there is overwritten. Gives keys and values `[k, s, d]`.
    pub(crate) fn append(
        &mut self,
        start: usize,
        new_keys: &Tensor,
        new_values: &Tensor,
    ) -> Result<(&Tensor, &Tensor)> {
        let kept = start.checked_sub(self.first).ok_or_else(|| {
            Error::Batch(format!(
                "position {start} lies before the window kept from {}",
                self.first
            ))
        })?;
        let keys = append_device(&mut self.keys, new_keys, kept, self.dtype)?;
        let values = append_device(&mut self.values, new_values, kept, self.dtype)?;
        Ok((keys, values))
    }

    /// Position of the first key kept.
    pub(crate) fn first(&self) -> usize {
        self.first
    }

    /// Drops the positions before `first` once more than `slack` of them have gathered.
    fn drop_before(&mut self, first: usize, slack: usize) -> Result<()> {
        let excess = first.saturating_sub(self.first);
        if excess <= slack {
            return Ok(());
        }
        for tensor in [&mut self.keys, &mut self.values].into_iter().flatten() {
            let rows = tensor.dim(1)?;
            *tensor = tensor.narrow(1, excess, rows - excess)?.contiguous()?;
        }
        self.first = first;
        Ok(())
    }

    fn size_in_bytes(&self) -> usize {
        let held = [&self.keys, &self.values].into_iter().flatten();
        held.map(Tensor::elem_count).sum::<usize>() * self.dtype.size_in_bytes()
    }
}

fn append_device<'t>(
    held: &'t mut Option<Tensor>,
    new: &Tensor,
    kept: usize,
    dtype: DType,
) -> Result<&'t Tensor> {
    let new = new.transpose(0, 1)?.to_dtype(dtype)?.contiguous()?; // [k, l, d]
    let all = match held.take() {
        None if kept > 0 => return Err(missing_keys(kept)),
        Some(old) if kept > 0 => Tensor::cat(&[&old.narrow(1, 0, kept)?, &new], 1)?,
        _ => new,
    };
    Ok(held.insert(all))
}

fn missing_keys(kept: usize) -> Error {
    Error::Batch(format!(
        "the cache lacks some of the {kept} keys before this span; a pass that tracks gradients stores none"
    ))
}
