//! Lists of tasks and versions, a page at a time and by name. A version that is not in memory is read for the list and not
//! kept, so that looking at everything evicts nothing.

use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

use super::{Registry, RegistryError, Stored, TaskState};
use crate::prompt::{Digest, TaskName, Version};

/// One version as the admin API lists it.
#[derive(Debug, Clone)]
pub struct VersionEntry {
    pub version: Arc<Version>,
    pub active: bool,
    /// When it was stored.
    pub stored_at: SystemTime,
    /// Whether it is in memory; otherwise the next request that needs it reads it from the store.
    pub loaded: bool,
}

/// A version whose files cannot be read now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnreadableVersion {
    /// Its id.
    pub version: String,
    pub reason: String,
}

/// A task as the admin API lists it.
#[derive(Debug, Clone)]
pub struct TaskEntry {
    pub task: TaskName,
    /// Goes up with each change of the active version; the ETag is made of it.
    pub generation: u64,
    /// The id of the active version.
    pub active: Option<String>,
    /// The ids of several versions with their shares of the requests, if these are split.
    pub shares: Vec<(String, f64)>,
    /// The names that versions have, with their ids.
    pub aliases: BTreeMap<String, String>,
    /// The ids of the versions that were active before, the last one first.
    pub previous: Vec<String>,
    /// The newest first.
    pub versions: Vec<VersionEntry>,
    /// Versions that are stored and cannot be read now.
    pub unreadable: Vec<UnreadableVersion>,
}

/// A part of a list by name.
#[derive(Debug, Clone)]
pub struct Page<T> {
    pub items: Vec<T>,
    /// The last name of this page, if there are more after it.
    pub next: Option<TaskName>,
}

impl Registry {
    /// The active version of the first `limit` tasks after `after` that are `listed`, by name; tasks without one are left out. Blocks on the
    /// disk for versions that are not in memory.
    pub fn active_page(
        &self,
        after: Option<&str>,
        limit: usize,
        listed: impl Fn(&TaskName) -> bool,
    ) -> Page<Arc<Version>> {
        self.page(after, limit, listed, |name, state| {
            let active = state.by_digest(state.active?)?;
            self.look_at(name, active)
                .inspect_err(|e| tracing::warn!(task = %name, error = %e, "left out of the list"))
                .ok()
        })
    }

    /// The first `limit` tasks after `after` that are `listed` with all versions, by name. Blocks on the disk for versions that are not in
    /// memory.
    pub fn tasks_page(&self, after: Option<&str>, limit: usize, listed: impl Fn(&TaskName) -> bool) -> Page<TaskEntry> {
        self.page(after, limit, listed, |name, state| Some(self.entry(name, state)))
    }

    /// One task with all versions. Blocks on the disk for versions that are not in memory.
    pub fn task(&self, task: &str) -> Result<TaskEntry, RegistryError> {
        let (name, state) = self.read_state(task)?;
        Ok(self.entry(&name, &state))
    }

    /// One version of a task. Blocks on the disk where it is not in memory.
    pub fn version(&self, task: &str, version: &str) -> Result<VersionEntry, RegistryError> {
        let (name, state) = self.read_state(task)?;
        let stored = state.find(&name, version)?;
        self.version_entry(&name, &state, stored)
    }

    /// How often the active version of a task has changed. Blocks on the disk where the task was not read yet.
    pub fn generation(&self, task: &str) -> Result<u64, RegistryError> {
        Ok(self.read_state(task)?.1.generation)
    }

    /// How many tasks there are. Of those that nobody has asked for yet some may turn out to have no version.
    pub fn num_tasks(&self) -> usize {
        self.tasks.iter().filter(|entry| entry.value().read().is_none_or(|state| state.active.is_some())).count()
    }

    /// The first names, in their order.
    pub fn first_names(&self, limit: usize) -> Vec<TaskName> {
        self.names_after(None, limit, |_| true).items
    }

    fn names_after(&self, after: Option<&str>, limit: usize, listed: impl Fn(&TaskName) -> bool) -> Page<TaskName> {
        let is_after = |name: &TaskName| after.is_none_or(|after| name.as_str() > after) && listed(name);
        let mut names: Vec<TaskName> =
            self.tasks.iter().map(|entry| entry.key().clone()).filter(|name| is_after(name)).collect();
        let more = names.len() > limit;
        if more && limit > 0 {
            names.select_nth_unstable(limit - 1);
        }
        names.truncate(limit);
        names.sort_unstable();
        let next = if more { names.last().cloned() } else { None };
        Page { items: names, next }
    }

    fn page<T>(
        &self,
        after: Option<&str>,
        limit: usize,
        listed: impl Fn(&TaskName) -> bool,
        mut item: impl FnMut(&TaskName, &TaskState) -> Option<T>,
    ) -> Page<T> {
        let Page { items: names, next } = self.names_after(after, limit, listed);
        // A task that was deleted meanwhile, or turns out to have no version, is left out.
        let read = names.iter().filter_map(|name| Some((name, self.read_state(name.as_str()).ok()?.1)));
        Page { items: read.filter_map(|(name, state)| item(name, &state)).collect(), next }
    }

    fn version_entry(
        &self,
        task: &TaskName,
        state: &TaskState,
        stored: &Stored,
    ) -> Result<VersionEntry, RegistryError> {
        let loaded = stored.kept.is_some() || self.residency.peek(task, stored.digest).is_some();
        let (active, stored_at) = (state.active == Some(stored.digest), stored.stored_at);
        Ok(VersionEntry { version: self.look_at(task, stored)?, active, stored_at, loaded })
    }

    /// The task as it is listed.
    pub(super) fn entry(&self, task: &TaskName, state: &TaskState) -> TaskEntry {
        let (mut versions, mut unreadable) = (Vec::new(), Vec::new());
        for stored in &state.versions {
            match self.version_entry(task, state, stored) {
                Ok(entry) => versions.push(entry),
                Err(e) => unreadable.push(UnreadableVersion { version: stored.digest.id(), reason: e.to_string() }),
            }
        }
        let routing = &state.routing;
        TaskEntry {
            task: task.clone(),
            generation: state.generation,
            active: state.active.map(|active| active.id()),
            shares: routing.shares.iter().map(|(digest, share)| (digest.id(), *share)).collect(),
            aliases: routing.aliases.iter().map(|(alias, digest)| (alias.clone(), digest.id())).collect(),
            previous: routing.previous.iter().map(Digest::id).collect(),
            versions,
            unreadable,
        }
    }
}
