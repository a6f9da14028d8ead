//! OpenAI's API over the same engine: completions, chat completions, decisions, models, files and batches. `model` is a task, `task@version`, or the
//! base model's name, which answers without a learned prompt.
//!
//! Errors under these paths have OpenAI's shape; see [`error`].

pub mod answer;
pub mod batches;
mod chat;
mod completions;
mod decisions;
pub mod error;
pub mod files;
mod logprobs;
mod models;
mod request;
mod run;

use std::sync::Arc;

use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    App, AppState,
    access::Caller,
    problem::{Code, Problem},
};
use crate::prompt::Version;

/// OpenAI's routes that ask the model something, with their places in the specification.
pub fn asking_routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(completions::create))
        .routes(routes!(chat::create))
        .routes(routes!(decisions::create))
        .routes(routes!(decisions::systemone::create))
}

/// OpenAI's other routes.
pub fn other_routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(models::list))
        .routes(routes!(models::retrieve))
        .merge(files::routes())
        .merge(batches::routes())
}

/// What a `model` means: a task's active version, the version after an `@`, or the base model.
async fn resolve(app: &App, caller: &Caller, model: &str) -> Result<Arc<Version>, Problem> {
    match app.version(caller, model, None).await {
        Ok(version) => Ok(version),
        // A task goes first, should a model have its name.
        Err(problem) if model == app.model.name && problem.code != Code::Forbidden => Ok(Arc::clone(&app.base)),
        Err(problem) => {
            let detail = format!("model: {}; the base model is {:?}", problem.detail, app.model.name);
            Err(Problem { detail, ..problem })
        }
    }
}
