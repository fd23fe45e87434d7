//! Failed requests: which of them to try again, when, and how to name them.

use std::error::Error;
use std::io;
use std::thread;
use std::time::Duration;

use ureq::Timeout;
use ureq::http::Uri;

use super::error::HubError;
use super::options::RetryPolicy;

/// A failed request.
#[derive(Debug)]
pub(crate) enum Failure {
    /// May succeed when tried again, after this time if the server named one.
    Transient(Box<HubError>, Option<Duration>),
    /// Will not.
    Fatal(Box<HubError>),
}

impl Failure {
    pub(crate) fn transient(error: HubError) -> Self {
        Self::Transient(Box::new(error), None)
    }

    pub(crate) fn fatal(error: HubError) -> Self {
        Self::Fatal(Box::new(error))
    }
}

impl From<HubError> for Failure {
    fn from(error: HubError) -> Self {
        Self::fatal(error)
    }
}

/// Failures in a row, and the growing pauses between them.
#[derive(Debug)]
pub(crate) struct Backoff {
    retry: RetryPolicy,
    failures: u32,
}

impl Backoff {
    pub(crate) fn new(retry: RetryPolicy) -> Self {
        Self { retry, failures: 0 }
    }

    /// Something came through: the next failure is a first one again.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }

    /// Sleeps before the next attempt, or hands the error back if it is fatal or one too many.
    pub(crate) fn wait_or_give_up(&mut self, failure: Failure) -> Result<(), HubError> {
        let (error, asked) = match failure {
            Failure::Fatal(error) => return Err(*error),
            Failure::Transient(error, asked) => (error, asked),
        };
        self.failures += 1;
        if self.failures >= self.retry.attempts.max(1) {
            return Err(*error);
        }
        let pause = match asked {
            Some(asked) => asked.min(Duration::from_secs(60)),
            None => self
                .retry
                .delay
                .saturating_mul(1 << (self.failures - 1).min(4)),
        };
        tracing::debug!(%error, ?pause, attempt = self.failures, "trying again");
        thread::sleep(pause);
        Ok(())
    }
}

pub(crate) fn network(uri: &Uri, error: &dyn Error) -> HubError {
    let text = error.to_string();
    HubError::Network {
        host: host(uri),
        reason: text.strip_prefix("io: ").unwrap_or(&text).to_owned(),
    }
}

pub(crate) fn host(uri: &Uri) -> String {
    uri.authority().map_or_else(
        || uri.to_string(),
        |authority| {
            let text = authority.as_str();
            text.rsplit_once('@')
                .map_or(text, |(_, host)| host)
                .to_owned()
        },
    )
}

/// An address as it may be shown: a signed address carries its permission in the query.
pub(crate) fn without_query(uri: &Uri) -> String {
    format!(
        "{}://{}{}",
        uri.scheme_str().unwrap_or("http"),
        host(uri),
        uri.path()
    )
}

/// Whether the same request may succeed later. A certificate that does not fit (invalid data, to
/// the TLS library) stays so.
pub(crate) fn is_transient(error: &ureq::Error) -> bool {
    match error {
        ureq::Error::Io(error) => error.kind() != io::ErrorKind::InvalidData,
        ureq::Error::Timeout(_)
        | ureq::Error::HostNotFound
        | ureq::Error::ConnectionFailed
        | ureq::Error::Protocol(_) => true,
        _ => false,
    }
}

/// Whether there was not even a connection. Name lookups fail without a kind of their own, so this
/// is every error that is not about an existing connection.
pub(crate) fn is_unreachable(error: &ureq::Error) -> bool {
    match error {
        ureq::Error::HostNotFound
        | ureq::Error::ConnectionFailed
        | ureq::Error::Timeout(Timeout::Connect | Timeout::Resolve) => true,
        ureq::Error::Io(error) => !matches!(
            error.kind(),
            io::ErrorKind::UnexpectedEof
                | io::ErrorKind::ConnectionReset
                | io::ErrorKind::ConnectionAborted
                | io::ErrorKind::BrokenPipe
                | io::ErrorKind::TimedOut
                | io::ErrorKind::Interrupted
                | io::ErrorKind::WouldBlock
        ),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shown_address_has_no_secrets() {
        let uri: Uri = "https://me:pass@cdn.example/file?Signature=secret"
            .parse()
            .unwrap();
        assert_eq!(without_query(&uri), "https://cdn.example/file");
    }

    #[test]
    fn pauses_are_bounded_in_number() {
        let retry = RetryPolicy {
            attempts: 3,
            delay: Duration::ZERO,
        };
        let mut backoff = Backoff::new(retry);
        let failure = || {
            Failure::transient(HubError::RateLimited {
                host: "h".to_owned(),
            })
        };
        assert!(backoff.wait_or_give_up(failure()).is_ok());
        assert!(backoff.wait_or_give_up(failure()).is_ok());
        backoff.reset();
        assert!(backoff.wait_or_give_up(failure()).is_ok());
        assert!(backoff.wait_or_give_up(failure()).is_ok());
        assert!(backoff.wait_or_give_up(failure()).is_err());
        let fatal = Failure::fatal(HubError::NoCacheFolder);
        assert!(Backoff::new(retry).wait_or_give_up(fatal).is_err());
    }

    #[test]
    fn what_is_worth_another_attempt() {
        let io = |kind: io::ErrorKind| ureq::Error::Io(kind.into());
        // (error, may succeed later, there was no connection at all)
        for (error, transient, unreachable) in [
            (ureq::Error::HostNotFound, true, true),
            (
                ureq::Error::Io(io::Error::other("failed to lookup address")),
                true,
                true,
            ),
            (io(io::ErrorKind::ConnectionRefused), true, true),
            (ureq::Error::Timeout(Timeout::Connect), true, true),
            (ureq::Error::Timeout(Timeout::PerRead), true, false),
            (io(io::ErrorKind::ConnectionReset), true, false),
            (io(io::ErrorKind::UnexpectedEof), true, false),
            (io(io::ErrorKind::InvalidData), false, true),
            (ureq::Error::BadUri("x".to_owned()), false, false),
        ] {
            assert_eq!(is_transient(&error), transient, "{error}");
            assert_eq!(is_unreachable(&error), unreachable, "{error}");
        }
    }
}
