//! Models that are looked at, or whose tokenizer is used, without their weights.

use phi3_hub::safetensors::{INDEX, SINGLE};
use phi3_hub::{Checkpoint, Error, download, open, open_headers, open_without_weights};

use super::server::{COMMIT, Hub, Reply};
use super::{Client, REPO, SMALL, read, repo, source, weights};

const NEXT: &str = "89abcdef0123456789abcdef0123456789abcdef";
const SHARDS: [&str; 2] = [
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
];

fn small_files_are_there(checkpoint: &Checkpoint) {
    assert_eq!(checkpoint.config["model_type"], "phi3");
    let json = checkpoint.tokenizer.tokenizer_json.as_deref();
    assert_eq!(json, Some(SMALL[2].1.as_bytes()));
    assert_eq!(checkpoint.chat_template.as_ref().unwrap().text, "T");
    assert!(checkpoint.weights.names().is_empty());
}

fn offline(client: &Client, hub: &Hub) -> phi3_hub::HubOptions {
    phi3_hub::HubOptions {
        offline: true,
        ..client.options(hub)
    }
}

/// A file's length field and header, as long as they are.
fn start(file: &[u8]) -> usize {
    8 + u64::from_le_bytes(*file.first_chunk().unwrap()) as usize
}

/// Two shards.
fn sharded() -> Vec<(String, Vec<u8>)> {
    let (first, second) = (weights(4000, 0.5), weights(8000, 0.25));
    let second = String::from_utf8_lossy(&second[..start(&second)])
        .replace("\"w\"", "\"x\"")
        .into_bytes()
        .into_iter()
        .chain(second[start(&second)..].to_vec())
        .collect();
    let index = serde_json::json!({"weight_map": {"w": SHARDS[0], "x": SHARDS[1]}});
    let mut files = repo(&first);
    files.retain(|(name, _)| name != SINGLE);
    files.push((SHARDS[0].to_owned(), first));
    files.push((SHARDS[1].to_owned(), second));
    files.push((INDEX.to_owned(), index.to_string().into_bytes()));
    files
}

#[test]
fn a_tokenizer_comes_without_weights() {
    for files in [repo(&weights(1000, 0.5)), sharded()] {
        let hub = Hub::start(files);
        let client = Client::new();
        let options = client.options(&hub);
        let checkpoint = open_without_weights(&source(REPO), &options).unwrap();
        small_files_are_there(&checkpoint);
        assert!(checkpoint.tensors.is_empty());
        for request in hub.requests() {
            assert!(!request.path.ends_with(".safetensors"), "{request:?}");
        }
        // It is there without the hub too; the weights are said to be missing.
        let offline = offline(&client, &hub);
        small_files_are_there(&open_without_weights(&source(REPO), &offline).unwrap());
        assert!(open(&source(REPO), &offline).is_err());
        // And what is there is no hindrance to fetching the rest.
        assert!(open(&source(REPO), &options).unwrap().weights.names().len() <= 2);
        open(&source(REPO), &offline).unwrap();
    }
}

#[test]
fn a_newer_tokenizer_leaves_the_older_commit_usable() {
    let (old, new) = (weights(1000, 0.5), weights(1000, 0.25));
    let hub = Hub::start(repo(&old));
    let client = Client::new();
    client.download(&hub).unwrap();
    hub.push(NEXT, repo(&new));
    let options = client.options(&hub);
    for open in [open_without_weights, open_headers] {
        let checkpoint = open(&source(REPO), &options).unwrap();
        assert!(checkpoint.origin.ends_with(NEXT), "{}", checkpoint.origin);
        let folder = download(&source(REPO), &offline(&client, &hub)).unwrap();
        assert!(folder.ends_with(COMMIT), "{}", folder.display());
        assert_eq!(read(&folder.join(SINGLE)), old);
    }
}

#[test]
fn headers_tell_what_the_weights_are() {
    for files in [repo(&weights(100_000, 0.5)), sharded()] {
        let lengths: Vec<(String, usize)> = files
            .iter()
            .filter(|(name, _)| name.ends_with(".safetensors"))
            .map(|(name, content)| (name.clone(), start(content)))
            .collect();
        let cut = lengths.clone();
        // The connection ends behind the header: nothing more is read.
        let hub = Hub::with_hook(files.clone(), move |request, reply| {
            match cut.iter().find(|(name, _)| request.is_get_of(name)) {
                Some((_, length)) => reply.cut(*length),
                None => reply,
            }
        });
        let client = Client::new();
        let seen = open_headers(&source(REPO), &client.options(&hub)).unwrap();
        small_files_are_there(&seen);
        for (name, _) in &lengths {
            assert_eq!(hub.gets_of(name).len(), 1, "{name}");
            assert!(client.events(name).is_empty(), "{name} was downloaded");
        }

        let hub = Hub::start(files);
        let here = open(&source(REPO), &client.options(&hub)).unwrap();
        assert_eq!(seen.tensors, here.tensors);
        assert_eq!(here.tensors.len(), lengths.len());
        // What is here is read here.
        let before = hub.gets_of(&lengths[0].0).len();
        let again = open_headers(&source(REPO), &client.options(&hub)).unwrap();
        assert_eq!(again.tensors, here.tensors);
        assert_eq!(again.weights.names(), here.weights.names());
        assert_eq!(hub.gets_of(&lengths[0].0).len(), before);
    }
}

#[test]
fn a_header_that_is_cut_or_damaged_is_said() {
    let whole = weights(1000, 0.5);
    let client = Client::new();
    let look = |hub: &Hub| open_headers(&source(REPO), &client.options(hub)).unwrap_err();

    let hub = Hub::with_hook(repo(&whole), |request, reply| {
        match request.is_get_of(SINGLE) {
            true => reply.cut(20),
            false => reply,
        }
    });
    let error = look(&hub);
    assert!(matches!(error, Error::Hub(_)), "{error}");
    assert_eq!(hub.gets_of(SINGLE).len(), 4, "it is tried again");

    for (damaged, part) in [
        (whole[..whole.len() - 4].to_vec(), "outside"),
        (b"<html></html>".to_vec(), "header"),
        (vec![b'x'; 5], "5 bytes"),
    ] {
        let error = look(&Hub::start(repo(&damaged)));
        assert!(matches!(error, Error::Safetensors { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("org/name/model.safetensors"), "{text}");
        assert!(text.contains(part), "{part}: {text}");
    }
    let hub = Hub::with_hook(repo(&whole), |request, reply| {
        match request.is_get_of(SINGLE) {
            true => Reply::new(403),
            false => reply,
        }
    });
    assert!(matches!(look(&hub), Error::Hub(_)));
}
