//! Phi-3-mini and its siblings against the reference's goldens, and the forward contract.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::Device;
use half::{bf16, f16};
use phi_3_mini::{Config, Model};
use phi3_kernels::BlockType;
use phi3_nn::{CacheType, CausalLm, Input, LogitRows, Span};
use phi3_tests::golden::Kit;
use phi3_tests::parity::{assert_close, step};
use phi3_tests::runner::{check_contract, check_kit};
use phi3_tests::{fixtures, kit};

const FIXTURES: [&str; 8] = [
    "phi3-mini-4k",
    "phi3-mini-4k-window",
    "phi3-mini-128k-longrope",
    "phi3-medium-4k",
    "phi3-medium-128k",
    "phi4-mini",
    "phi3-other",
    "phi3-other-longrope",
];

/// Largest difference that rounding the f32 weights of phi3-mini-4k to f16 makes, as a share of the
/// deviation of the logits. Measured: 7.9e-3.
const F16_WEIGHTS_TOLERANCE: f32 = 2e-2;

/// The same for bf16, whose mantissa is 8 times coarser. Measured: 1.1e-1.
const BF16_WEIGHTS_TOLERANCE: f32 = 2.5e-1;

/// Largest difference that an f16 cache makes to a golden logit, as a share of the deviation of the
/// logits. Measured: 6.2e-3.
const F16_CACHE_TOLERANCE: f32 = 2e-2;

/// The same of a q8_0 cache. Measured: 1.6e-1, with random weights.
const Q8_0_CACHE_TOLERANCE: f32 = 2e-1;

fn load(folder: &Path) -> Result<(Kit, Model)> {
    let kit = Kit::load(folder)?;
    let config = Config::from_json(&kit.config)?;
    let model = Model::new(&config, kit.weights(&Device::Cpu)?)?;
    Ok((kit, model))
}

fn load_fixture(name: &str) -> Result<(Kit, Model)> {
    load(&fixtures().join(name))
}

#[test]
fn every_golden_of_the_fixtures_holds() -> Result<()> {
    for name in FIXTURES {
        let (kit, model) = load_fixture(name)?;
        let largest = check_kit(&kit, &model).with_context(|| name.to_owned())?;
        println!("{name}: within {largest:e} of the deviation of its logits");
    }
    Ok(())
}

#[test]
fn every_golden_of_the_full_kit_holds() -> Result<()> {
    let Some(folder) = kit("the comparison with all phi3 and phi4 goldens") else {
        return Ok(());
    };
    let mut checked = 0;
    for entry in std::fs::read_dir(folder)? {
        let folder = entry?.path();
        let name = folder
            .file_name()
            .and_then(|n| n.to_str())
            .unwrap_or_default()
            .to_owned();
        if name.starts_with("phi3-m") || name.starts_with("phi4") {
            let (kit, model) = load(&folder)?;
            let largest = check_kit(&kit, &model).with_context(|| name.clone())?;
            println!("{name}: within {largest:e} of the deviation of its logits");
            checked += 1;
        }
    }
    ensure!(checked >= 8, "only {checked} kits were found");
    Ok(())
}

/// What a GPU runs: candle's operations instead of the kernels, here on the CPU. Also the slow
/// oracle of the kernels.
#[test]
fn every_golden_holds_in_candle_operations() -> Result<()> {
    for name in FIXTURES {
        let kit = Kit::load(&fixtures().join(name))?;
        let weights = kit.weights(&Device::Cpu)?.with_candle_operations();
        let model = Model::new(&Config::from_json(&kit.config)?, weights)?;
        check_kit(&kit, &model).with_context(|| name.to_owned())?;
        let sequences: Vec<_> = [9, 33, 36]
            .iter()
            .map(|&len| some_ids(&model, 2, len))
            .collect();
        check_contract(&model, &sequences).with_context(|| name.to_owned())?;
    }
    Ok(())
}

#[test]
fn bf16_storage_gives_the_goldens_of_the_same_weights() -> Result<()> {
    // Its goldens were computed in f32 from the bf16 weights: nothing is lost by storing them so.
    let (kit, model) = load_fixture("phi3-mini-4k-bf16")?;
    check_kit(&kit, &model)?;
    Ok(())
}

#[test]
fn half_precision_weights_stay_close() -> Result<()> {
    let kit = Kit::load(&fixtures().join("phi3-mini-4k"))?;
    let config = Config::from_json(&kit.config)?;
    let f16_bytes = |x: f32| f16::from_f32(x).to_le_bytes();
    let bf16_bytes = |x: f32| bf16::from_f32(x).to_le_bytes();
    type Round<'a> = &'a dyn Fn(f32) -> [u8; 2];
    let kinds: [(BlockType, Round<'_>, f32); 2] = [
        (BlockType::F16, &f16_bytes, F16_WEIGHTS_TOLERANCE),
        (BlockType::BF16, &bf16_bytes, BF16_WEIGHTS_TOLERANCE),
    ];
    for (block_type, round, tolerance) in kinds {
        let weights = kit.weights_as(&Device::Cpu, |_, _, bytes| {
            let floats = bytes
                .as_chunks::<4>()
                .0
                .iter()
                .map(|c| f32::from_le_bytes(*c));
            (block_type, floats.flat_map(round).collect())
        })?;
        let model = Model::new(&config, weights)?;
        let vocab = model.info().vocab_size;
        let ids = kit.ids("long", "input_ids").context("ids")?;
        let golden = kit.floats("long", "logits").context("logits")?;
        let logits = step(&model, &mut model.new_cache(), ids)?;
        let error = assert_close(block_type.name(), &logits, golden, vocab, tolerance)?;
        println!("{block_type}: {error:e}");
        ensure!(
            error > tolerance / 100.0,
            "the weights were not rounded at all"
        );
    }
    Ok(())
}

/// Ids that no golden uses: the contract must hold for any.
fn some_ids(model: &Model, seed: u32, len: usize) -> Vec<u32> {
    let vocab = model.info().vocab_size as u32;
    (0..len as u32)
        .map(|i| (i * i * 7 + i * 31 + seed * 101) % vocab)
        .collect()
}

#[test]
fn the_forward_contract_holds() -> Result<()> {
    for name in FIXTURES {
        let (_, model) = load_fixture(name)?;
        // The limit of the longrope fixtures is 32, the window 8: below, at, across and beyond.
        let sequences: Vec<_> = [5, 32, 33, 36, 60]
            .iter()
            .map(|&len| some_ids(&model, len as u32, len))
            .collect();
        check_contract(&model, &sequences).with_context(|| name.to_owned())?;
    }
    Ok(())
}

/// Keys and values of fewer bits: near the goldens, and every promise of the contract as exact as
/// with f32, since a chunk reads its own keys as the cache holds them.
#[test]
fn a_rounded_cache_stays_close_and_keeps_the_contract() -> Result<()> {
    for (cache_type, tolerance) in [
        (CacheType::F16, F16_CACHE_TOLERANCE),
        (CacheType::Q8_0, Q8_0_CACHE_TOLERANCE),
    ] {
        let largest = check_rounded_cache(cache_type, tolerance)?;
        println!("{cache_type} cache: {largest:e}");
        ensure!(
            largest > tolerance / 100.0,
            "the cache was not rounded at all: {largest:e}"
        );
    }
    Ok(())
}

/// The largest difference to a golden.
fn check_rounded_cache(cache_type: CacheType, tolerance: f32) -> Result<f32> {
    let mut largest = 0f32;
    for name in FIXTURES {
        let kit = Kit::load(&fixtures().join(name))?;
        let weights = kit.weights(&Device::Cpu)?.with_cache_type(cache_type);
        let model = Model::new(&Config::from_json(&kit.config)?, weights)?;
        let vocab = model.info().vocab_size;
        for case in kit.cases().iter().filter(|case| *case != "leftpad") {
            let ids = kit.ids(case, "input_ids").context("input_ids")?;
            let golden = kit.floats(case, "logits").context("logits")?;
            let logits = step(&model, &mut model.new_cache(), ids)?;
            let error = assert_close("logits", &logits, golden, vocab, tolerance)
                .with_context(|| format!("{name}, {case}"))?;
            largest = largest.max(error);
        }
        let sequences: Vec<_> = [5, 32, 33, 36, 60]
            .iter()
            .map(|&len| some_ids(&model, len as u32, len))
            .collect();
        check_contract(&model, &sequences).with_context(|| name.to_owned())?;
    }
    Ok(largest)
}

/// What `phi3 inspect` shows is what a sequence holds, at every length.
#[test]
fn a_cache_is_as_large_as_stated() -> Result<()> {
    for name in ["phi3-mini-4k-window", "phi3-medium-4k"] {
        for cache_type in CacheType::ALL {
            let kit = Kit::load(&fixtures().join(name))?;
            let weights = kit.weights(&Device::Cpu)?.with_cache_type(cache_type);
            let model = Model::new(&Config::from_json(&kit.config)?, weights)?;
            let longest = model.info().max_position_embeddings.min(600);
            let mut cache = model.new_cache();
            for chunk in some_ids(&model, 1, longest).chunks(37) {
                step(&model, &mut cache, chunk)?;
                let (held, stated) = (
                    cache.size_in_bytes(),
                    model.cache_spec().bytes_at(cache.len()),
                );
                ensure!(
                    held == stated,
                    "{name}, {}: {held}, not {stated}",
                    cache.len()
                );
            }
            cache.truncate(20)?;
            if kit.config["sliding_window"].is_null() {
                ensure!(cache.size_in_bytes() == model.cache_spec().bytes_at(20));
            }
        }
    }
    Ok(())
}

#[test]
fn a_window_cache_stays_as_small_as_its_window() -> Result<()> {
    let (_, model) = load_fixture("phi3-mini-4k-window")?;
    let mut cache = model.new_cache();
    let mut largest = 0;
    for chunk in some_ids(&model, 3, 400).chunks(5) {
        step(&model, &mut cache, chunk)?;
        largest = largest.max(cache.size_in_bytes());
    }
    let stated = model.cache_spec().bytes_at(400);
    let dense = model.cache_spec().bytes_at(20) * 20;
    // A chunk of 5 comes on top while it runs; vectors grow by doubling.
    ensure!(
        largest <= 2 * stated,
        "{largest} bytes held, {stated} stated"
    );
    ensure!(largest < dense / 2, "{largest} bytes held of {dense}");
    Ok(())
}

#[test]
fn batches_that_are_not_well_formed_are_refused() -> Result<()> {
    let (_, model) = load_fixture("phi3-mini-128k-longrope")?;
    let mut cache = model.new_cache();
    let forward = |ids: &[u32], spans: &mut [Span<'_>]| {
        let result = model.forward(Input::Ids(ids), spans, None);
        result.err().map(|e| e.to_string()).unwrap_or_default()
    };
    let message = forward(&[1, 2], &mut [Span::new(3, &mut cache)]);
    ensure!(message.contains("3 rows, the input has 2"), "{message}");
    let message = forward(&[], &mut []);
    ensure!(message.contains("no sequence"), "{message}");
    let message = forward(&[], &mut [Span::new(0, &mut cache)]);
    ensure!(message.contains("no token"), "{message}");
    let message = forward(&[320], &mut [Span::new(1, &mut cache)]);
    ensure!(message.contains("320"), "{message}");
    let ids = vec![1; 1025];
    let message = forward(&ids, &mut [Span::new(1025, &mut cache)]);
    ensure!(message.contains("context of 1024"), "{message}");
    let logits = model.forward(
        Input::Ids(&[1, 2]),
        &mut [Span::new(2, &mut cache).with_logits(LogitRows::None)],
        None,
    )?;
    ensure!(logits.dims() == [0, 320]);
    Ok(())
}
