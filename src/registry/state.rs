//! A task at one moment: its versions, the one that answers, and how they are found and listed.

use std::{sync::Arc, time::SystemTime};

use super::{MAX_KNOWN, MIN_VERSION_PREFIX, RegistryError};
use crate::prompt::{Digest, TaskName, Version};

/// A task at one moment; replaced as a whole.
#[derive(Debug, Clone, Default)]
pub(super) struct TaskState {
    /// Goes up with each change of `active`.
    pub(super) generation: u64,
    pub(super) active: Option<Arc<Version>>,
    /// The newest first.
    pub(super) versions: Vec<Stored>,
    /// The version that lies in the task's folder itself.
    pub(super) plain: Option<Digest>,
}

#[derive(Debug, Clone)]
pub(super) struct Stored {
    pub(super) version: Arc<Version>,
    pub(super) stored_at: SystemTime,
}

impl TaskState {
    /// Puts a version where its time belongs.
    pub(super) fn insert(&mut self, stored: Stored) {
        self.versions.push(stored);
        self.versions.sort_by(|a, b| {
            let by_time = b.stored_at.cmp(&a.stored_at);
            by_time.then_with(|| a.version.digest.cmp(&b.version.digest))
        });
    }

    /// The version of this id, or the only one whose digest begins so.
    pub(super) fn find(&self, task: &TaskName, version: &str) -> Result<&Stored, RegistryError> {
        let wanted = version.to_ascii_lowercase();
        let long_enough = wanted.len() >= MIN_VERSION_PREFIX;
        let mut found = self
            .versions
            .iter()
            .filter(|stored| long_enough && hex::encode(stored.version.digest.0).starts_with(&wanted));
        match (found.next(), found.next()) {
            (Some(stored), None) => Ok(stored),
            _ => Err(RegistryError::VersionNotFound {
                task: task.clone(),
                version: version.chars().take(80).collect(),
                known: self.versions.iter().take(MAX_KNOWN).map(|stored| stored.version.digest.id()).collect(),
            }),
        }
    }

    /// The task as it is listed.
    pub(super) fn entry(&self, task: &TaskName) -> TaskEntry {
        let active = self.active.as_ref().map(|active| active.digest);
        let versions = self.versions.iter().map(|stored| VersionEntry {
            version: stored.version.clone(),
            active: active == Some(stored.version.digest),
            stored_at: stored.stored_at,
        });
        TaskEntry {
            task: task.clone(),
            generation: self.generation,
            active: self.active.clone(),
            versions: versions.collect(),
        }
    }
}

/// One version as the admin API lists it.
#[derive(Debug, Clone)]
pub struct VersionEntry {
    pub version: Arc<Version>,
    pub active: bool,
    /// When it was stored.
    pub stored_at: SystemTime,
}

/// A task as the admin API lists it.
#[derive(Debug, Clone)]
pub struct TaskEntry {
    pub task: TaskName,
    /// Goes up with each change of the active version; the ETag is made of it.
    pub generation: u64,
    pub active: Option<Arc<Version>>,
    /// The newest first.
    pub versions: Vec<VersionEntry>,
}
