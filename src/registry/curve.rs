//! The picture of a tuning run beside a version's files, read when it is asked for.

use bytes::Bytes;

use super::{Registry, RegistryError};

impl Registry {
    /// The curve of a version's tuning run, `loss.svg`, as it lies beside the version's files now; `None` if it has none.
    /// Blocks on the store.
    pub fn curve(&self, task: &str, version: &str) -> Result<Option<Bytes>, RegistryError> {
        let (name, state) = self.read_state(task)?;
        let digest = state.find(&name, version)?.digest;
        match self.store.read_curve(&name, Some(&digest.id()))? {
            None if state.plain == Some(digest) => Ok(self.store.read_curve(&name, None)?),
            curve => Ok(curve),
        }
    }
}
