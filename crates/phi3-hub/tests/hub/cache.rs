//! The cache: its layout, revisions, and life without a network.

use std::fs;

use phi3_hub::{Error, HubError, HubOptions, Source, download, open};

use crate::server::{COMMIT, Hub, Reply, etag};
use crate::{Client, REPO, SMALL, hub_error, read, repo, source, weights};

const FILE: &str = "model.safetensors";
const NEXT: &str = "89abcdef0123456789abcdef0123456789abcdef";

fn offline(client: &Client, hub: &Hub) -> HubOptions {
    HubOptions {
        offline: true,
        ..client.options(hub)
    }
}

#[test]
fn the_layout_is_the_one_that_other_programs_read() {
    let content = weights(1000, 0.5);
    let hub = Hub::start(repo(&content));
    let client = Client::new();
    let folder = client.download(&hub).unwrap();
    let repo_folder = client.repo_folder();
    assert_eq!(folder, repo_folder.join("snapshots").join(COMMIT));
    assert_eq!(read(&repo_folder.join("refs/main")), COMMIT.as_bytes());
    for (name, text) in SMALL {
        let blob = repo_folder.join("blobs").join(etag(name, text.as_bytes()));
        assert_eq!(read(&blob), text.as_bytes());
        if cfg!(unix) {
            let link = fs::read_link(folder.join(name)).unwrap();
            assert!(link.is_relative());
            assert_eq!(
                folder.join(link).canonicalize().unwrap(),
                blob.canonicalize().unwrap()
            );
        }
    }
    let cache = hf_hub::Cache::new(client.cache()).model(REPO.to_owned());
    assert_eq!(read(&cache.get(FILE).unwrap()), content);
    assert_eq!(cache.get("README.md"), None);
    let leftovers = ["blobs", "refs", &format!("snapshots/{COMMIT}")].map(|name| {
        let entries = repo_folder.join(name).read_dir().unwrap();
        entries
            .filter(|entry| {
                let name = entry.as_ref().unwrap().file_name().into_string().unwrap();
                name.ends_with(".tmp") || name.ends_with(".incomplete")
            })
            .count()
    });
    assert_eq!(leftovers, [0, 0, 0]);
}

#[test]
fn what_another_program_cached_is_used() {
    let content = weights(1000, 0.5);
    let client = Client::new();
    // As hf-hub writes it.
    let cache = hf_hub::Cache::new(client.cache()).model(REPO.to_owned());
    cache.create_ref(COMMIT).unwrap();
    let snapshot = cache.pointer_path(COMMIT);
    fs::create_dir_all(&snapshot).unwrap();
    for (name, bytes) in repo(&content) {
        if !name.contains('/') {
            fs::write(snapshot.join(name), bytes).unwrap();
        }
    }
    let hub = Hub::start(Vec::new());
    let checkpoint = open(&source(REPO), &offline(&client, &hub)).unwrap();
    assert_eq!(checkpoint.weights.names(), ["w"]);
    assert!(hub.requests().is_empty());
}

#[test]
fn cached_once_no_request_is_made_offline() {
    let hub = Hub::start(repo(&weights(1000, 0.5)));
    let client = Client::new();
    client.download(&hub).unwrap();
    let before = hub.requests().len();
    let checkpoint = open(&source(REPO), &offline(&client, &hub)).unwrap();
    assert_eq!(checkpoint.weights.names(), ["w"]);
    assert_eq!(hub.requests().len(), before);
    // Online, only the branch is looked up.
    client.download(&hub).unwrap();
    assert_eq!(hub.requests().len(), before + 1);
}

#[test]
fn offline_and_not_cached_names_the_file_and_the_command() {
    let content = weights(1000, 0.5);
    let hub = Hub::start(repo(&content));
    let client = Client::new();
    let options = offline(&client, &hub);
    let error = hub_error(download(
        &Source::parse(REPO, Some("v1")).unwrap(),
        &options,
    ));
    let text = error.to_string();
    assert!(
        text.contains("config.json") && text.contains("phi3 download org/name --revision v1"),
        "{text}"
    );
    assert!(
        text.contains(&client.cache().display().to_string()),
        "{text}"
    );

    let error = hub_error(download(&source("org/name/name-q4.gguf"), &options)).to_string();
    assert!(
        error.contains("phi3 download org/name/name-q4.gguf"),
        "{error}"
    );

    let folder = client.download(&hub).unwrap();
    fs::remove_file(folder.join(FILE)).unwrap();
    let error = hub_error(download(&source(REPO), &options)).to_string();
    assert!(
        error.contains(FILE) && error.contains("phi3 download org/name`"),
        "{error}"
    );
    let before = hub.requests().len();
    assert!(download(&source(REPO), &options).is_err());
    assert_eq!(hub.requests().len(), before);
}

#[test]
fn an_unreachable_hub_falls_back_to_the_cache() {
    let content = weights(1000, 0.5);
    let hub = Hub::start(repo(&content));
    let client = Client::new();
    let folder = client.download(&hub).unwrap();
    let ill = Hub::with_hook(Vec::new(), |_, _| Reply::new(503));
    assert_eq!(client.download(&ill).unwrap(), folder);
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let gone = HubOptions {
        endpoint: Some(format!("http://127.0.0.1:{port}")),
        ..client.options(&hub)
    };
    assert_eq!(download(&source(REPO), &gone).unwrap(), folder);
    // Without the weights it is no fallback.
    fs::remove_file(folder.join(FILE)).unwrap();
    assert!(matches!(client.hub_error(&ill), HubError::Server { .. }));
    // A refusal is an answer.
    let refusing = Hub::with_hook(Vec::new(), |_, _| Reply::new(401));
    assert!(matches!(
        client.hub_error(&refusing),
        HubError::NoAccess { .. }
    ));
}

#[test]
fn a_commit_hash_that_is_cached_needs_no_request() {
    let hub = Hub::start(repo(&weights(1000, 0.5)));
    let client = Client::new();
    let source = Source::parse(REPO, Some(COMMIT)).unwrap();
    let folder = download(&source, &client.options(&hub)).unwrap();
    let before = hub.requests().len();
    assert_eq!(download(&source, &client.options(&hub)).unwrap(), folder);
    assert_eq!(download(&source, &offline(&client, &hub)).unwrap(), folder);
    assert_eq!(hub.requests().len(), before);
    assert!(
        !client.repo_folder().join("refs").exists(),
        "a commit is no branch"
    );
    // Weights without a tokenizer are what another program may have cached: not enough.
    fs::remove_file(folder.join("tokenizer.json")).unwrap();
    download(&source, &client.options(&hub)).unwrap();
    assert!(folder.join("tokenizer.json").exists());
}

#[test]
fn tags_and_pull_requests_are_revisions() {
    let hub = Hub::start(repo(&weights(1000, 0.5)));
    let client = Client::new();
    for revision in ["v1", "refs/pr/1"] {
        let source = Source::parse(REPO, Some(revision)).unwrap();
        let folder = download(&source, &client.options(&hub)).unwrap();
        assert_eq!(
            read(&client.repo_folder().join("refs").join(revision)),
            COMMIT.as_bytes()
        );
        assert_eq!(download(&source, &offline(&client, &hub)).unwrap(), folder);
    }
}

#[test]
fn an_interrupted_update_leaves_the_older_commit_usable() {
    let (old, new) = (weights(1000, 0.5), weights(1000, 0.25));
    let hub = Hub::with_hook(repo(&old), |request, reply| {
        match request.is_get_of(FILE) && request.path.contains(NEXT) {
            true => Reply::new(404),
            false => reply,
        }
    });
    let client = Client::new();
    client.download(&hub).unwrap();
    hub.push(NEXT, repo(&new));
    assert!(client.download(&hub).is_err());
    let folder = download(&source(REPO), &offline(&client, &hub)).unwrap();
    assert!(folder.ends_with(COMMIT));
    assert_eq!(read(&folder.join(FILE)), old);

    let hub = Hub::start(Vec::new());
    hub.push(NEXT, repo(&new));
    let folder = client.download(&hub).unwrap();
    assert!(folder.ends_with(NEXT));
    assert_eq!(read(&folder.join(FILE)), new);
    // What did not change was not fetched again.
    assert!(hub.gets_of("config.json").is_empty());
}

fn sharded(index: &str) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = SMALL
        .map(|(name, text)| (name.to_owned(), text.as_bytes().to_vec()))
        .to_vec();
    files.push((
        "model.safetensors.index.json".to_owned(),
        index.as_bytes().to_vec(),
    ));
    for i in 1..=3 {
        files.push((
            format!("model-0000{i}-of-00003.safetensors"),
            weights(1000, i as f32),
        ));
    }
    files
}

#[test]
fn shards_come_by_their_index() {
    let hub = Hub::start(sharded(
        r#"{"weight_map":{"w":"model-00001-of-00003.safetensors","x":"model-00002-of-00003.safetensors"}}"#,
    ));
    let client = Client::new();
    let folder = client.download(&hub).unwrap();
    assert!(folder.join("model-00002-of-00003.safetensors").is_file());
    assert!(
        hub.gets_of("model-00003-of-00003.safetensors").is_empty(),
        "the index does not name it"
    );
    assert_eq!(
        download(&source(REPO), &offline(&client, &hub)).unwrap(),
        folder
    );
    fs::remove_file(folder.join("model-00002-of-00003.safetensors")).unwrap();
    let error = hub_error(download(&source(REPO), &offline(&client, &hub))).to_string();
    assert!(
        error.contains("model-00002-of-00003.safetensors"),
        "{error}"
    );
}

#[test]
fn an_index_cannot_lead_out_of_the_cache() {
    for shard in ["../../../evil.safetensors", "/tmp/evil.safetensors"] {
        let hub = Hub::start(sharded(&format!(r#"{{"weight_map":{{"w":"{shard}"}}}}"#)));
        let error = Client::new().download(&hub).unwrap_err();
        assert!(matches!(error, Error::UnsafeName { .. }), "{error}");
        assert!(error.to_string().contains(shard), "{error}");
        assert!(
            !hub.requests()
                .iter()
                .any(|request| request.path.contains("evil"))
        );
    }
}

#[test]
fn one_gguf_file_of_a_repo() {
    let files = ["a-q4.gguf", "a-f16.gguf", "config.json"]
        .map(|name| (name.to_owned(), name.as_bytes().to_vec()));
    let hub = Hub::start(files.to_vec());
    let client = Client::new();
    let error = client.download(&hub).unwrap_err();
    assert!(matches!(error, Error::SeveralGguf { .. }), "{error}");
    let source = source("org/name/a-q4.gguf");
    let path = download(&source, &client.options(&hub)).unwrap();
    assert_eq!(read(&path), b"a-q4.gguf");
    assert!(hub.gets_of("a-f16.gguf").is_empty() && hub.gets_of("config.json").is_empty());
    assert_eq!(download(&source, &offline(&client, &hub)).unwrap(), path);
}

#[test]
fn the_only_gguf_file_of_a_repo_is_the_model() {
    let hub = Hub::start(vec![("only.gguf".to_owned(), b"GGUF".to_vec())]);
    let client = Client::new();
    let path = client.download(&hub).unwrap();
    assert!(path.ends_with("only.gguf"));
    assert_eq!(
        download(&source(REPO), &offline(&client, &hub)).unwrap(),
        path
    );
}

#[test]
fn a_source_made_by_hand_is_checked() {
    let hub = Hub::start(Vec::new());
    let client = Client::new();
    for (repo_id, revision) in [
        ("../name", "main"),
        ("org/../x", "main"),
        ("org/name", "../../x"),
        ("name", "main"),
    ] {
        let source = Source::Hub {
            repo_id: repo_id.to_owned(),
            revision: revision.to_owned(),
            gguf_file: None,
        };
        let error = download(&source, &client.options(&hub)).unwrap_err();
        assert!(
            matches!(error, Error::NotAModel { .. }),
            "{repo_id}: {error}"
        );
    }
    assert!(hub.requests().is_empty());
}
