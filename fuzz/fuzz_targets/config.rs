//! config.json: what is accepted gives caches and rope tables of a sane size.
//!
//! The file may be followed by a zero byte and choices: the i-th byte sets the i-th of [`FIELDS`] to
//! one of [`SIZES`] (modulo their number), 0 leaves it. So large numbers meet each other, which mutated digits rarely do.
#![no_main]

use candle_core::Device;
use libfuzzer_sys::fuzz_target;
use phi3::nn::rope::{FactorRule, Regime, RotaryEmbedding};
use phi3::nn::{CacheStore, KvCache};
use phi3::{CacheType, ContextExtension, ModelConfig};
use phi3_tests::fixtures;
use serde_json::Value;

const FIELDS: [&str; 12] = [
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "sliding_window",
    "partial_rotary_factor",
    "rope_theta",
];

const SIZES: [f64; 16] = [
    0.0,
    1.0,
    2.0,
    3.0,
    4.0,
    64.0,
    96.0,
    4096.0,
    65535.0,
    65536.0,
    16777216.0,
    134217728.0,
    268435456.0,
    1e18,
    0.5,
    -1.0,
];

fuzz_target!(init: phi3_fuzz::start(seeds), |data: &[u8]| {
    let end = data.iter().position(|&byte| byte == 0);
    let (json, choices) = data.split_at(end.unwrap_or(data.len()));
    let Ok(mut json) = serde_json::from_slice::<Value>(json) else {
        return;
    };
    if let Value::Object(json) = &mut json {
        for (field, &choice) in FIELDS.iter().zip(choices.iter().skip(1)) {
            let choice = usize::from(choice) % (SIZES.len() + 1);
            let size = SIZES.get(choice.wrapping_sub(1));
            if let Some(&size) = size {
                // Sizes are integers in JSON; only what is none stays a float.
                let whole = size.fract() == 0.0 && size >= 0.0;
                let value = if whole { (size as u64).into() } else { size.into() };
                json.insert((*field).to_owned(), value);
            }
        }
    }
    check(&json);
    for rule in [FactorRule::Power, FactorRule::Piecewise] {
        let extension = ContextExtension { rule, max_position_embeddings: 1 << 20 };
        if let Ok(extended) = extension.apply(&json) {
            check(&extended);
        }
    }
});

fn check(json: &Value) {
    let Ok(config) = ModelConfig::from_json(json) else {
        return;
    };
    let info = config.info();
    assert!(info.vocab_size > 0 && info.num_hidden_layers > 0);
    let spec = config.cache_spec(CacheStore::Pages(CacheType::F16));
    assert_eq!(spec.patterns.len(), info.num_hidden_layers);
    assert_eq!(config.attention_patterns().len(), info.num_hidden_layers);
    assert!(spec.bytes_at(1) <= spec.bytes_at(info.max_position_embeddings));
    // A cache is made only for a model whose weights are there.
    if spec.patterns.len() * spec.num_key_value_heads < 1 << 16 {
        assert!(KvCache::new(spec.into()).is_empty());
    }
    let rope = RotaryEmbedding::new(config.rope());
    let last = info.max_position_embeddings - 1;
    let positions = [(0, Regime::Short), (1, Regime::Long), (last, Regime::Long)];
    let tables = rope.tables(positions.into_iter(), &Device::Cpu);
    assert!(tables.is_ok(), "{tables:?}");
}

fn seeds() -> Vec<Vec<u8>> {
    let kits = [
        "phi3-mini-4k",
        "phi3-mini-128k-longrope",
        "phi3-medium-128k",
        "phi3-other-longrope",
        "phi4-mini",
    ];
    let read = |kit| std::fs::read(fixtures().join(kit).join("config.json"));
    let mut seeds: Vec<Vec<u8>> = kits.iter().filter_map(|kit| read(kit).ok()).collect();
    for choices in [[0; 12], [5, 10, 10, 6, 10, 10, 10, 10, 8, 10, 0, 0]] {
        let small = br#"{"model_type":"phi3","hidden_size":8,"intermediate_size":8,
"num_hidden_layers":1,"num_attention_heads":2,"vocab_size":8}"#;
        seeds.push([&small[..], &[0], &choices].concat());
    }
    // The form of transformers 5, and a closed form of the factors.
    seeds.push(
        br#"{"model_type":"phi3","hidden_size":8,"intermediate_size":8,"num_hidden_layers":1,
"num_attention_heads":2,"vocab_size":8,"max_position_embeddings":8192,"rope_parameters":{
"rope_type":"longrope","rope_theta":1e4,"partial_rotary_factor":1.0,"factor_rule":"piecewise",
"original_max_position_embeddings":4096,"factor":2.0,"attention_factor":1.1}}"#
            .to_vec(),
    );
    seeds
}
