//! What is in a version: the curve of the run that tuned it, and the words that its virtual tokens are nearest to.

use std::sync::Arc;

use axum::{
    extract::State,
    http::header,
    response::{IntoResponse as _, Response},
};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::{
    http::{
        AppState,
        access::Caller,
        blocking,
        extract::{Query, VersionParam},
        problem::{Code, Problem},
    },
    model::neighbours::{Nearest, Neighbours},
    prompt::{LearnedPrompt, TaskName, files::CURVE},
};

/// A picture that somebody uploaded: should a browser show it as a page, nothing in it runs or loads anything.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; sandbox";

/// The most words of a virtual token.
const MAX_COUNT: usize = 20;

/// Show the loss curve of a version
///
/// The picture that `softserve tune` drew of the run, `loss.svg` beside the prompt's files, if it was stored with them.
#[utoipa::path(get, path = "/v1/admin/tasks/{task}/versions/{version}/loss.svg", tag = "admin",
    params(("task" = String, Path, description = "The task's name", example = "sentiment"),
        ("version" = String, Path, description = "The version's id", example = "3f9a0c1b2d4e")),
    responses((status = 200, body = String, content_type = "image/svg+xml", description = "The picture")),
    extensions(("x-problems" = json!(["not_found", "task_not_found", "version_not_found"]))))]
pub(in crate::http) async fn curve(
    State(app): State<AppState>,
    caller: Caller,
    VersionParam { task, version }: VersionParam,
) -> Result<Response, Problem> {
    let registry = Arc::clone(&app.registry);
    let (name, id) = (task.clone(), version.clone());
    let curve = blocking(move || registry.curve(&name, &id).map_err(|error| caller.problem(error))).await?.ok_or_else(|| {
        let detail = format!(
            "version {version} of task {task} has no {CURVE}: softserve tune writes one beside a prompt's files; upload it \
             with them to see it here"
        );
        Problem::new(Code::NotFound, detail)
    })?;
    let headers = [
        (header::CONTENT_TYPE, "image/svg+xml"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    Ok((headers, curve).into_response())
}

/// How many words to list.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct NearestQuery {
    /// The number of words of each virtual token
    #[serde(default = "five")]
    #[param(default = 5, minimum = 1, maximum = 20)]
    pub count: usize,
}

fn five() -> usize {
    5
}

/// The words that a version's virtual tokens are nearest to.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"task": "sentiment", "version": "3f9a0c1b2d4e", "virtual_tokens": [
    {"norm": 1.23, "nearest": [{"id": 42, "text": " good", "similarity": 0.83}]}]}))]
pub struct NearestWords {
    #[schema(value_type = String, example = "sentiment")]
    pub task: TaskName,
    pub version: String,
    /// In the order in which the model reads them.
    pub virtual_tokens: Vec<VirtualToken>,
}

/// A virtual token beside the vocabulary.
#[derive(Debug, Serialize, ToSchema)]
pub struct VirtualToken {
    /// The length of its row as the model reads it.
    #[schema(example = 1.23)]
    pub norm: f32,
    /// The tokens whose embeddings point in the most similar direction, the nearest first.
    pub nearest: Vec<NearWord>,
}

/// A token of the vocabulary beside a virtual token.
#[derive(Debug, Serialize, ToSchema)]
pub struct NearWord {
    #[schema(example = 42)]
    pub id: u32,
    /// Its text; a token that is only a part of a character has U+FFFD here.
    #[schema(example = " good")]
    pub text: String,
    /// The cosine of the angle between the two rows: 1 where they point the same way, 0 where they have nothing to do with
    /// each other.
    #[schema(example = 0.83)]
    pub similarity: f32,
}

/// Compare a version with the vocabulary
///
/// For each virtual token its norm and the words whose embeddings are nearest to it, by cosine similarity. A virtual token
/// that was initialised with a word is often still close to it. Computed anew by each call, between the steps of other
/// requests. Prompts of keys and values have no rows to compare.
#[utoipa::path(get, path = "/v1/admin/tasks/{task}/versions/{version}/nearest", tag = "admin",
    params(("task" = String, Path, description = "The task's name", example = "sentiment"),
        ("version" = String, Path, description = "The version's id", example = "3f9a0c1b2d4e"), NearestQuery),
    responses((status = 200, body = NearestWords, description = "The virtual tokens")),
    extensions(("x-problems" = json!(["invalid_request", "task_not_found", "version_not_found", "unsupported_prompt_type",
        "overloaded", "unavailable", "timeout"]))))]
pub(in crate::http) async fn nearest(
    State(app): State<AppState>,
    caller: Caller,
    VersionParam { task, version }: VersionParam,
    Query(NearestQuery { count }): Query<NearestQuery>,
) -> Result<axum::Json<NearestWords>, Problem> {
    if !(1..=MAX_COUNT).contains(&count) {
        return Err(Problem::field("count", format!("found {count}, expected 1 to {MAX_COUNT}")));
    }
    let version = app.version(&caller, &task, Some(&version)).await?;
    let LearnedPrompt::Embeddings(prompt) = &*version.prompt else {
        let detail = format!(
            "version {} of task {} is a {} prompt: it consists of keys and values of each layer and has no rows that words \
             could be near to; ask for a version with rows of embeddings",
            version.digest.id(),
            version.task,
            version.peft_type.as_str()
        );
        return Err(Problem::new(Code::UnsupportedPromptType, detail));
    };
    let num_tokens = app.model.vocab_size.min(app.tokenizer.vocab_size());
    let neighbours = Neighbours::new(&prompt.rows, num_tokens, count).map_err(Problem::internal)?;
    let found = tokio::time::timeout(app.limits.request_timeout, app.engine.nearest(neighbours)?).await;
    let Nearest { norms, nearest, .. } = match found {
        Ok(Ok(found)) => found.map_err(Problem::internal)?,
        Ok(Err(_)) => return Err(Problem::stopping()),
        Err(_) => return Err(Problem::timeout()),
    };
    let word = |(id, similarity)| NearWord { id, text: app.tokenizer.token_text(id), similarity };
    let token = |(norm, words): (f32, Vec<_>)| VirtualToken { norm, nearest: words.into_iter().map(word).collect() };
    Ok(axum::Json(NearestWords {
        task: version.task.clone(),
        version: version.digest.id(),
        virtual_tokens: norms.into_iter().zip(nearest).map(token).collect(),
    }))
}
