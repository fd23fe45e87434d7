//! Bytes: ranges, cuts, lengths and hashes.

use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use phi3_hub::{HubError, open};

use crate::server::{Hub, Reply, Request, etag, sha256};
use crate::{Client, DECOYS, REPO, read, repo, source, weights};

const FILE: &str = "model.safetensors";

/// A hook for GETs of the weights only; `n` counts them from 0.
fn on_weights(
    change: impl Fn(usize, &Request, Reply) -> Reply + Send + Sync + 'static,
) -> impl Fn(&Request, Reply) -> Reply + Send + Sync + 'static {
    let count = AtomicUsize::new(0);
    move |request, reply| {
        if request.is_get_of(FILE) {
            change(count.fetch_add(1, Ordering::Relaxed), request, reply)
        } else {
            reply
        }
    }
}

/// The weights arrived whole, and nothing is left over.
fn check_complete(client: &Client, content: &[u8]) {
    assert!(read(&client.blob(content)) == content, "the bytes differ");
    assert!(!client.incomplete(content).exists());
}

/// No file has the final name.
fn check_absent(client: &Client, content: &[u8]) {
    assert!(!client.blob(content).exists());
    let snapshots = client.repo_folder().join("snapshots");
    let found = snapshots.join(crate::server::COMMIT).join(FILE);
    assert!(
        found.symlink_metadata().is_err(),
        "{} exists",
        found.display()
    );
    assert!(!client.repo_folder().join("refs/main").exists());
}

#[test]
fn a_model_is_downloaded_and_opened() {
    let content = weights(300_000, 0.5);
    let hub = Hub::start(repo(&content));
    let client = Client::new();
    let checkpoint = open(&source(REPO), &client.options(&hub)).unwrap();
    assert_eq!(checkpoint.config["model_type"], "phi3");
    assert_eq!(checkpoint.generation_config.unwrap()["eos_token_id"], 7);
    assert_eq!(
        checkpoint.tokenizer.tokenizer_json.unwrap(),
        br#"{"version":"1.0"}"#
    );
    assert_eq!(checkpoint.chat_template.unwrap().text, "T");
    let tensor = checkpoint.weights.tensor("w").unwrap().unwrap();
    assert_eq!(tensor.to_f32().unwrap()[3], 1.5);
    check_complete(&client, &content);
    let requests = hub.requests();
    for decoy in DECOYS {
        assert!(
            !requests.iter().any(|request| request.is_of(decoy)),
            "{decoy} was fetched"
        );
    }
    // The file list, and HEAD and GET of five files.
    assert_eq!(requests.len(), 11);
    assert!(
        requests
            .iter()
            .all(|request| request.header("range").is_none())
    );
    let total = content.len();
    let expected = [
        format!("start 0/{total}"),
        format!("got {total}"),
        "finish".to_owned(),
    ];
    assert_eq!(client.events(FILE), expected);
}

#[test]
fn a_cut_connection_is_resumed_by_range() {
    let content = weights(300_000, 0.5);
    let hub = Hub::with_hook(
        repo(&content),
        on_weights(|n, _, reply| if n == 0 { reply.cut(100_000) } else { reply }),
    );
    let client = Client::new();
    client.download(&hub).unwrap();
    check_complete(&client, &content);
    let gets = hub.gets_of(FILE);
    assert_eq!(gets.len(), 2);
    assert_eq!(gets[0].header("range"), None);
    assert_eq!(gets[1].header("range"), Some("bytes=100000-"));
}

#[test]
fn a_second_run_resumes_what_the_first_left() {
    let content = weights(300_000, 0.5);
    let client = Client::new();
    let bad = Hub::with_hook(
        repo(&content),
        on_weights(|n, _, reply| {
            if n == 0 {
                reply.cut(50_000)
            } else {
                Reply::new(500)
            }
        }),
    );
    assert!(matches!(
        client.hub_error(&bad),
        HubError::Server { status: 500, .. }
    ));
    check_absent(&client, &content);
    assert_eq!(read(&client.incomplete(&content)), content[..50_000]);

    let good = Hub::start(repo(&content));
    client.download(&good).unwrap();
    check_complete(&client, &content);
    assert_eq!(good.gets_of(FILE)[0].header("range"), Some("bytes=50000-"));
    let resumed = format!("start 50000/{}", content.len());
    assert!(
        client.events(FILE).contains(&resumed),
        "{:?}",
        client.events(FILE)
    );
}

#[test]
fn a_server_without_ranges_starts_again() {
    let content = weights(300_000, 0.5);
    let whole = content.clone();
    let hub = Hub::with_hook(
        repo(&content),
        on_weights(move |n, _, reply| match n {
            0 => reply.cut(100_000),
            _ => Reply::new(200).body(&whole),
        }),
    );
    let client = Client::new();
    client.download(&hub).unwrap();
    check_complete(&client, &content);
    assert!(hub.gets_of(FILE)[1].header("range").is_some());
}

#[test]
fn a_range_that_was_not_asked_for_is_not_used() {
    let content = weights(300_000, 0.5);
    let total = content.len();
    for range in [
        format!("bytes 99999-{}/{total}", total - 1),
        format!("bytes 100000-{}/{}", total, total + 1),
        format!("bytes 100000-{}/{total}", total - 2),
        "nonsense".to_owned(),
    ] {
        let hub = Hub::with_hook(
            repo(&content),
            on_weights(move |n, _, reply| match n {
                0 => reply.cut(100_000),
                1 => reply
                    .without("content-range")
                    .with("Content-Range", range.clone()),
                _ => reply,
            }),
        );
        let client = Client::new();
        client.download(&hub).unwrap();
        check_complete(&client, &content);
        let gets = hub.gets_of(FILE);
        assert_eq!(gets.len(), 3);
        assert_eq!(gets[2].header("range"), None, "must start again");
    }
}

#[test]
fn a_range_that_the_server_cannot_satisfy_starts_again() {
    let content = weights(300_000, 0.5);
    let hub = Hub::with_hook(
        repo(&content),
        on_weights(|n, _, reply| match n {
            0 => reply.cut(100_000),
            1 => Reply::new(416),
            _ => reply,
        }),
    );
    let client = Client::new();
    client.download(&hub).unwrap();
    check_complete(&client, &content);
}

#[test]
fn a_connection_that_is_always_cut_is_given_up_and_kept() {
    let content = weights(300_000, 0.5);
    let hub = Hub::with_hook(repo(&content), on_weights(|_, _, reply| reply.cut(1000)));
    let client = Client::new();
    let error = client.hub_error(&hub);
    assert!(matches!(error, HubError::Network { .. }), "{error}");
    assert_eq!(
        hub.gets_of(FILE).len(),
        4,
        "as many attempts as the policy allows"
    );
    check_absent(&client, &content);
    assert_eq!(read(&client.incomplete(&content)), content[..4000]);
}

#[test]
fn attempts_that_bring_much_do_not_count_as_failures() {
    let content = weights(9 << 20, 0.5);
    let hub = Hub::with_hook(repo(&content), on_weights(|_, _, reply| reply.cut(1 << 20)));
    let client = Client::new();
    client.download(&hub).unwrap();
    check_complete(&client, &content);
    assert_eq!(hub.gets_of(FILE).len(), 10);
}

#[test]
fn a_wrong_length_is_refused() {
    let content = weights(300_000, 0.5);
    let longer = Hub::with_hook(
        repo(&content),
        on_weights(|_, _, mut reply| {
            reply.body.extend_from_slice(b"more");
            reply
        }),
    );
    let client = Client::new();
    let error = client.hub_error(&longer);
    assert!(matches!(error, HubError::WrongLength { .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.contains(FILE) && text.contains(&content.len().to_string()),
        "{text}"
    );
    check_absent(&client, &content);

    let shorter = Hub::with_hook(
        repo(&content),
        on_weights(|_, _, mut reply| {
            reply.body.truncate(1000);
            reply
        }),
    );
    let client = Client::new();
    let error = client.hub_error(&shorter);
    assert!(
        matches!(error, HubError::WrongLength { found: 1000, .. }),
        "{error}"
    );
    check_absent(&client, &content);
}

#[test]
fn a_wrong_length_in_a_stream_without_length_is_refused() {
    let content = weights(300_000, 0.5);
    // Only the bytes themselves show that there are too many, or too few.
    let hub = Hub::with_hook(
        repo(&content),
        on_weights(|_, _, mut reply| {
            reply.body.extend_from_slice(b"more");
            Reply {
                chunked: true,
                ..reply
            }
        }),
    );
    let client = Client::new();
    let error = client.hub_error(&hub);
    assert!(matches!(error, HubError::WrongLength { .. }), "{error}");
    check_absent(&client, &content);
}

#[test]
fn a_wrong_hash_is_refused() {
    let content = weights(300_000, 0.5);
    let hub = Hub::with_hook(
        repo(&content),
        on_weights(|_, _, mut reply| {
            reply.body[200_000] ^= 1;
            reply
        }),
    );
    let client = Client::new();
    let error = client.hub_error(&hub);
    let text = error.to_string();
    assert!(matches!(error, HubError::WrongHash { .. }), "{text}");
    assert!(
        text.contains(FILE) && text.contains(&sha256(&content)),
        "{text}"
    );
    assert_eq!(hub.gets_of(FILE).len(), 1);
    check_absent(&client, &content);
    assert!(
        !client.incomplete(&content).exists(),
        "nothing wrong stays to be resumed"
    );
}

#[test]
fn a_damaged_rest_of_an_earlier_run_is_fetched_anew() {
    let content = weights(300_000, 0.5);
    let hub = Hub::start(repo(&content));
    for rest in [
        vec![9; 1000],
        vec![9; content.len()],
        vec![9; content.len() + 5],
    ] {
        let client = Client::new();
        let incomplete = client.incomplete(&content);
        fs::create_dir_all(incomplete.parent().unwrap()).unwrap();
        fs::write(&incomplete, rest).unwrap();
        client.download(&hub).unwrap();
        check_complete(&client, &content);
    }
}

#[test]
fn a_complete_rest_needs_no_request() {
    let content = weights(300_000, 0.5);
    let hub = Hub::start(repo(&content));
    let client = Client::new();
    let incomplete = client.incomplete(&content);
    fs::create_dir_all(incomplete.parent().unwrap()).unwrap();
    fs::write(&incomplete, &content).unwrap();
    client.download(&hub).unwrap();
    check_complete(&client, &content);
    assert!(hub.gets_of(FILE).is_empty());
}

#[test]
fn an_error_page_never_becomes_the_file() {
    let content = weights(300_000, 0.5);
    for (status, get) in [(404, 1), (500, 4), (502, 4)] {
        let hub = Hub::with_hook(
            repo(&content),
            on_weights(move |_, _, _| Reply::new(status).body(b"<html>not a model</html>")),
        );
        let client = Client::new();
        let error = client.hub_error(&hub);
        match status {
            404 => assert!(matches!(error, HubError::FileNotFound { .. }), "{error}"),
            _ => assert!(matches!(error, HubError::Server { .. }), "{error}"),
        }
        assert!(error.to_string().contains(FILE), "{error}");
        assert_eq!(hub.gets_of(FILE).len(), get, "{status}");
        check_absent(&client, &content);
    }
}

#[test]
fn an_overloaded_server_is_asked_again() {
    let content = weights(1000, 0.5);
    let count = AtomicUsize::new(0);
    let hub = Hub::with_hook(repo(&content), move |_, reply| {
        match count.fetch_add(1, Ordering::Relaxed) {
            0 => Reply::new(503),
            3 => Reply::new(429).with("Retry-After", "0"),
            5 => Reply::new(500),
            _ => reply,
        }
    });
    let client = Client::new();
    client.download(&hub).unwrap();
    check_complete(&client, &content);
}

#[test]
fn too_many_requests_say_so() {
    let hub = Hub::with_hook(repo(b""), |_, _| Reply::new(429).with("Retry-After", "0"));
    let error = Client::new().hub_error(&hub);
    assert!(matches!(error, HubError::RateLimited { .. }), "{error}");
    assert_eq!(hub.requests().len(), 4);
}

#[test]
fn two_downloads_at_once_transfer_once() {
    let content = weights(300_000, 0.5);
    let hub = Hub::with_hook(
        repo(&content),
        on_weights(|_, _, reply| {
            thread::sleep(std::time::Duration::from_millis(300));
            reply
        }),
    );
    let client = Client::new();
    thread::scope(|scope| {
        let runs: Vec<_> = (0..3)
            .map(|_| scope.spawn(|| client.download(&hub)))
            .collect();
        for run in runs {
            run.join().unwrap().unwrap();
        }
    });
    check_complete(&client, &content);
    assert_eq!(hub.gets_of(FILE).len(), 1);
}

#[test]
fn a_blob_of_another_size_is_replaced() {
    let content = weights(300_000, 0.5);
    let hub = Hub::start(repo(&content));
    let client = Client::new();
    fs::create_dir_all(client.blob(&content).parent().unwrap()).unwrap();
    fs::write(client.blob(&content), &content[..10]).unwrap();
    client.download(&hub).unwrap();
    check_complete(&client, &content);
}

#[test]
fn empty_files_are_files() {
    let mut files = repo(&weights(1000, 0.5));
    files.push(("special_tokens_map.json".to_owned(), Vec::new()));
    let hub = Hub::start(files);
    let folder = Client::new();
    let path = folder.download(&hub).unwrap();
    assert_eq!(read(&path.join("special_tokens_map.json")), b"");
}

#[test]
fn a_stream_that_ends_early_is_resumed() {
    let content = weights(300_000, 0.5);
    let hub = Hub::with_hook(
        repo(&content),
        on_weights(|n, _, mut reply| {
            // A well-formed end of the stream, but too early.
            if n == 0 {
                reply.body.truncate(100_000);
            }
            Reply {
                chunked: true,
                ..reply
            }
        }),
    );
    let client = Client::new();
    client.download(&hub).unwrap();
    check_complete(&client, &content);
    assert_eq!(hub.gets_of(FILE)[1].header("range"), Some("bytes=100000-"));
}

#[test]
fn without_any_size_the_hash_decides() {
    let content = weights(300_000, 0.5);
    let unsized_hub = |damage: usize| {
        Hub::with_hook(repo(&content), move |request, mut reply| {
            if request.is_get_of(FILE) {
                reply.body[0] ^= damage as u8;
            }
            Reply {
                chunked: request.is_of(FILE),
                ..reply
            }
        })
    };
    let client = Client::new();
    client.download(&unsized_hub(0)).unwrap();
    check_complete(&client, &content);

    let client = Client::new();
    let error = client.hub_error(&unsized_hub(1));
    assert!(matches!(error, HubError::WrongHash { .. }), "{error}");
    check_absent(&client, &content);
}

#[test]
fn a_file_that_cannot_be_verified_is_refused() {
    // Neither HEAD nor GET state a length, and the ETag of a small file is no sha256.
    let hub = Hub::with_hook(repo(&weights(1000, 0.5)), |request, reply| Reply {
        chunked: request.is_of("config.json"),
        ..reply
    });
    let client = Client::new();
    let error = client.hub_error(&hub);
    assert!(matches!(error, HubError::Protocol { .. }), "{error}");
    assert!(error.to_string().contains("config.json"), "{error}");
    let blob = client
        .repo_folder()
        .join("blobs")
        .join(etag("config.json", crate::SMALL[0].1.as_bytes()));
    assert!(!blob.exists());
}
