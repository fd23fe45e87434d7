//! The messages of a conversation, in the shape that chat templates expect.

use super::part::{ImageSource, Part};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// One turn of a conversation.
///
/// ```
/// use phi3_text::Message;
/// let message: Message = serde_json::from_str(r#"{"role": "user", "content": "Hi"}"#)?;
/// assert_eq!(message, Message::user("Hi"));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, `tool`, or what else the template knows.
    pub role: String,
    /// What is said.
    #[serde(default)]
    pub content: Content,
    /// Further fields that a template may look at (`tools`, `tool_calls`, `name`).
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Message {
    /// A turn of `role` that says `content`.
    pub fn new(role: impl Into<String>, content: impl Into<Content>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
            extra: Map::new(),
        }
    }

    /// A system message.
    pub fn system(content: impl Into<Content>) -> Self {
        Self::new("system", content)
    }

    /// A turn of the user.
    pub fn user(content: impl Into<Content>) -> Self {
        Self::new("user", content)
    }

    /// A turn of the model.
    pub fn assistant(content: impl Into<Content>) -> Self {
        Self::new("assistant", content)
    }
}

impl From<&str> for Message {
    /// A turn of the user.
    fn from(text: &str) -> Self {
        Self::user(text)
    }
}

impl From<String> for Message {
    fn from(text: String) -> Self {
        Self::user(text)
    }
}

impl From<&String> for Message {
    fn from(text: &String) -> Self {
        Self::user(text.as_str())
    }
}

/// What a turn says.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(untagged, try_from = "Value")]
pub enum Content {
    /// Plain text.
    Text(String),
    /// Text and images in order.
    Parts(Vec<Part>),
    /// Nothing, as in a turn that only calls tools; `none` in a template.
    #[default]
    None,
}

impl Content {
    /// The images among its parts that say where they come from, in order.
    pub fn pictures(&self) -> impl Iterator<Item = &ImageSource> {
        let parts = match self {
            Self::Parts(parts) => parts.as_slice(),
            Self::Text(_) | Self::None => &[],
        };
        parts.iter().filter_map(|part| match part {
            Part::Picture(source) => Some(source),
            Part::Text { .. } | Part::Image => None,
        })
    }

    /// As templates know it: of an image only that it is there.
    pub(super) fn without_sources(&self) -> Self {
        let Self::Parts(parts) = self else {
            return self.clone();
        };
        let plain = parts.iter().map(|part| match part {
            Part::Picture(_) => Part::Image,
            Part::Text { .. } | Part::Image => part.clone(),
        });
        Self::Parts(plain.collect())
    }
}

impl TryFrom<Value> for Content {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        match value {
            Value::String(text) => Ok(Self::Text(text)),
            Value::Null => Ok(Self::None),
            Value::Array(parts) => parts
                .into_iter()
                .map(|part| Part::deserialize(part).map_err(|error| error.to_string()))
                .collect::<Result<_, _>>()
                .map(Self::Parts),
            _ => Err("content is neither a text nor a list of parts".to_owned()),
        }
    }
}

impl From<&str> for Content {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Content {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<Vec<Part>> for Content {
    fn from(parts: Vec<Part>) -> Self {
        Self::Parts(parts)
    }
}
