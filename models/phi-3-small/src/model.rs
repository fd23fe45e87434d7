//! The decoder, top to bottom in the order of the reference's modeling file.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use phi3_nn::mlp::gegelu;
use phi3_nn::{
    AttentionParams, CacheSpec, CausalLm, Embedding, FusedHeads, Input, KvCache, LayerNorm, Linear,
    ModelInfo, Observer, Packed, Qkv, Result, RopeTables, RotaryEmbedding, Span, Weights,
    attention, residual,
};

use crate::config::Config;

/// The gated feed-forward block.
#[derive(Debug)]
struct Mlp {
    up_proj: Linear,
    down_proj: Linear,
    limit: f64,
}

impl Mlp {
    fn new(config: &Config, weights: Weights) -> Result<Self> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        Ok(Self {
            up_proj: Linear::load(weights.pp("up_proj"), hidden, 2 * inner, true)?,
            down_proj: Linear::load(weights.pp("down_proj"), inner, hidden, true)?,
            limit: config.gegelu_limit,
        })
    }

    fn forward(&self, x: &Tensor, packed: &mut Packed<'_, '_>) -> Result<Tensor> {
        let up = packed.linear(&self.up_proj, x)?; // [n, 2I]
        let inner = gegelu(&up, self.limit)?; // [n, I]
        packed.linear(&self.down_proj, &inner)
    }
}

/// Self-attention; the rows of its one projection are grouped by key/value head.
#[derive(Debug)]
struct SelfAttention {
    query_key_value: Linear,
    dense: Linear,
    heads: FusedHeads,
    params: AttentionParams,
}

impl SelfAttention {
    fn new(config: &Config, layer_idx: usize, weights: Weights) -> Result<Self> {
        let (h, k, d) = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        );
        let hidden = config.hidden_size;
        let heads = FusedHeads::grouped(h, k, d);
        Ok(Self {
            query_key_value: Linear::load(
                weights.pp("query_key_value"),
                hidden,
                heads.row_len(),
                true,
            )?,
            dense: Linear::load(weights.pp("dense"), h * d, hidden, true)?,
            heads,
            params: AttentionParams {
                layer_idx,
                pattern: config.attention(layer_idx),
                scale: config.attention_scale as f32,
            },
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        rope: &RopeTables,
        packed: &mut Packed<'_, '_>,
    ) -> Result<Tensor> {
        let qkv = packed.linear(&self.query_key_value, x)?; // [n, k·(g + 2)·d]
        let Qkv {
            queries: q,
            keys,
            values,
        } = self.heads.split(&qkv, rope)?;
        let attended = attention(&q, &keys, &values, self.params, packed)?; // [n, h·d]
        packed.linear(&self.dense, &attended)
    }
}

/// One decoder layer: attention and feed-forward block, each behind a norm and beside a residual.
#[derive(Debug)]
struct DecoderLayer {
    self_attn: SelfAttention,
    mlp: Mlp,
    input_layernorm: LayerNorm,
    post_attention_layernorm: LayerNorm,
    layer_idx: usize,
}

impl DecoderLayer {
    fn new(config: &Config, layer_idx: usize, weights: Weights) -> Result<Self> {
        let (hidden, eps) = (config.hidden_size, config.layer_norm_epsilon);
        let norm = |name| LayerNorm::load(weights.pp(name), hidden, eps);
        Ok(Self {
            self_attn: SelfAttention::new(config, layer_idx, weights.pp("self_attn"))?,
            mlp: Mlp::new(config, weights.pp("mlp"))?,
            input_layernorm: norm("input_layernorm")?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            layer_idx,
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        rope: &RopeTables,
        packed: &mut Packed<'_, '_>,
    ) -> Result<Tensor> {
        let layer_idx = self.layer_idx;
        let attended = self
            .self_attn
            .forward(&self.input_layernorm.forward(x)?, rope, packed)?;
        packed.observe(format_args!("hidden_layer{layer_idx}_attn"), &attended)?;
        let x = residual(x, &attended)?;
        let inner = self
            .mlp
            .forward(&self.post_attention_layernorm.forward(&x)?, packed)?;
        let x = residual(&x, &inner)?;
        packed.observe(format_args!("hidden_layer{layer_idx}"), &x)?;
        Ok(x)
    }
}

/// A `phi3small` checkpoint, ready to run.
pub struct Model {
    embed_tokens: Embedding,
    embedding_multiplier: f64,
    layers: Vec<DecoderLayer>,
    final_layernorm: LayerNorm,
    lm_head: Linear,
    width_multiplier: f64,
    /// `[vocab]`, 1 where a token may be chosen; `None` where all may.
    trained: Option<Tensor>,
    rotary: RotaryEmbedding,
    cache_spec: Arc<CacheSpec>,
    info: ModelInfo,
}

impl Model {
    /// Builds the model from the tensors of a checkpoint.
    ///
    /// # Errors
    /// [`phi3_nn::Error::MissingTensor`], [`phi3_nn::Error::TensorShape`] and their kin, naming the
    /// tensor.
    pub fn new(config: &Config, weights: Weights) -> Result<Self> {
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let body = weights.pp("model");
        let embed_tokens = Embedding::load(body.pp("embed_tokens"), vocab, hidden)?;
        let layers = (0..config.num_hidden_layers)
            .map(|idx| DecoderLayer::new(config, idx, body.pp("layers").pp(idx)))
            .collect::<Result<Vec<_>>>()?;
        let final_layernorm = LayerNorm::load(
            body.pp("final_layernorm"),
            hidden,
            config.layer_norm_epsilon,
        )?;
        let lm_head = if config.tie_word_embeddings {
            embed_tokens.as_linear("lm_head")?
        } else {
            Linear::load(weights.pp("lm_head"), hidden, vocab, false)?
        };
        Ok(Self {
            embed_tokens,
            embedding_multiplier: config.mup_embedding_multiplier,
            layers,
            final_layernorm,
            lm_head,
            width_multiplier: config.mup_width_multiplier,
            trained: trained(config, &weights)?,
            rotary: RotaryEmbedding::new(&config.rope)
                .with_position_scale(config.rope_position_scale),
            cache_spec: Arc::new(config.cache_spec(weights.cache_store())),
            info: config.info(),
        })
    }

    /// Geometry and rules of this model's caches.
    pub fn cache_spec(&self) -> &CacheSpec {
        &self.cache_spec
    }

    /// Logits of rows behind the last norm, `[rows, H]` to `[rows, vocab]`.
    fn logits(&self, rows: &Tensor) -> Result<Tensor> {
        let logits = self.lm_head.forward(rows)?.to_dtype(DType::F32)?;
        let logits = (logits / self.width_multiplier)?;
        let Some(trained) = &self.trained else {
            return Ok(logits);
        };
        let lowest = Tensor::full(f32::MIN, logits.shape(), logits.device())?;
        Ok(trained
            .broadcast_as(logits.shape())?
            .where_cond(&logits, &lowest)?)
    }
}

fn trained(config: &Config, weights: &Weights) -> Result<Option<Tensor>> {
    if config.dummy_token_indices.is_empty() {
        return Ok(None);
    }
    let mut trained = vec![1u8; config.vocab_size];
    for id in &config.dummy_token_indices {
        if let Some(trained) = trained.get_mut(*id as usize) {
            *trained = 0;
        }
    }
    Ok(Some(Tensor::new(trained, weights.device())?))
}

impl CausalLm for Model {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn new_cache(&self) -> KvCache {
        KvCache::new(Arc::clone(&self.cache_spec))
    }

    fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        self.embed_tokens.forward(ids)
    }

    fn forward(
        &self,
        input: Input<'_>,
        spans: &mut [Span<'_>],
        observer: Option<&mut dyn Observer>,
    ) -> Result<Tensor> {
        let mut packed = Packed::begin(input, spans, observer)?;
        let mut x = packed.embed(&self.embed_tokens)?; // [n, hidden]
        x = (x * self.embedding_multiplier)?;
        let rope = self.rotary.tables(packed.positions(), x.device())?;
        for layer in &self.layers {
            x = layer.forward(&x, &rope, &mut packed)?;
        }
        packed.observe("hidden_layer_last", &x)?;
        let x = self.final_layernorm.forward(&x)?;
        packed.observe("hidden_final_norm", &x)?;
        let vocab = self.info.vocab_size;
        let logits = packed.logits(&x, vocab, |rows| self.logits(rows))?; // [rows, vocab]
        packed.finish()?;
        Ok(logits)
    }
}
