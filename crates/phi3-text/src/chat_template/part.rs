//! The parts of a message that is more than a text.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

/// One part of a turn's content.
///
/// In JSON `{"type": "text", "text": …}`; an image is `{"type": "image"}` with `path`, `url` or
/// `base64` (the content of a file) as transformers has it, or
/// `{"type": "image_url", "image_url": {"url": …}}`, also with a `data:` URL, as OpenAI's API has it.
///
/// ```
/// use phi3_text::{ImageSource, Part};
/// let part = r#"{"type": "image_url", "image_url": {"url": "data:image/png;base64,AQI="}}"#;
/// let part: Part = serde_json::from_str(part)?;
/// assert_eq!(part, Part::Picture(ImageSource::Bytes([1, 2].into())));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "PartJson", into = "PartJson")]
pub enum Part {
    /// Text.
    Text {
        /// The text itself.
        text: String,
    },
    /// An image; where it comes from is none of the template's business.
    Image,
    /// An image, and where it comes from. A template sees [`Part::Image`].
    Picture(ImageSource),
}

impl Part {
    /// A text.
    pub fn text(text: impl Into<String>) -> Self {
        Self::Text { text: text.into() }
    }
}

impl From<ImageSource> for Part {
    fn from(source: ImageSource) -> Self {
        Self::Picture(source)
    }
}

/// Where an image comes from. Nothing is read here.
///
/// Who takes messages from elsewhere should look at [`ImageSource::Path`] before they are used: it
/// names a file of this machine.
#[derive(Clone, PartialEq, Eq)]
pub enum ImageSource {
    /// A file.
    Path(PathBuf),
    /// The content of a file.
    Bytes(Arc<[u8]>),
    /// What has to be fetched.
    Url(String),
}

impl fmt::Debug for ImageSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "Path({})", path.display()),
            Self::Bytes(bytes) => write!(f, "Bytes({} bytes)", bytes.len()),
            Self::Url(url) => write!(f, "Url({url})"),
        }
    }
}

/// A part as JSON has it.
#[derive(Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum PartJson {
    Text {
        text: String,
    },
    Image {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        path: Option<PathBuf>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        url: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        base64: Option<String>,
    },
    ImageUrl {
        image_url: UrlJson,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum UrlJson {
    Object { url: String },
    Plain(String),
}

impl TryFrom<PartJson> for Part {
    type Error = String;

    fn try_from(part: PartJson) -> Result<Self, String> {
        Ok(match part {
            PartJson::Text { text } => Self::Text { text },
            PartJson::Image {
                path: None,
                url: None,
                base64: None,
            } => Self::Image,
            PartJson::Image {
                path: Some(path),
                url: None,
                base64: None,
            } => ImageSource::Path(path).into(),
            PartJson::Image {
                path: None,
                url: Some(url),
                base64: None,
            }
            | PartJson::ImageUrl {
                image_url: UrlJson::Object { url } | UrlJson::Plain(url),
            } => source_of_url(url)?.into(),
            PartJson::Image {
                path: None,
                url: None,
                base64: Some(text),
            } => decoded(&text)?.into(),
            PartJson::Image { .. } => {
                return Err("an image has more than one of path, url and base64".to_owned());
            }
        })
    }
}

impl From<Part> for PartJson {
    fn from(part: Part) -> Self {
        let (mut path, mut base64) = (None, None);
        match part {
            Part::Text { text } => return Self::Text { text },
            Part::Picture(ImageSource::Url(url)) => {
                let image_url = UrlJson::Object { url };
                return Self::ImageUrl { image_url };
            }
            Part::Image => {}
            Part::Picture(ImageSource::Path(it)) => path = Some(it),
            Part::Picture(ImageSource::Bytes(it)) => base64 = Some(STANDARD.encode(it)),
        }
        let url = None;
        Self::Image { path, url, base64 }
    }
}

/// A `data:` URL holds its bytes itself.
fn source_of_url(url: String) -> Result<ImageSource, String> {
    let Some(data) = url.strip_prefix("data:") else {
        return Ok(ImageSource::Url(url));
    };
    match data.split_once(";base64,") {
        Some((_, text)) => decoded(text),
        None => Err("a data: URL of an image must be in base64".to_owned()),
    }
}

fn decoded(text: &str) -> Result<ImageSource, String> {
    let bytes = STANDARD.decode(text.trim());
    let bytes = bytes.map_err(|error| format!("an image's base64: {error}"))?;
    Ok(ImageSource::Bytes(bytes.into()))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::{Content, Message};
    use super::*;

    fn parts(parts: Value) -> Result<Vec<Part>, String> {
        let message: Result<Message, _> =
            serde_json::from_value(json!({"role": "user", "content": parts}));
        match message.map_err(|error| error.to_string())?.content {
            Content::Parts(parts) => Ok(parts),
            other => Err(format!("{other:?}")),
        }
    }

    #[test]
    fn every_spelling_of_an_image_is_read() {
        let found = parts(json!([
            {"type": "text", "text": "a"},
            {"type": "image"},
            {"type": "image", "path": "b.png"},
            {"type": "image", "url": "https://c/d.png"},
            {"type": "image", "base64": "AAEC"},
            {"type": "image_url", "image_url": {"url": "https://e", "detail": "low"}},
            {"type": "image_url", "image_url": "data:image/png;base64,AAEC"},
        ]));
        let bytes = || Part::Picture(ImageSource::Bytes([0, 1, 2].into()));
        let url = |url: &str| Part::Picture(ImageSource::Url(url.to_owned()));
        let expected = [
            Part::text("a"),
            Part::Image,
            Part::Picture(ImageSource::Path("b.png".into())),
            url("https://c/d.png"),
            bytes(),
            url("https://e"),
            bytes(),
        ];
        assert_eq!(found.as_deref(), Ok(&expected[..]));
        // And written so that it reads back.
        let written = serde_json::to_value(&expected).unwrap();
        assert_eq!(parts(written).as_deref(), Ok(&expected[..]));
    }

    #[test]
    fn what_is_wrong_with_a_part_is_said() {
        for (part, words) in [
            (
                json!({"type": "image", "path": "a", "url": "b"}),
                "more than one",
            ),
            (json!({"type": "image", "base64": "?"}), "base64"),
            (
                json!({"type": "image_url", "image_url": "data:,x"}),
                "base64",
            ),
            (json!({"type": "video"}), "video"),
            (json!({"type": "text"}), "text"),
        ] {
            let message = parts(json!([part])).unwrap_err();
            assert!(message.contains(words), "{message}");
        }
        let message = parts(json!(7)).unwrap_err();
        assert!(message.contains("neither a text nor a list"), "{message}");
    }
}
