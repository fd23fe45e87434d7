//! A checkpoint becomes a GGUF file, or a source of the same weights in fewer bits.
//!
//! [`write_gguf`] streams a model tensor by tensor into a file that llama.cpp reads too;
//! [`QuantizedSource`] gives the same bytes, encoded when they are asked for, to a model that is
//! being loaded. Which tensor gets which type is a [`Mix`].

mod encode;
mod error;
mod loading;
mod mix;
mod plan;
mod spelling;

use std::ops::ControlFlow;
use std::path::Path;

use phi3_nn::TensorSource;
use serde_json::Value as Json;

use crate::Checkpoint;
use crate::gguf::{PlannedTensor, TensorSink, Writer, export, int4};
use encode::Job;
use plan::Plan;

pub use error::{Error, Result};
pub use loading::QuantizedSource;
pub(crate) use mix::Matrix;
pub use mix::{Mix, ParseMixError};
pub use plan::Importance;

/// How to write a file.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Replaces a file that exists.
    pub force: bool,
    /// Leaves tokenizer and chat template out.
    pub without_tokenizer: bool,
    /// How much each column of each matrix matters.
    pub importance: Option<Importance>,
}

/// A file that was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Tensors in the file.
    pub tensors: usize,
    /// Bytes of their data.
    pub bytes: u64,
    /// Number of weights.
    pub weights: u64,
}

/// Hears how far writing is: a tensor comes next, after so many bytes of so many. What it returns
/// says whether to go on.
pub type OnProgress<'a> = dyn FnMut(&PlannedTensor, u64, u64) -> ControlFlow<()> + 'a;

/// Writes `checkpoint` as a GGUF file of architecture `phi3` or `phimoe`, as llama.cpp's converter and quantizer
/// would, or of `phi3small`, which is this project's own. The file appears under `path` when it is complete; until then, and after an error, what
/// was there stays. Besides the mapped checkpoint a few megabytes are in memory.
///
/// # Errors
/// [`Error`], naming the field, tensor or file. All but weights that a type cannot hold is found
/// before the first byte is written.
pub fn write_gguf(
    checkpoint: &Checkpoint,
    mix: Mix,
    path: &Path,
    options: &Options,
    on_progress: &mut OnProgress<'_>,
) -> Result<Summary> {
    refuse_existing(checkpoint, path, options.force)?;
    let source = spelling::of_hub(&checkpoint.weights);
    let plan = Plan::new(
        source.as_ref(),
        &checkpoint.config,
        mix,
        options.importance.as_ref(),
    )?;
    warn_if_quantized(checkpoint);
    let mut writer = Writer::new();
    let metadata = export::model(&checkpoint.config, &model_name(checkpoint), mix.file_type())
        .map_err(Error::Config)?;
    for (key, value) in metadata.values {
        writer.set(key, value);
    }
    if mix.base() == phi3_kernels::BlockType::Int4 {
        for (key, value) in int4::metadata() {
            writer.set(key, value);
        }
    }
    if !options.without_tokenizer {
        for (key, value) in export::tokenizer(checkpoint).map_err(Error::Tokenizer)? {
            writer.set(key, value);
        }
    }
    for group in plan.tensors().chunk_by(|a, b| a.gguf == b.gguf) {
        let [first, ..] = group else { continue };
        let mut shape = first.shape.clone();
        if first.stacked {
            shape.insert(0, group.len());
        }
        writer.add_tensor(first.gguf.as_str(), &shape, first.block_type)?;
    }
    for (name, factors) in &metadata.rope_factors {
        writer.add_tensor(*name, &[factors.len()], phi3_kernels::BlockType::F32)?;
    }
    let total = writer.tensors().iter().map(|tensor| tensor.size).sum();
    let mut done = 0;
    writer.write(path, |planned, sink| -> Result<()> {
        if on_progress(planned, done, total).is_break() {
            return Err(Error::Interrupted);
        }
        match metadata
            .rope_factors
            .iter()
            .find(|(name, _)| *name == planned.name)
        {
            Some((_, factors)) => {
                for factor in factors {
                    sink.write(&factor.to_le_bytes())?;
                }
            }
            None => fill(source.as_ref(), &plan, options, planned, sink)?,
        }
        done += planned.size;
        Ok(())
    })?;
    let weights = |tensor: &PlannedTensor| tensor.shape.iter().map(|n| *n as u64).product::<u64>();
    Ok(Summary {
        tensors: writer.tensors().len(),
        bytes: total,
        weights: writer.tensors().iter().map(weights).sum(),
    })
}

/// A tensor of the file, expert by expert where it is a stack.
fn fill(
    source: &dyn TensorSource,
    plan: &Plan,
    options: &Options,
    planned: &PlannedTensor,
    sink: &mut TensorSink<'_>,
) -> Result<()> {
    let entries = plan.tensors().iter();
    for entry in entries.filter(|entry| entry.gguf == planned.name) {
        let tensor = plan::read(source, &entry.hf)?;
        let importance = options.importance.as_ref();
        Job {
            name: &entry.hf,
            tensor: &tensor,
            to: entry.block_type,
            importance: importance.and_then(|all| all.of(&entry.hf)),
        }
        .run::<Error>(|bytes| Ok(sink.write(bytes)?))?;
    }
    Ok(())
}

/// A file that is being read through a mapping must stay, and one that somebody made should.
fn refuse_existing(checkpoint: &Checkpoint, path: &Path, force: bool) -> Result<()> {
    if let (Ok(output), Ok(input)) = (
        path.canonicalize(),
        Path::new(&checkpoint.origin).canonicalize(),
    ) && output == input
    {
        return Err(Error::SameFile {
            path: path.to_owned(),
        });
    }
    if !force && path.symlink_metadata().is_ok() {
        return Err(Error::Exists {
            path: path.to_owned(),
        });
    }
    Ok(())
}

/// Rounding twice costs quality that nobody sees in the file.
fn warn_if_quantized(checkpoint: &Checkpoint) {
    let float = ["F64", "F32", "F16", "BF16", "I64"];
    let quantized = |t: &&crate::TensorEntry| !float.contains(&t.dtype.to_uppercase().as_str());
    if let Some(tensor) = checkpoint.tensors.iter().find(quantized) {
        tracing::warn!(
            tensor = tensor.name,
            dtype = tensor.dtype,
            "the model is quantized already: quantizing it again loses more than quantizing the original"
        );
    }
}

/// What people call the model: the name in its config, or that of its folder or file.
fn model_name(checkpoint: &Checkpoint) -> String {
    let named = ["_name_or_path", "name_or_path"]
        .into_iter()
        .find_map(|key| checkpoint.config.get(key).and_then(Json::as_str))
        .filter(|name| !name.is_empty() && name.len() < 100);
    let origin = Path::new(&checkpoint.origin);
    let stem = if origin
        .extension()
        .is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
    {
        origin.file_stem()
    } else {
        origin.file_name()
    };
    let stem = stem.map(|name| name.to_string_lossy().into_owned());
    let name = named.map(str::to_owned).or(stem).unwrap_or_default();
    name.rsplit('/').next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests;
