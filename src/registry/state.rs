//! A task at one moment: its versions, the one that answers, and how they are found. The versions' content is not here: see
//! [`Residency`](super::residency::Residency).

use std::{sync::Arc, time::SystemTime};

use sha2::{Digest as _, Sha256};

use super::{
    MAX_KNOWN, MIN_VERSION_PREFIX, RegistryError,
    routing::{Draw, Routing},
};
use crate::prompt::{Digest, TaskName, Version};

/// What is known of a task.
#[derive(Debug, Clone)]
pub(super) enum Slot {
    /// Its folder is there; what is in it is read when somebody needs it.
    Unread,
    Read(Arc<TaskState>),
}

impl Slot {
    /// The state, if it was read.
    pub(super) fn read(&self) -> Option<&Arc<TaskState>> {
        match self {
            Self::Unread => None,
            Self::Read(state) => Some(state),
        }
    }
}

/// A task at one moment; replaced as a whole.
#[derive(Debug, Clone, Default)]
pub(super) struct TaskState {
    /// Goes up with each change of `active`.
    pub(super) generation: u64,
    pub(super) active: Option<Digest>,
    pub(super) routing: Routing,
    /// The newest first.
    pub(super) versions: Vec<Stored>,
    /// The version that lies in the task's folder itself.
    pub(super) plain: Option<Digest>,
}

/// A version that is stored.
#[derive(Debug, Clone)]
pub(super) struct Stored {
    pub(super) digest: Digest,
    pub(super) stored_at: SystemTime,
    /// The version itself, where it could not be read again: its files were changed or removed while it was in use.
    pub(super) kept: Option<Arc<Version>>,
}

impl Stored {
    pub(super) fn new(digest: Digest, stored_at: SystemTime) -> Self {
        Self { digest, stored_at, kept: None }
    }
}

impl TaskState {
    /// A hash of which versions answer, equal in all processes.
    pub(super) fn mark(&self, task: &TaskName) -> u64 {
        let mut hash = Sha256::new().chain_update(task.as_str()).chain_update([0]);
        let shares =
            self.routing.shares.iter().flat_map(|(digest, share)| [&digest.0[..8], &share.to_le_bytes()].concat());
        let aliases =
            self.routing.aliases.iter().flat_map(|(alias, digest)| [alias.as_bytes(), &digest.0[..8]].concat());
        hash.update(self.active.map_or([0; 32], |active| active.0));
        hash.update(shares.chain(aliases).collect::<Vec<u8>>());
        hash.finalize().iter().take(8).fold(0, |mark, &byte| mark << 8 | u64::from(byte))
    }

    /// Puts a version where its time belongs.
    pub(super) fn insert(&mut self, stored: Stored) {
        self.versions.push(stored);
        self.versions.sort_by(|a, b| b.stored_at.cmp(&a.stored_at).then_with(|| a.digest.cmp(&b.digest)));
    }

    /// The version of this id.
    pub(super) fn by_id(&self, id: &str) -> Option<&Stored> {
        self.versions.iter().find(|stored| stored.digest.id() == id)
    }

    /// The version of this digest.
    pub(super) fn by_digest(&self, digest: Digest) -> Option<&Stored> {
        self.versions.iter().find(|stored| stored.digest == digest)
    }

    /// The version that an alias names, of this id, or the only one whose digest begins so.
    pub(super) fn find(&self, task: &TaskName, version: &str) -> Result<&Stored, RegistryError> {
        if let Some(named) = self.routing.aliases.get(version).and_then(|digest| self.by_digest(*digest)) {
            return Ok(named);
        }
        let wanted = version.to_ascii_lowercase();
        let long_enough = wanted.len() >= MIN_VERSION_PREFIX;
        let mut found =
            self.versions.iter().filter(|stored| long_enough && hex::encode(stored.digest.0).starts_with(&wanted));
        match (found.next(), found.next()) {
            (Some(stored), None) => Ok(stored),
            _ => Err(RegistryError::VersionNotFound {
                task: task.clone(),
                version: version.chars().take(80).collect(),
                known: self.versions.iter().take(MAX_KNOWN).map(|stored| stored.digest.id()).collect(),
            }),
        }
    }

    /// The version that a request means: the one it names, else one of those that requests are split between, else the active
    /// one.
    pub(super) fn chosen(&self, task: &TaskName, version: Option<&str>, draw: Draw) -> Result<&Stored, RegistryError> {
        match version {
            Some(version) => self.find(task, version),
            None => self
                .routing
                .pick(task, draw)
                .or(self.active)
                .and_then(|active| self.by_digest(active))
                .ok_or_else(|| RegistryError::NoActiveVersion { task: task.clone() }),
        }
    }
}
