//! Prompts in a bucket: objects under the names that a prompts' folder has.
//!
//! A version is content-addressed: it counts once all of its objects are there, whose digest is its name. What a task
//! answers with is one object, `active.json`, replaced only if it is still the one that was read; so every change is made
//! visible by one conditional write. Deletions are such a write too: it says what is gone, and then the objects are deleted.

mod listing;
mod objects;

use std::{
    collections::BTreeMap,
    io,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use object_store::{ObjectMeta, UpdateVersion, path::Path as Key};

use super::{
    health::Health,
    interface::{
        ACTIVE, Active, Basis, Contents, Found, MAX_ACTIVE_BYTES, Places, ReadError, Store, TaskNames, VERSIONS,
        WriteError, active_json, checked, parse_active,
    },
    location::Bucket,
};
use crate::prompt::{
    Digest, TaskName,
    files::{
        ADAPTER_CONFIG, CURVE, MAX_CURVE_BYTES, OTHER_BASE, PICKLE, PromptFiles, TASK, WEIGHTS, pickle_fault,
        size_limit,
    },
};
use listing::{Entry, PromptObjects, mark, time, written};
use objects::Objects;

/// Objects of what was deleted are left to whoever deleted it for this long; then whoever sees them deletes them.
const LEFT_TO_THE_WRITER: Duration = Duration::from_secs(60);
/// A deleted task's `active.json` is deleted when it is this old.
const KEEP_DELETED: Duration = Duration::from_secs(24 * 60 * 60);

/// A prefix of a bucket with all tasks.
#[derive(Debug)]
pub struct BucketStore {
    objects: Objects,
    places: Places,
}

/// `active.json` as it was read.
struct ReadActive {
    said: Result<Active, String>,
    meta: ObjectMeta,
}

impl BucketStore {
    /// Nothing is asked yet.
    pub fn open(bucket: &Bucket) -> io::Result<Self> {
        Ok(Self { objects: Objects::open(bucket)?, places: Places::new(PathBuf::from(&bucket.url)) })
    }

    fn version_key(&self, task: &TaskName, id: &str) -> Key {
        self.objects.key(&[task.as_str(), VERSIONS, id])
    }

    fn active_key(&self, task: &TaskName) -> Key {
        self.objects.key(&[task.as_str(), ACTIVE])
    }

    fn entries(&self, folder: &Key) -> io::Result<Vec<Entry>> {
        let found = self.objects.list(folder)?;
        Ok(found.into_iter().filter_map(|meta| Some((Objects::below(folder, &meta.location)?, meta))).collect())
    }

    fn read_active(&self, task: &TaskName) -> io::Result<Option<ReadActive>> {
        let Some((bytes, meta)) = self.objects.get(&self.active_key(task), MAX_ACTIVE_BYTES)? else { return Ok(None) };
        let said = match meta.size > MAX_ACTIVE_BYTES {
            true => Err(format!("it has {} bytes; the maximum is {MAX_ACTIVE_BYTES}", meta.size)),
            false => parse_active(&bytes),
        };
        Ok(Some(ReadActive { said, meta }))
    }

    /// Reads the objects of one prompt.
    fn read_files(&self, found: &PromptObjects) -> Result<PromptFiles, ReadError> {
        let wrong = |(name, meta): (&&'static str, &ObjectMeta)| {
            let limit = size_limit(name);
            let problem = format!("{name} has {} bytes; the maximum is {limit}", meta.size);
            (meta.size > limit).then_some(ReadError::Wrong(problem))
        };
        if let Some(wrong) = found.files.iter().find_map(wrong) {
            return Err(wrong);
        }
        if found.files.contains_key(PICKLE) && !found.files.contains_key(WEIGHTS) {
            return Err(ReadError::Wrong(pickle_fault().detail));
        }
        let names = [ADAPTER_CONFIG, WEIGHTS, TASK, CURVE, OTHER_BASE]
            .into_iter()
            .filter(|name| found.files.contains_key(name));
        let names: Vec<&str> = names.collect();
        let keys = names.iter().map(|name| found.files[name].location.clone()).collect();
        let mut read: BTreeMap<_, _> = names.into_iter().zip(self.objects.get_all(keys)?).collect();
        Ok(PromptFiles {
            adapter_config: read.remove(ADAPTER_CONFIG),
            weights: read.remove(WEIGHTS),
            task: read.remove(TASK),
            curve: read.remove(CURVE),
            other_base: read.remove(OTHER_BASE),
        })
    }

    /// Writes `active.json` if it is as it was read. What was deleted and may still be there stays deleted.
    fn replace_active(&self, task: &TaskName, mut active: Active, basis: &Basis) -> Result<(), WriteError> {
        active.removed.extend(basis.removed.iter().map(|(id, time)| (id.clone(), time.clone())));
        self.objects.put_if(&self.active_key(task), active_json(&active)?, basis.etag.clone())
    }

    /// Deletes what an `active.json` says is gone, if whoever wrote it has had the time to.
    fn clear(&self, task: &TaskName, active: &ReadActive, gone: Vec<Key>, is_empty: bool) {
        let age = time(&active.meta).elapsed().unwrap_or_default();
        let is_deleted = active.said.as_ref().is_ok_and(|said| said.deleted.is_some());
        let keys = match gone.is_empty() {
            false if age >= LEFT_TO_THE_WRITER => gone,
            true if is_deleted && is_empty && age >= KEEP_DELETED => vec![self.active_key(task)],
            _ => return,
        };
        if let Err(error) = self.objects.delete_all(keys) {
            tracing::debug!(%task, %error, "objects of what was deleted cannot be deleted");
        }
    }

    /// Writes a version's objects.
    fn put_version(&self, task: &TaskName, id: &str, files: &PromptFiles) -> io::Result<()> {
        let folder = self.version_key(task, id);
        let objects = files.present().map(|(name, bytes)| (folder.clone().join(name), bytes.clone()));
        // The configuration last: without it, what is there does not look like a prompt.
        let (last, first): (Vec<_>, Vec<_>) = objects.partition(|(key, _)| key.filename() == Some(ADAPTER_CONFIG));
        self.objects.put_all(first)?;
        self.objects.put_all(last)
    }
}

/// What a later write of an object is based on.
fn etag(meta: &ObjectMeta) -> UpdateVersion {
    UpdateVersion { e_tag: meta.e_tag.clone(), version: meta.version.clone() }
}

impl Store for BucketStore {
    fn places(&self) -> &Places {
        &self.places
    }

    fn health(&self) -> &Health {
        &self.objects.health
    }

    fn list(&self, marks: bool) -> io::Result<TaskNames> {
        let mut found = BTreeMap::new();
        if marks {
            let root = self.objects.key(&[]);
            for (parts, meta) in self.entries(&root)? {
                if let [task, rest @ ..] = &parts[..]
                    && !rest.is_empty()
                {
                    let sum = found.entry(task.clone()).or_insert(0u64);
                    *sum = sum.wrapping_add(mark(rest, &meta));
                }
            }
        } else {
            let root = self.objects.key(&[]);
            let tops = self.objects.list_top()?.common_prefixes;
            found.extend(tops.iter().filter_map(|key| Some((Objects::below(&root, key)?.into_iter().next()?, 0))));
        }
        let mut names = TaskNames::default();
        for (name, sum) in found.into_iter().filter(|(name, _)| !name.starts_with('.')) {
            match name.parse::<TaskName>() {
                Ok(task) => names.tasks.push((task, marks.then_some(sum))),
                Err(e) => names.others.push((self.places.root().join(name), e.to_string())),
            }
        }
        names.tasks.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        Ok(names)
    }

    fn look(&self, task: &TaskName, _known: &dyn Fn(&str) -> bool) -> io::Result<Option<Contents>> {
        // First what is active: each version that it names was there before it.
        let active = self.read_active(task)?;
        let entries = self.entries(&self.objects.key(&[task.as_str()]))?;
        let mut basis = Basis { etag: active.as_ref().map(|active| etag(&active.meta)), ..Basis::default() };
        if let Some(said) = active.as_ref().and_then(|active| active.said.as_ref().ok()) {
            basis.generation = said.generation;
            basis.deleted = said.deleted.clone();
            basis.removed = said.removed.clone();
        }
        // With the active.json that was read: one that was written since then has to be seen as a change.
        let active_mark = active.as_ref().map_or(0, |active| mark(&[ACTIVE.to_owned()], &active.meta));
        let others = entries.iter().filter(|(parts, _)| parts[..] != [ACTIVE]);
        let sum = others.fold(active_mark, |sum, (parts, meta)| sum.wrapping_add(mark(parts, meta)));
        let (mut versions, mut plain, mut gone) = (BTreeMap::<String, Vec<Entry>>::new(), Vec::new(), Vec::new());
        for (parts, meta) in entries {
            let is_older = |time: &String| written(&meta) <= *time;
            let was_deleted = basis.deleted.as_ref().is_some_and(is_older);
            match &parts[..] {
                [name] if name == ACTIVE => {}
                _ if was_deleted => gone.push(meta.location),
                [folder, id, rest @ ..] if folder == VERSIONS && !rest.is_empty() => {
                    match basis.removed.get(id).is_some_and(is_older) {
                        true => gone.push(meta.location),
                        false => versions.entry(id.clone()).or_default().push((rest.to_vec(), meta)),
                    }
                }
                _ => plain.push((parts, meta)),
            }
        }
        let found = |id: &str, entries: &[Entry]| match PromptObjects::of(entries) {
            Some(Ok(found)) => Found { id: id.to_owned(), stamp: Some(found.stamp()), stored_at: found.stored_at() },
            // Reading it says what is wrong.
            Some(Err(_)) | None => Found { id: id.to_owned(), stamp: None, stored_at: SystemTime::UNIX_EPOCH },
        };
        let plain = PromptObjects::of(&plain).map(|_| found("", &plain));
        let versions: Vec<Found> = versions.iter().map(|(id, entries)| found(id, entries)).collect();
        // What has been deleted to the last object need not be remembered.
        basis.removed.retain(|id, _| gone.iter().any(|key| key.prefix_matches(&self.version_key(task, id))));
        if active.is_none() && versions.is_empty() && plain.is_none() {
            return Ok(None);
        }
        let said = match &active {
            Some(active) => match &active.said {
                Ok(said) if said.deleted.is_some() => Ok(None),
                Ok(said) => Ok(Some(said.clone())),
                Err(e) => Err(e.clone()),
            },
            None => Ok(None),
        };
        if let Some(active) = &active {
            self.clear(task, active, gone, versions.is_empty() && plain.is_none());
        }
        Ok(Some(Contents { versions, plain, active: said, basis, mark: Some(sum) }))
    }

    fn read_version(&self, task: &TaskName, id: &str) -> Result<PromptFiles, ReadError> {
        match PromptObjects::of(&self.entries(&self.version_key(task, id))?) {
            None => Err(ReadError::NotThere),
            Some(found) => checked(id, self.read_files(&found.map_err(ReadError::Wrong)?)?),
        }
    }

    fn read_plain(&self, task: &TaskName) -> Result<PromptFiles, ReadError> {
        let found = PromptObjects::of(&self.entries(&self.objects.key(&[task.as_str()]))?);
        let files = self.read_files(&found.ok_or(ReadError::NotThere)?.map_err(ReadError::Wrong)?)?;
        files.check_complete().map_err(|e| ReadError::Wrong(e.to_string()))?;
        Ok(files)
    }

    fn read_curve(&self, task: &TaskName, id: Option<&str>) -> io::Result<Option<Bytes>> {
        let folder = id.map_or_else(|| self.objects.key(&[task.as_str()]), |id| self.version_key(task, id));
        let found = self.objects.get(&folder.join(CURVE), MAX_CURVE_BYTES)?;
        Ok(found.filter(|(_, meta)| meta.size <= MAX_CURVE_BYTES).map(|(bytes, _)| bytes))
    }

    fn add_curve(&self, task: &TaskName, id: &str, curve: &Bytes) -> io::Result<()> {
        match self.objects.put_if(&self.version_key(task, id).join(CURVE), curve.clone(), None) {
            Ok(()) | Err(WriteError::Conflict) => Ok(()),
            Err(WriteError::Store(error)) => Err(error),
        }
    }

    fn add_version(
        &self,
        task: &TaskName,
        digest: Digest,
        files: &PromptFiles,
        active: Option<&Active>,
        basis: &Basis,
    ) -> Result<SystemTime, WriteError> {
        let id = digest.id();
        let was_deleted = basis.deleted.is_some() || basis.removed.contains_key(&id);
        if let Some(deleted) = &basis.deleted {
            // Once the task is there again, nothing says any more that these were deleted.
            let entries = self.entries(&self.objects.key(&[task.as_str()]))?;
            let gone = entries.into_iter().filter(|(parts, meta)| parts[..] != [ACTIVE] && written(meta) <= *deleted);
            self.objects.delete_all(gone.map(|(_, meta)| meta.location).collect())?;
        }
        self.put_version(task, &id, files)?;
        let mut basis = basis.clone();
        basis.removed.remove(&id);
        match active {
            Some(active) => self.replace_active(task, active.clone(), &basis)?,
            // It is only stored, and what said that it was deleted must go.
            None if basis.deleted.is_some() => {
                let active = Active { generation: basis.generation, ..Active::default() };
                self.replace_active(task, active, &basis)?;
            }
            None if was_deleted => {
                let said = self.read_active(task)?.and_then(|read| read.said.ok()).unwrap_or_default();
                let active = Active { removed: BTreeMap::new(), ..said };
                self.replace_active(task, active, &basis)?;
            }
            None => {}
        }
        // Whoever deleted it may have been deleting its objects still.
        if was_deleted && self.read_version(task, &id).is_err() {
            self.put_version(task, &id, files)?;
        }
        Ok(SystemTime::now())
    }

    fn write_active(&self, task: &TaskName, active: &Active, basis: &Basis) -> Result<(), WriteError> {
        self.replace_active(task, active.clone(), basis)
    }

    fn remove_version(
        &self,
        task: &TaskName,
        id: &str,
        active: Option<&Active>,
        basis: &Basis,
    ) -> Result<(), WriteError> {
        let entries = self.entries(&self.version_key(task, id))?;
        let Some(last) = entries.iter().map(|(_, meta)| written(meta)).max() else { return Ok(()) };
        let mut active =
            active.cloned().unwrap_or_else(|| Active { generation: basis.generation, ..Active::default() });
        active.removed.insert(id.to_owned(), last);
        self.replace_active(task, active, basis)?;
        self.delete_after_write(task, entries);
        Ok(())
    }

    fn remove_plain(&self, task: &TaskName) -> io::Result<()> {
        let found = PromptObjects::of(&self.entries(&self.objects.key(&[task.as_str()]))?);
        let Some(Ok(found)) = found else { return Ok(()) };
        // The configuration last: while it is there, an interrupted removal shows as a fault.
        let key = |name: &str| found.files.get(name).map(|meta| meta.location.clone());
        for name in [WEIGHTS, TASK, CURVE, OTHER_BASE, PICKLE, ADAPTER_CONFIG] {
            self.objects.delete_all(key(name).into_iter().collect())?;
        }
        Ok(())
    }

    fn remove_task(&self, task: &TaskName, basis: &Basis) -> Result<(), WriteError> {
        let mut entries = self.entries(&self.objects.key(&[task.as_str()]))?;
        entries.retain(|(parts, _)| parts[..] != [ACTIVE]);
        let last = entries.iter().map(|(_, meta)| written(meta)).max().unwrap_or_default();
        let generation = basis.generation.saturating_add(1);
        let basis = Basis { removed: BTreeMap::new(), ..basis.clone() };
        self.replace_active(task, Active { generation, deleted: Some(last), ..Active::default() }, &basis)?;
        self.delete_after_write(task, entries);
        Ok(())
    }
}

impl BucketStore {
    /// Deletes objects that are already said to be gone. What fails here is made good by [`clear`](Self::clear).
    fn delete_after_write(&self, task: &TaskName, entries: Vec<Entry>) {
        if let Err(error) = self.objects.delete_all(entries.into_iter().map(|(_, meta)| meta.location).collect()) {
            tracing::warn!(%task, %error, "deleted, but its objects cannot be deleted yet; they will be later");
        }
    }
}
