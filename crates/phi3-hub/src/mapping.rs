//! Files as byte slices, without reading them, and advice about their pages: the only unsafe code of
//! this crate.

use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};

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
    let map = Arc::new(Mapping(map));
    let mut mappings = MAPPINGS.lock().unwrap_or_else(PoisonError::into_inner);
    mappings.retain(|mapping| mapping.strong_count() > 0);
    mappings.push(Arc::downgrade(&map));
    drop(mappings);
    Ok(Bytes::new(map))
}

/// A mapped file.
struct Mapping(Mmap);

impl AsRef<[u8]> for Mapping {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// All mappings of [`map_file`] that are in use: what advice may be given about. Advice about other
/// memory could lose what is in it.
static MAPPINGS: Mutex<Vec<Weak<Mapping>>> = Mutex::new(Vec::new());

/// The mapping that holds `bytes`, and where in it they lie.
fn mapping_of(bytes: &[u8]) -> Option<(Arc<Mapping>, usize)> {
    let mappings = MAPPINGS.lock().unwrap_or_else(PoisonError::into_inner);
    mappings.iter().find_map(|mapping| {
        let mapping = mapping.upgrade()?;
        let start = mapping.0.as_ptr().addr();
        let offset = bytes.as_ptr().addr().checked_sub(start)?;
        let end = offset.checked_add(bytes.len())?;
        (end <= mapping.0.len()).then_some((mapping, offset))
    })
}

/// Bytes that one piece of advice to read ahead covers, in two passes. Linux makes requests of up to 2 MiB
/// of it, the faster ones, but of a longer range than the device's window or largest request it reads
/// only the beginning (`force_page_cache_ra`): what the first pass left out the second asks for, in
/// pieces of the window where nothing is set.
#[cfg(unix)]
const READ_AHEAD: [usize; 2] = [2 << 20, 128 << 10];

/// Asks the kernel to read mapped bytes from disk, and waits for no more than a full queue of
/// requests. Other bytes are in memory already. Advice that the system does not take changes nothing.
pub(crate) fn read_ahead(bytes: &Bytes) {
    #[cfg(unix)]
    if let Some((mapping, offset)) = mapping_of(bytes) {
        let end = offset + bytes.len();
        for piece in READ_AHEAD {
            for start in (offset..end).step_by(piece) {
                let len = piece.min(end - start);
                let advice = memmap2::Advice::WillNeed;
                let _ = mapping.0.advise_range(advice, start, len);
            }
        }
    }
    #[cfg(not(unix))]
    let _ = mapping_of(bytes);
}

/// Tells the kernel that this process can do without the pages of mapped bytes. They stay readable: the
/// next access finds them in the page cache or reads them from disk.
pub(crate) fn drop_pages(bytes: &Bytes) {
    #[cfg(unix)]
    if let Some((mapping, offset)) = mapping_of(bytes) {
        let advice = memmap2::UncheckedAdvice::DontNeed;
        // SAFETY: the range lies within the mapping, as `mapping_of` checked, and the mapping is alive.
        // It is a read-only mapping of a file that nobody writes to through it, so that a dropped page
        // comes back with the file's bytes, which by the condition of `map_file` do not change.
        let _ = unsafe {
            mapping
                .0
                .unchecked_advise_range(advice, offset, bytes.len())
        };
    }
    #[cfg(not(unix))]
    let _ = mapping_of(bytes);
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
    fn advice_changes_no_byte() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        let written: Vec<u8> = (0..100_000u32).map(|i| (i * 7 % 251) as u8).collect();
        std::fs::write(&path, &written).unwrap();
        let mapped = map_file(&path).unwrap();
        for range in [0..100_000, 5000..5001, 4096..8192, 99_999..100_000, 7..7] {
            let part = mapped.slice(range.clone()).unwrap();
            assert_eq!(mapping_of(&part).unwrap().1, range.start);
            read_ahead(&part);
            drop_pages(&part);
            assert!(*part == written[range]);
        }
        assert!(*mapped == written);
        // Bytes that are no file's are left alone: their pages would come back as zeros.
        let own = Bytes::from(written.clone());
        assert!(mapping_of(&own).is_none());
        drop_pages(&own);
        assert!(*own == written);
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
