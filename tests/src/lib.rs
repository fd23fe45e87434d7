//! What the tests across the crates share: fixtures, goldens and comparisons.
#![forbid(unsafe_code)]

pub mod golden;
pub mod hostile;
pub mod lift;
pub mod parity;
pub mod runner;

use std::path::{Path, PathBuf};

/// The folder of fixtures that the repository carries.
pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

/// The full set of goldens, where it is at hand: `PHI3_KIT`, or `shared/kit` beside the repository.
/// Prints why a test is skipped where it is not.
pub fn kit(test: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PHI3_KIT").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/kit"),
        PathBuf::from,
    );
    if path.is_dir() {
        return Some(path);
    }
    eprintln!("skipped: {test} needs the full kit of goldens; set PHI3_KIT to its folder");
    None
}
