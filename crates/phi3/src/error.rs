//! What can go wrong between a model's name and its answer.

/// Errors of this crate. Those of the crates below come through with their own messages.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The files could not be found, downloaded or read.
    #[error(transparent)]
    Hub(Box<phi3_hub::Error>),
    /// The model could not be built or run.
    #[error(transparent)]
    Model(Box<phi3_nn::Error>),
    /// Text could not be encoded, rendered, sampled or decoded.
    #[error(transparent)]
    Text(Box<phi3_text::Error>),
    /// A `model_type` that this version cannot build.
    #[error("model_type `{found}` is not supported; this version runs: {supported}")]
    ModelType {
        /// What config.json says.
        found: String,
        /// The supported types.
        supported: String,
    },
    /// The context cannot be extended as asked.
    #[error("cannot extend the context: {reason}")]
    Extension {
        /// Why not.
        reason: String,
    },
    /// A model that cannot be kept within a budget of memory.
    #[error("a memory budget cannot be kept: {reason}")]
    MemoryBudget {
        /// Why.
        reason: &'static str,
    },
    /// Weights cannot be quantized as asked.
    #[error(transparent)]
    Quantize(Box<phi3_hub::quantize::Error>),
    /// Two models cannot be compared as asked.
    #[error("cannot compare: {reason}")]
    Evaluation {
        /// Why not.
        reason: String,
    },
    /// The checkpoint has weights but no tokenizer.
    #[error(
        "{origin} has no tokenizer (tokenizer.json, or a vocabulary in the GGUF file); token ids can still be used"
    )]
    NoTokenizer {
        /// The checkpoint.
        origin: String,
    },
    /// The model sees no pictures.
    #[error("{origin} sees no pictures; Phi-3.5-vision does")]
    Blind {
        /// The checkpoint.
        origin: String,
    },
    /// A picture cannot be read or decoded.
    #[error("{name}")]
    Image {
        /// The file or URL.
        name: String,
        /// Why.
        source: phi3_image::Error,
    },
    /// A picture cannot be written.
    #[error(transparent)]
    Picture(#[from] phi3_image::Error),
    /// A picture could not be fetched.
    #[error("fetching {url}")]
    Fetch {
        /// From where.
        url: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A message shows a picture behind a URL, and nobody is to fetch it.
    #[error("{url} is not fetched: the caller must say how (`Chat::fetch`)")]
    NoFetcher {
        /// Of the picture.
        url: String,
    },
    /// A message has an image that does not say where it comes from.
    #[error("a message shows an image without a path, bytes or a URL")]
    NoSource,
    /// A picture cannot be cut.
    #[error("{name}")]
    Uncut {
        /// The file or URL.
        name: String,
        /// Why.
        source: phi_3_5_vision::processor::Error,
    },
    /// A number of crops that is none, or a prompt that does not name its pictures.
    #[error(transparent)]
    Pixels(#[from] phi_3_5_vision::processor::Error),
    /// The checkpoint has no chat template.
    #[error(
        "{origin} has no chat template (chat_template.jinja, or `chat_template` in tokenizer_config.json); it can still continue a text"
    )]
    NoChatTemplate {
        /// The checkpoint.
        origin: String,
    },
}

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Errors of the crates below are boxed, so that a result is not as large as the largest of theirs.
macro_rules! boxed {
    ($($variant:ident($error:ty),)*) => {$(
        impl From<$error> for Error {
            fn from(error: $error) -> Self {
                Self::$variant(Box::new(error))
            }
        }
    )*};
}

boxed! {
    Hub(phi3_hub::Error),
    Model(phi3_nn::Error),
    Text(phi3_text::Error),
    Quantize(phi3_hub::quantize::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_no_larger_than_it_must_be() {
        assert!(size_of::<Error>() <= 64, "{}", size_of::<Error>());
    }
}
