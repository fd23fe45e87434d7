//! `phi3 logits`: the numbers behind the answers, for comparison with any reference.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use phi3::LanguageModel;
use phi3::hub::safetensors::{TensorData, TensorToWrite, write_safetensors};
use phi3::image::{CROP, Limits};
use phi3::nn::{CausalLm, Input, KvCache, LogitRows, ModelInfo, Observer, Recompute, Span};

use crate::args::{ComputeArgs, ImageArgs, SourceArgs, load_exactly};
use crate::output::UsageError;

/// Write the logits of given token ids, for comparison with another implementation.
///
/// The file has `logits`, f32 [n, vocab], row i after id i. With several files their sequences run packed in one batch, and each tensor's name starts with
/// its file's stem and a dot.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    /// A JSON array of token ids; several files run packed in one batch.
    #[arg(
        long,
        required_unless_present = "prompt",
        conflicts_with_all = ["prompt", "image", "num_crops"],
        num_args = 1..,
        value_name = "FILE.json"
    )]
    ids: Vec<PathBuf>,
    /// Instead of ids a text, tokenized as the reference does, with the tokenizer's BOS. Writes
    /// input_ids too; with pictures, which it names <|image_1|>, <|image_2|>, …, also pixel_values
    /// [images, crops + 1, 3, 336, 336] and image_sizes [images, 2]; image k's ids are then -k.
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    #[command(flatten)]
    images: ImageArgs,
    /// Run the first K ids as prefill and each later one as one cached step [default: all prefill].
    #[arg(long, value_name = "K")]
    decode_from: Option<NonZeroUsize>,
    /// Also write the hidden states: hidden_embed, hidden_layer0_attn, hidden_layer0, …,
    /// hidden_layer_last, hidden_final_norm; of a mixture of experts also layer0.router_logits,
    /// layer0.experts (i64), layer0.weights, layer0.moe_in, layer0.moe_out, ….
    #[arg(long)]
    hidden: bool,
    /// Then continue greedily by N ids: generate_ids (N) and generate_logits (N, vocab), the row
    /// that chose each.
    #[arg(long, value_name = "N", default_value_t = 0)]
    generate: usize,
    /// Whether passing the LongRoPE limit computes the history again: auto is the model's own rule.
    #[arg(long, value_enum, default_value_t = RecomputeArg::Auto)]
    recompute: RecomputeArg,
    /// Where to write.
    #[arg(long, value_name = "OUT.safetensors")]
    out: PathBuf,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum RecomputeArg {
    /// The model's own rule: phi3, phimoe and phi3_v recompute, phi3small does not.
    Auto,
    /// The whole history is computed again.
    Always,
    /// Cached keys keep the rotation they have.
    Never,
}

/// One file's sequence while it runs.
struct Sequence {
    /// What its tensors' names start with.
    prefix: String,
    ids: Vec<u32>,
    /// What runs instead of the embeddings of the ids, and what is written of it.
    shown: Option<Shown>,
    /// Ids that have run.
    done: usize,
    cache: KvCache,
    logits: Vec<f32>,
    hidden: BTreeMap<String, Hidden>,
    generated: Vec<u32>,
    generated_rows: Vec<f32>,
}

/// A prompt as the model reads it.
struct Shown {
    input_ids: Vec<i64>,
    rows: Tensor,
    pixel_values: Vec<f32>,
    /// Of `pixel_values`: images and crops of each.
    shape: [usize; 2],
    image_sizes: Vec<i64>,
}

#[derive(Default)]
struct Hidden {
    values: Vec<f32>,
    width: usize,
    /// Whether the values are indices: written as i64.
    indices: bool,
}

pub fn run(args: &Args) -> Result<()> {
    // What can be wrong with the files is said before the model is loaded and run.
    let inputs = read_all(&args.ids)?;
    check_out(&args.out)?;
    let mut model = load_exactly(&args.source, &args.compute)?;
    args.images.prepare(&mut model)?;
    let shown = match &args.prompt {
        Some(prompt) => {
            let shown = show(&model, prompt, &args.images)?;
            check_length(shown.input_ids.len(), args.generate, model.model().info())
                .context("--prompt")?;
            Some(shown)
        }
        None => None,
    };
    let model = model.model().as_ref();
    for (path, input) in args.ids.iter().zip(&inputs) {
        input
            .check(model.info(), args.generate)
            .with_context(|| path.display().to_string())?;
    }
    let mut sequences: Vec<_> = inputs
        .into_iter()
        .map(|input| Sequence::new(input, new_cache(model, args.recompute)))
        .collect();
    if let Some(shown) = shown {
        let mut sequence = Sequence::new(
            IdsFile {
                prefix: String::new(),
                // Images' places are no ids; what runs are the rows.
                ids: shown
                    .input_ids
                    .iter()
                    .map(|id| u32::try_from(*id).unwrap_or(0))
                    .collect(),
            },
            new_cache(model, args.recompute),
        );
        sequence.shown = Some(shown);
        sequences.push(sequence);
    }

    let prefill = args.decode_from.map_or(usize::MAX, NonZeroUsize::get);
    step(model, &mut sequences, args.hidden, |sequence| {
        sequence.ids.len().min(prefill)
    })?;
    while sequences
        .iter()
        .any(|sequence| sequence.done < sequence.ids.len())
    {
        step(model, &mut sequences, args.hidden, |sequence| {
            usize::from(sequence.done < sequence.ids.len())
        })?;
    }
    generate(model, &mut sequences, args.generate)?;
    write(&args.out, &sequences, model.info().vocab_size)
}

/// Ids, rows and pixels of a prompt.
fn show(model: &LanguageModel, prompt: &str, args: &ImageArgs) -> Result<Shown> {
    let mut shown = Shown {
        input_ids: Vec::new(),
        rows: Tensor::zeros(0, DType::F32, &Device::Cpu)?,
        pixel_values: Vec::new(),
        shape: [0, 0],
        image_sizes: Vec::new(),
    };
    if model.vision().is_none() {
        let ids = model.tokenizer()?.encode(prompt, true)?;
        shown.rows = model.model().embed(&ids)?;
        shown.input_ids = ids.into_iter().map(i64::from).collect();
        return Ok(shown);
    }
    let processor = model.image_processor()?;
    let mut processed = Vec::new();
    for image in args.images()? {
        let pixels = image.open(&Limits::default())?;
        let image = processor
            .process(&pixels)
            .with_context(|| format!("{image:?}"))?;
        shown.pixel_values.extend(image.filled(processor.num_crops));
        let size = [image.layout.height(), image.layout.width()];
        for side in size {
            shown.image_sizes.push(i64::try_from(side)?);
        }
        processed.push(image);
    }
    shown.shape = [processed.len(), processor.num_crops + 1];
    let seen = model.see_processed(&processed)?;
    let prompt = model.image_prompt(prompt, &seen)?;
    (shown.input_ids, shown.rows) = (prompt.ids, prompt.embeddings);
    ensure!(
        !shown.input_ids.is_empty(),
        "--prompt: the text has no token"
    );
    Ok(shown)
}

/// What a file holds, and the prefix of its tensors.
struct IdsFile {
    prefix: String,
    ids: Vec<u32>,
}

fn read_all(paths: &[PathBuf]) -> Result<Vec<IdsFile>> {
    let mut stems: Vec<String> = Vec::new();
    for path in paths {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        if stems.contains(&stem.to_string()) {
            return Err(UsageError(format!(
                "--ids: {} has the same stem as another file, `{stem}`, and tensors are named by \
                 stem: rename one of them",
                path.display()
            ))
            .into());
        }
        stems.push(stem.into_owned());
    }
    let several = paths.len() > 1;
    let read = paths.iter().zip(stems).map(|(path, stem)| {
        let name = path.display();
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {name}"))?;
        let ids: Vec<u32> = serde_json::from_str(&text)
            .with_context(|| format!("{name} must be a JSON array of token ids"))?;
        ensure!(
            !ids.is_empty(),
            "{name} is an empty array: give at least one token id"
        );
        let prefix = if several {
            format!("{stem}.")
        } else {
            String::new()
        };
        Ok(IdsFile { prefix, ids })
    });
    read.collect()
}

impl IdsFile {
    fn check(&self, info: &ModelInfo, generate: usize) -> Result<()> {
        let vocab = info.vocab_size;
        let outside = |id: u32| usize::try_from(id).is_ok_and(|id| id >= vocab);
        if let Some((idx, id)) = (self.ids.iter().enumerate()).find(|(_, id)| outside(**id)) {
            bail!("element {idx} is {id}, which is outside the model's vocabulary of {vocab}");
        }
        check_length(self.ids.len(), generate, info)
    }
}

fn check_length(ids: usize, generate: usize, info: &ModelInfo) -> Result<()> {
    // The last generated id does not run.
    let length = ids.saturating_add(generate.saturating_sub(1));
    let context = info.max_position_embeddings;
    ensure!(
        length <= context,
        "{ids} ids{} are longer than the model's context of {context} tokens",
        match generate {
            0 | 1 => String::new(),
            _ => format!(" and {generate} generated ones"),
        }
    );
    Ok(())
}

/// A place that cannot be written to is better known before the model runs than after.
fn check_out(out: &Path) -> Result<()> {
    let folder = match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    ensure!(
        folder.is_dir(),
        "--out: there is no folder {}: create it first",
        folder.display()
    );
    ensure!(
        !out.is_dir(),
        "--out: {} is a folder: give the name of a file in it",
        out.display()
    );
    Ok(())
}

fn new_cache(model: &dyn CausalLm, recompute: RecomputeArg) -> KvCache {
    match recompute {
        RecomputeArg::Auto => model.new_cache(),
        RecomputeArg::Always => model.new_cache().with_recompute(Recompute::Always),
        RecomputeArg::Never => model.new_cache().with_recompute(Recompute::Never),
    }
}

impl Sequence {
    fn new(input: IdsFile, cache: KvCache) -> Self {
        Self {
            prefix: input.prefix,
            ids: input.ids,
            shown: None,
            done: 0,
            cache,
            logits: Vec::new(),
            hidden: BTreeMap::new(),
            generated: Vec::new(),
            generated_rows: Vec::new(),
        }
    }
}

/// Runs the next `count(sequence)` ids of every sequence in one packed call.
fn step(
    model: &dyn CausalLm,
    sequences: &mut [Sequence],
    hidden: bool,
    count: impl Fn(&Sequence) -> usize,
) -> Result<()> {
    let counts: Vec<usize> = sequences.iter().map(count).collect();
    let ids: Vec<u32> = sequences
        .iter()
        .zip(&counts)
        .flat_map(|(sequence, count)| sequence.ids[sequence.done..].iter().take(*count))
        .copied()
        .collect();
    let mut recorder = Recorder::default();
    let observer = hidden.then_some(&mut recorder as &mut dyn Observer);
    let shown = match sequences.first() {
        Some(Sequence {
            shown: Some(shown),
            done,
            ..
        }) => {
            let count = counts.first().copied().unwrap_or(0);
            Some(shown.rows.narrow(0, *done, count)?)
        }
        _ => None,
    };
    let input = match &shown {
        Some(rows) => Input::Embeddings(rows),
        None => Input::Ids(&ids),
    };
    let mut rows = forward(model, sequences, &counts, input, observer)?.into_iter();
    for (sequence, count) in sequences.iter_mut().zip(&counts) {
        sequence.done += count;
        sequence.logits.extend(rows.by_ref().take(*count).flatten());
    }
    for (name, shown) in recorder.shown {
        let width = shown.width;
        let mut rows = shown.values.chunks_exact(width.max(1));
        for (sequence, count) in sequences
            .iter_mut()
            .zip(&counts)
            .filter(|(_, count)| **count > 0)
        {
            let hidden = sequence.hidden.entry(name.clone()).or_default();
            (hidden.width, hidden.indices) = (width, shown.indices);
            hidden.values.extend(rows.by_ref().take(*count).flatten());
        }
    }
    Ok(())
}

/// One packed call of the sequences whose count is not 0: the logits of all its rows.
fn forward(
    model: &dyn CausalLm,
    sequences: &mut [Sequence],
    counts: &[usize],
    input: Input<'_>,
    observer: Option<&mut dyn Observer>,
) -> Result<Vec<Vec<f32>>> {
    let mut spans: Vec<Span<'_>> = sequences
        .iter_mut()
        .zip(counts)
        .filter(|(_, count)| **count > 0)
        .map(|(sequence, count)| Span::new(*count, &mut sequence.cache).with_logits(LogitRows::All))
        .collect();
    let logits = model.forward(input, &mut spans, observer)?;
    Ok(logits.to_vec2()?)
}

/// Greedy continuation, all sequences packed.
fn generate(model: &dyn CausalLm, sequences: &mut [Sequence], count: usize) -> Result<()> {
    if count == 0 {
        return Ok(());
    }
    let vocab = model.info().vocab_size;
    let mut rows: Vec<Vec<f32>> = sequences
        .iter()
        .map(|sequence| sequence.logits[sequence.logits.len() - vocab..].to_vec())
        .collect();
    for idx in 0..count {
        if idx > 0 {
            let last = sequences
                .iter()
                .filter_map(|sequence| sequence.generated.last().copied());
            let ids: Vec<u32> = last.collect();
            rows = forward(
                model,
                sequences,
                &vec![1; ids.len()],
                Input::Ids(&ids),
                None,
            )?;
        }
        for (sequence, row) in sequences.iter_mut().zip(&rows) {
            let best = phi3::argmax(row).context("the logits hold no number to choose by")?;
            sequence.generated.push(u32::try_from(best)?);
            sequence.generated_rows.extend(row);
        }
    }
    Ok(())
}

fn write(out: &Path, sequences: &[Sequence], vocab: usize) -> Result<()> {
    let mut floats: Vec<(String, Vec<usize>, &[f32])> = Vec::new();
    let mut ids: Vec<(String, Vec<usize>, Vec<i64>)> = Vec::new();
    for sequence in sequences {
        let name = |name: &str| format!("{}{name}", sequence.prefix);
        floats.push((
            name("logits"),
            vec![sequence.ids.len(), vocab],
            &sequence.logits,
        ));
        if let Some(shown) = &sequence.shown {
            let count = shown.input_ids.len();
            ids.push((name("input_ids"), vec![count], shown.input_ids.clone()));
            let [images, crops] = shown.shape;
            if images > 0 {
                let shape = vec![images, crops, 3, CROP, CROP];
                floats.push((name("pixel_values"), shape, &shown.pixel_values));
                let sizes = shown.image_sizes.clone();
                ids.push((name("image_sizes"), vec![images, 2], sizes));
            }
        }
        for (hidden_name, hidden) in &sequence.hidden {
            let shape = vec![hidden.values.len() / hidden.width.max(1), hidden.width];
            if hidden.indices {
                let indices = hidden.values.iter().map(|&index| index as i64).collect();
                ids.push((name(hidden_name), shape, indices));
            } else {
                floats.push((name(hidden_name), shape, &hidden.values));
            }
        }
        if !sequence.generated.is_empty() {
            let shape = vec![sequence.generated.len(), vocab];
            floats.push((name("generate_logits"), shape, &sequence.generated_rows));
            ids.push((
                name("generate_ids"),
                vec![sequence.generated.len()],
                sequence.generated.iter().map(|id| i64::from(*id)).collect(),
            ));
        }
    }
    let mut tensors: Vec<TensorToWrite<'_>> = floats
        .iter()
        .map(|(name, shape, values)| TensorToWrite {
            name,
            shape,
            data: TensorData::F32(values),
        })
        .collect();
    tensors.extend(ids.iter().map(|(name, shape, ids)| TensorToWrite {
        name,
        shape,
        data: TensorData::I64(ids),
    }));
    write_safetensors(out, &tensors, &[("format", "pt")])
        .with_context(|| format!("writing {}", out.display()))
}

/// Collects the hidden states of a call, as f32 rows.
#[derive(Default)]
struct Recorder {
    shown: BTreeMap<String, Hidden>,
}

impl Observer for Recorder {
    fn wants(&self, name: &str) -> bool {
        // `layerN.` is what a router shows; linear layers are called by their tensors' names.
        name.starts_with("hidden_") || name.starts_with("layer")
    }

    fn observe(&mut self, name: &str, value: &Tensor) -> phi3::nn::Result<()> {
        let width = value.dims().iter().skip(1).product();
        let shown = Hidden {
            // Indices are far below 2^24, up to which f32 counts exactly.
            values: value.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?,
            width,
            indices: value.dtype() == DType::U32,
        };
        self.shown.insert(name.to_owned(), shown);
        Ok(())
    }
}
