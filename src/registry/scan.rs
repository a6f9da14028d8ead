//! What lies on the disk becomes what is served: at the start, before each change, and whenever
//! the folder changed. What is wrong on the disk never takes out of service what runs.

use std::{
    collections::{HashMap, HashSet},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{Registry, Stored, TaskState, store::Stamp};
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
}

impl Scan {
    /// Drops what is known of a folder that is gone.
    pub fn forget(&mut self, dir: &Path) {
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

impl Registry {
    /// Brings all tasks in line with the disk.
    pub(super) fn scan_all(&self, scan: &mut Scan) -> io::Result<()> {
        let on_disk = self.store.task_names()?;
        for (path, problem) in on_disk.others {
            scan.warn(&path, problem);
        }
        let gone: HashSet<TaskName> = {
            let here: HashSet<&TaskName> = on_disk.tasks.iter().collect();
            self.tasks.iter().map(|entry| entry.key().clone()).filter(|task| !here.contains(task)).collect()
        };
        for task in gone.iter().chain(&on_disk.tasks) {
            self.scan_task(scan, task);
        }
        Ok(())
    }

    /// Brings one task in line with the disk.
    pub(super) fn scan_task(&self, scan: &mut Scan, task: &TaskName) {
        let old = self.get(task.as_str()).map(|(_, state)| state);
        if old.is_none() && self.tasks.len() >= self.config.max_tasks && self.store.has_task(task) {
            let problem = format!("there are {} tasks already, which is the maximum", self.config.max_tasks);
            return scan.warn(&self.store.task_dir(task), problem);
        }
        let new = self.load_task(scan, task, old.as_deref());
        match (old, new) {
            (None, None) => {}
            (Some(_), None) => {
                self.tasks.remove(task);
                scan.forget(&self.store.task_dir(task));
                tracing::info!(%task, "the task's files are gone, so it is no longer served");
            }
            (old, Some(new)) => {
                let digest = |state: &TaskState| state.active.as_ref().map(|active| active.digest);
                if old.as_deref().map(digest) != Some(digest(&new)) {
                    let version = digest(&new).map_or_else(|| "none".to_owned(), |digest| digest.id());
                    tracing::info!(%task, version, generation = new.generation, "active version read from the disk");
                }
                self.show(task, new);
            }
        }
    }

    fn load_task(&self, scan: &mut Scan, task: &TaskName, old: Option<&TaskState>) -> Option<TaskState> {
        if !self.store.has_task(task) {
            return None;
        }
        let mut state = TaskState::default();
        for stored in self.load_versions(scan, task, old) {
            state.insert(stored);
        }
        if let Some(plain) = self.load_plain(scan, task, old) {
            state.plain = Some(plain.version.digest);
            if state.by_id(&plain.version.digest.id()).is_none() {
                state.insert(plain);
            }
        }
        self.choose_active(scan, task, &mut state, old);
        self.drop_oldest(scan, task, &mut state);
        (!state.versions.is_empty()).then_some(state)
    }

    fn load_versions(&self, scan: &mut Scan, task: &TaskName, old: Option<&TaskState>) -> Vec<Stored> {
        let ids = match self.store.version_ids(task) {
            Ok(ids) => ids,
            Err(e) => {
                scan.warn(&self.store.task_dir(task), format!("cannot list its versions: {e}"));
                return old.map(|old| old.versions.clone()).unwrap_or_default();
            }
        };
        let mut versions = Vec::new();
        for id in ids {
            // A version never changes, so one that was read once need not be read again.
            if let Some(known) = old.and_then(|old| old.by_id(&id)) {
                versions.push(known.clone());
                continue;
            }
            let dir = self.store.version_dir(task, &id);
            let stamp = self.store.stamp(&dir);
            if stamp.as_ref().is_some_and(|stamp| scan.is_unchanged(&dir, stamp)) {
                continue;
            }
            match self.store.read_version(task, &id).and_then(|files| self.check(task, &files)) {
                Ok(version) => {
                    scan.fine(&dir);
                    versions.push(Stored { version, stored_at: self.store.stored_at(&dir) });
                }
                Err(problem) => {
                    scan.warn(&dir, problem);
                    if let Some(stamp) = stamp {
                        scan.was_read(&dir, stamp);
                    }
                }
            }
        }
        versions
    }

    /// The plain directory's version; while its files are half-written or wrong, the one before.
    fn load_plain(&self, scan: &mut Scan, task: &TaskName, old: Option<&TaskState>) -> Option<Stored> {
        let dir = self.store.task_dir(task);
        let Some(stamp) = self.store.stamp(&dir) else {
            scan.read.remove(&dir);
            return None;
        };
        let before = old.and_then(|old| old.by_id(&old.plain?.id())).cloned();
        if scan.is_unchanged(&dir, &stamp) {
            return before;
        }
        let read = self.store.read_plain(task).map_err(|e| e.to_string());
        let checked = read.and_then(|files| match &before {
            Some(before) if before.version.digest == files.digest() => Ok(before.version.clone()),
            _ => self.check(task, &files),
        });
        scan.was_read(&dir, stamp);
        match checked {
            Ok(version) => {
                scan.fine(&dir);
                Some(Stored { version, stored_at: self.store.stored_at(&dir) })
            }
            Err(problem) => {
                scan.warn(&dir, problem);
                before
            }
        }
    }

    fn check(&self, task: &TaskName, files: &PromptFiles) -> Result<Arc<Version>, String> {
        let version = format::read(task.clone(), files, &self.config.fit).map_err(|e| e.to_string())?;
        for warning in &version.warnings {
            tracing::warn!(%task, version = %version.digest, "{warning}");
        }
        Ok(Arc::new(version))
    }

    /// What `active.json` says. Where it names nothing that is there: the plain directory, else
    /// what was active before.
    fn choose_active(&self, scan: &mut Scan, task: &TaskName, state: &mut TaskState, old: Option<&TaskState>) {
        let path = self.store.active_path(task);
        let before = old.and_then(|old| old.by_id(&old.active.as_ref()?.digest.id()));
        let plain = state.plain.and_then(|plain| state.by_id(&plain.id())).map(|stored| stored.version.clone());
        let mut generation = 0;
        let mut keep = false;
        state.active = match self.store.read_active(task) {
            Ok(None) => plain,
            Ok(Some(said)) => {
                generation = said.generation;
                let named = state.by_id(&said.version).map(|stored| stored.version.clone());
                match &named {
                    Some(_) => scan.fine(&path),
                    None => scan.warn(&path, format!("version {:?}, which it names, is not there", said.version)),
                }
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
            state.active = Some(before.version.clone());
            if state.by_id(&before.version.digest.id()).is_none() {
                state.insert(before.clone());
            }
        }
        let digest = |active: &Option<Arc<Version>>| active.as_ref().map(|version| version.digest);
        state.generation = match old {
            Some(old) if digest(&old.active) == digest(&state.active) => generation.max(old.generation),
            Some(old) => generation.max(old.generation.saturating_add(1)),
            None => generation.max(u64::from(state.active.is_some())),
        };
    }

    fn drop_oldest(&self, scan: &mut Scan, task: &TaskName, state: &mut TaskState) {
        let most = self.config.max_versions_per_task.max(1);
        let excess = state.versions.len().saturating_sub(most);
        if excess == 0 {
            return;
        }
        let found = state.versions.len();
        let kept: Vec<Digest> = state.active.iter().map(|active| active.digest).chain(state.plain).collect();
        let mut to_drop = excess;
        let newest_first = std::mem::take(&mut state.versions);
        let mut oldest_first: Vec<Stored> = newest_first.into_iter().rev().collect();
        oldest_first.retain(|stored| {
            let stays = to_drop == 0 || kept.contains(&stored.version.digest);
            to_drop -= usize::from(!stays);
            stays
        });
        state.versions = oldest_first.into_iter().rev().collect();
        let problem = format!("it has {found} versions; the maximum is {most}; the oldest {excess} are not served");
        scan.warn(&self.store.versions_dir(task), problem);
    }
}

impl TaskState {
    fn by_id(&self, id: &str) -> Option<&Stored> {
        self.versions.iter().find(|stored| stored.version.digest.id() == id)
    }
}
