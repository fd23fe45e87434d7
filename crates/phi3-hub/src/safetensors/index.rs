//! `model.safetensors.index.json`: which shard holds which tensor.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::config::{MAX_CONFIG, parse_json, read_bytes};
use crate::error::Error;
use crate::names;

/// Reads the `weight_map` of an index file, see [`parse_weight_map`].
pub(crate) fn read_weight_map(index: &Path) -> Result<Vec<(String, String)>, Error> {
    parse_weight_map(index, &read_bytes(index, MAX_CONFIG)?)
}

/// The `weight_map` of an index file whose content is `bytes`: tensor names and names of shard
/// files, in the file's order. `index` is only for messages.
///
/// # Errors
/// [`Error::Json`] if it is no such file, [`Error::Index`] for a shard that is no text,
/// [`Error::UnsafeName`] for one that is not below the index's own folder.
pub fn parse_weight_map(index: &Path, bytes: &[u8]) -> Result<Vec<(String, String)>, Error> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: Map<String, Value>,
    }

    let parsed: Index = parse_json(index, bytes)?;
    let mut entries = Vec::with_capacity(parsed.weight_map.len());
    for (tensor, shard) in parsed.weight_map {
        let Value::String(shard) = shard else {
            return Err(Error::Index {
                index: index.to_owned(),
                tensor,
                shard: shard.to_string(),
                problem: "which is not a file name",
            });
        };
        if !names::is_safe(&shard) {
            return Err(Error::UnsafeName {
                origin: format!("{} (tensor {tensor})", index.display()),
                name: shard,
            });
        }
        entries.push((tensor, shard));
    }
    Ok(entries)
}
