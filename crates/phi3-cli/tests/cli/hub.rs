//! Download once from a hub on loopback, then work without it.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::support::{DONE, NO_MODEL, arg, command, run_with};
use crate::tiny::Tiny;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A hub with one repo, `org/tiny`, whose branches are `main` and `v1`.
struct Hub {
    address: String,
    requests: Arc<AtomicUsize>,
    open: Arc<AtomicBool>,
}

impl Hub {
    fn serve(model: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        for entry in std::fs::read_dir(model)? {
            let path = entry?.path();
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            files.insert(name, std::fs::read(&path)?);
        }
        files.insert("README.md".to_owned(), b"not needed".to_vec());
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let hub = Self {
            address: format!("http://{}", listener.local_addr()?),
            requests: Arc::default(),
            open: Arc::new(AtomicBool::new(true)),
        };
        let (requests, open) = (Arc::clone(&hub.requests), Arc::clone(&hub.open));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if open.load(Ordering::SeqCst) {
                    requests.fetch_add(1, Ordering::SeqCst);
                    let _ = answer(&stream, &files);
                }
            }
        });
        Ok(hub)
    }

    fn command(&self, cache: &Path, args: &[&str]) -> Command {
        let mut command = command(args);
        command
            .env_remove("HF_HUB_OFFLINE")
            .env("HF_ENDPOINT", &self.address)
            .env("HF_HOME", cache);
        command
    }
}

/// One request a connection.
fn answer(mut stream: &TcpStream, files: &BTreeMap<String, Vec<u8>>) -> Result<()> {
    let mut lines = BufReader::new(stream).lines();
    let request = lines.next().context("a request")??;
    while !lines.next().context("a header")??.is_empty() {}
    let mut words = request.split(' ');
    let (method, path) = (
        words.next().unwrap_or_default(),
        words.next().unwrap_or_default(),
    );
    let (status, body) = match path.strip_prefix("/api/models/org/tiny/revision/") {
        Some("main" | "v1") => {
            let siblings: Vec<_> = files
                .keys()
                .map(|name| json!({ "rfilename": name }))
                .collect();
            let listing = json!({ "sha": COMMIT, "siblings": siblings });
            ("200 OK", listing.to_string().into_bytes())
        }
        _ => match path.strip_prefix(&format!("/org/tiny/resolve/{COMMIT}/")) {
            Some(name) if files.contains_key(name) => ("200 OK", files[name].clone()),
            _ => ("404 Not Found", b"{\"error\": \"not here\"}".to_vec()),
        },
    };
    let code = match path.starts_with("/api/models/org/tiny/") {
        true => "RevisionNotFound",
        false => "RepoNotFound",
    };
    let status = match status.starts_with("404") {
        true => format!("{status}\r\nX-Error-Code: {code}"),
        false => status.to_owned(),
    };
    let etag = path.rsplit('/').next().unwrap_or_default();
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nETag: \"{etag}\"\r\n\
         X-Repo-Commit: {COMMIT}\r\nConnection: close\r\n\r\n"
    )?;
    if method == "GET" {
        stream.write_all(&body)?;
    }
    Ok(stream.flush()?)
}

#[test]
fn once_downloaded_everything_runs_without_the_hub() -> Result<()> {
    let tiny = Tiny::new()?;
    let home = tempfile::tempdir()?;
    let hub = Hub::serve(tiny.path())?;
    let run = |args: &[&str]| run_with(b"hello\n", &mut hub.command(home.path(), args));

    let got = run(&["download", "org/tiny"])?;
    ensure!(got.code == Some(DONE), "{got:?}");
    let snapshot = Path::new(got.stdout.trim_end());
    ensure!(snapshot.starts_with(home.path().join("hub")), "{got:?}");
    ensure!(
        got.stdout.lines().count() == 1,
        "stdout is the path alone: {got:?}"
    );
    ensure!(
        got.stderr.contains("model.safetensors"),
        "progress is on stderr: {got:?}"
    );
    ensure!(snapshot.join("tokenizer.json").is_file());
    ensure!(
        !snapshot.join("README.md").exists(),
        "a file that is not needed was fetched"
    );

    // The network is cut.
    hub.open.store(false, Ordering::SeqCst);
    let before = hub.requests.load(Ordering::SeqCst);
    let local = arg(tiny.path());
    for args in [
        &["generate", "--max-new-tokens", "8", "--model"][..],
        &["chat", "--max-new-tokens", "8", "--model"],
        &["tokenize", "--model"],
    ] {
        let expected = run(&[args, &[&local]].concat())?;
        let offline = run(&[args, &["org/tiny", "--offline"]].concat())?;
        ensure!(offline.code == Some(DONE), "{offline:?}");
        ensure!(
            offline.stdout == expected.stdout,
            "{offline:?} {expected:?}"
        );
        let mut by_environment = hub.command(home.path(), &[args, &["org/tiny"]].concat());
        let offline = run_with(b"hello\n", by_environment.env("HF_HUB_OFFLINE", "1"))?;
        ensure!(
            offline.stdout == expected.stdout,
            "{offline:?} {expected:?}"
        );
    }
    let commit = run(&["inspect", "org/tiny", "--revision", COMMIT])?;
    ensure!(commit.code == Some(DONE), "{commit:?}");
    ensure!(
        hub.requests.load(Ordering::SeqCst) == before,
        "a request was made"
    );
    run(&["inspect", "org/tiny", "--offline", "--revision", "v1"])?
        .says(NO_MODEL, &["v1", "phi3 download org/tiny --revision v1"])
}

#[test]
fn looking_and_tokenizing_leave_the_weights_on_the_hub() -> Result<()> {
    let tiny = Tiny::new()?;
    let home = tempfile::tempdir()?;
    let hub = Hub::serve(tiny.path())?;
    let local = arg(tiny.path());
    let run = |args: &[&str]| run_with(b"hello\n", &mut hub.command(home.path(), args));
    for args in [&["tokenize", "--model"][..], &["inspect", "--tensors"]] {
        let expected = run(&[args, &[&local]].concat())?;
        let got = run(&[args, &["org/tiny"]].concat())?;
        ensure!(got.code == Some(DONE), "{got:?}");
        // The first line of a description is where the model is.
        let rest = |text: &str| text.lines().skip(1).map(str::to_owned).collect::<Vec<_>>();
        ensure!(
            rest(&got.stdout) == rest(&expected.stdout),
            "{got:?} {expected:?}"
        );
        ensure!(!got.stderr.contains("model.safetensors"), "{got:?}");
    }
    run(&["generate", "--offline", "--model", "org/tiny"])?
        .says(NO_MODEL, &["model.safetensors", "phi3 download org/tiny"])
}

#[test]
fn revisions_caches_and_repos_that_are_not_there() -> Result<()> {
    let tiny = Tiny::new()?;
    let home = tempfile::tempdir()?;
    let hub = Hub::serve(tiny.path())?;
    let run = |args: &[&str]| run_with(b"", &mut hub.command(home.path(), args));
    let elsewhere = home.path().join("elsewhere");
    let got = run(&[
        "download",
        "-m",
        "org/tiny",
        "--revision",
        "v1",
        "--cache-dir",
        &arg(&elsewhere),
    ])?;
    ensure!(got.code == Some(DONE), "{got:?}");
    ensure!(
        Path::new(got.stdout.trim_end()).starts_with(&elsewhere),
        "{got:?}"
    );
    run(&["download", "org/other"])?.says(NO_MODEL, &["org/other"])?;
    run(&["download", "org/tiny", "--revision", "v2"])?.says(NO_MODEL, &["org/tiny", "v2"])?;
    run(&["download", "org/tiny/q4.gguf"])?.says(NO_MODEL, &["q4.gguf"])
}

#[test]
fn a_hub_that_cannot_be_reached_is_said() -> Result<()> {
    let home = tempfile::tempdir()?;
    // A port that was free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let mut command = command(["download", "org/tiny"]);
    command
        .env_remove("HF_HUB_OFFLINE")
        .env("HF_ENDPOINT", format!("http://127.0.0.1:{port}"))
        .env("HF_HOME", home.path());
    run_with(b"", &mut command)?.says(NO_MODEL, &["org/tiny", "127.0.0.1"])
}
