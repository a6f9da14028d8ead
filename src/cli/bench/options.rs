//! The options of `softserve bench`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::sampling::SamplingArgs;
use crate::{
    bench::{
        distribution::{Lengths, Mix},
        load::{self, Arrival, Load, LoadSpec},
    },
    cli::{model::ModelArgs, model_source},
    config::{ByteSize, ConfigError, Time},
    model::ModelConfig,
};

const DEFAULT_TASKS: usize = 8;
const DEFAULT_REQUESTS: usize = 128;
const DEFAULT_CONCURRENCY: usize = 16;

/// Measure throughput and latency under a load of many tasks.
///
/// Without --url it starts a server on a free port, with random learned prompts. With --url it sends
/// requests to the tasks of a running server. Answers are streamed. Each has the length that was
/// asked for unless the model's context ends first. Decoding is greedy unless --temperature is given. Figures
/// are medians over --repeat runs.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:\n  \
    softserve bench --random-weights smollm2-135m --dtype bf16 --concurrency 32 --repeat 3\n  \
    softserve bench --tasks 1000 --mix zipf --rate 5 --duration 1m -- --max-batch 16\n  \
    softserve bench --load name=light,concurrency=1,alone --load concurrency=100,background\n  \
    softserve bench --in-turn --load name=greedy --load name=sampled,temperature=0.7,top-p=0.95\n  \
    softserve bench --url http://127.0.0.1:8080 --json figures.json\n  \
    softserve bench --random-weights qwen2.5-0.5b --save-model my-folder")]
pub struct BenchArgs {
    /// The address of a running server to measure. The options for the model and the server then have
    /// no effect
    #[arg(long, env = "SOFTSERVE_URL", value_name = "URL")]
    pub url: Option<String>,
    /// An API key of that server
    #[arg(long, env = "SOFTSERVE_API_KEY", hide_env_values = true, value_name = "KEY")]
    api_key: Option<String>,
    /// An admin key of that server, for --upload
    #[arg(long, env = "SOFTSERVE_ADMIN_KEY", hide_env_values = true, value_name = "KEY")]
    admin_key: Option<String>,

    #[command(flatten)]
    pub model: ModelArgs,
    /// Memory for the KV cache, such as 512MiB [default: as for serve]
    #[arg(long, value_name = "SIZE", env = "SOFTSERVE_KV_CACHE")]
    pub kv_cache: Option<ByteSize>,
    /// Further options of `softserve serve` for the server that is started
    #[arg(last = true, conflicts_with = "url", value_name = "SERVE OPTIONS")]
    pub serve: Vec<String>,

    /// The number of tasks [default: 8; with --url, all tasks of the server]
    #[arg(long, value_name = "N", value_parser = load::count)]
    pub tasks: Option<usize>,
    /// The length of the random learned prompts, in tokens
    #[arg(long, value_name = "N", default_value = "32", value_parser = load::count)]
    pub virtual_tokens: usize,
    /// With --url: upload random learned prompts, measure these tasks, and delete them at the end
    #[arg(long, requires = "url")]
    pub upload: bool,
    /// With --upload: the hidden size of that server's model
    #[arg(long, requires = "upload", value_name = "N", value_parser = load::count)]
    pub hidden_size: Option<usize>,
    /// Write inputs with the words w0 to w(N-1), each of which is one token of a model with random
    /// weights [default: with --random-weights these words, otherwise common English words]
    #[arg(long, value_name = "N", value_parser = load::count)]
    pub vocabulary: Option<usize>,

    /// The number of requests [default: 128; with --duration there is no limit]
    #[arg(long, value_name = "N", value_parser = load::count)]
    requests: Option<usize>,
    /// The number of concurrent requests. This is a closed loop: the next request is sent when one is
    /// answered [default: 16]
    #[arg(long, value_name = "N", conflicts_with = "rate", value_parser = load::count)]
    concurrency: Option<usize>,
    /// The number of requests per second. This is an open loop: requests are sent at random times,
    /// whether or not earlier ones are answered
    #[arg(long, value_name = "RATE", value_parser = load::rate)]
    rate: Option<f64>,
    /// The distribution of the requests over the tasks: uniform, zipf or zipf:EXPONENT
    #[arg(long, default_value = "uniform")]
    mix: Mix,
    /// The length of an input in words: a number, a range such as 16-64, normal:MEAN:DEVIATION or
    /// lognormal:MEAN:DEVIATION
    #[arg(long, value_name = "LENGTHS", default_value = "16-64")]
    input_tokens: Lengths,
    /// The length of an answer in tokens, in the same forms
    #[arg(long, value_name = "LENGTHS", default_value = "32")]
    output_tokens: Lengths,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// One of several loads that run at the same time, each with tasks of its own. Its keys are name=,
    /// tasks=, virtual-tokens=, requests=, concurrency=, rate=, mix=, input-tokens=, output-tokens=, the
    /// sampling parameters (temperature=, top-p= …), seed= (request i is sampled with this seed + i),
    /// background (runs until the other loads are done) and alone (also runs by itself first, for
    /// comparison). A key that is missing has the value of the option of that name; tasks is 1
    #[arg(long, value_name = "KEY=VALUE,…")]
    pub load: Vec<LoadSpec>,
    /// Run the loads one after another instead of at the same time, and compare them
    #[arg(long, requires = "load")]
    pub in_turn: bool,
    /// Stop sending requests after this time
    #[arg(long, value_name = "TIME")]
    pub duration: Option<Time>,
    /// The number of requests before each load that are not measured [default: one per task, at most
    /// 256]
    #[arg(long, value_name = "N")]
    pub warmup: Option<usize>,
    /// The number of runs. The medians are reported
    #[arg(long, value_name = "N", default_value = "1", value_parser = load::count)]
    pub repeat: usize,
    /// The seed of the random numbers. The same seed sends the same requests; each sampled request has a
    /// seed that is derived from this one
    #[arg(long, value_name = "N", default_value = "0")]
    pub seed: u64,

    /// Write the figures of every run as JSON to a file, or with - to standard output instead of the
    /// table. Latencies are in milliseconds
    #[arg(long, value_name = "FILE|-")]
    pub json: Option<PathBuf>,
    /// Write the model of --random-weights as a Hugging Face folder and exit
    #[arg(long, value_name = "DIR", conflicts_with = "url")]
    pub save_model: Option<PathBuf>,
}

impl BenchArgs {
    /// What is run: the loads that were typed, or the one that the plain options describe.
    pub fn loads(&self) -> Result<Vec<Load>, ConfigError> {
        let concurrency = Arrival::Concurrency(self.concurrency.unwrap_or(DEFAULT_CONCURRENCY));
        let base = Load {
            name: "load".to_owned(),
            tasks: self.tasks.unwrap_or(DEFAULT_TASKS),
            virtual_tokens: self.virtual_tokens,
            requests: self.requests.or(self.duration.is_none().then_some(DEFAULT_REQUESTS)),
            arrival: self.rate.map_or(concurrency, Arrival::Rate),
            mix: self.mix,
            input_tokens: self.input_tokens,
            output_tokens: self.output_tokens,
            sampling: self.sampling.0.clone(),
            seed: None,
            background: false,
            alone: false,
        };
        let wrong = |option, reason: String| Err(ConfigError::Option { option, reason });
        if self.duration.is_some_and(|time| time.0.is_zero()) {
            return wrong("duration", "found 0s, expected more than 0s, such as 30s".to_owned());
        }
        if self.upload && self.hidden_size.is_none() {
            let reason = "it needs --hidden-size, the hidden size of that server's model".to_owned();
            return wrong("upload", reason);
        }
        if self.load.is_empty() {
            return with_temperatures(vec![base]);
        }
        let loads: Vec<_> = self.load.iter().cloned().enumerate().map(|(i, spec)| spec.over(&base, i)).collect();
        if self.in_turn && loads.iter().any(|load| load.background || load.alone) {
            let reason = "with --in-turn no load is alone or background: leave these words out of --load".to_owned();
            return wrong("in-turn", reason);
        }
        if loads.iter().all(|load| load.background) {
            let reason =
                "every load is in the background, expected at least one that is not: the run ends when it is done"
                    .to_owned();
            return wrong("load", reason);
        }
        let twice = |load: &Load| loads.iter().filter(|other| other.name == load.name).count() > 1;
        if let Some(load) = loads.iter().find(|load| twice(load)) {
            return wrong(
                "load",
                format!("found the name {:?} twice, expected a different name for each load", load.name),
            );
        }
        with_temperatures(loads)
    }

    /// The length of the learned prompt of each task that has to be there, in the order in which
    /// loads take them.
    pub fn prompt_lengths(&self, loads: &[Load]) -> Vec<usize> {
        let mut out: Vec<_> = loads.iter().flat_map(|load| vec![load.virtual_tokens; load.tasks]).collect();
        let tasks = out.len().max(self.tasks.unwrap_or(1));
        out.resize(tasks, self.virtual_tokens);
        out
    }

    /// The shape of the model that the server inside is given.
    pub fn model_config(&self) -> Result<ModelConfig> {
        Ok(model_source::files(&self.model.source()?)?.with_context_length(self.model.context).config()?)
    }

    pub fn api_key(&self) -> Option<&str> {
        first(self.api_key.as_deref())
    }

    pub fn admin_key(&self) -> Option<&str> {
        first(self.admin_key.as_deref())
    }
}

/// Fills in the temperature, and refuses what changes nothing without one.
fn with_temperatures(mut loads: Vec<Load>) -> Result<Vec<Load>, ConfigError> {
    for load in &mut loads {
        if let Some(parameter) = load::without_effect(&load.sampling) {
            let reason = "it has no effect at temperature 0, the default: set --temperature, or temperature= in --load";
            return Err(ConfigError::Option { option: parameter.option, reason: reason.to_owned() });
        }
        load.sampling.temperature.get_or_insert(0.0);
    }
    Ok(loads)
}

/// A server takes several keys, separated by commas.
fn first(keys: Option<&str>) -> Option<&str> {
    keys.and_then(|keys| keys.split(',').map(str::trim).find(|key| !key.is_empty()))
}
