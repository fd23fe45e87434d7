//! The decoder, top to bottom in the order of the reference's modeling file.

use std::sync::Arc;

use candle_core::Tensor;
use phi3_nn::{
    AttentionParams, CacheSpec, CausalLm, Embedding, FusedHeads, GatedMlp, Input, KvCache, Linear,
    ModelInfo, Observer, Packed, Qkv, Result, RmsNorm, RopeTables, RotaryEmbedding, Span, Weights,
    attention, residual,
};

use crate::config::Config;

/// Self-attention with q, k and v in one projection.
#[derive(Debug)]
struct Attention {
    qkv_proj: Linear,
    o_proj: Linear,
    heads: FusedHeads,
    params: AttentionParams,
}

impl Attention {
    fn new(config: &Config, layer_idx: usize, weights: Weights) -> Result<Self> {
        let (h, k, d) = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        );
        let heads = FusedHeads::side_by_side(h, k, d);
        let qkv_proj = Linear::load(
            weights.pp("qkv_proj"),
            config.hidden_size,
            heads.row_len(),
            false,
        )?;
        let o_proj = Linear::load(weights.pp("o_proj"), h * d, config.hidden_size, false)?;
        let params = AttentionParams {
            layer_idx,
            pattern: config.attention,
            scale: 1.0 / (d as f32).sqrt(),
        };
        Ok(Self {
            qkv_proj,
            o_proj,
            heads,
            params,
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        rope: &RopeTables,
        packed: &mut Packed<'_, '_>,
    ) -> Result<Tensor> {
        let qkv = packed.linear(&self.qkv_proj, x)?; // [n, (h + 2k)·d]
        let Qkv {
            queries: q,
            keys,
            values,
        } = self.heads.split(&qkv, rope)?;
        let attended = attention(&q, &keys, &values, self.params, packed)?; // [n, h·d]
        packed.linear(&self.o_proj, &attended)
    }
}

/// One decoder layer: attention and feed-forward block, each behind a norm and beside a residual.
#[derive(Debug)]
struct DecoderLayer {
    self_attn: Attention,
    mlp: GatedMlp,
    input_layernorm: RmsNorm,
    post_attention_layernorm: RmsNorm,
    layer_idx: usize,
}

impl DecoderLayer {
    fn new(config: &Config, layer_idx: usize, weights: Weights) -> Result<Self> {
        let (hidden, eps) = (config.hidden_size, config.rms_norm_eps);
        let norm = |name| RmsNorm::load(weights.pp(name), hidden, eps);
        Ok(Self {
            self_attn: Attention::new(config, layer_idx, weights.pp("self_attn"))?,
            mlp: GatedMlp::load(weights.pp("mlp"), hidden, config.intermediate_size)?,
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

/// A `phi3` checkpoint, ready to run.
pub struct Model {
    embed_tokens: Embedding,
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
    lm_head: Linear,
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
        let body = weights.pp("model");
        let embed_tokens = Embedding::load(
            body.pp("embed_tokens"),
            config.vocab_size,
            config.hidden_size,
        )?;
        let layers = (0..config.num_hidden_layers)
            .map(|idx| DecoderLayer::new(config, idx, body.pp("layers").pp(idx)))
            .collect::<Result<Vec<_>>>()?;
        let norm = RmsNorm::load(body.pp("norm"), config.hidden_size, config.rms_norm_eps)?;
        let lm_head = if config.tie_word_embeddings {
            embed_tokens.as_linear("lm_head")?
        } else {
            Linear::load(
                weights.pp("lm_head"),
                config.hidden_size,
                config.vocab_size,
                false,
            )?
        };
        Ok(Self {
            embed_tokens,
            layers,
            norm,
            lm_head,
            rotary: RotaryEmbedding::new(&config.rope),
            cache_spec: Arc::new(config.cache_spec(weights.cache_store())),
            info: config.info(),
        })
    }

    /// Geometry and rules of this model's caches.
    pub fn cache_spec(&self) -> &CacheSpec {
        &self.cache_spec
    }
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
        let rope = self.rotary.tables(packed.positions(), x.device())?;
        for layer in &self.layers {
            x = layer.forward(&x, &rope, &mut packed)?;
        }
        packed.observe("hidden_layer_last", &x)?;
        let x = self.norm.forward(&x)?;
        packed.observe("hidden_final_norm", &x)?;
        let vocab = self.info.vocab_size;
        let logits = packed.logits(&x, vocab, |rows| self.lm_head.forward(rows))?; // [rows, vocab]
        packed.finish()?;
        Ok(logits)
    }
}
