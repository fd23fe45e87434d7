//! A dense Phi-3 checkpoint as a mixture of experts that gives the same logits, so that the mixture's
//! code can be tried with a trained model.
//!
//! With x the residual stream of the dense model, that of the mixture is [x, -x]: its mean is 0, and so
//! LayerNorm is RMSNorm. A matrix W that reads the stream becomes [W/2, -W/2], one that writes it W over
//! -W. There are twice as many heads as before, of the same width; the new ones read zeros and are read by
//! zeros. Every expert computes half of the dense block, with its inner features in another order than
//! the others', so that parts of two experts do not fit together. With a jitter of 0 both experts of a
//! token have weight 1, and their halves add up whichever two they are. The router is arbitrary.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use phi3_hub::Checkpoint;
use phi3_kernels::{BlockType, quantize};
use phi3_nn::{MemorySource, StoredTensor, TensorSource};
use serde_json::{Value, json};

/// By how many features the next expert's order is turned.
const TURN: usize = 37;

/// A matrix in row order.
#[derive(Clone)]
struct Matrix {
    cols: usize,
    values: Vec<f32>,
}

impl Matrix {
    fn rows(&self) -> usize {
        self.values.len() / self.cols
    }

    fn zeros(rows: usize, cols: usize) -> Self {
        let values = vec![0.0; rows * cols];
        Self { cols, values }
    }

    /// Rows `start..start + count`.
    fn slice(&self, start: usize, count: usize) -> Result<Self> {
        let range = start * self.cols..(start + count) * self.cols;
        let values = self.values.get(range).context("rows")?.to_vec();
        Ok(Self { values, ..*self })
    }

    fn over(mut self, below: &Self) -> Self {
        self.values.extend_from_slice(&below.values);
        self
    }

    fn beside(&self, right: &Self) -> Self {
        let rows = self.values.chunks_exact(self.cols);
        let rows = rows.zip(right.values.chunks_exact(right.cols));
        Self {
            cols: self.cols + right.cols,
            values: rows
                .flat_map(|(left, right)| [left, right].concat())
                .collect(),
        }
    }

    fn times(&self, factor: f32) -> Self {
        let values = self.values.iter().map(|value| value * factor).collect();
        Self { values, ..*self }
    }

    /// The same product, of [x, -x].
    fn reader(&self) -> Self {
        self.times(0.5).beside(&self.times(-0.5))
    }

    /// The same product y, as [y, -y].
    fn writer(&self) -> Self {
        self.clone().over(&self.times(-1.0))
    }

    /// The last `count` rows first.
    fn turned_rows(&self, count: usize) -> Result<Self> {
        let first = self.rows() - count;
        Ok(self.slice(first, count)?.over(&self.slice(0, first)?))
    }

    /// The last `count` columns first.
    fn turned_columns(&self, count: usize) -> Self {
        let mut turned = self.clone();
        turned
            .values
            .chunks_exact_mut(self.cols)
            .for_each(|row| row.rotate_right(count));
        turned
    }
}

/// The lifted tensors while they are collected.
struct Lift<'a> {
    dense: &'a dyn TensorSource,
    block_type: BlockType,
    lifted: MemorySource,
}

impl Lift<'_> {
    fn read(&self, name: &str) -> Result<Matrix> {
        let stored = self.dense.tensor(name).map_err(|e| anyhow::anyhow!(e))?;
        let stored = stored.with_context(|| name.to_owned())?;
        Ok(Matrix {
            cols: stored.columns(),
            values: stored.to_f32()?,
        })
    }

    fn put(&mut self, name: String, matrix: &Matrix) -> Result<()> {
        let (rows, cols) = (matrix.rows(), matrix.cols);
        let row_bytes = self.block_type.row_bytes(cols).context("row")?;
        let mut bytes = vec![0; rows * row_bytes];
        quantize(self.block_type, &matrix.values, cols, None, &mut bytes)?;
        let stored = StoredTensor::new(vec![rows, cols], self.block_type, bytes.into())?;
        self.lifted.insert(name, stored);
        Ok(())
    }

    fn put_vector(&mut self, name: String, values: &[f32]) -> Result<()> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let stored = StoredTensor::new(vec![values.len()], BlockType::F32, bytes.into())?;
        self.lifted.insert(name, stored);
        Ok(())
    }

    /// RMSNorm's weight for both halves, and a bias of 0.
    fn norm(&mut self, name: &str) -> Result<()> {
        let weight = self.read(&format!("{name}.weight"))?.values;
        self.put_vector(
            format!("{name}.weight"),
            &[weight.as_slice(), &weight].concat(),
        )?;
        self.put_vector(format!("{name}.bias"), &vec![0.0; 2 * weight.len()])
    }

    fn layer(&mut self, prefix: &str, shape: &Shape, experts: usize) -> Result<()> {
        let qkv = self.read(&format!("{prefix}.self_attn.qkv_proj.weight"))?;
        let mut first = 0;
        for (name, rows) in [("q", shape.queries), ("k", shape.keys), ("v", shape.keys)] {
            let read = qkv.slice(first, rows)?.reader();
            let zeros = Matrix::zeros(rows, read.cols);
            let name = format!("{prefix}.self_attn.{name}_proj");
            self.put(format!("{name}.weight"), &read.over(&zeros))?;
            self.put_vector(format!("{name}.bias"), &vec![0.0; 2 * rows])?;
            first += rows;
        }
        let name = format!("{prefix}.self_attn.o_proj");
        let out = self.read(&format!("{name}.weight"))?;
        let out = out.beside(&Matrix::zeros(out.rows(), out.cols)).writer();
        self.put(format!("{name}.weight"), &out)?;
        self.put_vector(format!("{name}.bias"), &vec![0.0; out.rows()])?;
        for name in ["input_layernorm", "post_attention_layernorm"] {
            self.norm(&format!("{prefix}.{name}"))?;
        }
        let gate_up = self.read(&format!("{prefix}.mlp.gate_up_proj.weight"))?;
        let inner = gate_up.rows() / 2;
        let gate = gate_up.slice(0, inner)?.reader();
        let up = gate_up.slice(inner, inner)?.reader();
        let down = self.read(&format!("{prefix}.mlp.down_proj.weight"))?;
        let down = down.writer().times(0.5);
        let moe = format!("{prefix}.block_sparse_moe");
        let mut router = Matrix::zeros(experts, gate.cols);
        for (at, value) in router.values.iter_mut().enumerate() {
            *value = ((at * at * 31 + at * 17 + prefix.len()) % 1009) as f32 / 10_090.0 - 0.05;
        }
        self.put(format!("{moe}.gate.weight"), &router)?;
        for expert in 0..experts {
            let turn = expert * TURN;
            let name = |matrix: &str| format!("{moe}.experts.{expert}.{matrix}.weight");
            self.put(name("w1"), &gate.turned_rows(turn)?)?;
            self.put(name("w3"), &up.turned_rows(turn)?)?;
            self.put(name("w2"), &down.turned_columns(turn))?;
        }
        Ok(())
    }
}

/// Widths of the dense model's attention.
struct Shape {
    queries: usize,
    keys: usize,
}

/// `dense`, a `phi3` checkpoint without LongRoPE, as `phimoe` with so many experts, in memory. Matrices are
/// stored as `block_type`.
///
/// # Errors
/// What keeps a tensor from being read, or a configuration that is not as expected.
pub fn to_mixture(dense: &Checkpoint, experts: usize, block_type: BlockType) -> Result<Checkpoint> {
    let number = |key: &str| {
        let value = dense.config.get(key).and_then(Value::as_u64);
        Ok::<usize, anyhow::Error>(value.with_context(|| key.to_owned())? as usize)
    };
    ensure!(dense.config["model_type"] == "phi3" && dense.config["rope_scaling"].is_null());
    let hidden = number("hidden_size")?;
    let (heads, kv_heads) = (
        number("num_attention_heads")?,
        number("num_key_value_heads")?,
    );
    let shape = Shape {
        queries: hidden,
        keys: hidden / heads * kv_heads,
    };
    let mut lift = Lift {
        dense: dense.weights.as_ref(),
        block_type,
        lifted: MemorySource::new(),
    };
    let embedding = lift.read("model.embed_tokens.weight")?;
    let head = match dense.config["tie_word_embeddings"].as_bool() {
        Some(true) => embedding.clone(),
        _ => lift.read("lm_head.weight")?,
    };
    let lifted = embedding.beside(&embedding.times(-1.0));
    lift.put("model.embed_tokens.weight".to_owned(), &lifted)?;
    lift.put("lm_head.weight".to_owned(), &head.reader())?;
    lift.put_vector("lm_head.bias".to_owned(), &vec![0.0; head.rows()])?;
    lift.norm("model.norm")?;
    for layer in 0..number("num_hidden_layers")? {
        lift.layer(&format!("model.layers.{layer}"), &shape, experts)?;
    }

    let mut config = dense.config.clone();
    for (key, value) in [
        ("model_type", json!("phimoe")),
        ("architectures", json!(["PhiMoEForCausalLM"])),
        ("hidden_size", json!(2 * hidden)),
        ("num_attention_heads", json!(2 * heads)),
        ("num_key_value_heads", json!(2 * kv_heads)),
        ("num_local_experts", json!(experts)),
        ("num_experts_per_tok", json!(2)),
        ("router_jitter_noise", json!(0.0)),
        ("input_jitter_noise", json!(0.0)),
        ("attention_bias", json!(true)),
        ("lm_head_bias", json!(true)),
        ("tie_word_embeddings", json!(false)),
    ] {
        config[key] = value;
    }
    Ok(Checkpoint {
        config,
        weights: Arc::new(lift.lifted),
        tensors: Vec::new(),
        origin: format!("{}, lifted", dense.origin),
        ..dense.clone()
    })
}
