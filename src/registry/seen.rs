//! What earlier looks at the store saw, so that nothing is read or complained about twice.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use super::store::{Mark, Stamp};
use crate::prompt::TaskName;

/// What earlier scans saw, so that nothing is read or complained about twice.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// The state in which a plain directory was last read, or in which a version was refused.
    pub(super) read: HashMap<PathBuf, Stamp>,
    /// The last warning for each path.
    warned: HashMap<PathBuf, String>,
    /// How each task was marked in the store when it was last read, where the store marks them.
    pub(super) marks: HashMap<TaskName, Mark>,
}

impl Seen {
    /// Drops what is known of a task that is gone, which lay in `dir`.
    pub(super) fn forget(&mut self, task: &TaskName, dir: &Path) {
        self.marks.remove(task);
        self.read.retain(|path, _| !path.starts_with(dir));
        self.warned.retain(|path, _| !path.starts_with(dir));
    }

    /// Whether a folder is as it was when it was last read.
    pub(super) fn is_unchanged(&self, dir: &Path, stamp: &Stamp) -> bool {
        self.read.get(dir) == Some(stamp)
    }

    /// A folder was read. One that changed just now may still change within the clock's tick, so
    /// it is read once more.
    pub(super) fn was_read(&mut self, dir: &Path, stamp: Stamp) {
        match stamp.is_fresh() {
            true => self.read.remove(dir),
            false => self.read.insert(dir.to_owned(), stamp),
        };
    }

    /// Logs what is wrong with a path, once.
    pub(super) fn warn(&mut self, path: &Path, problem: String) {
        if self.warned.get(path) != Some(&problem) {
            tracing::warn!(path = %path.display(), "ignored, or left unchanged: {problem}");
            self.warned.insert(path.to_owned(), problem);
        }
    }

    pub(super) fn fine(&mut self, path: &Path) {
        self.warned.remove(path);
    }
}
