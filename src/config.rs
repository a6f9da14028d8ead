//! What we run with: what was typed ([`ServeArgs`]), then what was checked ([`Config`]).
//!
//! A flag goes before its environment variable, and that before the configuration file.

mod access;
mod args;
mod check;
mod key_file;
mod keys;
mod units;
mod weights;

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

pub use access::{Access, KeyError, KeySources};
pub use args::ServeArgs;
pub use check::check_threads;
pub use key_file::check_key_table;
pub use keys::{Key, KeyLimits, Roles, TaskPatterns};
pub use units::{ByteSize, Time};
pub use weights::{TaskWeight, TaskWeights};

use crate::{
    engine::EngineConfig,
    registry::{Keep, PromptLocation},
};

/// What we run with. Checked once, then immutable.
#[derive(Debug, Clone)]
pub struct Config {
    pub model: ModelSource,
    /// The context length; `None` is the model's own.
    pub context: Option<usize>,
    /// `None` is the model's own folder in the user's data directory.
    pub prompts: Option<PromptLocation>,
    /// How often the prompts are checked for changes that others made.
    pub poll_interval: Duration,
    /// Which versions of a task are kept; `None` for all.
    pub keep: Option<Keep>,
    /// Where files and batches are kept; `None` is beside the prompts' folder of the user's data directory.
    pub files: Option<PathBuf>,
    pub listen: SocketAddr,
    pub device: DeviceChoice,
    pub dtype: DtypeChoice,
    pub backend: BackendChoice,
    pub engine: EngineConfig,
    /// Whether the size of the KV cache was asked for. Otherwise a GPU's follows from its memory.
    pub kv_cache_is_given: bool,
    /// The fraction of a GPU's memory that may be used.
    pub gpu_memory: f64,
    /// `None` is one for each core.
    pub threads: Option<usize>,
    pub limits: Limits,
    pub drain_timeout: Duration,
    pub access: Access,
    /// Where admin actions are written down.
    pub audit_log: Option<PathBuf>,
    pub log: LogConfig,
}

/// Bounds on what a client may send.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Bytes of an upload, packed and unpacked.
    pub max_upload: u64,
    /// Bytes of a file for batches.
    pub max_file: u64,
    /// Bytes of any other body.
    pub max_body: u64,
    pub max_tasks: usize,
    pub max_versions: usize,
    /// The memory for learned prompts, in bytes; the others are read from the store when they are needed.
    pub prompt_memory: u64,
    /// Learned prompts that are read from the store for requests at the same time.
    pub max_concurrent_loads: usize,
    /// How long a request waits until its learned prompt may be read.
    pub max_load_wait: Duration,
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

/// What computes on the device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendChoice {
    /// The device's fast kernels.
    #[default]
    Auto,
    /// Plain operations; slow, for comparison.
    Reference,
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
    #[error(transparent)]
    Keys(#[from] KeyError),
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
