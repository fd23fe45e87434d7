//! File names that come from elsewhere, made into paths only if they stay inside their folder.

use std::path::{Path, PathBuf};

/// The path of `name` inside `folder`; `None` if the name is empty, absolute, climbs out by `..`, or
/// has a separator or device prefix of another system.
pub(crate) fn inside(folder: &Path, name: &str) -> Option<PathBuf> {
    is_safe(name).then(|| {
        name.split('/')
            .fold(folder.to_owned(), |path, part| path.join(part))
    })
}

/// Whether a `/`-separated name has only ordinary components.
pub(crate) fn is_safe(name: &str) -> bool {
    name.len() <= 1024
        && name.split('/').all(|part| {
            !part.is_empty()
                && part.len() <= 255
                && part != "."
                && part != ".."
                && !part.chars().any(|c| {
                    c.is_control() || matches!(c, '\\' | ':' | '*' | '?' | '"' | '<' | '>' | '|')
                })
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_inside_their_folder() {
        let folder = Path::new("models");
        for good in [
            "a.json",
            "sub/dir/a.txt",
            "model-00001-of-00002.safetensors",
            ".hidden",
            "a..b",
        ] {
            let path = inside(folder, good).unwrap();
            assert!(path.starts_with(folder) && path.ends_with(good), "{good}");
        }
        for bad in [
            "",
            "/",
            "/etc/passwd",
            "..",
            "../a",
            "a/../../b",
            "a//b",
            "a/",
            "./a",
            "a\\b",
            "..\\a",
            "C:a",
            "C:/a",
            "a\0b",
            "a\nb",
        ] {
            assert_eq!(inside(folder, bad), None, "{bad:?}");
        }
        assert!(!is_safe(&"x".repeat(256)));
        assert!(!is_safe(&"x/".repeat(600)));
    }
}
