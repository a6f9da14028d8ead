//! The log's set-up, and the names of all metrics in one place.

use std::{
    collections::HashSet,
    io::IsTerminal as _,
    sync::{LazyLock, Mutex, Once, OnceLock, PoisonError},
};

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::EnvFilter;

use crate::config::{LogConfig, LogFormat};

/// Answered requests, by method, route and status.
pub const HTTP_REQUESTS: &str = "softserve_http_requests_total";
/// Seconds from a request's arrival to its answer, of a stream to its end, by method and route.
pub const HTTP_SECONDS: &str = "softserve_http_request_duration_seconds";
/// Requests that are being answered.
pub const HTTP_ACTIVE: &str = "softserve_http_requests_active";
/// Seconds from the hand-over of a request to its first token, by task.
pub const FIRST_TOKEN_SECONDS: &str = "softserve_time_to_first_token_seconds";
/// Seconds between an answer's tokens, by task.
pub const INTER_TOKEN_SECONDS: &str = "softserve_inter_token_seconds";
/// Tokens of a request's input, special tokens included, by task.
pub const INPUT_TOKENS: &str = "softserve_request_input_tokens";
/// Tokens of an answer, by task.
pub const OUTPUT_TOKENS: &str = "softserve_request_output_tokens";
/// Uploads of learned prompts, by outcome.
pub const UPLOADS: &str = "softserve_uploads_total";
/// Whether a forward pass has run and the engine lives.
pub const READY: &str = "softserve_ready";
/// Requests that wait for a place in the batch.
pub const WAITING: &str = "softserve_engine_waiting_requests";
/// Requests in the batch.
pub const RUNNING: &str = "softserve_engine_running_requests";
/// Blocks of keys and values in use.
pub const KV_BLOCKS_USED: &str = "softserve_engine_kv_blocks_used";
/// Blocks of keys and values there are.
pub const KV_BLOCKS: &str = "softserve_engine_kv_blocks";
/// Positions of one of these blocks.
pub const KV_BLOCK_POSITIONS: &str = "softserve_engine_kv_block_positions";
/// The part of the blocks that is in use, from 0 to 1: what routers read of a model server.
pub const KV_USAGE: &str = "softserve_engine_kv_usage_ratio";
/// Cached blocks: no request references them, and their content can be reused.
pub const KV_BLOCKS_CACHED: &str = "softserve_engine_kv_blocks_cached";
/// Blocks whose content had to make room for other content.
pub const KV_EVICTIONS: &str = "softserve_engine_kv_evictions_total";
/// Positions of encoders' inputs whose output is kept for running requests.
pub const ENCODER_POSITIONS_USED: &str = "softserve_engine_encoder_positions_used";
/// Positions of encoders' inputs whose output may be kept at once; 0 without an encoder.
pub const ENCODER_POSITIONS: &str = "softserve_engine_encoder_positions";
/// Learned prompts whose keys and values are all in the cache.
pub const CACHED_PROMPTS: &str = "softserve_engine_cached_prompts";
/// Bytes of the key-value cache, on the device, that hold these prompts.
pub const CACHED_PROMPT_BYTES: &str = "softserve_engine_cached_prompt_bytes";
/// Running requests that were preempted: queued again to make room for others.
pub const PREEMPTIONS: &str = "softserve_engine_preemptions_total";
/// Forward passes.
pub const STEPS: &str = "softserve_engine_steps_total";
/// Input positions computed, virtual tokens included.
pub const PROMPT_TOKENS: &str = "softserve_engine_prompt_tokens_total";
/// Input positions found in the cache, virtual tokens included.
pub const CACHED_TOKENS: &str = "softserve_engine_cached_tokens_total";
/// Tokens generated.
pub const DRAFT_TOKENS: &str = "softserve_engine_draft_tokens_total";
pub const DRAFT_TOKENS_ACCEPTED: &str = "softserve_engine_draft_tokens_accepted_total";
pub const GENERATED_TOKENS: &str = "softserve_engine_generated_tokens_total";
/// Tasks with an active version.
pub const TASKS: &str = "softserve_tasks";
/// Learned prompts in memory; the others are read from the store when they are needed.
pub const LOADED_PROMPTS: &str = "softserve_loaded_prompts";
pub const LOADED_PROMPT_BYTES: &str = "softserve_loaded_prompt_bytes";
pub const PROMPT_LOADS: &str = "softserve_prompt_loads_total";
pub const PROMPT_EVICTIONS: &str = "softserve_prompt_evictions_total";
/// The time that a request waited for its learned prompt, of those that had to.
pub const PROMPT_LOAD_SECONDS: &str = "softserve_prompt_load_seconds";
/// How long answers took, by task and version.
pub const VERSION_SECONDS: &str = "softserve_version_answer_seconds";
/// Whether the last call of the prompt store was answered.
pub const STORE_UP: &str = "softserve_prompt_store_up";
pub const STORE_FAILURES: &str = "softserve_prompt_store_failures_total";

/// Tasks that have series of their own, and versions; a request of a further one counts as [`OTHER_TASKS`].
const MAX_TASK_SERIES: usize = 200;
/// The label of the tasks beyond these. No task can have this name.
const OTHER_TASKS: &str = "(others)";

const TOKENS_BUCKETS: [f64; 15] =
    [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 16384.0, 65536.0];
const SECONDS_BUCKETS: [f64; 13] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0];

/// Starts the log on standard error, and makes panics part of it. A second call changes nothing.
pub fn init(config: &LogConfig) -> Result<(), tracing_subscriber::filter::ParseError> {
    let filter = EnvFilter::builder().parse(&config.level)?;
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let builder = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(std::io::stderr)
            .with_ansi(std::io::stderr().is_terminal());
        let started = match config.format {
            LogFormat::Text => builder.with_target(false).try_init(),
            LogFormat::Json => builder.json().flatten_event(true).with_current_span(true).try_init(),
        };
        if started.is_ok() {
            std::panic::set_hook(Box::new(|panic| tracing::error!(%panic, "a panic: please report it")));
        }
    });
    Ok(())
}

/// The process's metrics. The first call begins to record them.
pub fn metrics() -> &'static PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE.get_or_init(|| {
        let builder = PrometheusBuilder::new();
        // Buckets are refused only if there are none.
        let builder = builder.set_buckets(&SECONDS_BUCKETS).unwrap_or_else(|_| PrometheusBuilder::new());
        let tokens = Matcher::Suffix("_tokens".to_owned());
        let builder =
            builder.set_buckets_for_metric(tokens, &TOKENS_BUCKETS).unwrap_or_else(|_| PrometheusBuilder::new());
        let recorder = builder.build_recorder();
        let handle = recorder.handle();
        if metrics::set_global_recorder(recorder).is_err() {
            tracing::warn!("another metrics recorder is in place: /metrics will stay empty");
        }
        describe();
        handle
    })
}

fn describe() {
    describe_counter!(HTTP_REQUESTS, "Answered requests, by method, route and status");
    describe_histogram!(HTTP_SECONDS, Unit::Seconds, "Time to the answer, of a stream to its end, by method and route");
    describe_gauge!(HTTP_ACTIVE, "Requests that are being answered");
    describe_histogram!(FIRST_TOKEN_SECONDS, Unit::Seconds, "Time from a request's hand-over to its first token");
    describe_histogram!(INTER_TOKEN_SECONDS, Unit::Seconds, "Time between an answer's tokens");
    describe_histogram!(INPUT_TOKENS, Unit::Count, "Tokens of a request's input");
    describe_histogram!(OUTPUT_TOKENS, Unit::Count, "Tokens of an answer");
    describe_counter!(UPLOADS, "Uploads of learned prompts, by outcome");
    describe_gauge!(READY, "1 once a forward pass has run and while the engine lives");
    describe_gauge!(WAITING, "Requests that wait for a place in the batch");
    describe_gauge!(RUNNING, "Requests in the batch");
    describe_gauge!(KV_BLOCKS_USED, "Blocks of keys and values in use");
    describe_gauge!(KV_BLOCKS, "Blocks of keys and values there are");
    describe_gauge!(KV_BLOCK_POSITIONS, "Positions of one block of keys and values");
    describe_gauge!(KV_USAGE, "The part of the blocks of keys and values that is in use, from 0 to 1");
    describe_gauge!(KV_BLOCKS_CACHED, "Cached blocks: no request references them, and their content can be reused");
    describe_counter!(KV_EVICTIONS, "Blocks whose content had to make room for other content");
    describe_gauge!(ENCODER_POSITIONS_USED, "Positions of encoders' inputs whose output is kept for running requests");
    describe_gauge!(
        ENCODER_POSITIONS,
        "Positions of encoder output that can be stored; 0 for a model without an encoder"
    );
    describe_gauge!(CACHED_PROMPTS, "Learned prompts whose keys and values are all in the cache");
    describe_gauge!(
        CACHED_PROMPT_BYTES,
        "Bytes of the key-value cache, on the device, that hold learned prompts which are there as a whole"
    );
    describe_counter!(PREEMPTIONS, "Running requests that were preempted: queued again to make room for others");
    describe_counter!(STEPS, "Forward passes");
    describe_counter!(PROMPT_TOKENS, "Input positions computed, virtual tokens included");
    describe_counter!(CACHED_TOKENS, "Input positions found in the cache, virtual tokens included");
    describe_counter!(
        DRAFT_TOKENS,
        "Tokens guessed from earlier ones and checked (prompt-lookup speculative decoding)"
    );
    describe_counter!(DRAFT_TOKENS_ACCEPTED, "Guessed tokens that were right");
    describe_counter!(GENERATED_TOKENS, "Tokens generated");
    describe_gauge!(TASKS, "Tasks with an active version");
    describe_gauge!(LOADED_PROMPTS, "Learned prompts in memory");
    describe_gauge!(LOADED_PROMPT_BYTES, Unit::Bytes, "Memory of the learned prompts that are loaded");
    describe_counter!(PROMPT_LOADS, "Learned prompts read from the store because they were needed and not in memory");
    describe_counter!(PROMPT_EVICTIONS, "Learned prompts evicted from memory for others");
    describe_histogram!(
        VERSION_SECONDS,
        Unit::Seconds,
        "Time from a request's tokens to the end of its answer, by task and version: what a split compares"
    );
    describe_gauge!(STORE_UP, "1 if the folder or bucket of the learned prompts answers, else 0");
    describe_counter!(STORE_FAILURES, "Calls of the prompt store that it did not answer");
    describe_histogram!(
        PROMPT_LOAD_SECONDS,
        Unit::Seconds,
        "Time that a request waited for its learned prompt to be read from the store"
    );
}

/// The value of the label `task` of a task's series. The first tasks have their own, so that many tasks do not make
/// series without end.
pub fn task_label(task: &str) -> String {
    static NAMED: LazyLock<Named> = LazyLock::new(|| Named::new(MAX_TASK_SERIES));
    NAMED.label(task).to_owned()
}

/// The labels of a version's series. The first versions have their own.
pub fn version_labels(task: &str, version: &str) -> [(&'static str, String); 2] {
    static NAMED: LazyLock<Named> = LazyLock::new(|| Named::new(MAX_TASK_SERIES));
    let name = format!("{task}@{version}");
    let version = if NAMED.label(&name) == OTHER_TASKS { OTHER_TASKS } else { version };
    [("task", task_label(task)), ("version", version.to_owned())]
}

/// The tasks that have series of their own.
struct Named {
    limit: usize,
    names: Mutex<HashSet<String>>,
}

impl Named {
    fn new(limit: usize) -> Self {
        Self { limit, names: Mutex::default() }
    }

    fn label<'a>(&self, task: &'a str) -> &'a str {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        if names.contains(task) {
            return task;
        }
        if names.len() >= self.limit {
            return OTHER_TASKS;
        }
        names.insert(task.to_owned());
        task
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_tasks_have_series_of_their_own_and_the_others_share_one() {
        let named = Named::new(2);
        let labels: Vec<_> = ["a", "b", "c", "a", "d", "b"].map(|task| named.label(task)).into();
        assert_eq!(labels, ["a", "b", OTHER_TASKS, "a", OTHER_TASKS, "b"]);
        assert!(OTHER_TASKS.contains('('), "no task can have this name");
    }
}
