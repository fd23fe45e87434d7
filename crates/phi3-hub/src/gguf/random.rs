//! Models with random weights in the shape of real ones, for measuring speed without a download.
//!
//! Speed depends on shapes and types, not on what was learned: a file made here takes as long as
//! the checkpoint of its shape, and says nothing. The weights are written as stored blocks, never
//! quantized from floats, so that gigabytes take seconds; their scales keep activations as large
//! as a trained model's. llama.cpp reads the files too.

mod blocks;
mod shapes;
mod small;
mod vocabulary;

use std::path::{Path, PathBuf};

pub use shapes::{SHAPES, Shape};

use super::names::{ROPE_FACTORS_LONG, ROPE_FACTORS_SHORT, gguf_name_in};
use super::value::{Array, Value};
use super::writer::{PlannedTensor, TensorSink, Writer};
use super::{Error as GgufError, GgufFile, moe};
use crate::quantize::{Matrix, Mix};
use blocks::Random;
use phi3_kernels::BlockType;

/// Changes with anything that changes the bytes of a file, so that no file of an earlier version is
/// taken for one of this.
const VERSION: u32 = 2;

/// Bytes that are made at a time; a whole number of blocks of every type fits in.
const PIECE_BLOCKS: usize = 1 << 13;

/// Disk space that must stay free beside a new file.
const SPARE: u64 = 256 << 20;

/// Why a random model cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A shape that is not in [`SHAPES`].
    #[error("no model's shape is called {found:?}; known are {known}")]
    Shape {
        /// The name.
        found: String,
        /// Those that there are.
        known: String,
    },
    /// Fewer than one layer, or more than the shape has.
    #[error("{found} layers: {shape} has {layers}, and a part of it has from 1 to that many")]
    Layers {
        /// Layers asked for.
        found: usize,
        /// Layers of the shape.
        layers: usize,
        /// The shape.
        shape: &'static str,
    },
    /// The disk is too full.
    #[error(
        "{path} needs {needed} MB of free disk, and {free} MB are left: free some space, choose \
         another place, or make a part of the model (fewer layers)"
    )]
    DiskSpace {
        /// The file.
        path: PathBuf,
        /// Millions of bytes that it takes, and some to spare.
        needed: u64,
        /// Millions of bytes that are free.
        free: u64,
    },
    /// The file cannot be written.
    #[error(transparent)]
    Gguf(#[from] GgufError),
}

/// A model that is going to be made: everything but the weights, which follow from the seed.
///
/// ```
/// use phi3_hub::gguf::random::RandomModel;
/// use phi3_hub::quantize::Mix;
///
/// let mix: Mix = "Q4_0".parse()?;
/// let model = RandomModel::new("phi-3-mini", mix, Some(2), 0)?;
/// assert_eq!(model.description(), "random phi-3-mini, 2 of 32 layers, Q4_0, seed 0");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct RandomModel {
    shape: Shape,
    layers: usize,
    mix: Mix,
    seed: u64,
    writer: Writer,
}

impl RandomModel {
    /// Plans a model of a shape in [`SHAPES`]; `layers` makes only so many of its layers, `None`
    /// all. The same arguments make the same bytes on every machine.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Layers`].
    pub fn new(shape: &str, mix: Mix, layers: Option<usize>, seed: u64) -> Result<Self, Error> {
        let shape = Shape::from_name(shape)?;
        let layers = layers.unwrap_or(shape.layers);
        if layers == 0 || layers > shape.layers {
            return Err(Error::Layers {
                found: layers,
                layers: shape.layers,
                shape: shape.name,
            });
        }
        let mut model = Self {
            shape,
            layers,
            mix,
            seed,
            writer: Writer::new(),
        };
        model.set_metadata();
        model.add_tensors()?;
        Ok(model)
    }

    /// The shape.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// How the weights are stored.
    pub fn mix(&self) -> Mix {
        self.mix
    }

    /// Layers that are made.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// What it is, in words; also the file's `general.description`.
    pub fn description(&self) -> String {
        let (shape, all) = (self.shape.name, self.shape.layers);
        let layers = match self.layers == all {
            true => format!("{all} layers"),
            false => format!("{} of {all} layers", self.layers),
        };
        format!(
            "random {shape}, {layers}, {}, seed {}",
            self.mix.name(),
            self.seed
        )
    }

    /// A name for its file that no other random model has.
    pub fn file_name(&self) -> String {
        format!(
            "{}-{}-of-{}-layers-{}-seed-{}-v{VERSION}.gguf",
            self.shape.name,
            self.layers,
            self.shape.layers,
            self.mix.name(),
            self.seed,
        )
    }

    /// Bytes of its weights; the file is larger by about 50 bytes a token of the vocabulary.
    pub fn size(&self) -> u64 {
        self.writer.tensors().iter().map(|tensor| tensor.size).sum()
    }

    /// Whether `path` is a file of exactly this model, so that it need not be made again. The
    /// weights are not compared: files appear under their name only when they are complete.
    pub fn is_at(&self, path: &Path) -> bool {
        let Ok(file) = GgufFile::open(path) else {
            return false;
        };
        let found = file.container().tensors().iter();
        let same = |(found, planned): (&super::TensorInfo, &PlannedTensor)| {
            found.name == planned.name
                && found.shape == planned.shape
                && found.tensor_type == planned.tensor_type
        };
        file.metadata() == self.writer.metadata()
            && found.len() == self.writer.tensors().len()
            && found.zip(self.writer.tensors()).all(same)
    }

    /// Writes the file, which appears under `path` when it is complete; `progress` hears how many
    /// bytes of weights have been written. A few megabytes are in memory.
    ///
    /// # Errors
    /// [`Error::DiskSpace`] before anything is written, [`Error::Gguf`] if writing fails.
    pub fn write(&self, path: &Path, mut progress: impl FnMut(u64)) -> Result<(), Error> {
        self.check_room(path, crate::disk::free_space(path))?;
        let mut written = 0;
        self.writer.write(path, |tensor, sink| {
            self.fill(tensor, sink, |bytes| {
                written += bytes;
                progress(written);
            })
        })
    }

    /// `free` bytes may be written to the disk of `path`, if the system tells.
    fn check_room(&self, path: &Path, free: Option<u64>) -> Result<(), Error> {
        let needed = self.size() + 64 * self.shape.vocab as u64 + SPARE;
        match free {
            Some(free) if free < needed => Err(Error::DiskSpace {
                path: path.to_owned(),
                needed: needed / 1_000_000,
                free: free / 1_000_000,
            }),
            _ => Ok(()),
        }
    }

    fn set_metadata(&mut self) {
        let shape = self.shape;
        let description = self.description();
        let out = &mut self.writer;
        let prefix = shape.architecture().name();
        out.set("general.architecture", prefix);
        out.set("general.name", format!("Random {}", shape.name).as_str());
        out.set("general.description", description.as_str());
        out.set("general.file_type", self.mix.file_type());
        out.set("general.quantization_version", 2u32);
        out.set(format!("{prefix}.random.version"), VERSION);
        if self.mix.base() == BlockType::Int4 {
            for (key, value) in super::int4::metadata() {
                out.set(key, value);
            }
        }
        match shape.block_sparse {
            true => self.set_small(),
            false => self.set_sizes(),
        }
        let out = &mut self.writer;
        let vocabulary = vocabulary::Vocabulary::new(shape.vocab);
        out.set("tokenizer.ggml.model", "llama");
        out.set("tokenizer.ggml.pre", "default");
        let tokens: Array = vocabulary.tokens.iter().map(String::as_str).collect();
        out.set("tokenizer.ggml.tokens", tokens);
        out.set("tokenizer.ggml.scores", Array::F32(vocabulary.scores));
        out.set("tokenizer.ggml.token_type", Array::I32(vocabulary.types));
        for (key, id) in [
            ("bos", 1),
            ("eos", vocabulary.end),
            ("unknown", 0),
            ("padding", vocabulary.end),
        ] {
            out.set(format!("tokenizer.ggml.{key}_token_id"), Value::U32(id));
        }
        out.set("tokenizer.ggml.add_bos_token", false);
        out.set("tokenizer.ggml.add_eos_token", false);
    }

    fn set_sizes(&mut self) {
        let shape = self.shape;
        let prefix = shape.architecture().name();
        let out = &mut self.writer;
        for (key, number) in [
            ("context_length", shape.context),
            ("rope.scaling.original_context_length", shape.trained),
            ("embedding_length", shape.hidden),
            ("feed_forward_length", shape.intermediate),
            ("block_count", self.layers),
            ("attention.head_count", shape.heads),
            ("attention.head_count_kv", shape.kv_heads),
            ("attention.sliding_window", shape.window),
            ("rope.dimension_count", shape.rotary_dim),
        ] {
            // Sizes of models are far below 2^32.
            out.set(format!("{prefix}.{key}"), number as u32);
        }
        out.set(
            format!("{prefix}.attention.layer_norm_rms_epsilon"),
            1e-5f32,
        );
        out.set(format!("{prefix}.rope.freq_base"), 10_000f32);
        if shape.experts > 0 {
            let experts = moe::Fields::of(shape.experts as u32);
            let mscale = shape.attention_factor().map(f64::from);
            for (key, value) in experts.keys(mscale.map(|mscale| [mscale; 2])) {
                out.set(format!("{prefix}.{key}"), value);
            }
        }
        if let Some(factor) = shape.attention_factor() {
            out.set(format!("{prefix}.rope.scaling.attn_factor"), factor);
        }
    }

    fn add_tensors(&mut self) -> Result<(), Error> {
        let shape = self.shape;
        let Shape { hidden, vocab, .. } = shape;
        let heads = shape.hidden / shape.heads;
        let qkv = (shape.heads + 2 * shape.kv_heads) * heads;
        self.add("model.embed_tokens.weight", &[vocab, hidden], None)?;
        if shape.attention_factor().is_some() && !shape.block_sparse {
            let factors = [shape.rotary_dim / 2];
            for name in [ROPE_FACTORS_LONG, ROPE_FACTORS_SHORT] {
                self.writer.add_tensor(name, &factors, BlockType::F32)?;
            }
        }
        for layer in 0..self.layers {
            if shape.experts > 0 {
                self.add_moe_layer(layer)?;
                continue;
            }
            if shape.block_sparse {
                self.add_small_layer(layer)?;
                continue;
            }
            let tensors: [(&str, &[usize]); 6] = [
                ("input_layernorm", &[hidden]),
                ("post_attention_layernorm", &[hidden]),
                ("self_attn.qkv_proj", &[qkv, hidden]),
                ("self_attn.o_proj", &[hidden, hidden]),
                ("mlp.gate_up_proj", &[2 * shape.intermediate, hidden]),
                ("mlp.down_proj", &[hidden, shape.intermediate]),
            ];
            for (name, extents) in tensors {
                let name = format!("model.layers.{layer}.{name}.weight");
                self.add(&name, extents, Some(layer))?;
            }
        }
        if shape.block_sparse {
            for kind in ["weight", "bias"] {
                self.add(&format!("model.final_layernorm.{kind}"), &[hidden], None)?;
            }
        } else {
            self.add("model.norm.weight", &[hidden], None)?;
        }
        if shape.experts > 0 {
            self.add("model.norm.bias", &[hidden], None)?;
            self.add("lm_head.bias", &[vocab], None)?;
        }
        if !shape.tied {
            self.add("lm_head.weight", &[vocab, hidden], None)?;
        }
        Ok(())
    }

    fn add_moe_layer(&mut self, layer: usize) -> Result<(), Error> {
        let shape = self.shape;
        let (hidden, inner) = (shape.hidden, shape.intermediate);
        let kv = hidden / shape.heads * shape.kv_heads;
        let prefix = format!("model.layers.{layer}");
        for (name, rows) in [
            ("self_attn.q_proj", hidden),
            ("self_attn.k_proj", kv),
            ("self_attn.v_proj", kv),
            ("self_attn.o_proj", hidden),
        ] {
            let name = format!("{prefix}.{name}");
            self.add(&format!("{name}.weight"), &[rows, hidden], Some(layer))?;
            self.add(&format!("{name}.bias"), &[rows], None)?;
        }
        for name in ["input_layernorm", "post_attention_layernorm"] {
            for kind in ["weight", "bias"] {
                self.add(&format!("{prefix}.{name}.{kind}"), &[hidden], None)?;
            }
        }
        let moe = format!("{prefix}.block_sparse_moe");
        let gate = [shape.experts, hidden];
        self.add(&format!("{moe}.gate.weight"), &gate, Some(layer))?;
        for (matrix, rows, columns) in [
            ("w1", inner, hidden),
            ("w3", inner, hidden),
            ("w2", hidden, inner),
        ] {
            let stack = [shape.experts, rows, columns];
            let name = format!("{moe}.experts.0.{matrix}.weight");
            self.add(&name, &stack, Some(layer))?;
        }
        Ok(())
    }

    /// Norms and biases are f32, matrices what the mix makes of them.
    fn add(&mut self, hf: &str, shape: &[usize], layer: Option<usize>) -> Result<(), Error> {
        let architecture = self.shape.architecture();
        let name = gguf_name_in(architecture, hf).unwrap_or_else(|| hf.to_owned());
        let block_type = match shape {
            [_, columns] | [_, _, columns] => self.mix.block_type(Matrix {
                name: &name,
                columns: *columns,
                layer,
                layers: self.layers,
                tied: self.shape.tied,
                importance: false,
            }),
            _ => BlockType::F32,
        };
        Ok(self.writer.add_tensor(name, shape, block_type)?)
    }

    /// The bytes of one tensor, which depend on its name and the seed, not on its place.
    fn fill(
        &self,
        tensor: &PlannedTensor,
        sink: &mut TensorSink<'_>,
        mut written: impl FnMut(u64),
    ) -> Result<(), Error> {
        if tensor.name == ROPE_FACTORS_LONG || tensor.name == ROPE_FACTORS_SHORT {
            let factors = match tensor.name == ROPE_FACTORS_LONG {
                true => self.shape.long_factors(),
                false => vec![1.0; self.shape.rotary_dim / 2],
            };
            let bytes: Vec<u8> = factors.iter().flat_map(|f| f.to_le_bytes()).collect();
            sink.write(&bytes)?;
            written(tensor.size);
            return Ok(());
        }
        let mut random = Random::new(self.seed, &tensor.name);
        let block_type = tensor.tensor_type.block_type().unwrap_or(BlockType::F32);
        let is_norm = tensor.shape.len() == 1 && !tensor.name.ends_with(".bias");
        let mut piece = vec![0u8; PIECE_BLOCKS * block_type.block_bytes()];
        let mut left = tensor.size;
        while left > 0 {
            let len = usize::try_from(left).map_or(piece.len(), |left| left.min(piece.len()));
            let piece = piece.get_mut(..len).unwrap_or_default();
            match is_norm {
                true => blocks::fill_norm(&mut random, piece),
                false => blocks::fill(block_type, &mut random, piece),
            }
            sink.write(piece)?;
            written(len as u64);
            left -= len as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
