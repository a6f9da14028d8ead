//! `softserve convert`: a prompt that another program wrote becomes a PEFT directory.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use clap::Args;

use crate::{
    convert::{
        self, ConvertError, Converted, Foreign, Target, TaskType, peft,
        tensor::{RawTensor, Summary},
    },
    prompt::TaskName,
};

const EXAMPLES: &str = "\
Examples:
  softserve convert prompt.npy --out prompts/story
  softserve convert story.zip --out prompts/story              # KoboldAI
  softserve convert store/story/decoder.pt --out prompts/story # TGIS
  softserve convert my-peft-folder --out prompts/story         # PEFT with adapter_model.bin
  softserve convert weights.safetensors --tensor soft_prompt --out prompts/story
  softserve convert tasks.nemo --tensor sentiment --out prompts/sentiment

The formats are: safetensors; NumPy .npy and .npz (f2, f4, f8, and V2 for bf16); KoboldAI zips and
mkultra JSON; files of torch.save (.pt, .bin) and pickles of tensors; NeMo p-tuning archives. A torch
file is a Python pickle. softserve reads it with an interpreter that can build tensors and nothing
else: no code in the file runs, and a file that needs anything else is refused.

The tensors are: one matrix of any name, or a list of rows; a P-tuning or prefix network with its
weights (MLP, LSTM, projection), of which the rows are computed; a prefix table of P-tuning v2 or
ChatGLM; a cartridge of HazyResearch or torchtitan. A file with tensors that are not understood is
refused, unless --tensor names the one that is the prompt.

Values keep their number format; computed ones are F32. Without --base-model the result does not
name the model that it was tuned on, and only the shapes can tell whether a model fits.";

/// Convert a prompt of another program into a PEFT directory, which serve, push and PEFT read.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct ConvertArgs {
    /// The file, or a folder with adapter_model.bin, decoder.pt or encoder.pt
    #[arg(value_name = "INPUT")]
    input: PathBuf,

    /// The folder to write. It must be empty or not exist yet
    #[arg(long, value_name = "DIR")]
    out: PathBuf,

    /// The name of the tensor that is the prompt, if the file has several; for a .nemo archive, the name
    /// of the task
    #[arg(long, value_name = "NAME")]
    tensor: Option<String>,

    /// The model that the prompt was tuned on, a folder or a hub id, for adapter_config.json
    #[arg(long, value_name = "NAME")]
    base_model: Option<String>,

    /// The kind of model that the prompt is for [default: CAUSAL_LM]
    #[arg(long, value_name = "TYPE")]
    task_type: Option<TaskType>,
}

/// Runs the sub-command; says on `out` what was found and where it went.
pub fn run(args: &ConvertArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    peft::check_free(&args.out).map_err(explain)?;
    let foreign = convert::open(&args.input, convert::MAX_BYTES).map_err(explain)?;
    let target = Target {
        tensor: args.tensor.clone(),
        base_model: args.base_model.clone(),
        task_type: args.task_type,
        default_task_type: Some(TaskType::default()),
    };
    let converted = foreign.to_peft(&target).map_err(explain)?;
    peft::write(&converted.files, &args.out).map_err(explain)?;
    report(out, args, &foreign, &converted)?;
    Ok(())
}

/// The error with what can be typed against it.
pub fn explain(error: ConvertError) -> anyhow::Error {
    let advice = match &error {
        ConvertError::Ambiguous { .. } => "name the right one with --tensor".to_owned(),
        ConvertError::Described => "leave out --tensor, --base-model and --task-type".to_owned(),
        ConvertError::AlreadyPeft { path } => format!("upload it: softserve push {} --task NAME", path.display()),
        ConvertError::Exists { .. } => "choose another --out, or remove the folder first".to_owned(),
        _ => return error.into(),
    };
    anyhow::anyhow!("{error}; {advice}")
}

fn report(out: &mut dyn Write, args: &ConvertArgs, foreign: &Foreign, converted: &Converted) -> std::io::Result<()> {
    writeln!(out, "{}: {}", args.input.display(), foreign.format.name())?;
    for tensor in &converted.tensors {
        writeln!(out, "  tensor       {}", tensor.describe())?;
    }
    if let Some(norms) = norms(&converted.tensors) {
        writeln!(out, "  norms        mean {:.3}, from {:.3} to {:.3}", norms.mean, norms.min, norms.max)?;
    }
    for note in foreign.notes.iter().chain(&converted.notes).chain(&converted.warnings) {
        writeln!(out, "  note         {note}")?;
    }
    let files: Vec<&str> = converted.files.present().map(|(name, _)| name).collect();
    let dir = args.out.display();
    writeln!(out, "wrote {dir}: {}", files.join(", "))?;
    writeln!(out, "  look at it   softserve inspect {dir} --model MODEL")?;
    let name = args.out.file_name().unwrap_or_default().to_string_lossy();
    let task = name.parse::<TaskName>();
    writeln!(out, "  push it      softserve push {dir} --task {}", task.as_ref().map_or("NAME", TaskName::as_str))?;
    if task.is_ok() {
        let parent = args.out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        writeln!(out, "  serve it     softserve serve --model MODEL --prompts {}", parent.display())?;
    }
    Ok(())
}

/// Of the rows, where there are any.
fn norms(tensors: &[RawTensor]) -> Option<Summary> {
    let rows = tensors.iter().find(|tensor| tensor.name == peft::TENSOR)?;
    Summary::of(&rows.row_norms())
}
