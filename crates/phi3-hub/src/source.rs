//! Where a model is, told from how it is written.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::names;

/// Where a model is: a folder, one `.gguf` file, or a repo id on the hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A folder in Hugging Face's layout.
    Folder(PathBuf),
    /// One GGUF file, which holds everything.
    Gguf(PathBuf),
    /// A repo on the hub.
    Hub {
        /// `org/name`.
        repo_id: String,
        /// A branch, a tag or a commit hash.
        revision: String,
        /// One GGUF file of the repo, instead of its safetensors.
        gguf_file: Option<String>,
    },
}

impl Source {
    /// Reads how a model is given on the command line.
    ///
    /// An existing path wins. Otherwise `org/name` is a repo id, and `org/name/file.gguf` or
    /// `org/name:file.gguf` one GGUF file of a repo. `revision` is a branch, a tag or a commit hash
    /// (default `main`) and only repos have one.
    ///
    /// # Errors
    /// [`Error::NoSuchPath`] for what can only be a path but does not exist, [`Error::NotAModel`]
    /// for anything else that is no repo id, [`Error::WrongKindOfFile`] for a file that is not GGUF,
    /// [`Error::RevisionOfPath`].
    pub fn parse(model: &str, revision: Option<&str>) -> Result<Self, Error> {
        let path = Path::new(model);
        if path.exists() {
            if revision.is_some() {
                return Err(Error::RevisionOfPath {
                    path: path.to_owned(),
                });
            }
            return Self::on_disk(path);
        }
        if looks_like_a_path(model) {
            return Err(Error::NoSuchPath {
                path: path.to_owned(),
            });
        }
        let wrong = |detail: &str| Error::NotAModel {
            model: model.to_owned(),
            detail: detail.to_owned(),
        };
        if model.contains("://") {
            return Err(wrong(
                "leave out the address of the hub (HF_ENDPOINT changes it)",
            ));
        }
        let (repo_id, gguf_file) = split(model).ok_or_else(|| wrong("a repo id has one slash"))?;
        check_repo_id(repo_id).map_err(wrong)?;
        if let Some(file) = gguf_file {
            if !has_suffix(Path::new(file), "gguf") {
                return Err(wrong("only a .gguf file can be picked out of a repo"));
            }
            if !names::is_safe(file) {
                return Err(wrong("the file's name leaves the repo"));
            }
        }
        let revision = revision.unwrap_or("main");
        if !names::is_safe(revision) {
            return Err(wrong(&format!(
                "{revision:?} cannot be a branch, tag or commit"
            )));
        }
        Ok(Self::Hub {
            repo_id: repo_id.to_owned(),
            revision: revision.to_owned(),
            gguf_file: gguf_file.map(str::to_owned),
        })
    }

    fn on_disk(path: &Path) -> Result<Self, Error> {
        if path.is_dir() {
            return Ok(Self::Folder(path.to_owned()));
        }
        if has_suffix(path, "gguf") || starts_with_gguf(path) {
            return Ok(Self::Gguf(path.to_owned()));
        }
        let advice = if has_suffix(path, "safetensors") || has_suffix(path, "json") {
            "give the folder that it is in"
        } else if PICKLES.iter().any(|suffix| has_suffix(path, suffix)) {
            "Python pickles can run any code when read and are refused; convert the model to safetensors"
        } else {
            "a model is a folder, a .gguf file or a repo id"
        };
        Err(Error::WrongKindOfFile {
            path: path.to_owned(),
            advice: advice.to_owned(),
        })
    }
}

impl fmt::Display for Source {
    /// As [`Source::parse`] reads it; a revision other than `main` follows after an `@`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(path) | Self::Gguf(path) => write!(f, "{}", path.display()),
            Self::Hub {
                repo_id,
                revision,
                gguf_file,
            } => {
                write!(f, "{repo_id}")?;
                if let Some(file) = gguf_file {
                    write!(f, "/{file}")?;
                }
                if revision != "main" {
                    write!(f, "@{revision}")?;
                }
                Ok(())
            }
        }
    }
}

/// Suffixes of files that hold weights as Python pickles.
pub(crate) const PICKLES: [&str; 5] = ["bin", "pt", "pth", "ckpt", "pkl"];

pub(crate) fn has_suffix(path: &Path, suffix: &str) -> bool {
    path.extension()
        .is_some_and(|found| found.eq_ignore_ascii_case(suffix))
}

fn starts_with_gguf(path: &Path) -> bool {
    let mut magic = [0; 4];
    File::open(path)
        .and_then(|mut file| file.read_exact(&mut magic))
        .is_ok()
        && &magic == b"GGUF"
}

/// Whether a text that names nothing on disk was meant as a path all the same.
fn looks_like_a_path(model: &str) -> bool {
    let drive = matches!(model.as_bytes(), [letter, b':', b'\\' | b'/', ..] if letter.is_ascii_alphabetic());
    let gguf_of_no_repo = model.matches('/').count() < 2
        && !model.contains(':')
        && has_suffix(Path::new(model), "gguf");
    model.starts_with(['/', '.', '~'])
        || model.ends_with('/')
        || model.contains('\\')
        || drive
        || gguf_of_no_repo
}

/// `org/name` and what follows it after a slash or colon.
fn split(model: &str) -> Option<(&str, Option<&str>)> {
    let (org, rest) = model.split_once('/')?;
    let end = rest.find(['/', ':']).unwrap_or(rest.len());
    let repo_id = model.get(..org.len() + 1 + end)?;
    Some((repo_id, rest.get(end + 1..)))
}

/// The hub's own rules for names.
pub(crate) fn check_repo_id(repo_id: &str) -> Result<(), &'static str> {
    let Some((org, name)) = repo_id.split_once('/') else {
        return Err("a repo id has one slash");
    };
    for part in [org, name] {
        if part.is_empty() || part.len() > 96 {
            return Err("each side of the slash has 1 to 96 characters");
        }
        if !part
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        {
            return Err("a repo id has only letters, digits, '-', '_' and '.'");
        }
        if part.starts_with(['-', '.'])
            || part.ends_with(['-', '.'])
            || part.contains("..")
            || part.contains("--")
        {
            return Err("a repo id has '-' and '.' only singly and inside a name");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(repo_id: &str, revision: &str, gguf_file: Option<&str>) -> Source {
        Source::Hub {
            repo_id: repo_id.to_owned(),
            revision: revision.to_owned(),
            gguf_file: gguf_file.map(str::to_owned),
        }
    }

    #[test]
    fn repo_ids_and_files_of_repos() {
        let parse = |model, revision| Source::parse(model, revision).unwrap();
        assert_eq!(parse("org/name", None), hub("org/name", "main", None));
        assert_eq!(
            parse("org/na.me_1", Some("v1")),
            hub("org/na.me_1", "v1", None)
        );
        assert_eq!(
            parse("org/name", Some("refs/pr/1")),
            hub("org/name", "refs/pr/1", None)
        );
        for model in ["org/name/a-q4.gguf", "org/name:a-q4.gguf"] {
            assert_eq!(
                parse(model, None),
                hub("org/name", "main", Some("a-q4.gguf"))
            );
        }
        assert_eq!(
            parse("org/name/sub/a.GGUF", None),
            hub("org/name", "main", Some("sub/a.GGUF"))
        );
        assert_eq!(
            parse("org/name/a.gguf", Some("x")).to_string(),
            "org/name/a.gguf@x"
        );
    }

    #[test]
    fn what_is_no_repo_id_is_refused() {
        for model in [
            "",
            "name",
            "org/",
            "/name/x/y",
            "org/name/file.bin",
            "org/name/../../a.gguf",
            "org/na me",
            "a--b/c",
            "org/name:",
            "https://huggingface.co/org/name",
            "org/..",
            "-a/b",
            "org/n\u{e4}me",
        ] {
            assert!(Source::parse(model, None).is_err(), "{model:?}");
        }
        let error = Source::parse("org/name", Some("../x"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("../x"), "{error}");
    }

    #[test]
    fn a_missing_path_has_its_own_message() {
        for model in [
            "./models/phi",
            "/no/such/folder",
            "~/models/phi",
            "C:\\models",
            "models/",
            "phi-q4.gguf",
            "x/phi.gguf",
        ] {
            let error = Source::parse(model, None).unwrap_err();
            assert!(
                matches!(error, Error::NoSuchPath { .. }),
                "{model}: {error}"
            );
        }
    }

    #[test]
    fn an_existing_path_wins() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, content).unwrap();
            path
        };
        let parse = |path: &Path, revision| Source::parse(path.to_str().unwrap(), revision);

        assert_eq!(
            parse(folder.path(), None).unwrap(),
            Source::Folder(folder.path().to_owned())
        );
        let gguf = file("a.gguf", b"");
        assert_eq!(parse(&gguf, None).unwrap(), Source::Gguf(gguf));
        let blob = file("0123", b"GGUF\x03\0\0\0");
        assert_eq!(parse(&blob, None).unwrap(), Source::Gguf(blob));

        for (name, advice) in [
            ("model.safetensors", "folder"),
            ("pytorch_model.bin", "safetensors"),
            ("a.txt", "repo id"),
        ] {
            let error = parse(&file(name, b"x"), None).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains(advice), "{error}");
        }
        assert!(matches!(
            parse(folder.path(), Some("v1")),
            Err(Error::RevisionOfPath { .. })
        ));
    }
}
