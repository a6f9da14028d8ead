//! What lies in the store becomes what is served: at the start, before each change, and whenever the store changed. What is
//! wrong in the store, or a store that does not answer, never takes out of service what runs.

use std::{
    collections::HashSet,
    io,
    time::{Duration, Instant},
};

use super::{
    Registry,
    load::Loaded,
    seen::Seen,
    state::Slot,
    store::{Basis, Mark},
};
use crate::prompt::TaskName;

/// The tasks that are read before the registry is open, at most, and for how long; the others are read when they are needed.
const READ_AT_START: usize = 500;
const READ_AT_START_FOR: Duration = Duration::from_secs(1);

impl Registry {
    /// Learns the names of all tasks in the store, and reads the first ones.
    pub(super) fn scan_first(&self) -> io::Result<()> {
        let mut seen = self.writer();
        let names = self.names_in_store(&mut seen, false)?;
        let started = Instant::now();
        for (i, (task, _)) in names.into_iter().enumerate() {
            if i < READ_AT_START && started.elapsed() < READ_AT_START_FOR {
                self.scan_or_warn(&mut seen, &task);
            } else if self.tasks.len() < self.config.max_tasks {
                self.tasks.insert(task, Slot::Unread);
            } else {
                let problem = format!("there are more than {} tasks, which is the maximum", self.config.max_tasks);
                seen.warn(self.store.places().root(), problem);
                break;
            }
        }
        Ok(())
    }

    /// Brings all tasks that were read, and new ones, in line with the store. Other writers get their turn between two tasks.
    pub(super) fn scan_all(&self) -> io::Result<()> {
        let in_store = self.names_in_store(&mut self.writer(), true)?;
        let gone: Vec<TaskName> = {
            let here: HashSet<&TaskName> = in_store.iter().map(|(task, _)| task).collect();
            self.tasks.iter().map(|entry| entry.key().clone()).filter(|task| !here.contains(task)).collect()
        };
        let gone = gone.iter().map(|task| (task, None));
        let here = in_store.iter().filter(|(task, _)| !self.is_unread(task)).map(|(task, mark)| (task, *mark));
        for (task, mark) in gone.chain(here) {
            let mut seen = self.writer();
            if mark.is_some() && seen.marks.get(task).copied() == mark {
                continue;
            }
            if self.scan_or_warn(&mut seen, task) {
                mark.map(|mark| seen.marks.insert(task.clone(), mark));
            } else if self.store.health().away().is_some() {
                // The others would wait for the same answer.
                break;
            }
        }
        Ok(())
    }

    /// Reads the tasks that nobody has asked for yet, while `go_on` says so.
    pub(super) fn read_ahead(&self, go_on: impl Fn() -> bool) {
        let unread = |slot: &Slot| matches!(slot, Slot::Unread);
        let tasks: Vec<TaskName> =
            self.tasks.iter().filter(|entry| unread(entry.value())).map(|entry| entry.key().clone()).collect();
        for task in tasks.iter().take_while(|_| go_on()) {
            if let Err(e) = self.read_unread(task) {
                self.writer().warn(&self.store.places().task(task), format!("cannot read it: {e}"));
            }
        }
    }

    /// Reads a task that was not read yet.
    pub(super) fn read_unread(&self, task: &TaskName) -> io::Result<()> {
        let mut seen = self.writer();
        if self.is_unread(task) {
            self.scan_task(&mut seen, task)?;
        }
        Ok(())
    }

    fn is_unread(&self, task: &TaskName) -> bool {
        self.tasks.get(task).is_some_and(|entry| matches!(entry.value(), Slot::Unread))
    }

    fn names_in_store(&self, seen: &mut Seen, marks: bool) -> io::Result<Vec<(TaskName, Option<Mark>)>> {
        let found = self.store.list(marks)?;
        for (path, problem) in found.others {
            seen.warn(&path, problem);
        }
        Ok(found.tasks)
    }

    /// As [`scan_task`](Self::scan_task); false, and what is known stays, if the store cannot be read.
    fn scan_or_warn(&self, seen: &mut Seen, task: &TaskName) -> bool {
        let outcome = self.scan_task(seen, task);
        if let Err(e) = &outcome {
            seen.warn(&self.store.places().task(task), format!("cannot read it: {e}"));
        }
        outcome.is_ok()
    }

    /// Brings one task in line with the store. Returns what a change of it has to be based on.
    pub(super) fn scan_task(&self, seen: &mut Seen, task: &TaskName) -> io::Result<Basis> {
        let was_unread = self.is_unread(task);
        let old = self.known_state(task);
        let known = |id: &str| old.as_ref().is_some_and(|old| old.by_id(id).is_some());
        let found = self.store.look(task, &known)?;
        let basis = found.as_ref().map(|found| found.basis.clone()).unwrap_or_default();
        let has_prompt = found.as_ref().is_some_and(|found| !found.versions.is_empty() || found.plain.is_some());
        if old.is_none() && !was_unread && self.tasks.len() >= self.config.max_tasks && has_prompt {
            let problem = format!("there are {} tasks already, which is the maximum", self.config.max_tasks);
            seen.warn(&self.store.places().task(task), problem);
            return Ok(basis);
        }
        let mark = found.as_ref().and_then(|found| found.mark);
        let loaded = match found {
            Some(found) => self.load_task(seen, task, old.as_deref(), found)?,
            None => None,
        };
        mark.map(|mark| seen.marks.insert(task.clone(), mark));
        let Some(Loaded { state, read }) = loaded else {
            if old.is_some() {
                tracing::info!(%task, "the task's files are gone, so it is no longer served");
            }
            if old.is_some() || was_unread {
                self.forget(seen, task);
            }
            return Ok(basis);
        };
        let is_new = old.as_ref().map(|old| old.active) != Some(state.active);
        if is_new && !was_unread {
            let version = state.active.map_or_else(|| "none".to_owned(), |active| active.id());
            tracing::info!(%task, version, generation = state.generation, "active version read from the store");
        }
        // Read ahead, a version takes only room that is free; one that begins to answer will be asked for.
        if let Some(active) = read.into_iter().find(|version| is_new && Some(version.digest) == state.active) {
            match old.is_some() {
                true => self.residency.insert(active),
                false => self.residency.offer(active),
            }
        }
        let active = state.active.and_then(|active| self.residency.peek(task, active));
        for gone in old.iter().flat_map(|old| &old.versions).filter(|old| state.by_digest(old.digest).is_none()) {
            self.residency.remove(task, gone.digest);
        }
        self.show(task, state, active.as_ref());
        Ok(basis)
    }
}
