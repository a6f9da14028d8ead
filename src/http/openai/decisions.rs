//! `POST /v1/decisions`: OpenAI's typed decisions, several questions about one input; and the same in the form of
//! TypeSafe's client, `POST /v1/systemone`.

mod ask;
pub mod systemone;
mod wire;

use std::time::Instant;

use axum::{extract::State, response::Response};

use crate::http::{AppState, access::Caller, answered, extract::Json, prepare::Scheduling, problem::Problem};
use ask::{Asking, Question};
use wire::{Answer, Decision, DecisionRequest, Usage};

/// The most questions of one call.
const MAX_QUESTIONS: usize = 400;

/// Decide
///
/// OpenAI's typed decisions: probabilities for questions about one input. Where `model`, or a question's own `task`, is a task, its
/// learned prompt is the instruction and its labels are the choices; the base model is asked in words and letters. All
/// questions are computed together, and the same question gives the same numbers, bit for bit, whatever else is asked.
#[utoipa::path(post, path = "/v1/decisions", tag = "openai",
    request_body = DecisionRequest,
    responses((status = 200, body = Decision, description = "The answers in the order of the questions")),
    extensions(("x-problems" = json!(["invalid_request", "unknown_label", "no_labels", "input_too_long", "incomplete_body",
        "task_not_found", "version_not_found", "no_active_version", "request_timeout", "body_too_large",
        "unsupported_media_type", "logits_not_finite", "overloaded", "unavailable", "timeout"]))))]
pub async fn create(
    State(app): State<AppState>,
    caller: Caller,
    Json(request): Json<DecisionRequest>,
) -> Result<Response, Problem> {
    let started = Instant::now();
    let found = request.questions.len();
    if !(1..=MAX_QUESTIONS).contains(&found) {
        return Err(Problem::field("questions", format!("found {found}, expected 1 to {MAX_QUESTIONS}")));
    }
    let scheduling = Scheduling::check(&app, &caller, request.timeout_ms, request.priority)?;
    let messages = request.input.messages()?;
    let questions: Vec<Question> = request
        .questions
        .iter()
        .enumerate()
        .map(|(i, question)| question.read(&format!("questions[{i}]")))
        .collect::<Result<_, _>>()?;
    let asking = Asking { app: &app, caller, model: &request.model, scheduling, started };
    let decided = asking.ask(&messages, &questions).await?;
    let mut usage = Usage::default();
    let mut answers = Vec::with_capacity(found);
    for (question, decided) in request.questions.iter().zip(&decided.answers) {
        usage.add(&decided.usage);
        answers.push(Answer::new(question, &decided.probabilities));
    }
    let decision = Decision { object: "decision", model: request.model.clone(), answers, usage };
    Ok(answered(&decided.version, axum::Json(decision)))
}
