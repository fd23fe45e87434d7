use phi3_kernels::BlockType;

use super::*;
use crate::gguf::Writer;

/// A small file: two metadata entries and three tensors.
fn small() -> Vec<u8> {
    let mut writer = Writer::new();
    writer.set("general.architecture", "phi3");
    writer.set(
        "tokenizer.ggml.tokens",
        ["a", "b"].into_iter().collect::<Array>(),
    );
    writer.set("k", 7u32);
    writer.add_tensor("x", &[2, 3], BlockType::F32).unwrap();
    writer.add_tensor("q", &[2, 32], BlockType::Q4_0).unwrap();
    writer.add_tensor("y", &[1], BlockType::F16).unwrap();
    writer
        .to_vec(|tensor, sink| sink.write(&vec![1; tensor.size as usize]))
        .unwrap()
}

fn parse(bytes: Vec<u8>) -> Result<Container> {
    Container::parse(bytes.into())
}

/// Writes `bytes` over the file from the first occurrence of `needle`, plus `skip`.
fn patch(file: &mut [u8], needle: &[u8], skip: usize, bytes: &[u8]) {
    let at = file
        .windows(needle.len())
        .position(|window| window == needle)
        .expect("the needle is in the file");
    file[at + skip..at + skip + bytes.len()].copy_from_slice(bytes);
}

/// A header with these counts, followed by `rest`.
fn header(tensors: u64, entries: u64, rest: &[&[u8]]) -> Vec<u8> {
    let mut file = b"GGUF\x03\0\0\0".to_vec();
    file.extend(tensors.to_le_bytes());
    file.extend(entries.to_le_bytes());
    file.extend(rest.concat());
    file
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

#[test]
fn a_small_file_reads_back() {
    let container = parse(small()).unwrap();
    assert_eq!(container.get("k"), Some(&Value::U32(7)));
    assert_eq!(container.get("no"), None);
    assert_eq!(container.metadata().len(), 3);
    let x = container.tensor("x").unwrap();
    assert_eq!((x.shape.as_slice(), x.size), (&[2, 3][..], Some(24)));
    assert_eq!(container.data(x).unwrap().len(), 24);
    assert_eq!(container.tensor("q").unwrap().size, Some(36));
}

#[test]
fn a_version_2_file_reads_back() {
    let mut file = small();
    file[4] = 2;
    assert_eq!(parse(file).unwrap().version(), 2);
}

#[test]
fn hostile_truncation_at_every_byte_is_an_error() {
    let file = small();
    let data_end = file.len() - file.len().next_multiple_of(32).abs_diff(file.len());
    // The padding after the last tensor (2 bytes of data) may be missing.
    for len in 0..data_end - 30 {
        let error = parse(file[..len].to_vec());
        assert!(
            error.is_err(),
            "{len} of {} bytes were accepted",
            file.len()
        );
    }
    parse(file[..data_end - 30].to_vec()).unwrap();
}

#[test]
fn hostile_byte_changes_never_panic() {
    let file = small();
    for at in 0..file.len() {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut changed = file.clone();
            changed[at] = value;
            if let Ok(container) = parse(changed) {
                for tensor in container.tensors() {
                    let _ = container.data(tensor);
                }
            }
        }
    }
}

#[test]
fn hostile_magic_versions_and_byte_order() {
    assert!(matches!(parse(vec![]), Err(Error::Magic { .. })));
    let html = parse(b"<!DOCTYPE html>".to_vec()).unwrap_err().to_string();
    assert!(html.contains("error page"), "{html}");
    for (version, expected) in [(1u32, "version 1"), (4, "version 4"), (u32::MAX, "version")] {
        let mut file = small();
        file[4..8].copy_from_slice(&version.to_le_bytes());
        let error = parse(file).unwrap_err();
        assert!(matches!(error, Error::Version { .. }), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    }
    let mut file = small();
    file[4..8].copy_from_slice(&3u32.to_be_bytes());
    assert!(matches!(parse(file), Err(Error::BigEndian)));
}

#[test]
fn hostile_counts() {
    for count in [1u64 << 63, u64::MAX, 1 << 40, 2] {
        let error = parse(header(count, 0, &[])).unwrap_err().to_string();
        assert!(error.contains(&format!("{count} tensors")), "{error}");
        let error = parse(header(0, count, &[])).unwrap_err().to_string();
        assert!(
            error.contains(&format!("{count} metadata entries")),
            "{error}"
        );
    }
}

#[test]
fn hostile_text_lengths() {
    for len in [1u64 << 60, u64::MAX, 100] {
        let file = header(0, 1, &[&len.to_le_bytes(), b"general.name and more"]);
        let error = parse(file).unwrap_err();
        assert!(
            matches!(error, Error::Truncated { needed, .. } if needed == len),
            "{error}"
        );
    }
}

#[test]
fn hostile_array_lengths() {
    for item in [0u32, 6, 7, 8, 9, 10, 12] {
        for count in [1u64 << 60, u64::MAX, 1000] {
            let file = header(
                0,
                1,
                &[
                    &text("k"),
                    &9u32.to_le_bytes(),
                    &item.to_le_bytes(),
                    &count.to_le_bytes(),
                    &[0; 32],
                ],
            );
            let error = parse(file).unwrap_err().to_string();
            assert!(
                error.contains(&count.to_string()) && error.contains("\"k\""),
                "{error}"
            );
        }
    }
}

#[test]
fn hostile_nesting() {
    let mut rest = text("k");
    rest.extend(9u32.to_le_bytes());
    for _ in 0..1000 {
        rest.extend(9u32.to_le_bytes());
        rest.extend(1u64.to_le_bytes());
    }
    let error = parse(header(0, 1, &[&rest])).unwrap_err();
    assert!(matches!(error, Error::Nesting { .. }), "{error}");
}

#[test]
fn hostile_value_types() {
    for id in [13u32, u32::MAX] {
        let file = header(0, 1, &[&text("k"), &id.to_le_bytes(), &[0; 32]]);
        assert!(matches!(parse(file), Err(Error::ValueType { .. })));
        let file = header(
            0,
            1,
            &[&text("k"), &9u32.to_le_bytes(), &id.to_le_bytes(), &[0; 32]],
        );
        assert!(matches!(parse(file), Err(Error::ValueType { .. })));
    }
}

#[test]
fn hostile_keys_and_names() {
    let entry = [text("k"), 0u32.to_le_bytes().to_vec(), vec![1]].concat();
    let error = parse(header(0, 2, &[&entry, &entry])).unwrap_err();
    assert!(
        matches!(&error, Error::DuplicateKey { key } if key == "k"),
        "{error}"
    );

    let mut file = small();
    patch(&mut file, b"general.architecture", 3, b"\xff");
    assert!(matches!(parse(file), Err(Error::Utf8 { .. })));

    let mut file = small();
    patch(&mut file, &text("y"), 8, b"x");
    let error = parse(file).unwrap_err();
    assert!(
        matches!(&error, Error::DuplicateTensor { tensor } if tensor == "x"),
        "{error}"
    );
}

#[test]
fn a_token_that_is_not_utf8_is_kept() {
    let mut file = small();
    patch(&mut file, &text("a"), 8, b"\xff");
    let container = parse(file).unwrap();
    let tokens = container.get("tokenizer.ggml.tokens").unwrap();
    assert_eq!(
        tokens.as_array().unwrap().as_texts().unwrap()[0].as_bytes(),
        b"\xff"
    );
}

#[test]
fn hostile_alignment() {
    for value in [
        Value::U32(0),
        Value::U32(24),
        Value::U32(1 << 31),
        Value::U64(1 << 63),
        Value::I32(-32),
        Value::from("32"),
    ] {
        // The file is made with the key under another name, since the writer refuses it too.
        let mut writer = Writer::new();
        writer.set("general.alignmenX", value.clone());
        let mut file = writer.to_vec::<Error>(|_, _| Ok(())).unwrap();
        patch(&mut file, b"general.alignmenX", 16, b"t");
        let error = parse(file).unwrap_err();
        assert!(matches!(error, Error::Alignment { .. }), "{value}: {error}");
    }
}

#[test]
fn hostile_shapes() {
    let with_axes = |axes: &[u64]| {
        let mut rest = text("t");
        rest.extend((axes.len() as u32).to_le_bytes());
        axes.iter().for_each(|axis| rest.extend(axis.to_le_bytes()));
        rest.extend(0u32.to_le_bytes());
        rest.extend(0u64.to_le_bytes());
        rest.extend([0; 64]);
        parse(header(1, 0, &[&rest]))
    };
    assert!(with_axes(&[1, 1]).is_ok());
    for axes in [
        &[u64::MAX][..],
        &[1 << 32, 1 << 32],
        &[1 << 62, 2],
        &[1 << 32, 1 << 32, 0],
        &[i64::MAX as u64 / 2, 3],
        &[1, 1, 1, 1, 1],
    ] {
        let error = with_axes(axes).unwrap_err();
        assert!(
            matches!(error, Error::Dimensions { .. }),
            "{axes:?}: {error}"
        );
    }
    let error = with_axes(&[1 << 40]).unwrap_err();
    assert!(matches!(error, Error::OutsideFile { .. }), "{error}");

    let mut file = header(1, 0, &[&text("t")]);
    file.extend(u32::MAX.to_le_bytes());
    file.extend([0; 64]);
    assert!(matches!(parse(file), Err(Error::Dimensions { .. })));
}

#[test]
fn a_row_is_whole_blocks() {
    let mut file = small();
    patch(&mut file, &text("q"), 9 + 4, &33u64.to_le_bytes());
    let error = parse(file).unwrap_err().to_string();
    assert!(
        error.contains("blocks of 32") && error.contains("[33, 2]"),
        "{error}"
    );
}

/// Offset of the type and offset fields of a two-axis tensor entry after its name's length field.
const TYPE: usize = 8 + 1 + 4 + 16;
const OFFSET: usize = TYPE + 4;

#[test]
fn hostile_offsets() {
    for offset in [1u64, 16, u64::MAX] {
        let mut file = small();
        patch(&mut file, &text("q"), OFFSET, &offset.to_le_bytes());
        let error = parse(file).unwrap_err();
        assert!(matches!(error, Error::Misaligned { .. }), "{error}");
    }
    for offset in [1u64 << 20, u64::MAX - 31] {
        let mut file = small();
        patch(&mut file, &text("q"), OFFSET, &offset.to_le_bytes());
        let error = parse(file).unwrap_err();
        assert!(matches!(error, Error::OutsideFile { .. }), "{error}");
    }
    let mut file = small();
    patch(&mut file, &text("q"), OFFSET, &0u64.to_le_bytes());
    let error = parse(file).unwrap_err();
    assert!(matches!(error, Error::Overlap { .. }), "{error}");
}

#[test]
fn an_unknown_type_is_listed_and_fails_only_in_use() {
    let mut file = small();
    patch(&mut file, &text("q"), TYPE, &4711u32.to_le_bytes());
    let container = parse(file).unwrap();
    let q = container.tensor("q").unwrap();
    assert_eq!(
        (q.tensor_type.name().as_str(), q.size),
        ("unknown(4711)", None)
    );
    let error = container.data(q).unwrap_err().to_string();
    assert!(
        error.contains("\"q\"") && error.contains("unknown(4711)"),
        "{error}"
    );
    assert!(container.data(container.tensor("x").unwrap()).is_ok());
}
