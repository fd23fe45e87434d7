//! Small models for the tests: random weights of both architectures, written by [`Writer`].

use std::collections::BTreeMap;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use phi3_kernels::BlockType;

use super::{Error, GgufFile, TensorType, Writer};

/// A model file to be: header and stored bytes.
#[derive(Clone, Default)]
pub(super) struct Model {
    pub writer: Writer,
    pub data: BTreeMap<String, Vec<u8>>,
    seed: u64,
}

pub(super) const HIDDEN: usize = 256;
pub(super) const HEADS: usize = 4;
pub(super) const KV_HEADS: usize = 2;
pub(super) const HEAD_DIM: usize = HIDDEN / HEADS;
pub(super) const INTERMEDIATE: usize = 512;
pub(super) const VOCAB: usize = 12;
pub(super) const Q_ROWS: usize = HEADS * HEAD_DIM;
pub(super) const KV_ROWS: usize = KV_HEADS * HEAD_DIM;

impl Model {
    /// The metadata of an architecture, without tensors.
    pub fn metadata(architecture: &str) -> Self {
        let mut model = Self::default();
        model.writer.set("general.architecture", architecture);
        for (key, value) in [
            ("context_length", 64),
            ("embedding_length", HIDDEN),
            ("feed_forward_length", INTERMEDIATE),
            ("block_count", 1),
            ("attention.head_count", HEADS),
            ("attention.head_count_kv", KV_HEADS),
        ] {
            model.set(key, value as u32);
        }
        model.set("attention.layer_norm_rms_epsilon", 1e-5f32);
        model.set("rope.freq_base", 10000.0f32);
        model
    }

    /// Sets a key below the architecture's name.
    pub fn set(&mut self, key: &str, value: impl Into<super::Value>) {
        let architecture = &self.writer.metadata()[0].1;
        let key = format!("{}.{key}", architecture.as_str().unwrap());
        self.writer.set(key, value);
    }

    /// Adds a tensor of random weights.
    pub fn add(&mut self, name: &str, shape: &[usize], block_type: BlockType) {
        let bytes = self.random(shape, block_type);
        self.add_bytes(name, shape, block_type.into(), bytes);
    }

    /// Adds a tensor of these f32 values.
    pub fn add_f32(&mut self, name: &str, values: &[f32]) {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.add_bytes(name, &[values.len()], BlockType::F32.into(), bytes);
    }

    pub fn add_bytes(&mut self, name: &str, shape: &[usize], kind: TensorType, bytes: Vec<u8>) {
        self.writer.add_tensor(name, shape, kind).unwrap();
        self.data.insert(name.to_owned(), bytes);
    }

    /// What every layer has besides q, k, v, gate and up, and the tensors outside of layers.
    pub fn add_rest(&mut self) {
        self.add("token_embd.weight", &[VOCAB, HIDDEN], BlockType::Q8_0);
        self.add("output_norm.weight", &[HIDDEN], BlockType::F32);
        self.add("blk.0.attn_norm.weight", &[HIDDEN], BlockType::F32);
        self.add("blk.0.ffn_norm.weight", &[HIDDEN], BlockType::F32);
        self.add(
            "blk.0.attn_output.weight",
            &[HIDDEN, Q_ROWS],
            BlockType::Q4_0,
        );
        self.add(
            "blk.0.ffn_down.weight",
            &[HIDDEN, INTERMEDIATE],
            BlockType::Q6K,
        );
    }

    /// A model with q, k, v and gate, up apart, each of another type.
    pub fn apart(architecture: &str) -> Self {
        let mut model = Self::metadata(architecture);
        model.add_rest();
        for (name, rows, block_type) in [
            ("attn_q", Q_ROWS, BlockType::Q4K),
            ("attn_k", KV_ROWS, BlockType::Q5_1),
            ("attn_v", KV_ROWS, BlockType::Q6K),
            ("ffn_gate", INTERMEDIATE, BlockType::Q4_1),
            ("ffn_up", INTERMEDIATE, BlockType::F16),
        ] {
            model.add(&format!("blk.0.{name}.weight"), &[rows, HIDDEN], block_type);
        }
        model
    }

    /// A model in the spelling of llama.cpp's Phi-3 converter.
    pub fn fused() -> Self {
        let mut model = Self::metadata("phi3");
        model.add_rest();
        let rows = Q_ROWS + 2 * KV_ROWS;
        model.add("blk.0.attn_qkv.weight", &[rows, HIDDEN], BlockType::Q4_0);
        model.add(
            "blk.0.ffn_up.weight",
            &[2 * INTERMEDIATE, HIDDEN],
            BlockType::Q4_0,
        );
        model
    }

    pub fn to_vec(&self) -> Vec<u8> {
        let write = |tensor: &super::PlannedTensor, sink: &mut super::TensorSink<'_>| {
            sink.write(&self.data[&tensor.name])
        };
        self.writer.to_vec::<Error>(write).unwrap()
    }

    pub fn file(&self) -> GgufFile {
        GgufFile::parse(self.to_vec().into(), "test.gguf").unwrap()
    }

    /// Stored blocks of random weights, quantized by candle.
    fn random(&mut self, shape: &[usize], block_type: BlockType) -> Vec<u8> {
        let values: Vec<f32> = (0..shape.iter().product())
            .map(|_| {
                // Knuth's MMIX generator; the upper bits are good enough for weights.
                self.seed = self
                    .seed
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                (self.seed >> 40) as f32 / (1u64 << 24) as f32 - 0.5
            })
            .collect();
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
        let dtype = candle_type(block_type).expect("candle can make this type");
        let stored = QTensor::quantize(&tensor, dtype).unwrap();
        stored.data().unwrap().into_owned()
    }
}

/// candle's name of a block type; it knows all but IQ4_NL.
pub(super) fn candle_type(block_type: BlockType) -> Option<GgmlDType> {
    Some(match block_type {
        BlockType::F32 => GgmlDType::F32,
        BlockType::F16 => GgmlDType::F16,
        BlockType::BF16 => GgmlDType::BF16,
        BlockType::Q4_0 => GgmlDType::Q4_0,
        BlockType::Q4_1 => GgmlDType::Q4_1,
        BlockType::Q5_0 => GgmlDType::Q5_0,
        BlockType::Q5_1 => GgmlDType::Q5_1,
        BlockType::Q8_0 => GgmlDType::Q8_0,
        BlockType::Q2K => GgmlDType::Q2K,
        BlockType::Q3K => GgmlDType::Q3K,
        BlockType::Q4K => GgmlDType::Q4K,
        BlockType::Q5K => GgmlDType::Q5K,
        BlockType::Q6K => GgmlDType::Q6K,
        _ => return None,
    })
}
