//! What a store has to do, and the words that all stores share.

use std::{
    collections::BTreeMap,
    fmt,
    fs::File,
    io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use object_store::UpdateVersion;
use serde::{Deserialize, Serialize};

use super::health::Health;
use crate::prompt::{Digest, TaskName, files::PromptFiles};

pub const VERSIONS: &str = "versions";
pub const ACTIVE: &str = "active.json";
/// The most bytes of `active.json`.
pub const MAX_ACTIVE_BYTES: u64 = 64 * 1024;

/// The place of prompts. Every call may wait for a disk or a network.
pub trait Store: fmt::Debug + Send + Sync {
    /// What lies where, for messages.
    fn places(&self) -> &Places;

    /// Since when the store has not answered.
    fn health(&self) -> &Health;

    /// A folder on this machine that tells of changes; `None` where the store has to be asked.
    fn notifying_folder(&self) -> Option<&Path> {
        None
    }

    /// Keeps other processes from writing until it is dropped; waits for one that does. `None` where the store cannot lock:
    /// there, [`WriteError::Conflict`] tells two writers apart, or, on a file system without locks, only the generation.
    fn lock(&self) -> Option<File> {
        None
    }

    /// The names of all tasks. `marks` also asks for a mark of each task's present content, where the store has it cheaply.
    fn list(&self, marks: bool) -> io::Result<TaskNames>;

    /// What the store has of a task now; `None` if it has nothing. Versions that are `known` are named and not looked at.
    fn look(&self, task: &TaskName, known: &dyn Fn(&str) -> bool) -> io::Result<Option<Contents>>;

    /// Reads a version's files; the version's name must be the id of their content.
    fn read_version(&self, task: &TaskName, id: &str) -> Result<PromptFiles, ReadError>;

    /// Reads the plain PEFT directory that a task may be.
    fn read_plain(&self, task: &TaskName) -> Result<PromptFiles, ReadError>;

    /// Reads the curve beside a version's files, or in the plain PEFT directory if `id` is `None`.
    fn read_curve(&self, task: &TaskName, id: Option<&str>) -> io::Result<Option<Bytes>>;

    /// Puts a curve beside a stored version that has none; one that is there stays.
    fn add_curve(&self, task: &TaskName, id: &str, curve: &Bytes) -> io::Result<()>;

    /// Stores a version's files, and writes `active.json` if `active` is given: both or neither, or the version alone, which
    /// nothing names yet. Files of that version whose content is another are replaced. Returns when it was stored.
    fn add_version(
        &self,
        task: &TaskName,
        digest: Digest,
        files: &PromptFiles,
        active: Option<&Active>,
        basis: &Basis,
    ) -> Result<SystemTime, WriteError>;

    /// Replaces `active.json`.
    fn write_active(&self, task: &TaskName, active: &Active, basis: &Basis) -> Result<(), WriteError>;

    /// Removes a version's files. `active` is what `active.json` says before and after.
    fn remove_version(
        &self,
        task: &TaskName,
        id: &str,
        active: Option<&Active>,
        basis: &Basis,
    ) -> Result<(), WriteError>;

    /// Removes the files of a task's plain PEFT directory and leaves the rest of the task.
    fn remove_plain(&self, task: &TaskName) -> io::Result<()>;

    /// Removes a task with all that is in it.
    fn remove_task(&self, task: &TaskName, basis: &Basis) -> Result<(), WriteError>;
}

/// What lies where in a store, as people write it: paths of a folder, or addresses in a bucket.
#[derive(Debug)]
pub struct Places {
    root: PathBuf,
}

impl Places {
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn task(&self, task: &TaskName) -> PathBuf {
        self.root.join(task.as_str())
    }

    pub fn versions(&self, task: &TaskName) -> PathBuf {
        self.task(task).join(VERSIONS)
    }

    pub fn version(&self, task: &TaskName, id: &str) -> PathBuf {
        self.versions(task).join(id)
    }

    pub fn active(&self, task: &TaskName) -> PathBuf {
        self.task(task).join(ACTIVE)
    }
}

/// The content of `active.json`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Active {
    /// The id of the active version; none where versions were only stored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Hand-written files may leave it out.
    #[serde(default)]
    pub generation: u64,
    /// The shares of several versions, if requests are split between them; `version` has the largest.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub versions: BTreeMap<String, f64>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub aliases: BTreeMap<String, String>,
    /// The versions that were active before, the last one first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub previous: Vec<String>,
    /// In a bucket: the task was deleted, with all objects that were written up to this time (RFC 3339, nanoseconds).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deleted: Option<String>,
    /// In a bucket: versions that were deleted, with all of their objects that were written up to this time.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub removed: BTreeMap<String, String>,
}

/// Tells whether a version's files changed, without reading them: size, time and, in a bucket, the ETag of each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stamp(pub Vec<(u64, SystemTime, String)>);

impl Stamp {
    /// Whether a change within the clock's resolution could have gone unseen.
    pub fn is_fresh(&self) -> bool {
        let recent = |t: &SystemTime| t.elapsed().is_ok_and(|age| age < Duration::from_millis(100));
        self.0.iter().any(|(_, modified, tag)| tag.is_empty() && recent(modified))
    }
}

/// A hash of all that a store has of a task; it differs after every change.
pub type Mark = u64;

/// What lies in the root.
#[derive(Debug, Default)]
pub struct TaskNames {
    /// Sorted by name.
    pub tasks: Vec<(TaskName, Option<Mark>)>,
    /// What cannot be a task's, with why.
    pub others: Vec<(PathBuf, String)>,
}

/// What a store has of a task, at one moment.
#[derive(Debug)]
pub struct Contents {
    pub versions: Vec<Found>,
    /// The plain PEFT directory that the task is; its id is empty.
    pub plain: Option<Found>,
    /// `active.json`, if there is one, or why it cannot be read.
    pub active: Result<Option<Active>, String>,
    pub basis: Basis,
    /// The mark of all that was looked at, where the store has marks.
    pub mark: Option<Mark>,
}

/// Files of a prompt, whatever they hold.
#[derive(Debug)]
pub struct Found {
    pub id: String,
    /// `None` if there is none of a prompt's files, or if they were not looked at.
    pub stamp: Option<Stamp>,
    pub stored_at: SystemTime,
}

/// What a change of a task is based on: the store refuses it if another was first.
#[derive(Debug, Clone, Default)]
pub struct Basis {
    /// The `active.json` that was read, in a bucket.
    pub etag: Option<UpdateVersion>,
    /// The generation that it said, also of a task that was deleted.
    pub generation: u64,
    pub deleted: Option<String>,
    pub removed: BTreeMap<String, String>,
}

/// Why a prompt's files cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("there are no such files")]
    NotThere,
    /// What is there is not what it should be.
    #[error("{0}")]
    Wrong(String),
    /// The store did not answer, which says nothing about the files.
    #[error("{0}")]
    Store(#[from] io::Error),
}

/// Why nothing was written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// Somebody else changed the task first.
    #[error("another change of the task was first")]
    Conflict,
    #[error(transparent)]
    Store(#[from] io::Error),
}

/// The files of a version, if their content has its id.
pub fn checked(id: &str, files: PromptFiles) -> Result<PromptFiles, ReadError> {
    match files.digest().id() {
        found if found == id => Ok(files),
        found => Err(ReadError::Wrong(format!(
            "the files' content is version {found}: files are missing or were changed by hand; a changed prompt is a new \
             version, to be published or put into a folder of its own name"
        ))),
    }
}

/// `active.json` from its bytes.
pub fn parse_active(bytes: &[u8]) -> Result<Active, String> {
    serde_json::from_slice(bytes).map_err(|e| e.to_string())
}

/// `active.json` as bytes.
pub fn active_json(active: &Active) -> io::Result<Bytes> {
    let mut bytes = serde_json::to_vec(active)?;
    bytes.push(b'\n');
    Ok(bytes.into())
}
