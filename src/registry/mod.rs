//! Task names to versions: publish, resolve, activate, retire. Names move; versions never change. All tasks are known by name;
//! the versions' content is in memory only as far as it is used.

mod activate;
mod collect;
mod composition;
mod curve;
mod list;
mod load;
pub mod package;
mod publish;
mod residency;
mod routing;
mod scan;
mod seen;
mod state;
mod store;
mod watch;

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use dashmap::DashMap;

use crate::prompt::{
    TaskName, Version,
    format::{self, Faults, Fit},
};
pub use activate::{Activated, Activation};
pub use collect::Keep;
use composition::Compositions;
pub use list::{Page, TaskEntry, UnreadableVersion, VersionEntry};
pub use publish::Published;
use residency::Residency;
pub use residency::ResidencyStats;
pub use routing::Draw;
use seen::Seen;
use state::{Slot, Stored, TaskState};
pub use store::{Away, Bucket, PromptLocation};
use store::{ReadError, Store, WriteError};
pub use watch::Watcher;

/// The fewest hex digits that name a version.
pub const MIN_VERSION_PREFIX: usize = 6;

/// The most names that an error lists.
const MAX_KNOWN: usize = 20;

/// With more tasks than this an error lists none of their names: finding the first ones would take longer than the request.
const MAX_TASKS_TO_SORT: usize = 2_000;

/// Where prompts are kept and what they must fit.
#[derive(Debug, Clone)]
pub struct RegistryConfig {
    /// The folder or bucket, described in README "Files under --prompts".
    pub root: PromptLocation,
    pub fit: Fit,
    /// Bounds, so that a registry cannot grow without end.
    pub max_tasks: usize,
    pub max_versions_per_task: usize,
    /// The memory for versions, in bytes: those that are used least are read again when they are needed.
    pub max_loaded_bytes: u64,
    /// How often the store is asked for changes that others made, where it does not tell of them itself.
    pub poll_interval: Duration,
    /// Which versions are kept; `None` for all.
    pub keep: Option<Keep>,
}

/// All tasks that can be called. Cheap to share; readers never wait for a writer.
#[derive(Debug)]
pub struct Registry {
    config: RegistryConfig,
    store: Box<dyn Store>,
    /// Readers clone an `Arc` out of a shard that is locked for no longer than that; a writer
    /// prepares a whole new state beside it and swaps one pointer.
    tasks: DashMap<TaskName, Slot>,
    residency: Residency,
    /// One mutex for all writers: publishing is rare and waits for the disk anyway, and one order
    /// of changes for memory and disk is easy to be sure of. Holds what the last scan has seen.
    writer: Mutex<Seen>,
    /// Told of each version that becomes the one that answers.
    listener: OnceLock<Listener>,
    compositions: Compositions,
    /// See [`revision`](Self::revision).
    revision: AtomicU64,
}

/// What [`Registry::on_active`] was given.
struct Listener(Box<OnActive>);

type OnActive = dyn Fn(&Arc<Version>) + Send + Sync;

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Listener")
    }
}

/// Why the registry refused; what it held before, it still holds.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// `known` has the first names there are, or none of very many.
    #[error("there is no task {task:?}")]
    TaskNotFound { task: String, known: Vec<TaskName> },
    /// No version has that id, or several begin so.
    #[error("task {task} has no version {version:?}")]
    VersionNotFound { task: TaskName, version: String, known: Vec<String> },
    #[error("task {task} has no active version")]
    NoActiveVersion { task: TaskName },
    #[error(transparent)]
    Invalid(#[from] Faults),
    #[error("the task is at generation {found}, the request expected {expected}")]
    PreconditionFailed { expected: String, found: u64 },
    #[error("version {version} is active")]
    VersionActive { task: TaskName, version: String },
    /// A version cannot be deleted.
    #[error("version {version} is in use: {reason}")]
    VersionInUse { task: TaskName, version: String, reason: String },
    /// Shares or an alias that cannot be.
    #[error("task {task}: {reason}")]
    Routing { task: TaskName, reason: String },
    #[error("task {task} has no version to go back to")]
    NoPreviousVersion { task: TaskName },
    /// A version is stored, and its files cannot be read now.
    #[error("version {version} of task {task} cannot be read: {reason}")]
    Unreadable { task: TaskName, version: String, reason: String },
    /// Several prompts cannot be one.
    #[error("{name:?} cannot be combined: {reason}")]
    Composition { name: String, reason: String },
    #[error("the registry is full: {what}")]
    Full { what: String },
    /// The store does not answer, or refuses.
    #[error("the prompt store failed: {0}")]
    Store(#[from] std::io::Error),
    /// Each time that a change was tried, somebody else's was first.
    #[error("the task is being changed by others at the same time")]
    Conflict,
}

impl From<WriteError> for RegistryError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Conflict => Self::Conflict,
            WriteError::Store(error) => Self::Store(error),
        }
    }
}

impl Registry {
    /// Learns the name of every task under the root, and reads the first ones; the others are read when they are needed, or
    /// by [`watch`](Self::watch). A folder that is wrong is logged and left out; it does not keep the others from being served.
    pub fn open(config: RegistryConfig) -> Result<Arc<Self>, RegistryError> {
        let store = store::open(&config.root)?;
        let residency = Residency::new(config.max_loaded_bytes);
        let (writer, listener) = (Mutex::new(Seen::default()), OnceLock::new());
        let compositions = Compositions::default();
        let (tasks, revision) = (DashMap::new(), AtomicU64::new(0));
        let registry = Self { config, store, tasks, residency, writer, listener, compositions, revision };
        registry.scan_first()?;
        Ok(Arc::new(registry))
    }

    /// The version that answers: the active one, or the one named by its id or by the beginning of
    /// its digest, at least [`MIN_VERSION_PREFIX`] hex digits. `task` may name the version itself, as `task@version`, and
    /// several prompts that become one, as `task+task@version`. Blocks on the disk where a version is not in memory.
    pub fn resolve(&self, task: &str, version: Option<&str>) -> Result<Arc<Version>, RegistryError> {
        self.resolve_drawn(task, version, Draw::Active)
    }

    /// As [`resolve`](Self::resolve); where requests are split between versions, `draw` says which one.
    pub fn resolve_drawn(&self, task: &str, version: Option<&str>, draw: Draw) -> Result<Arc<Version>, RegistryError> {
        let one = |(task, version): &(&str, Option<&str>)| self.resolve_one(task, *version, draw);
        let found = parts(task, version)?.iter().map(one).collect::<Result<Vec<_>, _>>()?;
        self.combined(task, found)
    }

    /// What [`resolve_drawn`](Self::resolve_drawn) answers, as far as memory tells: `None` where it has to read the disk. Never
    /// blocks.
    pub fn resolve_in_memory(
        &self,
        task: &str,
        version: Option<&str>,
        draw: Draw,
    ) -> Result<Option<Arc<Version>>, RegistryError> {
        let mut found = Vec::new();
        for (task, version) in parts(task, version)? {
            let (name, slot) = self.slot(task)?;
            let Slot::Read(state) = slot else { return Ok(None) };
            match self.in_memory(&name, state.chosen(&name, version, draw)?) {
                Some(version) => found.push(version),
                None => return Ok(None),
            }
        }
        self.combined(task, found).map(Some)
    }

    /// Counts of the versions in memory.
    pub fn residency(&self) -> ResidencyStats {
        self.residency.stats()
    }

    /// Since when the store has not answered, if it does not.
    pub fn store_away(&self) -> Option<Away> {
        self.store.health().away()
    }

    /// Calls of the store that it did not answer.
    pub fn store_failures(&self) -> u64 {
        self.store.health().failures()
    }

    /// A hash of which versions answer for all tasks that were read: replicas that have read the same store and have the same
    /// revision answer alike.
    pub fn revision(&self) -> u64 {
        self.revision.load(Ordering::Relaxed)
    }

    /// Follows changes made to the folder by hand, by git or by another process until the
    /// returned guard is dropped.
    pub fn watch(self: &Arc<Self>) -> Result<Watcher, RegistryError> {
        Ok(Watcher::start(self)?)
    }

    /// Calls `listener` with the version of each task that answers now and is in memory, and from then on with each that
    /// begins to answer, however that comes about. It is called while a writer holds the registry, so it must not wait. Only
    /// the first listener is heard.
    pub fn on_active(&self, listener: impl Fn(&Arc<Version>) + Send + Sync + 'static) {
        let _order = self.writer();
        if self.listener.set(Listener(Box::new(listener))).is_ok() {
            self.loaded_active().iter().for_each(|version| self.tell(version));
        }
    }

    /// Looks for changes on the disk now. Blocks on the disk.
    pub fn rescan(&self) -> Result<(), RegistryError> {
        Ok(self.scan_all()?)
    }

    fn writer(&self) -> MutexGuard<'_, Seen> {
        // A panic in a writer leaves a whole state behind: states are swapped, never changed.
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of a task.
    fn slot(&self, task: &str) -> Result<(TaskName, Slot), RegistryError> {
        let found = self.tasks.get(task).map(|entry| (entry.key().clone(), entry.value().clone()));
        found.ok_or_else(|| {
            let known = if self.tasks.len() <= MAX_TASKS_TO_SORT { self.first_names(MAX_KNOWN) } else { Vec::new() };
            RegistryError::TaskNotFound { task: task.chars().take(80).collect(), known }
        })
    }

    /// A task's state if it was read.
    fn known_state(&self, task: &TaskName) -> Option<Arc<TaskState>> {
        self.tasks.get(task).and_then(|entry| entry.value().read().cloned())
    }

    /// A task's state, read from the disk if it was not read yet.
    fn read_state(&self, task: &str) -> Result<(TaskName, Arc<TaskState>), RegistryError> {
        if let (name, Slot::Unread) = self.slot(task)? {
            self.read_unread(&name)?;
        }
        match self.slot(task)? {
            (name, Slot::Read(state)) => Ok((name, state)),
            (name, Slot::Unread) => Err(RegistryError::NoActiveVersion { task: name }),
        }
    }

    fn resolve_one(&self, task: &str, version: Option<&str>, draw: Draw) -> Result<Arc<Version>, RegistryError> {
        let (name, state) = self.read_state(task)?;
        let chosen = state.chosen(&name, version, draw)?;
        let failed = match self.load(&name, chosen) {
            Ok(version) => return Ok(version),
            Err(error) => error,
        };
        // Its files may have been changed or removed since they were listed.
        if matches!(failed, RegistryError::Store(_)) || self.scan_task(&mut self.writer(), &name).is_err() {
            return Err(failed);
        }
        let (name, state) = self.read_state(task)?;
        match state.chosen(&name, version, draw)? {
            same if same.digest == chosen.digest && same.kept.is_none() => Err(failed),
            other => self.load(&name, other),
        }
    }

    fn combined(&self, name: &str, mut found: Vec<Arc<Version>>) -> Result<Arc<Version>, RegistryError> {
        match (found.len(), found.pop()) {
            (1, Some(version)) => Ok(version),
            (_, last) => {
                found.extend(last);
                self.compositions.compose(&found).map_err(|reason| composition_refused(name, reason))
            }
        }
    }

    /// A version that is in memory, which counts as a use.
    fn in_memory(&self, task: &TaskName, stored: &Stored) -> Option<Arc<Version>> {
        stored.kept.clone().or_else(|| self.residency.get(task, stored.digest))
    }

    /// A version from memory or from the disk, and then in memory.
    fn load(&self, task: &TaskName, stored: &Stored) -> Result<Arc<Version>, RegistryError> {
        match &stored.kept {
            Some(kept) => Ok(Arc::clone(kept)),
            None => self.residency.get_or_load(task, stored.digest, || self.read_stored(task, stored)),
        }
    }

    /// A version from memory or from the disk, and no more in memory than before.
    fn look_at(&self, task: &TaskName, stored: &Stored) -> Result<Arc<Version>, RegistryError> {
        let in_memory = stored.kept.clone().or_else(|| self.residency.peek(task, stored.digest));
        in_memory.map_or_else(|| self.read_stored(task, stored), Ok)
    }

    fn read_stored(&self, task: &TaskName, stored: &Stored) -> Result<Arc<Version>, RegistryError> {
        let id = stored.digest.id();
        let unreadable = |reason| RegistryError::Unreadable { task: task.clone(), version: id.clone(), reason };
        let files = match self.store.read_version(task, &id) {
            Err(ReadError::NotThere) => self.store.read_plain(task),
            files => files,
        };
        let files = files.map_err(|error| match error {
            ReadError::Store(error) => RegistryError::Store(error),
            error => unreadable(error.to_string()),
        })?;
        if files.digest() != stored.digest {
            return Err(unreadable("its files have been changed since they were listed".to_owned()));
        }
        let version = format::read(task.clone(), &files, &self.config.fit).map_err(|e| unreadable(e.to_string()))?;
        Ok(Arc::new(version))
    }

    /// The active versions that are in memory, by name.
    fn loaded_active(&self) -> Vec<Arc<Version>> {
        let active = |task: &TaskName, slot: &Slot| {
            let state = slot.read()?;
            let stored = state.by_digest(state.active?)?;
            stored.kept.clone().or_else(|| self.residency.peek(task, stored.digest))
        };
        let mut found: Vec<_> = self.tasks.iter().filter_map(|entry| active(entry.key(), entry.value())).collect();
        found.sort_by(|a, b| a.task.cmp(&b.task));
        found
    }

    /// Swaps a task's state. `active` is its active version, where that is in memory.
    fn show(&self, task: &TaskName, state: TaskState, active: Option<&Arc<Version>>) -> Arc<TaskState> {
        let state = Arc::new(state);
        let old = self.tasks.insert(task.clone(), Slot::Read(Arc::clone(&state)));
        let before = old.as_ref().and_then(Slot::read).map_or(0, |old| old.mark(task));
        self.revision.fetch_xor(before ^ state.mark(task), Ordering::Relaxed);
        let before = old.and_then(|old| old.read().and_then(|old| old.active));
        if before != state.active
            && let Some(version) = active
        {
            self.tell(version);
        }
        state
    }

    /// A task is gone, with all that is in memory of it.
    fn forget(&self, seen: &mut Seen, task: &TaskName) {
        if let Some((_, Slot::Read(state))) = self.tasks.remove(task) {
            state.versions.iter().for_each(|stored| self.residency.remove(task, stored.digest));
            self.revision.fetch_xor(state.mark(task), Ordering::Relaxed);
        }
        seen.forget(task, &self.store.places().task(task));
    }

    fn tell(&self, version: &Arc<Version>) {
        if let Some(Listener(listener)) = self.listener.get() {
            listener(version);
        }
    }
}

/// The names of the tasks that a name means: several if it has a plus. See [`Registry::resolve`].
pub fn named_tasks(name: &str) -> impl Iterator<Item = &str> {
    name.split('+').map(|part| part.split_once('@').map_or(part, |(task, _)| task))
}

/// The tasks and versions that a name means: several if it has a plus.
fn parts<'a>(task: &'a str, version: Option<&'a str>) -> Result<Vec<(&'a str, Option<&'a str>)>, RegistryError> {
    let twice = || composition_refused(task, "it names versions itself, and the request names another".to_owned());
    if version.is_some() && task.contains(['+', '@']) {
        return Err(twice());
    }
    let part = |part: &'a str| part.split_once('@').map_or((part, version), |(task, version)| (task, Some(version)));
    Ok(task.split('+').map(part).collect())
}

fn composition_refused(name: &str, reason: String) -> RegistryError {
    RegistryError::Composition { name: name.chars().take(200).collect(), reason }
}

#[cfg(test)]
mod model_test;
#[cfg(test)]
mod residency_tests;
#[cfg(test)]
mod shared_tests;
#[cfg(test)]
mod tests;
