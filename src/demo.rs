//! The demonstration that ships in the binary: a tiny frozen model and the prompts tuned on it.

use std::{fs, io, path::Path};

use include_dir::{Dir, include_dir};

use crate::model::ModelFiles;

static MODEL: Dir<'static> = include_dir!("$CARGO_MANIFEST_DIR/models/demo");
static PROMPTS: Dir<'static> = include_dir!("$CARGO_MANIFEST_DIR/prompts");

/// The name that the demo model goes by.
pub const MODEL_NAME: &str = "softserve-demo";

/// The frozen model.
pub fn model() -> ModelFiles {
    ModelFiles::embedded(MODEL_NAME, &MODEL)
}

/// The prompts that ship with it: `(path below --prompts, content)`.
pub fn prompts() -> impl Iterator<Item = (&'static Path, &'static [u8])> {
    fn files(dir: &'static Dir<'static>) -> Box<dyn Iterator<Item = (&'static Path, &'static [u8])>> {
        let own = dir.files().map(|f| (f.path(), f.contents()));
        Box::new(own.chain(dir.dirs().flat_map(files)))
    }
    files(&PROMPTS)
}

/// Writes the prompts into `root` if it does not exist yet. What a user later changes or deletes
/// there stays so.
pub fn seed_prompts(root: &Path) -> io::Result<()> {
    if root.exists() {
        return Ok(());
    }
    let parent =
        root.parent().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the folder has no parent"))?;
    fs::create_dir_all(parent)?;
    let staging = tempfile::Builder::new().prefix(".seed-").tempdir_in(parent)?;
    for (path, content) in prompts() {
        let to = staging.path().join(path);
        if let Some(folder) = to.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(to, content)?;
    }
    match fs::rename(staging.path(), root) {
        // Another process was first: its folder is as good as ours.
        Err(_) if root.exists() => Ok(()),
        done => done,
    }
}
