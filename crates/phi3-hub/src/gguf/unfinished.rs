//! A file that appears under its name only when it is complete.

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// A file beside its final place, deleted unless it is finished.
///
/// It is locked as long as the [`File`] is open, so that another process can tell it from one that a
/// killed process left behind: close it only after [`Unfinished::finish`].
pub(super) struct Unfinished(Option<PathBuf>);

impl Unfinished {
    /// Makes the file that becomes `path`, after removing those that killed processes left.
    pub(super) fn create(path: &Path) -> std::io::Result<(File, Self)> {
        let name = path.file_name().ok_or_else(|| {
            std::io::Error::new(std::io::ErrorKind::InvalidInput, "the path names no file")
        })?;
        remove_abandoned(path);
        let mut attempt = 0u32;
        loop {
            // No name comes twice in a process: a name that exists is then this file, and not one that
            // another thread made after another process had taken this one for abandoned.
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let mut hidden = hidden_prefix(name);
            hidden.push(format!("{}-{number}{SUFFIX}", std::process::id()));
            let unfinished = path.with_file_name(hidden);
            attempt += 1;
            match OpenOptions::new()
                .write(true)
                .create_new(true)
                .open(&unfinished)
            {
                Ok(file) if is_ours(&file, &unfinished) => {
                    return Ok((file, Self(Some(unfinished))));
                }
                Ok(_) if attempt < ATTEMPTS => (),
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && attempt < ATTEMPTS => (),
                Ok(_) => return Err(std::io::ErrorKind::WouldBlock.into()),
                Err(e) => return Err(e),
            }
        }
    }

    /// Gives the file its final name.
    pub(super) fn finish(mut self, path: &Path) -> std::io::Result<()> {
        if let Some(unfinished) = &self.0 {
            std::fs::rename(unfinished, path)?;
        }
        self.0 = None;
        Ok(())
    }
}

/// How the names of unfinished files end.
const SUFFIX: &str = ".part";

/// Names that are tried before giving up.
const ATTEMPTS: u32 = 1000;

/// Names that this process has taken so far.
static NUMBER: AtomicU64 = AtomicU64::new(0);

/// How the names of unfinished files begin: hidden, and with the name they will have.
fn hidden_prefix(name: &OsStr) -> OsString {
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(".");
    hidden
}

/// Locks a file just made. Until then another process may take it for an abandoned one.
fn is_ours(file: &File, path: &Path) -> bool {
    match file.try_lock() {
        Ok(()) => path.exists(),
        Err(TryLockError::WouldBlock) => false,
        // A file system without locks: there no process removes what it cannot lock.
        Err(TryLockError::Error(_)) => true,
    }
}

/// Removes unfinished files for `path` whose process is gone. What cannot be removed is in nobody's
/// way, since new ones get other names.
fn remove_abandoned(path: &Path) {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let (Some(name), Ok(entries)) = (path.file_name(), std::fs::read_dir(folder)) else {
        return;
    };
    let prefix = hidden_prefix(name);
    for entry in entries.flatten() {
        let found = entry.file_name();
        let middle = found
            .as_encoded_bytes()
            .strip_prefix(prefix.as_encoded_bytes())
            .and_then(|rest| rest.strip_suffix(SUFFIX.as_bytes()));
        if !middle.is_some_and(is_process_and_number)
            || !entry.file_type().is_ok_and(|kind| kind.is_file())
        {
            continue;
        }
        let file = OpenOptions::new().write(true).open(entry.path());
        if let Ok(file) = file
            && file.try_lock().is_ok()
        {
            let removed = std::fs::remove_file(entry.path());
            tracing::info!(path = %entry.path().display(), ?removed, "an abandoned file");
        }
    }
}

/// Whether this is what [`Unfinished::create`] puts between the name and the suffix: `17-0`.
fn is_process_and_number(middle: &[u8]) -> bool {
    let mut numbers = middle.split(|&byte| byte == b'-');
    let mut is_number = || {
        numbers
            .next()
            .is_some_and(|digits| !digits.is_empty() && digits.iter().all(u8::is_ascii_digit))
    };
    is_number() && is_number() && numbers.next().is_none()
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(path) = &self.0
            && let Err(error) = std::fs::remove_file(path)
        {
            tracing::warn!(path = %path.display(), %error, "an unfinished file stays behind");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where the process of [`writes_until_it_is_killed`] writes.
    const KILLED: &str = "PHI3_TEST_KILLED_WRITER";

    /// Run by another test, in a process of its own.
    #[test]
    #[ignore = "the victim: run as a process of its own by a_killed_process_leaves_nothing_to_the_next"]
    fn writes_until_it_is_killed() {
        if let Some(path) = std::env::var_os(KILLED) {
            let _unfinished = Unfinished::create(Path::new(&path)).unwrap();
            std::thread::sleep(std::time::Duration::from_secs(60));
        }
    }

    #[test]
    fn threads_write_the_same_file_side_by_side() {
        use std::io::Write;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        std::thread::scope(|scope| {
            for thread in 0..4u8 {
                let path = &path;
                scope.spawn(move || {
                    for _ in 0..50 {
                        let (mut file, unfinished) = Unfinished::create(path).unwrap();
                        file.write_all(&[thread; 1000]).unwrap();
                        unfinished.finish(path).unwrap();
                        drop(file);
                    }
                });
            }
        });
        let found = std::fs::read(&path).unwrap();
        assert!(found.len() == 1000 && found.iter().all(|byte| *byte == found[0]));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_killed_process_leaves_nothing_to_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let listing = || {
            let entries = std::fs::read_dir(folder.path()).unwrap();
            let mut names: Vec<String> = entries
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        };
        // Names like those of unfinished files, but of other files.
        let others = [
            ".model.gguf.mine.part",
            ".model.gguf..part",
            ".model.gguf.1.part",
            ".model.gguf.-1-.part",
            ".model.gguf.1-2-3.part",
            ".model.gguf2.1-0.part",
            "model.gguf.1-0.part",
        ];
        for other in others {
            std::fs::write(folder.path().join(other), "mine").unwrap();
        }
        let writer = || {
            let test = concat!(module_path!(), "::writes_until_it_is_killed");
            let (_, test) = test.split_once("::").unwrap();
            std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", test, "--ignored"])
                .env(KILLED, &path)
                .stdout(std::process::Stdio::null())
                .spawn()
                .unwrap()
        };
        let write = || {
            let (file, unfinished) = Unfinished::create(&path).unwrap();
            unfinished.finish(&path).unwrap();
            drop(file);
        };
        let wait_for = |count: usize| {
            for _ in 0..1000 {
                if listing().len() == others.len() + count {
                    return;
                }
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            panic!("{:?}", listing());
        };
        let mut killed = writer();
        wait_for(1);
        // Another one at the same time leaves it alone, and so does this process.
        let mut alive = writer();
        wait_for(2);
        write();
        wait_for(3);
        killed.kill().unwrap();
        killed.wait().unwrap();
        wait_for(3);
        write();
        wait_for(2);
        alive.kill().unwrap();
        alive.wait().unwrap();
        write();
        let mut expected = others.map(str::to_owned).to_vec();
        expected.push("model.gguf".to_owned());
        expected.sort();
        assert_eq!(listing(), expected);
    }
}
