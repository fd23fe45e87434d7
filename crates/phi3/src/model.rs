//! A model, loaded: weights, tokenizer, chat template and stop ids in one value.

use std::sync::Arc;

use candle_core::DType;
use phi_3_5_vision::processor::Processor;
use phi3_hub::quantize::{Mix, QuantizedSource};
use phi3_hub::{Checkpoint, Counters, HubOptions, MemoryBudget, Source};
use phi3_nn::device::default_dtype;
use phi3_nn::{
    Backend, CacheStore, CacheType, CausalLm, DeviceSpec, Residency, TensorSource, Weights,
};
use phi3_text::generate::{Completion, complete};
use phi3_text::stop::stop_ids;
use phi3_text::{ChatTemplate, Request, SamplingParams, SpecialTokens, Tokenizer};
use serde_json::Value;

use crate::auto::ModelConfig;
use crate::chat::Chat;
use crate::error::{Error, Result};
use crate::extend::ContextExtension;
use crate::seen::processor_of;

/// How to load a model.
#[derive(Clone, Default)]
pub struct LoadOptions {
    /// Where to run it.
    pub device: DeviceSpec,
    /// Dtype of dense weights and activations on a GPU; `None` chooses by device. The CPU always
    /// computes in f32, on weights as they are stored.
    pub dtype: Option<DType>,
    /// Type of keys and values on the CPU; f16 by default. A GPU keeps them in `dtype`.
    pub cache_type: CacheType,
    /// Branch, tag or commit on the hub; `None` is `main`.
    pub revision: Option<String>,
    /// Runs a checkpoint without LongRoPE factors beyond its trained length.
    pub extend: Option<ContextExtension>,
    /// Stores the weights in fewer bits than the checkpoint does, tensor by tensor while they are
    /// loaded: the same bytes that a file written by `phi3_hub::quantize` has.
    pub quantize: Option<Mix>,
    /// The same for the image tower and its projection of a model that sees, which `quantize` leaves
    /// as they are stored: every matrix in the type of most of the mix's.
    pub quantize_vision: Option<Mix>,
    /// Keeps the weights of a mixture of experts within so many bytes, those of the experts by recent
    /// use; a part of it is left for caches and activations. On the CPU alone, for weights in their
    /// files.
    pub memory_budget: Option<u64>,
    /// How to reach the hub; `None` follows the environment (`HF_HOME`, `HF_TOKEN`, …).
    pub hub: Option<HubOptions>,
}

/// A model with everything that is needed to prompt it.
pub struct LanguageModel {
    model: Arc<dyn CausalLm>,
    vision: Option<Arc<phi_3_5_vision::Model>>,
    pub(crate) processor: Option<Processor>,
    config: ModelConfig,
    tokenizer: Option<Arc<Tokenizer>>,
    template: Option<Arc<ChatTemplate>>,
    stop_ids: Vec<u32>,
    sampling: SamplingParams,
    origin: String,
    cache_store: CacheStore,
    budget: Option<Arc<MemoryBudget>>,
}

/// Loads a model from a repo id on the hub, a folder or a `.gguf` file, for the best device there is.
///
/// # Errors
/// [`Error`] says what is missing or broken, and what to do.
pub fn load(model: &str) -> Result<LanguageModel> {
    load_with(model, &LoadOptions::default())
}

/// [`load`] with options.
///
/// # Errors
/// As [`load`].
pub fn load_with(model: &str, options: &LoadOptions) -> Result<LanguageModel> {
    let source = Source::parse(model, options.revision.as_deref())?;
    let checkpoint = match &options.hub {
        Some(hub) => phi3_hub::open(&source, hub)?,
        None => phi3_hub::open(&source, &HubOptions::from_env())?,
    };
    LanguageModel::from_checkpoint(&checkpoint, options)
}

impl LanguageModel {
    /// Builds the model of an open checkpoint.
    ///
    /// # Errors
    /// As [`load`].
    pub fn from_checkpoint(checkpoint: &Checkpoint, options: &LoadOptions) -> Result<Self> {
        let config = match options.extend {
            Some(extension) => ModelConfig::from_json(&extension.apply(&checkpoint.config)?)?,
            None => ModelConfig::from_json(&checkpoint.config)?,
        };
        let device = options.device.open()?;
        let dtype = options.dtype.unwrap_or_else(|| default_dtype(&device));
        let source: Arc<dyn TensorSource> = match (options.quantize, options.quantize_vision) {
            (None, None) => Arc::clone(&checkpoint.weights),
            (decoder, tower) => {
                Arc::new(QuantizedSource::of_parts(checkpoint, decoder, tower, None)?)
            }
        };
        let weights = Weights::new(source, device, dtype).with_cache_type(options.cache_type);
        let budget = match options.memory_budget {
            Some(_) => Some(memory_budget(&config, &weights, options)?),
            None => None,
        };
        let weights = match &budget {
            Some(budget) => weights.with_residency(Arc::clone(budget) as Arc<dyn Residency>),
            None => weights,
        };
        let vision = config.build_vision(weights.clone())?;
        let model: Arc<dyn CausalLm> = match &vision {
            Some(vision) => Arc::clone(vision) as Arc<dyn CausalLm>,
            None => config.build(weights.clone())?,
        };
        if let (Some(budget), Some(limit)) = (&budget, options.memory_budget) {
            let all: u64 = checkpoint.tensors.iter().map(|tensor| tensor.bytes).sum();
            let others = all.saturating_sub(budget.counters().group_bytes);
            let fixed = others.saturating_add(process_share(limit));
            if fixed >= limit {
                tracing::warn!(
                    "the memory budget of {limit} bytes is less than the {fixed} that are needed \
                     without any expert: it will be exceeded, and every expert read anew"
                );
            }
            budget.set_limit(limit.saturating_sub(fixed));
        }
        for name in weights.unused() {
            tracing::debug!(tensor = name, "not needed by this model");
        }
        let tokenizer = load_tokenizer(checkpoint)?;
        let template = load_template(checkpoint, tokenizer.as_ref())?;
        let stop_ids = match &tokenizer {
            Some(tokenizer) => stop_ids(
                checkpoint.generation_config.as_ref(),
                Some(&checkpoint.config),
                checkpoint
                    .chat_template
                    .as_ref()
                    .map(|template| template.text.as_str()),
                tokenizer,
            )?,
            None => Vec::new(),
        };
        let preprocessor_config = checkpoint.preprocessor_config.as_ref();
        let processor = match &vision {
            Some(_) => Some(processor_of(preprocessor_config)?),
            None => None,
        };
        Ok(Self {
            model,
            vision,
            processor,
            config,
            tokenizer: tokenizer.map(Arc::new),
            template: template.map(Arc::new),
            stop_ids,
            sampling: default_sampling(checkpoint.generation_config.as_ref()),
            origin: checkpoint.origin.clone(),
            cache_store: weights.cache_store(),
            budget,
        })
    }

    /// The decoder itself.
    pub fn model(&self) -> &Arc<dyn CausalLm> {
        &self.model
    }

    /// What keeping within [`LoadOptions::memory_budget`] took so far.
    pub fn memory_counters(&self) -> Option<Counters> {
        self.budget.as_ref().map(|budget| budget.counters())
    }

    /// The same model as one that images can be shown to, if it is.
    pub fn vision(&self) -> Option<&Arc<phi_3_5_vision::Model>> {
        self.vision.as_ref()
    }

    /// Its checked configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Who holds keys and values of its sequences, and in which form.
    pub fn cache_store(&self) -> CacheStore {
        self.cache_store
    }

    /// The folder or file that it was loaded from.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// Its tokenizer.
    ///
    /// # Errors
    /// [`Error::NoTokenizer`] if the checkpoint has none.
    pub fn tokenizer(&self) -> Result<&Arc<Tokenizer>> {
        self.tokenizer.as_ref().ok_or_else(|| Error::NoTokenizer {
            origin: self.origin.clone(),
        })
    }

    /// Its chat template.
    ///
    /// # Errors
    /// [`Error::NoChatTemplate`] if the checkpoint has none.
    pub fn chat_template(&self) -> Result<&Arc<ChatTemplate>> {
        self.template.as_ref().ok_or_else(|| Error::NoChatTemplate {
            origin: self.origin.clone(),
        })
    }

    /// The ids that end a text: those of the generation config, the config and the chat template.
    pub fn stop_ids(&self) -> &[u32] {
        &self.stop_ids
    }

    /// How the checkpoint wants its tokens chosen: greedily, unless its generation config says
    /// `do_sample`.
    pub fn default_sampling(&self) -> SamplingParams {
        self.sampling.clone()
    }

    /// Continues `prompt` as plain text, without a chat template.
    ///
    /// # Errors
    /// [`Error::NoTokenizer`], or [`Error::Text`] if the prompt is empty or too long.
    pub fn complete(
        &self,
        prompt: &str,
        sampling: SamplingParams,
        max_new_tokens: usize,
    ) -> Result<Completion> {
        let tokenizer = self.tokenizer()?;
        let mut request = Request::new(tokenizer.encode(prompt, true)?);
        request.params = sampling;
        request.max_new_tokens = max_new_tokens;
        request.stop_ids.clone_from(&self.stop_ids);
        request.continues_prompt = true;
        let mut completions = complete(self.model.as_ref(), tokenizer, [request])?;
        Ok(completions.pop().expect("one request has one completion"))
    }

    /// A new conversation.
    ///
    /// # Errors
    /// [`Error::NoTokenizer`] or [`Error::NoChatTemplate`] if the checkpoint cannot chat.
    pub fn chat(&self) -> Result<Chat<'_>> {
        Chat::new(self)
    }
}

/// What a budget leaves for caches and activations: a sixteenth, at most 512 MiB.
fn process_share(budget: u64) -> u64 {
    (budget / 16).min(512 << 20)
}

/// # Errors
/// [`Error::MemoryBudget`] where there is nothing that could be kept or let go.
fn memory_budget(
    config: &ModelConfig,
    weights: &Weights,
    options: &LoadOptions,
) -> Result<Arc<MemoryBudget>> {
    let reason = if !matches!(config, ModelConfig::PhiMoe(_)) {
        "every token needs all weights of this model; only a mixture of experts can do without some"
    } else if options.quantize.is_some() {
        "weights that are quantized while loading lie in memory: quantize the model into a file first"
    } else if weights.backend() != Backend::Kernels {
        "only the CPU reads weights from their file"
    } else {
        return Ok(Arc::new(MemoryBudget::new(0)));
    };
    Err(Error::MemoryBudget { reason })
}

/// `do_sample`, `temperature`, `top_k`, `top_p`, `min_p` and `repetition_penalty` of a generation
/// config, with transformers' defaults.
fn default_sampling(generation_config: Option<&Value>) -> SamplingParams {
    let field = |name: &str| generation_config.and_then(|config| config.get(name));
    let float = |name: &str| {
        field(name)
            .and_then(Value::as_f64)
            .map(|value| value as f32)
    };
    let repetition_penalty = float("repetition_penalty").unwrap_or(1.0);
    if field("do_sample").and_then(Value::as_bool) != Some(true) {
        return SamplingParams {
            repetition_penalty,
            ..SamplingParams::greedy()
        };
    }
    let top_k = field("top_k").map_or(Some(50), Value::as_u64);
    SamplingParams {
        temperature: float("temperature").unwrap_or(1.0),
        top_k: top_k
            .filter(|k| *k > 0)
            .and_then(|k| usize::try_from(k).ok()),
        top_p: float("top_p").filter(|p| *p < 1.0),
        min_p: float("min_p"),
        repetition_penalty,
        ..SamplingParams::default()
    }
}

/// The tokenizer of a checkpoint, if it has one.
///
/// # Errors
/// [`Error::Hub`] or [`Error::Text`] if its files are broken.
pub fn load_tokenizer(checkpoint: &Checkpoint) -> Result<Option<Tokenizer>> {
    let files = &checkpoint.tokenizer;
    match checkpoint.tokenizer_json()? {
        Some(json) => Ok(Some(Tokenizer::from_json(
            &json,
            files.tokenizer_config.as_ref(),
        )?)),
        None => Ok(None),
    }
}

/// The chat template of a checkpoint, if it has one.
///
/// # Errors
/// [`Error::Text`] if it does not parse.
pub fn load_template(
    checkpoint: &Checkpoint,
    tokenizer: Option<&Tokenizer>,
) -> Result<Option<ChatTemplate>> {
    let Some(source) = &checkpoint.chat_template else {
        return Ok(None);
    };
    let tokens = match (tokenizer, &checkpoint.tokenizer.tokenizer_config) {
        (Some(tokenizer), _) => tokenizer.special_tokens().clone(),
        (None, Some(config)) => SpecialTokens::from_config(config),
        (None, None) => SpecialTokens::default(),
    };
    Ok(Some(ChatTemplate::parse(&source.text, tokens)?))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_generation_config_says_how_tokens_are_chosen() {
        assert_eq!(default_sampling(None), SamplingParams::greedy());
        let all = json!({
            "do_sample": true,
            "temperature": 0.5,
            "top_k": 7,
            "top_p": 0.75,
            "min_p": 0.25,
            "repetition_penalty": 1.5,
        });
        let expected = SamplingParams {
            temperature: 0.5,
            top_k: Some(7),
            top_p: Some(0.75),
            min_p: Some(0.25),
            repetition_penalty: 1.5,
            ..SamplingParams::default()
        };
        assert_eq!(default_sampling(Some(&all)), expected);
        // Without `do_sample` transformers takes the likeliest token, of penalized ones too.
        let mut greedy = all;
        greedy["do_sample"] = false.into();
        let expected = SamplingParams {
            repetition_penalty: 1.5,
            ..SamplingParams::greedy()
        };
        assert_eq!(default_sampling(Some(&greedy)), expected);
    }

    #[test]
    fn transformers_defaults_stand_for_what_is_not_said() {
        let sampling = |json: Value| default_sampling(Some(&json));
        let found = sampling(json!({"do_sample": true, "top_p": 1.0}));
        assert_eq!((found.temperature, found.top_k), (1.0, Some(50)));
        assert_eq!((found.top_p, found.min_p), (None, None));
        for none in [json!(0), Value::Null] {
            let found = sampling(json!({"do_sample": true, "top_k": none}));
            assert_eq!(found.top_k, None);
        }
    }

    #[test]
    fn a_budget_leaves_a_share_for_the_rest() {
        assert_eq!(process_share(1 << 30), 64 << 20);
        assert_eq!(process_share(1 << 40), 512 << 20);
    }
}
