//! A learned prompt by the name of its task or by its folder.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde::Deserialize;

use crate::{
    demo,
    model::Model,
    prompt::{
        TaskName, Version,
        files::{self, PromptFiles},
        format,
    },
    tune::job,
};

/// The folder of the tasks where none is given.
pub const DEFAULT_ROOT: &str = "prompts";

/// Reads the prompt of a task under `root`: its active version, or a plain PEFT directory. For the
/// demo model, the prompts inside the program are found too.
pub fn by_task(root: &Path, task: &TaskName, model: &Model) -> anyhow::Result<Version> {
    let folder = root.join(task.as_str());
    if folder.join(files::WEIGHTS).exists() {
        return by_folder(&folder, task, model);
    }
    if let Some(active) = active(&folder)? {
        return by_folder(&active, task, model);
    }
    match embedded(task) {
        Some(files) if model.info().name == demo::MODEL_NAME => {
            Ok(format::read(task.clone(), &files, &job::fit(model))?)
        }
        _ => bail!("there is no task {task} under {}; set --prompts, or give the prompt's folder", root.display()),
    }
}

/// Reads a plain PEFT directory.
pub fn by_folder(folder: &Path, task: &TaskName, model: &Model) -> anyhow::Result<Version> {
    let read = PromptFiles::read_users_dir(folder).and_then(|files| {
        files.check_complete()?;
        format::read(task.clone(), &files, &job::fit(model))
    });
    read.with_context(|| format!("cannot use the prompt in {}", folder.display()))
}

/// The folder of the active version of a task that a server manages.
pub fn active(folder: &Path) -> anyhow::Result<Option<PathBuf>> {
    #[derive(Deserialize)]
    struct Active {
        version: String,
    }
    let path = folder.join("active.json");
    if !path.exists() {
        return Ok(None);
    }
    let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let active: Active = serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged", path.display()))?;
    if !active.version.chars().all(|c| c.is_ascii_alphanumeric()) {
        bail!("{} names {:?}, which is not a version", path.display(), active.version);
    }
    Ok(Some(folder.join("versions").join(active.version)))
}

fn embedded(task: &TaskName) -> Option<PromptFiles> {
    let file = |name: &str| {
        let path = Path::new(task.as_str()).join(name);
        demo::prompts().find(|(p, _)| *p == path).map(|(_, content)| content.into())
    };
    let found = PromptFiles {
        adapter_config: file(files::ADAPTER_CONFIG),
        weights: file(files::WEIGHTS),
        task: file(files::TASK),
        ..PromptFiles::default()
    };
    found.weights.is_some().then_some(found)
}
