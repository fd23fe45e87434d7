//! Phi-3-vision and Phi-3.5-vision.
//!
//! - model_type: `phi3_v`; checkpoints: `microsoft/Phi-3.5-vision-instruct`,
//!   `microsoft/Phi-3-vision-128k-instruct`
//! - paper: *Phi-3 Technical Report*, arXiv:2404.14219
//! - reference: the processing and modeling code of the hub repositories
//!
//! [`processor`] makes crops and ids of images and prompts, as the reference does in every byte.
//! [`Model`] is the decoder; it sees no images yet.
//!
//! # Deviations from the reference
//! - An image tag that occurs twice is an error at once; the reference fails in the model.
//! - The digits of an image tag are ASCII; the reference takes those of every script.
#![forbid(unsafe_code)]

mod config;
mod model;
pub mod processor;

pub use config::Config;
pub use model::Model;
