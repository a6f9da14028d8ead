//! `POST /v1/systemone`: decisions in the form of TypeSafe's client.

use std::{collections::BTreeMap, time::Instant};

use axum::{extract::State, response::Response};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::{
    MAX_QUESTIONS,
    ask::{Asking, Choice, Question},
    wire::{check_options, likeliest, mean_level},
};
use crate::{
    http::{AppState, access::Caller, answered, extract::Json, prepare::Scheduling, problem::Problem},
    prompt::chat::Message,
};

/// Named questions about one state.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"model": "sentiment", "state": "A fine evening.",
    "questions": {"mood": {"type": "choice", "criteria": {"positive": null, "negative": null}}}}))]
pub struct SystemOneRequest {
    /// A task, `task@version`, or the base model's name.
    #[schema(example = "sentiment")]
    pub model: String,
    /// What is asked about: a text; JSON is read as it is written.
    pub state: Value,
    pub questions: BTreeMap<String, SystemOneQuestion>,
    /// Give up after this time. Not in TypeSafe's API.
    #[schema(minimum = 1)]
    pub timeout_ms: Option<u64>,
    /// Lower is sooner. Not in TypeSafe's API.
    #[schema(minimum = -1000, maximum = 1000)]
    pub priority: Option<i32>,
}

/// One question.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
pub enum SystemOneQuestion {
    /// Yes or no.
    Noul {
        /// The task that is asked, if not `model`. Not in TypeSafe's API.
        task: Option<String>,
        instructions: Option<Value>,
        criteria: Option<NoulCriteria>,
    },
    /// One of some names: labels of the task.
    Choice {
        /// The task that is asked, if not `model`. Not in TypeSafe's API.
        task: Option<String>,
        instructions: Option<Value>,
        /// What each name means, or null.
        criteria: Map<String, Value>,
    },
    /// How far it is on a scale of ordered levels: labels of the task.
    Score {
        /// The task that is asked, if not `model`. Not in TypeSafe's API.
        task: Option<String>,
        instructions: Option<Value>,
        /// Each level, from 0 on.
        criteria: Vec<Value>,
    },
}

/// What yes and no mean.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NoulCriteria {
    #[serde(rename = "true")]
    pub yes: Option<Value>,
    #[serde(rename = "false")]
    pub no: Option<Value>,
}

/// The answers by the questions' names.
#[derive(Debug, Serialize, ToSchema)]
pub struct SystemOneResponse {
    pub model: String,
    pub answers: BTreeMap<String, SystemOneAnswer>,
    pub usage: SystemOneUsage,
}

/// The answer to one question.
#[derive(Debug, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum SystemOneAnswer {
    Noul {
        /// The probability of yes.
        noul: f64,
    },
    Choice {
        choice: String,
        confidence: f64,
        probabilities: BTreeMap<String, f64>,
    },
    Score {
        /// The mean of the levels by their probabilities.
        score: f64,
        confidence: f64,
        /// The criteria by their level.
        legend: BTreeMap<usize, Value>,
        probabilities: BTreeMap<usize, f64>,
    },
}

/// Tokens counted.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct SystemOneUsage {
    /// Tokens of all questions' inputs; virtual tokens are not among them.
    pub input_tokens: usize,
    /// Always 0: nothing is generated.
    pub output_tokens: usize,
}

/// Decide, in TypeSafe's form
///
/// The same decisions as `/v1/decisions`, in the form of the `typesafe-sdk` client.
#[utoipa::path(post, path = "/v1/systemone", tag = "generate",
    request_body = SystemOneRequest,
    responses((status = 200, body = SystemOneResponse, description = "The answers by the questions' names")),
    extensions(("x-problems" = json!(["invalid_request", "unknown_label", "no_labels", "input_too_long", "incomplete_body",
        "task_not_found", "version_not_found", "no_active_version", "request_timeout", "body_too_large",
        "unsupported_media_type", "logits_not_finite", "overloaded", "unavailable", "timeout"]))))]
pub async fn create(
    State(app): State<AppState>,
    caller: Caller,
    Json(request): Json<SystemOneRequest>,
) -> Result<Response, Problem> {
    let started = Instant::now();
    let found = request.questions.len();
    if !(1..=MAX_QUESTIONS).contains(&found) {
        return Err(Problem::field("questions", format!("found {found}, expected 1 to {MAX_QUESTIONS}")));
    }
    let scheduling = Scheduling::check(&app, &caller, request.timeout_ms, request.priority)?;
    let questions: Vec<Question> =
        request.questions.iter().map(|(name, question)| question.read(name)).collect::<Result<_, _>>()?;
    let state = [Message { role: "user".to_owned(), content: words(&request.state), name: None }];
    let asking = Asking { app: &app, caller, model: &request.model, scheduling, started };
    let decided = asking.ask(&state, &questions).await?;
    let mut usage = SystemOneUsage::default();
    let mut answers = BTreeMap::new();
    for ((name, question), decided) in request.questions.iter().zip(&decided.answers) {
        usage.input_tokens += decided.usage.prompt_tokens;
        answers.insert(name.clone(), question.answer(&decided.probabilities));
    }
    let response = SystemOneResponse { model: request.model.clone(), answers, usage };
    Ok(answered(&decided.version, axum::Json(response)))
}

/// A text as it is, and anything else as JSON.
fn words(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

impl SystemOneQuestion {
    fn read(&self, name: &str) -> Result<Question, Problem> {
        let at = format!("questions.{}", name.chars().take(80).collect::<String>());
        let text = |value: &Option<Value>| value.as_ref().filter(|value| !value.is_null()).map(words);
        let (task, instructions, options, meanings) = match self {
            Self::Noul { task, instructions, criteria } => {
                let meanings = criteria.as_ref().map_or([None, None], |c| [text(&c.yes), text(&c.no)]);
                (task, instructions, None, meanings)
            }
            Self::Choice { task, instructions, criteria } => {
                let one = |(name, meaning): (&String, &Value)| {
                    let description = Some(meaning).filter(|value| !value.is_null()).map(words);
                    Choice { name: name.clone(), description }
                };
                (task, instructions, Some(criteria.iter().map(one).collect::<Vec<_>>()), [None, None])
            }
            Self::Score { task, instructions, criteria } => {
                let one = |level: &Value| Choice { name: words(level), description: None };
                (task, instructions, Some(criteria.iter().map(one).collect()), [None, None])
            }
        };
        // One alone is allowed: it has all of the probability.
        if let Some(options) = options.as_ref().filter(|options| options.len() != 1) {
            check_options(options.iter().map(|option| &option.name), &format!("{at}.criteria"))?;
        }
        Ok(Question { at, task: task.clone(), instructions: text(instructions), options, meanings })
    }

    fn answer(&self, probabilities: &[f64]) -> SystemOneAnswer {
        let (best, confidence) = likeliest(probabilities);
        match self {
            Self::Noul { .. } => SystemOneAnswer::Noul { noul: probabilities.first().copied().unwrap_or_default() },
            Self::Choice { criteria, .. } => SystemOneAnswer::Choice {
                choice: criteria.keys().nth(best).cloned().unwrap_or_default(),
                confidence,
                probabilities: criteria.keys().cloned().zip(probabilities.iter().copied()).collect(),
            },
            Self::Score { criteria, .. } => SystemOneAnswer::Score {
                score: mean_level(probabilities),
                confidence,
                legend: criteria.iter().cloned().enumerate().collect(),
                probabilities: probabilities.iter().copied().enumerate().collect(),
            },
        }
    }
}
