use std::fs;

use super::*;
use crate::safetensors::{
    SafetensorsWriter, TensorData, TensorSpec, TensorToWrite, write_safetensors,
};

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn write(path: &Path, tensors: &[(&str, &[f32])]) {
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(name, values)| TensorToWrite {
            name,
            shape: std::slice::from_ref(Box::leak(Box::new(values.len()))),
            data: TensorData::F32(values),
        })
        .collect();
    write_safetensors(path, &tensors, &[]).unwrap();
}

fn values(source: &SafetensorsSource, name: &str) -> Vec<f32> {
    source.get(name).unwrap().unwrap().to_f32().unwrap()
}

fn index(folder: &Path, weight_map: &str) {
    fs::write(
        folder.join(INDEX),
        format!(r#"{{"metadata":{{}},"weight_map":{weight_map}}}"#),
    )
    .unwrap();
}

fn open_error(folder: &Path) -> String {
    SafetensorsSource::open(folder)
        .expect_err("must be refused")
        .to_string()
}

#[test]
fn one_file() {
    let folder = folder();
    write(
        &folder.path().join(SINGLE),
        &[("b", &[1.0, -2.0]), ("a", &[3.5])],
    );
    let source = SafetensorsSource::open(folder.path()).unwrap();
    assert_eq!(source.names(), ["a", "b"]);
    assert_eq!(values(&source, "b"), [1.0, -2.0]);
    assert!(source.get("c").unwrap().is_none());
    let entries = source.entries();
    assert_eq!(entries[0].name, "b");
    assert_eq!((entries[0].bytes, entries[0].dtype.as_str()), (8, "F32"));
    assert_eq!(entries[0].file, SINGLE);
    assert!(source.origin().ends_with(SINGLE));
}

#[test]
fn half_types_at_an_odd_address() {
    let folder = folder();
    let path = folder.path().join("x.safetensors");
    let header = r#"{"u":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"h":{"dtype":"F16","shape":[2],"data_offsets":[1,5]},"b":{"dtype":"BF16","shape":[1,1],"data_offsets":[5,7]},"s":{"dtype":"F32","shape":[],"data_offsets":[7,11]}}"#;
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.push(9);
    file.extend(half::f16::from_f32(1.5).to_le_bytes());
    file.extend(half::f16::from_f32(-0.25).to_le_bytes());
    file.extend(half::bf16::from_f32(2.0).to_le_bytes());
    file.extend(4.0f32.to_le_bytes());
    fs::write(&path, file).unwrap();
    let source = SafetensorsSource::open_file(&path).unwrap();
    assert_eq!(values(&source, "h"), [1.5, -0.25]);
    assert_eq!(values(&source, "b"), [2.0]);
    assert_eq!(values(&source, "s"), [4.0]);
    assert_eq!(source.get("b").unwrap().unwrap().shape(), [1, 1]);
}

#[test]
fn other_types_are_listed_and_refused_when_used() {
    let folder = folder();
    let path = folder.path().join(SINGLE);
    let tensors = [
        TensorToWrite {
            name: "ids",
            shape: &[2],
            data: TensorData::I64(&[1, 2]),
        },
        TensorToWrite {
            name: "w",
            shape: &[1],
            data: TensorData::F32(&[1.0]),
        },
    ];
    write_safetensors(&path, &tensors, &[]).unwrap();
    let source = SafetensorsSource::open(folder.path()).unwrap();
    assert_eq!(source.entries()[0].dtype, "I64");
    assert_eq!(values(&source, "w"), [1.0]);
    let error = TensorSource::tensor(&source, "ids")
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("ids") && error.contains("I64") && error.contains(SINGLE),
        "{error}"
    );
}

#[test]
fn shards_by_index() {
    let folder = folder();
    write(
        &folder.path().join("m-1.safetensors"),
        &[("a", &[1.0]), ("extra", &[9.0])],
    );
    write(&folder.path().join("m-2.safetensors"), &[("b", &[2.0])]);
    index(
        folder.path(),
        r#"{"b":"m-2.safetensors","a":"m-1.safetensors"}"#,
    );
    let source = SafetensorsSource::open(folder.path()).unwrap();
    assert_eq!(source.names(), ["a", "b"]);
    assert_eq!(values(&source, "a"), [1.0]);
    assert_eq!(values(&source, "b"), [2.0]);
    let files: Vec<_> = source
        .entries()
        .into_iter()
        .map(|entry| (entry.name, entry.file))
        .collect();
    let expected = [("a", "m-1.safetensors"), ("b", "m-2.safetensors")];
    assert_eq!(
        files,
        expected.map(|(name, file)| (name.to_owned(), file.to_owned()))
    );
}

#[test]
fn an_index_that_leaves_the_folder() {
    let outer = folder();
    let folder = outer.path().join("model");
    fs::create_dir(&folder).unwrap();
    let outside = outer.path().join("secret.safetensors");
    write(&outside, &[("a", &[1.0])]);
    for shard in [
        "../secret.safetensors",
        outside.to_str().unwrap(),
        "x/../../secret.safetensors",
        "",
    ] {
        index(&folder, &format!(r#"{{"a":{shard:?}}}"#));
        let error = SafetensorsSource::open(&folder).unwrap_err();
        assert!(
            matches!(error, Error::UnsafeName { .. }),
            "{shard}: {error}"
        );
        assert!(error.to_string().contains(INDEX), "{error}");
    }
}

#[test]
fn an_index_that_names_a_missing_file() {
    let folder = folder();
    index(folder.path(), r#"{"model.norm.weight":"m-1.safetensors"}"#);
    let error = open_error(folder.path());
    for part in [
        INDEX,
        "model.norm.weight",
        "m-1.safetensors",
        "does not exist",
    ] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn an_index_that_names_a_tensor_which_the_shard_lacks() {
    let folder = folder();
    write(&folder.path().join("m-1.safetensors"), &[("a", &[1.0])]);
    index(
        folder.path(),
        r#"{"a":"m-1.safetensors","b":"m-1.safetensors"}"#,
    );
    let error = open_error(folder.path());
    for part in [INDEX, "tensor b", "m-1.safetensors", "no such tensor"] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn an_index_of_another_form() {
    let folder = folder();
    for content in [
        "[]",
        "{}",
        r#"{"weight_map":[]}"#,
        r#"{"weight_map":{"a":1}}"#,
        "{",
    ] {
        fs::write(folder.path().join(INDEX), content).unwrap();
        assert!(open_error(folder.path()).contains(INDEX), "{content}");
    }
}

#[test]
fn a_single_file_wins_over_an_index() {
    let folder = folder();
    write(&folder.path().join(SINGLE), &[("a", &[1.0])]);
    index(folder.path(), r#"{"a":"gone.safetensors"}"#);
    assert!(SafetensorsSource::open(folder.path()).is_ok());
}

#[test]
fn truncated_files_are_named() {
    let folder = folder();
    let path = folder.path().join(SINGLE);
    write(&path, &[("a", &[1.0, 2.0, 3.0])]);
    let whole = fs::read(&path).unwrap();
    for len in 0..whole.len() {
        fs::write(&path, &whole[..len]).unwrap();
        let error = open_error(folder.path());
        assert!(error.contains(SINGLE), "{len}: {error}");
    }
}

#[test]
fn an_lfs_pointer_is_no_weights() {
    let folder = folder();
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n";
    fs::write(folder.path().join(SINGLE), pointer).unwrap();
    let error = open_error(folder.path());
    assert!(
        error.contains("git lfs pull") && error.contains(SINGLE),
        "{error}"
    );
}

#[test]
fn pickles_are_refused_with_the_reason() {
    for name in ["pytorch_model.bin", "model.pt", "consolidated.00.PTH"] {
        let folder = folder();
        fs::write(folder.path().join(name), "x").unwrap();
        let error = open_error(folder.path());
        assert!(
            error.contains(name) && error.contains("any code") && error.contains("safetensors"),
            "{error}"
        );
    }
}

#[test]
fn a_folder_without_weights_says_what_is_there_instead() {
    let folder = folder();
    assert!(open_error(folder.path()).contains("no weights"));
    fs::write(folder.path().join("a.gguf"), "x").unwrap();
    assert!(open_error(folder.path()).contains("a.gguf"));
    fs::write(folder.path().join("phi3.safetensors"), "x").unwrap();
    assert!(open_error(folder.path()).contains("rename it"));
}

#[test]
fn the_reference_reads_what_is_written() {
    let folder = folder();
    let path = folder.path().join("x.safetensors");
    let halves = [half::f16::from_f32(0.5)];
    let brains = [half::bf16::from_f32(-3.0)];
    let tensors = [
        TensorToWrite {
            name: "ä \"x\"",
            shape: &[2, 1],
            data: TensorData::F32(&[1.0, f32::NAN]),
        },
        TensorToWrite {
            name: "h",
            shape: &[1],
            data: TensorData::F16(&halves),
        },
        TensorToWrite {
            name: "b",
            shape: &[],
            data: TensorData::Bf16(&brains),
        },
        TensorToWrite {
            name: "none",
            shape: &[0, 4],
            data: TensorData::F32(&[]),
        },
        TensorToWrite {
            name: "i",
            shape: &[1],
            data: TensorData::I64(&[-7]),
        },
    ];
    write_safetensors(&path, &tensors, &[("format", "pt")]).unwrap();
    let bytes = fs::read(&path).unwrap();
    let reference = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(reference.len(), tensors.len());
    assert_eq!(reference.tensor("i").unwrap().data(), (-7i64).to_le_bytes());
    assert_eq!(reference.tensor("ä \"x\"").unwrap().shape(), [2, 1]);
    assert_eq!(
        reference.tensor("h").unwrap().dtype(),
        ::safetensors::Dtype::F16
    );
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert_eq!(header % 8, 0);
    let loaded = candle_core::safetensors::load(&path, &candle_core::Device::Cpu).unwrap();
    assert_eq!(
        loaded["b"]
            .to_dtype(candle_core::DType::F32)
            .unwrap()
            .to_scalar::<f32>()
            .unwrap(),
        -3.0
    );
}

#[test]
fn a_large_tensor_can_be_written_in_pieces() {
    let folder = folder();
    let path = folder.path().join("x.safetensors");
    let spec = TensorSpec {
        name: "w".to_owned(),
        dtype: "F32".to_owned(),
        shape: vec![100, 1000],
    };
    let values: Vec<f32> = (0..100_000).map(|i| i as f32).collect();
    let mut writer = SafetensorsWriter::create(&path, vec![spec], &[]).unwrap();
    for rows in values.chunks(3000) {
        writer.write(TensorData::F32(rows)).unwrap();
    }
    assert!(!path.exists(), "no final name before the end");
    writer.finish().unwrap();
    let source = SafetensorsSource::open_file(&path).unwrap();
    assert_eq!(self::values(&source, "w"), values);
}
