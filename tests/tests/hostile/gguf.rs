//! Damaged GGUF files: metadata and tensors that do not fit each other, and headers that lie.

use anyhow::{Context, Result};
use phi3::SamplingParams;
use phi3::hub::gguf::{Array, TensorType};
use phi3_kernels::BlockType;
use phi3_tests::hostile::{Gguf, texts};

use crate::{Attempt, CHAT, COMPLETE, LOAD, ask, complete, refused};

/// A changed file: what is changed, how, and what the error says.
type Change = (
    &'static str,
    fn(&mut Gguf) -> Result<()>,
    &'static [&'static str],
);

/// As [`Change`], of the bytes of a good file.
type Patch = (
    &'static str,
    fn(&mut Vec<u8>) -> Result<()>,
    &'static [&'static str],
);

const HEADERS: &[Patch] = &[
    (
        "an empty file",
        |bytes| {
            bytes.clear();
            Ok(())
        },
        &["GGUF", "begins with"],
    ),
    (
        "another magic number",
        |bytes| put(bytes, 0, b"GGML"),
        &["not a GGUF file", "47, 47, 4d, 4c"],
    ),
    (
        "version 1",
        |bytes| put(bytes, 4, &[1]),
        &["version 1", "2 and 3"],
    ),
    (
        "version 99",
        |bytes| put(bytes, 4, &[99]),
        &["version 99", "2 and 3"],
    ),
    (
        "a big-endian file",
        |bytes| put(bytes, 4, &[0, 0, 0, 3]),
        &["big-endian", "convert"],
    ),
    (
        "2^63 tensors",
        |bytes| put(bytes, 8, &(1u64 << 63).to_le_bytes()),
        &["9223372036854775808", "tensors"],
    ),
    (
        "2^64 - 1 metadata entries",
        |bytes| put(bytes, 16, &u64::MAX.to_le_bytes()),
        &["18446744073709551615", "metadata"],
    ),
    (
        "a key of 2^63 bytes",
        |bytes| put(bytes, 24, &(1u64 << 63).to_le_bytes()),
        &["metadata key", "9223372036854775808"],
    ),
    (
        "an array of 2^60 texts",
        |bytes| {
            let at = behind(bytes, b"tokenizer.ggml.tokens")? + 8;
            put(bytes, at, &(1u64 << 60).to_le_bytes())
        },
        &["tokenizer.ggml.tokens", "1152921504606846976"],
    ),
    (
        "an array of 2^62 floats",
        |bytes| {
            let at = behind(bytes, b"tokenizer.ggml.scores")? + 8;
            put(bytes, at, &(1u64 << 62).to_le_bytes())
        },
        &["tokenizer.ggml.scores", "4611686018427387904"],
    ),
    (
        "alignment 0",
        |bytes| {
            let at = behind(bytes, b"general.alignment")? + 4;
            put(bytes, at, &0u32.to_le_bytes())
        },
        &["general.alignment is 0", "power of two"],
    ),
    (
        "alignment 2^31",
        |bytes| {
            let at = behind(bytes, b"general.alignment")? + 4;
            put(bytes, at, &(1u32 << 31).to_le_bytes())
        },
        &["general.alignment is 2147483648", "1048576"],
    ),
    (
        "a value of an unknown type",
        |bytes| {
            let at = behind(bytes, b"general.architecture")?;
            put(bytes, at, &77u32.to_le_bytes())
        },
        &["general.architecture", "77"],
    ),
    (
        "a key that is not UTF-8",
        |bytes| put(bytes, 32, &[0xff]),
        &["metadata key", "UTF-8"],
    ),
    (
        "a tensor of 2^32 - 1 axes",
        |bytes| {
            let at = behind(bytes, b"token_embd.weight")?;
            put(bytes, at, &u32::MAX.to_le_bytes())
        },
        &["token_embd.weight", "4294967295 axes"],
    ),
    (
        "a tensor of 2^124 weights",
        |bytes| {
            let at = behind(bytes, b"token_embd.weight")? + 4;
            put(bytes, at, &[(1u64 << 62).to_le_bytes(); 2].concat())
        },
        &["token_embd.weight", "4611686018427387904"],
    ),
    (
        "a tensor outside the file",
        |bytes| {
            let at = behind(bytes, b"token_embd.weight")? + 4 + 16 + 4;
            put(bytes, at, &(1u64 << 40).to_le_bytes())
        },
        &["token_embd.weight", "file ends at"],
    ),
    (
        "two tensors in the same bytes",
        |bytes| {
            let at = behind(bytes, b"output.weight")? + 4 + 16 + 4;
            put(bytes, at, &0u64.to_le_bytes())
        },
        &["token_embd.weight", "output.weight", "overlap"],
    ),
];

fn put(bytes: &mut [u8], at: usize, new: &[u8]) -> Result<()> {
    let place = bytes.get_mut(at..at + new.len());
    place.context("inside the file")?.copy_from_slice(new);
    Ok(())
}

/// The place behind a key or tensor name.
fn behind(bytes: &[u8], name: &[u8]) -> Result<usize> {
    let start = bytes.windows(name.len()).position(|part| part == name);
    Ok(start.context("the name is in the file")? + name.len())
}

fn check(bytes: &[u8], name: &str, attempt: Attempt, says: &[&str]) -> Option<String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    refused(name, &path, attempt, says)
}

#[test]
fn headers_that_lie() {
    let mut good = Gguf::good();
    good.set("general.alignment", 32u32);
    let good = good.to_bytes().unwrap();
    let failures: Vec<String> = HEADERS
        .iter()
        .filter_map(|(name, patch, says)| {
            let mut bytes = good.clone();
            patch(&mut bytes).unwrap();
            check(&bytes, name, LOAD, &[&["model.gguf"], *says].concat())
        })
        .collect();
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}

#[test]
fn a_file_that_is_cut_anywhere() {
    let good = Gguf::good().to_bytes().unwrap();
    let cuts = (1..8)
        .chain((8..good.len()).step_by(211))
        .chain([good.len() - 32]);
    let failures: Vec<String> = cuts
        .filter_map(|len| check(&good[..len], &format!("{len} bytes"), LOAD, &["file"]))
        .collect();
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}

const CHANGES: &[Change] = &[
    (
        "another architecture",
        |file| set(file, "general.architecture", "mamba"),
        &["architecture \"mamba\"", "phi3"],
    ),
    (
        "no architecture",
        |file| unset(file, "general.architecture"),
        &["general.architecture", "missing"],
    ),
    (
        "no layers named",
        |file| unset(file, "phi3.block_count"),
        &["phi3.block_count", "missing"],
    ),
    (
        "two billion layers",
        |file| set(file, "phi3.block_count", 1u32 << 31),
        &["2147483648"],
    ),
    (
        "two layers, of which one is there",
        |file| set(file, "phi3.block_count", 2u32),
        &["model.layers.1.", "missing"],
    ),
    (
        "a tensor beyond the layers",
        |file| {
            file.tensor("blk.0.ffn_down.weight")?.name = "blk.7.ffn_down.weight".to_owned();
            Ok(())
        },
        &["blk.7.ffn_down.weight", "block_count"],
    ),
    (
        "a size that is text",
        |file| set(file, "phi3.embedding_length", "32"),
        &["phi3.embedding_length", "32", "number"],
    ),
    (
        "a negative size",
        |file| set(file, "phi3.feed_forward_length", -64i32),
        &["phi3.feed_forward_length", "-64"],
    ),
    (
        "an embedding of 2^31",
        |file| set(file, "phi3.embedding_length", 1u32 << 31),
        &["blk.0.attn_qkv.weight", "[64, 32]", "4294967296 rows"],
    ),
    (
        "heads that do not divide",
        |file| set(file, "phi3.attention.head_count_kv", 3u32),
        &[
            "phi3.attention.head_count_kv",
            "3",
            "divisor of the 2 heads",
        ],
    ),
    (
        "an epsilon that is no number",
        |file| set(file, "phi3.attention.layer_norm_rms_epsilon", f32::NAN),
        &["layer_norm_rms_epsilon", "NaN"],
    ),
    (
        "scaling that Phi-3 does not have",
        |file| set(file, "phi3.rope.scaling.type", "yarn"),
        &["phi3.rope.scaling.type", "yarn", "longrope"],
    ),
    (
        "long factors without short ones",
        |file| factors(file, &["rope_factors_long.weight"], &[1.0; 8]),
        &["rope_factors_short.weight", "missing"],
    ),
    (
        "rope factors of NaN",
        |file| {
            let names = ["rope_factors_long.weight", "rope_factors_short.weight"];
            factors(file, &names, &[f32::NAN; 8])
        },
        &["rope_factors_", "NaN", "positive"],
    ),
    (
        "too few rope factors",
        |file| {
            let names = ["rope_factors_long.weight", "rope_factors_short.weight"];
            factors(file, &names, &[1.0; 5])
        },
        &["rope_factors_", "[5]", "[8]"],
    ),
    (
        "a matrix of another shape",
        |file| {
            file.tensor("blk.0.attn_qkv.weight")?.shape = vec![32, 64];
            Ok(())
        },
        &["blk.0.attn_qkv.weight", "[32, 64]", "64 rows"],
    ),
    (
        "a matrix of other columns",
        |file| {
            file.tensor("blk.0.attn_output.weight")?.shape = vec![16, 64];
            Ok(())
        },
        &["o_proj.weight", "[16, 64]", "[32, 32]"],
    ),
    (
        "a missing tensor",
        |file| {
            file.tensors
                .retain(|tensor| tensor.name != "output_norm.weight");
            Ok(())
        },
        &["model.norm.weight", "missing"],
    ),
    (
        "a tensor of a type that no kernel decodes",
        |file| {
            let tensor = file.tensor("blk.0.ffn_down.weight")?;
            tensor.tensor_type = TensorType(26);
            tensor.bytes = vec![0; 32 * 64 * 4];
            Ok(())
        },
        &["model.gguf", "blk.0.ffn_down.weight", "I32", "Q4_K"],
    ),
    (
        "biases",
        |file| {
            let bytes = [0; 64 * 4].to_vec();
            add(file, "blk.0.attn_qkv.bias", vec![64], bytes)
        },
        &["blk.0.attn_qkv.bias", "no biases"],
    ),
    (
        "one file of several",
        |file| set(file, "split.count", 3u16),
        &["3 GGUF files", "join"],
    ),
    (
        "no vocabulary",
        |file| unset(file, "tokenizer.ggml.tokens"),
        &["tokenizer.ggml.tokens", "missing"],
    ),
    (
        "an empty vocabulary",
        |file| set(file, "tokenizer.ggml.tokens", Array::String(Vec::new())),
        &["tokenizer.ggml.tokens", "empty"],
    ),
    (
        "a vocabulary of numbers",
        |file| set(file, "tokenizer.ggml.tokens", Array::U32(vec![1, 2, 3])),
        &["tokenizer.ggml.tokens", "array of u32", "texts"],
    ),
    (
        "more tokens than embeddings",
        |file| {
            let tokens: Vec<String> = (0..99).map(|i| format!("t{i}")).collect();
            set(file, "tokenizer.ggml.tokens", texts(tokens))
        },
        &["99 tokens", "17", "token_embd.weight"],
    ),
    (
        "two tokens of one text",
        |file| set(file, "tokenizer.ggml.tokens", texts(["hi"; 17])),
        &["tokens 0 and 1", "hi"],
    ),
    (
        "fewer scores than tokens",
        |file| set(file, "tokenizer.ggml.scores", Array::F32(vec![0.0; 3])),
        &["tokenizer.ggml.scores", "3 entries for 17 tokens"],
    ),
    (
        "no scores",
        |file| unset(file, "tokenizer.ggml.scores"),
        &["tokenizer.ggml.scores", "missing"],
    ),
    (
        "an unknown tokenizer model",
        |file| set(file, "tokenizer.ggml.model", "rwkv"),
        &["tokenizer.ggml.model", "rwkv", "gpt2"],
    ),
    (
        "an unknown pre-tokenizer",
        |file| {
            file.set_byte_level();
            set(file, "tokenizer.ggml.pre", "klingon")
        },
        &["tokenizer.ggml.pre", "klingon", "gpt-2"],
    ),
    (
        "no merges",
        |file| {
            file.set_byte_level();
            unset(file, "tokenizer.ggml.merges")
        },
        &["tokenizer.ggml.merges", "missing"],
    ),
    (
        "a merge that makes no token",
        |file| {
            file.set_byte_level();
            set(file, "tokenizer.ggml.merges", texts(["h i", "o o"]))
        },
        &["merge 1", "oo"],
    ),
    (
        "a BOS id that is text",
        |file| set(file, "tokenizer.ggml.bos_token_id", "<s>"),
        &["tokenizer.ggml.bos_token_id", "<s>"],
    ),
    (
        "a BOS id behind the vocabulary",
        |file| set(file, "tokenizer.ggml.bos_token_id", 4_000_000_000u32),
        &["bos_token_id", "no token"],
    ),
    (
        "a chat template that is a number",
        |file| set(file, "tokenizer.chat_template", 7u32),
        &["tokenizer.chat_template", "UTF-8 text"],
    ),
];

fn set(file: &mut Gguf, key: &str, value: impl Into<phi3::hub::gguf::Value>) -> Result<()> {
    file.set(key, value);
    Ok(())
}

fn unset(file: &mut Gguf, key: &str) -> Result<()> {
    file.unset(key);
    Ok(())
}

fn add(file: &mut Gguf, name: &str, shape: Vec<usize>, bytes: Vec<u8>) -> Result<()> {
    file.tensors.push(phi3_tests::hostile::GgufTensor {
        name: name.to_owned(),
        shape,
        tensor_type: BlockType::F32.into(),
        bytes,
    });
    Ok(())
}

fn factors(file: &mut Gguf, names: &[&str], values: &[f32]) -> Result<()> {
    file.set("phi3.rope.scaling.original_context_length", 32u32);
    for name in names {
        let bytes = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        add(file, name, vec![values.len()], bytes)?;
    }
    Ok(())
}

#[test]
fn metadata_and_tensors_that_do_not_fit() {
    let failures: Vec<String> = CHANGES
        .iter()
        .filter_map(|(name, change, says)| {
            let mut file = Gguf::good();
            change(&mut file).unwrap();
            check(&file.to_bytes().unwrap(), name, LOAD, says)
        })
        .collect();
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}

/// What is tried with an undamaged file, or one whose numbers are not, and what the error says.
type Run = (
    &'static str,
    fn(&mut Gguf) -> Result<()>,
    Attempt,
    &'static [&'static str],
);

const RUNS: &[Run] = &[
    (
        "weights that are NaN",
        |file| {
            file.tensor("token_embd.weight")?.bytes = f32::NAN.to_le_bytes().repeat(17 * 32);
            Ok(())
        },
        COMPLETE,
        &["logit of token 0 is NaN", "weights are damaged"],
    ),
    (
        "infinite scales of blocks",
        |file| {
            // The largest exponent of f16 with an empty mantissa: infinity.
            for block in file.tensor("blk.0.ffn_down.weight")?.bytes.chunks_mut(34) {
                block[..2].copy_from_slice(&[0x00, 0x7c]);
            }
            Ok(())
        },
        CHAT,
        &["logit of token 0 is NaN", "weights are damaged"],
    ),
    (
        "a prompt longer than the context",
        |_| Ok(()),
        |model| complete(model, &"h".repeat(70), SamplingParams::greedy()),
        &["tokens", "context of 64"],
    ),
    (
        "a question longer than the context",
        |_| Ok(()),
        |model| ask(model, &"o".repeat(70)),
        &["tokens", "context of 64"],
    ),
    (
        "an empty prompt",
        |file| set(file, "tokenizer.ggml.add_bos_token", false),
        |model| complete(model, "", SamplingParams::greedy()),
        &["prompt has no token"],
    ),
    (
        "a chat with a file that has no template",
        |file| unset(file, "tokenizer.chat_template"),
        CHAT,
        &["model.gguf", "no chat template"],
    ),
    (
        "a text for a file that has no tokenizer",
        |file| {
            unset(file, "tokenizer.chat_template")?;
            unset(file, "tokenizer.ggml.model")
        },
        COMPLETE,
        &["model.gguf", "no tokenizer"],
    ),
];

#[test]
fn files_that_load_and_cannot_run() {
    let failures: Vec<String> = RUNS
        .iter()
        .filter_map(|(name, change, attempt, says)| {
            let mut file = Gguf::good();
            change(&mut file).unwrap();
            check(&file.to_bytes().unwrap(), name, *attempt, says)
        })
        .collect();
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}
