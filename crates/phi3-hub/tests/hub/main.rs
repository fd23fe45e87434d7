//! Downloads from an imitation of the hub on this machine's loopback address.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "all of this is test code, helpers included"
)]

mod answers;
mod cache;
mod kill;
mod look;
mod server;
mod transfer;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use phi3_hub::safetensors::{TensorData, TensorToWrite, write_safetensors};
use phi3_hub::{Error, HubError, HubOptions, Progress, RetryPolicy, Source, download};

use server::Hub;

const REPO: &str = "org/name";

/// A cache of its own, and what happened in it.
struct Client {
    folder: tempfile::TempDir,
    events: Arc<Events>,
}

#[derive(Default)]
struct Events(Mutex<Vec<String>>);

impl Progress for Events {
    fn start(&self, file: &str, total: u64, already: u64) {
        self.0
            .lock()
            .unwrap()
            .push(format!("start {file} {already}/{total}"));
    }

    fn advance(&self, file: &str, bytes: u64) {
        let mut events = self.0.lock().unwrap();
        let sum = match events
            .last()
            .and_then(|last| last.strip_prefix(&format!("got {file} ")))
        {
            Some(before) => {
                let before: u64 = before.parse().unwrap();
                events.pop();
                before + bytes
            }
            None => bytes,
        };
        events.push(format!("got {file} {sum}"));
    }

    fn finish(&self, file: &str) {
        self.0.lock().unwrap().push(format!("finish {file}"));
    }
}

impl Client {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            events: Arc::default(),
        }
    }

    fn cache(&self) -> PathBuf {
        self.folder.path().join("hub")
    }

    fn options(&self, hub: &Hub) -> HubOptions {
        HubOptions {
            cache_dir: Some(self.cache()),
            endpoint: Some(hub.address.clone()),
            progress: Arc::clone(&self.events) as Arc<dyn Progress>,
            retry: RetryPolicy {
                attempts: 4,
                delay: Duration::from_millis(5),
            },
            ..HubOptions::default()
        }
    }

    fn download(&self, hub: &Hub) -> Result<PathBuf, Error> {
        download(&source(REPO), &self.options(hub))
    }

    fn hub_error(&self, hub: &Hub) -> HubError {
        hub_error(self.download(hub))
    }

    /// The events of one file, without its name.
    fn events(&self, file: &str) -> Vec<String> {
        let events = self.events.0.lock().unwrap();
        let of_file = |event: &&String| event.split(' ').nth(1) == Some(file);
        events
            .iter()
            .filter(of_file)
            .map(|event| event.replace(&format!(" {file}"), ""))
            .collect()
    }

    fn repo_folder(&self) -> PathBuf {
        self.cache().join("models--org--name")
    }

    fn blob(&self, content: &[u8]) -> PathBuf {
        self.repo_folder()
            .join("blobs")
            .join(server::sha256(content))
    }

    fn incomplete(&self, content: &[u8]) -> PathBuf {
        self.repo_folder()
            .join("blobs")
            .join(format!("{}.incomplete", server::sha256(content)))
    }
}

fn source(model: &str) -> Source {
    Source::parse(model, None).unwrap()
}

fn hub_error(result: Result<PathBuf, Error>) -> HubError {
    match result.expect_err("must fail") {
        Error::Hub(error) => error,
        other => panic!("not an error of the hub: {other}"),
    }
}

/// A safetensors file of about this many bytes.
fn weights(bytes: usize, seed: f32) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w");
    let values: Vec<f32> = (0..bytes / 4).map(|i| i as f32 * seed).collect();
    let tensor = TensorToWrite {
        name: "w",
        shape: &[values.len()],
        data: TensorData::F32(&values),
    };
    write_safetensors(&path, &[tensor], &[]).unwrap();
    std::fs::read(path).unwrap()
}

const SMALL: [(&str, &str); 4] = [
    ("config.json", r#"{"model_type":"phi3"}"#),
    ("generation_config.json", r#"{"eos_token_id":7}"#),
    ("tokenizer.json", r#"{"version":"1.0"}"#),
    ("tokenizer_config.json", r#"{"chat_template":"T"}"#),
];

/// What nobody should fetch.
const DECOYS: [&str; 4] = [
    "README.md",
    "pytorch_model.bin",
    "onnx/model.onnx",
    "name-q4.gguf",
];

/// A repo with these weights, the small files and the decoys.
fn repo(weights: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<(String, Vec<u8>)> =
        vec![("model.safetensors".to_owned(), weights.to_vec())];
    files.extend(SMALL.map(|(name, text)| (name.to_owned(), text.as_bytes().to_vec())));
    files.extend(DECOYS.map(|name| (name.to_owned(), b"decoy".to_vec())));
    files
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
