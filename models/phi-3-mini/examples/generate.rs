//! Answers one prompt with a `phi3` checkpoint, straight on the crates below the facade:
//!
//! ```sh
//! cargo run --release -p phi-3-mini --example generate -- \
//!     --model microsoft/Phi-3-mini-4k-instruct --prompt "What is the capital of France?"
//! ```

#[path = "../../example.rs"]
mod example;

use anyhow::Result;
use clap::Parser;
use phi_3_mini::{Config, Model};
use phi3_text::Request;

fn main() -> Result<()> {
    let args = example::Args::parse();
    let (checkpoint, weights) = args.open()?;
    let model = Model::new(&Config::from_json(&checkpoint.config)?, weights)?;
    let tokenizer = example::tokenizer(&checkpoint)?;
    let rendered = example::render(&checkpoint, &tokenizer, &args.prompt)?;
    let request = Request::new(tokenizer.encode_chat(&rendered)?);
    args.answer(&model, &checkpoint, &tokenizer, request)
}
