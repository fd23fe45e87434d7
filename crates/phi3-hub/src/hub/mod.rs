//! Models from a hub, through a cache that Python's `huggingface_hub` shares.
//!
//! Naming of repos and the layout of the cache come from hf-hub 0.5, so that what one program
//! downloads the other finds. The transfer is this crate's own, on ureq: hf-hub 0.5 verifies no
//! hash, fails on a relative redirect, panics on one without `Location`, and reads neither
//! `HF_TOKEN`, `HF_HUB_CACHE` nor `HF_HUB_OFFLINE`; 1.0 brings some 300 crates, does not resume, has
//! no offline mode either, and stores the error page when a GET fails after a good HEAD.
//!
//! A file is asked for by HEAD (commit, ETag, size), written to `blobs/<etag>.incomplete`, resumed
//! there by Range after a cut, verified (size; sha256 where the ETag is one), renamed to
//! `blobs/<etag>` and only then linked as `snapshots/<commit>/<file>`. The branch's name in `refs/`
//! follows when all files are there, so an interrupted update never hides the complete older one.

mod cache;
mod download;
mod error;
mod failure;
mod http;
mod listing;
mod look;
mod options;
mod progress;
mod transfer;
mod url;

pub use download::download;
pub(crate) use download::{download_small, look};
pub use error::HubError;
pub(crate) use look::Seen;
pub use options::{HubOptions, RetryPolicy};
pub use progress::{NoProgress, Progress, TerminalProgress};
