//! Where the hub and its cache are.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::error::HubError;
use super::progress::{NoProgress, Progress};

/// Where to download from and to. `Default` is the public hub and the usual cache; see
/// [`HubOptions::from_env`] for what the environment changes.
#[derive(Clone)]
pub struct HubOptions {
    /// The cache; `None` for `~/.cache/huggingface/hub`.
    pub cache_dir: Option<PathBuf>,
    /// The hub's address; `None` for `https://huggingface.co`.
    pub endpoint: Option<String>,
    /// Sent to the hub itself and to no other host.
    pub token: Option<String>,
    /// Make no request at all.
    pub offline: bool,
    /// Told about every transfer.
    pub progress: Arc<dyn Progress>,
    /// When to give up on a bad connection.
    pub retry: RetryPolicy,
}

/// When to give up on a bad connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Attempts in a row that bring nothing, the first included.
    pub attempts: u32,
    /// Wait after the first failure; doubled after each further one, up to 16 times as long. A
    /// server's `Retry-After` counts instead, up to a minute.
    pub delay: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            attempts: 6,
            delay: Duration::from_millis(500),
        }
    }
}

impl Default for HubOptions {
    fn default() -> Self {
        Self {
            cache_dir: None,
            endpoint: None,
            token: None,
            offline: false,
            progress: Arc::new(NoProgress),
            retry: RetryPolicy::default(),
        }
    }
}

impl fmt::Debug for HubOptions {
    /// Shows that there is a token, not the token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubOptions")
            .field("cache_dir", &self.cache_dir)
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| "(hidden)"))
            .field("offline", &self.offline)
            .field("retry", &self.retry)
            .finish_non_exhaustive()
    }
}

impl HubOptions {
    /// As the environment says, with the meaning that `huggingface_hub` gives its variables:
    ///
    /// | variable | meaning |
    /// | --- | --- |
    /// | `HF_HUB_CACHE` | the cache |
    /// | `HF_HOME` | the cache is its subfolder `hub`, the token its file `token` |
    /// | `XDG_CACHE_HOME` | stands for `~/.cache` in `HF_HOME`'s default, `~/.cache/huggingface` |
    /// | `HF_ENDPOINT` | the hub's address |
    /// | `HF_TOKEN`, `HF_TOKEN_PATH` | the token, or a file with it |
    /// | `HF_HUB_OFFLINE` | no request if 1, true, yes or on |
    pub fn from_env() -> Self {
        Self::from_lookup(|name| std::env::var(name).ok(), std::env::home_dir())
    }

    fn from_lookup(var: impl Fn(&str) -> Option<String>, home: Option<PathBuf>) -> Self {
        let set = |name: &str| {
            var(name)
                .map(|value| value.trim().to_owned())
                .filter(|value| !value.is_empty())
        };
        let path = |name: &str| set(name).map(|value| expand_home(&value, home.as_deref()));

        let cache_home = path("XDG_CACHE_HOME").or_else(|| Some(home.as_ref()?.join(".cache")));
        let hf_home = path("HF_HOME").or_else(|| Some(cache_home?.join("huggingface")));
        let cache_dir = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| Some(hf_home.as_ref()?.join("hub")));
        let token_path = path("HF_TOKEN_PATH").or_else(|| Some(hf_home.as_ref()?.join("token")));
        let token = set("HF_TOKEN")
            .or_else(|| set("HUGGING_FACE_HUB_TOKEN"))
            .or_else(|| {
                let text = std::fs::read_to_string(token_path?).ok()?;
                Some(text.trim().to_owned()).filter(|token| !token.is_empty())
            });
        let on = |name: &str| {
            set(name).is_some_and(|value| {
                matches!(
                    value.to_ascii_lowercase().as_str(),
                    "1" | "true" | "yes" | "on"
                )
            })
        };
        Self {
            cache_dir,
            endpoint: set("HF_ENDPOINT"),
            token,
            offline: on("HF_HUB_OFFLINE") || on("TRANSFORMERS_OFFLINE"),
            ..Self::default()
        }
    }

    /// The cache's folder, whether it exists or not.
    ///
    /// # Errors
    /// [`HubError::NoCacheFolder`] if it is not set and there is no home directory.
    pub fn cache_folder(&self) -> Result<PathBuf, HubError> {
        match &self.cache_dir {
            Some(folder) => Ok(folder.clone()),
            None => {
                let home = std::env::home_dir().ok_or(HubError::NoCacheFolder)?;
                Ok(home.join(".cache/huggingface/hub"))
            }
        }
    }
}

fn expand_home(value: &str, home: Option<&Path>) -> PathBuf {
    match (value.strip_prefix("~/"), home) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => PathBuf::from(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(variables: &[(&str, &str)]) -> HubOptions {
        let var = |name: &str| {
            variables
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        };
        HubOptions::from_lookup(var, Some(PathBuf::from("/home/ada")))
    }

    fn cache(variables: &[(&str, &str)]) -> PathBuf {
        options(variables).cache_dir.unwrap()
    }

    #[test]
    fn the_cache_follows_the_environment() {
        assert_eq!(cache(&[]), Path::new("/home/ada/.cache/huggingface/hub"));
        assert_eq!(
            cache(&[("XDG_CACHE_HOME", "/c")]),
            Path::new("/c/huggingface/hub")
        );
        assert_eq!(
            cache(&[("HF_HOME", "/hf"), ("XDG_CACHE_HOME", "/c")]),
            Path::new("/hf/hub")
        );
        assert_eq!(cache(&[("HF_HOME", "~/hf")]), Path::new("/home/ada/hf/hub"));
        assert_eq!(
            cache(&[("HF_HUB_CACHE", "/x"), ("HF_HOME", "/hf")]),
            Path::new("/x")
        );
        assert_eq!(
            cache(&[("HF_HUB_CACHE", ""), ("HF_HOME", "/hf")]),
            Path::new("/hf/hub")
        );
    }

    #[test]
    fn the_token_comes_from_variable_or_file() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().to_str().unwrap();
        assert_eq!(options(&[("HF_HOME", home)]).token, None);
        std::fs::write(folder.path().join("token"), "from-file\n").unwrap();
        assert_eq!(
            options(&[("HF_HOME", home)]).token.as_deref(),
            Some("from-file")
        );
        let both = [("HF_HOME", home), ("HF_TOKEN", " from-variable ")];
        assert_eq!(options(&both).token.as_deref(), Some("from-variable"));
        let elsewhere = folder.path().join("other");
        std::fs::write(&elsewhere, "other").unwrap();
        let path = [
            ("HF_HOME", home),
            ("HF_TOKEN_PATH", elsewhere.to_str().unwrap()),
        ];
        assert_eq!(options(&path).token.as_deref(), Some("other"));
    }

    #[test]
    fn offline_has_several_spellings() {
        for value in ["1", "true", "TRUE", "Yes", "on", "ON "] {
            assert!(options(&[("HF_HUB_OFFLINE", value)]).offline, "{value}");
        }
        for value in ["", "0", "false", "no", "off"] {
            assert!(!options(&[("HF_HUB_OFFLINE", value)]).offline, "{value}");
        }
    }

    #[test]
    fn debug_hides_the_token() {
        let options = options(&[("HF_TOKEN", "hf_secret")]);
        assert!(!format!("{options:?}").contains("secret"));
    }
}
