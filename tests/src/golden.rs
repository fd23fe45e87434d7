//! Golden values of a tiny checkpoint, read with the `safetensors` crate, which the project itself
//! does not use: an independent reader.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device};
use phi3_kernels::BlockType;
use phi3_nn::{MemorySource, StoredTensor, Weights};
use safetensors::{Dtype, SafeTensors};

/// A golden tensor: integers or floats with their shape.
#[derive(Clone, Debug)]
pub enum Golden {
    /// int64 or uint8.
    Ids(Vec<u32>, Vec<usize>),
    /// int64, some of it negative: places of image tokens.
    SignedIds(Vec<i64>, Vec<usize>),
    /// float32.
    Floats(Vec<f32>, Vec<usize>),
}

/// Name, shape and little-endian f32 bytes.
pub type F32Tensor = (String, Vec<usize>, Vec<u8>);

/// A checkpoint folder with `golden.safetensors` beside its weights.
pub struct Kit {
    /// config.json.
    pub config: serde_json::Value,
    goldens: Goldens,
    weights: Vec<u8>,
}

impl Kit {
    /// Reads the folder.
    ///
    /// # Errors
    /// If a file is missing or malformed.
    pub fn load(folder: &Path) -> Result<Self> {
        let read = |name: &str| {
            let path = folder.join(name);
            std::fs::read(&path).with_context(|| format!("reading {}", path.display()))
        };
        Ok(Self {
            config: serde_json::from_slice(&read("config.json")?)?,
            goldens: Goldens::load(folder)?,
            weights: read("model.safetensors")?,
        })
    }

    /// The checkpoint's weights on `device`, stored as they are.
    ///
    /// # Errors
    /// If the file is malformed.
    pub fn weights(&self, device: &Device) -> Result<Weights> {
        self.weights_as(device, |_, block_type, bytes| (block_type, bytes.to_vec()))
    }

    /// The checkpoint's weights after `convert(name, stored type, bytes)`.
    ///
    /// # Errors
    /// If the file is malformed, or the converted bytes do not fit.
    pub fn weights_as(
        &self,
        device: &Device,
        convert: impl Fn(&str, BlockType, &[u8]) -> (BlockType, Vec<u8>),
    ) -> Result<Weights> {
        let mut source = MemorySource::new();
        for (name, view) in SafeTensors::deserialize(&self.weights)?.tensors() {
            let block_type = match view.dtype() {
                Dtype::F32 => BlockType::F32,
                Dtype::F16 => BlockType::F16,
                Dtype::BF16 => BlockType::BF16,
                other => bail!("weight `{name}` is {other:?}"),
            };
            let (block_type, bytes) = convert(&name, block_type, view.data());
            source.insert(
                name,
                StoredTensor::new(view.shape().to_vec(), block_type, bytes.into())?,
            );
        }
        Ok(Weights::new(
            std::sync::Arc::new(source),
            device.clone(),
            DType::F32,
        ))
    }

    /// Every weight with its shape and f32 bytes.
    ///
    /// # Errors
    /// If the file is malformed, or a weight is not f32.
    pub fn f32_tensors(&self) -> Result<Vec<F32Tensor>> {
        let mut tensors = Vec::new();
        for (name, view) in SafeTensors::deserialize(&self.weights)?.tensors() {
            ensure!(
                view.dtype() == Dtype::F32,
                "weight `{name}` is {:?}",
                view.dtype()
            );
            tensors.push((name, view.shape().to_vec(), view.data().to_vec()));
        }
        Ok(tensors)
    }

    /// Names of the cases that have inputs, sorted.
    pub fn cases(&self) -> Vec<String> {
        let mut cases = self.goldens.cases();
        cases.retain(|case| self.ids(case, "input_ids").is_some());
        cases
    }

    /// The ids `<case>.<name>`.
    pub fn ids(&self, case: &str, name: &str) -> Option<&[u32]> {
        self.goldens.ids(case, name)
    }

    /// The ids `<case>.<name>`, whether or not some are negative.
    pub fn signed_ids(&self, case: &str, name: &str) -> Option<Vec<i64>> {
        self.goldens.signed_ids(case, name)
    }

    /// The shape of `<case>.<name>`.
    pub fn shape(&self, case: &str, name: &str) -> Option<&[usize]> {
        self.goldens.shape(case, name)
    }

    /// The floats `<case>.<name>`.
    pub fn floats(&self, case: &str, name: &str) -> Option<&[f32]> {
        self.goldens.floats(case, name)
    }

    /// The hidden states that a case stores, in the order in which a model computes them.
    pub fn hidden_states(&self, case: &str) -> Vec<(String, &[f32])> {
        [
            "hidden_embed",
            "hidden_layer0_attn",
            "hidden_layer0",
            "hidden_layer_last",
            "hidden_final_norm",
        ]
        .into_iter()
        .filter_map(|name| Some((name.to_owned(), self.floats(case, name)?)))
        .collect()
    }
}

/// The tensors of a golden.safetensors, named `<case>.<name>`.
pub struct Goldens(BTreeMap<String, Golden>);

impl Goldens {
    /// Reads the golden.safetensors of a folder.
    ///
    /// # Errors
    /// If it is missing or malformed.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join("golden.safetensors");
        let bytes = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        let mut goldens = BTreeMap::new();
        for (name, view) in SafeTensors::deserialize(&bytes)?.tensors() {
            let shape = view.shape().to_vec();
            let golden = match view.dtype() {
                Dtype::I64 => {
                    let ids = view.data().as_chunks::<8>().0;
                    let ids: Vec<i64> = ids.iter().map(|c| i64::from_le_bytes(*c)).collect();
                    if ids.iter().any(|id| *id < 0) {
                        Golden::SignedIds(ids, shape)
                    } else {
                        let ids = ids.iter().map(|id| u32::try_from(*id).unwrap_or(u32::MAX));
                        Golden::Ids(ids.collect(), shape)
                    }
                }
                Dtype::U8 => {
                    Golden::Ids(view.data().iter().map(|b| u32::from(*b)).collect(), shape)
                }
                Dtype::F32 => {
                    let floats = view
                        .data()
                        .chunks_exact(4)
                        .map(|c| c.try_into().map(f32::from_le_bytes));
                    Golden::Floats(floats.collect::<Result<_, _>>()?, shape)
                }
                other => bail!("golden `{name}` is {other:?}"),
            };
            goldens.insert(name, golden);
        }
        Ok(Self(goldens))
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Case names, sorted.
    pub fn cases(&self) -> Vec<String> {
        let mut cases: Vec<_> = self
            .0
            .keys()
            .filter_map(|name| name.split_once('.').map(|(case, _)| case.to_owned()))
            .collect();
        cases.dedup();
        cases
    }

    /// The ids `<case>.<name>`.
    pub fn ids(&self, case: &str, name: &str) -> Option<&[u32]> {
        match self.0.get(&format!("{case}.{name}")) {
            Some(Golden::Ids(ids, _)) => Some(ids),
            _ => None,
        }
    }

    /// The ids `<case>.<name>`, whether or not some are negative.
    pub fn signed_ids(&self, case: &str, name: &str) -> Option<Vec<i64>> {
        match self.0.get(&format!("{case}.{name}")) {
            Some(Golden::Ids(ids, _)) => Some(ids.iter().map(|id| i64::from(*id)).collect()),
            Some(Golden::SignedIds(ids, _)) => Some(ids.clone()),
            _ => None,
        }
    }

    /// The shape of `<case>.<name>`.
    pub fn shape(&self, case: &str, name: &str) -> Option<&[usize]> {
        match self.0.get(&format!("{case}.{name}"))? {
            Golden::Ids(_, shape) | Golden::SignedIds(_, shape) | Golden::Floats(_, shape) => {
                Some(shape)
            }
        }
    }

    /// The floats `<case>.<name>`.
    pub fn floats(&self, case: &str, name: &str) -> Option<&[f32]> {
        match self.0.get(&format!("{case}.{name}")) {
            Some(Golden::Floats(floats, _)) => Some(floats),
            _ => None,
        }
    }
}
