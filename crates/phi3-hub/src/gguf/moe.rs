//! What a GGUF file of architecture `phimoe` says beyond one of `phi3`.
//!
//! llama.cpp has keys for the numbers of experts only. For the rest of Phi-3.5-MoE's config this
//! project has keys of its own, which other readers skip:
//!
//! | key | field of config.json |
//! | --- | --- |
//! | `phimoe.rope.scaling.short_mscale` | `rope_scaling.short_mscale` |
//! | `phimoe.rope.scaling.long_mscale` | `rope_scaling.long_mscale` |
//! | `phimoe.router_jitter_noise` | `router_jitter_noise` |
//! | `phimoe.router_type` | `router_type`, where there is one |
//!
//! llama.cpp's converter writes √(1 + ln s / ln L) as `rope.scaling.attn_factor`, which is not what
//! the checkpoint multiplies cos and sin with: 1.190 instead of 1.243. In a file without the keys above
//! the published checkpoint is known by its sizes, and gets its own.

use serde_json::{Map, Value as Json};

use super::config::Hyperparameters;
use super::container::Container;
use super::error::Result;
use super::keys::Keys;
use super::value::Value;

pub(super) const EXPERT_COUNT: &str = "expert_count";
pub(super) const EXPERT_USED_COUNT: &str = "expert_used_count";
pub(super) const SHORT_MSCALE: &str = "rope.scaling.short_mscale";
pub(super) const LONG_MSCALE: &str = "rope.scaling.long_mscale";
pub(super) const ROUTER_JITTER_NOISE: &str = "router_jitter_noise";
pub(super) const ROUTER_TYPE: &str = "router_type";

/// Both mscales of `microsoft/Phi-3.5-MoE-instruct`.
pub(super) const PUBLISHED_MSCALE: f64 = 1.243163121016122;

/// The experts and their router.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Moe {
    pub experts: usize,
    experts_per_tok: usize,
    jitter: Option<f64>,
    router_type: Option<String>,
    mscales: [Option<f64>; 2],
    attention_bias: bool,
    lm_head_bias: bool,
}

impl Moe {
    /// # Errors
    /// A key that is missing, of the wrong type or out of range.
    pub fn read(container: &Container, keys: &Keys<'_>) -> Result<Self> {
        let has_bias = |name: &str| container.tensor(name).is_some();
        Ok(Self {
            experts: keys.positive(EXPERT_COUNT)?,
            experts_per_tok: keys.positive(EXPERT_USED_COUNT)?,
            jitter: keys.float_or_zero(ROUTER_JITTER_NOISE)?,
            router_type: keys.text(ROUTER_TYPE)?.map(str::to_owned),
            mscales: [keys.float(SHORT_MSCALE)?, keys.float(LONG_MSCALE)?],
            attention_bias: has_bias("blk.0.attn_q.bias"),
            lm_head_bias: has_bias("output.bias"),
        })
    }

    /// Makes a `config.json` of `phi3` one of `phimoe`.
    pub fn write(&self, sizes: &Hyperparameters, original: usize, config: &mut Map<String, Json>) {
        let mut set = |name: &str, value: Json| config.insert(name.to_owned(), value);
        set("architectures", vec!["PhiMoEForCausalLM"].into());
        set("model_type", "phimoe".into());
        set("attention_bias", self.attention_bias.into());
        set("lm_head_bias", self.lm_head_bias.into());
        set("num_local_experts", self.experts.into());
        set("num_experts_per_tok", self.experts_per_tok.into());
        if let Some(jitter) = self.jitter {
            set("router_jitter_noise", jitter.into());
        }
        if let Some(router) = &self.router_type {
            set("router_type", router.as_str().into());
        }
        if let Some(rope) = config.get_mut("rope_scaling").and_then(Json::as_object_mut) {
            // Without a factor the rotation is as large as in the original.
            let stated = rope.remove("attention_factor").unwrap_or(1.0.into());
            let published =
                (sizes.hidden, sizes.context, original, self.experts) == (4096, 131_072, 4096, 16);
            let names = ["short_mscale", "long_mscale"];
            for (name, own) in names.into_iter().zip(self.mscales) {
                let value = match own {
                    Some(own) => own.into(),
                    None if published => PUBLISHED_MSCALE.into(),
                    None => stated.clone(),
                };
                rope.insert(name.to_owned(), value);
            }
        }
    }
}

/// The fields of config.json that become keys of `phimoe`, with the defaults of its config class.
#[derive(serde::Deserialize)]
pub(super) struct Fields {
    #[serde(default = "default_experts")]
    num_local_experts: u32,
    #[serde(default = "default_experts_per_tok")]
    num_experts_per_tok: u32,
    #[serde(default = "default_jitter")]
    router_jitter_noise: f64,
    router_type: Option<String>,
}

fn default_experts() -> u32 {
    16
}

fn default_experts_per_tok() -> u32 {
    2
}

fn default_jitter() -> f64 {
    0.01
}

impl Fields {
    /// Those of the published checkpoint, but for the number of experts.
    pub fn of(num_local_experts: u32) -> Self {
        Self {
            num_local_experts,
            num_experts_per_tok: default_experts_per_tok(),
            router_jitter_noise: default_jitter(),
            router_type: None,
        }
    }

    /// Keys below the architecture's name, and their values. `mscales` are the rope's, of a model
    /// that has two sets of factors. Floats of the config stay as wide as they are.
    pub fn keys(self, mscales: Option<[f64; 2]>) -> Vec<(&'static str, Value)> {
        let mut keys = vec![
            (EXPERT_COUNT, self.num_local_experts.into()),
            (EXPERT_USED_COUNT, self.num_experts_per_tok.into()),
            (ROUTER_JITTER_NOISE, Value::F64(self.router_jitter_noise)),
        ];
        if let Some(router) = self.router_type {
            keys.push((ROUTER_TYPE, router.as_str().into()));
        }
        if let Some([short, long]) = mscales {
            keys.push((SHORT_MSCALE, Value::F64(short)));
            keys.push((LONG_MSCALE, Value::F64(long)));
        }
        keys
    }
}

#[cfg(test)]
#[path = "moe_tests.rs"]
mod tests;
