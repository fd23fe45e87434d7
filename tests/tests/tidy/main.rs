//! The invariants of ARCHITECTURE.md that a machine can check, from `cargo metadata` and from the
//! text of the sources. Each rule is a function from what it looks at to a list of complaints, so
//! that a bad example can be put before it as well.

mod bad_examples;
mod rules;
mod workspace;

use anyhow::{Result, ensure};

use rules::*;
use workspace::{File, files, root, text_file, workspace};

#[test]
fn dependencies_point_downwards() -> Result<()> {
    none(wrong_edges(&workspace()?))
}

#[test]
fn models_use_no_crate_of_the_outside_world() -> Result<()> {
    none(worldly_models(&workspace()?))
}

#[test]
fn device_features_reach_phi3_nn() -> Result<()> {
    none(lost_features(&workspace()?))
}

#[test]
fn crates_inherit_what_the_workspace_decides() -> Result<()> {
    none(own_decisions(&workspace()?))
}

#[test]
fn unsafe_code_stays_where_it_belongs() -> Result<()> {
    none(unsafe_code(&workspace()?))
}

#[test]
fn sources_keep_the_rules_of_their_place() -> Result<()> {
    none(misplaced_code(&workspace()?))
}

#[test]
fn models_have_the_same_rooms() -> Result<()> {
    none(missing_rooms(&workspace()?))
}

#[test]
fn source_files_are_short() -> Result<()> {
    none(long_files(&workspace()?))
}

#[test]
fn documents_name_files_that_exist() -> Result<()> {
    let mut complaints = Vec::new();
    for name in ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md"] {
        complaints.extend(missing_scripts(&text_file(name)?, &|path| {
            root().join(path).is_file()
        }));
    }
    let readme = text_file("README.md")?;
    for command in ["scripts/demo.sh", "scripts/check.sh"] {
        if !code_lines(&readme).any(|line| line.split_whitespace().next() == Some(command)) {
            complaints.push(format!("README.md: no code block runs {command}"));
        }
    }
    let facade = text_file("crates/phi3/src/lib.rs")?;
    complaints.extend(other_example(&readme, &facade));
    if !text_file(".ci/run")?.contains("scripts/check.sh") {
        complaints.push(".ci/run: does not run scripts/check.sh, the README's test command".into());
    }
    none(complaints)
}

#[test]
fn the_changelog_has_a_place_for_the_next_line() -> Result<()> {
    let changelog = text_file("CHANGELOG.md")?;
    ensure!(
        changelog.lines().any(|line| line == "## [Unreleased]"),
        "CHANGELOG.md: the section `## [Unreleased]` is missing"
    );
    Ok(())
}

#[test]
fn no_file_names_a_folder_of_somebodys_machine() -> Result<()> {
    let mut complaints = Vec::new();
    let mut read = 0;
    for path in files(&root())? {
        // Fixtures hold other people's texts.
        let fixture = path.components().any(|part| part.as_os_str() == "fixtures");
        if fixture && !path.ends_with("README.md") {
            continue;
        }
        let Ok(text) = std::fs::read_to_string(root().join(&path)) else {
            continue; // Not UTF-8, so no text.
        };
        read += 1;
        complaints.extend(private_paths(&File { path, text }));
    }
    ensure!(read > 50, "only {read} text files were found");
    none(complaints)
}

fn none(complaints: Vec<String>) -> Result<()> {
    ensure!(complaints.is_empty(), "{}", complaints.join("\n"));
    Ok(())
}
