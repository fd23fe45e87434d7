//! The decoder, top to bottom in the order of the reference's modeling file.

use std::sync::Arc;

use candle_core::Tensor;
use phi3_nn::{
    AttentionParams, CacheSpec, CausalLm, Embedding, Input, KvCache, LayerNorm, Linear, ModelInfo,
    Observer, Packed, Result, RopeTables, RotaryEmbedding, Span, Weights, attention, residual,
};

use crate::config::Config;
use crate::experts::Experts;
use crate::router::Router;

/// Self-attention with q, k and v apart.
#[derive(Debug)]
struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    params: AttentionParams,
}

impl Attention {
    fn new(config: &Config, layer_idx: usize, weights: Weights) -> Result<Self> {
        let (h, k, d) = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        );
        let (hidden, bias) = (config.hidden_size, config.attention_bias);
        let load = |name, inputs, outputs| Linear::load(weights.pp(name), inputs, outputs, bias);
        Ok(Self {
            q_proj: load("q_proj", hidden, h * d)?,
            k_proj: load("k_proj", hidden, k * d)?,
            v_proj: load("v_proj", hidden, k * d)?,
            o_proj: load("o_proj", h * d, hidden)?,
            num_heads: h,
            num_kv_heads: k,
            head_dim: d,
            params: AttentionParams {
                layer_idx,
                pattern: config.attention,
                scale: 1.0 / (d as f32).sqrt(),
            },
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        rope: &RopeTables,
        packed: &mut Packed<'_, '_>,
    ) -> Result<Tensor> {
        let (h, k, d) = (self.num_heads, self.num_kv_heads, self.head_dim);
        let n = x.dim(0)?;
        let q = packed.linear(&self.q_proj, x)?.reshape((n, h, d))?; // [n, h, d]
        let key = packed.linear(&self.k_proj, x)?.reshape((n, k, d))?; // [n, k, d]
        let value = packed.linear(&self.v_proj, x)?.reshape((n, k, d))?; // [n, k, d]
        let (q, key) = (rope.apply(&q)?, rope.apply(&key)?);
        let attended = attention(&q, &key, &value, self.params, packed)?; // [n, h·d]
        packed.linear(&self.o_proj, &attended)
    }
}

/// A router and its experts.
#[derive(Debug)]
struct SparseMoe {
    router: Router,
    experts: Experts,
    layer_idx: usize,
}

impl SparseMoe {
    fn new(config: &Config, layer_idx: usize, layer: &Weights) -> Result<Self> {
        let gate = layer.pp("block_sparse_moe.gate");
        // transformers 5 calls it otherwise; where neither is there, the error names the hub's.
        let router = layer.pp("mlp.router");
        let gate = match router.find("weight")? {
            Some(_) => router,
            None => gate,
        };
        Ok(Self {
            router: Router::new(config, layer_idx, gate)?,
            experts: Experts::new(config, layer)?,
            layer_idx,
        })
    }

    fn forward(&self, x: &Tensor, packed: &mut Packed<'_, '_>) -> Result<Tensor> {
        let layer_idx = self.layer_idx;
        packed.observe(format_args!("layer{layer_idx}.moe_in"), x)?;
        let (routing, weights) = self.router.forward(x, packed)?;
        let y = self.experts.forward(x, &routing, &weights, packed)?; // [n, hidden]
        packed.observe(format_args!("layer{layer_idx}.moe_out"), &y)?;
        Ok(y)
    }
}

/// One decoder layer: attention and experts, each behind a norm and beside a residual.
#[derive(Debug)]
struct DecoderLayer {
    self_attn: Attention,
    moe: SparseMoe,
    input_layernorm: LayerNorm,
    post_attention_layernorm: LayerNorm,
    layer_idx: usize,
}

impl DecoderLayer {
    fn new(config: &Config, layer_idx: usize, weights: Weights) -> Result<Self> {
        let norm =
            |name| LayerNorm::load(weights.pp(name), config.hidden_size, config.rms_norm_eps);
        Ok(Self {
            self_attn: Attention::new(config, layer_idx, weights.pp("self_attn"))?,
            moe: SparseMoe::new(config, layer_idx, &weights)?,
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
        let mixed = self
            .moe
            .forward(&self.post_attention_layernorm.forward(&x)?, packed)?;
        let x = residual(&x, &mixed)?;
        packed.observe(format_args!("hidden_layer{layer_idx}"), &x)?;
        Ok(x)
    }
}

/// A `phimoe` checkpoint, ready to run.
pub struct Model {
    embed_tokens: Embedding,
    layers: Vec<DecoderLayer>,
    norm: LayerNorm,
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
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let embed_tokens = Embedding::load(body.pp("embed_tokens"), vocab, hidden)?;
        let layers = (0..config.num_hidden_layers)
            .map(|idx| DecoderLayer::new(config, idx, body.pp("layers").pp(idx)))
            .collect::<Result<Vec<_>>>()?;
        let norm = LayerNorm::load(body.pp("norm"), hidden, config.rms_norm_eps)?;
        let lm_head = Linear::load(weights.pp("lm_head"), hidden, vocab, config.lm_head_bias)?;
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
