//! The engine without HTTP, on the demo model and on the shape of SmolLM2-135M with random weights. Each group answers one question; items are
//! generated tokens, so the figures to compare are tokens a second.
//!
//! - `batch`: what does batching buy? The same requests, one after another and together.
//! - `mixed_tasks`: what does a batch of many prompts cost against a batch of one?
//! - `virtual_tokens`: what does the length of a prompt cost?
//! - `decode`: what does a step cost that computes one token for each of so many requests?
//! - `sampling`: what does each way to choose a token cost beside greedy, for 16 requests and large vocabularies?
//! - `constrained`: what do answers that obey a JSON schema cost beside free ones, 16 at once?
//! - `lookup`: what do guesses from earlier tokens bring where an answer repeats itself, and cost where it does not?
//! - `score`: what do 77 continuations of 2 to 6 tokens cost beside one generated token, after an input of 40 tokens?
//! - `decide`: what do eight questions of eight tasks about one input cost beside one question, after inputs of so many tokens?
//!
//! `cargo bench --bench engine`

#![expect(clippy::expect_used, reason = "a benchmark that cannot start has nothing to measure")]

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use divan::{Bencher, counter::ItemsCount};
use serde_json::{Value, json};
use softserve::{
    demo,
    engine::{
        Engine, EngineConfig, EngineThread,
        request::{CacheNamespace, Event, Request, SamplingParams},
    },
    grammar::Grammars,
    model::{Model, ModelFiles, random::RandomModel},
    prompt::{LearnedPrompt, grammar::Grammar, learned::Embeddings},
    tokenizer::Tokenizer,
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
    // Random weights repeat themselves, and guesses of what is repeated would flatter.
    start_with(files, dtype, EngineConfig { draft_tokens: Some(0), ..EngineConfig::default() })
}

fn start_with(files: &ModelFiles, dtype: DType, config: EngineConfig) -> Load {
    let model = Model::load(files, softserve::kernels::cpu(), dtype).expect("a model");
    let hidden_size = model.info().hidden_size;
    let (engine, thread) = Engine::start(model, config).expect("an engine");
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

/// Gemma 3 270M, whose vocabulary is among the largest.
const GEMMA: &str = r#"{"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "vocab_size": 262144,
    "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 256, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "sliding_window": 512, "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 256, "hidden_activation": "gelu_pytorch_tanh", "attention_bias": false,
    "tie_word_embeddings": true, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}"#;

const SETTINGS: [&str; 6] = ["greedy", "temperature", "top_p", "top_k", "min_p", "penalties"];

fn setting(name: &str, max_tokens: usize, seed: u64) -> SamplingParams {
    let sampled = SamplingParams { max_tokens, seed, temperature: 0.7, ..Default::default() };
    match name {
        "temperature" => sampled,
        "top_p" => SamplingParams { top_p: 0.95, ..sampled },
        "top_k" => SamplingParams { top_k: 40, ..sampled },
        "min_p" => SamplingParams { min_p: 0.05, ..sampled },
        "penalties" => SamplingParams { repetition_penalty: 1.1, presence_penalty: 0.2, ..sampled },
        _ => SamplingParams { max_tokens, ..Default::default() },
    }
}

/// 16 requests at once, 32 tokens each.
fn sampling(bencher: Bencher, files: &ModelFiles, name: &str) {
    const STEPS: usize = 32;
    let load = start(files, DType::BF16);
    let ids: Vec<u32> = (300..300 + TEXT_TOKENS).collect();
    bencher.counter(ItemsCount::new(16 * STEPS)).bench_local(|| {
        let request = |i| Request::new(None, &ids, setting(name, STEPS, i));
        let mut streams: Vec<_> = (0..16).map(|i| load.engine.submit(request(i)).expect("a place")).collect();
        for stream in &mut streams {
            while matches!(stream.blocking_next(), Some(Event::Token(_))) {}
        }
    });
}

/// A tokenizer of 49,152 tokens: bytes, and lower-case letters by twos and threes, with a space before them or not.
fn tokenizer(folder: &std::path::Path) -> Tokenizer {
    // Bytes that are no printable ASCII are written as the characters from U+0100 on.
    let byte = |byte: u8| match byte {
        b'!'..=b'~' => byte as char,
        _ => char::from_u32(0x100 + u32::from(byte)).expect("a character"),
    };
    let letters = || b'a'..=b'z';
    let twos = letters().flat_map(|a| letters().map(move |b| format!("{}{}", a as char, b as char)));
    let threes: Vec<String> =
        twos.clone().flat_map(|two| letters().map(move |c| format!("{two}{}", c as char))).collect();
    // As GPT-2's tokenizer writes a space.
    let spaced = threes.iter().map(|three| format!("\u{120}{three}"));
    let capitals = threes.iter().map(|three| three.to_uppercase());
    let all = (0..=255u8).filter(|b| b.is_ascii_graphic() || *b == b' ' || *b == b'\n').map(|b| byte(b).to_string());
    let all = all.chain(twos).chain(threes.iter().cloned()).chain(spaced).chain(capitals).take(49_150);
    let mut vocab: serde_json::Map<String, Value> = all.enumerate().map(|(id, text)| (text, json!(id + 1))).collect();
    vocab.insert("<|end|>".to_owned(), json!(0));
    let json = json!({"version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [{"id": 0, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": []}});
    std::fs::write(folder.join("tokenizer.json"), json.to_string()).expect("room for a file");
    Tokenizer::load(&ModelFiles::open(folder).expect("a folder")).expect("a tokenizer")
}

/// 16 requests at once, 64 tokens each, on the shape of SmolLM2-135M: free, by a JSON schema that they do not come to the end
/// of, or half of them each.
#[divan::bench(args = ["free", "half", "all"], sample_count = 9)]
fn constrained(bencher: Bencher, which: &str) {
    const STEPS: usize = 64;
    let folder = std::env::temp_dir().join(format!("softserve-bench-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder for temporary files");
    let grammars = Grammars::new(tokenizer(&folder), 49_152, vec![0]);
    let person = json!({"type": "object", "required": ["name", "age", "mood"], "additionalProperties": false, "properties": {
        "name": {"type": "string", "maxLength": 40}, "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "mood": {"enum": ["glad", "sad", "neither"]}}});
    let schema = json!({"type": "array", "minItems": 20, "items": person});
    let constraint = grammars.compile(&Grammar::JsonSchema(schema)).expect("a grammar");
    let load = start(&ModelFiles::random(RandomModel::open("smollm2-135m").expect("a shape that ships")), DType::BF16);
    let ids: Vec<u32> = (300..300 + TEXT_TOKENS).collect();
    bencher.counter(ItemsCount::new(16 * STEPS)).bench_local(|| {
        let request = |i: usize| {
            let obeys = which == "all" || which == "half" && i.is_multiple_of(2);
            let constraint = obeys.then(|| Arc::clone(&constraint));
            let sampling = SamplingParams {
                max_tokens: STEPS,
                seed: i as u64,
                temperature: 0.7,
                constraint,
                ..Default::default()
            };
            Request::new(None, &ids, sampling)
        };
        let mut streams: Vec<_> = (0..16).map(|i| load.engine.submit(request(i)).expect("a place")).collect();
        for stream in &mut streams {
            let mut tokens = 0;
            while matches!(stream.blocking_next(), Some(Event::Token(_))) {
                tokens += 1;
            }
            assert_eq!(tokens, STEPS, "each answer has as many tokens");
        }
    });
    std::fs::remove_dir_all(&folder).expect("the folder of this benchmark");
}

/// One request of 96 tokens, with and without guesses: of random weights by the likeliest token, which soon repeats itself, and
/// drawn at random among a few tokens, so that pairs come again and what follows them does not.
#[divan::bench(args = ["repeats_without", "repeats_with", "differs_without", "differs_with"], sample_count = 9)]
fn lookup(bencher: Bencher, which: &str) {
    const TOKENS: usize = 96;
    let draft_tokens = Some(if which.ends_with("_with") { 7 } else { 0 });
    let files = ModelFiles::random(RandomModel::open("smollm2-135m").expect("a shape that ships"));
    let load = start_with(&files, DType::BF16, EngineConfig { draft_tokens, ..EngineConfig::default() });
    let ids: Vec<u32> = (300..300 + TEXT_TOKENS).collect();
    let differs = which.starts_with("differs");
    let mut seed = 0;
    bencher.counter(ItemsCount::new(TOKENS)).bench_local(|| {
        seed += 1;
        let sampling = SamplingParams {
            max_tokens: TOKENS,
            seed,
            temperature: if differs { 1.0 } else { 0.0 },
            logit_bias: if differs { (400..408).map(|id| (id, 100.0)).collect() } else { Vec::new() },
            ..Default::default()
        };
        let mut stream = load.engine.submit(Request::new(None, &ids, sampling)).expect("a place");
        while stream.blocking_next().is_some() {}
    });
}

#[divan::bench(args = SETTINGS, sample_count = 5)]
fn sampling_vocabulary_151936(bencher: Bencher, name: &str) {
    sampling(bencher, &ModelFiles::random(RandomModel::open("qwen2.5-0.5b").expect("a shape that ships")), name);
}

#[divan::bench(args = SETTINGS, sample_count = 5)]
fn sampling_vocabulary_262144(bencher: Bencher, name: &str) {
    let folder = std::env::temp_dir().join(format!("softserve-bench-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder for temporary files");
    let config = folder.join("config.json");
    std::fs::write(&config, GEMMA).expect("room for a file");
    let files = ModelFiles::random(RandomModel::open(&config.to_string_lossy()).expect("a configuration"));
    sampling(bencher, &files, name);
    std::fs::remove_dir_all(&folder).expect("the folder of this benchmark");
}

/// A request after an input of 40 tokens that no request had before.
fn after_a_new_input(bencher: Bencher, dtype: DType, request: impl Fn(&[u32]) -> Request) {
    let load = start(&ModelFiles::random(RandomModel::open("smollm2-135m").expect("a shape that ships")), dtype);
    let mut first = 0;
    bencher.bench_local(|| {
        first += 1;
        let ids: Vec<u32> = (0..40).map(|i| 300 + (first * 41 + i * 7) % 40_000).collect();
        let mut stream = load.engine.submit(request(&ids)).expect("a place");
        while stream.blocking_next().is_some() {}
    });
}

/// 77 continuations of 2 to 6 tokens; four begin alike, as labels do.
fn continuations() -> Vec<Vec<u32>> {
    let token = |i: u32, j: u32| 1000 + if j == 0 { i / 4 } else { 100 * j + i };
    (0..77).map(|i| (0..2 + i % 5).map(|j| token(i, j)).collect()).collect()
}

#[divan::bench(args = ["bf16", "f32"], sample_count = 20)]
fn score_one_generated_token(bencher: Bencher, dtype: &str) {
    let sampling = SamplingParams { max_tokens: 1, ..Default::default() };
    after_a_new_input(bencher, dtype_of(dtype), |ids| Request::new(None, ids, sampling.clone()));
}

#[divan::bench(args = ["bf16", "f32"], sample_count = 20)]
fn score_77_continuations(bencher: Bencher, dtype: &str) {
    let continuations = continuations();
    after_a_new_input(bencher, dtype_of(dtype), |ids| Request::score(None, ids, continuations.clone()));
}

#[divan::bench(args = ["bf16", "f32"], sample_count = 20)]
fn score_10_continuations(bencher: Bencher, dtype: &str) {
    let continuations = continuations()[..10].to_vec();
    after_a_new_input(bencher, dtype_of(dtype), |ids| Request::score(None, ids, continuations.clone()));
}

/// What a label of four tokens costs that is generated: those and the end after them.
#[divan::bench(args = ["bf16", "f32"], sample_count = 20)]
fn score_a_short_generation(bencher: Bencher, dtype: &str) {
    let sampling = SamplingParams { max_tokens: 5, ..Default::default() };
    after_a_new_input(bencher, dtype_of(dtype), |ids| Request::new(None, ids, sampling.clone()));
}

/// Questions of so many tasks about one input that no call had before: two labels of two tokens and an end each, after prompts of
/// 20 rows, which are warm.
fn decide(bencher: Bencher, tasks: usize, input: u32) {
    // So small that all of it has been used after a few calls: the system gives memory that is new slowly.
    let config = EngineConfig { kv_cache_bytes: 48 << 20, ..EngineConfig::default() };
    let files = ModelFiles::random(RandomModel::open("smollm2-135m").expect("a shape that ships"));
    let load = start_with(&files, DType::BF16, config);
    let prompts = load.prompts(tasks, 20);
    let labels = vec![vec![500, 501, 2], vec![600, 601, 2]];
    let mut first = 0;
    bencher.bench_local(|| {
        first += 1;
        let ids: Vec<u32> = (0..input).map(|i| 300 + (first * 41 + i * 7) % 40_000).collect();
        let request = |(task, prompt): (usize, &Option<Arc<LearnedPrompt>>)| {
            let request = Request::score(prompt.clone(), &ids, labels.clone());
            let namespace = Some(CacheNamespace([task as u8; 32]));
            Request { namespace, public_prefix: 20, ..request }
        };
        let requests = prompts.iter().enumerate().map(request).collect();
        for stream in load.engine.submit_all(requests) {
            let mut stream = stream.expect("a place");
            while stream.blocking_next().is_some() {}
        }
    });
}

#[divan::bench(args = [8, 16, 40], sample_count = 40)]
fn decide_one_question(bencher: Bencher, input: u32) {
    decide(bencher, 1, input);
}

#[divan::bench(args = [8, 16, 40], sample_count = 40)]
fn decide_eight_questions_of_eight_tasks(bencher: Bencher, input: u32) {
    decide(bencher, 8, input);
}

fn dtype_of(name: &str) -> DType {
    if name == "bf16" { DType::BF16 } else { DType::F32 }
}
