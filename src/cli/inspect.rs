//! `softserve inspect`: what a prompt's files hold, and whether a model would accept them.

mod report;
mod subject;
mod vocabulary;

use std::{io::Write, path::PathBuf, sync::Arc};

use anyhow::bail;
use clap::Args;

use super::model::ModelArgs;
use crate::{
    demo,
    model::Model,
    packing::InputToken,
    prompt::format,
    tune::{TuneError, inference::Inference, job},
};
use report::{ModelReport, Report};
use subject::Subject;
use vocabulary::Vocabulary;

const EXAMPLES: &str = "\
Examples:
  softserve inspect prompts/sentiment
  softserve inspect my-peft-folder --model ./Llama-3.2-1B
  softserve inspect prompt.npy --model org/model --nearest 5
  softserve inspect story.zip --json | jq .model.faults

The norm of a virtual token is compared with those of the vocabulary: a prompt whose norms are
far above them was tuned with a high learning rate, or on another model. The nearest tokens are
those with the highest cosine similarity, which is at most 1. A virtual token that was initialised
with a word is often still close to it; otherwise the nearest tokens are far away and say little.

The exit code is 0 if the model would accept the prompt; otherwise it is 1 and every reason is
shown. Without --model the prompt is checked against the demo model if it names that one, and
otherwise only for what no model accepts.";

/// Show what a learned prompt contains, and whether a model would accept it.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct InspectArgs {
    /// A PEFT directory or an archive of one, a task's folder of a server, a .safetensors file, or any
    /// file that `softserve convert` reads
    #[arg(value_name = "FILE|DIR|TASK-FOLDER")]
    path: PathBuf,

    /// The name of the tensor that is the prompt, if a file of another program has several; for a .nemo
    /// archive, the name of the task
    #[arg(long, value_name = "NAME")]
    tensor: Option<String>,

    #[command(flatten)]
    model: ModelArgs,

    /// The number of nearest tokens to show for each virtual token
    #[arg(long, value_name = "N", default_value_t = 3)]
    nearest: usize,

    /// Print JSON instead of tables
    #[arg(long)]
    json: bool,
}

/// Runs the sub-command; writes what it found to `out`.
pub fn run(args: &InspectArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let subject = Subject::open(&args.path, args.tensor.clone())?;
    let mut report = Report::new(&args.path, &subject);
    let named_demo = report.base_models().any(|name| name.ends_with(demo::MODEL_NAME));
    if args.model.model.is_some() || args.model.random_weights.is_some() || named_demo {
        let (model, tokenizer) = args.model.load()?;
        let model = Arc::new(model);
        report.model = Some(judge(&subject, &model)?);
        if let Some(rows) = subject.rows().filter(|rows| rows.columns == model.info().hidden_size) {
            let vocabulary = Vocabulary::of(&model, &tokenizer, &rows, args.nearest)?;
            report.compare(&vocabulary, &tokenizer);
        }
    }
    match args.json {
        true => writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?,
        false => report.write(out)?,
    }
    let (whose, faults) = match &report.model {
        Some(model) => (model.name.as_str(), &model.faults),
        None => ("any model", &report.faults),
    };
    match faults.len() {
        0 => Ok(()),
        1 => bail!("{whose} would refuse {}: 1 fault", args.path.display()),
        n => bail!("{whose} would refuse {}: {n} faults", args.path.display()),
    }
}

/// What `serve` would say with this model.
fn judge(subject: &Subject, model: &Arc<Model>) -> anyhow::Result<ModelReport> {
    let info = model.info();
    let read = subject.task_name().map(|task| format::read(task, &subject.files, &job::fit(model)));
    let (mut faults, warnings) = match &read {
        Some(Ok(version)) => (Vec::new(), version.warnings.clone()),
        Some(Err(faults)) => (faults.0.iter().map(|fault| fault.detail.clone()).collect(), Vec::new()),
        None => (Vec::new(), Vec::new()),
    };
    if let Some(Ok(version)) = &read {
        // Values that are finite can still overflow on their way through the model.
        let input = vec![InputToken::Vocab(0)];
        let tried = Inference::start(model, Some(&version.prompt), 1, 1)
            .and_then(|inference| inference.greedy(&[input], 1, None, &mut |_| ()));
        match tried {
            Ok(_) => {}
            Err(error @ TuneError::NotFinite) => faults.push(error.to_string()),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(ModelReport {
        name: info.name.clone(),
        fingerprint: info.fingerprint.clone(),
        hidden_size: info.hidden_size,
        takes: faults.is_empty(),
        faults,
        warnings,
        vocabulary: None,
    })
}
