//! Old versions that nothing uses are deleted, where the server was told how many to keep.

use std::time::{Duration, SystemTime};

use super::{
    Registry,
    state::{Stored, TaskState},
};
use crate::prompt::TaskName;

/// Which versions of a task are kept, whether they are used or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keep {
    /// The newest ones.
    pub newest: usize,
    /// Those that were stored less than this ago.
    pub younger_than: Duration,
}

impl Keep {
    /// The ids of a task's versions that need not be kept, the newest first. What answers or is named is always kept, and so is
    /// the version that a rollback would bring back.
    fn superfluous(&self, state: &TaskState, now: SystemTime) -> Vec<String> {
        let routing = &state.routing;
        let in_use = |stored: &&Stored| {
            let digest = stored.digest;
            [state.active, state.plain, routing.previous.first().copied()].contains(&Some(digest))
                || routing.use_of(digest).is_some()
                || stored.kept.is_some()
        };
        // A clock that was set back makes no version old.
        let is_old = |stored: &&Stored| now.duration_since(stored.stored_at).is_ok_and(|age| age >= self.younger_than);
        let beyond = state.versions.iter().skip(self.newest);
        beyond.filter(|stored| !in_use(stored) && is_old(stored)).map(|stored| stored.digest.id()).collect()
    }
}

impl Registry {
    /// Deletes the versions of a task that need not be kept. Blocks on the store.
    pub(super) fn collect(&self, task: &TaskName) {
        let Some((keep, state)) = self.config.keep.zip(self.known_state(task)) else { return };
        for id in keep.superfluous(&state, SystemTime::now()) {
            // It looks at the task again, so what came into use meanwhile is not deleted.
            match self.delete_version(task.as_str(), &id) {
                Ok(_) => tracing::info!(%task, version = id, "an old version that nothing uses was deleted"),
                Err(error) => {
                    tracing::warn!(%task, version = id, %error, "an old version cannot be deleted");
                    return;
                }
            }
        }
    }

    /// Deletes the versions of all tasks that need not be kept, while `go_on` says so. Blocks on the store.
    pub(super) fn collect_all(&self, go_on: impl Fn() -> bool) {
        if self.config.keep.is_some() {
            let tasks: Vec<TaskName> = self.tasks.iter().map(|entry| entry.key().clone()).collect();
            tasks.iter().take_while(|_| go_on()).for_each(|task| self.collect(task));
        }
    }
}
