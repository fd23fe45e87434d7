//! The program `phi3` as its users run it: arguments in; stdout, stderr, files and exit code out.

mod bench;
mod chat;
mod errors;
mod generate;
mod goldens;
mod hub;
mod images;
mod kernels;
mod library;
mod look;
mod parts;
mod phi_3_small;
mod quantize;
mod support;
#[cfg(target_os = "linux")]
mod terminal;
mod tiny;
