//! Room on a disk.

use std::path::Path;

/// Bytes that may still be written to the disk of `path`, a file that need not exist yet; `None`
/// where its folder does not exist or the system does not tell.
pub fn free_space(path: &Path) -> Option<u64> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    of_folder(folder)
}

#[cfg(unix)]
fn of_folder(folder: &Path) -> Option<u64> {
    let disk = rustix::fs::statvfs(folder).ok()?;
    disk.f_bavail.checked_mul(disk.f_frsize)
}

#[cfg(not(unix))]
fn of_folder(_folder: &Path) -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(unix)]
    fn a_disk_has_some_room() {
        let folder = tempfile::tempdir().unwrap();
        assert!(free_space(&folder.path().join("new")).is_some_and(|free| free > 0));
        assert!(free_space(Path::new("new")).is_some_and(|free| free > 0));
        assert_eq!(free_space(&folder.path().join("missing/new")), None);
    }
}
