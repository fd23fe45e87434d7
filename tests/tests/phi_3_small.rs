//! Phi-3-small against the goldens of its own code, the layouts of its attention, and the forward
//! contract.

use std::ops::ControlFlow;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device};
use phi_3_small::{Config, Model};
use phi3::hub::quantize::{Options, write_gguf};
use phi3_nn::{
    AttentionPattern, BlockSparseLayout, CacheType, CausalLm, Input, LogitRows, Observer, Span,
    Weights,
};
use phi3_tests::golden::Kit;
use phi3_tests::parity::{F32_TOLERANCE, assert_close, decode, step};
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

/// A kit's checkpoint through a GGUF file of f32: the same config, the goldens, alone and packed.
fn check_gguf(folder: &Path) -> Result<()> {
    let kit = Kit::load(folder)?;
    let checkpoint = phi3::hub::open_folder(folder)?;
    let out = tempfile::tempdir()?;
    let path = out.path().join("model.gguf");
    let options = Options::default();
    let go_on = &mut |_: &_, _, _| ControlFlow::Continue(());
    write_gguf(&checkpoint, "F32".parse()?, &path, &options, go_on)?;
    let file = phi3::hub::gguf::open(&path)?;
    let config = Config::from_json(&file.config)?;
    ensure!(config == Config::from_json(&kit.config)?, "{config:?}");
    let weights = Weights::new(file.weights, Device::Cpu, DType::F32);
    let model = Model::new(&config, weights.with_cache_type(CacheType::F32))?;
    let largest = check_kit(&kit, &model)?;
    eprintln!("{}: within {largest:e} from GGUF", folder.display());
    check_packed(&kit, &model)
}

#[test]
fn every_golden_holds_from_gguf() -> Result<()> {
    for name in FIXTURES {
        check_gguf(&fixtures().join(name)).with_context(|| name.to_owned())?;
    }
    let Some(folder) = kit("the comparison with all phi3small goldens from GGUF") else {
        return Ok(());
    };
    for name in ["8k", "8step", "homo", "128k", "128k-nomscale"] {
        check_gguf(&folder.join(format!("phi3-small-{name}"))).with_context(|| name.to_owned())?;
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
        let span = Span::new(chunk.len(), &mut cache)
            .with_logits(LogitRows::All)
            .reaching(ids.len());
        let logits = model.forward(Input::Ids(chunk), &mut [span], None)?;
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

/// What `phi3 inspect` shows is what a sequence holds, after every chunk and every token.
#[test]
fn a_cache_is_as_large_as_stated() -> Result<()> {
    for name in FIXTURES {
        let kit = Kit::load(&fixtures().join(name))?;
        for cache_type in CacheType::ALL {
            let weights = kit.weights(&Device::Cpu)?.with_cache_type(cache_type);
            let model = Model::new(&Config::from_json(&kit.config)?, weights)?;
            let ids = some_ids(&model, 1, 500);
            let mut cache = model.new_cache();
            let (prompt, decoded) = ids.split_at(400);
            for chunk in prompt.chunks(37).chain(decoded.chunks(1)) {
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
            // The dense layer grows, the sparse ones by what is seen from far.
            let mut dense = model.cache_spec().clone();
            dense.patterns.fill(AttentionPattern::Causal);
            ensure!(cache.size_in_bytes() < dense.bytes_at(500), "{name}");
        }
    }
    Ok(())
}

/// Ends a forward call while it runs.
struct FailAt(&'static str);

impl Observer for FailAt {
    fn wants(&self, name: &str) -> bool {
        name == self.0
    }

    fn observe(&mut self, name: &str, _: &candle_core::Tensor) -> phi3_nn::Result<()> {
        Err(phi3_nn::Error::Batch(format!("{name} is far enough")))
    }
}

/// A call that ends half way has freed what its own tokens do not reach; the sequence goes on from
/// where it was.
#[test]
fn a_call_that_fails_half_way_changes_nothing() -> Result<()> {
    for name in FIXTURES {
        let (_, model) = load(&fixtures().join(name), false)?;
        let vocab = model.info().vocab_size;
        let ids = some_ids(&model, 5, 300);
        let mut cache = model.new_cache();
        let expected = step(&model, &mut cache, &ids[..201])?;
        let mut cache = model.new_cache();
        step(&model, &mut cache, &ids[..200])?;
        for (last, layer) in [(300, "hidden_layer0"), (230, "hidden_layer1")] {
            let span = Span::new(last - 200, &mut cache);
            let input = Input::Ids(&ids[200..last]);
            let error = model.forward(input, &mut [span], Some(&mut FailAt(layer)));
            ensure!(error.is_err_and(|error| error.to_string().contains(layer)));
            ensure!(cache.len() == 200);
            let found = step(&model, &mut cache.clone(), &ids[200..201])?;
            let what = format!("{name}, after {layer}");
            assert_close(
                &what,
                &found,
                &expected[200 * vocab..],
                vocab,
                F32_TOLERANCE,
            )?;
        }
    }
    Ok(())
}

/// The 128k fixture with a stride of 16. With its own stride of 4 the four heads of a key/value head
/// see every block between them, so that nothing of the sparse layer could be freed; with 16 the
/// eight heads see every other one from afar. A stride is no weight: any dense oracle follows it.
fn sparser_128k() -> Result<(Kit, Config)> {
    let mut kit = Kit::load(&fixtures().join("phi3-small-128k"))?;
    kit.config["max_position_embeddings"] = serde_json::json!(131_072);
    kit.config["blocksparse_vert_stride"] = serde_json::json!(16);
    let config = Config::from_json(&kit.config)?;
    Ok((kit, config))
}

/// A sequence that passed the LongRoPE limit token by token has keys of both rotations. What was
/// freed of it comes back, after a truncation, as it was.
#[test]
fn truncation_across_the_limit_restores_both_rotations() -> Result<()> {
    let (kit, config) = sparser_128k()?;
    let model = Model::new(&config, kit.weights(&Device::Cpu)?)?;
    let vocab = model.info().vocab_size;
    let ids = some_ids(&model, 9, 160);
    let mut cache = model.new_cache();
    step(&model, &mut cache, &ids[..30])?;
    let steps = decode(&model, &mut cache, &ids[30..])?;
    for keep in [150, 100, 60, 50, 49] {
        let mut shorter = cache.clone();
        shorter.truncate(keep)?;
        let found = decode(&model, &mut shorter, &ids[keep..keep + 3])?;
        let expected = &steps[(keep - 30) * vocab..][..3 * vocab];
        let what = format!("after truncation to {keep}");
        assert_close(&what, &found, expected, vocab, F32_TOLERANCE)?;
        ensure!(shorter.size_in_bytes() == model.cache_spec().bytes_at(keep + 3));
    }
    Ok(())
}

/// The model generates 2,000 tokens past the end of its local window: its cache stays as stated,
/// and its logits equal those of a mask over all keys at 20 places.
fn check_long_generation(prompt_len: usize, recomputes: bool) -> Result<()> {
    const TOKENS: usize = 2000;
    let (kit, config) = sparser_128k()?;
    let model = Model::new(&config, kit.weights(&Device::Cpu)?)?;
    let weights = kit.weights(&Device::Cpu)?.with_candle_operations();
    let dense = Model::new(&config, weights)?;
    let vocab = model.info().vocab_size;
    let window = config.layout.num_local_blocks() * config.layout.block_size();

    let mut ids = some_ids(&model, 4, prompt_len);
    let len = prompt_len.max(window) + TOKENS;
    let mut cache = model.new_cache();
    let mut rows = Vec::new();
    let mut new = 0..ids.len();
    while ids.len() < len {
        let logits = step(&model, &mut cache, &ids[new.clone()])?;
        let row = logits[logits.len() - vocab..].to_vec();
        let held = cache.size_in_bytes();
        ensure!(
            held == model.cache_spec().bytes_at(cache.len()),
            "{held} bytes"
        );
        // Greedy text of random weights runs in circles; a choice among the best does not.
        let mut order: Vec<u32> = (0..vocab as u32).collect();
        order.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]));
        ids.push(order[ids.len() * 7 % 5]);
        new = ids.len() - 1..ids.len();
        rows.push(row);
    }
    let sampled: Vec<_> = (0..20).map(|i| (rows.len() - 1) * i / 19).collect();
    if recomputes {
        // All tokens at once, from scratch and without a cache: what a row holds does not depend on
        // those behind it, and every length is past the limit.
        ensure!(model.info().original_max_position_embeddings < Some(prompt_len));
        let fresh = step(&dense, &mut dense.new_cache(), &ids)?;
        for &row in &sampled {
            let what = format!("row {row}, recomputed");
            let expected = &fresh[(prompt_len - 1 + row) * vocab..][..vocab];
            assert_close(&what, &rows[row], expected, vocab, F32_TOLERANCE)?;
        }
        // And some of them with nothing behind.
        for &row in sampled.iter().rev().step_by(5) {
            let fresh = step(&dense, &mut dense.new_cache(), &ids[..prompt_len + row])?;
            let expected = &fresh[fresh.len() - vocab..];
            let what = format!("row {row}, recomputed up to it");
            assert_close(&what, &rows[row], expected, vocab, F32_TOLERANCE)?;
        }
    }
    let mut cache = dense.new_cache();
    let mut step_of = 0..prompt_len;
    for (row, found) in rows.iter().enumerate() {
        let expected = step(&dense, &mut cache, &ids[step_of.clone()])?;
        step_of = step_of.end..step_of.end + 1;
        if sampled.contains(&row) {
            let expected = &expected[expected.len() - vocab..];
            assert_close(&format!("row {row}"), found, expected, vocab, F32_TOLERANCE)?;
        }
    }
    // Dense it would hold every key of both layers.
    let mut all = model.cache_spec().clone();
    all.patterns.fill(AttentionPattern::Causal);
    let (sparse, all) = (model.cache_spec().bytes_at(len), all.bytes_at(len));
    eprintln!("{len} tokens: {sparse} bytes, {all} if both layers were dense");
    ensure!(sparse * 100 < all * 65);
    Ok(())
}

#[test]
fn a_long_generation_equals_the_dense_oracle() -> Result<()> {
    check_long_generation(30, false)
}

#[test]
fn a_long_generation_from_a_long_prompt_equals_a_recompute() -> Result<()> {
    check_long_generation(100, true)
}
