//! How tokens are chosen, as flags.

use phi3::SamplingParams;

/// Flags of the commands that generate. Without any, the checkpoint's own generation config rules,
/// which for the Phi-3 family is greedy.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// Tokens to generate at most, for each answer.
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub max_new_tokens: usize,
    /// 0 chooses the most likely token; 1 draws from the model's distribution [default: what the
    /// checkpoint says, else 0; 1 with --top-k, --top-p or --min-p].
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Draw only from the K most likely tokens.
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Draw only from the most likely tokens that together have this probability.
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Draw only from tokens at least this many times as likely as the most likely one.
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,
    /// Makes every token seen so far less likely; 1 changes nothing.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    repetition_penalty: Option<f32>,
    /// Subtracted once from the logit of a token generated before.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    presence_penalty: Option<f32>,
    /// Subtracted for every time a token was generated before.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    frequency_penalty: Option<f32>,
    /// Add X to the logit of token ID; may be given several times.
    #[arg(long, value_name = "ID=X", value_parser = parse_bias)]
    logit_bias: Vec<(u32, f32)>,
    /// Seed of the random numbers: the same seed gives the same text.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// A text that ends the answer; may be given several times.
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
}

impl SamplingArgs {
    /// `defaults` with what the flags change. A flag that shapes a draw switches drawing on.
    pub fn params(&self, defaults: SamplingParams) -> SamplingParams {
        let draws = self.top_k.is_some() || self.top_p.is_some() || self.min_p.is_some();
        let implied = (draws && defaults.temperature == 0.0).then_some(1.0);
        let temperature = self.temperature.or(implied).unwrap_or(defaults.temperature);
        let mut logit_bias = defaults.logit_bias.clone();
        logit_bias.extend(self.logit_bias.iter().copied());
        SamplingParams {
            temperature,
            top_k: self.top_k.or(defaults.top_k),
            top_p: self.top_p.or(defaults.top_p),
            min_p: self.min_p.or(defaults.min_p),
            repetition_penalty: self
                .repetition_penalty
                .unwrap_or(defaults.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(defaults.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(defaults.frequency_penalty),
            logit_bias,
            seed: self.seed.or(defaults.seed),
        }
    }
}

fn parse_bias(text: &str) -> Result<(u32, f32), String> {
    let (id, bias) = text.split_once('=').ok_or("expected ID=X")?;
    let id = id
        .parse()
        .map_err(|error| format!("{id:?} is no token id: {error}"))?;
    let bias = bias
        .parse()
        .map_err(|error| format!("{bias:?} is no number: {error}"))?;
    Ok((id, bias))
}
