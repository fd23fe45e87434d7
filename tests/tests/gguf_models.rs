//! The reference's goldens through GGUF files: each kit written as llama.cpp's converter names a
//! phi3 file, in the split spelling of other writers, and as a llama file with permuted rows.

use std::path::Path;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device};
use phi_3_mini::{Config, Model};
use phi3_hub::gguf::{Error, GgufFile, Value, Writer};
use phi3_kernels::BlockType;
use phi3_nn::{StoredTensor, Weights};
use phi3_tests::fixtures;
use phi3_tests::golden::{F32Tensor, Kit};
use phi3_tests::runner::check_kit;
use serde_json::Value as Json;

/// How a file spells the fused projections.
#[derive(Clone, Copy, PartialEq)]
enum Spelling {
    /// `attn_qkv`, and gate and up as one `ffn_up`.
    Fused,
    /// `attn_q`, `attn_k`, `attn_v`, `ffn_gate`, `ffn_up`.
    Split,
    /// The same under the architecture llama, whose converter permutes the rows of q and k.
    Llama,
}

/// Tensors in file order.
type Tensors = Vec<F32Tensor>;

fn number(config: &Json, key: &str) -> Result<usize> {
    let value = config[key].as_u64().with_context(|| key.to_owned())?;
    Ok(usize::try_from(value)?)
}

fn write(kit: &Kit, spelling: Spelling) -> Result<Vec<u8>> {
    let config = &kit.config;
    let arch = if spelling == Spelling::Llama {
        "llama"
    } else {
        "phi3"
    };
    let heads = number(config, "num_attention_heads")?;
    let kv_heads = number(config, "num_key_value_heads")?;
    let hidden = number(config, "hidden_size")?;
    let head_dim = hidden / heads;
    let mut writer = Writer::new();
    writer.set("general.architecture", arch);
    let mut set = |key: &str, value: Value| writer.set(format!("{arch}.{key}"), value);
    for (key, field) in [
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("block_count", "num_hidden_layers"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("vocab_size", "vocab_size"),
    ] {
        set(key, (number(config, field)? as u32).into());
    }
    let partial = config["partial_rotary_factor"].as_f64().unwrap_or(1.0);
    set(
        "rope.dimension_count",
        ((head_dim as f64 * partial) as u32).into(),
    );
    let float = |key: &str| config[key].as_f64().map(|value| value as f32);
    set(
        "rope.freq_base",
        float("rope_theta").context("rope_theta")?.into(),
    );
    set(
        "attention.layer_norm_rms_epsilon",
        float("rms_norm_eps").context("eps")?.into(),
    );
    let original = number(config, "original_max_position_embeddings")?;
    if arch == "phi3" {
        set(
            "rope.scaling.original_context_length",
            (original as u32).into(),
        );
        if let Some(window) = config["sliding_window"].as_u64() {
            set("attention.sliding_window", (window as u32).into());
        }
    }

    let mut tensors = Tensors::new();
    for (name, shape, bytes) in kit.f32_tensors()? {
        let Some((layer, part)) = name
            .strip_prefix("model.layers.")
            .and_then(|n| n.split_once('.'))
        else {
            let name = match name.as_str() {
                "model.embed_tokens.weight" => "token_embd.weight",
                "model.norm.weight" => "output_norm.weight",
                "lm_head.weight" => "output.weight",
                other => bail!("unexpected tensor {other}"),
            };
            tensors.push((name.to_owned(), shape, bytes));
            continue;
        };
        let block = |name: &str| format!("blk.{layer}.{name}.weight");
        let mut split = |cuts: &[(&str, usize)]| {
            let row = bytes.len() / shape[0];
            let mut start = 0;
            for (name, rows) in cuts {
                let mut part = bytes[start * row..(start + rows) * row].to_vec();
                if spelling == Spelling::Llama && ["attn_q", "attn_k"].contains(name) {
                    part = permuted(&part, rows / head_dim, head_dim, row);
                }
                tensors.push((block(name), vec![*rows, shape[1]], part));
                start += rows;
            }
        };
        match (part, spelling) {
            ("self_attn.qkv_proj.weight", Spelling::Split | Spelling::Llama) => split(&[
                ("attn_q", heads * head_dim),
                ("attn_k", kv_heads * head_dim),
                ("attn_v", kv_heads * head_dim),
            ]),
            ("mlp.gate_up_proj.weight", Spelling::Split | Spelling::Llama) => {
                split(&[("ffn_gate", shape[0] / 2), ("ffn_up", shape[0] / 2)]);
            }
            _ => {
                let name = match part {
                    "self_attn.qkv_proj.weight" => "attn_qkv",
                    "self_attn.o_proj.weight" => "attn_output",
                    "mlp.gate_up_proj.weight" => "ffn_up",
                    "mlp.down_proj.weight" => "ffn_down",
                    "input_layernorm.weight" => "attn_norm",
                    "post_attention_layernorm.weight" => "ffn_norm",
                    other => bail!("unexpected tensor {other}"),
                };
                tensors.push((block(name), shape, bytes));
            }
        }
    }
    for (key, name) in [
        ("long_factor", "rope_factors_long"),
        ("short_factor", "rope_factors_short"),
    ] {
        if let Some(factors) = config["rope_scaling"][key].as_array() {
            let bytes = factors
                .iter()
                .filter_map(Json::as_f64)
                .flat_map(|f| (f as f32).to_le_bytes());
            tensors.push((
                format!("{name}.weight"),
                vec![factors.len()],
                bytes.collect(),
            ));
        }
    }

    for (name, shape, _) in &tensors {
        writer.add_tensor(name, shape, BlockType::F32)?;
    }
    let mut data = tensors.iter();
    Ok(writer.to_vec(|_, sink| {
        let Some((_, _, bytes)) = data.next() else {
            return Ok::<(), Error>(());
        };
        sink.write(bytes)
    })?)
}

/// Rows in the order that llama.cpp rotates: of each head, dimension j and j + d/2 beside each other.
fn permuted(bytes: &[u8], heads: usize, head_dim: usize, row: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    for head in 0..heads {
        for j in 0..head_dim {
            let from = head * head_dim + (j % 2) * (head_dim / 2) + j / 2;
            out.extend_from_slice(&bytes[from * row..(from + 1) * row]);
        }
    }
    out
}

fn check(name: &str, spelling: Spelling) -> Result<()> {
    let kit = Kit::load(&fixtures().join(name))?;
    let file = GgufFile::parse(write(&kit, spelling)?.into(), name)?;
    let weights = Weights::new(file.weights()?, Device::Cpu, DType::F32);
    let model = Model::new(&Config::from_json(&file.config()?)?, weights)?;
    check_kit(&kit, &model).with_context(|| name.to_owned())?;
    Ok(())
}

#[test]
fn phi3_files_give_the_goldens() -> Result<()> {
    for name in [
        "phi3-mini-4k",
        "phi3-mini-4k-window",
        "phi3-mini-128k-longrope",
        "phi3-medium-4k",
        "phi3-medium-128k",
        "phi4-mini",
    ] {
        check(name, Spelling::Fused)?;
        check(name, Spelling::Split).context("in the split spelling")?;
    }
    Ok(())
}

#[test]
fn llama_files_give_the_goldens() -> Result<()> {
    // Its prompts are shorter than the window that a llama file cannot state.
    check("phi3-mini-4k", Spelling::Llama)?;
    check("phi3-medium-4k", Spelling::Llama)
}

/// The kit's own reader is the `safetensors` crate; the project's gives the same tensors.
#[test]
fn the_projects_reader_gives_the_same_tensors() -> Result<()> {
    let folder = fixtures().join("phi4-mini");
    let source = phi3_hub::safetensors::SafetensorsSource::open(Path::new(&folder))?;
    for (name, shape, bytes) in Kit::load(&folder)?.f32_tensors()? {
        let ours: StoredTensor = source.get(&name)?.with_context(|| name.clone())?;
        assert_eq!(ours.shape(), shape, "{name}");
        assert_eq!(&*ours.parts()[0].bytes, bytes, "{name}");
    }
    Ok(())
}
