//! Real folders: the fixtures of the repository, and the whole kit where it is present.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "all of this is test code, helpers included"
)]

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use phi3_hub::open_folder;

/// Every folder below `root` that has a config.json and safetensors.
fn models(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in root.read_dir().unwrap().map(Result::unwrap) {
        let folder = entry.path();
        if !folder.is_dir() {
            continue;
        }
        let single = folder.join("model.safetensors").exists();
        let index = folder.join("model.safetensors.index.json").exists();
        if folder.join("config.json").exists() && (single || index) {
            found.push(folder.clone());
        }
        found.extend(models(&folder));
    }
    found.sort();
    found
}

/// Opens a folder and compares every tensor with what candle reads from the same files.
fn check(folder: &Path) {
    let checkpoint = match open_folder(folder) {
        Ok(checkpoint) => checkpoint,
        Err(error) => panic!("{}: {error}", folder.display()),
    };
    assert!(
        checkpoint.config["model_type"].is_string(),
        "{}",
        folder.display()
    );
    let mut compared = 0;
    let mut files: Vec<_> = checkpoint
        .tensors
        .iter()
        .map(|entry| entry.file.clone())
        .collect();
    files.dedup();
    for file in files {
        let tensors = candle_core::safetensors::load(folder.join(&file), &Device::Cpu).unwrap();
        for entry in checkpoint.tensors.iter().filter(|entry| entry.file == file) {
            let expected = tensors[&entry.name].to_dtype(DType::F32).unwrap();
            assert_eq!(entry.shape, expected.dims(), "{}", entry.name);
            let stored = checkpoint.weights.tensor(&entry.name).unwrap().unwrap();
            let expected: Vec<f32> = expected.flatten_all().unwrap().to_vec1().unwrap();
            assert!(
                stored.to_f32().unwrap() == expected,
                "{}: {}",
                folder.display(),
                entry.name
            );
            compared += 1;
        }
    }
    assert_eq!(compared, checkpoint.weights.names().len());
}

#[test]
fn the_fixtures_open_as_candle_reads_them() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures");
    let folders = models(&root);
    assert!(!folders.is_empty(), "no model below {}", root.display());
    folders.iter().for_each(|folder| check(folder));
}

#[test]
fn the_kit_opens_as_candle_reads_it() {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/kit");
    let root = std::env::var_os("PHI3_KIT").map_or(beside, PathBuf::from);
    if !root.is_dir() {
        println!(
            "skipped: no kit at {}; PHI3_KIT says where it is",
            root.display()
        );
        return;
    }
    let folders = models(&root);
    assert!(!folders.is_empty(), "no model below {}", root.display());
    for folder in folders {
        println!("{}", folder.display());
        check(&folder);
    }
}
