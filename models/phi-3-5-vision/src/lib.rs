//! Phi-3-vision and Phi-3.5-vision.
//!
//! - model_type: `phi3_v`; checkpoints: `microsoft/Phi-3.5-vision-instruct`,
//!   `microsoft/Phi-3-vision-128k-instruct`
//! - paper: *Phi-3 Technical Report*, arXiv:2404.14219; CLIP, arXiv:2103.00020
//! - reference: the processing and modeling code of the hub repositories
//!
//! [`processor`] makes crops and ids of images and prompts, as the reference does in every byte. A
//! crop of 336x336 pixels goes through CLIP's ViT; with C its width, p the side of a patch and LN a
//! layer norm
//! ```text
//! x = LN([class | W_patch · pixels] + position)          W_patch [C, 3·p·p]
//! x = x + W_out · softmax(q·kᵀ/√d)·v                      q, k, v of LN(x), with biases
//! x = x + W_2 · quick_gelu(W_1 · LN(x))                   quick_gelu(x) = x · sigmoid(1.702 x)
//! ```
//! The output of the last layer but one, without the class token, is merged by 2x2 patches. The
//! crops of an image, laid out as it was cut, each line ended by `sub_GN`, then `glb_GN`, then the
//! global view with its line ends, are the rows of `W_b · gelu(W_a · rows)`: one for each image token
//! of the prompt. The decoder is phi-3-mini's, and reads them as embeddings.
//!
//! # Deviations from the reference
//! - Crops of zeros, with which the reference fills a batch, are not computed; their features are
//!   used by nobody.
//! - The tower's last layer and `post_layernorm` are not computed, for the same reason.
//! - An image tag that occurs twice is an error at once; the reference fails in the model.
//! - The digits of an image tag are ASCII; the reference takes those of every script.
//! - Those of [`phi_3_mini`].
#![forbid(unsafe_code)]

mod config;
mod image_embedding;
mod model;
pub mod processor;
mod vision;

pub use config::{Config, RawConfig, VisionConfig};
pub use image_embedding::ImageFeatures;
pub use model::Model;
