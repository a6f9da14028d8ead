//! `softserve bench` as it is typed, against the demo model and against a server that is running.

use serde_json::{Value, json};

use crate::{
    fixtures,
    process::{Process, output, read, softserve, with_fixture},
};

#[test]
fn a_benchmark_of_a_server_inside_reports_every_load() {
    let home = tempfile::tempdir().unwrap();
    let mut command = softserve(home.path());
    // Keys that are set for another server change nothing.
    command.env("SOFTSERVE_API_KEY", "0123456789abcdef").env("SOFTSERVE_ADMIN_KEY_FILE", "no/such/file");
    command.args(["bench", "--json=-", "--repeat=2", "--threads=1", "--virtual-tokens=5", "--output-tokens=4"]);
    command.args(["--input-tokens=3-6", "--warmup=1", "--requests=6"]);
    command.args(["--load=name=light,concurrency=2,alone,tasks=2", "--load=name=heavy,rate=200,background"]);
    command.args(["--", "--max-batch=3", "--kv-cache=8MiB"]);
    let (code, stdout, stderr) = output(command);
    assert_eq!(code, Some(0), "{stderr}");
    let report: Value = serde_json::from_str(&stdout).unwrap();
    let results = report["results"].as_array().unwrap();
    let name = |r: &Value| (r["name"].as_str().unwrap().to_owned(), r["alone"].as_bool().unwrap());
    let expected = [("light", true), ("light", false), ("heavy", false), ("all loads together", false)];
    assert_eq!(results.iter().map(name).collect::<Vec<_>>(), expected.map(|(n, alone)| (n.to_owned(), alone)));
    for light in &results[..2] {
        let median = &light["median"];
        assert_eq!((&median["answered"], &median["errors"]), (&json!(6.0), &json!({})), "{light}");
        assert_eq!((&median["generated_tokens"], &median["virtual_tokens"]), (&json!(24.0), &json!(30.0)), "{light}");
        assert!(median["generated_tokens_per_second"].as_f64().unwrap() > 0.0);
        let (first, end) = (&median["time_to_first_token"]["p50"], &median["latency"]["p50"]);
        assert!(0.0 < first.as_f64().unwrap() && first.as_f64() < end.as_f64(), "{light}");
        assert_eq!(light["repeats"].as_array().unwrap().len(), 2);
    }
    assert!(report["server"]["model"].as_str().unwrap().contains("softserve-demo"), "{report}");
    if cfg!(target_os = "linux") {
        assert!(report["memory"]["peak_bytes"].as_u64() >= report["memory"]["resident_bytes"].as_u64());
    }
}

#[test]
fn a_server_with_random_weights_is_measured_at_the_lengths_that_were_asked_for() {
    let home = tempfile::tempdir().unwrap();
    let config = json!({"model_type": "qwen2", "vocab_size": 700, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
        "max_position_embeddings": 256, "tie_word_embeddings": true, "eos_token_id": 699});
    std::fs::write(home.path().join("tiny.json"), config.to_string()).unwrap();
    for dtype in ["f32", "bf16"] {
        let mut command = softserve(home.path());
        command.args(["bench", "--random-weights=tiny.json", "--requests=9", "--concurrency=3", "--tasks=2"]);
        command.args(["--input-tokens=11", "--output-tokens=3", "--json=figures.json", "--dtype", dtype]);
        let (code, stdout, stderr) = output(command);
        assert_eq!(code, Some(0), "{stderr}");
        for words in ["generated tokens/s", "inter-token latency", "random-tiny", dtype, "p99"] {
            assert!(stdout.contains(words), "{words}: {stdout}");
        }
        let report = std::fs::read(home.path().join("figures.json")).unwrap();
        let report: Value = serde_json::from_slice(&report).unwrap();
        let figures = &report["results"][0]["median"];
        // A word is a token.
        assert_eq!((&figures["input_tokens"], &figures["generated_tokens"]), (&json!(99.0), &json!(27.0)), "{report}");
    }
}

#[test]
fn an_encoder_decoder_model_is_measured_with_prompts_before_the_encoders_input() {
    let home = tempfile::tempdir().unwrap();
    let t5 = fixtures::dir("encoder-decoder/t5");
    let random = format!("--random-weights={}", t5.join("config.json").display());
    let trained = format!("--model={}", t5.display());
    for (model, words_are_tokens) in [(random, true), (trained, false)] {
        let mut command = softserve(home.path());
        command.args(["bench", &model, "--requests=9", "--concurrency=3", "--tasks=2", "--virtual-tokens=6"]);
        command.args(["--input-tokens=11", "--output-tokens=3", "--json=-", "--kv-cache=8MiB"]);
        let (code, stdout, stderr) = output(command);
        assert_eq!(code, Some(0), "{stderr}");
        let report: Value = serde_json::from_str(&stdout).unwrap();
        let figures = &report["results"][0]["median"];
        assert_eq!((&figures["answered"], &figures["errors"]), (&json!(9.0), &json!({})), "{report}");
        assert_eq!(
            (&figures["virtual_tokens"], &figures["generated_tokens"]),
            (&json!(54.0), &json!(27.0)),
            "{report}"
        );
        assert!(!words_are_tokens || figures["input_tokens"] == 99.0, "{report}");
    }
}

#[test]
fn a_running_server_is_measured_with_its_own_tasks_or_with_some_that_go_again() {
    let home = tempfile::tempdir().unwrap();
    let mut command = with_fixture(home.path());
    command.arg("--prompts=prompts");
    let server = Process::start(command);
    let tasks = |server: &Process| server.get("/v1/tasks").1["tasks"].as_array().unwrap().len();
    let own = tasks(&server);
    let bench = |more: &[&str]| {
        let mut command = softserve(home.path());
        command.args(["bench", "--requests=8", "--concurrency=4", "--input-tokens=2", "--output-tokens=3", "--json=-"]);
        command.arg("--url").arg(&server.url).args(more);
        let (code, stdout, stderr) = output(command);
        assert_eq!(code, Some(0), "{stderr}");
        serde_json::from_str::<Value>(&stdout).unwrap()
    };
    let report = bench(&[]);
    assert_eq!(report["loads"][0]["tasks"], json!(own));
    assert_eq!(report["results"][0]["median"]["answered"], json!(8.0), "{report}");
    let uploaded = bench(&["--upload", "--hidden-size=32", "--tasks=3", "--virtual-tokens=7", "--vocabulary=9"]);
    assert_eq!(uploaded["results"][0]["median"]["virtual_tokens"], json!(56.0), "{uploaded}");
    assert_eq!(tasks(&server), own);
}

#[test]
fn loads_in_turn_have_prompts_of_their_own_lengths_and_are_compared() {
    let home = tempfile::tempdir().unwrap();
    let mut command = softserve(home.path());
    command.args([
        "bench",
        "--in-turn",
        "--repeat=2",
        "--requests=4",
        "--concurrency=2",
        "--input-tokens=2",
        "--output-tokens=2",
    ]);
    command.args(["--load=name=one", "--load=name=three,tasks=3,virtual-tokens=9", "--json=figures.json"]);
    let (code, stdout, stderr) = output(command);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stdout.contains("against one") && stdout.contains("9 virtual tokens"), "{stdout}");
    let report = std::fs::read(home.path().join("figures.json")).unwrap();
    let report: Value = serde_json::from_slice(&report).unwrap();
    let results = report["results"].as_array().unwrap();
    let virtual_tokens = |r: &Value| [0, 1].map(|repeat| r["repeats"][repeat]["virtual_tokens"].as_f64().unwrap());
    assert_eq!(results.iter().map(virtual_tokens).collect::<Vec<_>>(), [[4.0 * 32.0; 2], [4.0 * 9.0; 2]]);
}

#[test]
fn loads_with_different_sampling_are_compared_in_one_run() {
    let home = tempfile::tempdir().unwrap();
    let mut command = softserve(home.path());
    command.args(["bench", "--in-turn", "--requests=4", "--concurrency=2", "--input-tokens=2", "--output-tokens=3"]);
    command.args(["--presence-penalty", "-1", "--json=figures.json", "--load=name=greedy"]);
    command.args(["--load=name=sampled,temperature=0.7,top-p=0.95,top-k=40,min-p=0.05,frequency-penalty=0.5,seed=9"]);
    let (code, stdout, stderr) = output(command);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stdout.contains("temperature=0.7,top-p=0.95,top-k=40") && stdout.contains("against greedy"), "{stdout}");
    let report: Value = serde_json::from_slice(&std::fs::read(home.path().join("figures.json")).unwrap()).unwrap();
    let sampled = "temperature=0.7,top-p=0.95,top-k=40,min-p=0.05,frequency-penalty=0.5,presence-penalty=-1";
    assert_eq!(report["loads"][0]["sampling"], json!("temperature=0,presence-penalty=-1"));
    assert_eq!((&report["loads"][1]["sampling"], &report["loads"][1]["seed"]), (&json!(sampled), &json!(9)));
    for result in report["results"].as_array().unwrap() {
        let median = &result["median"];
        assert_eq!((&median["answered"], &median["errors"]), (&json!(4.0), &json!({})), "{result}");
        assert_eq!(median["generated_tokens"], json!(12.0), "{result}");
    }
}

#[test]
fn a_random_model_is_written_as_a_folder_that_serve_takes() {
    let home = tempfile::tempdir().unwrap();
    let config = json!({"model_type": "llama", "vocab_size": 100, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64, "hidden_act": "silu"});
    std::fs::write(home.path().join("tiny.json"), config.to_string()).unwrap();
    let mut command = softserve(home.path());
    command.args(["bench", "--random-weights=tiny.json", "--save-model=saved"]);
    let (code, stdout, stderr) = output(command);
    assert_eq!(code, Some(0), "{stderr}");
    assert_eq!(stdout, "wrote random-tiny to saved\n");
    let mut command = softserve(home.path());
    command.args(["--model=saved", "--listen=127.0.0.1:0", "--prompts=prompts", "--kv-cache=1MiB"]);
    let server = Process::start(command);
    assert!(server.summary.contains("saved"), "{}", server.summary);
    assert_eq!(read(crate::process::agent().get(server.at("/health/ready")).call()).0, 200);
}

#[test]
fn what_cannot_be_measured_is_said() {
    let home = tempfile::tempdir().unwrap();
    for (arguments, code, words) in [
        (vec!["--url=http://localhost:1"], 1, vec!["cannot reach"]),
        (vec!["--url=https://localhost:1"], 2, vec!["--url", "plain http"]),
        (vec!["--url=nonsense"], 2, vec!["--url", "nonsense", "http://127.0.0.1:8080"]),
        (vec!["--url=http://localhost:1", "--upload"], 2, vec!["--upload", "--hidden-size"]),
        (vec!["--duration=0s"], 2, vec!["--duration"]),
        (vec!["--load=background"], 2, vec!["--load", "background"]),
        (vec!["--load=alone", "--in-turn"], 2, vec!["--in-turn"]),
        (vec!["--load=name=a", "--load=name=a,alone"], 2, vec!["--load", "\"a\" twice"]),
        (vec!["--load=tasks=1,tasks=2"], 2, vec!["tasks twice"]),
        (vec!["--temperature=2.5"], 2, vec!["--temperature", "found 2.5, expected 0 to 2"]),
        (vec!["--top-p=0", "--temperature=1"], 2, vec!["--top-p", "found 0, expected more than 0 and at most 1"]),
        (vec!["--top-k=some"], 2, vec!["--top-k", "a whole number, 0 or more"]),
        (vec!["--min-p=nan"], 2, vec!["--min-p", "expected 0 to 1"]),
        (vec!["--repetition-penalty=0"], 2, vec!["--repetition-penalty", "found 0, expected more than 0"]),
        (vec!["--frequency-penalty", "-3"], 2, vec!["--frequency-penalty", "found -3, expected -2 to 2"]),
        (vec!["--presence-penalty=3"], 2, vec!["--presence-penalty", "found 3, expected -2 to 2"]),
        (vec!["--top-k=40"], 2, vec!["--top-k", "has no effect", "--temperature"]),
        (vec!["--load=temperature=9"], 2, vec!["--load", "temperature: found 9, expected 0 to 2"]),
        (vec!["--load=min-p=0.1", "--load=name=b,temperature=1"], 2, vec!["--min-p", "temperature= in --load"]),
        (vec!["--save-model=x"], 2, vec!["--save-model", "--random-weights"]),
        (vec!["--json=no/such/folder/figures.json"], 2, vec!["--json", "no/such/folder"]),
        (vec!["--url=http://localhost:1", "--", "--max-batch=3"], 2, vec!["--url", "SERVE OPTIONS"]),
        (vec!["--input-tokens=9999", "--requests=1"], 1, vec!["input_too_long", "shorten the input"]),
        (vec!["--input-tokens=none"], 2, vec!["none", "16-64"]),
        (vec!["--rate=1", "--concurrency=2"], 2, vec!["--rate"]),
        (vec!["--model=no/such/folder"], 1, vec!["no/such/folder"]),
        (vec!["--", "--max-batch=0"], 1, vec!["--max-batch", "did not start"]),
    ] {
        let mut command = softserve(home.path());
        command.arg("bench").args(&arguments);
        let (found, stdout, stderr) = output(command);
        assert_eq!((found, stdout.as_str()), (Some(code), ""), "{arguments:?}: {stderr}");
        assert!(words.iter().all(|word| stderr.contains(word)), "{arguments:?}: {stderr}");
        assert!(!stderr.contains("panic"), "{stderr}");
    }
}
