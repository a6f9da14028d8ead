//! `softserve eval`: a task on test data, beside the model without a prompt, with an instruction in words and with examples
//! in the context.

mod calibrate;
mod report;

use std::{
    io::{IsTerminal, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, anyhow, bail};
use calibrate::calibrate;
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use report::Report;

use super::{
    model::ModelArgs,
    prompts::{self, DEFAULT_ROOT},
};
use crate::examples::Dataset;
use crate::{
    prompt::{TaskName, Version, labels::Verbalizer},
    tune::{
        evaluate::{self, Column, Evaluation, PromptVariant},
        in_context::{self, Shots},
    },
};

const EXAMPLES: &str = "\
Examples:
  softserve eval --task sentiment --data test.jsonl
  softserve eval --task french --data test.jsonl --instruction \"Translate to French:\"
  softserve eval --task sentiment --data test.jsonl --examples train.jsonl --shots 16
  softserve eval --prompt out/french --data test.jsonl --json > scores.json
  softserve eval --prompt out/sentiment --data held-out.jsonl --calibrate --plot reliability.svg

A task with labels is scored by the label that is generated (accuracy, macro-F1) and by the labels'
probabilities, as /classify gives them: choice accuracy, the Brier score and the expected calibration
error (ECE), of which less is better. Any other task is scored by exact match, word F1 as in SQuAD, and chrF2 and BLEU
as in sacrebleu. In the columns without a learned prompt only the first line of an answer that is
not empty counts, because nothing tells the model when to stop.

In parentheses are 95 % confidence intervals, which say how far the scores of another test set of
the same size may be from these: Wilson's score interval for accuracy, choice accuracy and exact
match, and for the others the percentiles of 1000 bootstrap samples of the examples. ECE has none,
since a sample with repetitions has a larger ECE.";

/// Measure a task on test data: its learned prompt, compared with the model without a prompt, with an
/// instruction in words and with examples in the context.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct EvalArgs {
    /// The task to measure, found under --prompts
    #[arg(long, value_name = "NAME", required_unless_present = "prompt")]
    pub task: Option<TaskName>,

    /// The folder of the prompt to measure, instead of a task's
    #[arg(long, value_name = "DIR", conflicts_with = "task")]
    pub prompt: Option<PathBuf>,

    /// The test examples, in the form that `softserve tune` reads
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,

    #[command(flatten)]
    pub model: ModelArgs,

    /// The folder with the tasks' prompts
    #[arg(long, value_name = "DIR", env = "SOFTSERVE_PROMPTS", default_value = DEFAULT_ROOT)]
    pub prompts: PathBuf,

    /// The instruction of the third column, which is put on a line before the input [default: the task's
    /// description and labels]
    #[arg(long, value_name = "TEXT")]
    pub instruction: Option<String>,

    /// Training examples, in the same form as --data, for one more column: some of them, each with its answer and a line
    /// break, stand before the input in place of a learned prompt. An example that is also in --data is not taken
    #[arg(long, value_name = "FILE")]
    pub examples: Option<PathBuf>,

    /// How many of the --examples stand before each input, as many of each label; fewer where the model's context has
    /// no room for all [default: 8, or one of each label if there are more, at most 32]
    #[arg(long, value_name = "K", requires = "examples")]
    pub shots: Option<usize>,

    /// The seed of the random choice of --examples
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,

    /// The maximum number of tokens in an answer [default: the task's]
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<usize>,

    /// Show the answers of each column to the first N examples
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub show: usize,

    /// Learn a calibration of the label probabilities (temperature and priors) on these examples, which must not be
    /// those of the training, and write it to the task.json of --prompt
    #[arg(long, requires = "prompt", conflicts_with = "task")]
    pub calibrate: bool,

    /// Draw how the tuned prompt's label probabilities agree with the examples (a reliability diagram), as SVG
    #[arg(long, value_name = "FILE")]
    pub plot: Option<PathBuf>,

    /// Print JSON instead of a table
    #[arg(long)]
    pub json: bool,
}

/// Runs the sub-command; writes the scores to `out`.
pub fn run(args: &EvalArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    if args.max_tokens == Some(0) {
        bail!("--max-tokens is 0, expected 1 or more");
    }
    if args.shots == Some(0) {
        bail!("--shots is 0, expected 1 or more; without examples in the context, leave --examples out");
    }
    let (model, tokenizer) = args.model.load()?;
    let model = Arc::new(model);
    let version = match (&args.prompt, &args.task) {
        (Some(folder), _) => prompts::by_folder(folder, &"prompt".parse()?, &model)?,
        (None, Some(task)) => prompts::by_task(&args.prompts, task, &model)?,
        (None, None) => bail!("give --task or --prompt"),
    };
    let labels = if version.spec.labels.is_empty() { None } else { Some(Verbalizer::new(&version.spec.labels)?) };
    let read = |path: &Path| -> anyhow::Result<Dataset> {
        let data = Dataset::read(path, labels.as_ref())?;
        if labels.is_none() && data.labels.is_some() {
            bail!("{} has labels and the task has none in its task.json; use \"output\" instead", path.display());
        }
        Ok(data)
    };
    let data = read(&args.data)?;
    if data.has_one_label() {
        writeln!(std::io::stderr(), "warning: every example has the same label, so the scores tell little")?;
    }
    let shots = match &args.examples {
        Some(path) => {
            let count = args.shots.unwrap_or_else(|| in_context::default_count(version.spec.labels.len()));
            Some(Shots::choose(&version, &tokenizer, &model, &read(path)?, &data, (count, args.seed))?)
        }
        None => None,
    };
    let max_tokens = args.max_tokens.or(version.spec.defaults.max_tokens).unwrap_or(64);
    let evaluation = Evaluation {
        model: &model,
        tokenizer: &tokenizer,
        version: &version,
        labels: labels.as_ref(),
        // A calibration is learned on what the model says by itself.
        calibration: version.spec.calibration.as_ref().filter(|_| !args.calibrate),
        data: &data,
        max_tokens,
    };
    let instruction = args.instruction.clone().or_else(|| evaluate::default_instruction(&version));
    let mut variants = vec![PromptVariant::Learned(&version.prompt), PromptVariant::NoPrompt];
    variants.extend(instruction.as_deref().map(PromptVariant::Instruction));
    variants.extend(shots.as_ref().map(PromptVariant::InContext));

    let bar = bar(variants.len() * data.examples.len());
    let mut columns = Vec::new();
    for (i, variant) in variants.iter().enumerate() {
        let first = i * data.examples.len();
        columns.push(evaluation.column(variant, &mut |done| bar.set_position((first + done) as u64))?);
    }
    bar.finish_and_clear();
    if let Some(path) = &args.plot {
        plot(path, &version, &columns)?;
    }
    let folder = args.prompt.as_deref().filter(|_| args.calibrate);
    let calibrated = folder.map(|folder| calibrate(folder, &columns)).transpose()?;
    let report = Report {
        version: &version,
        data: &data,
        columns: &columns,
        instruction: instruction.as_deref(),
        shots: shots.as_ref().map(|shots| (shots, args.seed)),
    };
    if args.json {
        let mut json = report.json();
        if let Some(calibrated) = &calibrated {
            json["calibration"] = calibrated.json();
        }
        serde_json::to_writer_pretty(&mut *out, &json)?;
        writeln!(out)?;
        return Ok(());
    }
    let name = if args.prompt.is_some() { "the prompt" } else { version.task.as_str() };
    report.write(out, name, args.show)?;
    calibrated.iter().try_for_each(|calibrated| calibrated.write(out))?;
    Ok(())
}

/// Draws the reliability diagram of the tuned prompt.
fn plot(path: &Path, version: &Version, columns: &[Column]) -> anyhow::Result<()> {
    let Some(reliability) = columns.iter().find_map(|column| column.reliability.as_ref()) else {
        bail!("--plot draws label probabilities, and the task has no labels");
    };
    let svg = reliability.plot(version.task.as_str()).map_err(|e| anyhow!("cannot draw {}: {e}", path.display()))?;
    std::fs::write(path, svg).with_context(|| format!("cannot write {}", path.display()))
}

fn bar(len: usize) -> ProgressBar {
    let target =
        if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(Some(len as u64), target);
    if let Ok(style) = ProgressStyle::with_template("    eval {wide_bar:.cyan/dim} {pos}/{len}  {eta}") {
        bar.set_style(style);
    }
    bar
}
