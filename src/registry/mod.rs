//! Task names to versions: publish, resolve, activate, retire. Names move; versions never change.

mod composition;
mod curve;
pub mod package;
mod scan;
mod state;
mod store;
mod watch;

use std::{
    fmt,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use dashmap::DashMap;

use crate::prompt::{
    TaskName, Version,
    format::{self, Fault, FaultKind, Faults, Fit, PromptFiles},
};
use composition::Compositions;
use scan::Scan;
use state::{Stored, TaskState};
pub use state::{TaskEntry, VersionEntry};
use store::{Active, Store};
pub use watch::Watcher;

/// The fewest hex digits that name a version.
pub const MIN_VERSION_PREFIX: usize = 6;

/// The most names that an error lists.
const MAX_KNOWN: usize = 20;

/// Where prompts are kept and what they must fit.
#[derive(Debug, Clone)]
pub struct RegistryConfig {
    /// The folder described in README "Files under --prompts".
    pub root: PathBuf,
    pub fit: Fit,
    /// Bounds, so that a registry cannot grow without end.
    pub max_tasks: usize,
    pub max_versions_per_task: usize,
}

/// All tasks that can be called. Cheap to share; readers never wait for a writer.
#[derive(Debug)]
pub struct Registry {
    config: RegistryConfig,
    store: Store,
    /// Readers clone an `Arc` out of a shard that is locked for no longer than that; a writer
    /// prepares a whole new state beside it and swaps one pointer.
    tasks: DashMap<TaskName, Arc<TaskState>>,
    /// One mutex for all writers: publishing is rare and waits for the disk anyway, and one order
    /// of changes for memory and disk is easy to be sure of. Holds what the last scan has seen.
    writer: Mutex<Scan>,
    /// Told of each version that becomes the one that answers.
    listener: OnceLock<Listener>,
    compositions: Compositions,
}

/// What [`Registry::on_active`] was given.
struct Listener(Box<OnActive>);

type OnActive = dyn Fn(&Arc<Version>) + Send + Sync;

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Listener")
    }
}

/// What a publish did.
#[derive(Debug, Clone)]
pub struct Published {
    pub version: Arc<Version>,
    /// False when the very same version was there before.
    pub created: bool,
    pub active: bool,
    pub generation: u64,
}

/// Why the registry refused; what it held before, it still holds.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// `known` has the first names there are.
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
    /// Several prompts cannot be one.
    #[error("{name:?} cannot be combined: {reason}")]
    Composition { name: String, reason: String },
    #[error("the registry is full: {what}")]
    Full { what: String },
    #[error("cannot write to the prompt store: {0}")]
    Store(#[from] std::io::Error),
}

impl Registry {
    /// Reads every task under the root. A folder that is wrong is logged and left out; it does not
    /// keep the others from being served.
    pub fn open(config: RegistryConfig) -> Result<Arc<Self>, RegistryError> {
        let store = Store::open(&config.root)?;
        let (writer, listener) = (Mutex::new(Scan::default()), OnceLock::new());
        let compositions = Compositions::default();
        let registry = Self { config, store, tasks: DashMap::new(), writer, listener, compositions };
        registry.scan_all(&mut registry.writer())?;
        Ok(Arc::new(registry))
    }

    /// The version that answers: the active one, or the one named by its id or by the beginning of
    /// its digest, at least [`MIN_VERSION_PREFIX`] hex digits. `task` may name the version itself, as `task@version`, and
    /// several prompts that become one, as `task+task@version`. Never blocks on the disk.
    pub fn resolve(&self, task: &str, version: Option<&str>) -> Result<Arc<Version>, RegistryError> {
        let refused = |reason| RegistryError::Composition { name: task.chars().take(200).collect(), reason };
        let (task, version) = match (task.contains('+'), task.split_once('@'), version) {
            (true, _, None) => {
                let parts = task.split('+').map(|part| self.resolve(part, None)).collect::<Result<Vec<_>, _>>()?;
                return self.compositions.compose(&parts).map_err(refused);
            }
            (true, _, Some(_)) | (false, Some(_), Some(_)) => {
                return Err(refused("it names versions itself, and the request names another".to_owned()));
            }
            (false, Some((task, version)), None) => (task, Some(version)),
            (false, None, version) => (task, version),
        };
        let (name, state) = self.state(task)?;
        match version {
            Some(version) => state.find(&name, version).map(|stored| stored.version.clone()),
            None => state.active.clone().ok_or(RegistryError::NoActiveVersion { task: name }),
        }
    }

    /// The active version of every task that has one, by name.
    pub fn active(&self) -> Vec<Arc<Version>> {
        let mut active: Vec<_> = self.tasks.iter().filter_map(|entry| entry.value().active.clone()).collect();
        active.sort_by(|a, b| a.task.cmp(&b.task));
        active
    }

    /// Every task with all versions, by name.
    pub fn tasks(&self) -> Vec<TaskEntry> {
        let mut tasks: Vec<_> = self.tasks.iter().map(|entry| entry.value().entry(entry.key())).collect();
        tasks.sort_by(|a, b| a.task.cmp(&b.task));
        tasks
    }

    /// One task with all versions.
    pub fn task(&self, task: &str) -> Result<TaskEntry, RegistryError> {
        let (name, state) = self.state(task)?;
        Ok(state.entry(&name))
    }

    /// Checks, stores and then shows a version. Blocks on the disk: call it off the async threads.
    pub fn publish(&self, task: TaskName, files: PromptFiles, activate: bool) -> Result<Published, RegistryError> {
        let version = self.read_version(task, &files)?;
        self.publish_checked(version, files, activate)
    }

    /// Reads a version and checks it against the model. Nothing is stored.
    pub fn read_version(&self, task: TaskName, files: &PromptFiles) -> Result<Arc<Version>, RegistryError> {
        Ok(Arc::new(format::read(task, files, &self.config.fit)?))
    }

    /// Stores and then shows a version that [`read_version`](Self::read_version) has read of these files. Blocks on the disk.
    pub fn publish_checked(
        &self,
        version: Arc<Version>,
        files: PromptFiles,
        activate: bool,
    ) -> Result<Published, RegistryError> {
        let task = version.task.clone();
        let mut scan = self.writer();
        let _lock = self.store.lock();
        self.scan_task(&mut scan, &task);

        let digest = version.digest;
        let old = self.get(task.as_str()).map(|(_, state)| state);
        if let Some(state) = &old
            && let Some(found) = state.versions.iter().find(|stored| stored.version.digest.id() == digest.id())
        {
            return self.publish_again(state, found.version.clone(), &version, &files, activate);
        }
        self.check_room(&task, old.as_deref())?;

        let mut state = old.as_deref().cloned().unwrap_or_default();
        if activate {
            state.generation = state.generation.saturating_add(1);
            state.active = Some(version.clone());
        }
        let active = activate.then(|| Active { version: digest.id(), generation: state.generation });
        self.store.add_version(&task, digest, &files, active.as_ref())?;
        let stored_at = self.store.stored_at(&self.store.version_dir(&task, &digest.id()));
        state.insert(Stored { version: version.clone(), stored_at });
        let generation = state.generation;
        self.show(&task, state);
        tracing::info!(%task, version = %digest, active = activate, generation, "published");
        for warning in &version.warnings {
            tracing::warn!(%task, version = %digest, "{warning}");
        }
        Ok(Published { version, created: true, active: activate, generation })
    }

    /// Makes a stored version the one that answers, if the generation is still `expected`. Blocks
    /// on the disk.
    pub fn activate(&self, task: &str, version: &str, expected: Option<u64>) -> Result<TaskEntry, RegistryError> {
        let mut scan = self.writer();
        let _lock = self.store.lock();
        let (name, state) = self.fresh_state(&mut scan, task)?;
        let version = state.find(&name, version)?.version.clone();
        if let Some(expected) = expected.filter(|expected| *expected != state.generation) {
            return Err(RegistryError::PreconditionFailed { expected: expected.to_string(), found: state.generation });
        }
        self.make_active(&name, &state, version).map(|state| state.entry(&name))
    }

    /// Removes a task and its versions; running requests finish on what they hold. Blocks on the
    /// disk.
    pub fn delete_task(&self, task: &str) -> Result<(), RegistryError> {
        let mut scan = self.writer();
        let _lock = self.store.lock();
        let (name, _) = self.fresh_state(&mut scan, task)?;
        self.remove(&mut scan, &name)
    }

    /// Removes one version; the active one only as the last of its task, which then goes too.
    /// Blocks on the disk.
    pub fn delete_version(&self, task: &str, version: &str) -> Result<(), RegistryError> {
        let mut scan = self.writer();
        let _lock = self.store.lock();
        let (name, state) = self.fresh_state(&mut scan, task)?;
        let digest = state.find(&name, version)?.version.digest;
        if state.versions.len() == 1 {
            return self.remove(&mut scan, &name);
        }
        if state.active.as_ref().is_some_and(|active| active.digest == digest) {
            return Err(RegistryError::VersionActive { task: name, version: digest.id() });
        }
        self.store.remove_version(&name, &digest.id())?;
        let mut state = TaskState::clone(&state);
        if state.plain == Some(digest) {
            self.store.remove_plain(&name)?;
            state.plain = None;
        }
        state.versions.retain(|stored| stored.version.digest != digest);
        self.show(&name, state);
        tracing::info!(task = %name, version = %digest, "deleted version");
        Ok(())
    }

    /// Follows changes made to the folder by hand, by git or by another process until the
    /// returned guard is dropped.
    pub fn watch(self: &Arc<Self>) -> Result<Watcher, RegistryError> {
        Ok(Watcher::start(self, self.store.root())?)
    }

    /// Calls `listener` with the version of each task that answers now, and from then on with each
    /// that begins to, however that comes about. It is called while a writer holds the registry, so
    /// it must not wait. Only the first listener is heard.
    pub fn on_active(&self, listener: impl Fn(&Arc<Version>) + Send + Sync + 'static) {
        let _order = self.writer();
        if self.listener.set(Listener(Box::new(listener))).is_ok() {
            self.active().iter().for_each(|version| self.tell(version));
        }
    }

    /// Looks for changes on the disk now. Blocks on the disk.
    pub fn rescan(&self) -> Result<(), RegistryError> {
        Ok(self.scan_all(&mut self.writer())?)
    }

    fn writer(&self) -> MutexGuard<'_, Scan> {
        // A panic in a writer leaves a whole state behind: states are swapped, never changed.
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, task: &str) -> Option<(TaskName, Arc<TaskState>)> {
        self.tasks.get(task).map(|entry| (entry.key().clone(), entry.value().clone()))
    }

    fn state(&self, task: &str) -> Result<(TaskName, Arc<TaskState>), RegistryError> {
        self.get(task).ok_or_else(|| {
            let mut known: Vec<TaskName> = self.tasks.iter().map(|entry| entry.key().clone()).collect();
            known.sort();
            known.truncate(MAX_KNOWN);
            RegistryError::TaskNotFound { task: task.chars().take(80).collect(), known }
        })
    }

    /// A task as the disk has it now, for a writer.
    fn fresh_state(&self, scan: &mut Scan, task: &str) -> Result<(TaskName, Arc<TaskState>), RegistryError> {
        if let Ok(name) = task.parse() {
            self.scan_task(scan, &name);
        }
        self.state(task)
    }

    fn show(&self, task: &TaskName, state: TaskState) -> Arc<TaskState> {
        let state = Arc::new(state);
        let old = self.tasks.insert(task.clone(), state.clone());
        let before = old.and_then(|old| old.active.as_ref().map(|version| version.digest));
        if let Some(version) = state.active.as_ref().filter(|version| before != Some(version.digest)) {
            self.tell(version);
        }
        state
    }

    fn tell(&self, version: &Arc<Version>) {
        if let Some(Listener(listener)) = self.listener.get() {
            listener(version);
        }
    }

    fn publish_again(
        &self,
        state: &Arc<TaskState>,
        version: Arc<Version>,
        again: &Version,
        files: &PromptFiles,
        activate: bool,
    ) -> Result<Published, RegistryError> {
        let (task, digest) = (&again.task, again.digest);
        if version.digest != digest {
            let detail = format!(
                "another version has the same id {digest}, whose first {} hex digits are equal; change the prompt's \
                 description in task.json and publish it again",
                digest.id().len()
            );
            return Err(Faults(vec![Fault { kind: FaultKind::Malformed, detail }]).into());
        }
        if let Some(curve) = &files.curve {
            self.store.add_curve(task, &digest.id(), curve)?;
        }
        let state = if activate { self.make_active(task, state, version.clone())? } else { state.clone() };
        let active = state.active.as_ref().is_some_and(|active| active.digest == digest);
        Ok(Published { version, created: false, active, generation: state.generation })
    }

    fn check_room(&self, task: &TaskName, state: Option<&TaskState>) -> Result<(), RegistryError> {
        let (max_tasks, max_versions) = (self.config.max_tasks, self.config.max_versions_per_task);
        match state {
            None if self.tasks.len() >= max_tasks => {
                let what = format!("there are {max_tasks} tasks, which is the maximum; delete one first");
                Err(RegistryError::Full { what })
            }
            Some(state) if state.versions.len() >= max_versions => {
                let what = format!(
                    "task {task} has {} versions; the maximum is {max_versions}; delete one first",
                    state.versions.len()
                );
                Err(RegistryError::Full { what })
            }
            _ => Ok(()),
        }
    }

    fn make_active(
        &self,
        task: &TaskName,
        state: &Arc<TaskState>,
        version: Arc<Version>,
    ) -> Result<Arc<TaskState>, RegistryError> {
        if state.active.as_ref().is_some_and(|active| active.digest == version.digest) {
            return Ok(state.clone());
        }
        let generation = state.generation.saturating_add(1);
        self.store.write_active(task, &Active { version: version.digest.id(), generation })?;
        tracing::info!(%task, version = %version.digest, generation, "activated");
        Ok(self.show(task, TaskState { generation, active: Some(version), ..TaskState::clone(state) }))
    }

    fn remove(&self, scan: &mut Scan, task: &TaskName) -> Result<(), RegistryError> {
        self.store.remove_task(task)?;
        self.tasks.remove(task);
        scan.forget(&self.store.task_dir(task));
        tracing::info!(%task, "deleted task");
        Ok(())
    }
}

#[cfg(test)]
mod model_test;
#[cfg(test)]
mod tests;
