//! Phi-3-small against the goldens of its own code, the layouts of its attention, and the forward
//! contract.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::Device;
use phi_3_small::{Config, Model};
use phi3_nn::{BlockSparseLayout, CausalLm};
use phi3_tests::golden::Kit;
use phi3_tests::parity::{F32_TOLERANCE, assert_close, step};
use phi3_tests::runner::{check_contract, check_kit, packed_step};
use phi3_tests::{fixtures, kit};
use safetensors::SafeTensors;

const FIXTURES: [&str; 3] = ["phi3-small-8step", "phi3-small-homo", "phi3-small-128k"];

fn load(folder: &Path, candle: bool) -> Result<(Kit, Model)> {
    let kit = Kit::load(folder)?;
    let mut weights = kit.weights(&Device::Cpu)?;
    if candle {
        weights = weights.with_candle_operations();
    }
    let model = Model::new(&Config::from_json(&kit.config)?, weights)?;
    Ok((kit, model))
}

/// All cases of a kit in one call.
fn check_packed(kit: &Kit, model: &Model) -> Result<()> {
    let cases = kit.cases();
    let ids = cases
        .iter()
        .map(|case| Ok(kit.ids(case, "input_ids").context("ids")?.to_vec()))
        .collect::<Result<Vec<_>>>()?;
    let mut caches: Vec<_> = ids.iter().map(|_| model.new_cache()).collect();
    let vocab = model.info().vocab_size;
    for (case, logits) in cases.iter().zip(packed_step(model, &mut caches, &ids)?) {
        let golden = kit.floats(case, "logits").context("logits")?;
        let what = format!("{case}, packed");
        assert_close(&what, &logits, golden, vocab, F32_TOLERANCE)?;
    }
    Ok(())
}

/// The layout of a kit's golden `layout.block_mask`.
fn check_mask(kit: &Kit) -> Result<()> {
    let config = Config::from_json(&kit.config)?;
    let mask = kit.ids("layout", "block_mask").context("block_mask")?;
    let shape = kit.shape("layout", "block_mask").context("block_mask")?;
    ensure!(shape[0] == config.num_attention_heads);
    let rows: Vec<_> = (0..shape[1]).collect();
    compare_mask(&config.layout, shape[0], &rows, shape[2], |idx| {
        mask[idx] == 1
    })
}

fn compare_mask(
    layout: &BlockSparseLayout,
    heads: usize,
    rows: &[usize],
    columns: usize,
    golden: impl Fn(usize) -> bool,
) -> Result<()> {
    for head in 0..heads {
        for (idx, &row) in rows.iter().enumerate() {
            for column in 0..columns {
                let golden = golden((head * rows.len() + idx) * columns + column);
                let found = layout.sees(head, row, column);
                ensure!(
                    found == golden,
                    "head {head}, block {row} sees {column}: {found}"
                );
            }
        }
    }
    Ok(())
}

fn check(folder: &Path) -> Result<()> {
    let (kit, model) = load(folder, false)?;
    let largest = check_kit(&kit, &model)?;
    eprintln!(
        "{}: within {largest:e} of the deviation of its logits",
        folder.display()
    );
    check_packed(&kit, &model)?;
    check_mask(&kit)
}

#[test]
fn every_golden_of_the_fixtures_holds() -> Result<()> {
    for name in FIXTURES {
        check(&fixtures().join(name)).with_context(|| name.to_owned())?;
    }
    Ok(())
}

#[test]
fn every_golden_of_the_full_kit_holds() -> Result<()> {
    let Some(folder) = kit("the comparison with all phi3small goldens") else {
        return Ok(());
    };
    for name in ["8k", "8step", "homo", "128k", "128k-nomscale"] {
        let folder = folder.join(format!("phi3-small-{name}"));
        check(&folder).with_context(|| name.to_owned())?;
        let (kit, model) = load(&folder, true)?;
        check_kit(&kit, &model).with_context(|| format!("{name} in candle operations"))?;
    }
    Ok(())
}

/// What a GPU runs: candle's operations instead of the kernels, here on the CPU.
#[test]
fn every_golden_holds_in_candle_operations() -> Result<()> {
    for name in FIXTURES {
        let (kit, model) = load(&fixtures().join(name), true)?;
        check_kit(&kit, &model).with_context(|| name.to_owned())?;
        check_packed(&kit, &model).with_context(|| name.to_owned())?;
    }
    Ok(())
}

/// The numbers of a mask's name, such as `h8_b16_l2_v4_s149_homo0`.
fn numbers(name: &str) -> Vec<usize> {
    name.split('_')
        .filter_map(|part| {
            part.trim_start_matches(|c: char| !c.is_ascii_digit())
                .parse()
                .ok()
        })
        .collect()
}

#[test]
fn layouts_equal_every_mask_of_the_reference() -> Result<()> {
    let bytes = std::fs::read(fixtures().join("phi3-small-layouts/golden.safetensors"))?;
    let masks = SafeTensors::deserialize(&bytes)?;
    let mut checked = 0;
    for (name, mask) in masks.tensors() {
        let [heads, block, local, stride, tokens, homogeneous] = numbers(&name)[..] else {
            anyhow::bail!("the name {name}");
        };
        let layout = BlockSparseLayout::new(heads, block, local, stride, homogeneous == 1)
            .context("a layout")?;
        let blocks = tokens.div_ceil(block);
        let rows: Vec<usize> = match name.starts_with("packedrows") {
            true => vec![0, 7, 15, 16, 17, 23, 24, 100, 1000, 2047],
            false => (0..blocks).collect(),
        };
        let packed = name.starts_with("packed");
        let width = if packed { blocks.div_ceil(8) } else { blocks };
        ensure!(mask.shape() == [heads, rows.len(), width], "{name}");
        let golden = |idx: usize| match packed {
            true => {
                let (row, column) = (idx / blocks, idx % blocks);
                mask.data()[row * width + column / 8] >> (7 - column % 8) & 1 == 1
            }
            false => mask.data()[idx] == 1,
        };
        compare_mask(&layout, heads, &rows, blocks, golden).with_context(|| name.clone())?;
        checked += 1;
    }
    ensure!(checked == 23, "{checked} masks");
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
    for (name, candle) in FIXTURES
        .iter()
        .flat_map(|name| [(name, false), (name, true)])
    {
        let (_, model) = load(&fixtures().join(name), candle)?;
        // Where a sequence passes the LongRoPE limit of 48 its keys keep their rotation, so that
        // it does matter how it got there: see the next test.
        let lengths: &[usize] = match model.info().original_max_position_embeddings {
            Some(_) => &[5, 31, 40, 48],
            None => &[5, 31, 64, 90],
        };
        let sequences: Vec<_> = lengths
            .iter()
            .map(|&len| some_ids(&model, len as u32, len))
            .collect();
        check_contract(&model, &sequences).with_context(|| format!("{name}, candle {candle}"))?;
    }
    Ok(())
}

/// A prompt beyond the limit gives the same in chunks that state its length, and packed.
#[test]
fn long_prompts_in_chunks_use_the_long_factors() -> Result<()> {
    let (_, model) = load(&fixtures().join("phi3-small-128k"), false)?;
    let vocab = model.info().vocab_size;
    let ids = some_ids(&model, 1, 100);
    let alone = step(&model, &mut model.new_cache(), &ids)?;
    let mut cache = model.new_cache();
    let mut chunked = Vec::new();
    for chunk in ids.chunks(13) {
        let span = phi3_nn::Span::new(chunk.len(), &mut cache)
            .with_logits(phi3_nn::LogitRows::All)
            .reaching(ids.len());
        let logits = model.forward(phi3_nn::Input::Ids(chunk), &mut [span], None)?;
        chunked.extend(logits.flatten_all()?.to_vec1::<f32>()?);
    }
    assert_close("chunked", &chunked, &alone, vocab, F32_TOLERANCE)?;
    let short = some_ids(&model, 2, 20);
    let short_alone = step(&model, &mut model.new_cache(), &short)?;
    let mut caches = [model.new_cache(), model.new_cache()];
    let packed = packed_step(&model, &mut caches, &[short, ids])?;
    assert_close(
        "packed short",
        &packed[0],
        &short_alone,
        vocab,
        F32_TOLERANCE,
    )?;
    assert_close("packed long", &packed[1], &alone, vocab, F32_TOLERANCE)?;
    Ok(())
}
