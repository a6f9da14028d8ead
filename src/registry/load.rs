//! A task of the store becomes a state: its versions, its plain directory, and the version that answers.

use std::{io, sync::Arc};

use super::{
    Registry, RegistryError,
    routing::Routing,
    seen::Seen,
    state::{Stored, TaskState},
    store::{Active, Contents, Found, ReadError},
};
use crate::prompt::{
    Digest, TaskName, Version,
    format::{self, PromptFiles},
};

/// A task as the store has it.
pub(super) struct Loaded {
    pub(super) state: TaskState,
    /// The versions that were read for it just now.
    pub(super) read: Vec<Arc<Version>>,
}

impl Registry {
    pub(super) fn load_task(
        &self,
        seen: &mut Seen,
        task: &TaskName,
        old: Option<&TaskState>,
        found: Contents,
    ) -> io::Result<Option<Loaded>> {
        let Contents { versions, plain, active, basis, mark: _ } = found;
        let mut loaded = Loaded { state: TaskState::default(), read: Vec::new() };
        self.load_versions(seen, task, old, versions, &mut loaded)?;
        if let Some(plain) = self.load_plain(seen, task, old, plain, &mut loaded.read)? {
            loaded.state.plain = Some(plain.digest);
            if loaded.state.by_digest(plain.digest).is_none() {
                loaded.state.insert(plain);
            }
        }
        self.choose_active(seen, task, active, basis.generation, &mut loaded, old)?;
        self.drop_oldest(seen, task, &mut loaded.state);
        Ok((!loaded.state.versions.is_empty()).then_some(loaded))
    }

    fn load_versions(
        &self,
        seen: &mut Seen,
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
            if stamp.as_ref().is_some_and(|stamp| seen.is_unchanged(&dir, stamp)) {
                continue;
            }
            match self.read_and_check(task, self.store.read_version(task, &id))? {
                Ok(version) => {
                    seen.fine(&dir);
                    loaded.state.insert(Stored::new(version.digest, stored_at));
                    loaded.read.push(version);
                }
                Err(problem) => {
                    seen.warn(&dir, problem);
                    if let Some(stamp) = stamp {
                        seen.was_read(&dir, stamp);
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
        seen: &mut Seen,
        task: &TaskName,
        old: Option<&TaskState>,
        found: Option<Found>,
        read: &mut Vec<Arc<Version>>,
    ) -> io::Result<Option<Stored>> {
        let dir = self.store.places().task(task);
        let Some(Found { stamp, stored_at, .. }) = found else {
            seen.read.remove(&dir);
            return Ok(None);
        };
        let before = old.and_then(|old| old.by_digest(old.plain?));
        if stamp.as_ref().is_some_and(|stamp| seen.is_unchanged(&dir, stamp)) {
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
            seen.was_read(&dir, stamp);
        }
        Ok(match checked {
            Ok(digest) => {
                seen.fine(&dir);
                Some(Stored::new(digest, stored_at))
            }
            Err(problem) => {
                seen.warn(&dir, problem);
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
        seen: &mut Seen,
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
                            seen.warn(&path, format!("version {id:?}, which it names, is not there"));
                        }
                        None
                    }
                    Some(named) => match self.readable(task, &named, before, loaded) {
                        Ok(digest) => {
                            match wrong {
                                None => seen.fine(&path),
                                Some(wrong) => seen.warn(&path, wrong),
                            }
                            Some(digest)
                        }
                        Err(RegistryError::Store(error)) => return Err(error),
                        Err(e) => {
                            seen.warn(&path, format!("the version that it names is not activated: {e}"));
                            None
                        }
                    },
                };
                keep = named.is_none() && plain.is_none();
                named.or(plain)
            }
            Err(e) => {
                seen.warn(&path, format!("cannot read it: {e}"));
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

    fn drop_oldest(&self, seen: &mut Seen, task: &TaskName, state: &mut TaskState) {
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
        seen.warn(&self.store.places().versions(task), problem);
    }
}
