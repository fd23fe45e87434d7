//! What can go wrong between text and tokens.

/// Errors of this crate; each names the noun that failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// `tokenizer.json` or `tokenizer_config.json` is not usable.
    #[error("{file}: {reason}")]
    TokenizerFile {
        /// Which of the two.
        file: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A text could not be turned into ids.
    #[error("cannot encode the text: {0}")]
    Encode(String),
    /// Ids could not be turned into text.
    #[error("cannot decode the ids: {0}")]
    Decode(String),
    /// No place holds a chat template.
    #[error(
        "the model has no chat template (looked at {}); give one, or use plain generation",
        if .looked_at.is_empty() { "nothing".to_owned() } else { .looked_at.join(", ") }
    )]
    NoTemplate {
        /// The places that were looked at.
        looked_at: Vec<String>,
    },
    /// A chat template does not parse or fails while it renders.
    #[error("chat template, line {line}: {cause}")]
    Template {
        /// Line of the template, counted from 1; 0 where it is not known.
        line: usize,
        /// What happened there.
        cause: String,
    },
    /// The template itself refused the messages by `raise_exception`.
    #[error("the chat template refuses these messages: {message}")]
    TemplateRaised {
        /// Line of the template, counted from 1.
        line: usize,
        /// What the template said.
        message: String,
    },
    /// A template ran or wrote beyond what any real one needs.
    #[error("chat template, line {line}: stopped, it exceeds the limit of {limit}")]
    TemplateLimit {
        /// Line of the template, counted from 1; 0 where it is not known.
        line: usize,
        /// The limit that was hit.
        limit: String,
    },
    /// A sampling parameter is outside its range.
    #[error("sampling parameter `{name}` is {value}: {expected}")]
    SamplingParameter {
        /// Name of the parameter.
        name: &'static str,
        /// The value given.
        value: String,
        /// The range it must be in.
        expected: &'static str,
    },
    /// The model gave a logit that is not a number or infinitely high.
    #[error(
        "the logit of token {id} is {value}: the weights are damaged or overflowed (f16 weights in too narrow a type)"
    )]
    BadLogit {
        /// The first such token.
        id: usize,
        /// Its logit.
        value: f32,
    },
    /// Every token is excluded.
    #[error("no token can be sampled: every logit is minus infinity (check `logit_bias`)")]
    NoCandidate,
    /// A stop id of a configuration file is not a token id.
    #[error("{file}: `eos_token_id` is {value}, expected a token id or a list of them")]
    StopId {
        /// The file it stands in.
        file: &'static str,
        /// What stands there.
        value: String,
    },
    /// A generation request that cannot be run.
    #[error("request: {0}")]
    Request(String),
    /// A prompt that leaves no room for an answer.
    #[error(
        "the prompt has {tokens} tokens, but the model's context of {context} must hold it and at least one more"
    )]
    PromptTooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// `max_position_embeddings` of the model.
        context: usize,
    },
    /// One sequence of a batch failed; the others go on.
    #[error("sequence {sequence}")]
    Sequence {
        /// Number of the sequence.
        sequence: usize,
        /// Why.
        source: Box<Error>,
    },
    /// The model failed; no sequence can go on.
    #[error("the model's forward call failed")]
    Model(#[from] phi3_nn::Error),
}

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
