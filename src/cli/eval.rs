//! `softserve eval`: a task on test data, beside the model without a prompt and with an instruction in words.

mod calibrate;

use std::{
    io::{IsTerminal, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, anyhow, bail};
use calibrate::{Calibrated, calibrate};
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use super::{
    model::ModelArgs,
    prompts::{self, DEFAULT_ROOT},
};
use crate::{
    prompt::{TaskName, Version, labels::Verbalizer},
    tune::{
        data::Dataset,
        evaluate::{self, Column, Evaluation, NO_LABEL, PromptVariant},
    },
};

const EXAMPLES: &str = "\
Examples:
  softserve eval --task sentiment --data test.jsonl
  softserve eval --task french --data test.jsonl --instruction \"Translate to French:\"
  softserve eval --prompt out/french --data test.jsonl --json > scores.json
  softserve eval --prompt out/sentiment --data held-out.jsonl --calibrate --plot reliability.svg

A task with labels is scored by the label that is generated (accuracy, macro-F1) and by the labels'
probabilities, as /classify gives them: choice accuracy, the Brier score and the expected calibration
error (ECE), of which less is better. Any other task is scored by exact match, word F1 as in SQuAD, and chrF2 and BLEU
as in sacrebleu. In the columns without a learned prompt only the first line of an answer that is
not empty counts, because nothing tells the model when to stop.";

/// Measure a task on test data: its learned prompt, compared with the model without a prompt and with
/// an instruction in words.
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
    let (model, tokenizer) = args.model.load()?;
    let model = Arc::new(model);
    let version = match (&args.prompt, &args.task) {
        (Some(folder), _) => prompts::by_folder(folder, &"prompt".parse()?, &model)?,
        (None, Some(task)) => prompts::by_task(&args.prompts, task, &model)?,
        (None, None) => bail!("give --task or --prompt"),
    };
    let labels = if version.spec.labels.is_empty() { None } else { Some(Verbalizer::new(&version.spec.labels)?) };
    let data = Dataset::read(&args.data, labels.as_ref())?;
    if data.has_one_label() {
        writeln!(std::io::stderr(), "warning: every example has the same label, so the scores tell little")?;
    }
    if labels.is_none() && data.labels.is_some() {
        bail!("{} has labels and the task has none in its task.json; use \"output\" instead", args.data.display());
    }
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
    match args.json {
        true => write_json(out, &version, &data, &columns, instruction.as_deref(), calibrated.as_ref()),
        false => {
            write_table(out, args, &version, &data, &columns, instruction.as_deref())?;
            calibrated.iter().try_for_each(|calibrated| calibrated.write(out))?;
            Ok(())
        }
    }
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

fn write_json(
    out: &mut dyn Write,
    version: &Version,
    data: &Dataset,
    columns: &[Column],
    instruction: Option<&str>,
    calibrated: Option<&Calibrated>,
) -> anyhow::Result<()> {
    let mut report = json!({
        "task": version.task,
        "version": version.digest.id(),
        "examples": data.examples.len(),
        "instruction": instruction,
        "columns": columns,
    });
    if let Some(calibrated) = calibrated {
        report["calibration"] = calibrated.json();
    }
    serde_json::to_writer_pretty(&mut *out, &report)?;
    writeln!(out)?;
    Ok(())
}

/// How a metric is shown.
#[derive(Clone, Copy)]
enum Shown {
    Percent,
    Decimals(usize),
}

/// The metrics in the order they are shown.
const ROWS: [(&str, &str, Shown); 9] = [
    ("accuracy", "accuracy", Shown::Percent),
    ("macro_f1", "macro-F1", Shown::Percent),
    ("choice_accuracy", "choice accuracy", Shown::Percent),
    ("brier", "Brier score", Shown::Decimals(4)),
    ("ece", "ECE", Shown::Decimals(4)),
    ("exact_match", "exact match", Shown::Percent),
    ("token_f1", "word F1", Shown::Percent),
    ("chrf", "chrF2", Shown::Decimals(1)),
    ("bleu", "BLEU", Shown::Decimals(1)),
];

fn write_table(
    out: &mut dyn Write,
    args: &EvalArgs,
    version: &Version,
    data: &Dataset,
    columns: &[Column],
    instruction: Option<&str>,
) -> anyhow::Result<()> {
    let title = |column: &Column| match column.name {
        "tuned" => "tuned prompt",
        "no_prompt" => "no prompt",
        _ => "text prompt",
    };
    let name = if args.prompt.is_some() { "the prompt" } else { version.task.as_str() };
    writeln!(out, "{name} (version {}) on {} examples\n", version.digest, data.examples.len())?;
    write!(out, "  {:<16}", "")?;
    columns.iter().try_for_each(|c| write!(out, " {:>13}", title(c)))?;
    writeln!(out)?;
    for (key, name, shown) in ROWS.iter().filter(|row| columns.iter().any(|c| c.metrics.contains_key(row.0))) {
        write!(out, "  {name:<16}")?;
        for column in columns {
            let value = column.metrics.get(key).copied().unwrap_or_default();
            match shown {
                Shown::Percent => write!(out, " {:>12.1}%", 100.0 * value)?,
                Shown::Decimals(decimals) => write!(out, " {value:>13.decimals$}")?,
            }
        }
        writeln!(out)?;
    }
    if let Some(confusion) = columns.first().and_then(|c| c.confusion.as_ref()) {
        write_confusion(out, confusion)?;
    }
    for (i, example) in data.examples.iter().take(args.show).enumerate() {
        writeln!(out, "\nline {}, expected {:?}", example.line, example.output)?;
        columns.iter().try_for_each(|c| writeln!(out, "  {:<13} {:?}", title(c), c.outputs[i]))?;
    }
    match instruction {
        Some(text) => {
            writeln!(out, "\ntext prompt: {text:?}; without a learned prompt, the first line of an answer counts")?
        }
        None => writeln!(
            out,
            "\nwithout a learned prompt, the first line of an answer counts; to compare with a text prompt, set --instruction"
        )?,
    }
    Ok(())
}

/// The most labels whose confusion is printed; more do not fit a screen.
const MAX_SHOWN_LABELS: usize = 12;

fn write_confusion(
    out: &mut dyn Write,
    confusion: &std::collections::BTreeMap<String, std::collections::BTreeMap<String, usize>>,
) -> std::io::Result<()> {
    let mut names: Vec<&str> =
        confusion.iter().flat_map(|(l, row)| row.keys().chain([l])).map(String::as_str).collect();
    names.sort_by_key(|name| (*name == NO_LABEL, *name));
    names.dedup();
    if names.len() > MAX_SHOWN_LABELS {
        return Ok(());
    }
    let width = names.iter().map(|n| n.chars().count()).max().unwrap_or(0).max(8);
    writeln!(out, "\n  expected (rows) and answered (columns) with the tuned prompt")?;
    write!(out, "  {:<width$}", "")?;
    names.iter().try_for_each(|name| write!(out, "  {name:>width$}"))?;
    writeln!(out)?;
    for (label, row) in confusion {
        write!(out, "  {label:<width$}")?;
        names.iter().try_for_each(|name| write!(out, "  {:>width$}", row.get(*name).copied().unwrap_or(0)))?;
        writeln!(out)?;
    }
    Ok(())
}
