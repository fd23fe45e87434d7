//! All tensors of a model with the types they shall have, in file order.

use std::collections::{BTreeMap, BTreeSet};

use phi3_kernels::BlockType;
use phi3_nn::{StoredTensor, TensorSource};
use serde_json::Value as Json;

use super::error::{Error, Result};
use super::mix::{Matrix, Mix};
use crate::gguf::{Architecture, export, gguf_name_in};

/// How much the columns of matrices matter: the mean square of the activation that meets each, by
/// the Hugging Face name of the layer (`model.layers.0.mlp.down_proj`).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Importance(BTreeMap<String, Vec<f32>>);

impl Importance {
    /// No layer's importance is known.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the importance of a layer's columns.
    pub fn insert(&mut self, layer: impl Into<String>, columns: Vec<f32>) {
        self.0.insert(layer.into(), columns);
    }

    /// Number of layers whose importance is known.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether no layer's is.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn of(&self, tensor: &str) -> Option<&[f32]> {
        let layer = tensor.strip_suffix(".weight").unwrap_or(tensor);
        self.0.get(layer).map(Vec::as_slice)
    }
}

/// A tensor of the plan: a tensor of the file, or the part of one that is an expert's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub hf: String,
    pub gguf: String,
    /// Whether the file has it in a stack with those of the other experts, which follow each other
    /// in the plan.
    pub stacked: bool,
    pub shape: Vec<usize>,
    pub block_type: BlockType,
}

/// What a file will hold.
#[derive(Clone, Debug)]
pub(super) struct Plan(Vec<Entry>);

impl Plan {
    /// # Errors
    /// A tensor that is missing or has no place.
    pub fn new(
        source: &dyn TensorSource,
        config: &Json,
        mix: Mix,
        importance: Option<&Importance>,
    ) -> Result<Self> {
        let architecture = export::architecture(config).map_err(Error::Config)?;
        let names = source.names().into_iter().collect();
        Self::of(architecture, source, &names, config, mix, importance)
    }

    /// The plan of those tensors of `source` that are called `names`.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn of(
        architecture: Architecture,
        source: &dyn TensorSource,
        names: &BTreeSet<String>,
        config: &Json,
        mix: Mix,
        importance: Option<&Importance>,
    ) -> Result<Self> {
        let layers = config.get("num_hidden_layers").and_then(Json::as_u64);
        let layers = layers
            .and_then(|layers| usize::try_from(layers).ok())
            .ok_or_else(|| Error::Config("num_hidden_layers is no number".to_owned()))?;
        let tied = config.get("tie_word_embeddings").and_then(Json::as_bool);
        // The default of its config class; those of the others are untied.
        let tied = tied.unwrap_or(architecture == Architecture::Phi3Small);
        let wanted = expected(architecture, layers, tied, config, names, source)?;
        let ignored =
            |name: &str| name.ends_with("rotary_emb.inv_freq") || tied && name == "lm_head.weight";
        for name in names {
            if !wanted.contains(name) && !ignored(name) {
                return Err(Error::UnexpectedTensor {
                    tensor: name.clone(),
                    origin: source.origin(),
                });
            }
        }
        let mut entries = Vec::new();
        for hf in wanted {
            let tensor = read(source, &hf)?;
            let gguf = gguf_name_in(architecture, &hf).ok_or_else(|| Error::UnexpectedTensor {
                tensor: hf.clone(),
                origin: source.origin(),
            })?;
            let shape = tensor.shape().to_vec();
            let columns = tensor.columns();
            let known = importance.and_then(|all| all.of(&hf));
            if let Some(known) = known
                && known.len() != columns
            {
                return Err(Error::Tensor {
                    tensor: hf,
                    detail: format!(
                        "the importance of {} columns is known, but it has {columns}",
                        known.len()
                    ),
                });
            }
            let layer = gguf
                .strip_prefix("blk.")
                .and_then(|rest| rest.split('.').next()?.parse().ok());
            let block_type = if shape.len() < 2 {
                BlockType::F32
            } else {
                mix.block_type(Matrix {
                    name: &gguf,
                    columns,
                    layer,
                    layers,
                    tied,
                    importance: known.is_some(),
                })
            };
            entries.push(Entry {
                stacked: gguf.contains("_exps."),
                hf,
                gguf,
                shape,
                block_type,
            });
        }
        Ok(Self(entries))
    }

    pub fn tensors(&self) -> &[Entry] {
        &self.0
    }

    /// No tensor yet.
    pub fn empty() -> Self {
        Self(Vec::new())
    }

    /// With more tensors.
    pub fn extend(&mut self, entries: Vec<Entry>) {
        self.0.extend(entries);
    }
}

/// The tensors that a model must have, in the order of the file.
struct Expected<'a> {
    names: &'a BTreeSet<String>,
    source: &'a dyn TensorSource,
    found: Vec<String>,
}

impl Expected<'_> {
    fn tensor(&mut self, name: String) -> Result<()> {
        if !self.names.contains(&name) {
            return Err(Error::MissingTensor {
                tensor: name,
                origin: self.source.origin(),
            });
        }
        self.found.push(name);
        Ok(())
    }

    fn layer(&mut self, name: &str, bias: bool) -> Result<()> {
        self.tensor(format!("{name}.weight"))?;
        match bias {
            true => self.tensor(format!("{name}.bias")),
            false => Ok(()),
        }
    }
}

/// Every tensor of a model, in the order of the file.
///
/// # Errors
/// The first that is missing: no more names are made up than the source has.
fn expected(
    architecture: Architecture,
    layers: usize,
    tied: bool,
    config: &Json,
    names: &BTreeSet<String>,
    source: &dyn TensorSource,
) -> Result<Vec<String>> {
    let (attention, mlp, last_norm): (&[&str], &[&str], _) = match architecture {
        Architecture::Phi3 | Architecture::Llama => (
            &["qkv_proj", "o_proj"],
            &["gate_up_proj", "down_proj"],
            "norm",
        ),
        Architecture::Phi3Small => (
            &["query_key_value", "dense"],
            &["up_proj", "down_proj"],
            "final_layernorm",
        ),
        Architecture::Phimoe => (&["q_proj", "k_proj", "v_proj", "o_proj"], &[], "norm"),
    };
    let (small, moe) = (
        architecture == Architecture::Phi3Small,
        architecture == Architecture::Phimoe,
    );
    let flag = |name: &str| config.get(name).and_then(Json::as_bool) == Some(true);
    let (norm_bias, attention_bias) = (small || moe, small || moe && flag("attention_bias"));
    // The default of the reference's config class is 16.
    let experts = config.get("num_local_experts").and_then(Json::as_u64);
    let experts = experts.unwrap_or(16);

    let mut all = Expected {
        names,
        source,
        found: Vec::new(),
    };
    all.layer("model.embed_tokens", false)?;
    for layer in 0..layers {
        let layer = format!("model.layers.{layer}");
        all.layer(&format!("{layer}.input_layernorm"), norm_bias)?;
        for name in attention {
            all.layer(&format!("{layer}.self_attn.{name}"), attention_bias)?;
        }
        all.layer(&format!("{layer}.post_attention_layernorm"), norm_bias)?;
        for name in mlp {
            all.layer(&format!("{layer}.mlp.{name}"), small)?;
        }
        if moe {
            let moe = format!("{layer}.block_sparse_moe");
            all.layer(&format!("{moe}.gate"), false)?;
            for matrix in ["w1", "w3", "w2"] {
                for expert in 0..experts {
                    all.layer(&format!("{moe}.experts.{expert}.{matrix}"), false)?;
                }
            }
        }
    }
    all.layer(&format!("model.{last_norm}"), norm_bias)?;
    if moe || !tied {
        all.layer("lm_head", moe && flag("lm_head_bias"))?;
    }
    Ok(all.found)
}

/// A tensor that must be there.
///
/// # Errors
/// [`Error::MissingTensor`] or [`Error::Tensor`].
pub(super) fn read(source: &dyn TensorSource, name: &str) -> Result<StoredTensor> {
    match source.tensor(name) {
        Ok(Some(tensor)) => Ok(tensor),
        Ok(None) => Err(Error::MissingTensor {
            tensor: name.to_owned(),
            origin: source.origin(),
        }),
        Err(error) => Err(Error::Tensor {
            tensor: name.to_owned(),
            detail: error.to_string(),
        }),
    }
}
