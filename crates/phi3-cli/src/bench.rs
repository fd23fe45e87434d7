//! `phi3 bench`: how fast a model reads prompts and generates, beside what the machine can do.

mod machine;
mod measure;
mod random;
mod report;
mod weights;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use candle_core::DType;
use phi3::nn::ModelInfo;
use phi3::{CacheType, ContextExtension, DeviceSpec, LanguageModel, LoadOptions, ModelConfig};

use crate::args::{DTypeArg, HubArgs, SourceArgs, open};
use crate::output::{self, UsageError};
use measure::{Bench, Test};
use random::RandomArgs;
use report::{Model, Report};
use weights::Weights;

/// Measure how fast a model is on this machine.
///
/// Reading prompts and generating are measured each by itself. A prompt counts until the logits of its last token are there; it is read in pieces of 512
/// tokens, as in `generate`. Generation is greedy decoding of given tokens. Every test runs once
/// to warm up, then --repeat times; the median counts. Flags with several values, separated by
/// commas, make a test of every combination.
///
/// With --random a model in the shape of a real one is made first, with random weights: it is as
/// fast as the real one.
#[derive(clap::Args)]
pub struct Args {
    /// A repo id on the hub (microsoft/Phi-3-mini-4k-instruct), a folder, or a .gguf file.
    #[arg(
        long,
        short,
        value_name = "MODEL",
        required_unless_present = "random",
        conflicts_with = "random"
    )]
    model: Option<String>,
    #[command(flatten)]
    hub: HubArgs,
    #[command(flatten)]
    random: RandomArgs,
    /// Prompts of so many tokens; 0 for no such test.
    #[arg(
        short = 'p',
        long = "prompt-tokens",
        value_name = "N",
        value_delimiter = ',',
        default_value = "512"
    )]
    n_prompt: Vec<usize>,
    /// Generation of so many tokens; 0 for no such test.
    #[arg(
        short = 'n',
        long = "new-tokens",
        value_name = "N",
        value_delimiter = ',',
        default_value = "64"
    )]
    n_gen: Vec<usize>,
    /// Tokens that are in the cache before a test begins.
    #[arg(
        short,
        long,
        value_name = "N",
        value_delimiter = ',',
        default_value = "0"
    )]
    depth: Vec<usize>,
    /// Sequences that generate at once. Prompts are read one by one.
    #[arg(
        short,
        long,
        value_name = "N",
        value_delimiter = ',',
        default_value = "1",
        value_parser = clap::value_parser!(u16).range(1..=4096)
    )]
    batch: Vec<u16>,
    /// Threads [default: PHI3_THREADS, else one per physical core].
    #[arg(
        short,
        long,
        value_name = "N",
        value_delimiter = ',',
        value_parser = clap::value_parser!(u16).range(1..=1024)
    )]
    threads: Vec<u16>,
    /// How often each test is measured.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 5,
        value_parser = clap::value_parser!(u16).range(1..=1000)
    )]
    repeat: u16,
    /// Print a JSON array, one object a test, instead of a Markdown table.
    #[arg(long)]
    json: bool,
    /// auto, cpu, cuda, cuda:N or metal; auto is a GPU that this build supports, else the CPU.
    #[arg(long, default_value = "auto")]
    device: DeviceSpec,
    /// Dtype of dense weights and activations on a GPU [default: bf16 on CUDA, f16 on Metal].
    #[arg(
        long,
        ignore_case = true,
        hide_possible_values = true,
        value_name = "f32|f16|bf16"
    )]
    dtype: Option<DTypeArg>,
    /// Type of keys and values on the CPU, f16, f32 or q8_0; a GPU keeps them in --dtype.
    #[arg(long, value_name = "TYPE", default_value_t)]
    cache_type: CacheType,
    /// Keep a mixture of experts within so much memory (12GiB): experts by recent use.
    #[arg(long, value_name = "SIZE", value_parser = crate::args::parse_size)]
    memory_budget: Option<u64>,
    /// Run a checkpoint without LongRoPE factors beyond its trained length: power:TOKENS or
    /// piecewise:TOKENS.
    #[arg(long, value_name = "RULE:TOKENS")]
    extend_context: Option<ContextExtension>,
}

pub fn run(args: &Args) -> Result<()> {
    let random = args.random.model()?;
    let model = match (&random, &args.model) {
        (Some(random), _) => args.random.make(random)?.display().to_string(),
        (None, model) => model.clone().unwrap_or_default(),
    };
    if args.random.make_only {
        return output::print(&format!("{model}\n"));
    }
    let threads = args.thread_counts();
    let first_threads = threads.first().copied().unwrap_or(0);
    phi3::set_num_threads(first_threads);

    let source = SourceArgs {
        model: model.clone(),
        hub: args.hub.clone(),
    };
    open(&source)?; // a download is no part of loading
    let start = Instant::now();
    let checkpoint = open(&source)?;
    let options = LoadOptions {
        device: args.device,
        dtype: args.dtype.map(DType::from),
        cache_type: args.cache_type,
        extend: args.extend_context,
        memory_budget: args.memory_budget,
        ..LoadOptions::default()
    };
    let language_model = LanguageModel::from_checkpoint(&checkpoint, &options)
        .with_context(|| format!("loading {model}"))?;
    let load = start.elapsed();
    let info = language_model.model().info();
    for &depth in &args.depth {
        args.check_context(info, depth)?;
    }

    let spec = language_model
        .config()
        .cache_spec(language_model.cache_store());
    let mut bench = Bench::new(language_model.model().as_ref(), spec, args.repeat.into());
    bench.first_token()?;
    let first_token = start.elapsed();
    let mut weights = Weights::of(&checkpoint.tensors);
    if let ModelConfig::PhiMoe(moe) = language_model.config() {
        let share = moe.num_experts_per_tok as f64 / moe.num_local_experts as f64;
        weights = weights.with_experts_taken(&checkpoint.tensors, share);
    }
    let mut results = Vec::new();
    for &depth in &args.depth {
        let tests = args.tests_at(depth);
        bench.fill(depth, tests.iter().map(Test::tokens).max().unwrap_or(0))?;
        for &threads in &threads {
            phi3::set_num_threads(threads);
            for test in &tests {
                if let Some(result) = bench.run(test)? {
                    output::note(&result.line());
                    if let Some(counters) = language_model.memory_counters() {
                        output::note(&output::memory_line(&counters));
                    }
                    results.push(result);
                }
            }
        }
    }
    ensure!(
        !results.is_empty(),
        "there was nothing to measure: give -p or -n more than 0 tokens"
    );

    // Last, since it takes memory of its own.
    let on_cpu = args.device.open().is_ok_and(|device| device.is_cpu());
    let probes: BTreeMap<usize, phi3::Probe> = results
        .iter()
        .filter(|_| on_cpu)
        .map(|result| result.threads)
        .collect::<BTreeSet<_>>()
        .into_iter()
        .map(|threads| (threads, phi3::probe(threads)))
        .collect();
    let report = Report {
        model: Model {
            name: model,
            info: info.clone(),
            file_type: match &random {
                Some(random) => random.mix().name().to_owned(),
                None => weights.kind.clone(),
            },
            load,
            first_token,
        },
        weights,
        processor: machine::processor(),
        probes,
        results,
    };
    match args.json {
        true => output::print(&format!("{}\n", report.json()?)),
        false => output::print(&report.table()),
    }
}

impl Args {
    fn thread_counts(&self) -> Vec<usize> {
        match self.threads.is_empty() {
            true => vec![phi3::num_threads()],
            false => self.threads.iter().copied().map(usize::from).collect(),
        }
    }

    /// The tests at one depth: prompts, then generation by growing batches.
    fn tests_at(&self, depth: usize) -> Vec<Test> {
        let mut batches = self.batch.clone();
        batches.sort_unstable();
        batches.dedup();
        let prompts = self.n_prompt.iter().map(|&n_prompt| Test {
            n_prompt,
            n_gen: 0,
            depth,
            batch: 1,
        });
        let generation = batches.iter().flat_map(|&batch| {
            self.n_gen.iter().map(move |&n_gen| Test {
                n_prompt: 0,
                n_gen,
                depth,
                batch: batch.into(),
            })
        });
        prompts
            .chain(generation)
            .filter(|test| test.tokens() > 0)
            .collect()
    }

    fn check_context(&self, info: &ModelInfo, depth: usize) -> Result<()> {
        let context = info.max_position_embeddings;
        let longest = self.n_prompt.iter().chain(&self.n_gen).max();
        let longest = longest.copied().unwrap_or(0);
        if depth.saturating_add(longest) > context {
            return Err(UsageError(format!(
                "--depth {depth} and {longest} more tokens exceed the model's context of {context} \
                 tokens: give less of either"
            ))
            .into());
        }
        Ok(())
    }
}

/// Seconds as a number.
fn seconds(time: Duration) -> f64 {
    time.as_secs_f64()
}
