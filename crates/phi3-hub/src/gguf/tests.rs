//! Whole files: written, opened, and compared with candle's reader.

use std::io::Cursor;

use candle_core::Device;
use candle_core::quantized::gguf_file;
use phi3_kernels::BlockType;
use phi3_nn::{StoredTensor, TensorSource};

use super::testing::{HEAD_DIM, HIDDEN, INTERMEDIATE, KV_ROWS, Model, Q_ROWS, VOCAB, candle_type};
use super::*;

fn stored(source: &dyn TensorSource, name: &str) -> StoredTensor {
    source
        .tensor(name)
        .unwrap()
        .unwrap_or_else(|| panic!("{name} is missing"))
}

fn values(source: &dyn TensorSource, name: &str) -> Vec<f32> {
    stored(source, name).to_f32().unwrap()
}

/// candle's reading of a tensor, by its name in the file.
fn candle(file: &[u8], name: &str) -> Vec<f32> {
    let mut cursor = Cursor::new(file);
    let content = gguf_file::Content::read(&mut cursor).unwrap();
    let tensor = content.tensor(&mut cursor, name, &Device::Cpu).unwrap();
    let tensor = tensor.dequantize(&Device::Cpu).unwrap();
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// The rows of llama's q or k in Hugging Face's order, element by element.
fn unpermuted(rows: &[f32], heads: usize) -> Vec<f32> {
    let mut out = vec![0.0; rows.len()];
    for head in 0..heads {
        for half in 0..2 {
            for j in 0..HEAD_DIM / 2 {
                let to = (head * HEAD_DIM + half * HEAD_DIM / 2 + j) * HIDDEN;
                let from = (head * HEAD_DIM + 2 * j + half) * HIDDEN;
                out[to..to + HIDDEN].copy_from_slice(&rows[from..from + HIDDEN]);
            }
        }
    }
    out
}

const QKV: &str = "model.layers.0.self_attn.qkv_proj.weight";
const GATE_UP: &str = "model.layers.0.mlp.gate_up_proj.weight";
const DOWN: &str = "model.layers.0.mlp.down_proj.weight";

#[test]
fn every_block_type_decodes_as_candle_decodes_it() {
    for block_type in BlockType::ALL {
        if candle_type(block_type).is_none() {
            // IQ4_NL: candle refuses any file that holds it. Its blocks are the kernels' to test.
            continue;
        }
        let mut model = Model::metadata("phi3");
        model.add("output.weight", &[3, 512], block_type);
        let bytes = model.to_vec();
        let source = model.file().weights().unwrap();
        let ours = values(&*source, "lm_head.weight");
        assert_eq!(ours, candle(&bytes, "output.weight"), "{block_type}");
        assert_eq!(stored(&*source, "lm_head.weight").shape(), [3, 512]);
    }
}

#[test]
fn phi3_in_the_converters_spelling() {
    let model = Model::fused();
    let bytes = model.to_vec();
    let source = model.file().weights().unwrap();
    assert_eq!(
        values(&*source, QKV),
        candle(&bytes, "blk.0.attn_qkv.weight")
    );
    assert_eq!(
        values(&*source, GATE_UP),
        candle(&bytes, "blk.0.ffn_up.weight")
    );
    assert_eq!(
        values(&*source, DOWN),
        candle(&bytes, "blk.0.ffn_down.weight")
    );
    assert_eq!(
        stored(&*source, QKV).shape(),
        [Q_ROWS + 2 * KV_ROWS, HIDDEN]
    );
    assert_eq!(
        stored(&*source, GATE_UP).shape(),
        [2 * INTERMEDIATE, HIDDEN]
    );
    assert_eq!(
        source.names(),
        [
            "model.embed_tokens.weight",
            "model.layers.0.input_layernorm.weight",
            DOWN,
            GATE_UP,
            "model.layers.0.post_attention_layernorm.weight",
            "model.layers.0.self_attn.o_proj.weight",
            QKV,
            "model.norm.weight",
        ]
    );
    assert!(source.tensor("lm_head.weight").unwrap().is_none());
    assert_eq!(source.origin(), "test.gguf");
}

#[test]
fn phi3_with_separate_projections_stacks_them_as_they_are() {
    let model = Model::apart("phi3");
    let bytes = model.to_vec();
    let source = model.file().weights().unwrap();
    let expected = ["attn_q", "attn_k", "attn_v"]
        .map(|name| candle(&bytes, &format!("blk.0.{name}.weight")))
        .concat();
    assert_eq!(values(&*source, QKV), expected);
    let expected = ["ffn_gate", "ffn_up"]
        .map(|name| candle(&bytes, &format!("blk.0.{name}.weight")))
        .concat();
    assert_eq!(values(&*source, GATE_UP), expected);
    let types: Vec<_> = stored(&*source, QKV)
        .parts()
        .iter()
        .map(|p| p.block_type)
        .collect();
    assert_eq!(types, [BlockType::Q4K, BlockType::Q5_1, BlockType::Q6K]);
}

#[test]
fn llama_has_its_q_and_k_rows_put_back() {
    let model = Model::apart("llama");
    let bytes = model.to_vec();
    let source = model.file().weights().unwrap();
    let [q, k, v] =
        ["attn_q", "attn_k", "attn_v"].map(|name| candle(&bytes, &format!("blk.0.{name}.weight")));
    let expected = [unpermuted(&q, 4), unpermuted(&k, 2), v].concat();
    assert_eq!(values(&*source, QKV), expected);
    assert_ne!(expected[..q.len()], q[..]);
}

#[test]
fn llama_with_fused_projections_has_its_rows_put_back() {
    let mut model = Model::metadata("llama");
    let rows = Q_ROWS + 2 * KV_ROWS;
    model.add("blk.0.attn_qkv.weight", &[rows, HIDDEN], BlockType::Q8_0);
    let bytes = model.to_vec();
    let all = candle(&bytes, "blk.0.attn_qkv.weight");
    let (qk, v) = all.split_at((Q_ROWS + KV_ROWS) * HIDDEN);
    let expected = [unpermuted(qk, 6), v.to_vec()].concat();
    assert_eq!(values(&*model.file().weights().unwrap(), QKV), expected);
}

#[test]
fn a_file_on_disk_opens_as_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let mut model = Model::fused();
    let tokens: Array = ["<unk>", "<s>", "</s>", "▁", "a", "▁a"]
        .into_iter()
        .collect();
    model.writer.set("tokenizer.ggml.model", "llama");
    model.writer.set("tokenizer.ggml.tokens", tokens);
    model.writer.set(
        "tokenizer.ggml.token_type",
        Array::I32(vec![2, 3, 3, 1, 1, 1]),
    );
    let scores = vec![0.0, 0.0, 0.0, -2.0, -2.0, -1.0];
    model
        .writer
        .set("tokenizer.ggml.scores", Array::F32(scores));
    model
        .writer
        .set("tokenizer.chat_template", "{{ messages }}");
    std::fs::write(&path, model.to_vec()).unwrap();

    let checkpoint = open(&path).unwrap();
    assert_eq!(checkpoint.config["model_type"], "phi3");
    assert_eq!(checkpoint.config["vocab_size"], VOCAB);
    assert_eq!(
        checkpoint.generation_config.unwrap()["eos_token_id"],
        serde_json::json!([])
    );
    assert!(checkpoint.tokenizer.tokenizer_json.is_some());
    assert_eq!(checkpoint.chat_template.unwrap().text, "{{ messages }}");
    assert_eq!(checkpoint.weights.names().len(), 8);
    assert_eq!(checkpoint.tensors.len(), 8);
    assert_eq!(checkpoint.tensors[0].name, "token_embd.weight");
    assert_eq!(checkpoint.tensors[0].dtype, "Q8_0");
    assert_eq!(checkpoint.tensors[0].file, "model.gguf");
    assert_eq!(checkpoint.origin, path.display().to_string());
}

#[test]
fn an_error_names_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, b"GGUF").unwrap();
    let error = open(&path).unwrap_err().to_string();
    assert!(
        error.contains("model.gguf") && error.contains("cut off in the version"),
        "{error}"
    );
    let error = open(&folder.path().join("none.gguf"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("none.gguf"), "{error}");
}

#[test]
fn an_unknown_type_is_listed_and_fails_only_when_its_tensor_is_used() {
    let mut model = Model::fused();
    let unused = &[0u8; 136];
    model.add_bytes("output.weight", &[1, 256], TensorType(23), unused.to_vec());
    let file = model.file();
    let listed = file.tensors();
    let output = listed
        .iter()
        .find(|tensor| tensor.name == "output.weight")
        .unwrap();
    assert_eq!(output.type_name, "IQ4_XS");
    assert_eq!(output.hf_name.as_deref(), Some("lm_head.weight"));
    assert_eq!(output.bytes, Some(136));
    let source = file.weights().unwrap();
    assert!(source.tensor(QKV).is_ok());
    let error = source.tensor("lm_head.weight").unwrap_err().to_string();
    assert!(
        error.contains("\"output.weight\" is stored as IQ4_XS"),
        "{error}"
    );
    assert!(error.contains("Q4_K"), "{error}");
}

#[test]
fn another_architecture_is_listed_but_not_opened() {
    let mut model = Model::fused();
    model.writer.set("general.architecture", "qwen2");
    let file = model.file();
    assert_eq!(file.architecture().unwrap(), "qwen2");
    assert_eq!(file.tensors().len(), 8);
    let error = file.config().unwrap_err().to_string();
    assert!(
        error.contains("\"qwen2\" is not supported, only phi3, llama"),
        "{error}"
    );
    assert!(file.weights().is_err());
}

/// The vocabulary file has the metadata of Phi-3-mini-4k from before sliding windows were written.
#[test]
fn the_metadata_of_phi3_mini_give_its_config() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/fixtures/phi3-gguf/ggml-vocab-phi-3.gguf");
    let checkpoint = open(&path).unwrap();
    // As published in microsoft/Phi-3-mini-4k-instruct.
    for (key, value) in [
        ("hidden_size", serde_json::json!(3072)),
        ("intermediate_size", 8192.into()),
        ("max_position_embeddings", 4096.into()),
        ("original_max_position_embeddings", 4096.into()),
        ("num_attention_heads", 32.into()),
        ("num_key_value_heads", 32.into()),
        ("num_hidden_layers", 32.into()),
        ("rms_norm_eps", 1e-5.into()),
        ("rope_scaling", Json::Null),
        ("rope_theta", 10000.0.into()),
        ("sliding_window", 2047.into()),
        ("vocab_size", 32064.into()),
        ("bos_token_id", 1.into()),
        ("eos_token_id", 32000.into()),
        ("pad_token_id", 32000.into()),
    ] {
        assert_eq!(checkpoint.config[key], value, "{key}");
    }
    let ends = &checkpoint.generation_config.unwrap()["eos_token_id"];
    assert_eq!(*ends, serde_json::json!([32000, 32007]));
    assert!(checkpoint.weights.names().is_empty());
}

/// A complete file of a few kilobytes, with a tokenizer.
fn tiny() -> Vec<u8> {
    let mut model = Model::default();
    model.writer.set("general.architecture", "llama");
    for (key, value) in [
        ("context_length", 8u32),
        ("embedding_length", 4),
        ("feed_forward_length", 2),
        ("block_count", 1),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
        ("rope.scaling.original_context_length", 4),
    ] {
        model.set(key, value);
    }
    model.set("attention.layer_norm_rms_epsilon", 1e-5f32);
    let tokens: Array = ["<unk>", "<s>", "</s>", "▁", "a", "▁a"]
        .into_iter()
        .collect();
    model.writer.set("tokenizer.ggml.model", "llama");
    model.writer.set("tokenizer.ggml.tokens", tokens);
    model.writer.set(
        "tokenizer.ggml.token_type",
        Array::I32(vec![2, 3, 3, 1, 1, 1]),
    );
    model
        .writer
        .set("tokenizer.ggml.scores", Array::F32(vec![0.0; 6]));
    model.writer.set("tokenizer.ggml.bos_token_id", 1u32);
    model.writer.set("tokenizer.chat_template", "x");
    for (name, shape) in [
        ("token_embd.weight", &[6, 4][..]),
        ("output_norm.weight", &[4]),
        ("rope_factors_long.weight", &[1]),
        ("rope_factors_short.weight", &[1]),
        ("blk.0.attn_q.weight", &[4, 4]),
        ("blk.0.attn_k.weight", &[2, 4]),
        ("blk.0.attn_v.weight", &[2, 4]),
        ("blk.0.ffn_up.weight", &[4, 4]),
    ] {
        let ones = 1.0f32.to_le_bytes().repeat(shape.iter().product());
        model.add_bytes(name, shape, BlockType::F32.into(), ones);
    }
    model.to_vec()
}

/// Everything that can be asked of a file; whether all of it was answered.
fn use_all(file: Vec<u8>) -> bool {
    let Ok(file) = GgufFile::parse(file.into(), "hostile") else {
        return false;
    };
    file.tensors();
    let parts = [
        file.config().is_ok(),
        file.generation_config().is_ok(),
        file.tokenizer().is_ok(),
        file.chat_template().is_ok(),
    ];
    let Ok(source) = file.weights() else {
        return false;
    };
    let weights = source.names().iter().all(|name| {
        let tensor = source.tensor(name);
        tensor.is_ok_and(|tensor| tensor.is_some_and(|tensor| tensor.to_f32().is_ok()))
    });
    weights && parts == [true; 4]
}

#[test]
fn hostile_changes_of_a_whole_file_never_panic() {
    let file = tiny();
    assert!(use_all(file.clone()));
    for at in 0..file.len() {
        for value in [0, 1, 3, 0x20, 0x7f, 0x80, 0xff] {
            let mut changed = file.clone();
            changed[at] = value;
            use_all(changed);
        }
    }
}
