//! Evaluation on the engine: many inputs, one model that several engines share, and what an engine needs to
//! start.

use std::sync::Arc;

use candle_core::DType;
use softserve::{
    engine::{
        Engine, EngineConfig, StartError,
        request::{Request, SamplingParams},
    },
    packing::PromptShape,
    tune::inference::Inference,
};

use crate::{fixtures, support::collect};

#[test]
fn inputs_beyond_a_batch_are_answered_in_their_order_as_the_server_would_and_one_without_text_is_not() {
    let model = Arc::new(fixtures::load("qwen2", DType::F32));
    let prompt = fixtures::prompt("qwen2", "prompt33");
    let (server, _thread) = Engine::start(Arc::clone(&model), EngineConfig::default()).unwrap();
    let mut inputs: Vec<Vec<u32>> = (0..150).map(|i| (0..1 + i % 7).map(|j| 5 + (i * 3 + j) % 90).collect()).collect();
    inputs[40].clear();
    for prompt in [None, Some(&prompt)] {
        let inference = Inference::start(&model, prompt, 7, 4).unwrap();
        let mut told = Vec::new();
        let texts: Vec<_> = inputs.iter().map(|ids| PromptShape::None.followed_by(ids)).collect();
        let answers = inference.greedy(&texts, 4, None, &mut |done| told.push(done)).unwrap();
        assert_eq!(told.last(), Some(&150));
        assert!(told.is_sorted());
        for (i, (input, answer)) in inputs.iter().zip(&answers).enumerate() {
            if input.is_empty() && prompt.is_none() {
                assert!(answer.is_empty());
                continue;
            }
            let stop_tokens = model.info().eos_token_ids.clone();
            let sampling = SamplingParams { max_tokens: 4, stop_tokens, ..SamplingParams::default() };
            let alone = collect(server.submit(Request::new(prompt.cloned(), input, sampling)).unwrap());
            assert_eq!(*answer, alone.0, "input {i}");
        }
    }
    // Both engines of evaluations are gone, with what they held of the model.
    assert_eq!(Arc::strong_count(&model), 2, "this test and the server");
}

#[test]
fn an_engine_whose_cache_is_too_small_says_what_it_needs() {
    for (name, least) in [("qwen2", "one block"), ("encoder-decoder/t5", "one position of the encoder's output")] {
        let config = EngineConfig { kv_cache_bytes: 64, ..EngineConfig::default() };
        match Engine::start(fixtures::load(name, DType::F32), config) {
            Err(StartError::KvCacheTooSmall { bytes, holds, needed }) => {
                assert!(bytes <= 64 && needed > bytes);
                assert_eq!(holds, least);
            }
            other => panic!("{name}: expected a refusal, found {other:?}"),
        }
    }
}
