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
}

/// Is the process alive
///
/// Answers as long as the process can answer at all.
#[utoipa::path(get, path = "/health/live", tag = "health", security(()),
    responses((status = 200, body = Health, description = "It is", example = json!({"status": "live"}))))]
pub async fn live() -> Json<Health> {
    Json(Health { status: "live" })
}

/// Can it answer requests
///
/// Yes once a real forward pass has run; no again when the server is stopping or its engine has
/// failed.
#[utoipa::path(get, path = "/health/ready", tag = "health", security(()),
    responses((status = 200, body = Health, description = "It can", example = json!({"status": "ready"}))),
    extensions(("x-problems" = json!(["unavailable"]))))]
pub async fn ready(State(app): State<AppState>) -> Result<Json<Health>, Problem> {
    if app.is_ready() {
        Ok(Json(Health { status: "ready" }))
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
}

/// Takes over the engine's own counters, for a scrape.
fn record_engine(stats: &EngineStats) {
    gauge!(telemetry::READY).set(f64::from(u8::from(stats.ready)));
    gauge!(telemetry::WAITING).set(stats.waiting as f64);
    gauge!(telemetry::RUNNING).set(stats.running as f64);
    gauge!(telemetry::KV_BLOCKS_USED).set(stats.kv_blocks_used as f64);
    gauge!(telemetry::KV_BLOCKS).set(stats.kv_blocks_total as f64);
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
