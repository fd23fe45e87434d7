//! Good models in small, to be broken one thing at a time: a folder in Hugging Face's layout around
//! a fixture's weights, and a GGUF file that holds everything itself.
//!
//! Both have the same vocabulary of 17 tokens, enough to chat about "hi".

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use half::f16;
use phi3_hub::gguf::{self, Array, TensorType, Value as Metadata, Writer};
use phi3_kernels::BlockType;
use serde_json::{Map, Value, json};

use crate::fixtures;

/// The vocabulary by id. SentencePiece's, but for the bytes: all others are unknown.
pub const TOKENS: [&str; 17] = [
    "<unk>",
    "<s>",
    "</s>",
    "<0x0A>",
    "▁",
    "h",
    "i",
    "o",
    ".",
    "hi",
    "▁hi",
    "▁h",
    "ho",
    "<|user|>",
    "<|end|>",
    "<|assistant|>",
    "<|endoftext|>",
];

/// What of [`TOKENS`] is special.
pub const SPECIAL: [&str; 7] = [
    "<unk>",
    "<s>",
    "</s>",
    "<|user|>",
    "<|end|>",
    "<|assistant|>",
    "<|endoftext|>",
];

/// How neighbors join, best first.
pub const MERGES: [(&str, &str); 4] = [("h", "i"), ("▁", "hi"), ("▁", "h"), ("h", "o")];

/// Phi-3's chat template.
pub const TEMPLATE: &str = "{% for message in messages %}<|{{ message.role }}|>\n\
    {{ message.content }}<|end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|assistant|>\n{% endif %}";

/// `tokenizer.json` of the vocabulary.
pub fn tokenizer_json() -> Value {
    let vocab: Map<String, Value> = (0..)
        .zip(TOKENS)
        .map(|(id, token)| (token.to_owned(), Value::from(id)))
        .collect();
    let added: Vec<Value> = (0..)
        .zip(TOKENS)
        .filter(|(_, token)| SPECIAL.contains(token))
        .map(|(id, token): (u32, _)| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "fuse_unk": true,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "byte_fallback": true,
            "vocab": vocab, "merges": MERGES},
    })
}

/// `tokenizer_config.json` of the vocabulary, chat template included.
pub fn tokenizer_config() -> Value {
    json!({"tokenizer_class": "LlamaTokenizer", "add_bos_token": true, "add_eos_token": false,
        "bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>",
        "pad_token": "<|endoftext|>", "chat_template": TEMPLATE})
}

/// A checkpoint folder of its own, with the weights of the fixture phi3-mini-4k; gone when dropped.
pub struct Folder {
    folder: tempfile::TempDir,
}

impl Folder {
    /// A folder that loads, completes and chats.
    ///
    /// # Errors
    /// If the fixture is not there or the disk is full.
    pub fn good() -> Result<Self> {
        let folder = Self {
            folder: tempfile::tempdir()?,
        };
        for name in ["config.json", "model.safetensors"] {
            let from = fixtures().join("phi3-mini-4k").join(name);
            std::fs::copy(&from, folder.file(name))
                .with_context(|| format!("copying {}", from.display()))?;
        }
        folder.write_json("tokenizer.json", &tokenizer_json())?;
        folder.write_json("tokenizer_config.json", &tokenizer_config())?;
        Ok(folder)
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// A file in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// Writes a file, in place of one that is there.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> Result<()> {
        std::fs::write(self.file(name), bytes).with_context(|| format!("writing {name}"))
    }

    /// Writes a JSON file.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn write_json(&self, name: &str, value: &Value) -> Result<()> {
        self.write(name, value.to_string())
    }

    /// Removes a file.
    ///
    /// # Errors
    /// If it is not there.
    pub fn remove(&self, name: &str) -> Result<()> {
        std::fs::remove_file(self.file(name)).with_context(|| format!("removing {name}"))
    }

    /// The bytes of a file.
    ///
    /// # Errors
    /// If it is not there.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        std::fs::read(self.file(name)).with_context(|| format!("reading {name}"))
    }

    /// Sets a field of a JSON file, given as a pointer (`/rope_scaling/type`) whose parents exist.
    ///
    /// # Errors
    /// If a parent does not exist.
    pub fn set(&self, name: &str, pointer: &str, value: Value) -> Result<()> {
        let mut json: Value = serde_json::from_slice(&self.read(name)?)?;
        let (parent, key) = pointer.rsplit_once('/').context("a pointer has a slash")?;
        let parent = json.pointer_mut(parent).context("the parent exists")?;
        let fields = parent.as_object_mut().context("the parent is an object")?;
        fields.insert(key.to_owned(), value);
        self.write_json(name, &json)
    }

    /// Sets a field of config.json.
    ///
    /// # Errors
    /// If config.json is not there.
    pub fn set_config(&self, key: &str, value: Value) -> Result<()> {
        self.set("config.json", &format!("/{key}"), value)
    }

    /// Cuts a file to its first `len` bytes.
    ///
    /// # Errors
    /// If it is not longer than that.
    pub fn cut(&self, name: &str, len: usize) -> Result<()> {
        let bytes = self.read(name)?;
        ensure!(len < bytes.len(), "{name} has only {} bytes", bytes.len());
        self.write(name, bytes.get(..len).unwrap_or_default())
    }

    /// Changes model.safetensors.
    ///
    /// # Errors
    /// If it is not there, or `change` fails.
    pub fn change_weights(
        &self,
        change: impl FnOnce(&mut Safetensors) -> Result<()>,
    ) -> Result<()> {
        let mut weights = Safetensors::parse(&self.read("model.safetensors")?)?;
        change(&mut weights)?;
        self.write("model.safetensors", weights.to_bytes())
    }
}

/// A safetensors file, taken apart without any check.
pub struct Safetensors {
    /// Tensor name to `{"dtype": …, "shape": […], "data_offsets": […]}`.
    pub header: Map<String, Value>,
    /// What follows the header.
    pub data: Vec<u8>,
}

impl Safetensors {
    /// Takes a good file apart.
    ///
    /// # Errors
    /// If it is not one.
    pub fn parse(file: &[u8]) -> Result<Self> {
        let (len, rest) = file.split_first_chunk().context("a length")?;
        let (header, data) = rest
            .split_at_checked(usize::try_from(u64::from_le_bytes(*len))?)
            .context("a header")?;
        Ok(Self {
            header: serde_json::from_slice(header)?,
            data: data.to_vec(),
        })
    }

    /// The file again.
    pub fn to_bytes(&self) -> Vec<u8> {
        safetensors_bytes(&json!(self.header).to_string(), &self.data)
    }

    /// Sets a field of a tensor's entry.
    ///
    /// # Errors
    /// If there is no such tensor.
    pub fn set(&mut self, tensor: &str, field: &str, value: Value) -> Result<()> {
        let entry = self.header.get_mut(tensor).context("no such tensor")?;
        let fields = entry.as_object_mut().context("an entry is an object")?;
        fields.insert(field.to_owned(), value);
        Ok(())
    }

    /// Fills `count` values of an F32 tensor, from its first on.
    ///
    /// # Errors
    /// If there is no such tensor, or it is smaller.
    pub fn fill(&mut self, tensor: &str, count: usize, value: f32) -> Result<()> {
        let entry = self.header.get(tensor).context("no such tensor")?;
        let start = entry["data_offsets"][0].as_u64().context("offsets")?;
        let start = usize::try_from(start)?;
        let bytes = self.data.get_mut(start..start + 4 * count);
        for chunk in bytes.context("so many values")?.chunks_exact_mut(4) {
            chunk.copy_from_slice(&value.to_le_bytes());
        }
        Ok(())
    }
}

/// A safetensors file of any header text.
pub fn safetensors_bytes(header: &str, data: &[u8]) -> Vec<u8> {
    let len = (header.len() as u64).to_le_bytes();
    [len.as_slice(), header.as_bytes(), data].concat()
}

/// A GGUF file to be, open to any change.
pub struct Gguf {
    /// The metadata in file order.
    pub metadata: Vec<(String, Metadata)>,
    /// The tensors in file order.
    pub tensors: Vec<GgufTensor>,
}

/// A tensor of a [`Gguf`].
pub struct GgufTensor {
    /// Name in the file.
    pub name: String,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// How it is stored.
    pub tensor_type: TensorType,
    /// The stored bytes.
    pub bytes: Vec<u8>,
}

impl Gguf {
    /// A model of one layer, 32 dimensions and a context of 64, that loads, completes and chats.
    pub fn good() -> Self {
        let mut file = Self {
            metadata: Vec::new(),
            tensors: Vec::new(),
        };
        file.set("general.architecture", "phi3");
        for (key, value) in [
            ("context_length", 64u32),
            ("embedding_length", 32),
            ("feed_forward_length", 64),
            ("block_count", 1),
            ("attention.head_count", 2),
            ("attention.head_count_kv", 1),
        ] {
            file.set(&format!("phi3.{key}"), value);
        }
        file.set("phi3.attention.layer_norm_rms_epsilon", 1e-5f32);
        file.set("phi3.rope.freq_base", 10000f32);
        file.set_sentencepiece();
        file.set("tokenizer.chat_template", TEMPLATE);
        for (name, shape, block_type) in [
            ("token_embd.weight", vec![17, 32], BlockType::F32),
            ("blk.0.attn_norm.weight", vec![32], BlockType::F32),
            ("blk.0.attn_qkv.weight", vec![64, 32], BlockType::Q8_0),
            ("blk.0.attn_output.weight", vec![32, 32], BlockType::Q8_0),
            ("blk.0.ffn_norm.weight", vec![32], BlockType::F32),
            ("blk.0.ffn_up.weight", vec![128, 32], BlockType::Q8_0),
            ("blk.0.ffn_down.weight", vec![32, 64], BlockType::Q8_0),
            ("output_norm.weight", vec![32], BlockType::F32),
            ("output.weight", vec![17, 32], BlockType::F16),
        ] {
            file.tensors.push(tensor(name, shape, block_type));
        }
        file
    }

    /// The tokenizer model `llama`, whose merges follow from scores.
    pub fn set_sentencepiece(&mut self) {
        let kinds = TOKENS.map(|token| match token {
            "<unk>" => 2,
            "<0x0A>" => 6,
            token if SPECIAL.contains(&token) => 3,
            _ => 1,
        });
        self.set("tokenizer.ggml.model", "llama");
        self.set("tokenizer.ggml.tokens", texts(TOKENS));
        let scores = (0..TOKENS.len()).map(|id| -(id as f32)).collect();
        self.set("tokenizer.ggml.scores", Array::F32(scores));
        self.set("tokenizer.ggml.token_type", Array::I32(kinds.to_vec()));
        self.set("tokenizer.ggml.bos_token_id", 1u32);
        self.set("tokenizer.ggml.eos_token_id", 16u32);
    }

    /// The tokenizer model `gpt2`, with merges and a rule of splitting.
    pub fn set_byte_level(&mut self) {
        let tokens = TOKENS.map(|token| token.replace('▁', "Ġ"));
        let merges: Vec<String> = MERGES
            .iter()
            .map(|(left, right)| format!("{left} {right}").replace('▁', "Ġ"))
            .collect();
        self.set("tokenizer.ggml.model", "gpt2");
        self.set("tokenizer.ggml.pre", "gpt-2");
        self.set("tokenizer.ggml.tokens", texts(tokens));
        self.set("tokenizer.ggml.merges", texts(merges));
    }

    /// Sets a metadata value.
    pub fn set(&mut self, key: &str, value: impl Into<Metadata>) {
        let value = value.into();
        match self.metadata.iter_mut().find(|(known, _)| known == key) {
            Some((_, old)) => *old = value,
            None => self.metadata.push((key.to_owned(), value)),
        }
    }

    /// Removes a metadata value.
    pub fn unset(&mut self, key: &str) {
        self.metadata.retain(|(known, _)| known != key);
    }

    /// The tensor of that name.
    ///
    /// # Errors
    /// If there is none.
    pub fn tensor(&mut self, name: &str) -> Result<&mut GgufTensor> {
        let mut tensors = self.tensors.iter_mut();
        tensors
            .find(|tensor| tensor.name == name)
            .with_context(|| format!("no tensor {name}"))
    }

    /// The file.
    ///
    /// # Errors
    /// If the writer refuses what it is.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut writer = Writer::new();
        for (key, value) in &self.metadata {
            writer.set(key.clone(), value.clone());
        }
        for tensor in &self.tensors {
            writer.add_tensor(tensor.name.clone(), &tensor.shape, tensor.tensor_type)?;
        }
        let mut tensors = self.tensors.iter();
        Ok(writer.to_vec::<gguf::Error>(|_, sink| {
            sink.write(tensors.next().map_or(&[], |tensor| &tensor.bytes))
        })?)
    }
}

/// A metadata array of texts.
pub fn texts<T: AsRef<str>>(texts: impl IntoIterator<Item = T>) -> Array {
    Array::String(texts.into_iter().map(|t| t.as_ref().into()).collect())
}

/// A tensor of small numbers: norms are 1, others lie within ±0.64.
fn tensor(name: &str, shape: Vec<usize>, block_type: BlockType) -> GgufTensor {
    let is_norm = shape.len() == 1;
    // Steps of a large odd number visit the bytes in a mixed order.
    let bytes = (0..shape.iter().product::<usize>()).map(move |i| {
        if is_norm {
            100
        } else {
            (i * 97 % 129) as i8 ^ 0x40
        }
    });
    let value = |byte: i8| f32::from(byte) / 100.0;
    let bytes: Vec<u8> = match block_type {
        BlockType::F32 => bytes.flat_map(|b| value(b).to_le_bytes()).collect(),
        BlockType::F16 => bytes
            .flat_map(|b| f16::from_f32(value(b)).to_le_bytes())
            .collect(),
        _ => {
            // Q8_0: per 32 weights a scale and the weights.
            let bytes: Vec<u8> = bytes.map(|b| b as u8).collect();
            let scale = f16::from_f32(0.01).to_le_bytes();
            let blocks = bytes.chunks(32);
            blocks.flat_map(|block| [&scale, block].concat()).collect()
        }
    };
    GgufTensor {
        name: name.to_owned(),
        shape,
        tensor_type: block_type.into(),
        bytes,
    }
}
