//! The picture of a tuning run beside a version's files: read when it is asked for, and added to a version that has none.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::Path,
};

use bytes::Bytes;

use super::{Registry, RegistryError, store::Store};
use crate::prompt::{
    TaskName,
    files::{CURVE, PromptFiles, sync_dir},
};

impl Registry {
    /// The curve of a version's tuning run, `loss.svg`, as it lies beside the version's files now; `None` if it has none.
    /// Blocks on the disk.
    pub fn curve(&self, task: &str, version: &str) -> Result<Option<Bytes>, RegistryError> {
        let (name, state) = self.read_state(task)?;
        let digest = state.find(&name, version)?.digest;
        match read(&self.store.version_dir(&name, &digest.id()))? {
            None if state.plain == Some(digest) => Ok(read(&self.store.task_dir(&name))?),
            curve => Ok(curve),
        }
    }
}

impl Store {
    /// Puts a curve beside a stored version that has none; one that is there stays.
    pub fn add_curve(&self, task: &TaskName, id: &str, curve: &[u8]) -> io::Result<()> {
        let dir = self.version_dir(task, id);
        if !dir.is_dir() || dir.join(CURVE).exists() {
            return Ok(());
        }
        let staging = self.staging()?;
        let staged = staging.path().join(CURVE);
        let mut file = File::create_new(&staged)?;
        file.write_all(curve)?;
        file.sync_all()?;
        fs::rename(&staged, dir.join(CURVE))?;
        sync_dir(&dir)
    }
}

/// The curve in a version's folder, or in a plain PEFT directory.
fn read(dir: &Path) -> io::Result<Option<Bytes>> {
    match dir.is_dir() {
        true => PromptFiles::read_curve(dir).map_err(|fault| io::Error::other(fault.detail)),
        false => Ok(None),
    }
}
