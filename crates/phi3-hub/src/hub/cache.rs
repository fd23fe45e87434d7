//! The cache's folders: `blobs/<etag>`, `snapshots/<commit>/<file>` linking there, `refs/<revision>`.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use super::error::HubError;
use crate::names;

/// One repo's part of the cache.
pub(crate) struct RepoCache {
    root: PathBuf,
    folder: PathBuf,
    locks: PathBuf,
    repo: CacheRepo,
}

/// Held while one process works on a blob.
pub(crate) struct BlobLock {
    /// Unlocks when it is closed.
    _file: Option<File>,
}

impl RepoCache {
    pub(crate) fn new(root: PathBuf, repo_id: &str) -> Self {
        let repo = Repo::new(repo_id.to_owned(), RepoType::Model);
        let folder = root.join(repo.folder_name());
        let locks = root.join(".locks").join(repo.folder_name());
        let repo = Cache::new(root.clone()).repo(repo);
        Self {
            root,
            folder,
            locks,
            repo,
        }
    }

    /// The cache that this is a part of.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The commit that a branch or tag had when it was last downloaded; a commit hash is its own.
    pub(crate) fn commit(&self, revision: &str) -> Option<String> {
        if is_commit_hash(revision) {
            return Some(revision.to_owned());
        }
        let path = names::inside(&self.folder.join("refs"), revision)?;
        let commit = fs::read_to_string(path).ok()?.trim().to_owned();
        is_commit(&commit).then_some(commit)
    }

    /// The folder of a commit's files.
    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        self.repo.pointer_path(commit)
    }

    pub(crate) fn blob(&self, etag: &str) -> PathBuf {
        self.repo.blob_path(etag)
    }

    /// Makes the folder of a file that is about to be written.
    pub(crate) fn make_parent(path: &Path) -> Result<(), HubError> {
        match path.parent() {
            Some(parent) => {
                fs::create_dir_all(parent).map_err(|source| error("creating", parent, source))
            }
            None => Ok(()),
        }
    }

    /// Waits until no other process works on this blob. The lock is where and what Python's
    /// `huggingface_hub` takes.
    pub(crate) fn lock(&self, etag: &str) -> Result<BlobLock, HubError> {
        let path = self.locks.join(format!("{etag}.lock"));
        Self::make_parent(&path)?;
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|source| error("creating", &path, source))?;
        let locked = match file.try_lock() {
            Ok(()) => return Ok(BlobLock { _file: Some(file) }),
            Err(TryLockError::WouldBlock) => {
                tracing::info!("another process is downloading this file: waiting for it");
                file.lock()
            }
            Err(TryLockError::Error(source)) => Err(source),
        };
        match locked {
            Ok(()) => Ok(BlobLock { _file: Some(file) }),
            Err(source) if source.kind() == io::ErrorKind::Unsupported => {
                tracing::warn!(path = %path.display(), "this file system has no locks: let only one process download");
                Ok(BlobLock { _file: None })
            }
            Err(source) => Err(error("locking", &path, source)),
        }
    }

    /// Lets a snapshot's file lead to a blob: by a relative link, or a copy where links are not
    /// possible.
    pub(crate) fn link(&self, etag: &str, commit: &str, file: &str) -> Result<PathBuf, HubError> {
        self.link_by(etag, commit, file, symlink)
    }

    fn link_by(
        &self,
        etag: &str,
        commit: &str,
        file: &str,
        symlink: fn(&Path, &Path) -> io::Result<()>,
    ) -> Result<PathBuf, HubError> {
        let snapshot = self.snapshot(commit);
        let Some(pointer) = names::inside(&snapshot, file) else {
            return Err(error(
                "linking",
                &snapshot.join(file),
                io::ErrorKind::InvalidFilename.into(),
            ));
        };
        Self::make_parent(&pointer)?;
        let mut target = PathBuf::from("../..");
        for _ in 0..file.matches('/').count() {
            target.push("..");
        }
        target.push("blobs");
        target.push(etag);
        let new = beside(&pointer);
        if let Err(reason) = symlink(&target, &new) {
            tracing::debug!(%reason, file, "no link: copying");
            fs::copy(self.blob(etag), &new)
                .map_err(|source| error("copying to", &pointer, source))?;
        }
        fs::rename(&new, &pointer).map_err(|source| error("linking", &pointer, source))?;
        Ok(pointer)
    }

    /// Remembers which commit a branch or tag has.
    pub(crate) fn write_ref(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        if revision == commit {
            return Ok(());
        }
        let refs = self.folder.join("refs");
        let Some(path) = names::inside(&refs, revision) else {
            return Err(error(
                "writing",
                &refs.join(revision),
                io::ErrorKind::InvalidFilename.into(),
            ));
        };
        Self::make_parent(&path)?;
        let new = beside(&path);
        fs::write(&new, commit)
            .and_then(|()| fs::rename(&new, &path))
            .map_err(|source| error("writing", &path, source))
    }
}

/// A full hash: such a revision never changes.
pub(crate) fn is_commit_hash(revision: &str) -> bool {
    revision.len() == 40
        && revision
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// What may name a snapshot.
pub(crate) fn is_commit(commit: &str) -> bool {
    (1..=64).contains(&commit.len()) && commit.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

pub(crate) fn error(action: &'static str, path: &Path, source: io::Error) -> HubError {
    HubError::Cache {
        action,
        path: path.to_owned(),
        source,
    }
}

/// A name for a file that takes the place of `path` when it is ready.
fn beside(path: &Path) -> PathBuf {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let unique = COUNTER.fetch_add(1, Ordering::Relaxed);
    path.with_file_name(format!(".{name}.{}-{unique}.tmp", std::process::id()))
}

#[cfg(unix)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(windows)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_file(target, link)
}

#[cfg(not(any(unix, windows)))]
fn symlink(_target: &Path, _link: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn cache() -> (tempfile::TempDir, RepoCache) {
        let root = tempfile::tempdir().unwrap();
        let cache = RepoCache::new(root.path().join("hub"), "org/name");
        RepoCache::make_parent(&cache.blob("etag")).unwrap();
        fs::write(cache.blob("etag"), "content").unwrap();
        (root, cache)
    }

    #[test]
    fn a_link_is_relative_at_any_depth() {
        let (root, cache) = cache();
        for file in ["a.json", "sub/dir/a.json"] {
            cache.link("etag", COMMIT, file).unwrap();
        }
        // A cache that is moved keeps working.
        let moved = root.path().join("moved");
        fs::rename(root.path().join("hub"), &moved).unwrap();
        for file in ["a.json", "sub/dir/a.json"] {
            let path = moved
                .join("models--org--name/snapshots")
                .join(COMMIT)
                .join(file);
            assert_eq!(fs::read_to_string(&path).unwrap(), "content");
            assert!(cfg!(not(unix)) || path.is_symlink());
        }
    }

    #[test]
    fn without_links_the_blob_is_copied() {
        let (_root, cache) = cache();
        let pointer = cache
            .link_by("etag", COMMIT, "a.json", |_, _| {
                Err(io::ErrorKind::Unsupported.into())
            })
            .unwrap();
        assert!(!pointer.is_symlink());
        assert_eq!(fs::read_to_string(pointer).unwrap(), "content");
    }

    #[test]
    fn a_dangling_link_is_replaced() {
        let (_root, cache) = cache();
        let pointer = cache.link("gone", COMMIT, "a.json").unwrap();
        assert!(!pointer.exists());
        cache.link("etag", COMMIT, "a.json").unwrap();
        assert_eq!(fs::read_to_string(pointer).unwrap(), "content");
    }

    #[test]
    fn names_that_leave_the_snapshot_are_refused() {
        let (_root, cache) = cache();
        for file in ["../a", "/a", "a/../../../b"] {
            assert!(cache.link("etag", COMMIT, file).is_err(), "{file}");
        }
        assert!(cache.write_ref("../x", COMMIT).is_err());
        assert_eq!(cache.commit("../x"), None);
    }

    #[test]
    fn refs_may_contain_slashes_and_are_checked() {
        let (root, cache) = cache();
        cache.write_ref("refs/pr/1", COMMIT).unwrap();
        assert_eq!(cache.commit("refs/pr/1").as_deref(), Some(COMMIT));
        assert_eq!(cache.commit(COMMIT).as_deref(), Some(COMMIT));
        assert_eq!(cache.commit("main"), None);
        let refs = root.path().join("hub/models--org--name/refs");
        fs::write(refs.join("main"), "../../elsewhere").unwrap();
        assert_eq!(cache.commit("main"), None);
        fs::write(refs.join("main"), format!("{COMMIT}\n")).unwrap();
        assert_eq!(cache.commit("main").as_deref(), Some(COMMIT));
    }

    #[test]
    fn a_lock_is_held_until_dropped() {
        let (root, cache) = cache();
        let lock = cache.lock("etag").unwrap();
        let path = root.path().join("hub/.locks/models--org--name/etag.lock");
        let other = File::options().write(true).open(path).unwrap();
        assert!(matches!(other.try_lock(), Err(TryLockError::WouldBlock)));
        drop(lock);
        other.try_lock().unwrap();
    }
}
