//! The gate of an upload: a version that answers the upload's examples worse than the active one is stored and not
//! activated. Both are asked on the server's own model, by the routes' own code.

use std::{path::Path, sync::Arc, time::Instant};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    examples::{Dataset, Example},
    http::{
        AppState,
        access::Caller,
        batch::answer_all,
        blocking,
        classify::label_tokens,
        prepare::{self, Parameters, Prepared, Scheduling, Settings},
        problem::{Code, Problem},
        running::{self, Running},
        scoring::{Call, Running as Scoring},
    },
    prompt::{
        Version,
        calibration::Calibration,
        files::EVAL,
        label_scores::{LabelScores, LabelTokens},
    },
    quality::{
        self,
        interval::{Interval, bootstrap},
    },
    registry::RegistryError,
};

/// The most examples of an upload.
const MAX_EXAMPLES: usize = 2000;
/// Samples that differ by less are alike: differences of sums in another order.
const NOTHING: f64 = 1e-12;

/// By what versions are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum GateMetric {
    /// The part of the examples whose likeliest label is right.
    Accuracy,
    /// The mean of the labels' F1.
    MacroF1,
    /// The part of the examples whose answer is the output, outer white space aside.
    ExactMatch,
    /// The mean squared distance of the labels' probabilities from the right answer. Lower is better.
    Brier,
}

/// What the gate found.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(example = json!({"metric": "accuracy", "examples": 200, "score": 0.91, "active_version": "3f9a0c1b2d4e",
    "active_score": 0.94, "difference": -0.03, "interval": [-0.06, 0.0], "worse": 0.97, "passed": false}))]
pub struct GateReport {
    pub metric: GateMetric,
    pub examples: usize,
    /// The score of the version that was uploaded.
    pub score: f64,
    /// The version that it was compared with; absent if none was active, and then any version passes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub active_version: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub active_score: Option<f64>,
    /// How much better the uploaded version is; below 0 it is worse, whichever way the metric counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub difference: Option<f64>,
    /// The 95 % confidence interval of the difference: a paired bootstrap over the examples.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<f64>>)]
    pub interval: Option<Interval>,
    /// The part of the bootstrap's samples in which the uploaded version is worse, 0 to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worse: Option<f64>,
    /// Whether the version may be activated: its score is not below the active version's.
    pub passed: bool,
}

/// What a version makes of one example.
#[derive(Debug, Clone)]
struct Outcome {
    is_right: bool,
    /// The label that was chosen.
    answered: Option<String>,
    brier: f64,
}

/// Compares an uploaded version with the active one of its task.
///
/// # Errors
/// The examples cannot be used, or one of the versions cannot answer one of them.
pub(super) async fn check(
    app: &AppState,
    caller: &Caller,
    metric: GateMetric,
    version: &Arc<Version>,
    eval: Option<Bytes>,
) -> Result<GateReport, Problem> {
    let examples = examples(version, metric, eval)?;
    let registry = Arc::clone(&app.registry);
    let task = version.task.clone();
    let active = blocking(move || match registry.resolve(task.as_str(), None) {
        Ok(active) => Ok(Some(active)),
        Err(RegistryError::TaskNotFound { .. } | RegistryError::NoActiveVersion { .. }) => Ok(None),
        Err(error) => Err(Problem::from(error)),
    })
    .await?;
    let outcomes = answer(app, caller, metric, version, &examples).await?;
    let all: Vec<usize> = (0..examples.len()).collect();
    let expected: Vec<&str> = examples.iter().map(|example| example.label.as_deref().unwrap_or_default()).collect();
    let score = score(metric, &outcomes, &expected, &all);
    let mut report = GateReport {
        metric,
        examples: examples.len(),
        score,
        active_version: None,
        active_score: None,
        difference: None,
        interval: None,
        worse: None,
        passed: true,
    };
    if let Some(active) = active {
        let theirs = match active.digest == version.digest {
            true => outcomes.clone(),
            false => answer(app, caller, metric, &active, &examples).await?,
        };
        compare(&mut report, &outcomes, &theirs, &expected);
        report.active_version = Some(active.digest.id());
    }
    tracing::info!(task = %version.task, version = %version.digest, ?metric, score, active_score = report.active_score,
        passed = report.passed, "compared with the active version");
    Ok(report)
}

/// Fills in how two versions differ on the same examples.
fn compare(report: &mut GateReport, ours: &[Outcome], theirs: &[Outcome], expected: &[&str]) {
    let metric = report.metric;
    let sign = if metric == GateMetric::Brier { -1.0 } else { 1.0 };
    let difference =
        |sample: &[usize]| sign * (score(metric, ours, expected, sample) - score(metric, theirs, expected, sample));
    let all: Vec<usize> = (0..ours.len()).collect();
    let (mut samples, mut worse) = (0u32, 0u32);
    let interval = bootstrap(ours.len(), |sample| {
        let difference = difference(sample);
        samples += 1;
        worse += u32::from(difference < -NOTHING);
        difference
    });
    let total = difference(&all);
    report.active_score = Some(score(metric, theirs, expected, &all));
    report.difference = Some(total);
    report.interval = Some(interval);
    report.worse = Some(f64::from(worse) / f64::from(samples.max(1)));
    report.passed = total >= -NOTHING;
}

/// The score of some of the examples.
fn score(metric: GateMetric, outcomes: &[Outcome], expected: &[&str], sample: &[usize]) -> f64 {
    match metric {
        GateMetric::Accuracy | GateMetric::ExactMatch => {
            quality::mean(sample.iter().map(|&i| f64::from(u8::from(outcomes[i].is_right))))
        }
        GateMetric::Brier => quality::mean(sample.iter().map(|&i| outcomes[i].brier)),
        GateMetric::MacroF1 => {
            let answered: Vec<Option<String>> = sample.iter().map(|&i| outcomes[i].answered.clone()).collect();
            let expected: Vec<String> = sample.iter().map(|&i| expected[i].to_owned()).collect();
            quality::macro_f1(&answered, &expected)
        }
    }
}

/// The upload's examples, each as the metric needs it.
fn examples(version: &Version, metric: GateMetric, eval: Option<Bytes>) -> Result<Vec<Example>, Problem> {
    let refused = |detail: String| Problem::new(Code::InvalidUpload, detail);
    let Some(eval) = eval else {
        let detail = format!(
            "the gate needs examples, and the upload has no {EVAL}: add it to the archive or the form, one JSON object a line, \
             with \"input\" and \"label\" or \"output\""
        );
        return Err(refused(detail));
    };
    if metric != GateMetric::ExactMatch && version.labels.is_none() {
        let detail = format!(
            "the task {} has no labels, and only exact_match compares without: use gate=exact_match, or give it labels in its \
             task.json",
            version.task
        );
        return Err(Problem::new(Code::NoLabels, detail));
    }
    let data = Dataset::parse(Path::new(EVAL), &eval, version.labels.as_ref()).map_err(|e| refused(e.to_string()))?;
    let found = data.examples.len();
    if found > MAX_EXAMPLES {
        return Err(refused(format!("{EVAL} has {found} examples; the maximum is {MAX_EXAMPLES}")));
    }
    let without = data.examples.iter().find(|example| example.label.is_none());
    match without {
        Some(example) if metric != GateMetric::ExactMatch => Err(refused(format!(
            "line {} of {EVAL} has no \"label\", which {metric:?} compares; expected one of the task's labels",
            example.line
        ))),
        _ => Ok(data.examples),
    }
}

/// What a version makes of each example.
async fn answer(
    app: &AppState,
    caller: &Caller,
    metric: GateMetric,
    version: &Arc<Version>,
    examples: &[Example],
) -> Result<Vec<Outcome>, Problem> {
    let started = Instant::now();
    let of_line = |(example, result): (&Example, Result<Outcome, Problem>)| {
        result.map_err(|problem| {
            let detail =
                format!("line {} of {EVAL}, version {}: {}", example.line, version.digest.id(), problem.detail);
            Problem { detail, ..problem }
        })
    };
    let mut scheduling = Scheduling::check(app, caller, None, None)?;
    scheduling.timeout = app.limits.max_request_timeout;
    let results = if metric == GateMetric::ExactMatch {
        let start = |example: Example| async move {
            let parameters = Parameters::default();
            let settings = Settings::check(app, caller, version, &parameters).await?;
            let tokenized = prepare::tokenize(app, version, example.input).await?;
            let mut prepared = settings.prepare(app, caller, Arc::clone(version), tokenized, started)?;
            for request in &mut prepared.requests {
                request.deadline = Some(started + scheduling.timeout);
            }
            let running = running::start(app, &mut prepared)?;
            Ok((example.output, running, prepared))
        };
        answer_all(examples.to_vec(), start, generated).await
    } else {
        let call = Call { caller: caller.clone(), version: Arc::clone(version), scheduling, started };
        let labels = label_tokens(app, version, None)?;
        let calibration = version.spec.calibration.clone().unwrap_or_else(Calibration::none);
        let (call, labels, calibration) = (&call, &labels, &calibration);
        let start = |example: Example| async move {
            let tokenized = call.tokenize(app, example.input).await?;
            let given = tokenized.tokens.len();
            let running = call.start(app, tokenized, given, labels.continuations())?;
            Ok((example.label.unwrap_or_default(), running))
        };
        let finish = |(label, running)| classified(label, running, labels, calibration);
        answer_all(examples.to_vec(), start, finish).await
    };
    examples.iter().zip(results).map(of_line).collect()
}

async fn generated((expected, running, _prepared): (String, Vec<Running>, Prepared)) -> Result<Outcome, Problem> {
    let mut output = String::new();
    for choice in running {
        output = choice.finish().await?.output;
    }
    let is_right = quality::is_exact(&output, &expected);
    Ok(Outcome { is_right, answered: None, brier: f64::from(u8::from(!is_right)) })
}

async fn classified(
    expected: String,
    running: Scoring,
    labels: &LabelTokens,
    calibration: &Calibration,
) -> Result<Outcome, Problem> {
    let scored = running.finish().await?;
    let LabelScores { probabilities, .. } = labels.scores(&scored.log_probs, calibration);
    let answered = probabilities.first().map(|(label, _)| label.clone());
    // A label that the version does not know has no probability.
    let missing = f64::from(u8::from(probabilities.iter().all(|(label, _)| *label != expected)));
    let squared = |(label, p): &(String, f64)| (p - f64::from(u8::from(*label == expected))).powi(2);
    let brier = probabilities.iter().map(squared).sum::<f64>() + missing;
    Ok(Outcome { is_right: answered.as_ref() == Some(&expected), answered, brier })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(answered: &str, expected: &str, p: f64) -> Outcome {
        Outcome { is_right: answered == expected, answered: Some(answered.to_owned()), brier: 2.0 * (1.0 - p).powi(2) }
    }

    fn report(metric: GateMetric, ours: &[Outcome], theirs: &[Outcome], expected: &[&str]) -> GateReport {
        let mut report = GateReport {
            metric,
            examples: ours.len(),
            score: 0.0,
            active_version: None,
            active_score: None,
            difference: None,
            interval: None,
            worse: None,
            passed: true,
        };
        compare(&mut report, ours, theirs, expected);
        report
    }

    #[test]
    fn what_scores_worse_does_not_pass_and_by_how_much_is_said() {
        let expected: Vec<&str> = (0..40).map(|i| if i % 2 == 0 { "a" } else { "b" }).collect();
        let with = |right: usize, p: f64| -> Vec<Outcome> {
            let other = |label: &str| if label == "a" { "b" } else { "a" };
            let one = |(i, label): (usize, &&str)| outcome(if i < right { label } else { other(label) }, label, p);
            expected.iter().enumerate().map(one).collect()
        };
        for metric in [GateMetric::Accuracy, GateMetric::MacroF1] {
            let worse = report(metric, &with(20, 0.9), &with(40, 0.9), &expected);
            assert!(!worse.passed && worse.worse.is_some_and(|part| part > 0.99), "{worse:?}");
            assert!(worse.difference.is_some_and(|d| (d + 0.5).abs() < 0.02), "{worse:?}");
            assert!(worse.interval.is_some_and(|[low, high]| low < -0.5 && high < -0.2), "{worse:?}");
            let better = report(metric, &with(40, 0.9), &with(20, 0.9), &expected);
            assert!(better.passed && better.worse == Some(0.0), "{better:?}");
            assert!(report(metric, &with(30, 0.9), &with(30, 0.9), &expected).passed, "equal is not worse");
        }
        // Lower is better.
        let worse = report(GateMetric::Brier, &with(40, 0.6), &with(40, 0.9), &expected);
        assert!(!worse.passed && worse.difference.is_some_and(|d| (d + 0.3).abs() < 1e-9), "{worse:?}");
    }
}
