//! What each answer of a hub means: redirects, tokens, refusals.

use std::net::TcpListener;
use std::sync::Arc;

use phi3_hub::{Error, HubError, HubOptions, Source, download};

use crate::server::{COMMIT, Hub, Reply, etag};
use crate::{Client, REPO, hub_error, read, repo, source, weights};

const FILE: &str = "model.safetensors";

/// As the hub does for large files: describes the file and sends the client on to `location`.
fn redirect(content: &[u8], location: &str) -> Reply {
    Reply::new(302)
        .with("X-Repo-Commit", COMMIT)
        .with("X-Linked-Etag", format!("\"{}\"", etag(FILE, content)))
        .with("X-Linked-Size", content.len().to_string())
        .with("Location", location)
}

fn with_token(client: &Client, hub: &Hub, token: &str) -> HubOptions {
    HubOptions {
        token: Some(token.to_owned()),
        ..client.options(hub)
    }
}

#[test]
fn a_redirect_to_a_second_host_never_takes_the_token_along() {
    let content = weights(300_000, 0.5);
    let cdn = Arc::new(Hub::with_hook(repo(&content), {
        let cut = std::sync::atomic::AtomicBool::new(true);
        move |_, reply| match cut.swap(false, std::sync::atomic::Ordering::Relaxed) {
            true => reply.cut(1000),
            false => reply,
        }
    }));
    let location = format!("{}/cdn/{FILE}?signature=x", cdn.address);
    let (body, to) = (content.clone(), location);
    let hub = Hub::with_hook(repo(&content), move |request, reply| {
        if request.header("authorization") != Some("Bearer hf_test") {
            return Reply::new(401);
        }
        if request.is_of(FILE) {
            redirect(&body, &to)
        } else {
            reply
        }
    });
    let client = Client::new();
    download(&source(REPO), &with_token(&client, &hub, "hf_test")).unwrap();
    assert!(read(&client.blob(&content)) == content);
    let there = cdn.requests();
    assert_eq!(
        there.len(),
        2,
        "HEAD needs no second host, GET was cut once"
    );
    for request in &there {
        assert_eq!(request.header("authorization"), None);
        assert_eq!(request.path, format!("/cdn/{FILE}?signature=x"));
    }
    assert_eq!(there[1].header("range"), Some("bytes=1000-"));
    assert!(
        hub.requests()
            .iter()
            .all(|request| request.header("authorization").is_some())
    );
}

#[test]
fn relative_redirects_stay_with_the_host_and_keep_the_token() {
    let content = weights(1000, 0.5);
    for location in [format!("/cdn/{FILE}"), format!("../../../../cdn/{FILE}")] {
        let body = content.clone();
        let hub = Hub::with_hook(repo(&content), move |request, reply| {
            if request.header("authorization") != Some("Bearer hf_test") {
                return Reply::new(401);
            }
            if request.path.contains("/resolve/") && request.is_of(FILE) {
                redirect(&body, &location)
            } else {
                reply
            }
        });
        let client = Client::new();
        download(&source(REPO), &with_token(&client, &hub, "hf_test")).unwrap();
        assert!(read(&client.blob(&content)) == content);
    }
}

#[test]
fn a_redirect_that_describes_nothing_is_followed_by_head_too() {
    let content = weights(1000, 0.5);
    let hub = Hub::with_hook(repo(&content), |request, reply| {
        match request.path.strip_prefix("/org/name/resolve/") {
            Some(_) if request.is_of("config.json") && !request.path.contains('?') => {
                Reply::new(307).with("Location", format!("{}?cached", request.path))
            }
            _ => reply,
        }
    });
    // The file's name is no longer the end of the path.
    let client = Client::new();
    let folder = client.download(&hub).unwrap();
    assert_eq!(
        read(&folder.join("config.json")),
        br#"{"model_type":"phi3"}"#
    );
}

#[test]
fn redirects_that_lead_nowhere_are_errors() {
    let content = weights(1000, 0.5);
    for (location, part) in [
        (None, "without Location"),
        (Some(""), "no web address"),
        (Some("file:///etc/passwd"), "no web address"),
        (
            Some("/org/name/resolve/main/model.safetensors"),
            "redirects",
        ),
    ] {
        let hub = Hub::with_hook(repo(&content), move |request, reply| {
            if !request.is_of(FILE) {
                return reply;
            }
            match location {
                Some(location) => Reply::new(302).with("Location", location),
                None => Reply::new(302),
            }
        });
        let error = Client::new().hub_error(&hub);
        assert!(
            matches!(error, HubError::Protocol { .. }),
            "{location:?}: {error}"
        );
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[test]
fn a_signed_address_that_ran_out_is_asked_for_again() {
    let content = weights(300_000, 0.5);
    let old = Hub::with_hook(repo(&content), |_, _| Reply::new(403));
    let new = Hub::start(repo(&content));
    let addresses = [&old, &new].map(|hub| format!("{}/cdn/{FILE}", hub.address));
    let (body, count) = (content.clone(), std::sync::atomic::AtomicUsize::new(0));
    let hub = Hub::with_hook(repo(&content), move |request, reply| {
        if !request.is_of(FILE) {
            return reply;
        }
        // HEAD, and the first GET, get the old address.
        let n = count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        redirect(&body, &addresses[usize::from(n > 1)])
    });
    let client = Client::new();
    client.download(&hub).unwrap();
    assert!(read(&client.blob(&content)) == content);
    assert_eq!(old.requests().len(), 1);
}

#[test]
fn a_repo_that_needs_a_token() {
    let content = weights(1000, 0.5);
    let hub = Hub::with_hook(repo(&content), |request, reply| {
        match request.header("authorization") {
            Some("Bearer hf_good") => reply,
            // The hub does not tell strangers whether a private repo exists.
            _ => Reply::new(401).with("X-Error-Code", "RepoNotFound"),
        }
    });
    let client = Client::new();
    let error = client.hub_error(&hub);
    assert!(
        matches!(
            error,
            HubError::NoAccess {
                token_sent: false,
                ..
            }
        ),
        "{error}"
    );
    let text = error.to_string();
    let page = format!("{}/{REPO}", hub.address);
    assert!(
        text.contains("HF_TOKEN") && text.contains("licence") && text.contains(&page),
        "{text}"
    );

    let bad = hub_error(download(
        &source(REPO),
        &with_token(&client, &hub, "hf_bad"),
    ));
    assert!(
        matches!(
            bad,
            HubError::NoAccess {
                token_sent: true,
                ..
            }
        ),
        "{bad}"
    );
    assert!(!bad.to_string().contains("hf_bad"), "{bad}");

    download(&source(REPO), &with_token(&client, &hub, "hf_good")).unwrap();
}

#[test]
fn a_gated_repo() {
    for (status, token) in [(401, None), (403, Some("hf_other"))] {
        let hub = Hub::with_hook(repo(&[]), move |request, reply| {
            match request.path.starts_with("/api/") {
                true => reply,
                false => Reply::new(status).with("X-Error-Code", "GatedRepo"),
            }
        });
        let client = Client::new();
        let options = HubOptions {
            token: token.map(str::to_owned),
            ..client.options(&hub)
        };
        let error = hub_error(download(&source(REPO), &options));
        assert!(matches!(error, HubError::Gated { .. }), "{error}");
        let text = error.to_string();
        assert!(
            text.contains("accept") && text.contains(&format!("{}/{REPO}", hub.address)),
            "{text}"
        );
        assert_eq!(text.contains("HF_TOKEN"), token.is_none(), "{text}");
    }
}

#[test]
fn a_404_without_a_reason_names_all_that_may_be_wrong() {
    let hub = Hub::with_hook(repo(&weights(1000, 0.5)), |_, _| Reply::new(404));
    let client = Client::new();
    let source = Source::parse(REPO, Some("v1")).unwrap();
    let error = hub_error(download(&source, &client.options(&hub)));
    assert!(matches!(error, HubError::NotFound { .. }), "{error}");
    let text = error.to_string();
    for part in [REPO, "v1", &hub.address, "HF_ENDPOINT"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn three_kinds_of_404() {
    let hub = Hub::start(repo(&weights(1000, 0.5)));
    let client = Client::new();
    let options = client.options(&hub);

    let error = hub_error(download(&source("org/nmae"), &options));
    assert!(matches!(error, HubError::RepoNotFound { .. }), "{error}");
    assert!(error.to_string().contains("org/nmae"), "{error}");

    let error = hub_error(download(
        &Source::parse(REPO, Some("v99")).unwrap(),
        &options,
    ));
    assert!(
        matches!(error, HubError::RevisionNotFound { .. }),
        "{error}"
    );
    assert!(error.to_string().contains("v99"), "{error}");

    let error = hub_error(download(&source("org/name/other.gguf"), &options));
    assert!(matches!(error, HubError::FileNotFound { .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.contains("other.gguf") && text.contains("name-q4.gguf"),
        "{text}"
    );
}

#[test]
fn no_network_is_said_at_once() {
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let client = Client::new();
    let options = HubOptions {
        cache_dir: Some(client.cache()),
        endpoint: Some(format!("http://127.0.0.1:{port}")),
        ..HubOptions::default()
    };
    let begun = std::time::Instant::now();
    let error = hub_error(download(&source(REPO), &options));
    assert!(matches!(error, HubError::Network { .. }), "{error}");
    assert!(error.to_string().contains("network"), "{error}");
    assert!(
        begun.elapsed().as_secs() < 2,
        "no waiting when there is nobody to wait for"
    );
}

#[test]
fn a_server_without_tls_is_no_https_hub() {
    let hub = Hub::start(repo(&[]));
    let client = Client::new();
    let options = HubOptions {
        endpoint: Some(hub.address.replace("http://", "https://")),
        ..client.options(&hub)
    };
    let error = hub_error(download(&source(REPO), &options));
    assert!(matches!(error, HubError::Network { .. }), "{error}");
}

#[test]
fn something_that_is_no_hub() {
    for reply in [
        Reply::new(200).body(b"<html>hello</html>"),
        Reply::new(200).body(b"[]"),
        Reply::new(418),
        Reply::new(204),
    ] {
        let hub = Hub::with_hook(repo(&[]), move |_, _| reply.clone());
        let error = Client::new().hub_error(&hub);
        assert!(matches!(error, HubError::Protocol { .. }), "{error}");
        assert!(error.to_string().contains("HF_ENDPOINT"), "{error}");
    }
}

#[test]
fn etags_that_are_no_file_names_are_refused() {
    for etag in [None, Some("\"../../evil\""), Some("\"\""), Some("\"a/b\"")] {
        let hub = Hub::with_hook(repo(&weights(1000, 0.5)), move |request, reply| {
            if !request.is_of(FILE) {
                return reply;
            }
            let reply = reply.without("etag");
            match etag {
                Some(etag) => reply.with("ETag", etag),
                None => reply,
            }
        });
        let error = Client::new().hub_error(&hub);
        assert!(
            matches!(error, HubError::Protocol { .. }),
            "{etag:?}: {error}"
        );
    }
}

#[test]
fn commits_that_are_no_file_names_are_refused() {
    for sha in ["../../evil", ""] {
        let hub = Hub::with_hook(repo(&weights(1000, 0.5)), move |request, reply| {
            match request.path.starts_with("/api/") {
                true => Reply::new(200).body(
                    format!(r#"{{"sha":"{sha}","siblings":[{{"rfilename":"config.json"}},{{"rfilename":"model.safetensors"}}]}}"#)
                        .as_bytes(),
                ),
                false => reply,
            }
        });
        let error = Client::new().hub_error(&hub);
        assert!(matches!(error, HubError::Protocol { .. }), "{sha}: {error}");
    }
}

#[test]
fn without_a_commit_in_the_listing_a_file_tells_it() {
    let content = weights(1000, 0.5);
    let hub = Hub::with_hook(repo(&content), |request, reply| {
        match request.path.starts_with("/api/") {
            true => Reply::new(200).body(
                br#"{"siblings":[{"rfilename":"config.json"},{"rfilename":"model.safetensors"}]}"#,
            ),
            false => reply,
        }
    });
    let folder = Client::new();
    assert!(folder.download(&hub).unwrap().ends_with(COMMIT));
}

#[test]
fn a_repo_of_pickles_is_refused() {
    let files = ["config.json", "pytorch_model.bin"].map(|name| (name.to_owned(), b"x".to_vec()));
    let hub = Hub::start(files.to_vec());
    let error = Client::new().download(&hub).unwrap_err();
    assert!(matches!(error, Error::Pickle { .. }), "{error}");
    assert_eq!(hub.requests().len(), 1, "nothing is downloaded for it");
}
