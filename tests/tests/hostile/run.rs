//! Models that load and cannot run: weights that are no numbers, and requests out of bounds.

use anyhow::Result;
use phi3::text::{Generator, Request};
use phi3::{LanguageModel, SamplingParams};
use phi3_tests::hostile::Folder;
use serde_json::json;

use crate::{Attempt, CHAT, COMPLETE, Case, check_folders, complete, refused};

const EMBED: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// A few tokens, drawn.
const SAMPLE: Attempt = |model| {
    let sampling = SamplingParams {
        top_k: Some(5),
        top_p: Some(0.9),
        min_p: Some(0.01),
        seed: Some(1),
        ..SamplingParams::default()
    };
    complete(model, "hi", sampling)
};

const NUMBERS: &[Case] = &[
    Case {
        name: "embeddings that are NaN",
        damage: |folder| folder.change_weights(|w| w.fill(EMBED, 320 * 64, f32::NAN)),
        says: &["logit of token 0 is NaN", "weights are damaged"],
    },
    Case {
        name: "embeddings of the prompt that are infinite",
        damage: |folder| folder.change_weights(|w| w.fill(EMBED, 14 * 64, f32::INFINITY)),
        says: &["logit of token", "NaN", "weights are damaged"],
    },
    Case {
        name: "a norm with one NaN",
        damage: |folder| folder.change_weights(|w| w.fill("model.norm.weight", 1, f32::NAN)),
        says: &["logit of token 0 is NaN", "weights are damaged"],
    },
    Case {
        name: "a head with one NaN",
        damage: |folder| folder.change_weights(|w| w.fill(HEAD, 1, f32::NAN)),
        says: &["logit of token 0 is NaN", "weights are damaged"],
    },
    Case {
        name: "a head with infinite rows",
        damage: |folder| folder.change_weights(|w| w.fill(HEAD, 64 * 5, f32::INFINITY)),
        says: &["logit of token 0 is NaN", "weights are damaged"],
    },
    Case {
        name: "attention whose scores overflow",
        damage: |folder| {
            let qkv = "model.layers.0.self_attn.qkv_proj.weight";
            folder.change_weights(|w| w.fill(qkv, 192 * 64, f32::MAX))
        },
        says: &["logit of token 0 is NaN", "overflowed"],
    },
];

#[test]
fn weights_that_are_no_numbers() {
    for attempt in [COMPLETE, SAMPLE, CHAT] {
        check_folders(attempt, NUMBERS);
    }
}

fn run(model: &LanguageModel, request: Request) -> Result<()> {
    let mut generator = Generator::new(model.model().as_ref(), model.tokenizer()?);
    generator.add(request)?;
    for event in generator {
        event?;
    }
    Ok(())
}

fn sampled(model: &LanguageModel, change: impl FnOnce(&mut SamplingParams)) -> Result<()> {
    let mut params = SamplingParams::default();
    change(&mut params);
    complete(model, "hi", params)
}

const REQUESTS: &[(&str, Attempt, &[&str])] = &[
    (
        "no prompt",
        |model| run(model, Request::new(Vec::new())),
        &["prompt has no token"],
    ),
    (
        "an id behind the vocabulary",
        |model| run(model, Request::new(vec![1, 320])),
        &["token id 320", "vocabulary of 320"],
    ),
    (
        "the largest id there is",
        |model| run(model, Request::new(vec![u32::MAX])),
        &["token id 4294967295", "vocabulary of 320"],
    ),
    (
        "a prompt as long as the context",
        |model| run(model, Request::new(vec![1; 4096])),
        &["4096 tokens", "context of 4096"],
    ),
    (
        "a long text",
        |model| {
            let text = "hi ".repeat(5000);
            complete(model, &text, SamplingParams::greedy())
        },
        &["tokens", "context of 4096"],
    ),
    (
        "no new token",
        |model| {
            model.complete("hi", SamplingParams::greedy(), 0)?;
            Ok(())
        },
        &["max_new_tokens", "at least 1"],
    ),
    (
        "a temperature that is no number",
        |model| sampled(model, |params| params.temperature = f32::NAN),
        &["temperature", "NaN"],
    ),
    (
        "top_p above 1",
        |model| sampled(model, |params| params.top_p = Some(1.5)),
        &["top_p", "1.5"],
    ),
    (
        "an infinite bias",
        |model| {
            sampled(model, |params| {
                params.logit_bias.insert(3, f32::INFINITY);
            })
        },
        &["logit_bias", "inf"],
    ),
    (
        "a bias for a token that is not there",
        |model| {
            sampled(model, |params| {
                params.logit_bias.insert(1 << 31, 1.0);
            })
        },
        &["logit_bias", "2147483648", "320"],
    ),
    (
        "every token forbidden",
        |model| {
            sampled(model, |params| {
                params.logit_bias = (0..320).map(|id| (id, f32::NEG_INFINITY)).collect();
            })
        },
        &["no token can be sampled", "logit_bias"],
    ),
    (
        "an empty stop string",
        |model| {
            let mut request = Request::new(vec![1]);
            request.stop_strings.push(String::new());
            run(model, request)
        },
        &["stop string", "empty"],
    ),
];

#[test]
fn requests_out_of_bounds() {
    let folder = Folder::good().unwrap();
    let failures: Vec<String> = REQUESTS
        .iter()
        .filter_map(|(name, attempt, says)| refused(name, folder.path(), *attempt, says))
        .collect();
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}

const GENERATION: &[Case] = &[
    Case {
        name: "a temperature below 0 in generation_config.json",
        damage: |folder| {
            let config = json!({"do_sample": true, "temperature": -1.0});
            folder.write_json("generation_config.json", &config)
        },
        says: &["temperature", "-1"],
    },
    Case {
        name: "a repetition penalty of 0 in generation_config.json",
        damage: |folder| {
            folder.write_json("generation_config.json", &json!({"repetition_penalty": 0}))
        },
        says: &["repetition_penalty", "0"],
    },
    Case {
        name: "a stop id that is text in generation_config.json",
        damage: |folder| {
            folder.write_json("generation_config.json", &json!({"eos_token_id": ["</s>"]}))
        },
        says: &["generation_config.json", "eos_token_id", "</s>"],
    },
];

#[test]
fn generation_configs_out_of_bounds() {
    check_folders(CHAT, GENERATION);
}
