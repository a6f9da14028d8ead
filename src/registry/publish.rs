//! Changes of versions: publish, delete. One writer at a time, and every change is in the store before it is seen.

use std::{sync::Arc, time::Duration};

use super::{
    Registry, RegistryError,
    seen::Seen,
    state::{Stored, TaskState},
    store::{Basis, ReadError},
};
use crate::prompt::{
    Digest, TaskName, Version,
    format::{self, Fault, FaultKind, Faults, PromptFiles},
};

/// How often a change is tried that others are quicker than.
const MAX_ATTEMPTS: u32 = 10;
/// The longest time until the second attempt; later ones wait longer.
const RETRY_AFTER: Duration = Duration::from_millis(30);

/// What a publish did.
#[derive(Debug, Clone)]
pub struct Published {
    pub version: Arc<Version>,
    /// False when the very same version was there before.
    pub created: bool,
    pub active: bool,
    pub generation: u64,
    /// The ids of the task's active version before and after.
    pub active_before: Option<String>,
    pub active_after: Option<String>,
}

impl Registry {
    /// Checks, stores and then shows a version. Blocks on the disk: call it off the async threads.
    pub fn publish(&self, task: TaskName, files: PromptFiles, activate: bool) -> Result<Published, RegistryError> {
        let version = self.read_version(task, &files)?;
        self.publish_checked(version, files, activate)
    }

    /// Reads a version and checks it against the model. Nothing is stored.
    pub fn read_version(&self, task: TaskName, files: &PromptFiles) -> Result<Arc<Version>, RegistryError> {
        Ok(Arc::new(format::read(task, files, &self.config.fit)?))
    }

    /// Stores and then shows a version that [`read_version`](Self::read_version) has read of these files. Blocks on the store.
    pub fn publish_checked(
        &self,
        version: Arc<Version>,
        files: PromptFiles,
        activate: bool,
    ) -> Result<Published, RegistryError> {
        let published = until_first(|| self.try_publish(&version, &files, activate))?;
        self.collect(&version.task);
        Ok(published)
    }

    fn try_publish(
        &self,
        version: &Arc<Version>,
        files: &PromptFiles,
        activate: bool,
    ) -> Result<Published, RegistryError> {
        let (version, task) = (Arc::clone(version), version.task.clone());
        let mut seen = self.writer();
        let _lock = self.store.lock();
        let basis = self.scan_task(&mut seen, &task)?;

        let digest = version.digest;
        let old = self.known_state(&task);
        if let Some(state) = &old
            && let Some(found) = state.by_id(&digest.id())
        {
            return self.publish_again(state, &basis, found.digest, version, files, activate);
        }
        self.check_room(&task, old.as_deref())?;

        // A task that was deleted goes on where its generation was.
        let is_new = || TaskState { generation: basis.generation, ..TaskState::default() };
        let mut state = old.as_deref().cloned().unwrap_or_else(is_new);
        let active_before = state.active.map(|active| active.id());
        if activate {
            state.generation = state.generation.max(basis.generation).saturating_add(1);
            state.routing.push_previous(state.active);
            state.routing.set_shares(Vec::new());
            state.active = Some(digest);
        }
        let active = activate.then(|| state.routing.to_file(digest, state.generation));
        let stored_at = self.store.add_version(&task, digest, files, active.as_ref(), &basis)?;
        state.insert(Stored::new(digest, stored_at));
        let (generation, active_after) = (state.generation, state.active.map(|active| active.id()));
        self.residency.insert(Arc::clone(&version));
        self.show(&task, state, Some(&version));
        tracing::info!(%task, version = %digest, active = activate, generation, "published");
        for warning in &version.warnings {
            tracing::warn!(%task, version = %digest, "{warning}");
        }
        Ok(Published { version, created: true, active: activate, generation, active_before, active_after })
    }

    /// Removes a task and its versions; running requests finish on what they hold. The id of the version that was active.
    /// Blocks on the store.
    pub fn delete_task(&self, task: &str) -> Result<Option<String>, RegistryError> {
        until_first(|| {
            let mut seen = self.writer();
            let _lock = self.store.lock();
            let (name, state, basis) = self.fresh_state(&mut seen, task)?;
            self.remove(&mut seen, &name, &state, &basis)?;
            Ok(state.active.map(|active| active.id()))
        })
    }

    /// Removes one version; the active one only as the last of its task, which then goes too. Its id, and that of the version
    /// that is active. Blocks on the store.
    pub fn delete_version(&self, task: &str, version: &str) -> Result<(String, Option<String>), RegistryError> {
        until_first(|| self.try_delete_version(task, version))
    }

    fn try_delete_version(&self, task: &str, version: &str) -> Result<(String, Option<String>), RegistryError> {
        let mut seen = self.writer();
        let _lock = self.store.lock();
        let (name, state, basis) = self.fresh_state(&mut seen, task)?;
        let digest = state.find(&name, version)?.digest;
        if state.versions.len() == 1 {
            self.remove(&mut seen, &name, &state, &basis)?;
            return Ok((digest.id(), None));
        }
        if state.active == Some(digest) {
            return Err(RegistryError::VersionActive { task: name, version: digest.id() });
        }
        if let Some(reason) = state.routing.use_of(digest) {
            return Err(RegistryError::VersionInUse { task: name, version: digest.id(), reason });
        }
        let mut state = TaskState::clone(&state);
        state.routing.forget(digest);
        let active = state.active.map(|active| state.routing.to_file(active, state.generation));
        self.store.remove_version(&name, &digest.id(), active.as_ref(), &basis)?;
        if state.plain == Some(digest) {
            self.store.remove_plain(&name)?;
            state.plain = None;
        }
        state.versions.retain(|stored| stored.digest != digest);
        self.residency.remove(&name, digest);
        let state = self.show(&name, state, None);
        tracing::info!(task = %name, version = %digest, "deleted version");
        Ok((digest.id(), state.active.map(|active| active.id())))
    }

    /// A task as the store has it now, for a writer.
    pub(super) fn fresh_state(
        &self,
        seen: &mut Seen,
        task: &str,
    ) -> Result<(TaskName, Arc<TaskState>, Basis), RegistryError> {
        let basis = match task.parse() {
            Ok(name) => self.scan_task(seen, &name)?,
            Err(_) => Basis::default(),
        };
        let (name, state) = self.read_state(task)?;
        Ok((name, state, basis))
    }

    /// Publishes what is stored under the digest `found`.
    fn publish_again(
        &self,
        state: &Arc<TaskState>,
        basis: &Basis,
        found: Digest,
        version: Arc<Version>,
        files: &PromptFiles,
        activate: bool,
    ) -> Result<Published, RegistryError> {
        let (task, digest) = (&version.task, version.digest);
        if found != digest {
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
        let id = |state: &TaskState| state.active.map(|active| active.id());
        let active_before = id(state);
        let state = self.repaired(task, state, basis, digest, files)?;
        self.residency.insert(Arc::clone(&version));
        let state = if activate { self.make_active(task, &state, basis, &version)? } else { state };
        let active = state.active == Some(digest);
        let (generation, active_after) = (state.generation, id(&state));
        Ok(Published { version, created: false, active, generation, active_before, active_after })
    }

    /// Stores a version's files again where those in the store were damaged or removed.
    fn repaired(
        &self,
        task: &TaskName,
        state: &Arc<TaskState>,
        basis: &Basis,
        digest: Digest,
        files: &PromptFiles,
    ) -> Result<Arc<TaskState>, RegistryError> {
        let is_plain = state.plain == Some(digest) && self.store.read_plain(task).is_ok_and(|f| f.digest() == digest);
        if is_plain {
            return Ok(Arc::clone(state));
        }
        match self.store.read_version(task, &digest.id()) {
            Ok(_) => return Ok(Arc::clone(state)),
            Err(ReadError::Store(error)) => return Err(error.into()),
            Err(_) => {}
        }
        tracing::warn!(%task, version = %digest, "the version's files could not be read; they are stored again");
        self.store.add_version(task, digest, files, None, basis)?;
        let mut state = TaskState::clone(state);
        state.versions.iter_mut().filter(|stored| stored.digest == digest).for_each(|stored| stored.kept = None);
        Ok(self.show(task, state, None))
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

    /// Makes a version the active one, which ends a split.
    fn make_active(
        &self,
        task: &TaskName,
        state: &Arc<TaskState>,
        basis: &Basis,
        version: &Arc<Version>,
    ) -> Result<Arc<TaskState>, RegistryError> {
        let mut routing = state.routing.clone();
        routing.set_shares(Vec::new());
        if state.active == Some(version.digest) && routing == state.routing {
            return Ok(Arc::clone(state));
        }
        routing.push_previous(state.active);
        self.route(task, state, basis, version.digest, routing)
    }

    fn remove(&self, seen: &mut Seen, task: &TaskName, state: &TaskState, basis: &Basis) -> Result<(), RegistryError> {
        let basis = Basis { generation: basis.generation.max(state.generation), ..basis.clone() };
        self.store.remove_task(task, &basis)?;
        self.forget(seen, task);
        tracing::info!(%task, "deleted task");
        Ok(())
    }
}

/// Tries a change again where somebody else's was first: each time it looks at what is there then.
pub(super) fn until_first<T>(change: impl Fn() -> Result<T, RegistryError>) -> Result<T, RegistryError> {
    for attempt in 1..MAX_ATTEMPTS {
        match change() {
            Err(RegistryError::Conflict) => {
                let most = RETRY_AFTER * attempt;
                std::thread::sleep(most.mul_f64(rand::random()));
            }
            outcome => return outcome,
        }
    }
    change()
}
