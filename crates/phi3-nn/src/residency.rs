//! Which weights are kept in memory, where a model does not use all of them for every token.
//!
//! A mixture of experts knows which bytes it reads next as soon as a router has spoken. It says so
//! through this trait, and does nothing else about it: whoever opened the files
//! may read ahead what is announced, and drop what has not been used for long. Dropped bytes stay
//! readable; the next one to touch them waits for the disk. So no result depends on it.

use std::fmt::Debug;

use crate::weights::Bytes;

/// Hears which weights are used together, and when.
pub trait Residency: Debug + Send + Sync {
    /// Makes a group of bytes that are always read together, an expert's weights; the number is what
    /// [`Residency::announce`] takes.
    fn register(&self, parts: Vec<Bytes>) -> usize;

    /// These groups, each named once, are about to be read.
    fn announce(&self, groups: &[usize]);
}
