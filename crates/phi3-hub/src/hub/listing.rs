//! A repo's files, and which of them a model needs.

use serde::Deserialize;

use super::error::HubError;
use super::http::{About, Client};
use super::url::encode_segment;
use crate::error::Error;
use crate::names;
use crate::safetensors::{INDEX, SINGLE};
use crate::source::PICKLES;

/// Largest listing that is read, in bytes.
const MAX_LISTING: u64 = 16 << 20;

/// The files of one commit.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Listing {
    pub(crate) commit: Option<String>,
    pub(crate) files: Vec<String>,
}

/// What of a repo is wanted.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Want<'a> {
    /// The model in Hugging Face's layout, or the only GGUF file.
    Model,
    /// The same without weights, where they are in files of their own.
    Small,
    /// One file.
    File(&'a str),
}

/// The files to fetch.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Selection {
    /// Small files, then the weights in one file.
    Single(Vec<String>),
    /// Small files, then an index that names the weights' files.
    Sharded(Vec<String>),
    /// Small files alone.
    Small(Vec<String>),
    /// One GGUF file.
    Gguf(String),
}

impl Listing {
    /// Asks the hub.
    pub(crate) fn fetch(client: &Client, about: About<'_>) -> Result<Self, HubError> {
        #[derive(Deserialize)]
        struct Answer {
            sha: Option<String>,
            #[serde(default)]
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
        }

        let revision = encode_segment(about.revision);
        let url = format!(
            "{}/api/models/{}/revision/{revision}",
            client.endpoint(),
            about.repo_id
        );
        let bytes = client.get_bytes(&url, MAX_LISTING, about)?;
        let answer: Answer =
            serde_json::from_slice(&bytes).map_err(|error| HubError::Protocol {
                url,
                detail: format!("the answer is no list of a repo's files ({error})"),
            })?;
        Ok(Self {
            commit: answer.sha,
            files: answer
                .siblings
                .into_iter()
                .map(|sibling| sibling.rfilename)
                .collect(),
        })
    }

    /// Picks the files that are needed: never other frameworks' weights, nor the same weights twice.
    pub(crate) fn select(&self, want: Want<'_>, about: About<'_>) -> Result<Selection, Error> {
        let has = |name: &str| self.files.iter().any(|file| file == name);
        let missing = |file: &str, advice: String| HubError::FileNotFound {
            repo_id: about.repo_id.to_owned(),
            revision: about.revision.to_owned(),
            file: file.to_owned(),
            advice,
        };
        let gguf: Vec<&String> = self
            .files
            .iter()
            .filter(|file| has_suffix(file, "gguf"))
            .collect();
        if let Want::File(file) = want {
            if !has(file) {
                let advice = match gguf.is_empty() {
                    true => "the repo has no GGUF files".to_owned(),
                    false => format!("it has {}", join(&gguf)),
                };
                return Err(missing(file, advice).into());
            }
            return Ok(Selection::Gguf(file.to_owned()));
        }
        if !has(SINGLE) && !has(INDEX) {
            return self.without_safetensors(&gguf, about, missing(SINGLE, String::new()));
        }
        if !has("config.json") {
            return Err(missing(
                "config.json",
                "this is not a model in Hugging Face's layout".to_owned(),
            )
            .into());
        }
        let mut files: Vec<String> = self
            .files
            .iter()
            .filter(|file| is_needed(file))
            .cloned()
            .collect();
        if let Some(name) = files.iter().find(|file| !names::is_safe(file)) {
            return Err(Error::UnsafeName {
                origin: format!("the file list of {}", about.repo_id),
                name: name.clone(),
            });
        }
        if matches!(want, Want::Small) {
            return Ok(Selection::Small(files));
        }
        // Weights come last: where they are, everything is.
        if has(SINGLE) {
            files.push(SINGLE.to_owned());
            return Ok(Selection::Single(files));
        }
        files.push(INDEX.to_owned());
        Ok(Selection::Sharded(files))
    }

    fn without_safetensors(
        &self,
        gguf: &[&String],
        about: About<'_>,
        missing: HubError,
    ) -> Result<Selection, Error> {
        let pickle = self
            .files
            .iter()
            .find(|file| PICKLES.iter().any(|suffix| has_suffix(file, suffix)));
        match (gguf, pickle) {
            ([file], _) => {
                if !names::is_safe(file) {
                    return Err(Error::UnsafeName {
                        origin: format!("the file list of {}", about.repo_id),
                        name: (*file).clone(),
                    });
                }
                Ok(Selection::Gguf((*file).clone()))
            }
            ([_, _, ..], _) => Err(Error::SeveralGguf {
                origin: about.repo_id.to_owned(),
                files: gguf
                    .iter()
                    .map(|file| format!("{}/{file}", about.repo_id))
                    .collect(),
            }),
            ([], Some(file)) => Err(Error::Pickle {
                origin: about.repo_id.to_owned(),
                file: file.clone(),
            }),
            ([], None) => Err(missing.into()),
        }
    }
}

/// The small files that some part of this project reads.
fn is_needed(file: &str) -> bool {
    const EXACT: [&str; 6] = [
        "config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "clip_vision_config.json",
    ];
    let tokenizer = file.starts_with("tokenizer") && file.ends_with(".json") && !file.contains('/');
    let template = file
        .strip_prefix("additional_chat_templates/")
        .is_some_and(|name| name.ends_with(".jinja") && !name.contains('/'));
    let ranks = file.ends_with(".tiktoken") && !file.contains('/');
    EXACT.contains(&file) || tokenizer || template || ranks
}

fn has_suffix(file: &str, suffix: &str) -> bool {
    file.rsplit_once('.')
        .is_some_and(|(_, found)| found.eq_ignore_ascii_case(suffix))
}

fn join(files: &[&String]) -> String {
    files
        .iter()
        .map(|file| file.as_str())
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const ABOUT: About<'static> = About {
        repo_id: "org/name",
        revision: "main",
        file: None,
    };

    fn select(files: &[&str], want: Want<'_>) -> Result<Selection, Error> {
        let files = files.iter().map(|&file| file.to_owned()).collect();
        Listing {
            commit: None,
            files,
        }
        .select(want, ABOUT)
    }

    fn texts(files: &[&str]) -> Vec<String> {
        files.iter().map(|&file| file.to_owned()).collect()
    }

    #[test]
    fn only_the_needed_files_of_a_full_repo() {
        let repo = [
            ".gitattributes",
            "README.md",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "model.safetensors.index.json",
            "model-00001-of-00002.safetensors",
            "pytorch_model.bin",
            "onnx/model.onnx",
            "modeling_phi3.py",
            "name-q4.gguf",
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "chat_template.jinja",
            "cl100k_base.tiktoken",
            "sub/tokenizer.json",
            "additional_chat_templates/tools.jinja",
            "preprocessor_config.json",
            "clip_vision_config.json",
            "flax_model.msgpack",
        ];
        let expected = [
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "chat_template.jinja",
            "cl100k_base.tiktoken",
            "additional_chat_templates/tools.jinja",
            "preprocessor_config.json",
            "clip_vision_config.json",
            "model.safetensors",
        ];
        assert_eq!(
            select(&repo, Want::Model).unwrap(),
            Selection::Single(texts(&expected))
        );
    }

    #[test]
    fn sharded_weights_end_with_their_index() {
        let repo = [
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "config.json",
        ];
        let expected = texts(&["config.json", "model.safetensors.index.json"]);
        assert_eq!(
            select(&repo, Want::Model).unwrap(),
            Selection::Sharded(expected)
        );
    }

    #[test]
    fn gguf_files_by_name_or_alone() {
        let both = ["a-q4.gguf", "a-f16.gguf", "README.md"];
        let picked = select(&both, Want::File("a-q4.gguf")).unwrap();
        assert_eq!(picked, Selection::Gguf("a-q4.gguf".to_owned()));
        assert_eq!(
            select(&["a-q4.gguf", "config.json"], Want::Model).unwrap(),
            Selection::Gguf("a-q4.gguf".to_owned())
        );
        let error = select(&both, Want::Model).unwrap_err().to_string();
        assert!(
            error.contains("org/name/a-q4.gguf") && error.contains("org/name/a-f16.gguf"),
            "{error}"
        );
        let error = select(&both, Want::File("b.gguf")).unwrap_err().to_string();
        assert!(
            error.contains("b.gguf") && error.contains("a-f16.gguf"),
            "{error}"
        );
    }

    #[test]
    fn pickles_are_refused_with_the_reason() {
        let error = select(&["config.json", "pytorch_model.bin"], Want::Model).unwrap_err();
        assert!(matches!(error, Error::Pickle { .. }), "{error}");
        assert!(error.to_string().contains("any code"), "{error}");
    }

    #[test]
    fn a_repo_without_weights_or_config_names_what_is_missing() {
        let error = select(&["config.json"], Want::Model)
            .unwrap_err()
            .to_string();
        assert!(error.contains("model.safetensors"), "{error}");
        let error = select(&["model.safetensors"], Want::Model)
            .unwrap_err()
            .to_string();
        assert!(error.contains("config.json"), "{error}");
    }

    #[test]
    fn names_that_leave_the_folder_are_refused() {
        let repo = ["config.json", "model.safetensors", "..\\evil.tiktoken"];
        assert!(matches!(
            select(&repo, Want::Model),
            Err(Error::UnsafeName { .. })
        ));
        // Not a name that is needed, so not touched at all.
        let repo = ["config.json", "model.safetensors", "../evil.tiktoken"];
        let expected = texts(&["config.json", "model.safetensors"]);
        assert_eq!(
            select(&repo, Want::Model).unwrap(),
            Selection::Single(expected)
        );
        assert!(matches!(
            select(&["../a.gguf"], Want::Model),
            Err(Error::UnsafeName { .. })
        ));
    }
}
