//! Liveness, readiness and metrics.

use axum::{Json, extract::State, http::header, response::IntoResponse};
use metrics::{counter, gauge};
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    AppState,
    problem::{Code, Problem},
};
use crate::{engine::EngineStats, registry::Registry, telemetry};

/// How the server is.
#[derive(Debug, Serialize, ToSchema)]
pub struct Health {
    /// `live` or `ready`.
    #[schema(example = "ready")]
    pub status: &'static str,
    /// The learned prompts that are served; only for `ready`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompts: Option<PromptHealth>,
}

/// Which learned prompts are served, and whether their store answers.
#[derive(Debug, Serialize, ToSchema)]
pub struct PromptHealth {
    /// A hash of which version answers for each task that was read: replicas on one store that have the same revision answer
    /// alike.
    #[schema(example = "5f2c9a0e77d14b3c")]
    pub revision: String,
    /// Since when the folder or bucket of the prompts has not answered; absent if it does. Requests for prompts in memory are
    /// answered all the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "2026-11-27T09:30:00Z")]
    pub store_away_since: Option<String>,
}

/// Is the process alive
///
/// Answers as long as the process can answer at all.
#[utoipa::path(get, path = "/health/live", tag = "health", security(()),
    responses((status = 200, body = Health, description = "It is", example = json!({"status": "live"}))))]
pub async fn live() -> Json<Health> {
    Json(Health { status: "live", prompts: None })
}

/// Can it answer requests
///
/// Yes once a real forward pass has run; no again when the server is stopping or its engine has
/// failed. A prompt store that does not answer is no reason: what is in memory is served on.
#[utoipa::path(get, path = "/health/ready", tag = "health", security(()),
    responses((status = 200, body = Health, description = "It can", example = json!({"status": "ready", "prompts": {"revision": "5f2c9a0e77d14b3c"}}))),
    extensions(("x-problems" = json!(["unavailable"]))))]
pub async fn ready(State(app): State<AppState>) -> Result<Json<Health>, Problem> {
    if app.is_ready() {
        let away = app.registry.store_away();
        let prompts = PromptHealth {
            revision: format!("{:016x}", app.registry.revision()),
            store_away_since: away.map(|away| humantime::format_rfc3339_seconds(away.since).to_string()),
        };
        Ok(Json(Health { status: "ready", prompts: Some(prompts) }))
    } else {
        Err(Problem::new(Code::Unavailable, "the server is stopping or its engine has failed"))
    }
}

/// Metrics for Prometheus
///
/// Requests, latencies, tokens, the queue, the batch and the cache. Where the server has keys, it needs one with the role
/// `metrics`, since tasks have their names here.
#[utoipa::path(get, path = "/metrics", tag = "health",
    responses((status = 200, body = String, content_type = "text/plain", description = "Prometheus text format",
        example = "softserve_engine_running_requests 3\n")))]
pub async fn metrics(State(app): State<AppState>) -> impl IntoResponse {
    let handle = telemetry::metrics();
    record_engine(&app.engine.stats());
    record_registry(&app.registry);
    handle.run_upkeep();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], handle.render())
}

/// Takes over the registry's own counters, for a scrape.
fn record_registry(registry: &Registry) {
    let loaded = registry.residency();
    gauge!(telemetry::TASKS).set(registry.num_tasks() as f64);
    gauge!(telemetry::LOADED_PROMPTS).set(loaded.versions as f64);
    gauge!(telemetry::LOADED_PROMPT_BYTES).set(loaded.bytes as f64);
    counter!(telemetry::PROMPT_LOADS).absolute(loaded.loads);
    counter!(telemetry::PROMPT_EVICTIONS).absolute(loaded.evictions);
    gauge!(telemetry::STORE_UP).set(if registry.store_away().is_none() { 1.0 } else { 0.0 });
    counter!(telemetry::STORE_FAILURES).absolute(registry.store_failures());
}

/// Takes over the engine's own counters, for a scrape.
fn record_engine(stats: &EngineStats) {
    gauge!(telemetry::READY).set(f64::from(u8::from(stats.ready)));
    gauge!(telemetry::WAITING).set(stats.waiting as f64);
    gauge!(telemetry::RUNNING).set(stats.running as f64);
    gauge!(telemetry::KV_BLOCKS_USED).set(stats.kv_blocks_used as f64);
    gauge!(telemetry::KV_BLOCKS).set(stats.kv_blocks_total as f64);
    gauge!(telemetry::KV_BLOCK_POSITIONS).set(EngineStats::KV_BLOCK_POSITIONS as f64);
    gauge!(telemetry::KV_USAGE).set(stats.kv_usage());
    gauge!(telemetry::KV_BLOCKS_CACHED).set(stats.kv_blocks_cached as f64);
    gauge!(telemetry::ENCODER_POSITIONS_USED).set(stats.encoded_positions as f64);
    gauge!(telemetry::ENCODER_POSITIONS).set(stats.encoded_positions_total as f64);
    gauge!(telemetry::CACHED_PROMPTS).set(stats.cached_prompts as f64);
    gauge!(telemetry::CACHED_PROMPT_BYTES).set(stats.cached_prompt_bytes as f64);
    counter!(telemetry::STEPS).absolute(stats.steps);
    counter!(telemetry::KV_EVICTIONS).absolute(stats.evictions);
    counter!(telemetry::PREEMPTIONS).absolute(stats.preemptions);
    counter!(telemetry::PROMPT_TOKENS).absolute(stats.prompt_tokens);
    counter!(telemetry::CACHED_TOKENS).absolute(stats.cached_tokens);
    counter!(telemetry::GENERATED_TOKENS).absolute(stats.generated_tokens);
    counter!(telemetry::DRAFT_TOKENS).absolute(stats.draft_tokens);
    counter!(telemetry::DRAFT_TOKENS_ACCEPTED).absolute(stats.draft_tokens_accepted);
}
