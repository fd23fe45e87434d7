use super::fake::{FakeModel, Rule};
use super::*;
use crate::sampling::SamplingParams;
use crate::testing::{byte_level, sentencepiece};

fn seeded(prompt: &[u32], seed: u64, max_new_tokens: usize) -> Request {
    Request {
        params: SamplingParams {
            seed: Some(seed),
            ..SamplingParams::default()
        },
        max_new_tokens,
        ..Request::new(prompt.to_vec())
    }
}

fn greedy(prompt: &[u32]) -> Request {
    Request {
        params: SamplingParams::greedy(),
        ..Request::new(prompt.to_vec())
    }
}

/// A byte-level model that answers `prompt` with `answer` and then `end`.
fn scripted(prompt: &[u32], answer: &[u8], end: Option<u32>) -> FakeModel {
    let mut script = prompt.to_vec();
    script.extend(answer.iter().map(|&byte| u32::from(byte)));
    script.extend(end);
    FakeModel::new(300, 200, Rule::Script(script))
}

fn without_times(mut completion: Completion) -> Completion {
    completion.usage.prefill_time = std::time::Duration::ZERO;
    completion.usage.decode_time = std::time::Duration::ZERO;
    completion
}

#[test]
fn packed_equals_alone() {
    let tokenizer = sentencepiece();
    let model = FakeModel::new(300, 500, Rule::Mixed);
    let requests: Vec<Request> = (0..6)
        .map(|index| {
            let prompt: Vec<u32> = (0..=index * 7).map(|id| 3 + id as u32 % 250).collect();
            let mut request = seeded(&prompt, 5 + index as u64 % 2, 20 + index);
            request.params.top_p = Some(0.95);
            request.params.repetition_penalty = 1.3;
            request.logprobs = Some(2);
            request.stop_ids = vec![258];
            request
        })
        .collect();
    let together: Vec<_> = complete(&model, &tokenizer, requests.clone())
        .unwrap()
        .into_iter()
        .map(without_times)
        .collect();
    for (request, packed) in requests.iter().zip(&together) {
        let alone = complete(&model, &tokenizer, [request.clone()]).unwrap();
        assert_eq!(without_times(alone[0].clone()), *packed);
        assert!(
            packed
                .tokens
                .iter()
                .all(|token| token.top_logprobs.len() == 2)
        );
    }
    // The same seed on another prompt is another text, and so is another seed on the same prompt.
    assert_ne!(together[0].ids(), together[2].ids());
    let other = complete(&model, &tokenizer, [seeded(&[3], 99, 20)]).unwrap();
    let same = complete(&model, &tokenizer, [seeded(&[3], 5, 20)]).unwrap();
    assert_ne!(other[0].ids(), same[0].ids());
}

#[test]
fn a_sequence_added_later_changes_nothing() {
    let tokenizer = sentencepiece();
    let model = FakeModel::new(300, 500, Rule::Mixed);
    let (first, second) = (
        seeded(&[5, 6], 1, 30),
        seeded(&(3..60).collect::<Vec<_>>(), 2, 10),
    );
    let alone: Vec<_> = [&first, &second]
        .map(|request| complete(&model, &tokenizer, [request.clone()]).unwrap()[0].ids())
        .to_vec();
    let model = FakeModel::new(300, 500, Rule::Mixed);
    let mut generator = Generator::new(&model, &tokenizer).with_prefill_rows(16);
    let mut ids = vec![Vec::new(), Vec::new()];
    assert_eq!(generator.add(first).unwrap(), 0);
    let mut collect = |event: Event| {
        if let EventKind::Token(token) = event.kind {
            ids[event.sequence].push(token.id);
        }
    };
    for _ in 0..5 {
        collect(generator.next().unwrap().unwrap());
    }
    assert_eq!(generator.add(second).unwrap(), 1);
    for event in &mut generator {
        collect(event.unwrap());
    }
    assert_eq!(ids, alone);
    assert!(generator.next().is_none());
    // The prompt of 57 came in chunks of 16 beside the decoding of the first sequence, each chunk
    // stating the whole length, and only the last one asking for logits.
    let calls = model.calls();
    let chunks: Vec<_> = calls
        .iter()
        .filter_map(|call| call.iter().find(|span| span.reaches == 57))
        .map(|span| (span.start, span.ids.len(), span.wants_logits))
        .collect();
    assert_eq!(
        chunks,
        [
            (0, 16, false),
            (16, 16, false),
            (32, 16, false),
            (48, 9, true)
        ]
    );
    let mixed = calls.iter().filter(|call| call.len() == 2).count();
    assert_eq!(mixed, 4 + 9);
    // And the generator can go on.
    generator.add(seeded(&[9], 1, 2)).unwrap();
    assert_eq!(generator.count(), 3);
}

#[test]
fn prompts_share_the_rows_of_a_call() {
    let tokenizer = sentencepiece();
    let model = FakeModel::new(300, 500, Rule::Mixed);
    let mut generator = Generator::new(&model, &tokenizer).with_prefill_rows(10);
    for len in [4, 4, 7] {
        generator.add(seeded(&vec![5; len], 1, 2)).unwrap();
    }
    assert_eq!(generator.by_ref().filter(|event| event.is_ok()).count(), 9);
    let rows: Vec<Vec<usize>> = model
        .calls()
        .iter()
        .map(|call| call.iter().map(|span| span.ids.len()).collect())
        .collect();
    assert_eq!(rows, [vec![4, 4, 2], vec![1, 1, 5], vec![1]]);
}

#[test]
fn events_usage_and_stop_id() {
    let tokenizer = byte_level();
    let end = tokenizer.token_to_id("<|end|>").unwrap();
    let prompt = [104, 105];
    let model = scripted(&prompt, "Hé".as_bytes(), Some(end));
    let mut generator = Generator::new(&model, &tokenizer);
    let mut request = greedy(&prompt);
    request.stop_ids = vec![end];
    generator.add(request).unwrap();
    let events: Vec<_> = generator.map(Result::unwrap).collect();
    let texts: Vec<_> = events.iter().map(Event::text).collect();
    assert_eq!(texts, ["H", "", "é", "", ""]);
    let ids: Vec<_> = events
        .iter()
        .filter_map(|event| match &event.kind {
            EventKind::Token(token) => Some(token.id),
            EventKind::Finished(_) => None,
        })
        .collect();
    assert_eq!(ids, [u32::from(b'H'), 0xC3, 0xA9, end]);
    let EventKind::Finished(finished) = &events[4].kind else {
        panic!("{events:?}");
    };
    assert_eq!(finished.reason, FinishReason::Stop(end));
    let usage = finished.usage;
    assert_eq!(
        (
            usage.prompt_tokens,
            usage.cached_tokens,
            usage.completion_tokens
        ),
        (2, 0, 4)
    );
    assert!(usage.prefill_time > std::time::Duration::ZERO);
    assert!(usage.tokens_per_second().unwrap() > 0.0);
}

#[test]
fn special_tokens_are_shown_on_request() {
    let tokenizer = byte_level();
    let end = tokenizer.token_to_id("<|end|>").unwrap();
    for (skip_special, text) in [(true, "a"), (false, "a<|end|>")] {
        let model = scripted(&[1], b"a", Some(end));
        let request = Request {
            skip_special,
            max_new_tokens: 2,
            ..greedy(&[1])
        };
        let completion = complete(&model, &tokenizer, [request]).unwrap();
        assert_eq!(completion[0].text, text);
        assert_eq!(completion[0].reason, FinishReason::Length);
    }
}

#[test]
fn stop_strings_end_between_tokens() {
    let tokenizer = byte_level();
    let run = |answer: &str, stops: &[&str], max_new_tokens: usize| {
        let model = scripted(&[1], answer.as_bytes(), None);
        let request = Request {
            stop_strings: stops.iter().map(ToString::to_string).collect(),
            max_new_tokens,
            ..greedy(&[1])
        };
        let completion = complete(&model, &tokenizer, [request]).unwrap().remove(0);
        (completion.text, completion.reason, completion.tokens.len())
    };
    let stopped = |text: &str, stop: &str, tokens: usize| {
        (
            text.to_owned(),
            FinishReason::StopString(stop.to_owned()),
            tokens,
        )
    };
    assert_eq!(
        run("Hi\nUser: x", &["\nUser:"], 50),
        stopped("Hi", "\nUser:", 8)
    );
    // At the last token allowed, the stop string still wins.
    assert_eq!(run("ab##", &["##"], 4), stopped("ab", "##", 4));
    // What was withheld is given in the end.
    assert_eq!(
        run("ab#c", &["##"], 3),
        ("ab#".to_owned(), FinishReason::Length, 3)
    );
    assert_eq!(
        run("é", &["##"], 1),
        ("\u{FFFD}".to_owned(), FinishReason::Length, 1)
    );
    // The last character is complete only at the end, and completes the stop string.
    assert_eq!(
        run("a\u{e9}", &["\u{FFFD}"], 2),
        stopped("a", "\u{FFFD}", 2)
    );
}

#[test]
fn text_may_go_on_behind_the_prompt() {
    let tokenizer = sentencepiece();
    let the = tokenizer.token_to_id("▁the").unwrap();
    for (continues_prompt, text) in [(false, "the"), (true, " the")] {
        let model = FakeModel::new(310, 50, Rule::Script(vec![1, the, the]));
        let request = Request {
            continues_prompt,
            max_new_tokens: 1,
            ..greedy(&[1, the])
        };
        let completion = complete(&model, &tokenizer, [request]).unwrap();
        assert_eq!(completion[0].text, text);
    }
}

#[test]
fn cancelling() {
    let tokenizer = sentencepiece();
    let model = FakeModel::new(300, 500, Rule::Mixed);
    let mut generator = Generator::new(&model, &tokenizer);
    let request = seeded(&[5], 1, 400);
    let token = request.cancel.clone();
    generator.add(request).unwrap();
    generator.add(seeded(&[5], 1, 4)).unwrap();
    generator.add(seeded(&[5], 1, 400)).unwrap();
    generator.next().unwrap().unwrap();
    token.cancel();
    generator.cancel(2);
    generator.cancel(77);
    let mut reasons = vec![None; 3];
    let mut completion_tokens = vec![0; 3];
    for event in &mut generator {
        let event = event.unwrap();
        if let EventKind::Finished(finished) = event.kind {
            reasons[event.sequence] = Some(finished.reason);
            completion_tokens[event.sequence] = finished.usage.completion_tokens;
        }
    }
    let cancelled = Some(FinishReason::Cancelled);
    assert_eq!(
        reasons,
        [cancelled.clone(), Some(FinishReason::Length), cancelled]
    );
    assert_eq!(completion_tokens, [1, 4, 1]);
    // Before anything ran there is no forward call at all.
    let model = FakeModel::new(300, 500, Rule::Mixed);
    let request = seeded(&[5], 1, 4);
    request.cancel.cancel();
    let completion = complete(&model, &tokenizer, [request]).unwrap();
    assert_eq!(completion[0].reason, FinishReason::Cancelled);
    assert_eq!(completion[0].usage.prefill_time, std::time::Duration::ZERO);
    assert!(model.calls().is_empty());
}

#[test]
fn cancelling_ends_a_call_that_nobody_else_waits_for() {
    let tokenizer = sentencepiece();
    let run = |beside: Option<Request>| {
        let mut model = FakeModel::new(300, 500, Rule::Mixed);
        let request = Request {
            keep_cache: true,
            ..seeded(&[5; 20], 1, 4)
        };
        // The second call reads the second chunk of the prompt.
        model.cancelled_at = Some((1, request.cancel.clone()));
        let mut generator = Generator::new(&model, &tokenizer).with_prefill_rows(8);
        if let Some(beside) = beside {
            generator.add(beside).unwrap();
        }
        let number = generator.add(request).unwrap();
        let mut reasons = Vec::new();
        for event in &mut generator {
            if let EventKind::Finished(finished) = event.unwrap().kind {
                reasons.push(finished.reason);
            }
        }
        let kept = generator.take_cache(number).unwrap().cache().len();
        (reasons, kept)
    };
    assert_eq!(run(None), (vec![FinishReason::Cancelled], 8));
    // With another sequence in it the call goes on to its end.
    let (reasons, kept) = run(Some(seeded(&[6; 3], 1, 2)));
    assert_eq!(reasons, [FinishReason::Length, FinishReason::Cancelled]);
    assert_eq!(kept, 5 + 8);
}

#[test]
fn cancelling_gives_withheld_text_back() {
    let tokenizer = byte_level();
    let model = scripted(&[1], b"ab#c", None);
    let mut generator = Generator::new(&model, &tokenizer);
    let stop_strings = vec!["##".to_owned()];
    generator
        .add(Request {
            stop_strings,
            ..greedy(&[1])
        })
        .unwrap();
    let mut text = String::new();
    for _ in 0..3 {
        text.push_str(generator.next().unwrap().unwrap().text());
    }
    assert_eq!(text, "ab");
    generator.cancel(0);
    let last = generator.next().unwrap().unwrap();
    assert_eq!(last.text(), "#");
    assert!(generator.next().is_none());
}

#[test]
fn the_context_is_a_limit() {
    let tokenizer = sentencepiece();
    let model = FakeModel::new(300, 10, Rule::Mixed);
    let run = |prompt: usize, max_new_tokens: usize| {
        complete(
            &model,
            &tokenizer,
            [seeded(&vec![5; prompt], 1, max_new_tokens)],
        )
        .map(|mut completions| completions.remove(0))
    };
    let full = run(4, 100).unwrap();
    assert_eq!(
        (full.reason, full.tokens.len()),
        (FinishReason::ContextFull, 6)
    );
    let exact = run(4, 6).unwrap();
    assert_eq!(
        (exact.reason, exact.tokens.len()),
        (FinishReason::Length, 6)
    );
    assert_eq!(run(9, 5).unwrap().tokens.len(), 1);
    for len in [10, 11] {
        match run(len, 1) {
            Err(Error::PromptTooLong {
                tokens,
                context: 10,
            }) => assert_eq!(tokens, len),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn requests_that_cannot_run() {
    let tokenizer = sentencepiece();
    let model = FakeModel::new(300, 50, Rule::Mixed);
    let mut generator = Generator::new(&model, &tokenizer);
    let mut refused = |request: Request, part: &str| {
        let error = generator.add(request).unwrap_err();
        let source = std::error::Error::source(&error).map(ToString::to_string);
        let text = error.to_string() + &source.unwrap_or_default();
        assert!(text.contains(part), "{text}");
    };
    refused(greedy(&[]), "no token");
    refused(greedy(&[5, 300]), "300");
    refused(
        Request {
            max_new_tokens: 0,
            ..greedy(&[5])
        },
        "max_new_tokens",
    );
    refused(
        Request {
            stop_strings: vec![String::new()],
            ..greedy(&[5])
        },
        "stop string",
    );
    let mut request = greedy(&[5]);
    request.params.logit_bias = [(300, 1.0)].into();
    refused(request, "logit_bias");
    let mut request = greedy(&[5]);
    request.params.top_p = Some(7.0);
    refused(request, "top_p");
    assert!(generator.next().is_none());
    assert_eq!(generator.add(greedy(&[5])).unwrap(), 0);
}

#[test]
fn caches_are_reused_up_to_the_first_difference() {
    let tokenizer = sentencepiece();
    let model = FakeModel::new(300, 500, Rule::Mixed);
    let mut generator = Generator::new(&model, &tokenizer);
    let keep = |request: Request| Request {
        keep_cache: true,
        ..request
    };
    generator.add(keep(seeded(&[5, 6, 7], 1, 4))).unwrap();
    generator.add(seeded(&[5, 6, 7], 1, 4)).unwrap();
    let generated: Vec<u32> = generator
        .by_ref()
        .filter_map(|event| match event.unwrap() {
            Event {
                sequence: 0,
                kind: EventKind::Token(token),
            } => Some(token.id),
            _ => None,
        })
        .collect();
    assert!(generator.take_cache(1).is_none());
    let kept = generator.take_cache(0).unwrap();
    assert!(generator.take_cache(0).is_none());
    // The last token was never run.
    assert_eq!(kept.ids(), [&[5, 6, 7], &generated[..3]].concat());
    assert_eq!(kept.cache().len(), 6);

    let next_turn = [&[5, 6, 7], &generated[..], &[8, 9]].concat();
    let other = [5, 6, 200, 7];
    let same = [5, 6, 7];
    for (prompt, cached) in [(&next_turn[..], 6), (&other, 2), (&same, 2), (&[9], 0)] {
        let model = FakeModel::new(300, 500, Rule::Mixed);
        let fresh = complete(&model, &tokenizer, [seeded(prompt, 3, 5)])
            .unwrap()
            .remove(0);
        let model = FakeModel::new(300, 500, Rule::Mixed);
        let cache = Some(kept.clone());
        let request = Request {
            cache,
            ..seeded(prompt, 3, 5)
        };
        let reused = complete(&model, &tokenizer, [request]).unwrap().remove(0);
        assert_eq!(reused.ids(), fresh.ids());
        assert_eq!(reused.usage.cached_tokens, cached);
        assert_eq!(model.calls()[0][0].start, cached);
        assert_eq!(model.calls()[0][0].ids, prompt[cached..]);
    }
    let (ids, cache) = kept.into_parts();
    assert!(CachedPrefix::new(ids[..3].to_vec(), cache).is_err());
}

#[test]
fn one_bad_sequence_does_not_end_the_others() {
    let tokenizer = sentencepiece();
    let model = FakeModel::new(300, 50, Rule::Mixed);
    let mut generator = Generator::new(&model, &tokenizer);
    let mut request = greedy(&[5]);
    request.params.logit_bias = (0..300).map(|id| (id, f32::NEG_INFINITY)).collect();
    generator.add(request).unwrap();
    generator.add(seeded(&[5], 1, 3)).unwrap();
    let (events, errors): (Vec<_>, Vec<_>) = generator.partition(Result::is_ok);
    assert_eq!(events.len(), 4);
    match errors.as_slice() {
        [
            Err(Error::Sequence {
                sequence: 0,
                source,
            }),
        ] => {
            assert!(matches!(**source, Error::NoCandidate));
        }
        other => panic!("{other:?}"),
    }
    let model = FakeModel::new(300, 50, Rule::Constant(f32::NAN));
    let outcome = complete(&model, &tokenizer, [greedy(&[5])]);
    assert!(
        matches!(outcome, Err(Error::Sequence { .. })),
        "{outcome:?}"
    );
}

#[test]
fn a_failing_model_ends_everything_once() {
    let tokenizer = sentencepiece();
    let mut model = FakeModel::new(300, 50, Rule::Mixed);
    model.fails_at = Some(2);
    let mut generator = Generator::new(&model, &tokenizer);
    generator.add(seeded(&[5], 1, 30)).unwrap();
    generator.add(seeded(&[6], 1, 30)).unwrap();
    let outcomes: Vec<bool> = generator.by_ref().map(|event| event.is_ok()).collect();
    assert_eq!(outcomes, [true, true, true, true, false]);
    assert_eq!(generator.live(), 0);
}

#[test]
fn a_prompt_with_its_own_rows_reads_those() {
    let tokenizer = sentencepiece();
    let model = FakeModel::new(300, 500, Rule::Mixed);
    let plain = seeded(&[5, 6, 7, 8, 9], 3, 12);
    let mut own = plain.clone();
    // Two of the tokens are no text: their ids only tell them apart.
    own.prompt_ids = vec![5, u32::MAX, u32::MAX, 8, 9];
    own.embeddings = Some(model.embed(&plain.prompt_ids).unwrap());
    own.keep_cache = true;

    let mut generator = Generator::new(&model, &tokenizer).with_prefill_rows(2);
    let number = generator.add(own.clone()).unwrap();
    generator.add(plain.clone()).unwrap();
    let mut ids = [Vec::new(), Vec::new()];
    for event in generator.by_ref() {
        let event = event.unwrap();
        if let EventKind::Token(token) = event.kind {
            ids[event.sequence].push(token.id);
        }
    }
    let alone = complete(&model, &tokenizer, [plain]).unwrap();
    assert_eq!(ids[0], alone[0].ids());
    assert_eq!(ids[1], alone[0].ids());
    let seen: Vec<u32> = model
        .calls()
        .iter()
        .flatten()
        .filter(|span| span.start < 5)
        .take(4)
        .flat_map(|span| span.ids.clone())
        .collect();
    assert!(seen.starts_with(&[5, 6]) && !seen.contains(&u32::MAX));

    // A second turn runs only what is new, and ids outside the vocabulary are compared too.
    let cache = generator.take_cache(number).unwrap();
    let mut second = own.clone();
    let said = &ids[0];
    second.prompt_ids = [&own.prompt_ids[..], said, &[11, 12]].concat();
    let rows: Vec<u32> = [&[5, 6, 7, 8, 9], &said[..], &[11, 12]].concat();
    second.embeddings = Some(model.embed(&rows).unwrap());
    second.cache = Some(cache.clone());
    let again = complete(&model, &tokenizer, [second.clone()]).unwrap();
    assert_eq!(again[0].usage.cached_tokens, 5 + said.len() - 1);
    second.prompt_ids[2] = u32::MAX - 1;
    second.cache = Some(cache);
    let other = complete(&model, &tokenizer, [second]).unwrap();
    assert_eq!(other[0].usage.cached_tokens, 2);
    assert_eq!(again[0].ids(), other[0].ids());
}

#[test]
fn rows_must_be_those_of_the_prompt() {
    let tokenizer = sentencepiece();
    let model = FakeModel::new(300, 500, Rule::Mixed);
    let mut request = seeded(&[5, 6, 7], 3, 12);
    request.embeddings = Some(model.embed(&[5, 6]).unwrap());
    let error = complete(&model, &tokenizer, [request]).unwrap_err();
    assert!(error.to_string().contains("embeddings"), "{error}");
}
