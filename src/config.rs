//! What we run with: what was typed ([`ServeArgs`]), then what was checked ([`Config`]).
//!
//! A flag goes before its environment variable, and that before the configuration file.

mod keys;
mod units;
mod weights;

use std::{
    net::{IpAddr, SocketAddr, ToSocketAddrs as _},
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use clap::{Args, ValueEnum};
use figment::{
    Figment,
    providers::{Format as _, Serialized, Toml},
};
use serde::{Deserialize, Serialize};

pub use keys::Keys;
pub use units::{ByteSize, Time};
pub use weights::{TaskWeight, TaskWeights};

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

    /// A file with such keys, one a line, each as it is or as sha256:<hex>
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

/// What we run with. Checked once, then immutable.
#[derive(Debug, Clone)]
pub struct Config {
    pub model: ModelSource,
    /// `None` is the model's own folder in the user's data directory.
    pub prompts: Option<PathBuf>,
    pub listen: SocketAddr,
    pub device: DeviceChoice,
    pub dtype: DtypeChoice,
    pub batch: Batch,
    /// `None` is one for each core.
    pub threads: Option<usize>,
    pub limits: Limits,
    pub drain_timeout: Duration,
    pub access: Access,
    pub log: LogConfig,
}

/// Bounds of the engine.
#[derive(Debug, Clone)]
pub struct Batch {
    /// Requests that may wait for a place; more are refused.
    pub max_waiting: usize,
    /// Requests worked on at once.
    pub max_requests: usize,
    /// Positions computed in one step.
    pub max_step_tokens: usize,
    /// Positions of inputs computed in a step beside requests that get their next token.
    pub max_prefill_tokens: usize,
    /// Positions that each task may always take of a step that several share.
    /// `None` is measured.
    pub fair_step_tokens: Option<usize>,
    /// Bytes for keys and values.
    pub kv_cache: usize,
    /// Whether keys and values are shared.
    pub prefix_sharing: bool,
}

/// Bounds on what a client may send.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Bytes of an upload, packed and unpacked.
    pub max_upload: u64,
    /// Bytes of any other body.
    pub max_body: u64,
    pub max_tasks: usize,
    pub max_versions: usize,
    /// Uploads that are read or checked at the same time.
    pub max_concurrent_uploads: usize,
    /// For requests that name no `timeout_ms`.
    pub request_timeout: Duration,
    /// The most that a request may name.
    pub max_request_timeout: Duration,
    /// The longest pause between two pieces of a body.
    pub body_idle_timeout: Duration,
    /// How the engine is shared out while several tasks want it.
    pub task_weights: TaskWeights,
}

/// Who may call.
#[derive(Debug, Clone, Default)]
pub struct Access {
    pub api_keys: Keys,
    pub admin_keys: Keys,
    /// Only this machine can reach the address that we listen on.
    pub loopback: bool,
}

/// How the log is written.
#[derive(Debug, Clone)]
pub struct LogConfig {
    pub format: LogFormat,
    /// A filter in tracing's syntax.
    pub level: String,
}

/// Where the model comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// The one inside the program.
    Demo,
    /// A folder or a GGUF file.
    Dir(PathBuf),
    /// A repository of the Hugging Face hub.
    Hub { id: String, revision: Option<String> },
    /// Random weights: a preset's name or the path of a `config.json`.
    Random(String),
}

/// Where the model runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceChoice {
    #[default]
    Auto,
    Cpu,
    /// The CUDA device of this number.
    Cuda(usize),
}

/// The number format of the weights in memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DtypeChoice {
    #[default]
    Auto,
    F32,
    Bf16,
    F16,
}

/// On or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Switch {
    On,
    Off,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

/// Why the options cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The configuration file is missing, not TOML, or has a key or value that is not known.
    #[error("{file}: {reason}")]
    File { file: String, reason: String },
    /// An option has a value that cannot be used.
    #[error("--{option}: {reason}")]
    Option { option: &'static str, reason: String },
}

const MAX_CONCURRENT_UPLOADS: usize = 4;
const BODY_IDLE_TIMEOUT: Duration = Duration::from_secs(30);

impl ServeArgs {
    /// Adds what only the configuration file says, then checks everything.
    pub fn check(self) -> Result<Config, ConfigError> {
        let args = match self.config.clone() {
            Some(path) => self.over_file(&path)?,
            None => self,
        };
        let listen = resolve(args.listen.as_deref().unwrap_or("127.0.0.1:8080"))?;
        let time = |time: Option<Time>, default: u64| time.map_or(Duration::from_secs(default), |t| t.0);
        let limits = Limits {
            max_upload: at_least("max-upload", args.max_upload.map_or(64 << 20, |b| b.0), 1024)?,
            max_body: at_least("max-body", args.max_body.map_or(1 << 20, |b| b.0), 1024)?,
            max_tasks: at_least("max-tasks", args.max_tasks.unwrap_or(10_000), 1)?,
            max_versions: at_least("max-versions", args.max_versions.unwrap_or(100), 1)?,
            max_concurrent_uploads: MAX_CONCURRENT_UPLOADS,
            request_timeout: time(args.request_timeout, 120),
            max_request_timeout: time(args.max_request_timeout, 600),
            body_idle_timeout: BODY_IDLE_TIMEOUT,
            task_weights: TaskWeights::new(args.task_weight.unwrap_or_default()),
        };
        if limits.request_timeout > limits.max_request_timeout {
            let reason = format!(
                "found {:?}, which is more than --max-request-timeout ({:?})",
                limits.request_timeout, limits.max_request_timeout
            );
            return Err(ConfigError::Option { option: "request-timeout", reason });
        }
        let keys = |option, typed: Option<Vec<String>>, file: Option<PathBuf>| {
            Keys::read(&typed.unwrap_or_default(), file.as_deref())
                .map_err(|reason| ConfigError::Option { option, reason })
        };
        let kv_cache = args.kv_cache.map_or_else(default_kv_cache, |b| b.0);
        Ok(Config {
            model: ModelSource::chosen(args.model.as_deref(), args.random_weights.as_deref())?,
            prompts: args.prompts,
            listen,
            device: args.device.unwrap_or_default(),
            dtype: args.dtype.unwrap_or_default(),
            batch: Batch {
                max_waiting: at_least("max-waiting", args.max_waiting.unwrap_or(256), 1)?,
                max_requests: at_least("max-batch", args.max_batch.unwrap_or(64), 1)?,
                max_step_tokens: at_least("max-step-tokens", args.max_step_tokens.unwrap_or(2048), 32)?,
                max_prefill_tokens: at_least("max-prefill-tokens", args.max_prefill_tokens.unwrap_or(512), 1)?,
                fair_step_tokens: args.fair_step_tokens.map(|n| at_least("fair-step-tokens", n, 1)).transpose()?,
                prefix_sharing: args.prefix_sharing != Some(Switch::Off),
                kv_cache: usize::try_from(at_least("kv-cache", kv_cache, 1 << 20)?).unwrap_or(usize::MAX),
            },
            threads: args.threads.map(|n| at_least("threads", n, 1)).transpose()?,
            limits,
            drain_timeout: time(args.drain_timeout, 30),
            access: Access {
                api_keys: keys("api-key", args.api_key, args.api_key_file)?,
                admin_keys: keys("admin-key", args.admin_key, args.admin_key_file)?,
                loopback: listen.ip().is_loopback(),
            },
            log: LogConfig {
                format: args.log_format.unwrap_or_default(),
                level: args.log_level.unwrap_or_else(|| "info".to_owned()),
            },
        })
    }

    /// These options over those of a file.
    fn over_file(self, path: &Path) -> Result<Self, ConfigError> {
        let error = |reason: String| ConfigError::File { file: path.display().to_string(), reason };
        let text = std::fs::read_to_string(path).map_err(|e| error(format!("cannot read it: {e}")))?;
        let from_file: Self = Figment::from(Toml::string(&text)).extract().map_err(|e| error(describe(e)))?;
        let typed = set_fields(&self).map_err(|e| error(e.to_string()))?;
        Figment::from(Serialized::defaults(set_fields(&from_file).map_err(|e| error(e.to_string()))?))
            .merge(Serialized::defaults(typed))
            .extract()
            .map_err(|e| error(describe(e)))
    }
}

/// The options that were given, by name.
fn set_fields(args: &ServeArgs) -> serde_json::Result<serde_json::Map<String, serde_json::Value>> {
    let mut fields = serde_json::from_value::<serde_json::Map<_, _>>(serde_json::to_value(args)?)?;
    fields.retain(|_, value| !value.is_null());
    Ok(fields)
}

/// Every fault of a configuration file: what was found and where.
fn describe(error: figment::Error) -> String {
    let one = |e: figment::Error| {
        let key = e.path.join(".");
        if key.is_empty() { e.kind.to_string() } else { format!("{key}: {}", e.kind) }
    };
    error.into_iter().map(one).collect::<Vec<_>>().join("; ")
}

fn resolve(listen: &str) -> Result<SocketAddr, ConfigError> {
    let error = |reason: String| ConfigError::Option { option: "listen", reason };
    let mut addresses = listen
        .to_socket_addrs()
        .map_err(|e| error(format!("found {listen:?}, expected an address and a port such as 127.0.0.1:8080 ({e})")))?;
    addresses.next().ok_or_else(|| error(format!("{listen:?} has no address")))
}

fn at_least<T: PartialOrd + std::fmt::Display>(option: &'static str, found: T, least: T) -> Result<T, ConfigError> {
    if found >= least {
        Ok(found)
    } else {
        Err(ConfigError::Option { option, reason: format!("found {found}, expected {least} or more") })
    }
}

/// A quarter of the memory that is free now, 4 GiB at most; 1 GiB where that cannot be told.
fn default_kv_cache() -> u64 {
    let free = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
        line.trim().trim_end_matches(" kB").parse::<u64>().ok().map(|kib| kib * 1024)
    });
    // A container may be allowed less than the machine has.
    let allowed = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|t| t.trim().parse::<u64>().ok());
    let memory = free.map(|free| free.min(allowed.unwrap_or(u64::MAX)));
    memory.map_or(1 << 30, |bytes| (bytes / 4).clamp(16 << 20, 4 << 30))
}

impl ModelSource {
    /// The one of two options that was given; the demo model if none was.
    pub fn chosen(model: Option<&str>, random_weights: Option<&str>) -> Result<Self, ConfigError> {
        match (model, random_weights) {
            (None, None) => Ok(Self::Demo),
            (Some(model), None) => Ok(Self::parse(model)),
            (None, Some(shape)) => Ok(Self::Random(shape.to_owned())),
            (Some(model), Some(shape)) => {
                let reason =
                    format!("found {shape:?} beside --model {model:?}, expected one of the two: leave one out");
                Err(ConfigError::Option { option: "random-weights", reason })
            }
        }
    }

    /// A folder or file if there is one of that name, else a hub id if it looks like one.
    pub fn parse(text: &str) -> Self {
        let path = Path::new(text);
        let (id, revision) =
            text.split_once('@').map_or((text, None), |(id, revision)| (id, Some(revision.to_owned())));
        let part = |p: &str| {
            !p.is_empty()
                && !p.starts_with('.')
                && p.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        };
        let looks_like_id = id.split_once('/').is_some_and(|(org, name)| part(org) && part(name));
        let gguf = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
        if looks_like_id && !gguf && !path.exists() {
            Self::Hub { id: id.to_owned(), revision }
        } else {
            Self::Dir(path.to_owned())
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|n| n.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| format!("found {text:?}, expected auto, cpu, cuda or cuda:N")),
        }
    }
}

impl TryFrom<String> for DeviceChoice {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<DeviceChoice> for String {
    fn from(device: DeviceChoice) -> Self {
        match device {
            DeviceChoice::Auto => "auto".to_owned(),
            DeviceChoice::Cpu => "cpu".to_owned(),
            DeviceChoice::Cuda(n) => format!("cuda:{n}"),
        }
    }
}

impl Access {
    /// Whether anyone may call the admin routes: no key is set at all, and only this machine can
    /// reach us.
    pub fn admin_is_open(&self) -> bool {
        self.loopback && self.admin_keys.is_empty() && self.api_keys.is_empty()
    }
}

/// Whether an address is this machine's own.
pub fn is_loopback_host(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(v6) => v6.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_toml(text: &str, args: ServeArgs) -> Result<Config, String> {
        let file = tempfile::NamedTempFile::new().map_err(|e| e.to_string())?;
        std::fs::write(file.path(), text).map_err(|e| e.to_string())?;
        ServeArgs { config: Some(file.path().to_owned()), ..args }.check().map_err(|e| e.to_string())
    }

    #[test]
    fn what_was_typed_goes_before_the_file() -> Result<(), String> {
        let file = "max_batch = 3\nmax_waiting = 5\nkv_cache = \"8MiB\"\ndevice = \"cpu\"\ndrain_timeout = \"5s\"";
        let config = from_toml(file, ServeArgs { max_batch: Some(7), ..Default::default() })?;
        assert_eq!((config.batch.max_requests, config.batch.max_waiting), (7, 5));
        assert_eq!((config.batch.kv_cache, config.device), (8 << 20, DeviceChoice::Cpu));
        assert_eq!(config.drain_timeout, Duration::from_secs(5));
        Ok(())
    }

    #[test]
    fn task_weights_are_a_list_or_a_table_of_the_file() -> Result<(), String> {
        for file in ["task_weight = [\"a=2\", \"b=0.5\"]", "[task_weight]\na = 2\nb = 0.5"] {
            let weights = from_toml(file, ServeArgs::default())?.limits.task_weights;
            assert_eq!((weights.of("a"), weights.of("b"), weights.of("c")), (2.0, 0.5, 1.0), "{file}");
        }
        let typed = ServeArgs { task_weight: Some(vec!["a=3".parse()?]), ..Default::default() };
        let weights = from_toml("task_weight = [\"a=2\"]", typed)?.limits.task_weights;
        assert_eq!(weights.of("a"), 3.0);
        for bad in ["task_weight = [\"a\"]", "task_weight = { a = 0 }", "task_weight = 1"] {
            let error = from_toml(bad, ServeArgs::default()).expect_err("refused");
            assert!(error.contains("task_weight"), "{error}");
        }
        Ok(())
    }

    #[test]
    fn sharing_is_on_unless_it_is_switched_off() -> Result<(), String> {
        let sharing = |file: &str| Ok::<_, String>(from_toml(file, ServeArgs::default())?.batch.prefix_sharing);
        assert_eq!((sharing("")?, sharing("prefix_sharing = \"off\"")?), (true, false));
        assert!(sharing("prefix_sharing = \"maybe\"").is_err_and(|e| e.contains("prefix_sharing")));
        Ok(())
    }

    #[test]
    fn an_unknown_key_of_the_file_is_an_error_that_names_it() {
        let error = from_toml("max_batches = 3", ServeArgs::default()).expect_err("refused");
        assert!(error.contains("max_batches") && error.contains("max_batch`"), "{error}");
        let error = from_toml("max_batch = \"many\"", ServeArgs::default()).expect_err("refused");
        assert!(error.contains("max_batch"), "{error}");
        let error = from_toml("device = \"tpu\"", ServeArgs::default()).expect_err("refused");
        assert!(error.contains("device") && error.contains("tpu"), "{error}");
    }

    #[test]
    fn values_out_of_range_are_errors_that_name_the_option() {
        for (args, option) in [
            (ServeArgs { max_batch: Some(0), ..Default::default() }, "--max-batch"),
            (ServeArgs { threads: Some(0), ..Default::default() }, "--threads"),
            (ServeArgs { listen: Some("8080".to_owned()), ..Default::default() }, "--listen"),
            (ServeArgs { api_key: Some(vec!["x".to_owned()]), ..Default::default() }, "--api-key"),
            (
                ServeArgs { request_timeout: Some(Time(Duration::from_secs(3600))), ..Default::default() },
                "--request-timeout",
            ),
        ] {
            let error = args.check().expect_err("refused").to_string();
            assert!(error.contains(option), "{error}");
        }
    }

    #[test]
    fn a_model_is_a_folder_or_a_hub_id() {
        let hub = |id: &str, revision: Option<&str>| ModelSource::Hub {
            id: id.to_owned(),
            revision: revision.map(str::to_owned),
        };
        assert_eq!(ModelSource::parse("org/name"), hub("org/name", None));
        assert_eq!(ModelSource::parse("org/name@main"), hub("org/name", Some("main")));
        for folder in ["./org/name", "/org/name", "name", "../name", "a/b/c", "src/http", "models/x.gguf"] {
            assert_eq!(ModelSource::parse(folder), ModelSource::Dir(folder.into()), "{folder}");
        }
    }

    #[test]
    fn loopback_hosts_are_told_from_others() {
        for host in ["localhost", "localhost:8080", "127.0.0.1:1", "[::1]:8080", "LOCALHOST"] {
            assert!(is_loopback_host(host), "{host}");
        }
        for host in ["example.com", "127.0.0.1.example.com", "localhost.example.com:80", "", "10.0.0.1"] {
            assert!(!is_loopback_host(host), "{host}");
        }
    }
}
