//! Files as byte slices, without reading them: the only unsafe code of this crate.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;
use phi3_nn::weights::Bytes;

use crate::error::Error;

/// Maps the whole of a regular file, read-only. Pages are read when they are first touched, and no
/// advice is given: reading ahead would make a look at the headers read all the weights.
///
/// The file must not be changed while it is mapped: another process that shortens it makes reads
/// of the lost part fail with a signal. Files of the hub cache never change, because a download
/// gets its final name only when it is complete; replace a model's files by renaming, not by
/// writing into them.
///
/// # Errors
/// [`Error::Io`] if the file cannot be opened or mapped, [`Error::NotAFile`] if it is something
/// else than a regular file.
pub fn map_file(path: &Path) -> Result<Bytes, Error> {
    let io = |source| Error::io("mapping", path, source);
    let file = File::open(path).map_err(io)?;
    let metadata = file.metadata().map_err(io)?;
    if !metadata.is_file() {
        return Err(Error::NotAFile {
            path: path.to_owned(),
        });
    }
    if metadata.len() == 0 {
        return Ok(Bytes::from(Vec::new()));
    }
    // SAFETY: the file was just opened and is a regular file; the mapping is read-only and lives as
    // long as the `Mmap` that owns it. That nobody shortens the file meanwhile is the documented
    // condition of every file mapping, and cannot be checked.
    let map = unsafe { Mmap::map(&file) }.map_err(io)?;
    Ok(Bytes::new(Arc::new(map)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_what_the_file_holds() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        std::fs::write(&path, b"some bytes").unwrap();
        assert_eq!(&*map_file(&path).unwrap(), b"some bytes");
    }

    #[test]
    fn an_empty_file_is_an_empty_slice() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("empty");
        std::fs::write(&path, b"").unwrap();
        assert!(map_file(&path).unwrap().is_empty());
    }

    #[test]
    fn a_folder_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let error = map_file(folder.path()).unwrap_err().to_string();
        assert!(
            error.contains(&folder.path().display().to_string()),
            "{error}"
        );
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = map_file(Path::new("no/such/file")).unwrap_err().to_string();
        assert!(error.contains("no/such/file"), "{error}");
    }
}
