//! candle-transformers' phi3 as a second, independent reference, and where it errs.

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::phi3 as candle_phi3;
use phi_3_mini::{Config, Model};
use phi3_nn::CausalLm;
use phi3_tests::fixtures;
use phi3_tests::golden::Kit;
use phi3_tests::parity::{F32_TOLERANCE, assert_close, deviation, step};

/// Logits of the last row of `ids`, from candle-transformers and from here.
fn last_rows(kit: &Kit, ids: &[u32]) -> Result<(Vec<f32>, Vec<f32>)> {
    let config: candle_phi3::Config = serde_json::from_value(kit.config.clone())?;
    let tensors = kit.f32_tensors()?.into_iter().map(|(name, shape, bytes)| {
        let tensor = Tensor::from_raw_buffer(&bytes, DType::F32, &shape, &Device::Cpu)?;
        Ok((name, tensor))
    });
    let vars = VarBuilder::from_tensors(tensors.collect::<Result<_>>()?, DType::F32, &Device::Cpu);
    let mut theirs = candle_phi3::Model::new(&config, vars)?;
    let input = Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?;
    let theirs: Vec<f32> = theirs.forward(&input, 0)?.flatten_all()?.to_vec1()?;

    let ours = Model::new(&Config::from_json(&kit.config)?, kit.weights(&Device::Cpu)?)?;
    let vocab = ours.info().vocab_size;
    let rows = step(&ours, &mut ours.new_cache(), ids)?;
    Ok((theirs, rows[rows.len() - vocab..].to_vec()))
}

#[test]
fn both_agree_on_a_model_without_longrope() -> Result<()> {
    for name in ["phi3-mini-4k", "phi3-medium-4k"] {
        let kit = Kit::load(&fixtures().join(name))?;
        let ids = kit.ids("long", "input_ids").context("ids")?;
        let (theirs, ours) = last_rows(&kit, ids)?;
        assert_close(name, &ours, &theirs, theirs.len(), F32_TOLERANCE)?;
    }
    Ok(())
}

/// candle-transformers divides the frequency by its factor the wrong way round and leaves out the
/// attention factor. If this fails, it was mended: make it a second reference for longrope too.
#[test]
fn its_longrope_is_not_the_references() -> Result<()> {
    let kit = Kit::load(&fixtures().join("phi3-mini-128k-longrope"))?;
    let ids = kit.ids("long", "input_ids").context("ids")?;
    let (theirs, ours) = last_rows(&kit, ids)?;
    let golden = kit.floats("long", "logits").context("logits")?;
    assert_close(
        "ours",
        &ours,
        &golden[golden.len() - ours.len()..],
        ours.len(),
        F32_TOLERANCE,
    )?;
    let apart = ours
        .iter()
        .zip(&theirs)
        .map(|(a, b)| (a - b).abs())
        .fold(0f32, f32::max);
    ensure!(
        apart > 0.1 * deviation(&ours),
        "the two agree within {apart}"
    );
    Ok(())
}
