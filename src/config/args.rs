//! The options of `softserve serve` as typed, which are also the keys of the configuration file.

use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::{BackendChoice, ByteSize, DeviceChoice, DtypeChoice, LogFormat, Switch, TaskWeight, Time, weights};
use crate::registry::PromptLocation;

/// The options of `softserve serve` as typed: nothing is required, nothing is checked against
/// anything else. The same names are the keys of the configuration file.
#[derive(Debug, Clone, Default, Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServeArgs {
    /// A TOML file that sets any of these options (`max_batch = 16`). A flag overrides an environment
    /// variable, and that overrides the file
    #[arg(long, value_name = "FILE", env = "SOFTSERVE_CONFIG")]
    #[serde(skip)]
    pub config: Option<PathBuf>,

    /// The frozen model: a folder with config.json, tokenizer.json and safetensors, a GGUF file, or a
    /// Hugging Face id (org/name or org/name@revision) [default: the small demo model inside this program]
    #[arg(long, value_name = "DIR|FILE.gguf|HUB_ID", env = "SOFTSERVE_MODEL")]
    pub model: Option<String>,

    /// Use random weights instead of a model, to measure speed. Takes a config.json, or the name of a
    /// built-in shape: smollm2-135m or qwen2.5-0.5b
    #[arg(long, value_name = "CONFIG", env = "SOFTSERVE_RANDOM_WEIGHTS")]
    pub random_weights: Option<String>,

    /// The most positions of one sequence, where the model's positions have no bound (rotary, ALiBi and
    /// relative ones) or fewer are wanted [default: as the model's configuration says]
    #[arg(long, value_name = "N", env = "SOFTSERVE_CONTEXT")]
    pub context: Option<usize>,

    /// Where the learned prompts are stored: a folder, which is created if it does not exist, or a bucket,
    /// as s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX, whose key and endpoint come from the
    /// environment under their usual names. Several servers can share one [default: a folder for this model
    /// in your data directory]
    #[arg(long, value_name = "DIR|URL", env = "SOFTSERVE_PROMPTS")]
    pub prompts: Option<PromptLocation>,

    /// How often the prompts are checked for changes that others made. A folder tells of them itself, if its
    /// file system can [default: 5s]
    #[arg(long, value_name = "TIME", env = "SOFTSERVE_POLL_INTERVAL")]
    pub poll_interval: Option<Time>,

    /// The folder that stores the files and batches of /v1/files and /v1/batches. It is created when the
    /// first file is uploaded [default: a folder for this model in your data directory]
    #[arg(long, value_name = "DIR", env = "SOFTSERVE_FILES")]
    pub files: Option<PathBuf>,

    /// The address to listen on; port 0 picks a free port. 127.0.0.1 can be reached from this machine
    /// only. 0.0.0.0 can be reached from other machines, and then uploads need --admin-key
    /// [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDRESS:PORT", env = "SOFTSERVE_LISTEN")]
    pub listen: Option<String>,

    /// Where the model runs: cpu, cuda or cuda:N (the GPU of that number), or auto: the first GPU if the
    /// program was built for GPUs and there is one, and otherwise the CPU [default: auto]
    #[arg(long, env = "SOFTSERVE_DEVICE")]
    pub device: Option<DeviceChoice>,

    /// The number format of the weights in memory. auto means f32 on a CPU and bf16 on a GPU; bf16 takes
    /// half the memory and is several times as fast on a processor with AVX512-BF16 or AMX. Quantised
    /// weights of a GGUF file are multiplied as integers on a CPU; f32 computes with their exact values
    /// instead [default: auto]
    #[arg(long, env = "SOFTSERVE_DTYPE")]
    pub dtype: Option<DtypeChoice>,

    /// Which implementation of the model's operations to use: auto (the device's fast kernels) or
    /// reference (plain operations; slow, for comparison) [default: auto]
    #[arg(long, env = "SOFTSERVE_BACKEND", hide_short_help = true)]
    pub backend: Option<BackendChoice>,

    /// The maximum number of requests that run at the same time [default: 64]
    #[arg(long, value_name = "N", env = "SOFTSERVE_MAX_BATCH")]
    pub max_batch: Option<usize>,

    /// The maximum length of the queue. When it is full, further requests are answered with status
    /// 429 [default: 256]
    #[arg(long, value_name = "N", env = "SOFTSERVE_MAX_WAITING")]
    pub max_waiting: Option<usize>,

    /// The maximum number of tokens in one forward pass of the model [default: 2048]
    #[arg(long, value_name = "N", env = "SOFTSERVE_MAX_STEP_TOKENS")]
    pub max_step_tokens: Option<usize>,

    /// The maximum number of input tokens in a forward pass that also generates tokens for running
    /// requests. A higher number processes long inputs faster; a lower one keeps the running requests
    /// from slowing down meanwhile [default: 512]
    #[arg(long, value_name = "N", env = "SOFTSERVE_MAX_PREFILL_TOKENS")]
    pub max_prefill_tokens: Option<usize>,

    /// Prompt-lookup speculative decoding: the maximum number of tokens of an answer that are guessed from its input and from
    /// what it has so far, and checked in one forward pass. Answers stay the same; those that repeat parts of their input
    /// come faster. It is used while few requests run. 0 turns it off [default: 7 on a CPU, 0 on a GPU]
    #[arg(long, value_name = "N", env = "SOFTSERVE_DRAFT_TOKENS")]
    pub draft_tokens: Option<usize>,

    /// Memory for the KV cache, such as 512MiB: the keys and values of running requests and of shared
    /// prefixes. An encoder-decoder model uses half of it for the encoded inputs [default: on a CPU a
    /// quarter of the free memory, at most 4GiB; on a GPU what --gpu-memory leaves]
    #[arg(long, value_name = "SIZE", env = "SOFTSERVE_KV_CACHE")]
    pub kv_cache: Option<ByteSize>,

    /// The fraction of the GPU's memory that the program may use, from 0.1 to 1. What the weights leave
    /// of it is for the KV cache, unless --kv-cache says how much that gets [default: 0.9]
    #[arg(long, value_name = "FRACTION", env = "SOFTSERVE_GPU_MEMORY")]
    pub gpu_memory: Option<f64>,

    /// Prefix caching: on computes the keys and values of a learned prompt, and of the beginning that
    /// several inputs of one tenant have in common, once and shares them. The answers are the same
    /// either way [default: on]
    #[arg(long, value_name = "on|off", env = "SOFTSERVE_PREFIX_SHARING")]
    pub prefix_sharing: Option<Switch>,

    /// The share of a task while several tasks compete for the model, relative to 1 for every task that
    /// is not named. Repeat the option or separate by commas: sentiment=2,story=0.5. In the
    /// configuration file it is a table or a list
    #[arg(long, value_name = "TASK=WEIGHT", env = "SOFTSERVE_TASK_WEIGHT", value_delimiter = ',')]
    #[serde(default, deserialize_with = "weights::list_or_table")]
    pub task_weight: Option<Vec<TaskWeight>>,

    /// The number of tokens that each task is guaranteed in a forward pass while several tasks compete.
    /// A lower number keeps the latency of lightly used tasks low; a higher one gives a busy task more
    /// throughput [default: the number that takes about twice the time of a single token, measured at
    /// start-up]
    #[arg(long, value_name = "N", env = "SOFTSERVE_FAIR_STEP_TOKENS")]
    pub fair_step_tokens: Option<usize>,

    /// The number of processor threads that the model uses [default: one for each core]
    #[arg(long, value_name = "N", env = "SOFTSERVE_THREADS")]
    pub threads: Option<usize>,

    /// The maximum size of an uploaded prompt, both as sent and after unpacking [default: 64MiB]
    #[arg(long, value_name = "SIZE", env = "SOFTSERVE_MAX_UPLOAD")]
    pub max_upload: Option<ByteSize>,

    /// The maximum size of a file for /v1/batches [default: 512MiB]
    #[arg(long, value_name = "SIZE", env = "SOFTSERVE_MAX_FILE")]
    pub max_file: Option<ByteSize>,

    /// The maximum size of any other request body [default: 1MiB]
    #[arg(long, value_name = "SIZE", env = "SOFTSERVE_MAX_BODY")]
    pub max_body: Option<ByteSize>,

    /// The maximum number of tasks [default: 200000]
    #[arg(long, value_name = "N", env = "SOFTSERVE_MAX_TASKS")]
    pub max_tasks: Option<usize>,

    /// The maximum number of versions of one task [default: 100]
    #[arg(long, value_name = "N", env = "SOFTSERVE_MAX_VERSIONS")]
    pub max_versions: Option<usize>,

    /// How many of the newest versions of a task to keep. Older ones are deleted once they are older than --keep-for,
    /// unless they are active, get a share of the requests, have an alias, or were active before [default: all]
    #[arg(long, value_name = "N", env = "SOFTSERVE_KEEP_VERSIONS")]
    pub keep_versions: Option<usize>,

    /// With --keep-versions: how long every version is kept [default: 7days]
    #[arg(long, value_name = "TIME", env = "SOFTSERVE_KEEP_FOR")]
    pub keep_for: Option<Time>,

    /// The memory for learned prompts. With more of them than it holds, those that are used least are read from the prompts
    /// folder again when a request needs them [default: 256MiB]
    #[arg(long, value_name = "SIZE", env = "SOFTSERVE_PROMPT_MEMORY")]
    pub prompt_memory: Option<ByteSize>,

    /// The time limit of a request that does not set timeout_ms [default: 2m]
    #[arg(long, value_name = "TIME", env = "SOFTSERVE_REQUEST_TIMEOUT")]
    pub request_timeout: Option<Time>,

    /// The maximum timeout_ms that a request can set [default: 10m]
    #[arg(long, value_name = "TIME", env = "SOFTSERVE_MAX_REQUEST_TIMEOUT")]
    pub max_request_timeout: Option<Time>,

    /// After SIGTERM or Ctrl-C, how long running requests can continue before they are cut off
    /// [default: 30s]
    #[arg(long, value_name = "TIME", env = "SOFTSERVE_DRAIN_TIMEOUT")]
    pub drain_timeout: Option<Time>,

    /// A key that callers must send as 'Authorization: Bearer KEY'. Separate several keys by commas.
    /// Each key is a tenant: the prefix cache shares nothing between the inputs of two tenants, and
    /// the model's time is divided between them. Other users of this machine can see flags, so prefer
    /// the environment variable or a file
    #[arg(long, value_name = "KEY", env = "SOFTSERVE_API_KEY", hide_env_values = true, value_delimiter = ',')]
    pub api_key: Option<Vec<String>>,

    /// A file with one API key per line, either the key itself or sha256:<hex of its SHA-256>. A line
    /// 'tenant=NAME KEY' assigns the key to a named tenant, which several keys can share
    #[arg(long, value_name = "FILE", env = "SOFTSERVE_API_KEY_FILE")]
    pub api_key_file: Option<PathBuf>,

    /// A key for the admin routes, which upload, activate and delete prompts. It is accepted wherever an
    /// API key is
    #[arg(long, value_name = "KEY", env = "SOFTSERVE_ADMIN_KEY", hide_env_values = true, value_delimiter = ',')]
    pub admin_key: Option<Vec<String>>,

    /// A file with one admin key per line, in the same form as --api-key-file
    #[arg(long, value_name = "FILE", env = "SOFTSERVE_ADMIN_KEY_FILE")]
    pub admin_key_file: Option<PathBuf>,

    /// A file with keys that have roles, tasks, limits and an expiry: a [[key]] table for each, as `softserve key` prints
    /// it. Key files are read again when they change
    #[arg(long, value_name = "FILE", env = "SOFTSERVE_KEYS")]
    pub keys: Option<PathBuf>,

    /// A file to which every admin action is appended as a line of JSON: who, what, from where, before and after
    #[arg(long, value_name = "FILE", env = "SOFTSERVE_AUDIT_LOG")]
    pub audit_log: Option<PathBuf>,

    /// The format of the log, which goes to standard error [default: text]
    #[arg(long, env = "SOFTSERVE_LOG_FORMAT")]
    pub log_format: Option<LogFormat>,

    /// The log level: error, warn, info, debug or trace. Modules can have levels of their own, as in
    /// info,softserve::engine=debug [default: info]
    #[arg(long, value_name = "LEVEL", env = "SOFTSERVE_LOG_LEVEL")]
    pub log_level: Option<String>,
}
