//! One runner for every model: the reference's goldens, and the forward contract.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use candle_core::Tensor;
use phi3_nn::{CausalLm, Error, Input, KvCache, LogitRows, Observer, Recompute, Span};

use crate::golden::Kit;
use crate::parity::{
    F32_TOLERANCE, Recorder, argmax_rows, assert_close, assert_hidden_states, decode,
    observed_step, step,
};

fn hidden_size(kit: &Kit) -> usize {
    kit.config["hidden_size"].as_u64().unwrap_or(0) as usize
}

/// Every case of a kit, alone: prefill, hidden states, cached decode, generation. Gives the largest
/// difference of a logit, as a share of its golden's deviation.
///
/// # Errors
/// Names the case and the first intermediate that differs.
pub fn check_kit(kit: &Kit, model: &dyn CausalLm) -> Result<f32> {
    let vocab = model.info().vocab_size;
    let mut largest = 0f32;
    for case in kit.cases() {
        let error = check_case(kit, model, &case, vocab).with_context(|| format!("case {case}"))?;
        largest = largest.max(error);
    }
    Ok(largest)
}

fn check_case(kit: &Kit, model: &dyn CausalLm, case: &str, vocab: usize) -> Result<f32> {
    if case == "leftpad" {
        return check_left_padded(kit, model, vocab);
    }
    let ids = kit.ids(case, "input_ids").context("input_ids")?;
    let mut recorder = Recorder::default();
    let mut cache = model.new_cache();
    let logits = observed_step(model, &mut cache, ids, Some(&mut recorder))?;
    assert_hidden_states(&recorder, &kit.hidden_states(case), hidden_size(kit))?;
    let golden = kit.floats(case, "logits").context("logits")?;
    let mut largest = assert_close("logits", &logits, golden, vocab, F32_TOLERANCE)?;
    let prompt = cache.clone();

    // Cached decode as the reference's raw steps, which never recompute at the longrope limit.
    if let (Some(decode_ids), Some(golden)) = (
        kit.ids(case, "decode_ids"),
        kit.floats(case, "decode_logits"),
    ) {
        let mut cache = prompt.clone().with_recompute(Recompute::Never);
        let steps = decode(model, &mut cache, &decode_ids[..decode_ids.len() - 1])?;
        let error = assert_close("decode_logits", &steps, golden, vocab, F32_TOLERANCE)?;
        largest = largest.max(error);
        let mut greedy = argmax_rows(&logits[logits.len() - vocab..], vocab);
        greedy.extend(argmax_rows(&steps, vocab));
        ensure!(greedy == decode_ids, "decode_ids: {greedy:?}");
        // The same steps, where every one recomputes what the longrope limit changes.
        if let Some(golden) = kit.floats(case, "nocache_last_logits") {
            let mut cache = prompt.clone().with_recompute(Recompute::Always);
            let steps = decode(model, &mut cache, &decode_ids[..decode_ids.len() - 1])?;
            let error = assert_close("nocache_last_logits", &steps, golden, vocab, F32_TOLERANCE)?;
            largest = largest.max(error);
        }
    }
    // Generation, where the rule is to recompute.
    if let Some(generate_ids) = kit.ids(case, "generate_ids") {
        let (ids, rows) = generate(
            model,
            prompt,
            &logits[logits.len() - vocab..],
            generate_ids.len(),
        )?;
        ensure!(ids == generate_ids, "generate_ids: {ids:?}");
        if let Some(golden) = kit.floats(case, "generate_logits") {
            let error = assert_close("generate_logits", &rows, golden, vocab, F32_TOLERANCE)?;
            largest = largest.max(error);
        }
    }
    Ok(largest)
}

/// Greedy ids from the last prompt row on, and the row that chose each.
fn generate(
    model: &dyn CausalLm,
    mut cache: KvCache,
    last_row: &[f32],
    count: usize,
) -> Result<(Vec<u32>, Vec<f32>)> {
    let vocab = last_row.len();
    let mut ids = argmax_rows(last_row, vocab);
    let mut rows = last_row.to_vec();
    while ids.len() < count {
        let row = step(model, &mut cache, &ids[ids.len() - 1..])?;
        ids.extend(argmax_rows(&row, vocab));
        rows.extend(row);
    }
    Ok((ids, rows))
}

/// A left-padded batch is a packed one here: the rows of its real tokens must agree.
fn check_left_padded(kit: &Kit, model: &dyn CausalLm, vocab: usize) -> Result<f32> {
    let ids = kit.ids("leftpad", "input_ids").context("input_ids")?;
    let mask = kit
        .ids("leftpad", "attention_mask")
        .context("attention_mask")?;
    let golden = kit.floats("leftpad", "logits").context("logits")?;
    let width = ids.len() / 2; // two sequences
    let mut sequences = [Vec::new(), Vec::new()];
    let mut expected = Vec::new();
    for (sequence, real) in sequences.iter_mut().enumerate() {
        for row in sequence * width..(sequence + 1) * width {
            if mask[row] == 1 {
                real.push(ids[row]);
                expected.extend_from_slice(&golden[row * vocab..(row + 1) * vocab]);
            }
        }
    }
    let mut caches = [model.new_cache(), model.new_cache()];
    let logits = packed_step(model, &mut caches, &sequences)?.concat();
    assert_close("leftpad.logits", &logits, &expected, vocab, F32_TOLERANCE)
}

/// One call for several sequences; per sequence the logits of all its new rows.
///
/// # Errors
/// Those of the model.
pub fn packed_step(
    model: &dyn CausalLm,
    caches: &mut [KvCache],
    ids: &[Vec<u32>],
) -> Result<Vec<Vec<f32>>> {
    let packed = ids.concat();
    let mut spans: Vec<_> = caches
        .iter_mut()
        .zip(ids)
        .map(|(cache, ids)| Span::new(ids.len(), cache).with_logits(LogitRows::All))
        .collect();
    let logits = model.forward(Input::Ids(&packed), &mut spans, None)?;
    let logits: Vec<f32> = logits.flatten_all()?.to_vec1()?;
    let vocab = model.info().vocab_size;
    let mut rows = logits.chunks_exact(vocab);
    Ok(ids
        .iter()
        .map(|ids| rows.by_ref().take(ids.len()).flatten().copied().collect())
        .collect())
}

/// The forward contract on `sequences` of ids: chunking, packing, truncation and failed calls
/// leave a sequence's logits as they are when it runs alone and at once.
///
/// # Errors
/// Says which promise is broken.
pub fn check_contract(model: &dyn CausalLm, sequences: &[Vec<u32>]) -> Result<()> {
    let vocab = model.info().vocab_size;
    let close = |what: &str, found: &[f32], expected: &[f32]| {
        assert_close(what, found, expected, vocab, F32_TOLERANCE).map(drop)
    };
    let alone = sequences
        .iter()
        .map(|ids| step(model, &mut model.new_cache(), ids))
        .collect::<Result<Vec<_>>>()?;

    // Packed: whole prompts together.
    let mut caches: Vec<_> = sequences.iter().map(|_| model.new_cache()).collect();
    for (idx, logits) in packed_step(model, &mut caches, sequences)?
        .iter()
        .enumerate()
    {
        close(&format!("packed sequence {idx}"), logits, &alone[idx])?;
    }

    for (ids, alone) in sequences.iter().zip(&alone) {
        let len = ids.len();
        // In chunks, the final length announced with each: one regime from the start.
        let mut cache = model.new_cache();
        let mut chunked = Vec::new();
        for chunk in ids.chunks(7) {
            let span = Span::new(chunk.len(), &mut cache)
                .with_logits(LogitRows::All)
                .reaching(len);
            let logits = model.forward(Input::Ids(chunk), &mut [span], None)?;
            chunked.extend(logits.flatten_all()?.to_vec1::<f32>()?);
        }
        close("chunked", &chunked, alone)?;

        // Token by token, without announcement: the last row has seen the whole sequence.
        let mut cache = model.new_cache();
        let steps = decode(model, &mut cache, ids)?;
        let last = steps.len() - vocab..;
        close("token by token", &steps[last.clone()], &alone[last])?;

        // As embeddings instead of ids, split where a rebuild may have to join both kinds.
        let mut cache = model.new_cache();
        let (head, tail) = ids.split_at(len / 2);
        if !head.is_empty() {
            let rows = model.embed(head)?;
            let mut spans = [Span::new(head.len(), &mut cache).with_logits(LogitRows::None)];
            model.forward(Input::Embeddings(&rows), &mut spans, None)?;
        }
        let found = step(model, &mut cache, tail)?;
        close(
            "embeddings, then ids",
            &found[found.len() - vocab..],
            &alone[alone.len() - vocab..],
        )?;

        // An interrupted call changes nothing, however far it came; nor does one flag of two end it.
        let mut interrupter = Interrupter::default();
        let flag = Arc::clone(&interrupter.flag);
        let mut cut = model.new_cache();
        let spans = &mut [Span::new(len, &mut cut).interrupted_by(&flag)];
        let result = model.forward(Input::Ids(ids), spans, Some(&mut interrupter));
        ensure!(
            matches!(result, Err(Error::Interrupted)),
            "a raised flag does not end the call"
        );
        ensure!(cut.is_empty(), "an interrupted call changed the length");
        let mut beside = model.new_cache();
        let both = [ids.as_slice(), ids].concat();
        let spans = &mut [
            Span::new(len, &mut cut).interrupted_by(&flag),
            Span::new(len, &mut beside).with_logits(LogitRows::None),
        ];
        let found = model.forward(Input::Ids(&both), spans, None)?;
        close(
            "after an interruption",
            &found.flatten_all()?.to_vec1::<f32>()?,
            &alone[alone.len() - vocab..],
        )?;

        // A failed call changes nothing; then truncated and continued as if never longer.
        ensure!(
            step(model, &mut cache, &[u32::MAX]).is_err(),
            "an id outside the vocabulary"
        );
        ensure!(cache.len() == len, "a failed call changed the length");
        for keep in [len - 1, len / 2, len / 4] {
            let mut shorter = cache.clone();
            shorter.truncate(keep)?;
            ensure!(
                shorter.len() == keep,
                "truncated to {} instead of {keep}",
                shorter.len()
            );
            let found = step(model, &mut shorter, &ids[keep..])?;
            close(
                &format!("after truncation to {keep} of {len}"),
                &found[found.len() - vocab..],
                &alone[alone.len() - vocab..],
            )?;
            let mut shorter = cache.clone();
            shorter.truncate(keep)?;
            let mut fresh = model.new_cache();
            step(model, &mut fresh, &ids[..keep.max(1)])?;
            fresh.truncate(keep)?;
            let expected = step(model, &mut fresh, &ids[keep..keep + 1])?;
            let found = step(model, &mut shorter, &ids[keep..keep + 1])?;
            close(
                &format!("one step after truncation to {keep}"),
                &found,
                &expected,
            )?;
        }
    }
    check_staggered(model, sequences, &alone)
}

/// Raises the flag when the first layer has run.
#[derive(Default)]
struct Interrupter {
    flag: Arc<AtomicBool>,
}

impl Observer for Interrupter {
    fn wants(&self, name: &str) -> bool {
        if name == "hidden_layer0" {
            self.flag.store(true, Ordering::Relaxed);
        }
        false
    }

    fn observe(&mut self, _: &str, _: &Tensor) -> phi3_nn::Result<()> {
        Ok(())
    }
}

/// Sequences of different lengths decode in one batch while others join with their prompt: each
/// crosses the longrope limit on its own.
fn check_staggered(model: &dyn CausalLm, sequences: &[Vec<u32>], alone: &[Vec<f32>]) -> Result<()> {
    let vocab = model.info().vocab_size;
    let mut caches: Vec<_> = sequences.iter().map(|_| model.new_cache()).collect();
    let longest = sequences.iter().map(Vec::len).max().unwrap_or(0);
    let mut last_rows = vec![Vec::new(); sequences.len()];
    // Every sequence ends at the same call; its first half comes as one chunk.
    for call in 0..longest {
        let mut active = Vec::new();
        for (idx, ids) in sequences.iter().enumerate() {
            let calls = ids.len() - ids.len() / 2;
            let Some(nth) = (call + calls).checked_sub(longest) else {
                continue;
            };
            let first = ids.len() / 2;
            active.push((
                idx,
                if nth == 0 {
                    0..first + 1
                } else {
                    first + nth..first + nth + 1
                },
            ));
        }
        if active.is_empty() {
            continue;
        }
        let ids: Vec<Vec<u32>> = active
            .iter()
            .map(|(idx, range)| sequences[*idx][range.clone()].to_vec())
            .collect();
        let mut running: Vec<KvCache> = active
            .iter()
            .map(|(idx, _)| std::mem::replace(&mut caches[*idx], model.new_cache()))
            .collect();
        let rows = packed_step(model, &mut running, &ids)?;
        for (((idx, _), cache), rows) in active.iter().zip(running).zip(rows) {
            caches[*idx] = cache;
            last_rows[*idx] = rows[rows.len() - vocab..].to_vec();
        }
    }
    for (idx, (found, expected)) in last_rows.iter().zip(alone).enumerate() {
        let expected = &expected[expected.len() - vocab..];
        assert_close(
            &format!("staggered sequence {idx}"),
            found,
            expected,
            vocab,
            F32_TOLERANCE,
        )?;
    }
    Ok(())
}
