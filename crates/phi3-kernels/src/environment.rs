//! The environment variables that steer the kernels.

use std::ffi::OsString;
use std::fmt;

use crate::dispatch::{self, Backend};

/// An environment variable with a value that means nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EnvironmentError {
    variable: &'static str,
    value: String,
    expected: &'static str,
}

impl fmt::Display for EnvironmentError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "environment variable {}: expected {}, found {:?}",
            self.variable, self.expected, self.value
        )
    }
}

impl std::error::Error for EnvironmentError {}

/// Checks `PHI3_THREADS` and `PHI3_KERNELS`. The kernels take the default in place of a value
/// that means nothing; a program calls this at its start to report it instead.
///
/// # Errors
/// The first variable whose value means nothing, or asks for a backend that this processor
/// does not have.
pub fn check_environment() -> Result<(), EnvironmentError> {
    threads()?;
    backend().map(|_| ())
}

/// `PHI3_THREADS`.
pub(crate) fn threads() -> Result<Option<usize>, EnvironmentError> {
    parse_threads(std::env::var_os(THREADS))
}

/// `PHI3_KERNELS`.
pub(crate) fn backend() -> Result<Option<Backend>, EnvironmentError> {
    parse_backend(std::env::var_os(KERNELS))
}

const THREADS: &str = "PHI3_THREADS";
const KERNELS: &str = "PHI3_KERNELS";

fn parse_threads(value: Option<OsString>) -> Result<Option<usize>, EnvironmentError> {
    parse(THREADS, value, "a positive number of threads", |value| {
        value.parse().ok().filter(|n| *n > 0)
    })
}

fn parse_backend(value: Option<OsString>) -> Result<Option<Backend>, EnvironmentError> {
    let expected = "scalar, or a backend that this processor has";
    parse(KERNELS, value, expected, |value| {
        let mut available = dispatch::available().into_iter();
        available.find(|b| b.name().eq_ignore_ascii_case(value))
    })
}

/// An unset and an empty variable are the same: no wish.
fn parse<T>(
    variable: &'static str,
    value: Option<OsString>,
    expected: &'static str,
    parse: impl Fn(&str) -> Option<T>,
) -> Result<Option<T>, EnvironmentError> {
    let Some(value) = value.filter(|v| !v.is_empty()) else {
        return Ok(None);
    };
    let parsed = value.to_str().and_then(|v| parse(v.trim()));
    parsed.map(Some).ok_or_else(|| EnvironmentError {
        variable,
        value: value.to_string_lossy().into_owned(),
        expected,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_mean_nothing_are_named() {
        let threads = |v: &str| parse_threads(Some(v.into()));
        assert_eq!(parse_threads(None), Ok(None));
        assert_eq!(threads(""), Ok(None));
        assert_eq!(threads(" 3 "), Ok(Some(3)));
        for value in ["0", "-1", "two", "1.5"] {
            let message = threads(value).unwrap_err().to_string();
            assert_eq!(
                message,
                format!(
                    "environment variable PHI3_THREADS: expected a positive number of threads, \
                     found {value:?}"
                )
            );
        }

        let backend = |v: &str| parse_backend(Some(v.into())).map(|b| b.map(|b| b.name()));
        assert_eq!(backend("Scalar"), Ok(Some("scalar")));
        assert!(backend("sse9").unwrap_err().to_string().contains("sse9"));
    }
}
