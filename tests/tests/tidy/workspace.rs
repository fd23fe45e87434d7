//! What the rules look at, read from the workspace.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use cargo_metadata::{DependencyKind, MetadataCommand, TargetKind};

/// A crate of the workspace, with all that the rules look at.
#[derive(Clone, Debug, Default)]
pub struct Crate {
    pub name: String,
    /// Relative to the workspace.
    pub folder: PathBuf,
    pub manifest: String,
    pub dependencies: Vec<Dependency>,
    pub features: BTreeMap<String, Vec<String>>,
    /// Root files of its libraries and binaries, relative to the workspace.
    pub roots: BTreeSet<PathBuf>,
    /// Every .rs file in src and examples.
    pub files: Vec<File>,
}

#[derive(Clone, Debug)]
pub struct Dependency {
    pub name: String,
    pub dev: bool,
}

#[derive(Clone, Debug)]
pub struct File {
    /// Relative to the workspace.
    pub path: PathBuf,
    pub text: String,
}

impl Crate {
    pub fn is_model(&self) -> bool {
        self.folder.starts_with("models")
    }

    /// Its place in the house: a crate uses only what stands below it.
    pub fn floor(&self) -> u8 {
        match self.name.as_str() {
            "phi3-kernels" => 0,
            "phi3-nn" => 1,
            "phi3-hub" | "phi3-image" | "phi3-text" => 2,
            _ if self.is_model() => 2,
            "phi3" => 3,
            // cli, server, train, eval, tests: what hangs off the facade.
            _ => 4,
        }
    }
}

impl File {
    /// The lines that are code, with their numbers.
    pub fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let lines = self.text.lines().enumerate();
        lines
            .map(|(index, line)| (index + 1, line.trim()))
            .filter(|(_, line)| !line.starts_with("//"))
    }

    pub fn complaint(&self, line: usize, rule: &str) -> String {
        format!("{}:{line}: {rule}", self.path.display())
    }
}

pub fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_path_buf()
}

pub fn text_file(name: &str) -> Result<String> {
    std::fs::read_to_string(root().join(name)).with_context(|| format!("reading {name}"))
}

pub fn workspace() -> Result<Vec<Crate>> {
    let metadata = MetadataCommand::new()
        .manifest_path(root().join("Cargo.toml"))
        .no_deps()
        .exec()
        .context("running cargo metadata")?;
    let relative = |path: &cargo_metadata::camino::Utf8Path| -> Result<PathBuf> {
        let path = path.strip_prefix(&metadata.workspace_root)?;
        Ok(path.as_std_path().to_path_buf())
    };
    let mut crates = Vec::new();
    for package in &metadata.packages {
        let manifest_path = relative(&package.manifest_path)?;
        let folder = manifest_path.parent().map(Path::to_path_buf);
        let folder = folder.context("a manifest lies in a folder")?;
        let dependency = |it: &cargo_metadata::Dependency| Dependency {
            name: it.name.clone(),
            dev: it.kind == DependencyKind::Development,
        };
        let mut it = Crate {
            name: package.name.to_string(),
            manifest: text_file(&manifest_path.to_string_lossy())?,
            dependencies: package.dependencies.iter().map(dependency).collect(),
            features: package.features.clone().into_iter().collect(),
            ..Crate::default()
        };
        for target in &package.targets {
            let kinds = [TargetKind::Lib, TargetKind::Bin];
            if target.kind.iter().any(|kind| kinds.contains(kind)) {
                it.roots.insert(relative(&target.src_path)?);
            }
        }
        for part in ["src", "examples"] {
            for path in files(&root().join(&folder).join(part))? {
                if path.extension().is_some_and(|extension| extension == "rs") {
                    let path = folder.join(part).join(path);
                    let text = text_file(&path.to_string_lossy())?;
                    it.files.push(File { path, text });
                }
            }
        }
        it.folder = folder;
        ensure!(!it.files.is_empty(), "{} has no sources", it.name);
        crates.push(it);
    }
    ensure!(crates.len() >= 8, "only {} crates were found", crates.len());
    Ok(crates)
}

/// Every file below a folder, relative to it; none if it does not exist. What git ignores is left
/// out.
pub fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    const IGNORED: [&str; 6] = [
        "target",
        ".git",
        ".demo",
        "corpus",
        "artifacts",
        "__pycache__",
    ];
    let mut found = Vec::new();
    let mut open = vec![PathBuf::new()];
    while let Some(path) = open.pop() {
        let here = folder.join(&path);
        if !here.is_dir() {
            continue;
        }
        for entry in std::fs::read_dir(&here).with_context(|| here.display().to_string())? {
            let entry = entry?;
            let name = entry.file_name();
            let kind = entry.file_type()?;
            if IGNORED.iter().any(|ignored| name == *ignored) {
                continue; // `.git` is a file where the folder is one of several worktrees
            }
            if kind.is_file() {
                found.push(path.join(name));
            } else if kind.is_dir() {
                open.push(path.join(name));
            }
        }
    }
    Ok(found)
}
