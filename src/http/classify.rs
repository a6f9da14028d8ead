//! Classifying inputs by a task's labels, and scoring texts.

use axum::{extract::State, response::Response};

use super::{
    App, AppState,
    access::Caller,
    answered,
    batch::{answer_all, item},
    extract::{Json, RequestId, TaskParam},
    problem::{Code, Problem},
    scoring::{self, Call, Scored},
    types::{
        ClassifyRequest, ClassifyResponse, LabelProbability, OneOrSeveral, ScoreRequest, ScoreResponse, ScoredText,
        ScoredToken,
    },
};
use crate::{
    packing::text_ids,
    prompt::{
        Version,
        calibration::Calibration,
        label_scores::{LabelScores, LabelTokens, NoTokens},
        template::Input,
    },
    tokenizer::TokenizerError,
};

/// The most inputs of one call.
const MAX_INPUTS: usize = 256;

/// Classify
///
/// Gives each of the task's labels its probability: that of its whole word and of the answer's end after it, by one
/// forward pass over the learned prompt, the input and all labels. The same input gives the same numbers, bit for bit,
/// whatever else the server computes. With `inputs` the answer has a list, and an input that is wrong does not keep the
/// others from their answers.
#[utoipa::path(post, path = "/v1/tasks/{task}/classify", tag = "generate",
    params(("task" = String, Path, description = "The task's name", example = "sentiment")),
    request_body = ClassifyRequest,
    responses((status = 200, body = OneOrSeveral<ClassifyResponse>, description = "The label, or a list of them for a list of inputs")),
    extensions(("x-problems" = json!(["invalid_request", "unknown_label", "no_labels", "input_too_long",
        "incomplete_body", "task_not_found", "version_not_found", "no_active_version", "request_timeout",
        "body_too_large", "unsupported_media_type", "logits_not_finite", "overloaded", "unavailable", "timeout"]))))]
pub async fn classify(
    State(app): State<AppState>,
    TaskParam(task): TaskParam,
    RequestId(request_id): RequestId,
    caller: Caller,
    Json(request): Json<ClassifyRequest>,
) -> Result<Response, Problem> {
    let scheduling = (request.timeout_ms, request.priority);
    let call = Call::new(&app, caller, &task, request.version.as_deref(), scheduling).await?;
    if let Some(found) = request.abstain_below.filter(|x| !(0.0..=1.0).contains(x)) {
        return Err(Problem::field("abstain_below", format!("found {found}, expected 0 to 1")));
    }
    let labels = label_tokens(&app, &call.version, request.labels.as_deref())?;
    let (inputs, is_list) = scoring::inputs(request.input, request.inputs, MAX_INPUTS)?;
    let calibration = call.version.spec.calibration.clone().filter(|_| request.calibrate.unwrap_or(true));
    let calibration = calibration.unwrap_or_else(Calibration::none);
    let continuations = labels.continuations();
    let start = |input: Input| async {
        let tokenized = call.tokenize(&app, input).await?;
        let given = tokenized.tokens.len();
        call.start(&app, tokenized, given, continuations.clone())
    };
    let answer = |scored| classified(scored, &labels, &calibration, request.abstain_below.unwrap_or(0.0));
    let scored = answer_all(inputs, start, scoring::Running::finish).await;
    reply(&call.version, &request_id, is_list, scored.into_iter().map(|scored| scored.and_then(answer)))
}

/// Score texts
///
/// The log-probability of each token of texts that may follow the input, or of the input itself. All texts are computed
/// in one forward pass, what they have in common once.
#[utoipa::path(post, path = "/v1/tasks/{task}/score", tag = "generate",
    params(("task" = String, Path, description = "The task's name", example = "sentiment")),
    request_body = ScoreRequest,
    responses((status = 200, body = OneOrSeveral<ScoreResponse>, description = "The scores, or a list of them for a list of inputs")),
    extensions(("x-problems" = json!(["invalid_request", "input_too_long", "incomplete_body", "task_not_found",
        "version_not_found", "no_active_version", "request_timeout", "body_too_large", "unsupported_media_type",
        "logits_not_finite", "overloaded", "unavailable", "timeout"]))))]
pub async fn score(
    State(app): State<AppState>,
    TaskParam(task): TaskParam,
    RequestId(request_id): RequestId,
    caller: Caller,
    Json(request): Json<ScoreRequest>,
) -> Result<Response, Problem> {
    let scheduling = (request.timeout_ms, request.priority);
    let call = Call::new(&app, caller, &task, request.version.as_deref(), scheduling).await?;
    let (inputs, is_list) = scoring::inputs(request.input, request.inputs, MAX_INPUTS)?;
    let texts = request.continuations;
    let continuations = texts.as_deref().map(|texts| continuations(&app, texts)).transpose()?;
    let start = |input: Input| async {
        let tokenized = call.tokenize(&app, input).await?;
        match &continuations {
            Some(continuations) => {
                let given = tokenized.tokens.len();
                call.start(&app, tokenized, given, continuations.clone())
            }
            None if app.model.encoder.is_some() => {
                let detail = "found none, expected at least one: what goes into an encoder has no log-probabilities";
                Err(Problem::field("continuations", detail))
            }
            None => {
                let given = tokenized.num_given(&call.version);
                let own = text_ids(tokenized.tokens.get(given..).unwrap_or_default());
                if own.is_empty() {
                    let found = tokenized.text_len();
                    let detail = format!("found {found} tokens, expected at least one that another comes before");
                    return Err(Problem::field("input", detail));
                }
                call.start(&app, tokenized, given, vec![own])
            }
        }
    };
    let answer = |scored| scores(&app, scored, texts.as_deref().zip(continuations.as_deref()));
    let scored = answer_all(inputs, start, scoring::Running::finish).await;
    reply(&call.version, &request_id, is_list, scored.into_iter().map(|scored| scored.and_then(answer)))
}

/// One answer, or a list of answers and problems.
fn reply<T: serde::Serialize>(
    version: &Version,
    request_id: &str,
    is_list: bool,
    mut results: impl Iterator<Item = Result<T, Problem>>,
) -> Result<Response, Problem> {
    let answer = match is_list {
        true => OneOrSeveral::Several { results: results.map(|result| item(result, request_id)).collect() },
        false => match results.next() {
            Some(one) => OneOrSeveral::One(Box::new(one?)),
            None => return Err(Problem::internal("a call without inputs")),
        },
    };
    Ok(answered(version, axum::Json(answer)))
}

/// The sequences of a version's labels, or of some of them.
pub fn label_tokens(app: &App, version: &Version, names: Option<&[String]>) -> Result<LabelTokens, Problem> {
    let Some(labels) = &version.labels else {
        let detail = format!(
            "the task {} has no labels: give it some with \"labels\" in its task.json, or ask it with /generate",
            version.task
        );
        return Err(Problem::new(Code::NoLabels, detail));
    };
    let all = match version.label_tokens.get() {
        Some(all) => all,
        None => {
            let tokens = |text: &str| app.tokenizer.tokenize_continuation(text);
            let stops = version.spec.defaults.stop.iter().flatten().map(|stop| tokens(stop));
            let mut ends = stops.collect::<Result<Vec<_>, _>>()?;
            ends.extend(app.model.eos_token_ids.iter().map(|&id| vec![id]));
            let all = LabelTokens::new(labels, &ends, |word| tokens(word).map_err(LabelProblem::from))?;
            version.label_tokens.get_or_init(|| all)
        }
    };
    match names {
        None => Ok(all.clone()),
        Some([]) => Err(Problem::field("labels", "found none, expected at least one of the task's labels")),
        Some(names) => all.of(names).map_err(|name| {
            let name: String = name.chars().take(80).collect();
            let known: Vec<&str> = all.names().collect();
            let detail = format!(
                "labels: found {name:?}, which is not one of the task's labels; they are: {}",
                known.join(", ")
            );
            Problem::new(Code::UnknownLabel, detail)
        }),
    }
}

/// Why a label has no tokens.
struct LabelProblem(Problem);

impl From<NoTokens> for LabelProblem {
    fn from(error: NoTokens) -> Self {
        Self(Problem::new(Code::NoLabels, format!("{error}: change its words in task.json")))
    }
}

impl From<TokenizerError> for LabelProblem {
    fn from(error: TokenizerError) -> Self {
        Self(error.into())
    }
}

impl From<LabelProblem> for Problem {
    fn from(error: LabelProblem) -> Self {
        error.0
    }
}

fn classified(
    scored: Scored,
    labels: &LabelTokens,
    calibration: &Calibration,
    abstain_below: f64,
) -> Result<ClassifyResponse, Problem> {
    let LabelScores { probabilities, mass } = labels.scores(&scored.log_probs, calibration);
    let Some((label, confidence)) = probabilities.first().cloned() else {
        return Err(Problem::internal("a task without labels was classified by"));
    };
    let one = |(label, probability)| LabelProbability { label, probability };
    Ok(ClassifyResponse {
        id: uuid::Uuid::now_v7().to_string(),
        task: scored.version.task.clone(),
        version: scored.version.digest.id(),
        label,
        confidence,
        abstained: confidence < abstain_below,
        probabilities: probabilities.into_iter().map(one).collect(),
        label_mass: mass,
        usage: scored.usage,
    })
}

fn continuations(app: &App, texts: &[String]) -> Result<Vec<Vec<u32>>, Problem> {
    if texts.is_empty() {
        return Err(Problem::field("continuations", "found none, expected at least one text"));
    }
    let ids = |(i, text): (usize, &String)| match app.tokenizer.tokenize_continuation(text)? {
        ids if ids.is_empty() => {
            Err(Problem::field(&format!("continuations[{i}]"), "found a text without tokens, expected at least one"))
        }
        ids => Ok(ids),
    };
    texts.iter().enumerate().map(ids).collect()
}

/// The answer for one input, whose continuations are given as texts and as ids, or which was scored itself.
fn scores(app: &App, scored: Scored, of: Option<(&[String], &[Vec<u32>])>) -> Result<ScoreResponse, Problem> {
    let text = |text: String, ids: &[u32], log_probs: &[f32]| {
        let unknown = ids.len() - log_probs.len();
        let log_prob = |i: usize| i.checked_sub(unknown).and_then(|i| log_probs.get(i).copied());
        let token =
            |(i, &id): (usize, &u32)| ScoredToken { id, text: app.tokenizer.token_text(id), logprob: log_prob(i) };
        let logprob = log_probs.iter().map(|&x| f64::from(x)).sum();
        ScoredText { text, logprob, tokens: ids.iter().enumerate().map(token).collect() }
    };
    let scores = match of {
        Some((texts, ids)) => {
            let all = texts.iter().zip(ids).zip(&scored.log_probs);
            all.map(|((words, ids), log_probs)| text(words.clone(), ids, log_probs)).collect()
        }
        None => {
            let log_probs = scored.log_probs.first().map(Vec::as_slice).unwrap_or_default();
            vec![text(app.tokenizer.decode(&scored.ids)?, &scored.ids, log_probs)]
        }
    };
    Ok(ScoreResponse {
        id: uuid::Uuid::now_v7().to_string(),
        task: scored.version.task.clone(),
        version: scored.version.digest.id(),
        scores,
        usage: scored.usage,
    })
}
