use proptest::prelude::*;

use super::*;

/// A file with this header and so many bytes of data.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend(std::iter::repeat_n(7, data));
    file
}

fn error(header: &str, data: usize) -> SafetensorsError {
    Header::parse(&file(header, data)).expect_err("must be refused")
}

#[test]
fn a_good_header() {
    let header = r#"{"__metadata__":{"format":"pt"},
        "b":{"dtype":"F16","shape":[1,2],"data_offsets":[4,8]},
        "a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},
        "none":{"dtype":"BF16","shape":[0,8],"data_offsets":[8,8]}}    "#;
    let parsed = Header::parse(&file(header, 8)).unwrap();
    let start = 8 + header.len();
    let names: Vec<_> = parsed
        .tensors
        .iter()
        .map(|tensor| tensor.name.as_str())
        .collect();
    assert_eq!(names, ["a", "b", "none"]);
    assert_eq!(parsed.tensors[1].shape, [1, 2]);
    assert_eq!(parsed.tensors[1].range, start + 4..start + 8);
    assert_eq!(parsed.metadata, [("format".to_owned(), "pt".to_owned())]);
}

#[test]
fn a_file_without_tensors() {
    assert!(Header::parse(&file("{}", 0)).unwrap().tensors.is_empty());
}

#[test]
fn shorter_than_the_length_field() {
    for len in 0..8 {
        let found = len as u64;
        let error = Header::parse(&vec![1; len]).unwrap_err();
        assert_eq!(error, SafetensorsError::TooShort { found });
    }
}

#[test]
fn header_length_of_two_to_the_63() {
    for header in [1 << 63, u64::MAX, 100_000_001] {
        let mut file = file("{}", 0);
        file[..8].copy_from_slice(&header.to_le_bytes());
        let error = Header::parse(&file).unwrap_err();
        assert_eq!(
            error,
            SafetensorsError::HeaderTooLarge {
                header,
                limit: 100_000_000
            }
        );
    }
}

#[test]
fn header_longer_than_the_file() {
    let mut file = file("{}", 3);
    file[0] = 6;
    let error = Header::parse(&file).unwrap_err();
    assert_eq!(
        error,
        SafetensorsError::HeaderOutside {
            header: 6,
            found: 5
        }
    );
}

#[test]
fn header_that_is_no_object() {
    for header in ["", "[]", " {}", "null", "\u{feff}{}", "hello"] {
        assert_eq!(
            error(header, 0),
            SafetensorsError::NotSafetensors,
            "{header:?}"
        );
    }
}

#[test]
fn invalid_json_has_a_place() {
    let found = error("{\n\"a\": }", 0);
    assert!(
        matches!(
            found,
            SafetensorsError::Header {
                line: 2,
                column: 6,
                ..
            }
        ),
        "{found:?}"
    );
}

#[test]
fn header_that_is_not_utf8() {
    let mut file = file("{\"aa\":1}", 0);
    file[10] = 0xff;
    assert!(matches!(
        Header::parse(&file),
        Err(SafetensorsError::Header { .. })
    ));
}

#[test]
fn an_entry_of_another_form_names_its_tensor() {
    for entry in [
        "1",
        "{}",
        r#"{"dtype":"F32","shape":[1]}"#,
        r#"{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}"#,
        r#"{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}"#,
        r#"{"dtype":"F32","shape":[1],"data_offsets":[0]}"#,
        r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}"#,
        r#"{"dtype":32,"shape":[1],"data_offsets":[0,4]}"#,
    ] {
        let found = error(&format!(r#"{{"w.1":{entry}}}"#), 4).to_string();
        assert!(found.contains("w.1"), "{entry}: {found}");
    }
}

#[test]
fn metadata_of_another_form() {
    let found = error(r#"{"__metadata__":{"a":1}}"#, 0).to_string();
    assert!(found.contains("__metadata__"), "{found}");
}

#[test]
fn a_name_given_twice() {
    let header = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},
                     "a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#;
    assert_eq!(
        error(header, 8),
        SafetensorsError::Duplicate {
            tensor: "a".to_owned()
        }
    );
}

#[test]
fn shapes_that_overflow() {
    for shape in [
        "[4294967296,4294967296]",
        "[18446744073709551615]",
        "[9223372036854775807,2]",
    ] {
        let header = format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,4]}}}}"#);
        let found = error(&header, 4);
        assert!(
            matches!(found, SafetensorsError::ShapeOverflow { .. }),
            "{shape}: {found:?}"
        );
    }
}

#[test]
fn shape_and_offsets_that_differ() {
    let header = r#"{"a":{"dtype":"F16","shape":[2,3],"data_offsets":[0,8]}}"#;
    let found = error(header, 8);
    assert!(
        matches!(
            found,
            SafetensorsError::Size {
                expected: 12,
                found: 8,
                ..
            }
        ),
        "{found:?}"
    );
    assert!(
        found.to_string().contains("F16 [2, 3] takes 12 bytes"),
        "{found}"
    );
}

#[test]
fn offsets_that_run_backwards() {
    let found = error(
        r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#,
        4,
    );
    assert!(
        matches!(
            found,
            SafetensorsError::Backwards {
                begin: 4,
                end: 0,
                ..
            }
        ),
        "{found:?}"
    );
}

#[test]
fn truncated_data() {
    let header = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    let found = error(header, 7);
    assert!(
        matches!(
            found,
            SafetensorsError::Outside {
                end: 8,
                data: 7,
                ..
            }
        ),
        "{found:?}"
    );
    assert!(found.to_string().contains("truncated"), "{found}");
}

#[test]
fn offsets_near_the_largest_number() {
    let max = u64::MAX;
    let header = format!(
        r#"{{"a":{{"dtype":"U8","shape":[1],"data_offsets":[{},{max}]}}}}"#,
        max - 1
    );
    let found = error(&header, 4);
    assert!(
        matches!(found, SafetensorsError::Outside { .. }),
        "{found:?}"
    );
}

#[test]
fn overlaps_gaps_and_trailing_bytes() {
    let two = |second: &str| {
        format!(
            r#"{{"a":{{"dtype":"U8","shape":[4],"data_offsets":[0,4]}},
                "b":{{"dtype":"U8","shape":[4],"data_offsets":{second}}}}}"#
        )
    };
    let not_contiguous = |begin| SafetensorsError::NotContiguous {
        tensor: "b".to_owned(),
        begin,
        expected: 4,
    };
    assert_eq!(error(&two("[2,6]"), 6), not_contiguous(2));
    assert_eq!(error(&two("[5,9]"), 9), not_contiguous(5));
    assert_eq!(
        error(&two("[4,8]"), 9),
        SafetensorsError::Trailing { extra: 1 }
    );
    assert!(Header::parse(&file(&two("[4,8]"), 8)).is_ok());
}

#[test]
fn unknown_types_are_listed() {
    let header = r#"{"a":{"dtype":"Q99","shape":[3],"data_offsets":[0,5]}}"#;
    assert_eq!(
        Header::parse(&file(header, 5)).unwrap().tensors[0].dtype,
        "Q99"
    );
}

/// Headers close to valid ones, whose acceptance must be the reference implementation's.
fn entry() -> impl Strategy<Value = String> {
    let dtype = prop::sample::select(vec!["F32", "F16", "BF16", "U8", "I64", "BOOL"]);
    let shape = prop::collection::vec(0u64..4, 0..3);
    (dtype, shape, 0u64..12, 0u64..12).prop_map(|(dtype, shape, begin, len)| {
        let size = shape.iter().product::<u64>() * bits(dtype).unwrap() / 8;
        let len = if len < 9 { size } else { len };
        let begin = begin / 4 * 4;
        format!(
            r#"{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{begin},{}]}}"#,
            begin + len
        )
    })
}

proptest! {
    #[test]
    fn accepts_what_the_reference_accepts(entries in prop::collection::vec(entry(), 0..3), data in 0usize..24) {
        let list: Vec<_> = entries.iter().enumerate().map(|(i, entry)| format!(r#""t{i}":{entry}"#)).collect();
        let file = file(&format!("{{{}}}", list.join(",")), data);
        let reference = ::safetensors::SafeTensors::deserialize(&file);
        let ours = Header::parse(&file);
        prop_assert_eq!(ours.is_ok(), reference.is_ok(), "{:?} / {:?}", ours, reference.err());
        if let (Ok(ours), Ok(reference)) = (ours, reference) {
            for tensor in ours.tensors {
                let view = reference.tensor(&tensor.name).unwrap();
                prop_assert_eq!(view.shape(), &tensor.shape);
                prop_assert_eq!(view.data(), &file[tensor.range]);
            }
        }
    }

    #[test]
    fn bytes_of_any_kind_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), header in 0u64..64) {
        let _ = Header::parse(&bytes);
        let mut framed = header.to_le_bytes().to_vec();
        framed.push(b'{');
        framed.extend(bytes);
        let _ = Header::parse(&framed);
    }
}
