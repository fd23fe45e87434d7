//! Bad examples: a rule that cannot complain checks nothing.

use std::path::PathBuf;

use crate::rules::*;
use crate::workspace::{Crate, Dependency, File};

fn member(folder: &str, dependencies: &[(&str, bool)]) -> Crate {
    let path = PathBuf::from(folder);
    let name = path.file_name().map(|name| name.to_string_lossy().into());
    let dependency = |&(name, dev): &(&str, bool)| Dependency {
        name: name.to_owned(),
        dev,
    };
    Crate {
        name: name.unwrap_or_default(),
        folder: path,
        dependencies: dependencies.iter().map(dependency).collect(),
        ..Crate::default()
    }
}

fn with_file(mut it: Crate, name: &str, text: &str) -> Crate {
    it.files.push(File {
        path: it.folder.join(name),
        text: text.to_owned(),
    });
    it
}

fn with_features(mut it: Crate, features: &[(&str, &str)]) -> Crate {
    for (name, target) in features {
        let targets = it.features.entry((*name).to_owned()).or_default();
        targets.push((*target).to_owned());
    }
    it
}

#[track_caller]
fn complains(complaints: &[String], expected: &[&str]) {
    assert_eq!(complaints.len(), expected.len(), "{complaints:#?}");
    for (complaint, expected) in complaints.iter().zip(expected) {
        assert!(complaint.contains(expected), "{complaint} ({expected})");
    }
}

#[test]
fn edges() {
    let crates = [
        member("crates/phi3-kernels", &[("half", false)]),
        member(
            "crates/phi3-nn",
            &[("phi3-kernels", false), ("phi3-hub", true)],
        ),
        member("crates/phi3-hub", &[("phi3-text", false)]),
        member("crates/phi3-text", &[("phi3-nn", false)]),
        member(
            "models/phi-3-mini",
            &[("phi3-hub", true), ("phi3-text", false)],
        ),
        member("models/phi-3-small", &[("phi-3-mini", false)]),
        member("models/phi-3-5-vision", &[("phi-3-mini", false)]),
        member(
            "crates/phi3",
            &[("phi-3-mini", false), ("phi3-tests", true)],
        ),
        member("crates/phi3-cli", &[("phi3", false)]),
        member("tests/phi3-tests", &[("phi3", false), ("phi3-cli", false)]),
    ];
    complains(
        &wrong_edges(&crates),
        &[
            "phi3-nn: depends on phi3-hub",
            "phi3-hub: depends on phi3-text",
            "phi-3-mini: depends on phi3-text",
            "phi-3-small: depends on phi-3-mini",
            "phi3: depends on phi3-tests",
            "phi3-tests: depends on phi3-cli",
        ],
    );
}

#[test]
fn crates_of_the_outside_world() {
    let crates = [
        member(
            "models/phi-3-mini",
            &[("clap", false), ("tokenizers", true)],
        ),
        member("crates/phi3-cli", &[("clap", false)]),
    ];
    complains(&worldly_models(&crates), &["phi-3-mini: depends on clap"]);
}

#[test]
fn features() {
    let nn = DEVICE_FEATURES.map(|name| (name, format!("candle-core/{name}")));
    let nn = nn.each_ref().map(|(name, target)| (*name, target.as_str()));
    let through = DEVICE_FEATURES.map(|name| (name, format!("phi3-nn/{name}")));
    let through: Vec<_> = through.iter().map(|(n, t)| (*n, t.as_str())).collect();
    let nn = with_features(member("crates/phi3-nn", &[]), &nn);
    let good = with_features(member("models/good", &[]), &through);
    complains(&lost_features(&[nn.clone(), good]), &[]);

    // The last feature is missing; the first is on by default.
    let bad = with_features(member("models/bad", &[]), &through[..3]);
    let bad = with_features(bad, &[("default", "cuda")]);
    complains(
        &lost_features(&[nn.clone(), bad]),
        &[
            "bad: its feature accelerate does not reach phi3-nn",
            "bad: its feature accelerate does not reach candle-core",
            "bad: turns bad/cuda on by default",
            "bad: turns candle-core/cuda on by default",
            "bad: turns phi3-nn/cuda on by default",
        ],
    );
    // Declared everywhere, but one link is not forwarded.
    let mut broken = with_features(member("crates/phi3-cli", &[]), &through);
    broken.features.insert("metal".to_owned(), Vec::new());
    complains(
        &lost_features(&[nn, broken]),
        &[
            "metal does not reach phi3-nn",
            "metal does not reach candle-core",
        ],
    );
}

#[test]
fn manifests() {
    let mut it = member("crates/phi3-nn", &[]);
    it.manifest = "[package]\nversion.workspace = true\nedition = \"2021\"\n\
                   rust-version.workspace = true\nlicense.workspace = true\n"
        .to_owned();
    complains(
        &own_decisions(&[it]),
        &["`edition.workspace = true`", "the workspace's lints"],
    );
}

#[test]
fn unsafe_blocks() {
    let text = "#![forbid(unsafe_code)]\n// unsafe, in a comment\nlet x = unsafe { y };\n\
                let why = \"unsafe, in a string\";\n";
    let mut nn = with_file(member("crates/phi3-nn", &[]), "src/lib.rs", text);
    nn = with_file(nn, "src/main.rs", "fn main() {}\n");
    nn.roots = nn.files.iter().map(|file| file.path.clone()).collect();
    let hub = member("crates/phi3-hub", &[]);
    let hub = with_file(hub, "src/mapping.rs", "unsafe { map() }\n");
    let mut hub = with_file(hub, "src/lib.rs", "pub mod mapping;\n");
    hub.roots.insert(hub.files[1].path.clone());
    let kernels = with_file(
        member("crates/phi3-kernels", &[]),
        "src/lib.rs",
        "unsafe fn f() {}\n",
    );
    complains(
        &unsafe_code(&[nn, hub, kernels]),
        &[
            "crates/phi3-nn/src/lib.rs:3: unsafe code",
            "crates/phi3-nn/src/main.rs:1: lacks `#![forbid(unsafe_code)]`",
            "crates/phi3-hub/src/lib.rs:1: lacks `#![deny(unsafe_code)]`",
        ],
    );
}

#[test]
fn misplaced_lines() {
    let model = with_file(
        member("models/phi-3-mini", &[]),
        "src/model.rs",
        "#[cfg(feature = \"flash-attn\")]\nuse std::fs;\nlet name = \"blk.0\";\n",
    );
    let model = with_file(model, "src/quantized_model.rs", "");
    let model = with_file(model, "examples/generate.rs", "use std::fs;\n");
    let hub = with_file(
        member("crates/phi3-hub", &[]),
        "src/lib.rs",
        "let d = Device::new_cuda(0);\nuse std::arch::x86_64;\nlet name = \"blk.0\";\n",
    );
    let nn = with_file(
        member("crates/phi3-nn", &[]),
        "src/device.rs",
        "if cfg!(feature = \"cuda\") { Device::new_cuda(0) }\n",
    );
    complains(
        &misplaced_code(&[model, hub, nn]),
        &[
            "model.rs:1: a feature switch",
            "model.rs:2: a model does no I/O",
            "model.rs:3: a GGUF tensor name",
            "quantized_model.rs:1: a second",
            "hub/src/lib.rs:1: a choice of device",
            "hub/src/lib.rs:2: a choice of instructions",
        ],
    );
}

#[test]
fn models_without_a_room() {
    let mut it = member("models/phi-3-mini", &[]);
    for name in ["src/lib.rs", "src/config.rs", "examples/generate.rs"] {
        it = with_file(it, name, "");
    }
    complains(&missing_rooms(&[it]), &["src/model.rs is missing"]);
}

#[test]
fn an_example_that_is_not_compiled() {
    let readme = "Text\n```rust\nlet x = 1;\n\nlet y = x;\n```\n";
    let same = "//! Docs:\n//! ```no_run\n//! let x = 1;\n//!\n//! let y = x;\n//! ```\n";
    complains(&other_example(readme, same), &[]);
    for other in [same.replace("y = x", "y = 2"), String::new()] {
        complains(&other_example(readme, &other), &["README.md"]);
    }
}

#[test]
fn long_sources() {
    let text = |lines| "x\n".repeat(lines);
    let it = with_file(
        member("crates/phi3", &[]),
        "src/short.rs",
        &text(LONGEST_FILE),
    );
    let it = with_file(it, "src/long.rs", &text(LONGEST_FILE + 1));
    complains(&long_files(&[it]), &["src/long.rs:601: more than 600"]);
}

#[test]
fn scripts_that_are_not_there() {
    let text =
        "Run `scripts/demo.sh`.\n```sh\n./scripts/gone.sh --flag\n```\nSee .ci/run, scripts/.";
    let complaints = missing_scripts(text, &|path| path == "scripts/demo.sh");
    complains(&complaints, &["scripts/gone.sh", ".ci/run"]);
    assert!(code_lines(text).eq(["./scripts/gone.sh --flag"]));
}

#[test]
fn private_folders() {
    let file = File {
        path: "x.md".into(),
        text: format!(
            "cd /{0}/me\n~/{0}/fine\n$HOME/{0}/fine\n\"/{1}/x\"\n(/{1}/y\n",
            "home", "Users"
        ),
    };
    complains(&private_paths(&file), &["x.md:1", "x.md:4", "x.md:5"]);
}
