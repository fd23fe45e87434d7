//! The messages of a conversation, in the shape that chat templates expect.

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

/// What a turn says.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Content {
    /// Plain text.
    Text(String),
    /// Text and images in order.
    Parts(Vec<Part>),
    /// Nothing, as in a turn that only calls tools; `none` in a template.
    #[default]
    None,
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

/// One part of a turn's content.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Part {
    /// Text.
    Text {
        /// The text itself.
        text: String,
    },
    /// An image; where it comes from is none of the template's business.
    Image,
}
