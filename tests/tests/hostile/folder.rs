//! Damaged folders: files that are not there, not what they seem, or cut; safetensors headers that
//! lie; an index that leads astray.

use anyhow::Result;
use phi3_tests::hostile::{Folder, safetensors_bytes};
use serde_json::json;

use crate::{Case, LOAD, check_folders, refused};

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const EMBED: &str = "model.embed_tokens.weight";
const POINTER: &str = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 769912\n";

const FILES: &[Case] = &[
    Case {
        name: "a folder without config.json",
        damage: |folder| folder.remove("config.json"),
        says: &["config.json", "layout"],
    },
    Case {
        name: "a folder without weights",
        damage: |folder| folder.remove(WEIGHTS),
        says: &[WEIGHTS, INDEX],
    },
    Case {
        name: "weights only as a pickle",
        damage: |folder| {
            folder.remove(WEIGHTS)?;
            folder.write("pytorch_model.bin", "PK")
        },
        says: &["pytorch_model.bin", "pickle", "convert it to safetensors"],
    },
    Case {
        name: "a git-lfs pointer in place of the weights",
        damage: |folder| folder.write(WEIGHTS, POINTER),
        says: &[WEIGHTS, "git lfs pull"],
    },
    Case {
        name: "a git-lfs pointer in place of the tokenizer",
        damage: |folder| folder.write("tokenizer.json", POINTER),
        says: &["tokenizer.json", "git lfs pull"],
    },
    Case {
        name: "a folder in place of the weights",
        damage: |folder| {
            folder.remove(WEIGHTS)?;
            Ok(std::fs::create_dir(folder.file(WEIGHTS))?)
        },
        says: &[WEIGHTS, "not a regular file"],
    },
    Case {
        name: "an error page in place of the weights",
        damage: |folder| folder.write(WEIGHTS, "<!DOCTYPE html><html>404 Not Found</html>"),
        says: &[WEIGHTS, "not safetensors"],
    },
];

#[test]
fn missing_and_mistaken_files() {
    check_folders(LOAD, FILES);
}

#[test]
fn paths_that_are_no_model() {
    let folder = Folder::good().unwrap();
    folder.write("weights.pt", "PK").unwrap();
    let failures: Vec<String> = [
        (
            "one file of a folder",
            WEIGHTS,
            ["not a GGUF file", "the folder that it is in"],
        ),
        ("a pickle", "weights.pt", ["not a GGUF file", "refused"]),
        ("nothing", "no/such.gguf", ["there is no file", "such.gguf"]),
    ]
    .iter()
    .filter_map(|(name, file, says)| refused(name, &folder.file(file), LOAD, says))
    .collect();
    assert!(failures.is_empty(), "{failures:?}");
}

const SAFETENSORS: &[Case] = &[
    Case {
        name: "an empty file of weights",
        damage: |folder| folder.cut(WEIGHTS, 0),
        says: &[WEIGHTS, "0 bytes", "truncated"],
    },
    Case {
        name: "weights cut in the header's length",
        damage: |folder| folder.cut(WEIGHTS, 5),
        says: &[WEIGHTS, "5 bytes", "truncated"],
    },
    Case {
        name: "weights cut in the header",
        damage: |folder| folder.cut(WEIGHTS, 1000),
        says: &[WEIGHTS, "header", "992", "truncated"],
    },
    Case {
        name: "weights cut in the data",
        damage: |folder| folder.cut(WEIGHTS, 400_000),
        says: &[WEIGHTS, "model.layers.1.", "outside", "truncated"],
    },
    Case {
        name: "weights that lack their last byte",
        damage: |folder| folder.cut(WEIGHTS, folder.read(WEIGHTS)?.len() - 1),
        says: &[WEIGHTS, "model.norm.weight", "outside"],
    },
    Case {
        name: "bytes behind the last tensor",
        damage: |folder| folder.write(WEIGHTS, [&folder.read(WEIGHTS)?[..], b"more"].concat()),
        says: &[WEIGHTS, "4 bytes follow"],
    },
    Case {
        name: "a header of 2^63 bytes",
        damage: |folder| header_length(folder, 1 << 63),
        says: &[WEIGHTS, "9223372036854775808", "more than"],
    },
    Case {
        name: "a header of 2^64 - 1 bytes",
        damage: |folder| header_length(folder, u64::MAX),
        says: &[WEIGHTS, "18446744073709551615", "more than"],
    },
    Case {
        name: "a header of 99 megabytes in a smaller file",
        damage: |folder| header_length(folder, 99_000_000),
        says: &[WEIGHTS, "99000000", "follow"],
    },
    Case {
        name: "a header that is not JSON",
        damage: |folder| folder.write(WEIGHTS, safetensors_bytes("{\"a\": }", &[])),
        says: &[WEIGHTS, "header, line 1, column 7"],
    },
    Case {
        name: "a header that is a list",
        damage: |folder| folder.write(WEIGHTS, safetensors_bytes("[1, 2, 3]", &[])),
        says: &[WEIGHTS, "not a JSON object"],
    },
    Case {
        name: "a header nested 100,000 deep",
        damage: |folder| {
            let header = "{\"a\":".repeat(100_000);
            folder.write(WEIGHTS, safetensors_bytes(&header, &[]))
        },
        says: &[WEIGHTS, "header", "tensor a"],
    },
    Case {
        name: "one tensor listed twice",
        damage: |folder| {
            let entry = r#""a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
            let header = format!("{{{entry},{entry}}}");
            folder.write(WEIGHTS, safetensors_bytes(&header, &[0; 4]))
        },
        says: &[WEIGHTS, "tensor a is listed twice"],
    },
    Case {
        name: "two tensors in the same bytes",
        damage: |folder| set(folder, EMBED, "data_offsets", json!([0, 81920])),
        says: &[WEIGHTS, EMBED, "begins at byte 0"],
    },
    Case {
        name: "offsets beyond the file",
        damage: |folder| set(folder, EMBED, "data_offsets", json!([81920, 1u64 << 63])),
        says: &[WEIGHTS, EMBED, "9223372036854775808", "outside"],
    },
    Case {
        name: "offsets that run backwards",
        damage: |folder| set(folder, EMBED, "data_offsets", json!([163840, 81920])),
        says: &[WEIGHTS, EMBED, "163840..81920", "backwards"],
    },
    Case {
        name: "a negative offset",
        damage: |folder| set(folder, EMBED, "data_offsets", json!([-4, 81916])),
        says: &[WEIGHTS, EMBED, "-4"],
    },
    Case {
        name: "a shape whose product overflows",
        damage: |folder| {
            let shape = json!([1u64 << 40, 1u64 << 40]);
            set(folder, EMBED, "shape", shape)
        },
        says: &[WEIGHTS, EMBED, "1099511627776", "overflows"],
    },
    Case {
        name: "a shape larger than its bytes",
        damage: |folder| set(folder, EMBED, "shape", json!([320, 640])),
        says: &[WEIGHTS, EMBED, "[320, 640]", "819200", "81920"],
    },
    Case {
        name: "a matrix the other way round",
        damage: |folder| set(folder, EMBED, "shape", json!([64, 320])),
        says: &[WEIGHTS, EMBED, "[64, 320]", "[320, 64]"],
    },
    Case {
        name: "a norm of another width",
        damage: |folder| set(folder, "model.norm.weight", "shape", json!([8, 8])),
        says: &[WEIGHTS, "model.norm.weight", "[8, 8]", "[64]"],
    },
    Case {
        name: "integers as weights",
        damage: |folder| {
            set(folder, EMBED, "shape", json!([160, 64]))?;
            set(folder, EMBED, "dtype", json!("I64"))
        },
        says: &[WEIGHTS, EMBED, "I64", "BF16"],
    },
    Case {
        name: "8-bit floats as weights",
        damage: |folder| {
            set(folder, EMBED, "shape", json!([320, 256]))?;
            set(folder, EMBED, "dtype", json!("F8_E4M3"))
        },
        says: &[WEIGHTS, EMBED, "F8_E4M3", "BF16"],
    },
    Case {
        name: "weights of a type that nobody knows",
        damage: |folder| set(folder, EMBED, "dtype", json!("E8M23")),
        says: &[WEIGHTS, EMBED, "E8M23", "BF16"],
    },
    Case {
        name: "a tensor under another name",
        damage: |folder| {
            folder.change_weights(|weights| {
                let entry = weights.header.remove(EMBED).unwrap();
                weights.header.insert("transformer.wte".to_owned(), entry);
                Ok(())
            })
        },
        says: &[WEIGHTS, EMBED, "missing"],
    },
];

fn header_length(folder: &Folder, length: u64) -> Result<()> {
    let mut bytes = folder.read(WEIGHTS)?;
    bytes[..8].copy_from_slice(&length.to_le_bytes());
    folder.write(WEIGHTS, bytes)
}

fn set(folder: &Folder, tensor: &str, field: &str, value: serde_json::Value) -> Result<()> {
    folder.change_weights(|weights| weights.set(tensor, field, value))
}

#[test]
fn safetensors_that_are_cut_or_lie() {
    check_folders(LOAD, SAFETENSORS);
}

const INDEXES: &[Case] = &[
    Case {
        name: "an index that leaves the folder upwards",
        damage: |folder| index(folder, json!("../model.safetensors")),
        says: &[INDEX, EMBED, "../model.safetensors", "leaves"],
    },
    Case {
        name: "an index that names an absolute path",
        damage: |folder| index(folder, json!("/etc/passwd")),
        says: &[INDEX, EMBED, "/etc/passwd", "leaves"],
    },
    Case {
        name: "an index that leaves the folder in the middle of a name",
        damage: |folder| index(folder, json!("a/../../b.safetensors")),
        says: &[INDEX, EMBED, "a/../../b.safetensors", "leaves"],
    },
    Case {
        name: "an index that names no file",
        damage: |folder| index(folder, json!("")),
        says: &[INDEX, EMBED, "\"\""],
    },
    Case {
        name: "an index that names a shard that is not there",
        damage: |folder| index(folder, json!("model-00002-of-00002.safetensors")),
        says: &[INDEX, EMBED, "model-00002-of-00002.safetensors", "fetch"],
    },
    Case {
        name: "an index that names a shard without the tensor",
        damage: |folder| {
            folder.write("empty.safetensors", safetensors_bytes("{}", &[]))?;
            index(folder, json!("empty.safetensors"))
        },
        says: &[INDEX, EMBED, "empty.safetensors", "no such tensor"],
    },
    Case {
        name: "an index whose shard is a number",
        damage: |folder| index(folder, json!(7)),
        says: &[INDEX, EMBED, "7", "not a file name"],
    },
    Case {
        name: "an index without a map",
        damage: |folder| {
            folder.remove(WEIGHTS)?;
            folder.write(INDEX, r#"{"metadata": {}}"#)
        },
        says: &[INDEX, "weight_map"],
    },
    Case {
        name: "an index that is cut",
        damage: |folder| {
            folder.remove(WEIGHTS)?;
            folder.write(INDEX, r#"{"weight_map": {"a": "#)
        },
        says: &[INDEX, "line 1", "EOF"],
    },
    Case {
        name: "a shard that is a git-lfs pointer",
        damage: |folder| {
            folder.write("shard.safetensors", POINTER)?;
            index(folder, json!("shard.safetensors"))
        },
        says: &["shard.safetensors", "git lfs pull"],
    },
];

/// An index that finds the embedding in `shard`, and all else in the good weights.
fn index(folder: &Folder, shard: serde_json::Value) -> Result<()> {
    std::fs::rename(folder.file(WEIGHTS), folder.file("rest.safetensors"))?;
    let rest = "rest.safetensors";
    let map = json!({EMBED: shard, "model.norm.weight": rest, "lm_head.weight": rest});
    folder.write_json(INDEX, &json!({ "weight_map": map }))
}

#[test]
fn an_index_that_leads_astray() {
    check_folders(LOAD, INDEXES);
}
