//! From a source to a folder or file on disk.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::cache::{RepoCache, error as cache_error, is_commit, is_commit_hash};
use super::error::HubError;
use super::http::{About, Client, Metadata};
use super::listing::{Listing, Selection, Want};
use super::look::Seen;
use super::options::HubOptions;
use super::transfer::{self, Job};
use crate::checkpoint::files_with_suffix;
use crate::error::Error;
use crate::names;
use crate::safetensors::{INDEX, SINGLE, read_weight_map};
use crate::source::{Source, check_repo_id};

/// Makes sure that a model is on disk, and says where: a folder, or a GGUF file. Of a repo only the
/// files that are needed come: config, tokenizer, chat template and safetensors, or one GGUF file.
///
/// Offline, or for a commit hash that is complete in the cache, no request is made. If the hub
/// cannot be reached and the cache has the revision complete, that is used with a warning.
///
/// # Errors
/// [`Error::Hub`] with the reason, or what is wrong with the repo's content.
pub fn download(source: &Source, options: &HubOptions) -> Result<PathBuf, Error> {
    match Download::of(source, options, Want::Model)? {
        Ok(download) => download.run(),
        Err(path) => Ok(path),
    }
}

/// [`download`] of the small files alone, if the model is one in Hugging Face's layout.
pub(crate) fn download_small(source: &Source, options: &HubOptions) -> Result<PathBuf, Error> {
    match Download::of(source, options, Want::Small)? {
        Ok(download) => download.run(),
        Err(path) => Ok(path),
    }
}

/// What the model consists of; the weights are not fetched for that.
pub(crate) fn look(source: &Source, options: &HubOptions) -> Result<Seen, Error> {
    match Download::of(source, options, Want::Model)? {
        Ok(download) => download.look(),
        Err(path) => Ok(Seen::Here(path)),
    }
}

/// A [`Source`] can be made by hand; these two become parts of paths.
fn check(repo_id: &str, revision: &str) -> Result<(), Error> {
    let wrong = |detail: &str| Error::NotAModel {
        model: repo_id.to_owned(),
        detail: detail.to_owned(),
    };
    check_repo_id(repo_id).map_err(wrong)?;
    if !names::is_safe(revision) {
        return Err(wrong(&format!(
            "{revision:?} cannot be a branch, tag or commit"
        )));
    }
    Ok(())
}

pub(super) struct Download<'a> {
    repo_id: &'a str,
    revision: &'a str,
    want: Want<'a>,
    cache: RepoCache,
    options: &'a HubOptions,
}

/// What the hub says a repo has, or what is used in its stead.
pub(super) enum Listed {
    Found(Box<Client>, Listing),
    Cached(PathBuf),
}

impl<'a> Download<'a> {
    /// The download that brings `source`, or where it is already. One file of a repo is that file,
    /// whatever else is wanted.
    fn of(
        source: &'a Source,
        options: &'a HubOptions,
        want: Want<'a>,
    ) -> Result<Result<Self, PathBuf>, Error> {
        match source {
            Source::Folder(path) | Source::Gguf(path) => Ok(Err(path.clone())),
            Source::Hub {
                repo_id,
                revision,
                gguf_file,
            } => {
                check(repo_id, revision)?;
                Ok(Ok(Self {
                    repo_id,
                    revision,
                    want: gguf_file.as_deref().map_or(want, Want::File),
                    cache: RepoCache::new(options.cache_folder()?, repo_id),
                    options,
                }))
            }
        }
    }
}

impl Download<'_> {
    fn run(&self) -> Result<PathBuf, Error> {
        match self.list()? {
            Listed::Cached(path) => Ok(path),
            Listed::Found(client, listing) => self.fetch(&client, &listing),
        }
    }

    pub(super) fn about(&self) -> About<'_> {
        About {
            repo_id: self.repo_id,
            revision: self.revision,
            file: None,
        }
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.cache.snapshot(commit)
    }

    pub(super) fn list(&self) -> Result<Listed, Error> {
        if self.options.offline {
            let cached = self.cached()?;
            return Ok(Listed::Cached(
                cached.map_err(|file| self.not_cached(file))?,
            ));
        }
        if is_commit_hash(self.revision)
            && let Ok(path) = self.cached()?
            && has_tokenizer(&path)?
        {
            return Ok(Listed::Cached(path));
        }
        let client = Client::new(self.options)?;
        match Listing::fetch(&client, self.about()) {
            Ok(listing) => Ok(Listed::Found(Box::new(client), listing)),
            Err(error) if error.is_unreachable() => match self.cached()? {
                Ok(path) => {
                    tracing::warn!(%error, model = self.repo_id, "using what is in the cache");
                    Ok(Listed::Cached(path))
                }
                Err(_) => Err(error.into()),
            },
            Err(error) => Err(error.into()),
        }
    }

    /// The commit, and the files of it that are needed.
    pub(super) fn select(
        &self,
        client: &Client,
        listing: &Listing,
    ) -> Result<(String, Selection), Error> {
        let selection = listing.select(self.want, self.about())?;
        Ok((self.commit(client, listing, &selection)?, selection))
    }

    pub(super) fn fetch(&self, client: &Client, listing: &Listing) -> Result<PathBuf, Error> {
        let (commit, selection) = self.select(client, listing)?;
        // From here on by commit, so that a branch that moves meanwhile mixes nothing.
        let about = About {
            revision: &commit,
            ..self.about()
        };
        let snapshot = self.cache.snapshot(&commit);
        let path = match selection {
            Selection::Gguf(file) => self.ensure(client, about, &file)?,
            Selection::Single(files) => {
                for file in &files {
                    self.ensure(client, about, file)?;
                }
                snapshot
            }
            Selection::Small(files) => {
                for file in &files {
                    self.ensure(client, about, file)?;
                }
                self.remember(&commit)?;
                return Ok(snapshot);
            }
            Selection::Sharded(files) => {
                for file in &files {
                    self.ensure(client, about, file)?;
                }
                for shard in shards(&snapshot)? {
                    self.ensure(client, about, &shard)?;
                }
                snapshot
            }
        };
        self.cache.write_ref(self.revision, &commit)?;
        Ok(path)
    }

    /// Lets the revision's name lead to a commit of which only the small files are here, unless it
    /// leads to one already, which may be complete.
    pub(super) fn remember(&self, commit: &str) -> Result<(), HubError> {
        match self.cache.commit(self.revision) {
            Some(_) => Ok(()),
            None => self.cache.write_ref(self.revision, commit),
        }
    }

    /// The commit that the revision stands for: from the listing, else from a file's headers.
    fn commit(
        &self,
        client: &Client,
        listing: &Listing,
        selection: &Selection,
    ) -> Result<String, HubError> {
        let commit = match (&listing.commit, selection) {
            (Some(commit), _) => Some(commit.clone()),
            (None, Selection::Gguf(file)) => self.head(client, file)?.commit,
            (None, Selection::Single(_) | Selection::Sharded(_) | Selection::Small(_)) => {
                self.head(client, "config.json")?.commit
            }
        };
        commit
            .filter(|commit| is_commit(commit))
            .ok_or_else(|| HubError::Protocol {
                url: client.endpoint().to_owned(),
                detail: format!(
                    "the answer does not say which commit {} of {} is",
                    self.revision, self.repo_id
                ),
            })
    }

    fn head(&self, client: &Client, file: &str) -> Result<Metadata, HubError> {
        client.metadata(
            About {
                repo_id: self.repo_id,
                revision: self.revision,
                file: Some(file),
            },
            file,
        )
    }

    /// Makes sure that one file of the snapshot is there.
    pub(super) fn ensure(
        &self,
        client: &Client,
        about: About<'_>,
        file: &str,
    ) -> Result<PathBuf, Error> {
        let snapshot = self.cache.snapshot(about.revision);
        let pointer = names::inside(&snapshot, file).ok_or_else(|| Error::UnsafeName {
            origin: self.repo_id.to_owned(),
            name: file.to_owned(),
        })?;
        if pointer.is_file() {
            return Ok(pointer);
        }
        let about = About {
            file: Some(file),
            ..about
        };
        let metadata = client.metadata(about, file)?;
        let blob = self.cache.blob(&metadata.etag);
        if !is_complete(&blob, metadata.size) {
            RepoCache::make_parent(&blob)?;
            let _lock = self.cache.lock(&metadata.etag)?;
            // Another process may have brought it while this one waited.
            if !is_complete(&blob, metadata.size) {
                self.transfer(client, about, file, &metadata, &blob)?;
            }
        }
        Ok(self.cache.link(&metadata.etag, about.revision, file)?)
    }

    fn transfer(
        &self,
        client: &Client,
        about: About<'_>,
        file: &str,
        metadata: &Metadata,
        blob: &Path,
    ) -> Result<(), HubError> {
        let incomplete = blob.with_file_name(format!("{}.incomplete", metadata.etag));
        let job = Job {
            url: &client.file_url(self.repo_id, about.revision, file),
            about,
            file,
            size: metadata.size,
            sha256: is_sha256(&metadata.etag).then_some(metadata.etag.as_str()),
            incomplete: &incomplete,
        };
        transfer::fetch(client, job, &*self.options.progress)?;
        fs::rename(&incomplete, blob).map_err(|source| cache_error("completing", blob, source))
    }

    /// Where the cache has what is wanted, or the first file that it lacks.
    fn cached(&self) -> Result<Result<PathBuf, String>, Error> {
        let first = match self.want {
            Want::Model | Want::Small => "config.json",
            Want::File(file) => file,
        };
        let Some(commit) = self.cache.commit(self.revision) else {
            return Ok(Err(first.to_owned()));
        };
        let snapshot = self.cache.snapshot(&commit);
        if let Want::File(file) = self.want {
            let path = names::inside(&snapshot, file).filter(|path| path.is_file());
            return Ok(path.ok_or_else(|| file.to_owned()));
        }
        let has = |file: &str| snapshot.join(file).is_file();
        if matches!(self.want, Want::Small) && has("config.json") && has_tokenizer(&snapshot)? {
            return Ok(Ok(snapshot));
        }
        if !has(SINGLE) && !has(INDEX) {
            let gguf = files_with_suffix(&snapshot, ".gguf")?;
            return Ok(match gguf.as_slice() {
                [path] => Ok(path.clone()),
                _ if has("config.json") => Err(SINGLE.to_owned()),
                _ => Err("config.json".to_owned()),
            });
        }
        let needed = if has(SINGLE) {
            BTreeSet::new()
        } else {
            shards(&snapshot)?
        };
        let missing = std::iter::once("config.json".to_owned())
            .chain(needed)
            .find(|file| !has(file));
        Ok(match missing {
            Some(file) => Err(file),
            None => Ok(snapshot),
        })
    }

    fn not_cached(&self, file: String) -> HubError {
        let mut command = format!("phi3 download {}", self.repo_id);
        if let Want::File(file) = self.want {
            command.push_str(&format!("/{file}"));
        }
        if self.revision != "main" {
            command.push_str(&format!(" --revision {}", self.revision));
        }
        HubError::NotCached {
            repo_id: self.repo_id.to_owned(),
            revision: self.revision.to_owned(),
            file,
            cache: self.cache.root().to_owned(),
            command,
        }
    }
}

/// Other programs fetch tokenizer and weights separately, so a cache that has the weights may lack
/// the tokenizer. A GGUF file has its own.
fn has_tokenizer(path: &Path) -> Result<bool, Error> {
    Ok(path.is_file()
        || path.join("tokenizer.json").is_file()
        || !files_with_suffix(path, ".tiktoken")?.is_empty())
}

/// The files that a snapshot's index names.
fn shards(snapshot: &Path) -> Result<BTreeSet<String>, Error> {
    Ok(read_weight_map(&snapshot.join(INDEX))?
        .into_iter()
        .map(|(_, shard)| shard)
        .collect())
}

fn is_complete(blob: &Path, size: Option<u64>) -> bool {
    fs::metadata(blob)
        .is_ok_and(|found| found.is_file() && size.is_none_or(|size| found.len() == size))
}

fn is_sha256(etag: &str) -> bool {
    etag.len() == 64 && etag.bytes().all(|byte| byte.is_ascii_hexdigit())
}
