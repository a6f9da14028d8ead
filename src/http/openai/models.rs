//! `GET /v1/models`: the tasks and the base model.

use std::sync::Arc;

use axum::extract::{Path, State, rejection::PathRejection};
use serde::Serialize;
use utoipa::ToSchema;

use super::resolve;
use crate::{
    http::{
        App, AppState,
        access::Caller,
        blocking,
        extract::{NameRange, Query},
        problem::Problem,
    },
    prompt::Version,
};

/// What can be named as `model`.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = OpenAiModels)]
pub struct Models {
    pub object: &'static str,
    pub data: Vec<Model>,
    /// Whether there are more after these.
    pub has_more: bool,
}

/// A task, or the base model.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = OpenAiModel)]
pub struct Model {
    /// What a request names as `model`.
    #[schema(example = "sentiment")]
    pub id: String,
    pub object: &'static str,
    /// Always 0: versions have no date.
    pub created: u64,
    pub owned_by: &'static str,
    /// The version that answers; of the base model its own name.
    #[schema(example = "3f9a0c1b2d4e")]
    pub root: String,
    /// The base model of a task; null for the base model itself.
    pub parent: Option<String>,
    /// The most positions of one sequence.
    pub max_model_len: usize,
}

impl Model {
    fn new(app: &App, id: String, version: &Version) -> Self {
        let is_base = version.learned_prompt().is_none();
        Self {
            id,
            object: "model",
            created: 0,
            owned_by: "softserve",
            root: if is_base { app.model.name.clone() } else { version.digest.id() },
            parent: (!is_base).then(|| app.model.name.clone()),
            max_model_len: app.engine.max_sequence(),
        }
    }
}

/// List the models
///
/// OpenAI's list: each task with an active version, and the base model.
#[utoipa::path(get, path = "/v1/models", tag = "openai",
    params(NameRange),
    responses((status = 200, body = Models, description = "The tasks by name; the base model ends the first page")),
    extensions(("x-problems" = json!(["invalid_request"]))))]
pub async fn list(
    State(app): State<AppState>,
    caller: Caller,
    Query(range): Query<NameRange>,
) -> Result<axum::Json<Models>, Problem> {
    let (limit, is_first) = (range.limit()?, range.after.is_none());
    let registry = Arc::clone(&app.registry);
    let sees_base = caller.check_task(&app.model.name).is_ok();
    let listed = move || registry.active_page(range.after.as_deref(), limit, |task| caller.sees(task));
    let page = blocking(move || Ok::<_, Problem>(listed())).await?;
    let (active, has_more) = (page.items, page.next.is_some());
    let tasks = active.iter().map(|version| Model::new(&app, version.task.to_string(), version));
    let has_its_name = active.iter().any(|version| version.task.as_str() == app.model.name);
    let base = (!has_its_name && is_first && sees_base).then(|| Model::new(&app, app.model.name.clone(), &app.base));
    Ok(axum::Json(Models { object: "list", data: tasks.chain(base).collect(), has_more }))
}

/// Show a model
///
/// A task, `task@version`, or the base model.
#[utoipa::path(get, path = "/v1/models/{model}", tag = "openai",
    params(("model" = String, Path, description = "A task, task@version, or the base model's name", example = "sentiment")),
    responses((status = 200, body = Model, description = "The model")),
    extensions(("x-problems" = json!(["task_not_found", "version_not_found", "no_active_version"]))))]
pub async fn retrieve(
    State(app): State<AppState>,
    caller: Caller,
    model: Result<Path<String>, PathRejection>,
) -> Result<axum::Json<Model>, Problem> {
    let Path(model) = model.map_err(|error| Problem::field("model", error.body_text()))?;
    let version = resolve(&app, &caller, &model).await?;
    Ok(axum::Json(Model::new(&app, model, &version)))
}
