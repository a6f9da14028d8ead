//! The options of `softserve serve` as typed, which are also the keys of the configuration file.

use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::{BackendChoice, ByteSize, DeviceChoice, DtypeChoice, LogFormat, Switch, TaskWeight, Time, weights};

/// The options of `softserve serve` as typed: nothing is required, nothing is checked against
/// anything else. The same names are the keys of the configuration file.
#[derive(Debug, Clone, Default, Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServeArgs {
    /// A TOML file with any of these options (`max_batch = 16`); flags and environment variables
    /// go before it
    #[arg(long, value_name = "FILE", env = "SOFTSERVE_CONFIG")]
    #[serde(skip)]
    pub config: Option<PathBuf>,

    /// The frozen model: a folder with config.json, tokenizer.json and safetensors, a GGUF file, or a
    /// Hugging Face id (org/name or org/name@revision) [default: the small demo model inside this program]
    #[arg(long, value_name = "DIR|FILE.gguf|HUB_ID", env = "SOFTSERVE_MODEL")]
    pub model: Option<String>,

    /// Random weights in place of a model, to measure speed: a config.json, or one of the shapes
    /// smollm2-135m and qwen2.5-0.5b
    #[arg(long, value_name = "CONFIG", env = "SOFTSERVE_RANDOM_WEIGHTS")]
    pub random_weights: Option<String>,

    /// The folder that keeps the tasks' learned prompts; made if it is not there [default: a
    /// folder for this model in your data directory]
    #[arg(long, value_name = "DIR", env = "SOFTSERVE_PROMPTS")]
    pub prompts: Option<PathBuf>,

    /// The address to listen on; port 0 takes a free one. Only this machine can reach 127.0.0.1;
    /// 0.0.0.0 is reachable from outside, and then uploads need --admin-key [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDRESS:PORT", env = "SOFTSERVE_LISTEN")]
    pub listen: Option<String>,

    /// Where the model runs: auto, cpu, cuda or cuda:N [default: auto]
    #[arg(long, env = "SOFTSERVE_DEVICE")]
    pub device: Option<DeviceChoice>,

    /// The number format of the weights in memory; auto is f32, and bf16 is several times as fast on
    /// a processor with AVX512-BF16 or AMX [default: auto]
    #[arg(long, env = "SOFTSERVE_DTYPE")]
    pub dtype: Option<DtypeChoice>,

    /// What computes: auto (the fast kernels of the device) or reference (plain operations, slow, to compare
    /// with) [default: auto]
    #[arg(long, env = "SOFTSERVE_BACKEND", hide_short_help = true)]
    pub backend: Option<BackendChoice>,

    /// The most requests that are worked on at the same time [default: 64]
    #[arg(long, value_name = "N", env = "SOFTSERVE_MAX_BATCH")]
    pub max_batch: Option<usize>,

    /// The most requests that wait for a place; more are answered 429 [default: 256]
    #[arg(long, value_name = "N", env = "SOFTSERVE_MAX_WAITING")]
    pub max_waiting: Option<usize>,

    /// The most tokens computed in one step of the model [default: 2048]
    #[arg(long, value_name = "N", env = "SOFTSERVE_MAX_STEP_TOKENS")]
    pub max_step_tokens: Option<usize>,

    /// The most input tokens computed in one step in which other requests get their next token; more
    /// is faster for long texts, less keeps the answers beside them fluent [default: 512]
    #[arg(long, value_name = "N", env = "SOFTSERVE_MAX_PREFILL_TOKENS")]
    pub max_prefill_tokens: Option<usize>,

    /// Memory for the keys and values of running and shared texts, such as 512MiB; of an
    /// encoder-decoder model half of it is for its inputs [default: a quarter of the free memory, 4GiB
    /// at most]
    #[arg(long, value_name = "SIZE", env = "SOFTSERVE_KV_CACHE")]
    pub kv_cache: Option<ByteSize>,

    /// Whether the keys and values of learned prompts and of texts that begin alike are computed
    /// once and shared: on or off; answers are the same [default: on]
    #[arg(long, value_name = "on|off", env = "SOFTSERVE_PREFIX_SHARING")]
    pub prefix_sharing: Option<Switch>,

    /// How much of the model's time a task gets while several want it, beside 1 for each other
    /// task; repeated or separated by commas, as in sentiment=2,story=0.5. A table or a list in
    /// the file
    #[arg(long, value_name = "TASK=WEIGHT", env = "SOFTSERVE_TASK_WEIGHT", value_delimiter = ',')]
    #[serde(default, deserialize_with = "weights::list_or_table")]
    pub task_weight: Option<Vec<TaskWeight>>,

    /// While several tasks have requests, the tokens that each may always have computed in one step
    /// of the model; less keeps light tasks quick beside a busy one, more gives the busy one more
    /// throughput [default: as many as take about twice the time of one, measured at the start]
    #[arg(long, value_name = "N", env = "SOFTSERVE_FAIR_STEP_TOKENS")]
    pub fair_step_tokens: Option<usize>,

    /// Processor threads for the model [default: one for each core]
    #[arg(long, value_name = "N", env = "SOFTSERVE_THREADS")]
    pub threads: Option<usize>,

    /// The largest upload of a learned prompt, packed and unpacked [default: 64MiB]
    #[arg(long, value_name = "SIZE", env = "SOFTSERVE_MAX_UPLOAD")]
    pub max_upload: Option<ByteSize>,

    /// The largest body of any other request [default: 1MiB]
    #[arg(long, value_name = "SIZE", env = "SOFTSERVE_MAX_BODY")]
    pub max_body: Option<ByteSize>,

    /// The most tasks that are kept [default: 10000]
    #[arg(long, value_name = "N", env = "SOFTSERVE_MAX_TASKS")]
    pub max_tasks: Option<usize>,

    /// The most versions that are kept of one task [default: 100]
    #[arg(long, value_name = "N", env = "SOFTSERVE_MAX_VERSIONS")]
    pub max_versions: Option<usize>,

    /// How long a request may take that names no timeout_ms [default: 2m]
    #[arg(long, value_name = "TIME", env = "SOFTSERVE_REQUEST_TIMEOUT")]
    pub request_timeout: Option<Time>,

    /// The longest timeout_ms that a request may name [default: 10m]
    #[arg(long, value_name = "TIME", env = "SOFTSERVE_MAX_REQUEST_TIMEOUT")]
    pub max_request_timeout: Option<Time>,

    /// How long running requests may go on after SIGTERM or Ctrl-C [default: 30s]
    #[arg(long, value_name = "TIME", env = "SOFTSERVE_DRAIN_TIMEOUT")]
    pub drain_timeout: Option<Time>,

    /// A key that callers must send as 'Authorization: Bearer KEY'; several are separated by
    /// commas. Other users of this machine can see a flag: prefer the variable or a file
    #[arg(long, value_name = "KEY", env = "SOFTSERVE_API_KEY", hide_env_values = true, value_delimiter = ',')]
    pub api_key: Option<Vec<String>>,

    /// A file with such keys, one a line, each as it is or as sha256:<hex>. Each key is a tenant of its
    /// own, whose inputs no other tenant can find in the cache; keys that follow 'tenant=NAME ' on
    /// their line share one tenant
    #[arg(long, value_name = "FILE", env = "SOFTSERVE_API_KEY_FILE")]
    pub api_key_file: Option<PathBuf>,

    /// A key for uploading, activating and deleting tasks; it also opens everything else
    #[arg(long, value_name = "KEY", env = "SOFTSERVE_ADMIN_KEY", hide_env_values = true, value_delimiter = ',')]
    pub admin_key: Option<Vec<String>>,

    /// A file with such keys, one a line, each as it is or as sha256:<hex>
    #[arg(long, value_name = "FILE", env = "SOFTSERVE_ADMIN_KEY_FILE")]
    pub admin_key_file: Option<PathBuf>,

    /// How the log on standard error is written [default: text]
    #[arg(long, env = "SOFTSERVE_LOG_FORMAT")]
    pub log_format: Option<LogFormat>,

    /// What is logged: error, warn, info, debug, trace, or one for each part of the program as in
    /// info,softserve::engine=debug [default: info]
    #[arg(long, value_name = "LEVEL", env = "SOFTSERVE_LOG_LEVEL")]
    pub log_level: Option<String>,
}
