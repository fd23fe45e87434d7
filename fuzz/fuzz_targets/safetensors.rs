//! A safetensors header, and the index of sharded weights. The `safetensors` crate is the oracle of
//! what a good header is.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use phi3::hub::safetensors::{Header, SafetensorsError, parse_weight_map};
use phi3_tests::hostile::safetensors_bytes;

fuzz_target!(init: phi3_fuzz::start(seeds), |data: &[u8]| {
    match Header::parse(data) {
        Ok(header) => {
            let mut end = None;
            for tensor in &header.tensors {
                assert!(data.get(tensor.range.clone()).is_some(), "{tensor:?}");
                assert!(end.is_none_or(|end| end == tensor.range.start), "{tensor:?}");
                end = Some(tensor.range.end);
            }
        }
        // The other reader lets the later of two tensors win.
        Err(SafetensorsError::Duplicate { .. }) => {}
        Err(error) => {
            let other = safetensors::SafeTensors::deserialize(data);
            assert!(other.is_err(), "refused though good: {error}");
        }
    }
    if let Ok(map) = parse_weight_map(Path::new("index.json"), data) {
        for (_, shard) in map {
            assert!(!shard.is_empty() && !shard.split(['/', '\\']).any(|part| part == ".."));
            assert!(!Path::new(&shard).is_absolute(), "{shard}");
        }
    }
});

fn seeds() -> Vec<Vec<u8>> {
    let two = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[3],"data_offsets":[8,14]}}"#;
    let other = r#"{"a":{"dtype":"F8_E4M3","shape":[],"data_offsets":[0,1]},"b":{"dtype":"I64","shape":[0],"data_offsets":[1,1]},"c":{"dtype":"F4","shape":[2,2],"data_offsets":[1,3]}}   "#;
    let index = r#"{"metadata":{"total_size":14},"weight_map":{"a":"model-00001-of-00002.safetensors","b":"sub/model-00002-of-00002.safetensors"}}"#;
    let leaving = r#"{"weight_map":{"a":"../a.safetensors"}}"#;
    vec![
        safetensors_bytes(two, &[0; 14]),
        safetensors_bytes(other, &[0; 3]),
        safetensors_bytes("{}", &[]),
        index.into(),
        leaving.into(),
    ]
}
