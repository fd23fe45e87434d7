//! Weights in fewer bits for a model that is being loaded.

use std::collections::BTreeSet;
use std::sync::Arc;

use phi3_nn::{Bytes, StoredTensor, TensorSource};
use serde_json::Value as Json;

use super::encode::Job;
use super::error::{Error, Result};
use super::mix::{Matrix, Mix};
use super::plan::{self, Entry, Importance, Plan};
use super::{spelling, warn_if_quantized};
use crate::Checkpoint;
use crate::gguf::Architecture;

/// What the names of the image tower of `model_type` phi3_v, its separators and its projection begin
/// with.
const TOWER: &str = "model.vision_embed_tokens.";

/// The weights of another source in fewer bits, encoded tensor by tensor when they are asked for:
/// for a model that [`super::write_gguf`] can write the same bytes as in that file.
pub struct QuantizedSource {
    inner: Arc<dyn TensorSource>,
    plan: Plan,
    /// Tensors that stay as they are stored.
    kept: BTreeSet<String>,
    importance: Option<Importance>,
}

impl QuantizedSource {
    /// The weights of `checkpoint`, a model of `model_type` phi3, phi3small, phimoe or phi3_v; the image tower
    /// of the last stays as it is stored.
    ///
    /// # Errors
    /// [`Error`] for a model that has tensors of unknown names, or lacks one.
    pub fn new(checkpoint: &Checkpoint, mix: Mix, importance: Option<Importance>) -> Result<Self> {
        Self::of_parts(checkpoint, Some(mix), None, importance)
    }

    /// As [`QuantizedSource::new`], decoder and image tower apart. Of the tower the matrices of its
    /// layers and of the projection get the type of most matrices of `tower`, or what stands in for
    /// it where rows are no whole blocks; embeddings, norms, biases and separators stay as they are
    /// stored, and so does a part that has no mix.
    ///
    /// # Errors
    /// As [`QuantizedSource::new`], and [`Error::NoTower`] for a tower that is not there.
    pub fn of_parts(
        checkpoint: &Checkpoint,
        decoder: Option<Mix>,
        tower: Option<Mix>,
        importance: Option<Importance>,
    ) -> Result<Self> {
        let inner = spelling::of_hub(&checkpoint.weights);
        let config = &checkpoint.config;
        let sees = config.get("model_type").and_then(Json::as_str) == Some("phi3_v");
        if tower.is_some() && !sees {
            return Err(Error::NoTower {
                origin: checkpoint.origin.clone(),
            });
        }
        let names = inner.names().into_iter();
        let (mut kept, names): (BTreeSet<_>, BTreeSet<_>) =
            names.partition(|name| sees && name.starts_with(TOWER));
        let mut plan = match (decoder, sees) {
            (None, _) => {
                kept.extend(names);
                Plan::empty()
            }
            (Some(mix), false) => Plan::new(inner.as_ref(), config, mix, importance.as_ref())?,
            // Its decoder is that of model_type phi3.
            (Some(mix), true) => Plan::of(
                Architecture::Phi3,
                inner.as_ref(),
                &names,
                config,
                mix,
                importance.as_ref(),
            )?,
        };
        if let Some(mix) = tower {
            let mut entries = Vec::new();
            for name in kept.iter().filter(|name| is_tower_matrix(name)) {
                entries.extend(tower_entry(inner.as_ref(), name, mix)?);
            }
            for entry in &entries {
                kept.remove(&entry.hf);
            }
            plan.extend(entries);
        }
        warn_if_quantized(checkpoint);
        Ok(Self {
            inner,
            plan,
            kept,
            importance,
        })
    }

    fn encode(&self, entry: &Entry) -> Result<StoredTensor> {
        let tensor = plan::read(self.inner.as_ref(), &entry.hf)?;
        let parts = tensor.parts();
        if parts.iter().all(|part| part.block_type == entry.block_type) {
            return Ok(tensor);
        }
        let bytes = Job {
            name: &entry.hf,
            tensor: &tensor,
            to: entry.block_type,
            importance: self.importance.as_ref().and_then(|all| all.of(&entry.hf)),
        }
        .to_vec()?;
        StoredTensor::new(entry.shape.clone(), entry.block_type, Bytes::from(bytes)).map_err(
            |error| Error::Tensor {
                tensor: entry.hf.clone(),
                detail: error.to_string(),
            },
        )
    }
}

impl TensorSource for QuantizedSource {
    fn tensor(
        &self,
        name: &str,
    ) -> std::result::Result<Option<StoredTensor>, Box<dyn std::error::Error + Send + Sync>> {
        match self.plan.tensors().iter().find(|entry| entry.hf == name) {
            Some(entry) => Ok(Some(self.encode(entry)?)),
            None if self.kept.contains(name) => self.inner.tensor(name),
            None => Ok(None),
        }
    }

    fn names(&self) -> Vec<String> {
        let planned = self.plan.tensors().iter().map(|entry| entry.hf.clone());
        let mut names: Vec<_> = planned.chain(self.kept.iter().cloned()).collect();
        names.sort();
        names
    }

    fn origin(&self) -> String {
        self.inner.origin()
    }
}

/// Whether a tensor is the matrix of a linear layer of the tower or the projection. The convolution
/// over patches is none: its rows are those of a patch, 14 long.
fn is_tower_matrix(name: &str) -> bool {
    let name = name.strip_prefix(TOWER).unwrap_or_default();
    let Some(layer) = name.strip_suffix(".weight") else {
        return false;
    };
    let kind = layer.rsplit('.').next().unwrap_or_default();
    let of_layer = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"].contains(&kind);
    layer.starts_with("img_projection.") || layer.contains(".encoder.layers.") && of_layer
}

/// A matrix in `mix`; `None` for a tensor that is no matrix.
fn tower_entry(source: &dyn TensorSource, name: &str, mix: Mix) -> Result<Option<Entry>> {
    let tensor = plan::read(source, name)?;
    let shape = tensor.shape().to_vec();
    if shape.len() != 2 {
        return Ok(None);
    }
    let block_type = mix.block_type(Matrix {
        // None of those that a mix gives more bits: these rules are about decoders.
        name: "",
        columns: tensor.columns(),
        layer: None,
        layers: 0,
        tied: false,
        importance: false,
    });
    Ok(Some(Entry {
        hf: name.to_owned(),
        gguf: String::new(),
        stacked: false,
        shape,
        block_type,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_of_the_tower_are_known_by_their_names() {
        let tower = |name: &str| format!("{TOWER}{name}");
        let layer = |name: &str| {
            tower(&format!(
                "img_processor.vision_model.encoder.layers.3.{name}"
            ))
        };
        for name in [
            layer("self_attn.q_proj.weight"),
            layer("self_attn.out_proj.weight"),
            layer("mlp.fc2.weight"),
            tower("img_projection.2.weight"),
        ] {
            assert!(is_tower_matrix(&name), "{name}");
        }
        for name in [
            layer("self_attn.q_proj.bias"),
            layer("layer_norm1.weight"),
            tower("img_projection.0.bias"),
            tower("img_processor.vision_model.embeddings.patch_embedding.weight"),
            tower("img_processor.vision_model.pre_layrnorm.weight"),
            tower("sub_GN"),
            "model.layers.0.self_attn.o_proj.weight".to_owned(),
        ] {
            assert!(!is_tower_matrix(&name), "{name}");
        }
    }
}
