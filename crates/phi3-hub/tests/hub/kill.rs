//! A process that is killed in the middle of a file.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use phi3_hub::{HubOptions, download};

use crate::server::Hub;
use crate::{Client, REPO, read, repo, source, weights};

const FILE: &str = "model.safetensors";
const ENDPOINT: &str = "PHI3_HUB_TEST_ENDPOINT";
const CACHE: &str = "PHI3_HUB_TEST_CACHE";

#[test]
#[ignore = "the victim: run as a process of its own by the test below"]
fn victim() {
    let (Ok(endpoint), Ok(cache)) = (std::env::var(ENDPOINT), std::env::var(CACHE)) else {
        println!("skipped: only the test that kills it gives it something to do");
        return;
    };
    let options = HubOptions {
        endpoint: Some(endpoint),
        cache_dir: Some(cache.into()),
        ..HubOptions::default()
    };
    download(&source(REPO), &options).unwrap();
}

#[test]
fn a_process_killed_in_the_middle_of_a_file_does_no_harm() {
    let content = weights(2_000_000, 0.5);
    let half = content.len() / 2;
    let hub = Hub::with_hook(repo(&content), move |request, mut reply| {
        if request.is_get_of(FILE) && request.header("range").is_none() {
            reply.cut = Some(half);
            reply.hang = true;
        }
        reply
    });
    let client = Client::new();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "kill::victim", "--ignored"])
        .env(ENDPOINT, &hub.address)
        .env(CACHE, client.cache())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let incomplete = client.incomplete(&content);
    let begun = Instant::now();
    while std::fs::metadata(&incomplete).map_or(0, |found| found.len()) < half as u64 {
        assert!(
            begun.elapsed() < Duration::from_secs(20),
            "the victim does not get on"
        );
        assert!(
            child.try_wait().unwrap().is_none(),
            "the victim ended by itself"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    child.kill().unwrap();
    child.wait().unwrap();

    assert!(!client.blob(&content).exists());
    assert!(!client.repo_folder().join("refs/main").exists());
    let offline = HubOptions {
        offline: true,
        ..client.options(&hub)
    };
    assert!(
        download(&source(REPO), &offline).is_err(),
        "half a model is no model"
    );

    let folder = client.download(&hub).unwrap();
    assert!(read(&folder.join(FILE)) == content);
    let gets = hub.gets_of(FILE);
    assert_eq!(gets.len(), 2);
    assert_eq!(
        gets[1].header("range"),
        Some(format!("bytes={half}-").as_str())
    );
}
