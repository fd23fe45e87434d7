//! `phi3`: run the Phi-3 family from the command line.
//!
//! Answers go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage,
//! 3 the model could not be found or downloaded, 130 interrupted.
#![forbid(unsafe_code)]

mod args;
mod bench;
mod chat;
mod download;
mod eval;
mod generate;
mod image_info;
mod input;
mod inspect;
mod interrupt;
mod logits;
mod output;
mod quantize;
mod sampling;
mod system;
mod tokenize;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

/// Run the Phi-3 family of language models.
#[derive(Parser)]
#[command(name = "phi3", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// More messages on stderr: -v for what is loaded and how it runs, -vv for details; PHI3_LOG sets
    /// the level by module.
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    verbose: u8,
}

/// The arguments of each command say what it does: a comment here would hide theirs from --help.
#[derive(Subcommand)]
enum Command {
    Download(download::Args),
    Inspect(inspect::Args),
    Generate(generate::Args),
    Chat(chat::Args),
    Tokenize(tokenize::Args),
    Logits(logits::Args),
    ImageInfo(image_info::Args),
    Bench(Box<bench::Args>),
    Quantize(quantize::Args),
    Eval(Box<eval::Args>),
    /// Print a completion script for a shell.
    ///
    /// For bash: phi3 completions bash > ~/.local/share/bash-completion/completions/phi3
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match prepare(cli.verbose).and_then(|()| run(cli.command)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::report(&error);
            ExitCode::from(output::exit_code(&error))
        }
    }
}

/// Logging, and the environment variables that steer the kernels.
fn prepare(verbose: u8) -> anyhow::Result<()> {
    output::start_logging(verbose)?;
    phi3::check_environment().map_err(|error| output::UsageError(error.to_string()).into())
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Download(args) => download::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Tokenize(args) => tokenize::run(&args),
        Command::Logits(args) => logits::run(&args),
        Command::ImageInfo(args) => image_info::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Quantize(args) => quantize::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "phi3", &mut script);
            output::print_bytes(&script)
        }
    }
}
