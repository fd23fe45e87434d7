//! Answers one prompt with a `phi3small` checkpoint, straight on the crates below the facade:
//!
//! ```sh
//! cargo run --release -p phi-3-small --example generate-phi-3-small -- \
//!     --model microsoft/Phi-3-small-8k-instruct --prompt "What is the capital of France?"
//! ```

#[path = "../../example.rs"]
mod example;

use anyhow::Result;
use clap::Parser;
use phi_3_small::{Config, Model};
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
