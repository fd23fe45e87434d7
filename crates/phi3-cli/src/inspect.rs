//! `phi3 inspect`: what a model is, without running it.

mod router;

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::Result;
use phi3::hub::{Checkpoint, TensorEntry};
use phi3::nn::CacheStore;
use phi3::{CacheType, ModelConfig};
use serde::Serialize;
use serde_json::Value;

use crate::args::{PositionalSourceArgs, open, open_by};
use crate::output;

/// Show what a model is: architecture, size, quantization, memory.
///
/// With --router instead which experts a prompt takes.
///
/// Of a model on the hub the small files and the headers of its safetensors files are fetched; a .gguf
/// file, and what --router runs, as a whole.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: PositionalSourceArgs,
    /// Estimate memory for a sequence of this many tokens [default: 4096, or the model's context].
    #[arg(long, value_name = "TOKENS")]
    context: Option<usize>,
    /// Type of keys and values in that estimate: f16, f32 or q8_0.
    #[arg(long, value_name = "TYPE", default_value_t)]
    cache_type: CacheType,
    /// List every tensor.
    #[arg(long)]
    tensors: bool,
    /// Run a mixture of experts on this text, and print how many tokens chose each expert of each
    /// layer.
    #[arg(long, value_name = "PROMPT", conflicts_with_all = ["context", "tensors"])]
    router: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let source = args.source.source();
    if let Some(prompt) = &args.router {
        return router::run(&open(&source)?, prompt, args.json);
    }
    let checkpoint = open_by(phi3::hub::open_headers, &source)?;
    let report = Report::new(&checkpoint, args.context, args.cache_type, args.tensors);
    if args.json {
        output::print(&format!("{}\n", serde_json::to_string_pretty(&report)?))
    } else {
        output::print(&report.to_text())
    }
}

#[derive(Serialize)]
struct Report {
    model: String,
    model_type: String,
    architecture: Option<String>,
    parameters: u64,
    /// Bytes of all tensors in their files.
    size: u64,
    /// Kind of tensor, then its storage types with their number of weights.
    quantization: BTreeMap<&'static str, BTreeMap<String, u64>>,
    chat_template: bool,
    tokenizer: bool,
    #[serde(flatten)]
    details: Details,
    #[serde(skip_serializing_if = "Option::is_none")]
    tensors: Option<Vec<TensorRow>>,
}

/// What the configuration says, or why it cannot be run.
#[derive(Serialize)]
#[serde(untagged)]
enum Details {
    Known(Box<Known>),
    Unsupported { unsupported: String },
}

#[derive(Serialize)]
struct Known {
    num_hidden_layers: usize,
    hidden_size: usize,
    vocab_size: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
    context: usize,
    sliding_window: Option<usize>,
    rope: Rope,
    memory: Memory,
}

#[derive(Serialize)]
struct Rope {
    kind: &'static str,
    theta: f64,
    rotary_dim: usize,
    original_max_position_embeddings: Option<usize>,
    short_mscale: Option<f64>,
    long_mscale: Option<f64>,
}

/// Bytes, on the CPU.
#[derive(Serialize)]
struct Memory {
    context: usize,
    weights: u64,
    cache_type: &'static str,
    kv_cache: u64,
    total: u64,
}

#[derive(Serialize)]
struct TensorRow {
    name: String,
    #[serde(rename = "type")]
    dtype: String,
    shape: Vec<usize>,
    bytes: u64,
    file: String,
}

impl Report {
    fn new(
        checkpoint: &Checkpoint,
        context: Option<usize>,
        cache_type: CacheType,
        list: bool,
    ) -> Self {
        let text = |key: &str| {
            checkpoint
                .config
                .get(key)
                .and_then(Value::as_str)
                .map(str::to_owned)
        };
        let architecture = checkpoint
            .config
            .get("architectures")
            .and_then(|list| list.get(0));
        let size = checkpoint.tensors.iter().map(|tensor| tensor.bytes).sum();
        let mut quantization: BTreeMap<_, BTreeMap<_, u64>> = BTreeMap::new();
        for tensor in &checkpoint.tensors {
            let types = quantization.entry(kind(&tensor.name)).or_default();
            *types.entry(tensor.dtype.clone()).or_default() += elements(tensor);
        }
        Self {
            model: checkpoint.origin.clone(),
            model_type: text("model_type").unwrap_or_else(|| "(none)".to_owned()),
            architecture: architecture.and_then(Value::as_str).map(str::to_owned),
            parameters: checkpoint
                .tensors
                .iter()
                .filter(|tensor| kind(&tensor.name) != ROPE)
                .map(elements)
                .sum(),
            size,
            quantization,
            chat_template: checkpoint.chat_template.is_some(),
            tokenizer: checkpoint.has_tokenizer(),
            details: match ModelConfig::from_json(&checkpoint.config) {
                Ok(config) => {
                    Details::Known(Box::new(Known::new(&config, context, cache_type, size)))
                }
                Err(error) => Details::Unsupported {
                    unsupported: error.to_string(),
                },
            },
            tensors: list.then(|| checkpoint.tensors.iter().map(TensorRow::new).collect()),
        }
    }

    fn to_text(&self) -> String {
        let mut lines = Lines::default();
        lines.add("model", &self.model);
        let architecture = self
            .architecture
            .as_deref()
            .unwrap_or("no architecture named");
        lines.add(
            "architecture",
            &format!("{} ({architecture})", self.model_type),
        );
        lines.add("parameters", &count(self.parameters));
        match &self.details {
            Details::Known(known) => known.describe(&mut lines),
            Details::Unsupported { unsupported } => lines.add("cannot run", unsupported),
        }
        for (kind, types) in &self.quantization {
            let types: Vec<_> = types
                .iter()
                .map(|(dtype, weights)| format!("{dtype} ({})", count(*weights)))
                .collect();
            lines.add(&format!("weights of {kind}"), &types.join(", "));
        }
        let yes = |there| if there { "yes" } else { "no" };
        lines.add("tokenizer", yes(self.tokenizer));
        lines.add("chat template", yes(self.chat_template));
        lines.add("size", &bytes(self.size));
        if let Details::Known(known) = &self.details {
            let Memory {
                context,
                weights,
                cache_type,
                kv_cache,
                total,
            } = &known.memory;
            lines.add(
                "memory (CPU)",
                &format!(
                    "{} = weights {} + {cache_type} cache {} for {context} tokens",
                    bytes(*total),
                    bytes(*weights),
                    bytes(*kv_cache)
                ),
            );
        }
        for row in self.tensors.iter().flatten() {
            let TensorRow {
                name,
                dtype,
                shape,
                bytes,
                ..
            } = row;
            lines.raw(&format!("{name:<56} {dtype:<8} {shape:?} {bytes} bytes"));
        }
        lines.0
    }
}

impl Known {
    fn new(
        config: &ModelConfig,
        context: Option<usize>,
        cache_type: CacheType,
        weights: u64,
    ) -> Self {
        let info = config.info();
        let spec = config.cache_spec(CacheStore::Pages(cache_type));
        let context = context.unwrap_or_else(|| info.max_position_embeddings.min(4096));
        let kv_cache = spec.bytes_at(context) as u64;
        let rope = config.rope();
        let long = rope.long.as_ref();
        Self {
            num_hidden_layers: info.num_hidden_layers,
            hidden_size: info.hidden_size,
            vocab_size: info.vocab_size,
            num_attention_heads: config.num_attention_heads(),
            num_key_value_heads: spec.num_key_value_heads,
            head_dim: spec.head_dim,
            context: info.max_position_embeddings,
            sliding_window: spec.patterns.first().and_then(|pattern| pattern.window()),
            rope: Rope {
                kind: if long.is_some() {
                    "longrope"
                } else {
                    "default"
                },
                theta: rope.theta,
                rotary_dim: rope.rotary_dim,
                original_max_position_embeddings: info.original_max_position_embeddings,
                short_mscale: long.map(|long| long.short_mscale),
                long_mscale: long.map(|long| long.long_mscale),
            },
            memory: Memory {
                context,
                weights,
                cache_type: cache_type.name(),
                kv_cache,
                total: weights.saturating_add(kv_cache),
            },
        }
    }

    fn describe(&self, lines: &mut Lines) {
        lines.add(
            "layers",
            &format!("{} of width {}", self.num_hidden_layers, self.hidden_size),
        );
        lines.add(
            "attention",
            &format!(
                "{} query heads, {} key/value heads of {}",
                self.num_attention_heads, self.num_key_value_heads, self.head_dim
            ),
        );
        lines.add("vocabulary", &self.vocab_size.to_string());
        let window = match self.sliding_window {
            Some(window) => format!(", sliding window {window}"),
            None => String::new(),
        };
        lines.add("context", &format!("{} tokens{window}", self.context));
        let Rope {
            kind,
            theta,
            rotary_dim,
            ..
        } = &self.rope;
        let mut rope = format!(
            "{kind}, theta {theta}, {rotary_dim} of {} dimensions",
            self.head_dim
        );
        if let (Some(original), Some(short), Some(long)) = (
            self.rope.original_max_position_embeddings,
            self.rope.short_mscale,
            self.rope.long_mscale,
        ) {
            let _ = write!(
                rope,
                ", long factors beyond {original} tokens, attention factors {short:.4} and {long:.4}"
            );
        }
        lines.add("rope", &rope);
    }
}

impl TensorRow {
    fn new(tensor: &TensorEntry) -> Self {
        Self {
            name: tensor.name.clone(),
            dtype: tensor.dtype.clone(),
            shape: tensor.shape.clone(),
            bytes: tensor.bytes,
            file: tensor.file.clone(),
        }
    }
}

/// Lines of a name and what there is to say about it.
#[derive(Default)]
struct Lines(String);

impl Lines {
    fn add(&mut self, name: &str, value: &str) {
        self.raw(&format!("{name:<24} {value}"));
    }

    fn raw(&mut self, line: &str) {
        self.0.push_str(line.trim_end());
        self.0.push('\n');
    }
}

const ROPE: &str = "rope factors";

/// What a tensor does, from its name in a safetensors or a GGUF file.
fn kind(name: &str) -> &'static str {
    let has = |parts: &[&str]| parts.iter().any(|part| name.contains(part));
    if has(&["rope_f"]) {
        ROPE
    } else if has(&["norm"]) {
        "norms"
    } else if has(&["embed_tokens", "token_embd"]) {
        "embedding"
    } else if has(&["lm_head"]) || name.starts_with("output.") {
        "output head"
    } else if has(&["self_attn", "attn_"]) {
        "attention"
    } else if has(&["mlp", "ffn_", "experts"]) {
        "feed-forward"
    } else {
        "other"
    }
}

fn elements(tensor: &TensorEntry) -> u64 {
    tensor.shape.iter().map(|axis| *axis as u64).product()
}

fn count(number: u64) -> String {
    match number {
        0..10_000 => number.to_string(),
        10_000..1_000_000 => format!("{:.1} thousand", number as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} million", number as f64 / 1e6),
        _ => format!("{:.2} billion", number as f64 / 1e9),
    }
}

fn bytes(number: u64) -> String {
    match number {
        0..1_000 => format!("{number} bytes"),
        1_000..1_000_000 => format!("{:.1} kB", number as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", number as f64 / 1e6),
        _ => format!("{:.2} GB", number as f64 / 1e9),
    }
}
