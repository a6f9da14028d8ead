//! What lies in the store becomes what is served: at the start, before each change, and whenever the store changed. What is
//! wrong in the store, or a store that does not answer, never takes out of service what runs.

use std::{
    collections::{HashMap, HashSet},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Registry, RegistryError,
    routing::Routing,
    state::{Slot, Stored, TaskState},
    store::{Active, Basis, Contents, Found, Mark, ReadError, Stamp},
};
use crate::prompt::{
    Digest, TaskName, Version,
    format::{self, PromptFiles},
};

/// What earlier scans saw, so that nothing is read or complained about twice.
#[derive(Debug, Default)]
pub(super) struct Scan {
    /// The state in which a plain directory was last read, or in which a version was refused.
    read: HashMap<PathBuf, Stamp>,
    /// The last warning for each path.
    warned: HashMap<PathBuf, String>,
    /// How each task was marked in the store when it was last read, where the store marks them.
    marks: HashMap<TaskName, Mark>,
}

impl Scan {
    /// Drops what is known of a task that is gone, which lay in `dir`.
    pub fn forget(&mut self, task: &TaskName, dir: &Path) {
        self.marks.remove(task);
        self.read.retain(|path, _| !path.starts_with(dir));
        self.warned.retain(|path, _| !path.starts_with(dir));
    }

    /// Whether a folder is as it was when it was last read.
    fn is_unchanged(&self, dir: &Path, stamp: &Stamp) -> bool {
        self.read.get(dir) == Some(stamp)
    }

    /// A folder was read. One that changed just now may still change within the clock's tick, so
    /// it is read once more.
    fn was_read(&mut self, dir: &Path, stamp: Stamp) {
        match stamp.is_fresh() {
            true => self.read.remove(dir),
            false => self.read.insert(dir.to_owned(), stamp),
        };
    }

    /// Logs what is wrong with a path, once.
    fn warn(&mut self, path: &Path, problem: String) {
        if self.warned.get(path) != Some(&problem) {
            tracing::warn!(path = %path.display(), "ignored, or left unchanged: {problem}");
            self.warned.insert(path.to_owned(), problem);
        }
    }

    fn fine(&mut self, path: &Path) {
        self.warned.remove(path);
    }
}

/// The tasks that are read before the registry is open, at most, and for how long; the others are read when they are needed.
const READ_AT_START: usize = 500;
const READ_AT_START_FOR: Duration = Duration::from_secs(1);

/// A task as the store has it.
struct Loaded {
    state: TaskState,
    /// The versions that were read for it just now.
    read: Vec<Arc<Version>>,
}

impl Registry {
    /// Learns the names of all tasks in the store, and reads the first ones.
    pub(super) fn scan_first(&self) -> io::Result<()> {
        let mut scan = self.writer();
        let names = self.names_in_store(&mut scan, false)?;
        let started = Instant::now();
        for (i, (task, _)) in names.into_iter().enumerate() {
            if i < READ_AT_START && started.elapsed() < READ_AT_START_FOR {
                self.scan_or_warn(&mut scan, &task);
            } else if self.tasks.len() < self.config.max_tasks {
                self.tasks.insert(task, Slot::Unread);
            } else {
                let problem = format!("there are more than {} tasks, which is the maximum", self.config.max_tasks);
                scan.warn(self.store.places().root(), problem);
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
            let mut scan = self.writer();
            if mark.is_some() && scan.marks.get(task).copied() == mark {
                continue;
            }
            if self.scan_or_warn(&mut scan, task) {
                mark.map(|mark| scan.marks.insert(task.clone(), mark));
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
        let mut scan = self.writer();
        if self.is_unread(task) {
            self.scan_task(&mut scan, task)?;
        }
        Ok(())
    }

    fn is_unread(&self, task: &TaskName) -> bool {
        self.tasks.get(task).is_some_and(|entry| matches!(entry.value(), Slot::Unread))
    }

    fn names_in_store(&self, scan: &mut Scan, marks: bool) -> io::Result<Vec<(TaskName, Option<Mark>)>> {
        let found = self.store.list(marks)?;
        for (path, problem) in found.others {
            scan.warn(&path, problem);
        }
        Ok(found.tasks)
    }

    /// As [`scan_task`](Self::scan_task); false, and what is known stays, if the store cannot be read.
    fn scan_or_warn(&self, scan: &mut Scan, task: &TaskName) -> bool {
        let outcome = self.scan_task(scan, task);
        if let Err(e) = &outcome {
            scan.warn(&self.store.places().task(task), format!("cannot read it: {e}"));
        }
        outcome.is_ok()
    }

    /// Brings one task in line with the store. Returns what a change of it has to be based on.
    pub(super) fn scan_task(&self, scan: &mut Scan, task: &TaskName) -> io::Result<Basis> {
        let was_unread = self.is_unread(task);
        let old = self.known_state(task);
        let known = |id: &str| old.as_ref().is_some_and(|old| old.by_id(id).is_some());
        let found = self.store.look(task, &known)?;
        let basis = found.as_ref().map(|found| found.basis.clone()).unwrap_or_default();
        let has_prompt = found.as_ref().is_some_and(|found| !found.versions.is_empty() || found.plain.is_some());
        if old.is_none() && !was_unread && self.tasks.len() >= self.config.max_tasks && has_prompt {
            let problem = format!("there are {} tasks already, which is the maximum", self.config.max_tasks);
            scan.warn(&self.store.places().task(task), problem);
            return Ok(basis);
        }
        let mark = found.as_ref().and_then(|found| found.mark);
        let loaded = match found {
            Some(found) => self.load_task(scan, task, old.as_deref(), found)?,
            None => None,
        };
        mark.map(|mark| scan.marks.insert(task.clone(), mark));
        let Some(Loaded { state, read }) = loaded else {
            if old.is_some() {
                tracing::info!(%task, "the task's files are gone, so it is no longer served");
            }
            if old.is_some() || was_unread {
                self.forget(scan, task);
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

    fn load_task(
        &self,
        scan: &mut Scan,
        task: &TaskName,
        old: Option<&TaskState>,
        found: Contents,
    ) -> io::Result<Option<Loaded>> {
        let Contents { versions, plain, active, basis, mark: _ } = found;
        let mut loaded = Loaded { state: TaskState::default(), read: Vec::new() };
        self.load_versions(scan, task, old, versions, &mut loaded)?;
        if let Some(plain) = self.load_plain(scan, task, old, plain, &mut loaded.read)? {
            loaded.state.plain = Some(plain.digest);
            if loaded.state.by_digest(plain.digest).is_none() {
                loaded.state.insert(plain);
            }
        }
        self.choose_active(scan, task, active, basis.generation, &mut loaded, old)?;
        self.drop_oldest(scan, task, &mut loaded.state);
        Ok((!loaded.state.versions.is_empty()).then_some(loaded))
    }

    fn load_versions(
        &self,
        scan: &mut Scan,
        task: &TaskName,
        old: Option<&TaskState>,
        found: Vec<Found>,
        loaded: &mut Loaded,
    ) -> io::Result<()> {
        for Found { id, stamp, stored_at } in found {
            // A version never changes, so one that was read once need not be read again.
            if let Some(known) = old.and_then(|old| old.by_id(&id)) {
                loaded.state.insert(Stored::new(known.digest, known.stored_at));
                continue;
            }
            let dir = self.store.places().version(task, &id);
            if stamp.as_ref().is_some_and(|stamp| scan.is_unchanged(&dir, stamp)) {
                continue;
            }
            match self.read_and_check(task, self.store.read_version(task, &id))? {
                Ok(version) => {
                    scan.fine(&dir);
                    loaded.state.insert(Stored::new(version.digest, stored_at));
                    loaded.read.push(version);
                }
                Err(problem) => {
                    scan.warn(&dir, problem);
                    if let Some(stamp) = stamp {
                        scan.was_read(&dir, stamp);
                    }
                }
            }
        }
        Ok(())
    }

    /// The plain directory's version; while its files are half-written or wrong, the one before, which answers as long as it is
    /// in memory.
    fn load_plain(
        &self,
        scan: &mut Scan,
        task: &TaskName,
        old: Option<&TaskState>,
        found: Option<Found>,
        read: &mut Vec<Arc<Version>>,
    ) -> io::Result<Option<Stored>> {
        let dir = self.store.places().task(task);
        let Some(Found { stamp, stored_at, .. }) = found else {
            scan.read.remove(&dir);
            return Ok(None);
        };
        let before = old.and_then(|old| old.by_digest(old.plain?));
        if stamp.as_ref().is_some_and(|stamp| scan.is_unchanged(&dir, stamp)) {
            return Ok(before.cloned());
        }
        let files = self.store.read_plain(task);
        let known = before.filter(|before| files.as_ref().is_ok_and(|files| files.digest() == before.digest));
        let checked = match known {
            Some(known) => Ok(known.digest),
            None => self.read_and_check(task, files)?.map(|version| {
                let digest = version.digest;
                read.push(version);
                digest
            }),
        };
        if let Some(stamp) = stamp {
            scan.was_read(&dir, stamp);
        }
        Ok(match checked {
            Ok(digest) => {
                scan.fine(&dir);
                Some(Stored::new(digest, stored_at))
            }
            Err(problem) => {
                scan.warn(&dir, problem);
                before.map(|before| self.kept(task, before).unwrap_or_else(|| before.clone()))
            }
        })
    }

    /// A version whose files are not there any more, as long as it is in memory.
    fn kept(&self, task: &TaskName, stored: &Stored) -> Option<Stored> {
        let kept = stored.kept.clone().or_else(|| self.residency.peek(task, stored.digest))?;
        Some(Stored { kept: Some(kept), ..stored.clone() })
    }

    /// A version of files, or what is wrong with them. An error is the store's, which says nothing about the files.
    fn read_and_check(
        &self,
        task: &TaskName,
        files: Result<PromptFiles, ReadError>,
    ) -> io::Result<Result<Arc<Version>, String>> {
        let files = match files {
            Ok(files) => files,
            Err(ReadError::Store(error)) => return Err(error),
            Err(wrong) => return Ok(Err(wrong.to_string())),
        };
        Ok(format::read(task.clone(), &files, &self.config.fit).map_err(|e| e.to_string()).map(|version| {
            for warning in &version.warnings {
                tracing::warn!(%task, version = %version.digest, "{warning}");
            }
            Arc::new(version)
        }))
    }

    /// What `active.json` says. Where it names nothing that is there and can be read: the plain directory, else what was
    /// active before.
    fn choose_active(
        &self,
        scan: &mut Scan,
        task: &TaskName,
        said: Result<Option<Active>, String>,
        mut generation: u64,
        loaded: &mut Loaded,
        old: Option<&TaskState>,
    ) -> io::Result<()> {
        let path = self.store.places().active(task);
        let before = old.and_then(|old| old.by_digest(old.active?));
        let plain = loaded.state.plain;
        let mut keep = false;
        loaded.state.active = match said {
            Ok(None) => plain,
            Ok(Some(said)) => {
                generation = generation.max(said.generation);
                let of_id = |id: &str| loaded.state.by_id(id).map(|stored| stored.digest);
                let (routing, wrong) = Routing::of_file(&said, of_id);
                loaded.state.routing = routing;
                let named = said.version.as_ref().and_then(|id| loaded.state.by_id(id)).cloned();
                let named = match named {
                    None => {
                        if let Some(id) = &said.version {
                            scan.warn(&path, format!("version {id:?}, which it names, is not there"));
                        }
                        None
                    }
                    Some(named) => match self.readable(task, &named, before, loaded) {
                        Ok(digest) => {
                            match wrong {
                                None => scan.fine(&path),
                                Some(wrong) => scan.warn(&path, wrong),
                            }
                            Some(digest)
                        }
                        Err(RegistryError::Store(error)) => return Err(error),
                        Err(e) => {
                            scan.warn(&path, format!("the version that it names is not activated: {e}"));
                            None
                        }
                    },
                };
                keep = named.is_none() && plain.is_none();
                named.or(plain)
            }
            Err(e) => {
                scan.warn(&path, format!("cannot read it: {e}"));
                keep = before.is_some();
                plain
            }
        };
        if let (true, Some(before)) = (keep, before) {
            match loaded.state.by_digest(before.digest) {
                Some(_) => loaded.state.active = Some(before.digest),
                None => {
                    if let Some(kept) = self.kept(task, before) {
                        loaded.state.active = Some(kept.digest);
                        loaded.state.insert(kept);
                    }
                }
            }
        }
        loaded.state.generation = match old {
            Some(old) if old.active == loaded.state.active && old.routing == loaded.state.routing => {
                generation.max(old.generation)
            }
            Some(old) => generation.max(old.generation.saturating_add(1)),
            None => generation.max(u64::from(loaded.state.active.is_some())),
        };
        Ok(())
    }

    /// Sees to it that a version that is to become the active one can be read.
    fn readable(
        &self,
        task: &TaskName,
        named: &Stored,
        before: Option<&Stored>,
        loaded: &mut Loaded,
    ) -> Result<Digest, RegistryError> {
        let is_known = before.is_some_and(|before| before.digest == named.digest);
        if !is_known && loaded.read.iter().all(|version| version.digest != named.digest) {
            let version = self.look_at(task, named)?;
            loaded.read.push(version);
        }
        Ok(named.digest)
    }

    fn drop_oldest(&self, scan: &mut Scan, task: &TaskName, state: &mut TaskState) {
        let most = self.config.max_versions_per_task.max(1);
        let excess = state.versions.len().saturating_sub(most);
        if excess == 0 {
            return;
        }
        let found = state.versions.len();
        let routing = &state.routing;
        let routed = routing.shares.iter().map(|(digest, _)| *digest).chain(routing.aliases.values().copied());
        let kept: Vec<Digest> = state.active.into_iter().chain(state.plain).chain(routed).collect();
        let mut to_drop = excess;
        let newest_first = std::mem::take(&mut state.versions);
        let mut oldest_first: Vec<Stored> = newest_first.into_iter().rev().collect();
        oldest_first.retain(|stored| {
            let stays = to_drop == 0 || kept.contains(&stored.digest);
            to_drop -= usize::from(!stays);
            stays
        });
        state.versions = oldest_first.into_iter().rev().collect();
        let problem = format!("it has {found} versions; the maximum is {most}; the oldest {excess} are not served");
        scan.warn(&self.store.places().versions(task), problem);
    }
}
