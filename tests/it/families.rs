//! Every family against transformers + PEFT: tokens and logits, alone, mixed and in chunks, and the
//! gradients of its prompts.

use candle_core::{DType, Device, Tensor, Var};
use softserve::examples::TokenizedExample;
use softserve::{
    engine::{
        Engine, EngineConfig,
        request::{Request, SamplingParams},
    },
    kernels,
    model::{Model, ModelFiles, random::RandomModel},
    prompt::LearnedPrompt,
    tune::{
        forward::Forward,
        loss,
        parameters::{Method, Parameters},
    },
};

use crate::{
    fixtures::{self, Case},
    passes::{by_serving, by_tuning, cache, values},
    support::collect,
};

/// The prompt of a case, none for the bare model.
fn prompt(model: &str, case: &Case) -> Option<std::sync::Arc<LearnedPrompt>> {
    (!case.prompt.is_empty()).then(|| fixtures::prompt(model, &case.prompt))
}

/// The rows of a prompt and a text, `[t, hidden]`.
fn rows(model: &Model, name: &str, case: &Case) -> Tensor {
    let words = model.embed(&Tensor::new(case.input_ids.as_slice(), &Device::Cpu).unwrap()).unwrap();
    if case.prompt.is_empty() {
        return words;
    }
    let path = fixtures::dir(name).join("prompts").join(&case.prompt).join("adapter_model.safetensors");
    let prompt = candle_core::safetensors::load(path, &Device::Cpu).unwrap().remove("prompt_embeddings").unwrap();
    Tensor::cat(&[prompt, words], 0).unwrap()
}

#[test]
fn logits_are_those_of_peft_in_tuning_and_in_serving_on_every_backend() {
    for name in fixtures::families() {
        for backend in [kernels::cpu(), kernels::reference()] {
            let what = format!("{name} on {}", backend.name());
            let model = fixtures::load_on(&name, DType::F32, backend);
            for case in fixtures::embeddings_cases(&name) {
                let x = rows(&model, &name, &case);
                let t = x.dims()[0];
                let last = [t as u32 - 1];
                case.assert_near(&values(&by_tuning(&model, &x, &[t], &last)), 1e-3, &what);
                let served = by_serving(&model, &mut *cache(&model, t), &x, 0, &last);
                case.assert_near(&values(&served), 1e-3, &what);
            }
        }
    }
}

#[test]
fn tokens_are_those_of_peft_alone_in_a_mixed_batch_and_in_small_chunks() {
    for name in fixtures::families() {
        let cases = fixtures::embeddings_cases(&name);
        let request = |case: &Case| {
            let sampling = SamplingParams { max_tokens: case.greedy_ids.len(), ..Default::default() };
            Request::new(prompt(&name, case), &case.input_ids, sampling)
        };
        let start = |max_step_tokens| {
            let config = EngineConfig { max_step_tokens, kv_cache_bytes: 4 << 20, ..Default::default() };
            Engine::start(fixtures::load(&name, DType::F32), config).unwrap()
        };
        let (engine, _thread) = start(EngineConfig::default().max_step_tokens);
        for case in &cases {
            let ids = collect(engine.submit(request(case)).unwrap()).0;
            assert_eq!(ids, case.greedy_ids, "{name}/{} alone", case.prompt);
        }
        let (chunked, _thread) = start(5);
        for engine in [&engine, &chunked] {
            let streams: Vec<_> = cases.iter().map(|case| engine.submit(request(case)).unwrap()).collect();
            for (case, stream) in cases.iter().zip(streams) {
                assert_eq!(collect(stream).0, case.greedy_ids, "{name}/{} mixed", case.prompt);
            }
        }
    }
}

#[test]
fn gradients_of_rows_and_of_key_values_are_those_of_central_differences() {
    const ROWS: usize = 2;
    // Longer than the windows there are.
    let example = TokenizedExample::of_ids(&(40..66).collect::<Vec<_>>(), vec![70, 2]);
    for name in fixtures::families() {
        let [plain, fast] = [DType::F64, DType::F32].map(|dtype| Forward::new(fixtures::load(&name, dtype)));
        for method in [Method::PromptTuning, Method::PrefixTuning] {
            let parameters = Parameters::new(method, ROWS, plain.model());
            let values: Vec<f32> = (0..parameters.len()).map(|i| (i as f32 * 0.7).sin() * 0.5).collect();
            let variables = parameters.variables(&values, &Device::Cpu).unwrap();
            let tensors: Vec<Tensor> = variables.iter().map(|v| v.to_dtype(DType::F64).unwrap()).collect();
            let score = |tensors: &[Tensor]| {
                loss::score(&plain, Some(&parameters.prompt(tensors).unwrap()), &[&example]).unwrap().sum
            };
            let variables: Vec<Var> = tensors.iter().map(|t| Var::from_tensor(t).unwrap()).collect();
            let inputs: Vec<Tensor> = variables.iter().map(|v| v.as_tensor().clone()).collect();
            let gradients = loss::gradients_of(&score(&inputs), &variables).unwrap();
            let (_, fast) = loss::gradient(&fast, &parameters, &values, &[&example]).unwrap();
            let mut fast = fast.into_iter();
            let (step, mut total) = (1e-5, 0.0);
            for (i, gradient) in gradients.iter().enumerate() {
                let gradient = gradient.flatten_all().unwrap().to_vec1::<f64>().unwrap();
                let values = tensors[i].flatten_all().unwrap().to_vec1::<f64>().unwrap();
                let moved = |at: usize, by: f64| {
                    let (mut values, mut tensors) = (values.clone(), tensors.clone());
                    values[at] += by;
                    tensors[i] = Tensor::from_vec(values, tensors[i].shape(), &Device::Cpu).unwrap();
                    loss::scalar(&score(&tensors)).unwrap()
                };
                let numeric: Vec<f64> =
                    (0..values.len()).map(|at| (moved(at, step) - moved(at, -step)) / (2.0 * step)).collect();
                let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
                let size = norm(&mut numeric.iter().copied());
                let error = norm(&mut numeric.iter().zip(&gradient).map(|(a, b)| a - b));
                let rounding = norm(&mut gradient.iter().map(|a| a - f64::from(fast.next().unwrap())));
                let of = format!("{name}, {}", parameters.tensors()[i].name);
                // Keys that have left every window that is read have none.
                assert!(error < 1e-5 * size + 1e-9, "{of}: error {error} of {size}");
                assert!(rounding < 2e-3 * size + 1e-6, "{of}: error {rounding} of {size} in f32");
                total += size;
            }
            assert!(total > 1e-3, "{name}: no gradient to compare, {total}");
        }
    }
}

#[test]
fn rows_that_are_asked_for_are_those_of_the_whole_pass_in_every_bit() {
    for name in fixtures::families() {
        for dtype in [DType::F32, DType::BF16] {
            let model = fixtures::load(&name, dtype);
            let x = rows(&model, &name, &fixtures::embeddings_cases(&name)[1]);
            let t = x.dims()[0];
            let of = |asked: &[u32]| values(&by_serving(&model, &mut *cache(&model, t), &x, 0, asked));
            let vocab = model.info().vocab_size;
            let whole = of(&(0..t as u32).collect::<Vec<_>>());
            // In any order, and twice.
            let asked = [t as u32 - 1, 2, 0, 2];
            for (row, logits) in asked.iter().zip(of(&asked).chunks_exact(vocab)) {
                assert!(logits == &whole[*row as usize * vocab..][..vocab], "{name} {dtype:?} row {row}");
            }
        }
    }
}

#[test]
fn bf16_answers_do_not_depend_on_chunks_in_one_bit() {
    for name in fixtures::families() {
        let model = fixtures::load(&name, DType::BF16);
        let case = &fixtures::embeddings_cases(&name)[1];
        let x = rows(&model, &name, case);
        let t = x.dims()[0];
        let of_chunks = |chunk: usize| {
            let mut cache = cache(&model, t);
            let mut last = None;
            for start in (0..t).step_by(chunk) {
                let rows = chunk.min(t - start);
                let x = x.narrow(0, start, rows).unwrap();
                last = Some(by_serving(&model, &mut *cache, &x, start, &[rows as u32 - 1]));
            }
            values(&last.unwrap())
        };
        assert!(of_chunks(t) == of_chunks(7), "{name}");
    }
}

#[test]
fn a_random_model_of_every_familys_shape_loads() {
    for name in fixtures::families() {
        let config = fixtures::dir(&name).join("config.json");
        let files = ModelFiles::random(RandomModel::open(config.to_str().unwrap()).unwrap());
        let model = Model::load(&files, kernels::cpu(), DType::F32).unwrap();
        let stored = fixtures::load(&name, DType::F32);
        assert_eq!(model.kv_shape(), stored.kv_shape());
        let tied = stored.config().tie_word_embeddings && stored.info().num_parameters > model.info().num_parameters;
        assert!(tied || stored.info().num_parameters == model.info().num_parameters, "{name}");
    }
}

#[test]
fn the_factor_of_gemmas_token_embeddings_is_known() {
    let scale = |name: &str| fixtures::load(name, DType::F32).info().embedding_scale;
    let rounded = f64::from(32f32.sqrt());
    assert_eq!(scale("families/gemma"), Some(rounded));
    assert_eq!(scale("families/gemma3"), Some(rounded));
    assert_eq!(scale("families/llama3"), None);
}
