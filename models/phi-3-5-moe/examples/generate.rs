//! Answers one prompt with a `phimoe` checkpoint, straight on the crates below the facade:
//!
//! ```sh
//! cargo run --release -p phi-3-5-moe --example generate-phi-3-5-moe -- \
//!     --model microsoft/Phi-3.5-MoE-instruct --prompt "What is the capital of France?"
//! ```

#[path = "../../example.rs"]
mod example;

use anyhow::Result;
use clap::Parser;
use phi_3_5_moe::{Config, Model};
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
