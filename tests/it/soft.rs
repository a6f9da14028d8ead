//! `{{ soft() }}` in templates: virtual tokens where the template says.

use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};
use softserve::examples::TokenizedExample;
use softserve::{
    packing::InputToken,
    prompt::learned::{Embeddings, LearnedPrompt},
    tune::{
        inference::Inference,
        job, loss,
        options::{Length, Options, PromptType},
        plan::Plan,
    },
};

use crate::{
    fixtures,
    support::{Answer, Server, form, prompt_files},
    tune_job::{NEVER, TestRun},
};

/// The base model's own name.
const MODEL: &str = "llama-tied";

/// PEFT's configuration of a prompt of embeddings for this model.
fn config() -> Value {
    serde_json::from_slice(&prompt_files("prompt7").0).unwrap()
}

/// Uploads a prompt of these rows, `[words, hidden]`.
async fn upload(server: &Server, task: &str, rows: &Tensor, spec: &Value) -> Answer {
    let (n, hidden) = rows.dims2().unwrap();
    let data: Vec<u8> =
        rows.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().flat_map(f32::to_le_bytes).collect();
    let view = TensorView::new(Dtype::F32, vec![n, hidden], &data).unwrap();
    let weights = safetensors::serialize([("prompt_embeddings", view)], None).unwrap();
    let (mut config, spec) = (config(), spec.to_string());
    config["num_virtual_tokens"] = json!(n);
    let config = config.to_string();
    let parts: [(&str, &[u8]); 3] = [
        ("adapter_config.json", config.as_bytes()),
        ("adapter_model.safetensors", &weights),
        ("task.json", spec.as_bytes()),
    ];
    let (content_type, body) = form(&parts);
    server.upload(task, content_type, body).await
}

#[tokio::test]
async fn virtual_tokens_that_are_words_answer_as_the_words_do_wherever_a_template_places_them() {
    let server = Server::start();
    let words: [u32; 5] = [40, 41, 60, 9, 17];
    let model = fixtures::load("llama-tied", DType::F32);
    let rows = model.embed(&Tensor::new(&words, &Device::Cpu).unwrap()).unwrap();
    let ids = async |text: &str, special: bool| {
        let body = json!({"input": text, "special_tokens": special});
        let found = server.post("/tokenize", &body).await.ok()["tokens"].clone();
        serde_json::from_value::<Vec<u32>>(found).unwrap()
    };
    let bos = ids("", true).await;
    let input = "the cat sat";
    let part = async |text: &str| ids(text, false).await;
    let tail = part(&format!(" and {input}")).await;
    for (i, (template, whole)) in [
        ("{{ soft() }}{{ input }}", [&bos[..], &words, &part(input).await].concat()),
        ("Read {{ soft() }}{{ input }}", [&bos[..], &part("Read ").await, &words, &part(input).await].concat()),
        ("{{ input }}{{ soft() }}", [&bos[..], &part(input).await, &words].concat()),
        (
            "{{ soft(0, 2) }} and {{ input }}{{ soft(4, 5) }}{{ soft(2, 4) }}",
            [&bos[..], &words[..2], &tail, &words[4..], &words[2..4]].concat(),
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let task = format!("soft-{i}");
        upload(&server, &task, &rows, &json!({"template": template})).await.ok();
        let body = json!({"input": input, "max_tokens": 6, "logprobs": 0, "ignore_eos": true});
        let path = format!("/v1/tasks/{task}/generate");
        let answer = server.post(&path, &body).await.ok();
        assert_eq!(answer["usage"]["virtual_tokens"], 5);
        assert_eq!(answer["usage"]["prompt_tokens"], whole.len() - 5, "{template}");
        let base = json!({"model": MODEL, "prompt": whole, "max_tokens": 6, "logprobs": 0, "ignore_eos": true});
        let expected = server.post("/v1/completions", &base).await.ok()["choices"][0].clone();
        let found: Vec<&Value> = answer["tokens"].as_array().unwrap().iter().collect();
        assert_eq!(found.len(), 6);
        for (token, logprob) in found.iter().zip(expected["logprobs"]["token_logprobs"].as_array().unwrap()) {
            let (a, b) = (token["logprob"].as_f64().unwrap(), logprob.as_f64().unwrap());
            assert!((a - b).abs() < 1e-5, "{template}: {a} {b}");
        }
        assert_eq!(answer["output"], expected["text"], "{template}");

        // The same from the cache, and beside others; and what is scored.
        let again = server.post(&path, &body).await.ok();
        assert_eq!(again["tokens"], answer["tokens"]);
        let given = json!({"input": input, "continuations": [" a dog", "x"]});
        let score = server.post(&format!("/v1/tasks/{task}/score"), &given).await.ok();
        let of_words = [&whole[..], &part(" a dog").await].concat();
        let echo = json!({"model": MODEL, "prompt": of_words, "max_tokens": 1, "logprobs": 0, "echo": true});
        let echoed = server.post("/v1/completions", &echo).await.ok()["choices"][0]["logprobs"].clone();
        let echoed: Vec<f64> =
            echoed["token_logprobs"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap_or(0.0)).collect();
        let expected: f64 = echoed[whole.len()..of_words.len()].iter().sum();
        let found = score["scores"][0]["logprob"].as_f64().unwrap();
        assert!((found - expected).abs() < 1e-4, "{template}: {found} {expected}");
    }
    // An input cannot write a place, and token ids have none.
    let body = json!({"input": "{{ soft() }} \u{e000}0:5\u{e001} \u{10ffff}", "max_tokens": 1});
    assert_eq!(server.post("/v1/tasks/soft-1/generate", &body).await.ok()["usage"]["virtual_tokens"], 5);
    let ids = server.post("/v1/completions", &json!({"model": "soft-1", "prompt": [5, 6]})).await;
    assert!(ids.status == 400 && ids.text().contains("token ids"), "{}", ids.text());
}

#[tokio::test]
async fn a_template_whose_places_do_not_fit_the_prompt_is_refused() {
    let server = Server::start();
    let rows = Tensor::ones((5, fixtures::load("llama-tied", DType::F32).info().hidden_size), DType::F32, &Device::Cpu);
    let rows = rows.unwrap();
    for (template, says) in [
        ("{{ soft(0, 4) }}{{ input }}", "does not place virtual token 4 of 5"),
        ("{{ soft(0, 6) }}{{ input }}", "soft(0, 6) asks for virtual tokens that do not exist"),
        ("{{ soft() }}{{ input }}{{ soft(1, 2) }}", "places virtual token 1 twice"),
        ("{{ soft() | upper }}{{ input }}", "does not place virtual token 0"),
        ("{% if input == 'go' %}{{ soft() }}{% endif %}{{ input }}", "does not place virtual token 0"),
        ("{{ soft() }}", "uses no field"),
    ] {
        let answer = upload(&server, "wrong", &rows, &json!({"template": template})).await;
        assert!(answer.status == 422 && answer.text().contains(says), "{template}: {}", answer.text());
    }
    let chat = json!({"template": "{{ soft() }}{{ input }}", "chat_template": "{{ messages[0].content }}"});
    assert!(upload(&server, "wrong", &rows, &chat).await.text().contains("only one of template and chat_template"));
    // Places that depend on the input are checked with each.
    let spec = json!({"template": "{% if input != 'no' %}{{ soft() }}{% endif %}{{ input }}"});
    upload(&server, "sometimes", &rows, &spec).await.ok();
    let answer = server.post("/v1/tasks/sometimes/generate", &json!({"input": "no"})).await;
    assert!(answer.status.is_client_error() && answer.text().contains("does not place"), "{}", answer.text());

    let prefix = fixtures::dir("prompt-types").join("llama-tied").join("prefix7");
    let [config, weights] =
        ["adapter_config.json", "adapter_model.safetensors"].map(|name| std::fs::read(prefix.join(name)).unwrap());
    let spec = json!({"template": "{{ soft() }}{{ input }}"}).to_string();
    let parts: [(&str, &[u8]); 3] =
        [("adapter_config.json", &config), ("adapter_model.safetensors", &weights), ("task.json", spec.as_bytes())];
    let (content_type, body) = form(&parts);
    let answer = server.upload("prefix", content_type, body).await;
    assert!(answer.status == 422 && answer.text().contains("keys and values"), "{}", answer.text());
    // In a conversation they stand where the chat template says.
    let spec = json!({
        "template": "{{ soft() }}{{ input }}",
        "chat_template": "User: {{ messages[0].content }}{{ soft() }}",
    });
    upload(&server, "chat", &rows, &spec).await.ok();
    let body = json!({"model": "chat", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2});
    server.post("/v1/chat/completions", &body).await.ok();
}

#[test]
fn the_loss_of_placed_rows_that_are_words_is_that_of_the_words() {
    let run = TestRun::new();
    let model = run.forward.model();
    let words: [u32; 3] = [20, 31, 42];
    let rows = model.embed(&Tensor::new(&words, &Device::Cpu).unwrap()).unwrap();
    let prompt = LearnedPrompt::Embeddings(Embeddings { rows });
    let text = |ids: &[u32]| ids.iter().map(|&id| InputToken::Vocab(id)).collect::<Vec<_>>();
    let row = InputToken::Virtual;
    for (places, whole) in [
        ([text(&[5, 6]), vec![row(0), row(1), row(2)], text(&[7])].concat(), vec![5, 6, 20, 31, 42, 7]),
        ([vec![row(2)], text(&[5]), vec![row(0), row(1)]].concat(), vec![42, 5, 20, 31]),
    ] {
        let other = [text(&[5, 6, 9]), vec![row(1), row(0), row(2)]].concat();
        let placed = [places, other].map(|input| TokenizedExample { input, answer: vec![30, 31] });
        let spelled = [whole, vec![5, 6, 9, 31, 20, 42]].map(|ids| TokenizedExample::of_ids(&ids, vec![30, 31]));
        let loss = |prompt: Option<&LearnedPrompt>, examples: &[TokenizedExample]| {
            loss::evaluate(&run.forward, prompt, &examples.iter().collect::<Vec<_>>(), 8).unwrap().loss
        };
        let (found, expected) = (loss(Some(&prompt), &placed), loss(None, &spelled));
        assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        // Without the prompt its places are empty.
        let texts = placed.each_ref().map(|example| TokenizedExample::of_ids(&example.text_ids(), vec![30, 31]));
        assert!((loss(None, &placed) - loss(None, &texts)).abs() < 1e-9);
    }
}

#[test]
fn a_prompt_that_is_tuned_where_its_template_places_it_is_served_there() {
    let run = TestRun::new();
    let template = Some("{{ soft(0, 2) }}{{ input }}{{ soft(2, 8) }}\n".to_owned());
    let options = Options { template, virtual_tokens: Some(8), length: Length::Steps(120), ..run.options() };
    let plan = Plan::new(&run.forward, &run.tokenizer, &options).unwrap();
    let outcome =
        job::run(&run.forward, &run.tokenizer, std::slice::from_ref(&plan), &run.paths("out"), &mut { NEVER }).unwrap();
    assert!(outcome.after.loss < 0.7 * outcome.before.loss, "{outcome:?}");
    assert!(outcome.version.template.places_virtual_tokens());
    let inputs: Vec<_> = plan.train.iter().map(|example| example.input.clone()).collect();
    let inference = Inference::start(run.forward.model(), Some(&outcome.version.prompt), 16, 5).unwrap();
    let outputs = inference.greedy(&inputs, 5, None, &mut |_| {}).unwrap();
    let right = outputs.iter().zip(&plan.train).filter(|(o, e)| o[..] == e.answer[..e.answer.len() - 1]).count();
    assert_eq!(right as f64 / plan.train.len() as f64, outcome.after.exact);

    let prefix =
        Options { prompt_type: PromptType::Prefix, init: PromptType::Prefix.default_init(), ..options.clone() };
    let refused = Plan::new(&run.forward, &run.tokenizer, &prefix).unwrap_err();
    assert!(refused.to_string().contains("keys and values"), "{refused}");
    let short = Options { virtual_tokens: Some(9), ..options };
    let refused = Plan::new(&run.forward, &run.tokenizer, &short).unwrap_err();
    assert!(refused.to_string().contains("does not place virtual token 8 of 9"), "{refused}");
}
