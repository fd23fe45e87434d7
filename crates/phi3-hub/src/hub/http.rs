//! Requests to the hub: redirects, the token, and what each answer means.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ureq::http::{HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use ureq::{Agent, Body};

use super::error::HubError;
use super::failure::{
    Backoff, Failure, host, is_transient, is_unreachable, network, without_query,
};
use super::options::{HubOptions, RetryPolicy};
use super::url::{encode_path, is_loopback, origin, resolve};

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
const MAX_REDIRECTS: usize = 10;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest silence of a server, before its answer or within it.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// A connection to one hub.
pub(crate) struct Client {
    agent: Agent,
    /// For this machine's own addresses, past any proxy.
    direct: Agent,
    base: String,
    base_origin: (String, String, u16),
    token: Option<HeaderValue>,
    retry: RetryPolicy,
    /// Whether any server has answered yet: before that, no network is a quick error.
    connected: AtomicBool,
}

/// What a request is about, for the message if it fails.
#[derive(Clone, Copy, Debug)]
pub(crate) struct About<'a> {
    pub(crate) repo_id: &'a str,
    pub(crate) revision: &'a str,
    pub(crate) file: Option<&'a str>,
}

/// What HEAD tells about a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Metadata {
    /// Without quotes and weakness mark.
    pub(crate) etag: String,
    pub(crate) size: Option<u64>,
    pub(crate) commit: Option<String>,
}

impl Client {
    pub(crate) fn new(options: &HubOptions) -> Result<Self, HubError> {
        let base = options
            .endpoint
            .as_deref()
            .unwrap_or(DEFAULT_ENDPOINT)
            .trim_end_matches('/');
        let wrong = |name, detail: &str| HubError::Setting {
            name,
            detail: detail.to_owned(),
        };
        let uri: Uri = base
            .parse()
            .map_err(|_| wrong("HF_ENDPOINT", &format!("{base:?} is no address")))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none() {
            return Err(wrong(
                "HF_ENDPOINT",
                &format!("{base:?} does not start with https://host"),
            ));
        }
        let token = match options.token.as_deref().filter(|token| !token.is_empty()) {
            Some(token) => {
                let mut value = HeaderValue::from_str(&format!("Bearer {token}"))
                    .map_err(|_| wrong("HF_TOKEN", "it contains characters that no token has"))?;
                value.set_sensitive(true);
                Some(value)
            }
            None => None,
        };
        Ok(Self {
            agent: agent(true),
            direct: agent(false),
            base: base.to_owned(),
            base_origin: origin(&uri),
            token,
            retry: options.retry,
            connected: AtomicBool::new(false),
        })
    }

    /// The hub's address, without a slash at its end.
    pub(crate) fn endpoint(&self) -> &str {
        &self.base
    }

    /// A file's address.
    pub(crate) fn file_url(&self, repo_id: &str, revision: &str, file: &str) -> String {
        format!(
            "{}/{repo_id}/resolve/{}/{}",
            self.base,
            super::url::encode_segment(revision),
            encode_path(file)
        )
    }

    /// Counts the failures of one piece of work.
    pub(crate) fn backoff(&self) -> Backoff {
        Backoff::new(self.retry)
    }

    /// A small answer as a whole, at most `limit` bytes.
    pub(crate) fn get_bytes(
        &self,
        url: &str,
        limit: u64,
        about: About<'_>,
    ) -> Result<Vec<u8>, HubError> {
        let mut backoff = self.backoff();
        loop {
            match self.try_get_bytes(url, limit, about) {
                Ok(bytes) => return Ok(bytes),
                Err(failure) => backoff.wait_or_give_up(failure)?,
            }
        }
    }

    fn try_get_bytes(&self, url: &str, limit: u64, about: About<'_>) -> Result<Vec<u8>, Failure> {
        let (response, uri) = self.get(url, 0)?;
        if response.status() != StatusCode::OK {
            return Err(self.refused(&response, &uri, about));
        }
        response
            .into_body()
            .into_with_config()
            .limit(limit)
            .read_to_vec()
            .map_err(|error| match error {
                ureq::Error::BodyExceedsLimit(_) => Failure::fatal(HubError::Protocol {
                    url: uri.to_string(),
                    detail: format!("the answer has more than {limit} bytes"),
                }),
                error => Failure::transient(network(&uri, &error)),
            })
    }

    /// What the hub says about a file, without fetching it.
    pub(crate) fn metadata(&self, about: About<'_>, file: &str) -> Result<Metadata, HubError> {
        let url = self.file_url(about.repo_id, about.revision, file);
        let mut backoff = self.backoff();
        loop {
            match self.try_metadata(
                &url,
                About {
                    file: Some(file),
                    ..about
                },
            ) {
                Ok(metadata) => return Ok(metadata),
                Err(failure) => backoff.wait_or_give_up(failure)?,
            }
        }
    }

    /// HEAD, hop by hop: the hub answers for a large file with a redirect to its storage, and
    /// describes the file on that redirect, because the storage's own ETag is another one.
    fn try_metadata(&self, url: &str, about: About<'_>) -> Result<Metadata, Failure> {
        let mut uri = parse(url)?;
        let (mut etag, mut size, mut commit) = (None, None, None);
        for _ in 0..=MAX_REDIRECTS {
            let response = self.send(&Method::HEAD, &uri, 0)?;
            let text = |name: &str| {
                response
                    .headers()
                    .get(name)
                    .and_then(|value| value.to_str().ok())
            };
            let number = |name: &str| text(name).and_then(|value| value.trim().parse::<u64>().ok());
            commit = commit.or_else(|| text("x-repo-commit").map(str::to_owned));
            etag = etag.or_else(|| text("x-linked-etag").map(clean_etag));
            size = size.or_else(|| number("x-linked-size"));
            if !response.status().is_redirection() {
                if !response.status().is_success() && etag.is_none() {
                    return Err(self.refused(&response, &uri, about));
                }
                if response.status().is_success() {
                    etag = etag.or_else(|| text("etag").map(clean_etag));
                    size = size.or_else(|| number("content-length"));
                }
            } else if etag.is_none() || size.is_none() {
                uri = redirected(&response, &uri)?;
                continue;
            }
            let Some(etag) = etag.filter(|etag| is_blob_name(etag)) else {
                return Err(Failure::fatal(HubError::Protocol {
                    url: uri.to_string(),
                    detail: "the answer has no usable ETag".to_owned(),
                }));
            };
            return Ok(Metadata { etag, size, commit });
        }
        Err(too_many_redirects(url))
    }

    /// GET from byte `offset` on, through redirects. The answer may have any status but a redirect.
    pub(crate) fn get(&self, url: &str, offset: u64) -> Result<(Response<Body>, Uri), Failure> {
        let mut uri = parse(url)?;
        for _ in 0..=MAX_REDIRECTS {
            let response = self.send(&Method::GET, &uri, offset)?;
            if !response.status().is_redirection() {
                return Ok((response, uri));
            }
            uri = redirected(&response, &uri)?;
        }
        Err(too_many_redirects(url))
    }

    fn send(&self, method: &Method, uri: &Uri, offset: u64) -> Result<Response<Body>, Failure> {
        let mut request = Request::builder().method(method).uri(uri);
        if offset > 0 {
            request = request.header(header::RANGE, format!("bytes={offset}-"));
        }
        if let Some(token) = &self.token
            && origin(uri) == self.base_origin
        {
            request = request.header(header::AUTHORIZATION, token);
        }
        let request = request.body(()).map_err(|error| HubError::Protocol {
            url: uri.to_string(),
            detail: error.to_string(),
        })?;
        let agent = if is_loopback(uri) {
            &self.direct
        } else {
            &self.agent
        };
        match agent.run(request) {
            Ok(response) => {
                self.connected.store(true, Ordering::Relaxed);
                Ok(response)
            }
            Err(error) => {
                let hopeless = !self.connected.load(Ordering::Relaxed) && is_unreachable(&error);
                let found = network(uri, &error);
                Err(if hopeless || !is_transient(&error) {
                    Failure::fatal(found)
                } else {
                    Failure::transient(found)
                })
            }
        }
    }

    /// What an answer that is neither the file nor a redirect means.
    pub(crate) fn refused(
        &self,
        response: &Response<Body>,
        uri: &Uri,
        about: About<'_>,
    ) -> Failure {
        let text = |name: &str| {
            response
                .headers()
                .get(name)
                .and_then(|value| value.to_str().ok())
        };
        let status = response.status().as_u16();
        let repo_id = about.repo_id.to_owned();
        let revision = about.revision.to_owned();
        let page = format!("{}/{repo_id}", self.base);
        let token_sent = self.token.is_some();
        let from_hub = origin(uri) == self.base_origin;
        let what = about.file.unwrap_or(about.repo_id).to_owned();
        let not_found = |file: &str, advice: &str| HubError::FileNotFound {
            repo_id: about.repo_id.to_owned(),
            revision: about.revision.to_owned(),
            file: file.to_owned(),
            advice: advice.to_owned(),
        };
        match (status, text("x-error-code"), about.file) {
            // A storage host refuses when the signed address it was given has run out.
            (401 | 403, _, _) if !from_hub => {
                let host = host(uri);
                Failure::transient(HubError::Server { host, status, what })
            }
            (401 | 403, Some("GatedRepo"), _) => HubError::Gated {
                repo_id,
                page,
                token_sent,
            }
            .into(),
            (401 | 403, _, _) => HubError::NoAccess {
                repo_id,
                page,
                token_sent,
            }
            .into(),
            (404, Some("RevisionNotFound"), _) => HubError::RevisionNotFound {
                repo_id,
                revision,
                page,
            }
            .into(),
            (404, Some("EntryNotFound"), Some(file)) => not_found(file, "").into(),
            (404, Some("RepoNotFound"), _) => HubError::RepoNotFound {
                repo_id,
                endpoint: self.base.clone(),
            }
            .into(),
            (404, _, None) => HubError::NotFound {
                repo_id,
                revision,
                endpoint: self.base.clone(),
            }
            .into(),
            (404, _, Some(file)) => not_found(file, &format!("{} answered 404", host(uri))).into(),
            (408 | 429 | 500..=599, _, _) => {
                let host = host(uri);
                let error = match status {
                    429 => HubError::RateLimited { host },
                    _ => HubError::Server { host, status, what },
                };
                let wait = text("retry-after").and_then(|value| value.trim().parse().ok());
                Failure::Transient(Box::new(error), wait.map(Duration::from_secs))
            }
            _ => Failure::fatal(HubError::Protocol {
                url: without_query(uri),
                detail: format!("the answer has status {status}"),
            }),
        }
    }
}

fn agent(proxy: bool) -> Agent {
    let mut config = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .user_agent(concat!("phi3-hub/", env!("CARGO_PKG_VERSION")))
        // A compressed answer has neither the size nor the ranges of the file.
        .accept_encoding("identity")
        .timeout_connect(Some(CONNECT_TIMEOUT))
        .timeout_recv_response(Some(READ_TIMEOUT))
        .timeout_per_read(Some(READ_TIMEOUT));
    if !proxy {
        config = config.proxy(None);
    }
    config.build().into()
}

fn parse(url: &str) -> Result<Uri, HubError> {
    url.parse().map_err(|_| HubError::Protocol {
        url: url.to_owned(),
        detail: "this is no valid address".to_owned(),
    })
}

fn redirected(response: &Response<Body>, from: &Uri) -> Result<Uri, HubError> {
    let wrong = |detail: &str| HubError::Protocol {
        url: without_query(from),
        detail: detail.to_owned(),
    };
    let location = response
        .headers()
        .get(header::LOCATION)
        .ok_or_else(|| wrong("a redirect without Location"))?;
    let to = location
        .to_str()
        .ok()
        .and_then(|location| resolve(from, location))
        .ok_or_else(|| wrong("a redirect to something that is no web address"))?;
    if from.scheme_str() == Some("https") && to.scheme_str() != Some("https") {
        return Err(wrong("a redirect from https to an unprotected address"));
    }
    Ok(to)
}

fn too_many_redirects(url: &str) -> Failure {
    Failure::fatal(HubError::Protocol {
        url: url.to_owned(),
        detail: format!("more than {MAX_REDIRECTS} redirects"),
    })
}

fn clean_etag(etag: &str) -> String {
    let etag = etag.trim();
    etag.strip_prefix("W/")
        .unwrap_or(etag)
        .trim_matches('"')
        .to_owned()
}

/// An ETag becomes a file name.
fn is_blob_name(etag: &str) -> bool {
    (1..=200).contains(&etag.len())
        && !etag.starts_with('.')
        && etag
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn etags_become_blob_names() {
        assert_eq!(clean_etag("\"abc\""), "abc");
        assert_eq!(clean_etag(" W/\"abc\" "), "abc");
        for good in ["abc", "65a-5f_x.y"] {
            assert!(is_blob_name(good));
        }
        for bad in [
            "",
            "..",
            ".x",
            "a/b",
            "a\\b",
            "a:b",
            "a b",
            &"x".repeat(300),
        ] {
            assert!(!is_blob_name(bad), "{bad:?}");
        }
    }

    #[test]
    fn settings_that_cannot_work_are_named() {
        let refuse = |endpoint: &str, token: &str| {
            let options = HubOptions {
                endpoint: Some(endpoint.to_owned()),
                token: Some(token.to_owned()),
                ..HubOptions::default()
            };
            Client::new(&options)
                .err()
                .expect("must be refused")
                .to_string()
        };
        assert!(refuse("huggingface", "t").contains("HF_ENDPOINT"));
        assert!(refuse("ftp://x", "t").contains("HF_ENDPOINT"));
        let error = refuse("https://x", "hf_se\ncret");
        assert!(
            error.contains("HF_TOKEN") && !error.contains("se\ncret"),
            "{error}"
        );
    }

    #[test]
    fn a_redirect_never_gives_up_encryption() {
        let to = |from: &str, location: &str| {
            let response = Response::builder()
                .status(302)
                .header("Location", location)
                .body(Body::builder().data(""))
                .expect("a valid response");
            redirected(&response, &from.parse().expect("a valid address"))
        };
        assert!(to("https://hub.example/a", "https://cdn.example/a").is_ok());
        assert!(to("http://127.0.0.1:1/a", "http://127.0.0.1:2/a").is_ok());
        let error = to("https://hub.example/a", "http://cdn.example/a")
            .unwrap_err()
            .to_string();
        assert!(error.contains("unprotected"), "{error}");
    }
}
