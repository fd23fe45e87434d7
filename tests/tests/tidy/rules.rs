//! The rules.

use std::collections::BTreeSet;
use std::path::Path;

use crate::workspace::{Crate, File};

/// Features that choose a device or a library, and mean something in phi3-nn alone.
pub const DEVICE_FEATURES: [&str; 4] = ["cuda", "metal", "mkl", "accelerate"];

/// Lines above which a source file is two files.
pub const LONGEST_FILE: usize = 600;

/// Files that are longer, each with its reason.
const LONG_FILES: [(&str, &str); 0] = [];

/// The home folder of examples, which belongs to nobody.
const EXAMPLE_HOME: &str = "/home/ada";

/// Crates that a model may use in its examples only: it does no I/O and knows no hub, tokenizer,
/// server or command line.
const NOT_IN_A_MODEL: [&str; 12] = [
    "axum",
    "clap",
    "hf-hub",
    "hyper",
    "memmap2",
    "minijinja",
    "phi3-hub",
    "phi3-text",
    "reqwest",
    "tokenizers",
    "tokio",
    "ureq",
];

pub fn wrong_edges(crates: &[Crate]) -> Vec<String> {
    let mut complaints = Vec::new();
    for from in crates {
        for dependency in &from.dependencies {
            let Some(to) = crates.iter().find(|other| other.name == dependency.name) else {
                continue;
            };
            let vision = from.name == "phi-3-5-vision" && to.name == "phi-3-mini";
            let example = from.is_model()
                && dependency.dev
                && ["phi3-hub", "phi3-text"].contains(&to.name.as_str());
            if !(to.floor() < from.floor() || vision || example) {
                complaints.push(format!(
                    "{}: depends on {}, but the direction is kernels <- nn <- {{hub, text, \
                     models}} <- phi3 <- {{cli, server, train, eval, tests}}",
                    from.name, to.name
                ));
            }
        }
    }
    complaints
}

pub fn worldly_models(crates: &[Crate]) -> Vec<String> {
    let models = crates.iter().filter(|it| it.is_model());
    models
        .flat_map(|model| {
            let normal = model.dependencies.iter().filter(|it| !it.dev);
            normal
                .filter(|it| NOT_IN_A_MODEL.contains(&it.name.as_str()))
                .map(|it| {
                    format!(
                        "{}: depends on {}; a model may do so only for its examples",
                        model.name, it.name
                    )
                })
        })
        .collect()
}

pub fn lost_features(crates: &[Crate]) -> Vec<String> {
    let mut complaints = Vec::new();
    for from in crates {
        let facing_users = from.is_model() || from.name == "phi3" || from.name == "phi3-nn";
        let above = from.floor() == 4 && from.folder.starts_with("crates");
        if !(facing_users || above) {
            continue;
        }
        for feature in DEVICE_FEATURES {
            let reached = reached_features(crates, &from.name, feature);
            for end in ["phi3-nn", "candle-core"] {
                if !reached.contains(&(end.to_owned(), feature.to_owned())) {
                    complaints.push(format!(
                        "{}: its feature {feature} does not reach {end}/{feature}",
                        from.name
                    ));
                }
            }
        }
        for (crate_name, feature) in reached_features(crates, &from.name, "default") {
            if DEVICE_FEATURES.contains(&feature.as_str()) {
                complaints.push(format!(
                    "{}: turns {crate_name}/{feature} on by default",
                    from.name
                ));
            }
        }
    }
    complaints
}

/// All (crate, feature) that a feature turns on, itself included if the crate has it.
fn reached_features(crates: &[Crate], name: &str, feature: &str) -> BTreeSet<(String, String)> {
    let mut reached = BTreeSet::new();
    let mut open = vec![(name.to_owned(), feature.to_owned())];
    while let Some((name, feature)) = open.pop() {
        let member = crates.iter().find(|it| it.name == name);
        let declared = member.map(|it| it.features.get(&feature));
        // A crate from outside ends the way; a member must know the feature.
        if declared == Some(None) || !reached.insert((name.clone(), feature.clone())) {
            continue;
        }
        for target in declared.flatten().into_iter().flatten() {
            match target.split_once('/') {
                Some((other, feature)) => {
                    open.push((other.trim_end_matches('?').to_owned(), feature.to_owned()));
                }
                None if target.starts_with("dep:") => {}
                None => open.push((name.clone(), target.clone())),
            }
        }
    }
    reached
}

pub fn own_decisions(crates: &[Crate]) -> Vec<String> {
    let mut complaints = Vec::new();
    for it in crates {
        for field in ["version", "edition", "rust-version", "license"] {
            let inherited = format!("{field}.workspace = true");
            if !it.manifest.lines().any(|line| line == inherited) {
                complaints.push(format!("{}: Cargo.toml lacks `{inherited}`", it.name));
            }
        }
        if !it.manifest.contains("\n[lints]\nworkspace = true\n") {
            complaints.push(format!(
                "{}: Cargo.toml does not inherit the workspace's lints",
                it.name
            ));
        }
    }
    complaints
}

pub fn unsafe_code(crates: &[Crate]) -> Vec<String> {
    let mut complaints = Vec::new();
    for it in crates {
        let (attribute, unsafe_file) = match it.name.as_str() {
            "phi3-kernels" => continue,
            "phi3-hub" => ("#![deny(unsafe_code)]", Some("src/mapping.rs")),
            _ => ("#![forbid(unsafe_code)]", None),
        };
        for file in &it.files {
            let is_root = it.roots.contains(&file.path);
            if is_root && !file.code().any(|(_, line)| line == attribute) {
                complaints.push(file.complaint(1, &format!("lacks `{attribute}`")));
            }
            if unsafe_file.is_some_and(|name| file.path == it.folder.join(name)) {
                continue;
            }
            for (number, line) in file.code() {
                // Every second part is the inside of a string.
                let mut outside = line.split('"').step_by(2).flat_map(words);
                if outside.any(|word| word == "unsafe") {
                    complaints.push(file.complaint(
                        number,
                        "unsafe code; only phi3-kernels and the mapping module of phi3-hub have any",
                    ));
                }
            }
        }
    }
    complaints
}

pub fn misplaced_code(crates: &[Crate]) -> Vec<String> {
    // What, where it may stand, and what to do instead.
    type Applies = fn(&Crate) -> bool;
    let rules: [(&[&str], Applies, &str); 5] = [
        (
            &["cfg(feature", "cfg!(feature", "cfg_attr(feature"],
            Crate::is_model,
            "a feature switch in a model; the choice belongs in phi3-nn",
        ),
        (
            &["std::fs", "std::net", "std::process", "File::open"],
            |it| it.is_model(),
            "a model does no I/O; phi3-hub reads files",
        ),
        (
            &[
                "Device::new_cuda",
                "Device::new_metal",
                "Device::cuda_if_available",
                "Device::metal_if_available",
                "feature = \"cuda\"",
                "feature = \"metal\"",
                "feature = \"mkl\"",
                "feature = \"accelerate\"",
            ],
            |it| it.name != "phi3-nn",
            "a choice of device; it belongs in phi3-nn::device",
        ),
        (
            &["std::arch", "core::arch", "is_x86_feature_detected!"],
            |it| it.name != "phi3-kernels",
            "a choice of instructions; it belongs in phi3-kernels::dispatch",
        ),
        (
            &["\"blk.", "token_embd"],
            |it| it.name != "phi3-hub" && it.floor() < 4,
            "a GGUF tensor name; phi3-hub::gguf turns them into Hugging Face's",
        ),
    ];
    let mut complaints = Vec::new();
    for it in crates {
        for file in &it.files {
            // Examples do I/O, that is what they show.
            let in_src = file.path.starts_with(it.folder.join("src"));
            let name = file.path.file_name().and_then(|name| name.to_str());
            if it.is_model() && name.is_some_and(|name| name.contains("quantized")) {
                complaints.push(file.complaint(1, "a second, quantized copy of a model"));
            }
            for (number, line) in file.code().filter(|_| in_src) {
                for (patterns, applies, rule) in rules {
                    if applies(it) && patterns.iter().any(|pattern| line.contains(pattern)) {
                        complaints.push(file.complaint(number, rule));
                    }
                }
            }
        }
    }
    complaints
}

pub fn missing_rooms(crates: &[Crate]) -> Vec<String> {
    let mut complaints = Vec::new();
    for model in crates.iter().filter(|it| it.is_model()) {
        for room in [
            "src/lib.rs",
            "src/config.rs",
            "src/model.rs",
            "examples/generate.rs",
        ] {
            let path = model.folder.join(room);
            if !model.files.iter().any(|file| file.path == path) {
                complaints.push(format!(
                    "{}: {room} is missing; every model has it",
                    model.name
                ));
            }
        }
    }
    complaints
}

pub fn long_files(crates: &[Crate]) -> Vec<String> {
    let mut complaints = Vec::new();
    for file in crates.iter().flat_map(|it| &it.files) {
        let lines = file.text.lines().count();
        let excused = LONG_FILES
            .iter()
            .any(|(path, _)| file.path == Path::new(path));
        if lines > LONGEST_FILE && !excused {
            complaints.push(file.complaint(
                lines,
                &format!("more than {LONGEST_FILE} lines; split it by what it is about"),
            ));
        }
        if lines <= LONGEST_FILE && excused {
            complaints.push(file.complaint(lines, "no longer long; take it off LONG_FILES"));
        }
    }
    complaints
}

/// Scripts that a document names and that `exists` does not know.
pub fn missing_scripts(document: &str, exists: &dyn Fn(&str) -> bool) -> Vec<String> {
    let part_of_a_path = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
    let mut complaints = Vec::new();
    for path in document.split(|c| !part_of_a_path(c)) {
        let path = path.trim_start_matches("./").trim_end_matches(['.', '/']);
        let named = path.starts_with("scripts/") || path.starts_with(".ci/");
        if named && !exists(path) {
            complaints.push(format!("{path} is named in a document, but is no file"));
        }
    }
    complaints
}

/// Whether the README's Rust example is the one that the facade's documentation compiles.
pub fn other_example(readme: &str, facade: &str) -> Vec<String> {
    let documentation: String = facade
        .lines()
        .filter_map(|line| line.strip_prefix("//!"))
        .map(|line| format!("{}\n", line.strip_prefix(' ').unwrap_or(line)))
        .collect();
    let example = |markdown: &str| {
        let start = markdown
            .find("```rust\n")
            .or(markdown.find("```no_run\n"))?;
        let code = markdown[start..].split_once('\n')?.1;
        Some(code.split_once("```")?.0.to_owned())
    };
    match (example(readme), example(&documentation)) {
        (Some(shown), Some(compiled)) if shown == compiled => Vec::new(),
        _ => vec![
            "README.md: its Rust example is not the one of crates/phi3/src/lib.rs, which is compiled"
                .to_owned(),
        ],
    }
}

/// The lines of a Markdown text's code blocks.
pub fn code_lines(markdown: &str) -> impl Iterator<Item = &str> {
    let mut inside = false;
    markdown.lines().filter(move |line| {
        let fence = line.trim_start().starts_with("```");
        inside ^= fence;
        inside && !fence
    })
}

pub fn private_paths(file: &File) -> Vec<String> {
    let mut complaints = Vec::new();
    for (index, line) in file.text.lines().enumerate() {
        for top in ["home", "root", "Users", "work", "workspace"] {
            let pattern = format!("/{top}/");
            let absolute = line.match_indices(&pattern).any(|(at, _)| {
                let before = line[..at].chars().next_back();
                let example = line[at..].starts_with(EXAMPLE_HOME);
                !example && !before.is_some_and(|c| c.is_alphanumeric() || "._-~*)}]>".contains(c))
            });
            if absolute {
                complaints.push(file.complaint(
                    index + 1,
                    &format!("names a folder below {pattern}, which only some machines have"),
                ));
            }
        }
    }
    complaints
}

/// The words of a line, as identifiers go.
fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| !(c.is_alphanumeric() || c == '_'))
}
