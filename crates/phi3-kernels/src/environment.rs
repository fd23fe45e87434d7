//! The environment variables that steer the kernels.

use std::fmt;

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
    read("PHI3_THREADS", "a positive number of threads", |value| {
        value.trim().parse().ok().filter(|n| *n > 0)
    })
}

/// `PHI3_KERNELS`.
pub(crate) fn backend() -> Result<Option<crate::dispatch::Backend>, EnvironmentError> {
    read(
        "PHI3_KERNELS",
        "a backend that this processor has (scalar is on all)",
        |value| {
            let mut available = crate::dispatch::available().into_iter();
            available.find(|b| b.name().eq_ignore_ascii_case(value.trim()))
        },
    )
}

fn read<T>(
    variable: &'static str,
    expected: &'static str,
    parse: impl Fn(&str) -> Option<T>,
) -> Result<Option<T>, EnvironmentError> {
    let Some(value) = std::env::var_os(variable).filter(|v| !v.is_empty()) else {
        return Ok(None);
    };
    value
        .to_str()
        .and_then(parse)
        .map(Some)
        .ok_or_else(|| EnvironmentError {
            variable,
            value: value.to_string_lossy().into_owned(),
            expected,
        })
}
