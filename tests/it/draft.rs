//! Prompt-lookup speculative decoding: the same tokens with the same log-probabilities, from fewer steps.

use std::sync::Arc;

use candle_core::DType;
use softserve::{
    engine::{
        Engine, EngineConfig,
        request::{Event, FinishReason, GeneratedToken, Request, SamplingParams},
    },
    prompt::LearnedPrompt,
};

use crate::fixtures;

/// An answer: its tokens, and why it ended.
type Answer = (Vec<GeneratedToken>, FinishReason);

/// What an engine answers that guesses up to `draft_tokens`, `at_once` requests at a time; and its counts of steps, guesses
/// and right ones.
fn answers(model: &str, draft_tokens: usize, requests: &[Request], at_once: usize) -> (Vec<Answer>, [u64; 3]) {
    let config = EngineConfig { draft_tokens: Some(draft_tokens), prefix_sharing: false, ..EngineConfig::default() };
    let (engine, thread) = Engine::start(fixtures::load(model, DType::F32), config).unwrap();
    let mut answers = Vec::new();
    for requests in requests.chunks(at_once) {
        let streams = engine.submit_all(requests.to_vec());
        for mut stream in streams.into_iter().map(Result::unwrap) {
            let mut tokens = Vec::new();
            let reason = loop {
                match stream.blocking_next().unwrap() {
                    Event::Token(token) => tokens.push(token),
                    Event::Finished { reason, .. } => break reason,
                    other => panic!("{other:?}"),
                }
            };
            answers.push((tokens, reason));
        }
    }
    let stats = engine.stats();
    drop(engine);
    thread.join();
    (answers, [stats.steps, stats.draft_tokens, stats.draft_tokens_accepted])
}

/// Requests whose inputs and answers repeat themselves, by the likeliest token and by drawn ones.
fn requests(prompt: Option<&Arc<LearnedPrompt>>, stop: &[u32]) -> Vec<Request> {
    let repeated = |first: u32, period: u32| (0..24).map(|i| first + i % period).collect::<Vec<u32>>();
    let inputs = [repeated(5, 24), repeated(20, 3), repeated(40, 5), repeated(9, 1), repeated(60, 7)];
    let params = |i: usize| SamplingParams {
        max_tokens: 40 - 3 * (i % 5),
        logprobs: Some(i % 3),
        temperature: [0.0, 0.7, 0.0, 1.5][i % 4],
        top_p: [1.0, 0.9][i % 2],
        repetition_penalty: [1.0, 1.0, 1.3][i % 3],
        seed: i as u64,
        stop_tokens: stop.to_vec(),
        // What the model says again and again is drawn more often with it.
        logit_bias: if i % 4 == 1 { vec![(20, 6.0), (21, 6.0)] } else { Vec::new() },
        ..SamplingParams::default()
    };
    let all = (0..20).map(|i| Request::new(prompt.cloned(), &inputs[i % inputs.len()], params(i)));
    all.collect()
}

#[test]
fn guesses_change_neither_tokens_nor_log_probabilities_and_save_steps() {
    let mut right = 0;
    for model in ["llama-tied", "llama-scaled", "qwen2"] {
        let prompt = fixtures::prompt(model, "prompt7");
        for (prompt, stop) in [(None, vec![]), (Some(&prompt), vec![20, 30, 31])] {
            let requests = requests(prompt, &stop);
            let (plain, [steps, none, _]) = answers(model, 0, &requests, 1);
            assert_eq!(none, 0);
            for (draft_tokens, at_once) in [(7, 1), (2, 1), (7, 3), (7, 20)] {
                let (found, [fewer, guessed, accepted]) = answers(model, draft_tokens, &requests, at_once);
                for (i, (found, plain)) in found.iter().zip(&plain).enumerate() {
                    assert_eq!(found, plain, "{model}, {draft_tokens} guesses, {at_once} at once, request {i}");
                }
                assert!(accepted <= guessed, "{accepted} of {guessed}");
                assert!(at_once > 1 || fewer + accepted == steps, "{fewer} steps, {accepted} right, {steps} without");
                right += accepted;
            }
        }
    }
    assert!(right > 500, "{right} guesses were right");
}
