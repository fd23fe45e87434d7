use std::path::PathBuf;
use std::sync::Arc;

use phi3_kernels::{BlockType, testing::Random};
use phi3_nn::StoredTensor;
use phi3_nn::weights::MemorySource;
use serde_json::json;

use super::*;
use crate::TokenizerFiles;

const HIDDEN: usize = 256;
const INTERMEDIATE: usize = 256;
const HEAD_DIM: usize = 16;
/// Rows of q, k and v together: four query heads, two key/value heads.
const QKV: usize = 8 * HEAD_DIM;
const VOCAB: usize = 64;

fn f32_tensor(shape: &[usize], values: &[f32]) -> StoredTensor {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    StoredTensor::new(shape.to_vec(), BlockType::F32, bytes.into()).unwrap()
}

/// A model of random f32 weights; `change` may spoil it.
fn checkpoint(change: impl FnOnce(&mut MemorySource, &mut Json)) -> Checkpoint {
    let mut random = Random(1);
    let mut source = MemorySource::new();
    let mut add = |name: &str, shape: &[usize]| {
        let values = random.units(shape.iter().product());
        source.insert(name, f32_tensor(shape, &values));
    };
    add("model.embed_tokens.weight", &[VOCAB, HIDDEN]);
    add("lm_head.weight", &[VOCAB, HIDDEN]);
    add("model.norm.weight", &[HIDDEN]);
    for layer in 0..2 {
        for (name, shape) in [
            ("input_layernorm", &[HIDDEN][..]),
            ("post_attention_layernorm", &[HIDDEN]),
            ("self_attn.qkv_proj", &[QKV, HIDDEN]),
            ("self_attn.o_proj", &[HIDDEN, QKV / 2]),
            ("mlp.gate_up_proj", &[2 * INTERMEDIATE, HIDDEN]),
            ("mlp.down_proj", &[HIDDEN, INTERMEDIATE]),
        ] {
            add(&format!("model.layers.{layer}.{name}.weight"), shape);
        }
    }
    let mut config = json!({
        "model_type": "phi3", "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB, "max_position_embeddings": 128, "tie_word_embeddings": false,
    });
    change(&mut source, &mut config);
    Checkpoint {
        config,
        generation_config: None,
        preprocessor_config: None,
        tokenizer: TokenizerFiles::default(),
        chat_template: None,
        weights: Arc::new(source),
        tensors: Vec::new(),
        origin: "test".to_owned(),
    }
}

fn write(checkpoint: &Checkpoint, mix: &str, path: &Path, force: bool) -> Result<Summary> {
    let options = Options {
        force,
        ..Options::default()
    };
    write_gguf(
        checkpoint,
        mix.parse().unwrap(),
        path,
        &options,
        &mut |_, _, _| ControlFlow::Continue(()),
    )
}

#[test]
fn a_file_holds_what_loading_gives() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(|_, _| {});
    for mix in ["F16", "Q8_0", "Q4_0", "Q4_K_M", "Q3_K_M", "INT4"] {
        let mix: Mix = mix.parse().unwrap();
        let path = folder.path().join(format!("{mix}.gguf"));
        let mut steps = Vec::new();
        let summary = write_gguf(
            &checkpoint,
            mix,
            &path,
            &Options::default(),
            &mut |tensor, done, total| {
                steps.push((tensor.name.clone(), done, total));
                ControlFlow::Continue(())
            },
        )
        .unwrap();
        assert_eq!((summary.tensors, steps.len()), (15, 15));
        assert!(steps.is_sorted_by_key(|(_, done, _)| *done));
        assert!(
            steps
                .iter()
                .all(|(_, done, total)| done < total && *total == summary.bytes)
        );
        let file = crate::gguf::open(&path).unwrap();
        let loading = QuantizedSource::new(&checkpoint, mix, None).unwrap();
        assert_eq!(loading.names(), file.weights.names());
        for name in loading.names() {
            let (a, b) = (
                loading.tensor(&name).unwrap(),
                file.weights.tensor(&name).unwrap(),
            );
            let (a, b) = (a.unwrap(), b.unwrap());
            assert_eq!(a.shape(), b.shape(), "{mix} {name}");
            assert_eq!(a.parts().len(), b.parts().len());
            for (a, b) in a.parts().iter().zip(b.parts()) {
                assert_eq!(a.block_type, b.block_type, "{mix} {name}");
                assert!(*a.bytes == *b.bytes, "{mix} {name}");
            }
        }
        for norm in ["model.norm.weight", "model.layers.1.input_layernorm.weight"] {
            let stored = file.weights.tensor(norm).unwrap().unwrap();
            assert_eq!(stored.parts()[0].block_type, BlockType::F32);
        }
        let id = file_value(&path, "general.file_type");
        assert_eq!(id, Some(u64::from(mix.file_type())));
    }
}

/// Every matrix is INT4, the head too, and the file says so; without the version of the layout, or
/// with another, no weight is read.
#[test]
fn a_private_type_is_described_in_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("int4.gguf");
    write(&checkpoint(|_, _| {}), "int4", &path, false).unwrap();
    assert_eq!(file_value(&path, "phi3.int4.version"), Some(1));
    assert_eq!(file_value(&path, "phi3.int4.block_length"), Some(256));
    assert_eq!(file_value(&path, "phi3.int4.block_bytes"), Some(130));
    let file = crate::gguf::GgufFile::open(&path).unwrap();
    let matrices = file.tensors().into_iter().filter(|t| t.shape.len() == 2);
    for tensor in matrices {
        // o_proj reads 64 columns here, no whole block.
        let expected = if tensor.shape[1] == HIDDEN {
            "INT4"
        } else {
            "Q4_0"
        };
        assert_eq!(tensor.type_name, expected, "{}", tensor.name);
    }
    let stored = std::fs::read(&path).unwrap();
    let key = b"phi3.int4.version";
    let at = stored.windows(key.len()).position(|w| w == key).unwrap();
    let read = |change: fn(&mut [u8])| {
        let mut bytes = stored.clone();
        change(&mut bytes[at..]);
        std::fs::write(&path, bytes).unwrap();
        let source = crate::gguf::open(&path).unwrap().weights;
        source
            .tensor("lm_head.weight")
            .map_err(|e| format!("{:?}", e.source().unwrap().to_string()))
    };
    assert!(read(|_| ()).is_ok());
    let error = read(|bytes| bytes[0] = b'x').unwrap_err();
    assert!(error.contains("phi3.int4.version"), "{error}");
    // The value follows the key and the type of the value.
    let error = read(|bytes| bytes[17 + 4] = 2).unwrap_err();
    assert!(
        error.contains("2") && error.contains("expected 1"),
        "{error}"
    );
}

fn file_value(path: &Path, key: &str) -> Option<u64> {
    let file = crate::gguf::GgufFile::open(path).unwrap();
    file.container().get(key)?.as_u64()
}

#[test]
fn a_quantized_file_of_that_type_is_copied() {
    let folder = tempfile::tempdir().unwrap();
    let [first, second] = ["a.gguf", "b.gguf"].map(|name| folder.path().join(name));
    write(&checkpoint(|_, _| {}), "Q4_K_M", &first, false).unwrap();
    let opened = crate::gguf::open(&first).unwrap();
    write(&opened, "Q4_K_M", &second, false).unwrap();
    let read = |path: &PathBuf| crate::gguf::open(path).unwrap().weights;
    let (a, b) = (read(&first), read(&second));
    for name in a.names() {
        let bytes = |source: &Arc<dyn TensorSource>| {
            source.tensor(&name).unwrap().unwrap().parts()[0]
                .bytes
                .to_vec()
        };
        assert!(bytes(&a) == bytes(&b), "{name}");
    }
    let error = write(&opened, "Q4_0", &first, true)
        .unwrap_err()
        .to_string();
    assert!(error.contains("is being read"), "{error}");
}

/// Queries, keys and values that lie apart in the source become one tensor.
#[test]
fn parts_are_joined() {
    let [a, b] = [0.25f32, 0.5].map(|v| f32_tensor(&[QKV / 2, HIDDEN], &[v; QKV / 2 * HIDDEN]));
    let joined = StoredTensor::stacked(
        vec![QKV, HIDDEN],
        vec![a.parts()[0].clone(), b.parts()[0].clone()],
    )
    .unwrap();
    let checkpoint = checkpoint(|source, _| {
        source.insert("model.layers.1.self_attn.qkv_proj.weight", joined);
    });
    let source = QuantizedSource::new(&checkpoint, "q8_0".parse().unwrap(), None).unwrap();
    let tensor = source
        .tensor("model.layers.1.self_attn.qkv_proj.weight")
        .unwrap()
        .unwrap();
    let values = tensor.to_f32().unwrap();
    let near = |value: f32, expected: f32| (value - expected).abs() < 1e-3;
    assert!(near(values[0], 0.25) && near(values[QKV * HIDDEN - 1], 0.5));
    assert_eq!(tensor.parts().len(), 1);
}

#[test]
fn weights_that_do_not_fit_name_their_place() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.gguf");
    let name = "model.layers.1.mlp.down_proj.weight";
    for (value, mix, fits) in [
        (f32::NAN, "Q4_0", false),
        (f32::NAN, "F32", false),
        (f32::INFINITY, "BF16", false),
        (1e5, "F16", false),
        (1e5, "Q4_K_M", false),
        (1e5, "BF16", true),
        (65504.0, "Q4_K_M", true),
    ] {
        let checkpoint = checkpoint(|source, _| {
            let mut values = vec![0.5; HIDDEN * INTERMEDIATE];
            values[3 * INTERMEDIATE + 7] = value;
            source.insert(name, f32_tensor(&[HIDDEN, INTERMEDIATE], &values));
        });
        let written = write(&checkpoint, mix, &path, true);
        assert_eq!(written.is_ok(), fits, "{value} {mix}");
        if let Err(error) = written {
            let error = error.to_string();
            assert!(
                error.contains(name) && error.contains("row 3, column 7"),
                "{error}"
            );
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        } else {
            std::fs::remove_file(&path).unwrap();
        }
    }
}

#[test]
fn an_existing_file_is_replaced_only_by_force() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.gguf");
    std::fs::write(&path, "precious").unwrap();
    let checkpoint = checkpoint(|_, _| {});
    let error = write(&checkpoint, "Q4_0", &path, false)
        .unwrap_err()
        .to_string();
    assert!(error.contains("--force"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    write(&checkpoint, "Q4_0", &path, true).unwrap();
    assert!(crate::gguf::open(&path).is_ok());
}

#[test]
fn an_interrupted_file_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.gguf");
    let (mix, options) = ("Q4_0".parse().unwrap(), Options::default());
    let mut stop = |_: &PlannedTensor, done, _| match done {
        0 => ControlFlow::Continue(()),
        _ => ControlFlow::Break(()),
    };
    let written = write_gguf(&checkpoint(|_, _| {}), mix, &path, &options, &mut stop);
    assert!(matches!(written, Err(Error::Interrupted)));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn models_without_a_place_are_refused() {
    let path = Path::new("never-written.gguf");
    let error = |change: fn(&mut MemorySource, &mut Json)| {
        write(&checkpoint(change), "Q4_0", path, false)
            .unwrap_err()
            .to_string()
    };
    let message = error(|_, config| config["model_type"] = json!("gpt2"));
    assert!(message.contains("gpt2"), "{message}");
    let message = error(|_, config| config["model_type"] = json!("phi3_v"));
    assert!(message.contains("--quantize"), "{message}");
    let message = error(|_, config| config["num_hidden_layers"] = json!(3));
    assert!(
        message.contains("model.layers.2.input_layernorm"),
        "{message}"
    );
    let message =
        error(|source, _| source.insert("model.layers.0.x.bias", f32_tensor(&[1], &[0.0])));
    assert!(message.contains("model.layers.0.x.bias"), "{message}");
    let message = error(|_, config| config["hidden_size"] = json!("x"));
    assert!(message.contains("config.json"), "{message}");
    assert!(!path.exists());
}

#[test]
fn tied_heads_are_not_written() {
    let checkpoint = checkpoint(|_, config| config["tie_word_embeddings"] = json!(true));
    let source = QuantizedSource::new(&checkpoint, "Q4_0".parse().unwrap(), None).unwrap();
    assert!(source.tensor("lm_head.weight").unwrap().is_none());
    let embedding = source.tensor("model.embed_tokens.weight").unwrap().unwrap();
    assert_eq!(embedding.parts()[0].block_type, BlockType::Q6K);
}

#[test]
fn importance_changes_its_layer_only() {
    let checkpoint = checkpoint(|_, _| {});
    let layer = "model.layers.0.mlp.gate_up_proj";
    let mut importance = Importance::new();
    importance.insert(layer, (0..HIDDEN).map(|c| 1.0 + (c % 7) as f32).collect());
    let mix: Mix = "Q4_K_S".parse().unwrap();
    let plain = QuantizedSource::new(&checkpoint, mix, None).unwrap();
    let weighted = QuantizedSource::new(&checkpoint, mix, Some(importance.clone())).unwrap();
    for name in plain.names() {
        let bytes = |source: &QuantizedSource| {
            source.tensor(&name).unwrap().unwrap().parts()[0]
                .bytes
                .to_vec()
        };
        let same = bytes(&plain) == bytes(&weighted);
        assert_eq!(same, name != format!("{layer}.weight"), "{name}");
    }
    for columns in [3, HIDDEN + 1] {
        importance.insert(layer, vec![1.0; columns]);
        let error = QuantizedSource::new(&checkpoint, mix, Some(importance.clone()))
            .err()
            .unwrap();
        let expected = format!("importance of {columns} columns");
        assert!(error.to_string().contains(&expected), "{error}");
    }
}
