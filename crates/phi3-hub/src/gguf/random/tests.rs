use super::*;
use phi3_kernels::dequantize;

/// Weights of every type are centered, as wide as they should be, and finite.
#[test]
fn weights_of_every_type_have_one_distribution() {
    let mut seen = Vec::new();
    for block_type in BlockType::ALL {
        let weights = 1 << 16;
        let mut bytes = vec![0; block_type.row_bytes(weights).unwrap()];
        blocks::fill(block_type, &mut Random::new(1, "a"), &mut bytes);
        let mut values = vec![f32::NAN; weights];
        dequantize(block_type, &bytes, &mut values).unwrap();
        let mean = values.iter().sum::<f32>() / weights as f32;
        let square = values.iter().map(|v| v * v).sum::<f32>() / weights as f32;
        let deviation = square.sqrt();
        assert!(mean.abs() < 5e-4, "{block_type}: mean {mean}");
        // Factors between 0.75 and 1.25 have a root mean square of 1.01.
        let expected = 0.95 * blocks::DEVIATION..1.07 * blocks::DEVIATION;
        assert!(expected.contains(&deviation), "{block_type}: {deviation}");
        let largest = values.iter().fold(0.0f32, |max, v| max.max(v.abs()));
        assert!(largest < 0.12, "{block_type}: {largest}");
        seen.push(bytes);
    }
    let mut other = vec![0; seen[3].len()];
    blocks::fill(BlockType::Q4_0, &mut Random::new(1, "b"), &mut other);
    assert_ne!(seen[3], other, "each tensor has weights of its own");
}

#[test]
fn a_file_of_every_type_is_read_again() {
    let folder = tempfile::tempdir().unwrap();
    for file_type in Mix::all() {
        let model = RandomModel::new("tiny", file_type, None, 7).unwrap();
        let path = folder.path().join(model.file_name());
        assert!(!model.is_at(&path));
        let mut last = 0;
        model.write(&path, |written| last = written).unwrap();
        assert_eq!(last, model.size());
        assert!(model.is_at(&path), "{}", model.description());
        let file = GgufFile::open(&path).unwrap();
        let config = file.config().unwrap();
        assert_eq!(config["num_hidden_layers"], 2);
        assert_eq!(config["vocab_size"], 512);
        assert_eq!(config["num_key_value_heads"], 2);
        let tokenizer = file.tokenizer().unwrap();
        assert!(tokenizer.tokenizer_json.is_some());
        let names = file.weights().unwrap().names();
        assert!(names.contains(&"model.layers.1.mlp.gate_up_proj.weight".to_owned()));
        // Made again, it is the same; with another seed or layer count it is not.
        let bytes = std::fs::read(&path).unwrap();
        model.write(&path, |_| ()).unwrap();
        assert!(bytes == std::fs::read(&path).unwrap(), "{file_type:?}");
        let other = RandomModel::new("tiny", file_type, None, 8).unwrap();
        let part = RandomModel::new("tiny", file_type, Some(1), 7).unwrap();
        assert!(!other.is_at(&path) && !part.is_at(&path));
    }
}

/// Bytes of the checkpoints, from their config.json and llama.cpp's mixes.
#[test]
fn real_shapes_have_their_sizes() {
    let size = |shape: &str, file_type: &str| {
        let model = RandomModel::new(shape, file_type.parse().unwrap(), None, 0).unwrap();
        model.size() as f64 / 1e9
    };
    for (shape, file_type, expected) in [
        ("phi-3-mini", "F16", 7.64),
        ("phi-3-mini", "Q4_0", 2.17),
        ("phi-3-mini", "q4_k_m", 2.39),
        ("phi-3-mini-4k", "Q8_0", 4.06),
        ("phi-3.5-mini", "BF16", 7.64),
        ("phi-3-medium", "f16", 27.92),
        ("phi-4-mini", "F16", 7.67),
        ("phi-3-small", "BF16", 14.78),
        ("phi-3.5-moe", "Q4_0", 23.60),
        ("phi-3.5-moe", "BF16", 83.75),
        // The report's 1.8 GB.
        ("phi-3-mini", "INT4", 1.94),
    ] {
        let found = size(shape, file_type);
        assert!(
            (found - expected).abs() < 0.01,
            "{shape} {file_type}: {found}"
        );
    }
}

#[test]
fn a_mixture_of_experts_is_made_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let model = RandomModel::new("tiny-moe", "Q4_K_M".parse().unwrap(), None, 7).unwrap();
    model.write(&path, |_| ()).unwrap();
    assert!(model.is_at(&path));
    let file = GgufFile::open(&path).unwrap();
    assert_eq!(file.architecture().unwrap(), "phimoe");
    let config = file.config().unwrap();
    assert_eq!(config["num_local_experts"], 8);
    assert_eq!(config["attention_bias"], true);
    let weights = file.weights().unwrap();
    let expert = "model.layers.1.block_sparse_moe.experts.7.w2.weight";
    assert_eq!(weights.tensor(expert).unwrap().unwrap().shape(), [256, 256]);
    let gate = weights.tensor("model.layers.0.block_sparse_moe.gate.weight");
    assert_eq!(gate.unwrap().unwrap().parts()[0].block_type, BlockType::F32);
}

#[test]
fn a_phi_3_small_is_made_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let model = RandomModel::new("tiny-small", "Q4_K_M".parse().unwrap(), None, 7).unwrap();
    model.write(&path, |_| ()).unwrap();
    assert!(model.is_at(&path));
    let file = GgufFile::open(&path).unwrap();
    assert_eq!(file.architecture().unwrap(), "phi3small");
    let config = file.config().unwrap();
    assert_eq!(config["model_type"], "phi3small");
    assert_eq!(config["blocksparse_num_local_blocks"], 16);
    assert_eq!(config["tie_word_embeddings"], true);
    let rope = &config["rope_scaling"];
    assert_eq!(rope["original_max_position_embeddings"], 2048);
    assert_eq!(rope["long_factor"].as_array().unwrap().len(), 32);
    let weights = file.weights().unwrap();
    let qkv = "model.layers.1.self_attn.query_key_value";
    for (name, shape) in [
        (format!("{qkv}.weight"), &[512, 256][..]),
        (format!("{qkv}.bias"), &[512]),
        ("model.final_layernorm.bias".to_owned(), &[256]),
    ] {
        assert_eq!(weights.tensor(&name).unwrap().unwrap().shape(), shape);
    }
    // Without the growth of the context there is no scaling.
    let model = RandomModel::new("phi-3-small-8k", model.mix(), Some(1), 0).unwrap();
    let mut metadata = model.writer.metadata().iter();
    assert!(metadata.all(|(key, _)| !key.contains("rope.scaling")));
}

#[test]
fn a_long_context_is_longrope() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let model = RandomModel::new("tiny", "Q8_0".parse().unwrap(), Some(1), 0).unwrap();
    model.write(&path, |_| ()).unwrap();
    let config = GgufFile::open(&path).unwrap().config().unwrap();
    assert_eq!(config["max_position_embeddings"], 8192);
    assert_eq!(config["original_max_position_embeddings"], 2048);
    assert_eq!(config["sliding_window"], serde_json::Value::Null);
    let long = config["rope_scaling"]["long_factor"].as_array().unwrap();
    assert_eq!(
        (long.len(), &long[0], &long[31]),
        (32, &1.0.into(), &4.0.into())
    );
    let factor = config["rope_scaling"]["attention_factor"].as_f64().unwrap();
    assert!((factor - (13.0f64 / 11.0).sqrt()).abs() < 1e-6, "{factor}");
    // Without the growth there are no factors, but a window.
    let model = RandomModel::new("phi-3-mini-4k", model.mix(), Some(1), 0).unwrap();
    assert!(
        model
            .writer
            .tensors()
            .iter()
            .all(|tensor| !tensor.name.contains("rope"))
    );
    let window = Value::U32(2047);
    let key = "phi3.attention.sliding_window";
    assert!(model.writer.metadata().contains(&(key.to_owned(), window)));
}

#[test]
fn what_does_not_exist_is_named() {
    let q4_0 = "Q4_0".parse().unwrap();
    let message = |shape: &str, layers| {
        let error = RandomModel::new(shape, q4_0, layers, 0).unwrap_err();
        error.to_string()
    };
    let shape = message("phi-2", None);
    assert!(
        shape.contains("phi-2") && shape.contains("phi-3-medium"),
        "{shape}"
    );
    for layers in [0, 33] {
        let text = message("phi-3-mini", Some(layers));
        assert!(text.contains("phi-3-mini has 32"), "{text}");
    }
}

#[test]
fn a_full_disk_is_said_before_anything_is_written() {
    let model = RandomModel::new("tiny", "F32".parse().unwrap(), None, 0).unwrap();
    let path = Path::new("m.gguf");
    let error = |free| model.check_room(path, free).map_err(|e| e.to_string());
    assert_eq!(error(None), Ok(()));
    assert_eq!(error(Some(u64::MAX)), Ok(()));
    let message = error(Some(model.size())).unwrap_err();
    assert!(
        message.contains("m.gguf needs 274 MB") && message.contains("5 MB are left"),
        "{message}"
    );
}
