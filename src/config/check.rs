//! From what was typed to what we run with: the configuration file goes under the flags, what
//! nobody said gets its default, and every value is checked.

use std::{
    net::{SocketAddr, ToSocketAddrs as _},
    ops::RangeInclusive,
    path::Path,
    time::Duration,
};

use figment::{
    Figment,
    providers::{Format as _, Serialized, Toml},
};

use super::{
    Access, ByteSize, Config, ConfigError, KeySources, Limits, LogConfig, ModelSource, ServeArgs, Switch, TaskWeights,
    Time,
};
use crate::{engine::EngineConfig, registry::Keep};

/// More requests or tokens at once than any machine has memory for; sums of these cannot overflow.
const MAX_COUNT: usize = 1_000_000;
const MAX_DRAFT_TOKENS: usize = 64;
/// A store that is polled more often has little else to do.
const MIN_POLL_INTERVAL: Duration = Duration::from_millis(100);
const MAX_THREADS: usize = 1024;
const MOMENT: Time = Time(Duration::from_millis(1));
const MAX_CONCURRENT_UPLOADS: usize = 4;
const MAX_CONCURRENT_LOADS: usize = 8;
const MAX_LOAD_WAIT: Duration = Duration::from_secs(5);
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
            max_upload: at_least("max-upload", args.max_upload.unwrap_or(ByteSize(64 << 20)), ByteSize(1024))?.0,
            max_file: at_least("max-file", args.max_file.unwrap_or(ByteSize(512 << 20)), ByteSize(1024))?.0,
            max_body: at_least("max-body", args.max_body.unwrap_or(ByteSize(1 << 20)), ByteSize(1024))?.0,
            max_tasks: at_least("max-tasks", args.max_tasks.unwrap_or(200_000), 1)?,
            max_versions: at_least("max-versions", args.max_versions.unwrap_or(100), 1)?,
            prompt_memory: at_least(
                "prompt-memory",
                args.prompt_memory.unwrap_or(ByteSize(256 << 20)),
                ByteSize(1 << 20),
            )?
            .0,
            max_concurrent_loads: MAX_CONCURRENT_LOADS,
            max_load_wait: MAX_LOAD_WAIT,
            max_concurrent_uploads: MAX_CONCURRENT_UPLOADS,
            request_timeout: at_least("request-timeout", Time(time(args.request_timeout, 120)), MOMENT)?.0,
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
        let keys = KeySources {
            api_keys: args.api_key.unwrap_or_default(),
            api_key_file: args.api_key_file,
            admin_keys: args.admin_key.unwrap_or_default(),
            admin_key_file: args.admin_key_file,
            keys: args.keys,
        };
        let younger_than = time(args.keep_for, 7 * 24 * 60 * 60);
        let keep = match args.keep_versions {
            Some(n) => Some(Keep { newest: within("keep-versions", n, 1..=MAX_COUNT)?, younger_than }),
            None if args.keep_for.is_some() => {
                let reason =
                    "found without --keep-versions, which says how many versions are kept however old they are"
                        .to_owned();
                return Err(ConfigError::Option { option: "keep-for", reason });
            }
            None => None,
        };
        let engine = EngineConfig::default();
        let kv_cache = args.kv_cache.unwrap_or_else(|| ByteSize(default_kv_cache()));
        let gpu_memory = args.gpu_memory.unwrap_or(0.9);
        if !(0.1..=1.0).contains(&gpu_memory) {
            let reason = format!("found {gpu_memory}, expected a number from 0.1 to 1");
            return Err(ConfigError::Option { option: "gpu-memory", reason });
        }
        Ok(Config {
            model: ModelSource::chosen(args.model.as_deref(), args.random_weights.as_deref())?,
            context: args.context.map(|n| within("context", n, 1..=MAX_COUNT)).transpose()?,
            prompts: args.prompts,
            poll_interval: time(args.poll_interval, 5).max(MIN_POLL_INTERVAL),
            keep,
            files: args.files,
            listen,
            device: args.device.unwrap_or_default(),
            dtype: args.dtype.unwrap_or_default(),
            backend: args.backend.unwrap_or_default(),
            gpu_memory,
            kv_cache_is_given: args.kv_cache.is_some(),
            engine: EngineConfig {
                max_waiting: within("max-waiting", args.max_waiting.unwrap_or(engine.max_waiting), 1..=MAX_COUNT)?,
                max_batch: within("max-batch", args.max_batch.unwrap_or(engine.max_batch), 1..=MAX_COUNT)?,
                max_step_tokens: within(
                    "max-step-tokens",
                    args.max_step_tokens.unwrap_or(engine.max_step_tokens),
                    32..=MAX_COUNT,
                )?,
                max_prefill_tokens: within(
                    "max-prefill-tokens",
                    args.max_prefill_tokens.unwrap_or(engine.max_prefill_tokens),
                    1..=MAX_COUNT,
                )?,
                fair_step_tokens: args
                    .fair_step_tokens
                    .map(|n| within("fair-step-tokens", n, 1..=MAX_COUNT))
                    .transpose()?,
                draft_tokens: args.draft_tokens.map(|n| within("draft-tokens", n, 0..=MAX_DRAFT_TOKENS)).transpose()?,
                prefix_sharing: args.prefix_sharing != Some(Switch::Off),
                kv_cache_bytes: usize::try_from(at_least("kv-cache", kv_cache, ByteSize(1 << 20))?.0)
                    .unwrap_or(usize::MAX),
            },
            threads: args.threads.map(check_threads).transpose()?,
            limits,
            drain_timeout: time(args.drain_timeout, 30),
            access: Access::open(keys, listen.ip().is_loopback())?,
            audit_log: args.audit_log,
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

/// A number of processor threads, as it was given, if it can be one.
///
/// # Errors
/// It is 0, or more than any machine has.
pub fn check_threads(found: usize) -> Result<usize, ConfigError> {
    within("threads", found, 1..=MAX_THREADS)
}

fn within(option: &'static str, found: usize, range: RangeInclusive<usize>) -> Result<usize, ConfigError> {
    if range.contains(&found) {
        Ok(found)
    } else {
        let reason = format!("found {found}, expected {} to {}", range.start(), range.end());
        Err(ConfigError::Option { option, reason })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DeviceChoice;

    fn from_toml(text: &str, args: ServeArgs) -> Result<Config, String> {
        let file = tempfile::NamedTempFile::new().map_err(|e| e.to_string())?;
        std::fs::write(file.path(), text).map_err(|e| e.to_string())?;
        ServeArgs { config: Some(file.path().to_owned()), ..args }.check().map_err(|e| e.to_string())
    }

    #[test]
    fn what_was_typed_goes_before_the_file() -> Result<(), String> {
        let file = "max_batch = 3\nmax_waiting = 5\nkv_cache = \"8MiB\"\ndevice = \"cpu\"\ndrain_timeout = \"5s\"";
        let config = from_toml(file, ServeArgs { max_batch: Some(7), ..Default::default() })?;
        assert_eq!((config.engine.max_batch, config.engine.max_waiting), (7, 5));
        assert_eq!((config.engine.kv_cache_bytes, config.device), (8 << 20, DeviceChoice::Cpu));
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
        let sharing = |file: &str| Ok::<_, String>(from_toml(file, ServeArgs::default())?.engine.prefix_sharing);
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
            (ServeArgs { threads: Some(100_000), ..Default::default() }, "--threads"),
            (ServeArgs { max_batch: Some(usize::MAX), ..Default::default() }, "--max-batch"),
            (ServeArgs { max_waiting: Some(usize::MAX), ..Default::default() }, "--max-waiting"),
            (ServeArgs { max_step_tokens: Some(usize::MAX), ..Default::default() }, "--max-step-tokens"),
            (ServeArgs { max_prefill_tokens: Some(usize::MAX), ..Default::default() }, "--max-prefill-tokens"),
            (ServeArgs { draft_tokens: Some(65), ..Default::default() }, "--draft-tokens"),
            (ServeArgs { fair_step_tokens: Some(usize::MAX), ..Default::default() }, "--fair-step-tokens"),
            (ServeArgs { gpu_memory: Some(0.0), ..Default::default() }, "--gpu-memory: found 0, expected a number"),
            (ServeArgs { gpu_memory: Some(f64::NAN), ..Default::default() }, "--gpu-memory"),
            (ServeArgs { gpu_memory: Some(1.5), ..Default::default() }, "--gpu-memory"),
            (ServeArgs { listen: Some("8080".to_owned()), ..Default::default() }, "--listen"),
            (ServeArgs { api_key: Some(vec!["x".to_owned()]), ..Default::default() }, "--api-key"),
            (ServeArgs { kv_cache: Some(ByteSize(1024)), ..Default::default() }, "--kv-cache: found 1.0 KiB"),
            (ServeArgs { request_timeout: Some(Time(Duration::ZERO)), ..Default::default() }, "--request-timeout"),
            (
                ServeArgs { request_timeout: Some(Time(Duration::from_secs(3600))), ..Default::default() },
                "--request-timeout",
            ),
        ] {
            let error = args.check().expect_err("refused").to_string();
            assert!(error.contains(option), "{error}");
        }
    }
}
