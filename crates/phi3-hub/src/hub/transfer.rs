//! One file's bytes: resumed, counted and hashed on their way to the disk.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use ureq::http::{HeaderMap, StatusCode, header};

use super::cache;
use super::error::HubError;
use super::failure::{Failure, host, network};
use super::http::{About, Client};
use super::progress::Progress;

/// An attempt that brought this much counts as a success, however it ended.
const PROGRESS_BYTES: u64 = 1 << 20;

/// A file to fetch.
#[derive(Clone, Copy)]
pub(crate) struct Job<'a> {
    pub(crate) url: &'a str,
    pub(crate) about: About<'a>,
    /// Name to show.
    pub(crate) file: &'a str,
    /// Size that HEAD gave.
    pub(crate) size: Option<u64>,
    /// sha256 in hexadecimal, if the ETag is one.
    pub(crate) sha256: Option<&'a str>,
    /// Where the bytes collect.
    pub(crate) incomplete: &'a Path,
}

/// Fetches what is missing of a file. Afterwards the whole verified file lies at `job.incomplete`.
pub(crate) fn fetch(
    client: &Client,
    job: Job<'_>,
    progress: &dyn Progress,
) -> Result<(), HubError> {
    let result = attempts(client, job, progress);
    match &result {
        Ok(()) => progress.finish(job.file),
        Err(_) => progress.fail(job.file),
    }
    result
}

fn attempts(client: &Client, job: Job<'_>, progress: &dyn Progress) -> Result<(), HubError> {
    let mut partial = Partial::open(job)?;
    let mut resumed = partial.len > 0;
    let mut backoff = client.backoff();
    progress.start(job.file, job.size.unwrap_or(0), partial.len);
    loop {
        let before = partial.len;
        let attempt = attempt(client, job, &mut partial, progress);
        if partial.len.saturating_sub(before) >= PROGRESS_BYTES {
            backoff.reset();
        }
        let host = match attempt {
            Ok(host) => host,
            Err(failure) => {
                backoff.wait_or_give_up(failure)?;
                continue;
            }
        };
        let found = partial.sha256();
        match job.sha256 {
            Some(expected) if !expected.eq_ignore_ascii_case(&found) => {
                // What an earlier run left may be what is wrong, so that is no verdict on the server.
                let error = HubError::WrongHash {
                    file: job.file.to_owned(),
                    host,
                    expected: expected.to_owned(),
                    found,
                };
                partial.restart()?;
                if !resumed {
                    partial.remove();
                    return Err(error);
                }
                tracing::warn!(%error, "starting this file again");
                resumed = false;
                progress.start(job.file, job.size.unwrap_or(0), 0);
            }
            _ => return partial.sync(),
        }
    }
}

/// One request for the rest of the file. On success the file has its full length; returns the host
/// that it came from.
fn attempt(
    client: &Client,
    job: Job<'_>,
    partial: &mut Partial<'_>,
    progress: &dyn Progress,
) -> Result<String, Failure> {
    if job.size.is_some_and(|size| partial.len > size) {
        partial.restart()?;
        progress.start(job.file, job.size.unwrap_or(0), 0);
    }
    if job.size == Some(partial.len) {
        return Ok(client.endpoint().to_owned());
    }
    let offset = partial.len;
    let (mut response, uri) = client.get(job.url, offset)?;
    let host = host(&uri);
    let length = number(response.headers(), header::CONTENT_LENGTH.as_str());
    let usable = match response.status() {
        StatusCode::OK => {
            if offset > 0 {
                tracing::debug!(file = job.file, "the server has no ranges: from the start");
                partial.restart()?;
                progress.start(job.file, job.size.unwrap_or(0), 0);
            }
            true
        }
        StatusCode::PARTIAL_CONTENT => {
            offset > 0 && continues(response.headers(), offset, job.size)
        }
        StatusCode::RANGE_NOT_SATISFIABLE => false,
        _ => return Err(client.refused(&response, &uri, job.about)),
    };
    if !usable {
        let error = HubError::Protocol {
            url: host,
            detail: format!(
                "{}: the range in the answer is not the one asked for",
                job.file
            ),
        };
        if offset == 0 {
            return Err(Failure::fatal(error));
        }
        partial.restart()?;
        progress.start(job.file, job.size.unwrap_or(0), 0);
        return Err(Failure::transient(error));
    }

    let announced = length.map(|length| partial.len.saturating_add(length));
    let Some(size) = job.size.or(announced) else {
        if job.sha256.is_none() {
            return Err(Failure::fatal(HubError::Protocol {
                url: host,
                detail: format!(
                    "{} comes with neither size nor sha256, so it cannot be verified",
                    job.file
                ),
            }));
        }
        copy(
            &mut response.body_mut().as_reader(),
            partial,
            u64::MAX,
            job,
            progress,
        )
        .map_err(|stop| stop.failure(&uri))?;
        return Ok(host);
    };
    let wrong_length = |found| HubError::WrongLength {
        file: job.file.to_owned(),
        host: host.clone(),
        expected: size,
        found,
    };
    if let Some(announced) = announced
        && announced != size
    {
        return Err(Failure::fatal(wrong_length(announced)));
    }
    // One byte more than there should be is enough to know.
    let mut body = response
        .body_mut()
        .as_reader()
        .take((size - partial.len).saturating_add(1));
    copy(&mut body, partial, size, job, progress).map_err(|stop| stop.failure(&uri))?;
    if partial.len > size {
        let found = partial.len;
        partial.restart()?;
        partial.remove();
        return Err(Failure::fatal(wrong_length(found)));
    }
    if partial.len < size {
        let cut = io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!("the connection ended after {} of {size} bytes", partial.len),
        );
        return Err(Failure::transient(network(&uri, &cut)));
    }
    Ok(host)
}

/// Why a copy stopped early.
enum Stop {
    Network(io::Error),
    Disk(HubError),
}

impl Stop {
    fn failure(self, uri: &ureq::http::Uri) -> Failure {
        match self {
            Self::Network(error) => Failure::transient(network(uri, &error)),
            Self::Disk(error) => Failure::fatal(error),
        }
    }
}

fn copy(
    body: &mut impl Read,
    partial: &mut Partial<'_>,
    size: u64,
    job: Job<'_>,
    progress: &dyn Progress,
) -> Result<(), Stop> {
    let mut buffer = vec![0; 1 << 17];
    loop {
        let read = match body.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Stop::Network(error)),
        };
        let bytes = buffer.get(..read).unwrap_or_default();
        partial.write(bytes, size).map_err(Stop::Disk)?;
        progress.advance(job.file, bytes.len() as u64);
    }
}

/// Whether a 206 continues at `offset` in a file of the expected size.
fn continues(headers: &HeaderMap, offset: u64, size: Option<u64>) -> bool {
    let range = headers
        .get(header::CONTENT_RANGE)
        .and_then(|value| value.to_str().ok());
    let Some((first, last, total)) = range.and_then(content_range) else {
        return false;
    };
    let known = size.or(total);
    first == offset
        && last >= first
        && (total.is_none() || known == total)
        && known.is_none_or(|size| last.checked_add(1) == Some(size))
}

/// `bytes 5-9/10` or `bytes 5-9/*`.
fn content_range(value: &str) -> Option<(u64, u64, Option<u64>)> {
    let (range, total) = value.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let total = if total == "*" {
        None
    } else {
        Some(total.parse().ok()?)
    };
    Some((first.parse().ok()?, last.parse().ok()?, total))
}

fn number(headers: &HeaderMap, name: &str) -> Option<u64> {
    headers.get(name)?.to_str().ok()?.trim().parse().ok()
}

/// A file that is growing, and the hash of what is in it.
struct Partial<'a> {
    job: Job<'a>,
    file: File,
    len: u64,
    hasher: Sha256,
}

impl<'a> Partial<'a> {
    fn open(job: Job<'a>) -> Result<Self, HubError> {
        let io = |source| cache::error("opening", job.incomplete, source);
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(job.incomplete)
            .map_err(io)?;
        let mut partial = Self {
            job,
            file,
            len: 0,
            hasher: Sha256::new(),
        };
        let mut buffer = vec![0; 1 << 17];
        loop {
            let read = partial.file.read(&mut buffer).map_err(io)?;
            if read == 0 {
                return Ok(partial);
            }
            partial
                .hasher
                .update(buffer.get(..read).unwrap_or_default());
            partial.len += read as u64;
        }
    }

    fn write(&mut self, bytes: &[u8], size: u64) -> Result<(), HubError> {
        self.file.write_all(bytes).map_err(|source| {
            write_error(
                self.job.file,
                self.job.incomplete,
                size.saturating_sub(self.len),
                source,
            )
        })?;
        self.hasher.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    fn restart(&mut self) -> Result<(), HubError> {
        self.file
            .set_len(0)
            .and_then(|()| self.file.seek(SeekFrom::Start(0)))
            .map_err(|source| cache::error("emptying", self.job.incomplete, source))?;
        self.hasher = Sha256::new();
        self.len = 0;
        Ok(())
    }

    fn sha256(&self) -> String {
        self.hasher
            .clone()
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    /// To the disk, so that a file with its final name is whole even after a power cut.
    fn sync(&self) -> Result<(), HubError> {
        self.file
            .sync_all()
            .map_err(|source| write_error(self.job.file, self.job.incomplete, 0, source))
    }

    fn remove(&self) {
        if let Err(error) = fs::remove_file(self.job.incomplete) {
            tracing::debug!(%error, path = %self.job.incomplete.display(), "partial file stays");
        }
    }
}

fn write_error(file: &str, path: &Path, needed: u64, source: io::Error) -> HubError {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => HubError::DiskFull {
            file: file.to_owned(),
            needed,
            folder: path.parent().map_or_else(PathBuf::new, Path::to_owned),
        },
        _ => cache::error("writing", path, source),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges() {
        assert_eq!(content_range("bytes 5-9/10"), Some((5, 9, Some(10))));
        assert_eq!(content_range("bytes 5-9/*"), Some((5, 9, None)));
        for bad in [
            "",
            "bytes */10",
            "bytes 5-/10",
            "5-9/10",
            "bytes 5-9",
            "bytes -1-9/10",
        ] {
            assert_eq!(content_range(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_206_must_continue_where_the_file_ends() {
        let check = |range: &str, offset, size| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_RANGE, range.parse().unwrap());
            continues(&headers, offset, size)
        };
        assert!(check("bytes 5-9/10", 5, Some(10)));
        assert!(check("bytes 5-9/*", 5, Some(10)));
        assert!(check("bytes 5-9/10", 5, None));
        assert!(!check("bytes 4-9/10", 5, Some(10)), "other start");
        assert!(!check("bytes 5-8/10", 5, Some(10)), "stops early");
        assert!(!check("bytes 5-10/11", 5, Some(10)), "other file");
        assert!(!check("bytes 9-5/10", 9, Some(10)), "backwards");
        assert!(
            !check("bytes 5-18446744073709551615/*", 5, Some(10)),
            "overflow"
        );
        assert!(!continues(&HeaderMap::new(), 5, Some(10)), "no header");
    }

    #[test]
    fn a_full_disk_says_how_much_is_missing() {
        for kind in [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded] {
            let error = write_error(
                "model.safetensors",
                Path::new("cache/blobs/x"),
                123_456,
                kind.into(),
            );
            let text = error.to_string();
            assert!(
                matches!(
                    error,
                    HubError::DiskFull {
                        needed: 123_456,
                        ..
                    }
                ),
                "{text}"
            );
            assert!(
                text.contains("123456")
                    && text.contains("model.safetensors")
                    && text.contains("HF_HUB_CACHE")
            );
        }
        let other = write_error(
            "a",
            Path::new("b"),
            1,
            io::ErrorKind::PermissionDenied.into(),
        );
        assert!(matches!(other, HubError::Cache { .. }));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_system_reports_a_full_disk_as_such() {
        let folder = tempfile::tempdir().unwrap();
        let incomplete = folder.path().join("x.incomplete");
        let job = Job {
            url: "http://127.0.0.1/x",
            about: About {
                repo_id: "org/name",
                revision: "main",
                file: None,
            },
            file: "x",
            size: Some(1000),
            sha256: None,
            incomplete: &incomplete,
        };
        let mut partial = Partial::open(job).unwrap();
        partial.file = File::options().write(true).open("/dev/full").unwrap();
        let error = partial.write(&[0; 10], 1000).unwrap_err();
        assert!(
            matches!(error, HubError::DiskFull { needed: 1000, .. }),
            "{error}"
        );
    }
}
