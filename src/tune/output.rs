//! The files of a finished prompt: written beside the old ones, read back as `serve` would, and
//! only then put in their place.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{
    TuneError,
    parameters::{Method, Parameters, matrix},
    plan::Plan,
    report,
    trainer::State,
};
use crate::{
    model::Model,
    prompt::{
        LearnedPrompt, TaskName, Version,
        encode::{PeftConfig, PeftEncoder, encode_p_tuning, encode_prefix_tuning, encode_prompt_tuning},
        files::{self, PromptFiles},
        format::{self, Fit},
        spec::TaskSpec,
    },
};

/// Checks that a prompt can be written to `output`, before hours are spent on it.
pub fn check(output: &Path) -> Result<(), TuneError> {
    if output.join("versions").exists() {
        return Err(TuneError::Managed { output: output.to_owned() });
    }
    let parent = parent(output);
    let probe =
        fs::create_dir_all(&parent).and_then(|()| tempfile::Builder::new().prefix(".tune-").tempdir_in(&parent));
    probe.map(drop).map_err(|source| TuneError::Write { path: output.to_owned(), source })
}

/// The files of a prompt, as PEFT would write them.
pub fn serialise(
    parameters: &Parameters,
    prompt: &LearnedPrompt,
    spec: &TaskSpec,
    model: &Model,
) -> Result<PromptFiles, TuneError> {
    let (method, fit) = (parameters.method(), Fit::from(model.info()));
    let config = PeftConfig {
        base_model_name: model.info().name.clone(),
        tokenizer_name: Some(model.info().name.clone()),
        num_layers: fit.key_values_layers(),
        has_encoder: fit.encoder_layers.is_some(),
        num_attention_heads: match method {
            Method::PrefixTuning => model.config().num_kv_heads,
            Method::PromptTuning | Method::PTuning(_) => model.config().num_heads,
        },
    };
    let matrix = matrix(prompt, &fit)?;
    Ok(match method {
        Method::PromptTuning => encode_prompt_tuning(&matrix, &config, spec)?,
        Method::PTuning(encoder) => {
            let encoder = PeftEncoder { kind: encoder.kind.name(), hidden_size: encoder.hidden_size };
            encode_p_tuning(&matrix, encoder, &config, spec)?
        }
        Method::PrefixTuning => encode_prefix_tuning(&matrix, &config, spec)?,
    })
}

/// Writes the prompt's three files and returns what `serve` makes of them.
pub fn write(output: &Path, task: &TaskName, encoded: &PromptFiles, fit: &Fit) -> Result<Version, TuneError> {
    let fail = |source: io::Error| TuneError::Write { path: output.to_owned(), source };
    let staging = tempfile::Builder::new().prefix(".tune-").tempdir_in(parent(output)).map_err(fail)?;
    encoded.write_dir(staging.path()).map_err(fail)?;
    let staged = PromptFiles::read_dir(staging.path())?;
    let version = format::read(task.clone(), &staged, fit)?;
    fs::create_dir_all(output).map_err(fail)?;
    // The weights last: a server that watches the folder reads it again at each change.
    for name in [files::TASK, files::ADAPTER_CONFIG, files::WEIGHTS] {
        fs::rename(staging.path().join(name), output.join(name)).map_err(fail)?;
    }
    Ok(version)
}

/// Draws the run into the prompt's folder.
pub fn write_curve(output: &Path, plan: &Plan, state: &State) -> Result<(), TuneError> {
    let path = output.join(files::CURVE);
    let svg = report::curve(plan, state).map_err(|reason| TuneError::Curve { path: path.clone(), reason })?;
    fs::write(&path, svg).map_err(|source| TuneError::Write { path, source })
}

/// Removes the state of a run that is finished. What cannot be removed does no harm: a run that is
/// resumed at its end only writes its result again.
pub fn remove_checkpoint(dir: &Path) {
    let _ = fs::remove_file(dir.join(super::checkpoint::FILE));
    let _ = fs::remove_file(dir.join(files::CURVE));
    let _ = fs::remove_dir(dir);
}

fn parent(output: &Path) -> PathBuf {
    match output.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}
