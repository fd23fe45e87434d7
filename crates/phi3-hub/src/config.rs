//! Reading small files: bounded in size, and JSON errors that name file, line and column.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::Error;

/// Largest config-like JSON file that is read, in bytes.
pub(crate) const MAX_CONFIG: u64 = 16 << 20;
/// Largest tokenizer file that is read, in bytes. Phi-4-mini's, the largest of the family, has 16 MB.
pub(crate) const MAX_TOKENIZER: u64 = 64 << 20;
/// Largest chat template that is read, in bytes.
pub(crate) const MAX_TEMPLATE: u64 = 1 << 20;

/// Reads a whole file of at most `limit` bytes.
///
/// # Errors
/// [`Error::Io`], [`Error::TooLarge`], or [`Error::LfsPointer`] if the file is what git leaves in
/// the place of a large file it did not fetch.
pub fn read_bytes(path: &Path, limit: u64) -> Result<Vec<u8>, Error> {
    let io = |source| Error::io("reading", path, source);
    let file = File::open(path).map_err(io)?;
    let size = file.metadata().map_err(io)?.len();
    let too_large = |size| Error::TooLarge {
        path: path.to_owned(),
        size,
        limit,
    };
    if size > limit {
        return Err(too_large(size));
    }
    // A pipe or a growing file says less than it gives, so the limit also bounds the reading.
    let mut bytes = Vec::new();
    file.take(limit.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(io)?;
    if bytes.len() as u64 > limit {
        return Err(too_large(bytes.len() as u64));
    }
    if is_lfs_pointer(&bytes) {
        return Err(Error::LfsPointer {
            path: path.to_owned(),
        });
    }
    Ok(bytes)
}

/// Reads a JSON file of at most `limit` bytes.
///
/// # Errors
/// As [`read_bytes`], and [`Error::Json`] with line and column.
pub fn read_json(path: &Path, limit: u64) -> Result<Value, Error> {
    parse_json(path, &read_bytes(path, limit)?)
}

/// Parses JSON that came from `path`.
///
/// # Errors
/// [`Error::Json`] with line and column.
pub fn parse_json<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(bytes).map_err(|error| Error::json(path, &error))
}

/// [`read_json`] for a file that may be absent.
pub(crate) fn read_optional_json(path: &Path, limit: u64) -> Result<Option<Value>, Error> {
    read_optional_bytes(path, limit)?
        .map(|bytes| parse_json(path, &bytes))
        .transpose()
}

/// [`read_bytes`] for a file that may be absent.
pub(crate) fn read_optional_bytes(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, Error> {
    match read_bytes(path, limit) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// True for the text that git-lfs checks out when the file itself was not fetched.
pub(crate) fn is_lfs_pointer(bytes: &[u8]) -> bool {
    bytes.starts_with(b"version https://git-lfs.github.com/spec/")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(content: &[u8]) -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        std::fs::write(&path, content).unwrap();
        (folder, path)
    }

    #[test]
    fn json_errors_name_file_line_and_column() {
        let (_folder, path) = file(b"{\n  \"a\": 1,\n  \"b\" 2\n}");
        let error = read_json(&path, MAX_CONFIG).unwrap_err().to_string();
        assert!(error.contains("config.json"), "{error}");
        assert!(error.contains("line 3, column 7"), "{error}");
    }

    #[test]
    fn a_file_over_the_limit_is_not_read() {
        let (_folder, path) = file(b"[1, 2, 3]");
        assert!(read_json(&path, 9).is_ok());
        let error = read_json(&path, 8).unwrap_err();
        assert!(
            matches!(
                error,
                Error::TooLarge {
                    size: 9,
                    limit: 8,
                    ..
                }
            ),
            "{error}"
        );
    }

    #[cfg(unix)]
    #[test]
    fn an_endless_device_stops_at_the_limit() {
        let error = read_bytes(Path::new("/dev/zero"), 1000).unwrap_err();
        assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    }

    #[test]
    fn deep_nesting_is_an_error() {
        let (_folder, path) = file("[".repeat(100_000).as_bytes());
        assert!(matches!(
            read_json(&path, MAX_CONFIG),
            Err(Error::Json { .. })
        ));
    }

    #[test]
    fn absent_is_none_but_broken_is_an_error() {
        let (folder, path) = file(b"{");
        let absent = folder.path().join("absent.json");
        assert!(read_optional_json(&absent, MAX_CONFIG).unwrap().is_none());
        assert!(read_optional_json(&path, MAX_CONFIG).is_err());
    }

    #[test]
    fn an_lfs_pointer_is_told_from_json() {
        let (_folder, path) =
            file(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n");
        let error = read_json(&path, MAX_CONFIG).unwrap_err().to_string();
        assert!(error.contains("git lfs pull"), "{error}");
    }
}
