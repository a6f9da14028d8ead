//! The engine without HTTP, on the demo model and on the shape of SmolLM2-135M with random weights. Each group answers one question; items are
//! generated tokens, so the figures to compare are tokens a second.
//!
//! - `batch`: what does batching buy? The same requests, one after another and together.
//! - `mixed_tasks`: what does a batch of many prompts cost against a batch of one?
//! - `virtual_tokens`: what does the length of a prompt cost?
//! - `decode`: what does a step cost that computes one token for each of so many requests?
//!
//! `cargo bench --bench engine`

#![expect(clippy::expect_used, reason = "a benchmark that cannot start has nothing to measure")]

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use divan::{Bencher, counter::ItemsCount};
use softserve::{
    demo,
    engine::{
        Engine, EngineConfig, EngineThread,
        request::{Event, Request, SamplingParams},
    },
    model::{Model, ModelFiles, random::RandomModel},
    prompt::{LearnedPrompt, learned::Embeddings},
};

const NEW_TOKENS: usize = 16;
const TEXT_TOKENS: u32 = 24;

fn main() {
    divan::main();
}

struct Load {
    engine: Engine,
    _thread: EngineThread,
    hidden_size: usize,
}

fn load() -> Load {
    start(&demo::model(), DType::F32)
}

fn start(files: &ModelFiles, dtype: DType) -> Load {
    let model = Model::load(files, softserve::kernels::cpu(), dtype).expect("a model");
    let hidden_size = model.info().hidden_size;
    let (engine, thread) = Engine::start(model, EngineConfig::default()).expect("an engine");
    Load { engine, _thread: thread, hidden_size }
}

impl Load {
    fn prompts(&self, how_many: usize, virtual_tokens: usize) -> Vec<Option<Arc<LearnedPrompt>>> {
        let prompt = |_| {
            let rows = Tensor::randn(0f32, 1.0, (virtual_tokens, self.hidden_size), &Device::Cpu).expect("rows");
            Some(Arc::new(LearnedPrompt::Embeddings(Embeddings { rows })))
        };
        if virtual_tokens == 0 { vec![None] } else { (0..how_many).map(prompt).collect() }
    }

    /// Sends `requests` requests, at most `at_once` of them at a time, and waits for all tokens.
    fn run(&self, prompts: &[Option<Arc<LearnedPrompt>>], requests: usize, at_once: usize) {
        let ids: Vec<u32> = (300..300 + TEXT_TOKENS).collect();
        let sampling = SamplingParams { max_tokens: NEW_TOKENS, ..Default::default() };
        let all: Vec<_> = prompts.iter().cycle().take(requests).collect();
        for group in all.chunks(at_once) {
            let streams: Vec<_> = group
                .iter()
                .map(|p| self.engine.submit(Request::new((*p).clone(), &ids, sampling.clone())).expect("a place"))
                .collect();
            for mut stream in streams {
                while matches!(stream.blocking_next(), Some(Event::Token(_))) {}
            }
        }
    }
}

fn tokens(requests: usize) -> ItemsCount {
    ItemsCount::new(requests * NEW_TOKENS)
}

#[divan::bench(args = [1, 4, 16, 32], sample_count = 10)]
fn batch(bencher: Bencher, at_once: usize) {
    let load = load();
    let prompts = load.prompts(1, 32);
    bencher.counter(tokens(32)).bench(|| load.run(&prompts, 32, at_once));
}

#[divan::bench(args = [1, 8, 32], sample_count = 10)]
fn mixed_tasks(bencher: Bencher, tasks: usize) {
    let load = load();
    let prompts = load.prompts(tasks, 32);
    bencher.counter(tokens(32)).bench(|| load.run(&prompts, 32, 32));
}

#[divan::bench(args = [0, 8, 32, 100], sample_count = 10)]
fn virtual_tokens(bencher: Bencher, virtual_tokens: usize) {
    let load = load();
    let prompts = load.prompts(1, virtual_tokens);
    bencher.counter(tokens(32)).bench(|| load.run(&prompts, 32, 32));
}

/// 64 steps after the first, which also computes the inputs.
fn decode(bencher: Bencher, dtype: DType, requests: usize) {
    const STEPS: usize = 64;
    let files = ModelFiles::random(RandomModel::open("smollm2-135m").expect("a shape that ships"));
    let load = start(&files, dtype);
    let prompts = load.prompts(8, 32);
    let sampling = SamplingParams { max_tokens: STEPS + 1, ..Default::default() };
    let ids: Vec<u32> = (300..300 + TEXT_TOKENS).collect();
    bencher.counter(ItemsCount::new(requests * STEPS)).bench_local(|| {
        let mut streams: Vec<_> = (0..requests)
            .map(|i| {
                let prompt = prompts[i % prompts.len()].clone();
                load.engine.submit(Request::new(prompt, &ids, sampling.clone())).expect("a place")
            })
            .collect();
        for stream in &mut streams {
            while matches!(stream.blocking_next(), Some(Event::Token(_))) {}
        }
    });
}

#[divan::bench(args = [1, 8, 32], sample_count = 3)]
fn decode_bf16(bencher: Bencher, requests: usize) {
    decode(bencher, DType::BF16, requests);
}

#[divan::bench(args = [1, 8, 32], sample_count = 3)]
fn decode_f32(bencher: Bencher, requests: usize) {
    decode(bencher, DType::F32, requests);
}
