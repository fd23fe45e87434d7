//! What can go wrong between a hub and its cache.

use std::io;
use std::path::PathBuf;

/// Why a model did not come from the hub or its cache. Messages say what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// 401, or 403 without a sign of a gate: the repo is private, gated or does not exist.
    #[error("{}", no_access(repo_id, page, *token_sent))]
    NoAccess {
        /// The repo.
        repo_id: String,
        /// The repo's web page.
        page: String,
        /// Whether a token went with the request.
        token_sent: bool,
    },
    /// The repo is gated: its licence has to be accepted.
    #[error("{}", gated(repo_id, page, *token_sent))]
    Gated {
        /// The repo.
        repo_id: String,
        /// The repo's web page.
        page: String,
        /// Whether a token went with the request.
        token_sent: bool,
    },
    /// There is no such repo.
    #[error("the hub at {endpoint} has no model {repo_id}: check the spelling of the repo id")]
    RepoNotFound {
        /// The repo.
        repo_id: String,
        /// The hub.
        endpoint: String,
    },
    /// 404 without the reason that a hub gives with it.
    #[error(
        "{endpoint} answered 404 for {repo_id} at revision {revision:?} without saying why: check the \
         spelling of both, and that this is the address of a model hub (HF_ENDPOINT)"
    )]
    NotFound {
        /// The repo.
        repo_id: String,
        /// The revision asked for.
        revision: String,
        /// The hub.
        endpoint: String,
    },
    /// The repo has no such branch, tag or commit.
    #[error(
        "{repo_id} has no revision {revision:?}: give a branch, tag or commit that {page}/commits lists"
    )]
    RevisionNotFound {
        /// The repo.
        repo_id: String,
        /// The revision asked for.
        revision: String,
        /// The repo's web page.
        page: String,
    },
    /// The repo has no such file.
    #[error(
        "{repo_id} has no file {file} at revision {revision}{}",
        after_colon(advice)
    )]
    FileNotFound {
        /// The repo.
        repo_id: String,
        /// The revision.
        revision: String,
        /// The file.
        file: String,
        /// What to do; may be empty.
        advice: String,
    },
    /// No connection to the hub, or it broke too often.
    #[error(
        "no connection to {host} ({reason}): check the network (and HTTPS_PROXY, HF_ENDPOINT), then run \
         the command again; what is already here is kept"
    )]
    Network {
        /// The host.
        host: String,
        /// What the network said.
        reason: String,
    },
    /// The hub asks to slow down.
    #[error(
        "{host} limits the number of requests (429): wait some minutes, or set HF_TOKEN, and run the command again"
    )]
    RateLimited {
        /// The host.
        host: String,
    },
    /// The hub has a problem of its own.
    #[error(
        "{host} answered {status} for {what} again and again: try later; what is already here is kept"
    )]
    Server {
        /// The host.
        host: String,
        /// The HTTP status.
        status: u16,
        /// What was asked for.
        what: String,
    },
    /// An answer that a hub does not give.
    #[error("{url}: {detail}; is this the address of a model hub? (HF_ENDPOINT)")]
    Protocol {
        /// The address.
        url: String,
        /// What is wrong with the answer.
        detail: String,
    },
    /// The file has another length than announced.
    #[error(
        "{file}: expected {expected} bytes, {host} gives {found}: not stored; run the command again"
    )]
    WrongLength {
        /// The file.
        file: String,
        /// Where it came from.
        host: String,
        /// Bytes announced.
        expected: u64,
        /// Bytes that came.
        found: u64,
    },
    /// The file's content is not what the hub announced.
    #[error(
        "{file}: expected sha256 {expected}, got {found}: damaged on the way, not stored; run the \
         command again, and if it happens again do not trust {host}"
    )]
    WrongHash {
        /// The file.
        file: String,
        /// Where it came from.
        host: String,
        /// sha256 announced, in hexadecimal.
        expected: String,
        /// sha256 of what came.
        found: String,
    },
    /// No space left for the file.
    #[error(
        "the disk is full: {file} needs {needed} more bytes in {}; make room, or set HF_HUB_CACHE to \
         another disk, and run the command again to go on where it stopped",
        folder.display()
    )]
    DiskFull {
        /// The file.
        file: String,
        /// Bytes still missing.
        needed: u64,
        /// The folder on the full disk.
        folder: PathBuf,
    },
    /// The cache cannot be read or written.
    #[error("{action} {}: {source}", path.display())]
    Cache {
        /// What was being done, as a participle.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Neither an option nor the environment says where the cache is.
    #[error("no home directory: set HF_HOME or HF_HUB_CACHE to a folder for downloaded models")]
    NoCacheFolder,
    /// Offline, and not everything is in the cache.
    #[error(
        "offline (HF_HUB_OFFLINE), and {file} of {repo_id} at revision {revision} is not in {}: run \
         `{command}` once while connected",
        cache.display()
    )]
    NotCached {
        /// The repo.
        repo_id: String,
        /// The revision asked for.
        revision: String,
        /// The first file that is missing.
        file: String,
        /// The cache.
        cache: PathBuf,
        /// The command that downloads it.
        command: String,
    },
    /// An address or a token that cannot be used.
    #[error("{name} is not usable: {detail}")]
    Setting {
        /// The environment variable that the setting usually comes from.
        name: &'static str,
        /// What is wrong with it. Never shows a token.
        detail: String,
    },
}

impl HubError {
    /// Whether trying again later, or using what is cached, makes sense.
    pub fn is_unreachable(&self) -> bool {
        matches!(
            self,
            Self::Network { .. } | Self::RateLimited { .. } | Self::Server { .. }
        )
    }
}

fn after_colon(text: &str) -> String {
    if text.is_empty() {
        String::new()
    } else {
        format!(": {text}")
    }
}

fn no_access(repo_id: &str, page: &str, token_sent: bool) -> String {
    if token_sent {
        format!(
            "the token has no access to {repo_id}, or there is no such model: check the spelling, that \
             HF_TOKEN is valid, and that its account can read {page}"
        )
    } else {
        format!(
            "{repo_id} does not exist, or is private or gated: check the spelling; for a private or gated \
             model accept its licence at {page} and set HF_TOKEN to a token of that account"
        )
    }
}

fn gated(repo_id: &str, page: &str, token_sent: bool) -> String {
    if token_sent {
        format!(
            "{repo_id} is gated, and the account of this token has no access: accept the licence at {page}"
        )
    } else {
        format!(
            "{repo_id} is gated: accept its licence at {page} and set HF_TOKEN to a token of that account"
        )
    }
}
