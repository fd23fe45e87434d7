//! Tensor names of a GGUF file, and the Hugging Face tensors that they make.
//!
//! Hugging Face's Phi-3 has fused projections: `qkv_proj` is q, k and v stacked by rows,
//! `gate_up_proj` is gate and up. A GGUF file has them fused (architecture `phi3` as llama.cpp's
//! converter writes it: `attn_qkv`, and `ffn_up` for both halves of the MLP) or apart; apart, they
//! become row parts of one tensor, as stored.
//!
//! Architecture `llama` differs in one thing more: the converter moves the rows of q and k within
//! each head so that the two rows that rope rotates together lie side by side (row `2j + s` of the
//! file is row `s·d/2 + j` of the checkpoint, for a head of `d` rows). That is undone here.
//!
//! Architecture `phimoe` has q, k and v apart as the hub has them, with biases, and all experts of a
//! layer in one tensor `[experts, rows, columns]`, of which each becomes a tensor of the hub.
//!
//! Architecture `phi3small` has every tensor as the checkpoint has it.

use std::collections::BTreeMap;

use super::container::{Container, TensorInfo};
use super::error::{Error, Result};
use super::name_tables::{EXPERT, EXPERTS, LAYER, global, layer_with_biases};

/// The architectures whose layers are Phi-3 layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Architecture {
    /// Phi-3, Phi-3.5-mini, Phi-4-mini.
    Phi3,
    /// Llama and what is converted as such (Mistral, SmolLM): the same layers, q, k, v and gate, up
    /// stored apart, and q and k in another row order.
    Llama,
    /// Phi-3.5-MoE.
    Phimoe,
    /// Phi-3-small, in a form of this project's own.
    Phi3Small,
}

impl Architecture {
    /// All that are supported.
    pub const ALL: [Architecture; 4] = [
        Architecture::Phi3,
        Architecture::Llama,
        Architecture::Phimoe,
        Architecture::Phi3Small,
    ];

    /// The value of `general.architecture`, and the prefix of the model's metadata keys.
    pub fn name(self) -> &'static str {
        match self {
            Architecture::Phi3 => "phi3",
            Architecture::Llama => "llama",
            Architecture::Phimoe => "phimoe",
            Architecture::Phi3Small => "phi3small",
        }
    }

    /// The architecture of that name.
    ///
    /// # Errors
    /// [`Error::Architecture`], naming those that are supported.
    pub fn from_name(name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|architecture| architecture.name() == name)
            .ok_or_else(|| Error::Architecture {
                found: name.to_owned(),
                supported: Self::ALL.map(Self::name).join(", "),
            })
    }
}

/// [`hf_name_in`] a file of architecture `phi3` or `llama`.
///
/// ```
/// use phi3_hub::gguf::hf_name;
///
/// let qkv = Some("model.layers.3.self_attn.qkv_proj.weight".to_owned());
/// assert_eq!(hf_name("blk.3.attn_qkv.weight"), qkv);
/// assert_eq!(hf_name("blk.3.attn_k.weight"), qkv);
/// assert_eq!(hf_name("rope_factors_long.weight"), None);
/// ```
pub fn hf_name(name: &str) -> Option<String> {
    hf_name_in(Architecture::Phi3, name)
}

/// The Hugging Face tensor that holds the tensor `name` of a GGUF file, wholly or as some of its
/// rows; with `*` for the number where it becomes one tensor for each expert. `None` if it becomes
/// part of the config or has no place in the model.
///
/// ```
/// use phi3_hub::gguf::{Architecture, hf_name_in};
///
/// let name = hf_name_in(Architecture::Phimoe, "blk.3.ffn_gate_exps.weight");
/// let experts = "model.layers.3.block_sparse_moe.experts.*.w1.weight";
/// assert_eq!(name.as_deref(), Some(experts));
/// ```
pub fn hf_name_in(architecture: Architecture, name: &str) -> Option<String> {
    match role(architecture, name) {
        Role::Whole(hf) | Role::Rows(hf, _) => Some(hf),
        Role::Experts(prefix, matrix) => Some(format!("{prefix}*.{matrix}")),
        Role::RopeFactors | Role::RopeFrequencies | Role::Ignored | Role::Unexpected(_) => None,
    }
}

/// [`gguf_name_in`] a file of architecture `phi3`.
pub fn gguf_name(hf: &str) -> Option<String> {
    gguf_name_in(Architecture::Phi3, hf)
}

/// The name under which a file of an architecture stores a Hugging Face tensor, alone or with those
/// of the other experts; `None` for a name that the architecture does not have. The inverse of
/// [`hf_name_in`] for files in the converter's spelling.
pub fn gguf_name_in(architecture: Architecture, hf: &str) -> Option<String> {
    if let Some((gguf, _)) = global(architecture).iter().find(|(_, known)| *known == hf) {
        return Some((*gguf).to_owned());
    }
    let (layer, name) = hf.strip_prefix("model.layers.")?.split_once('.')?;
    let layer: usize = layer.parse().ok()?;
    if architecture == Architecture::Phimoe
        && let Some((idx, matrix)) = name.strip_prefix(EXPERTS).and_then(|n| n.split_once('.'))
    {
        idx.parse::<usize>().ok()?;
        let (gguf, _) = EXPERT.iter().find(|(_, known)| *known == matrix)?;
        return Some(format!("blk.{layer}.{gguf}"));
    }
    if let Some(table) = layer_with_biases(architecture) {
        let (name, kind) = name.rsplit_once('.')?;
        let (gguf, _, has_bias) = table.iter().find(|(_, known, _)| *known == name)?;
        let known = kind == "weight" || kind == "bias" && *has_bias;
        return known.then(|| format!("blk.{layer}.{gguf}.{kind}"));
    }
    let (gguf, ..) = LAYER.iter().find(|(_, known, section)| {
        *known == name && matches!(section, None | Some(Section::Qkv | Section::Up))
    })?;
    Some(format!("blk.{layer}.{gguf}"))
}

/// What the shapes of fused tensors follow from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Dimensions {
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub intermediate: usize,
    /// Of a layer; 0 where there is one feed-forward block.
    pub experts: usize,
}

/// A Hugging Face tensor as it is made from the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Recipe {
    pub shape: Vec<usize>,
    pub parts: Vec<RecipePart>,
}

/// A tensor of the file that is some rows of a Hugging Face tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RecipePart {
    /// Name in the file.
    pub tensor: String,
    /// So many leading heads have their rows in llama's order.
    pub interleaved_heads: usize,
    /// Only that expert of a stack.
    pub expert: Option<usize>,
}

/// All Hugging Face tensors of the file, by name.
///
/// # Errors
/// A tensor without a place, half a fused tensor, or one whose rows contradict the metadata.
pub(super) fn map_tensors(
    container: &Container,
    architecture: Architecture,
    dimensions: &Dimensions,
) -> Result<BTreeMap<String, Recipe>> {
    let mut recipes = BTreeMap::new();
    let mut fused: BTreeMap<String, BTreeMap<Section, &TensorInfo>> = BTreeMap::new();
    for tensor in container.tensors() {
        if layer_of(&tensor.name).is_some_and(|layer| layer >= dimensions.layers) {
            return Err(Error::UnexpectedTensor {
                tensor: tensor.name.clone(),
                reason: "its layer is beyond the block_count of the metadata",
            });
        }
        match role(architecture, &tensor.name) {
            Role::Whole(hf) => {
                let recipe = Recipe {
                    shape: tensor.shape.clone(),
                    parts: vec![RecipePart {
                        tensor: tensor.name.clone(),
                        interleaved_heads: 0,
                        expert: None,
                    }],
                };
                recipes.insert(hf, recipe);
            }
            Role::Experts(prefix, matrix) => {
                let (Some(experts), Some(shape)) = (tensor.shape.first(), tensor.shape.get(1..))
                else {
                    return Err(shape_error(tensor, "a stack of matrices".to_owned()));
                };
                if *experts != dimensions.experts || shape.len() != 2 {
                    let expected = format!("a stack of {} (expert_count)", dimensions.experts);
                    return Err(shape_error(tensor, expected));
                }
                for idx in 0..*experts {
                    let recipe = Recipe {
                        shape: shape.to_vec(),
                        parts: vec![RecipePart {
                            tensor: tensor.name.clone(),
                            interleaved_heads: 0,
                            expert: Some(idx),
                        }],
                    };
                    recipes.insert(format!("{prefix}{idx}.{matrix}"), recipe);
                }
            }
            Role::Rows(hf, section) => {
                fused.entry(hf).or_default().insert(section, tensor);
            }
            Role::RopeFactors | Role::RopeFrequencies | Role::Ignored => {}
            Role::Unexpected(reason) => {
                return Err(Error::UnexpectedTensor {
                    tensor: tensor.name.clone(),
                    reason,
                });
            }
        }
    }
    for (hf, sections) in fused {
        let recipe = fuse(&sections, architecture, dimensions)?;
        recipes.insert(hf, recipe);
    }
    Ok(recipes)
}

fn fuse(
    sections: &BTreeMap<Section, &TensorInfo>,
    architecture: Architecture,
    dimensions: &Dimensions,
) -> Result<Recipe> {
    let found: Vec<Section> = sections.keys().copied().collect();
    match found.as_slice() {
        [Section::Qkv] | [Section::Q, Section::K, Section::V] => {}
        [Section::Up] | [Section::Gate, Section::Up] => {}
        incomplete => return Err(incomplete_error(incomplete, sections)),
    }
    let both_halves = found == [Section::Up];
    let mut columns = None;
    let mut rows = 0;
    let mut parts = Vec::new();
    for (section, tensor) in sections {
        let expected = section.rows(dimensions, both_halves);
        let [found_rows, found_columns] = tensor.shape[..] else {
            return Err(shape_error(tensor, "a matrix".to_owned()));
        };
        if found_rows != expected {
            let what = section.formula(both_halves);
            return Err(shape_error(tensor, format!("{expected} rows ({what})")));
        }
        if *columns.get_or_insert(found_columns) != found_columns {
            let expected = format!("as many columns as {:?}", parts_names(&parts));
            return Err(shape_error(tensor, expected));
        }
        rows = found_rows.saturating_add(rows);
        let interleaved_heads = match (architecture, section) {
            (Architecture::Llama, Section::Q) => dimensions.heads,
            (Architecture::Llama, Section::K) => dimensions.kv_heads,
            (Architecture::Llama, Section::Qkv) => dimensions.heads + dimensions.kv_heads,
            _ => 0,
        };
        parts.push(RecipePart {
            tensor: tensor.name.clone(),
            interleaved_heads,
            expert: None,
        });
    }
    Ok(Recipe {
        shape: vec![rows, columns.unwrap_or_default()],
        parts,
    })
}

fn parts_names(parts: &[RecipePart]) -> Vec<&str> {
    parts.iter().map(|part| part.tensor.as_str()).collect()
}

fn shape_error(tensor: &TensorInfo, expected: String) -> Error {
    Error::TensorShape {
        tensor: tensor.name.clone(),
        found: tensor.shape.clone(),
        expected,
    }
}

fn incomplete_error(found: &[Section], sections: &BTreeMap<Section, &TensorInfo>) -> Error {
    let present = sections.values().next().map(|tensor| tensor.name.clone());
    let present = present.unwrap_or_default();
    if found.contains(&Section::Qkv) {
        return Error::UnexpectedTensor {
            tensor: sections
                .values()
                .nth(1)
                .map(|tensor| tensor.name.clone())
                .unwrap_or_default(),
            reason: "the layer has q, k and v both fused and apart",
        };
    }
    let all: &[(Section, &str)] = if found.contains(&Section::Gate) {
        &[(Section::Up, "ffn_up")]
    } else {
        &[
            (Section::Q, "attn_q"),
            (Section::K, "attn_k"),
            (Section::V, "attn_v"),
        ]
    };
    let missing = all.iter().find(|(section, _)| !found.contains(section));
    let prefix = present.rsplitn(3, '.').nth(2).unwrap_or("blk.?");
    Error::MissingTensor {
        tensor: format!("{prefix}.{}.weight", missing.map_or("?", |(_, name)| name)),
        present,
    }
}

/// Rows of a fused tensor, in the order in which they are stacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Section {
    Qkv,
    Q,
    K,
    V,
    Gate,
    /// Both halves when there is no gate.
    Up,
}

impl Section {
    fn rows(self, dimensions: &Dimensions, both_halves: bool) -> usize {
        let Dimensions {
            heads,
            kv_heads,
            head_dim,
            intermediate,
            ..
        } = *dimensions;
        let rows_of = |heads: usize| heads.saturating_mul(head_dim);
        match self {
            Section::Qkv => rows_of(heads.saturating_add(kv_heads.saturating_mul(2))),
            Section::Q => rows_of(heads),
            Section::K | Section::V => rows_of(kv_heads),
            Section::Up if both_halves => intermediate.saturating_mul(2),
            Section::Gate | Section::Up => intermediate,
        }
    }

    fn formula(self, both_halves: bool) -> &'static str {
        match self {
            Section::Qkv => "(head_count + 2 * head_count_kv) heads",
            Section::Q => "head_count heads",
            Section::K | Section::V => "head_count_kv heads",
            Section::Up if both_halves => "gate and up, 2 * feed_forward_length",
            Section::Gate | Section::Up => "feed_forward_length",
        }
    }
}

enum Role {
    Whole(String),
    Rows(String, Section),
    /// What stands before and after the number of the expert.
    Experts(String, &'static str),
    RopeFactors,
    RopeFrequencies,
    Ignored,
    Unexpected(&'static str),
}

pub(super) const TOKEN_EMBEDDING: &str = "token_embd.weight";
pub(super) const OUTPUT: &str = "output.weight";
pub(super) const ROPE_FACTORS_LONG: &str = "rope_factors_long.weight";
pub(super) const ROPE_FACTORS_SHORT: &str = "rope_factors_short.weight";
pub(super) const ROPE_FREQUENCIES: &str = "rope_freqs.weight";

fn role(architecture: Architecture, name: &str) -> Role {
    if let Some((_, hf)) = global(architecture).iter().find(|(gguf, _)| *gguf == name) {
        return Role::Whole((*hf).to_owned());
    }
    if let Some((layer, name)) = split_layer(name) {
        if let Some(table) = layer_with_biases(architecture) {
            if let Some(role) = role_with_biases(architecture, table, layer, name) {
                return role;
            }
        } else if let Some((_, hf, section)) = LAYER.iter().find(|(gguf, ..)| *gguf == name) {
            let hf = format!("model.layers.{layer}.{hf}");
            return match section {
                Some(section) => Role::Rows(hf, *section),
                None => Role::Whole(hf),
            };
        }
        match name {
            // A buffer of inverse frequencies that old converters wrote; rope.freq_base gives it.
            "attn_rot_embd.weight" => return Role::Ignored,
            // Some writers repeat the model's factors in each layer.
            "rope_factors_long.weight" | "rope_factors_short.weight" | "rope_freqs.weight" => {
                return Role::Unexpected("rope factors of a single layer are not supported");
            }
            _ => {}
        }
    }
    if architecture == Architecture::Phi3Small {
        // Rope factors too: its own are metadata.
        return Role::Unexpected(
            "Phi-3-small has no such tensor, leaving it out could change results",
        );
    }
    match name {
        ROPE_FACTORS_LONG | ROPE_FACTORS_SHORT => Role::RopeFactors,
        ROPE_FREQUENCIES => Role::RopeFrequencies,
        _ if name.ends_with(".bias") => {
            Role::Unexpected("Phi-3 layers have no biases, this is another kind of model")
        }
        _ if name.contains("_exps") || name.contains("ffn_gate_inp") => {
            Role::Unexpected("mixtures of experts have another architecture")
        }
        _ if name.contains("_norm") => {
            Role::Unexpected("Phi-3 layers have no such norm, this is another kind of model")
        }
        _ => Role::Unexpected("leaving it out could change the results"),
    }
}

/// A tensor of a layer that has biases.
fn role_with_biases(
    architecture: Architecture,
    table: &[(&str, &str, bool)],
    layer: usize,
    name: &str,
) -> Option<Role> {
    if architecture == Architecture::Phimoe
        && let Some((_, matrix)) = EXPERT.iter().find(|(gguf, _)| *gguf == name)
    {
        let prefix = format!("model.layers.{layer}.{EXPERTS}");
        return Some(Role::Experts(prefix, matrix));
    }
    let (name, kind) = name.rsplit_once('.')?;
    let (_, hf, has_bias) = table.iter().find(|(gguf, ..)| *gguf == name)?;
    let known = kind == "weight" || kind == "bias" && *has_bias;
    known.then(|| Role::Whole(format!("model.layers.{layer}.{hf}.{kind}")))
}

fn layer_of(name: &str) -> Option<usize> {
    split_layer(name).map(|(layer, _)| layer)
}

fn split_layer(name: &str) -> Option<(usize, &str)> {
    let (digits, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let layer: usize = digits.parse().ok()?;
    // `blk.01` would be a second name of layer 1.
    (layer.to_string() == digits).then_some((layer, rest))
}

#[cfg(test)]
#[path = "names_tests.rs"]
mod tests;
