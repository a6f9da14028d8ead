//! The prompts' folder: changes that happen whole or not at all.
//!
//! Everything new is first written to a hidden folder under the same root, waited for, and renamed
//! into place; everything that goes is first renamed away. A crash leaves only hidden folders,
//! which the next [`FolderStore::open`] removes. Several processes may share the folder: a writer locks
//! it against the others' writers.

use std::{
    fs::{self, File},
    io::{self, ErrorKind, Read as _, Write as _},
    path::{Path, PathBuf},
    time::SystemTime,
};

use bytes::Bytes;
use tempfile::TempDir;

use super::{
    health::Health,
    interface::{
        ACTIVE, Active, Basis, Contents, Found, MAX_ACTIVE_BYTES, Places, ReadError, Stamp, Store, TaskNames, VERSIONS,
        WriteError, active_json, checked, parse_active,
    },
};
use crate::prompt::{
    Digest, TaskName,
    files::{ADAPTER_CONFIG, CURVE, OTHER_BASE, PICKLE, PromptFiles, TASK, WEIGHTS, adapter_folders, sync_dir},
};

const STAGING: &str = ".staging-";

/// The folder of all tasks.
#[derive(Debug)]
pub struct FolderStore {
    places: Places,
    health: Health,
}

impl FolderStore {
    /// Makes the folder if it is not there and clears what a crash left.
    pub fn open(root: &Path) -> io::Result<Self> {
        fs::create_dir_all(root)?;
        let store = Self { places: Places::new(root.canonicalize()?), health: Health::default() };
        if let Some(_lock) = store.lock() {
            store.clear_staging();
        }
        Ok(store)
    }

    fn root(&self) -> &Path {
        self.places.root()
    }

    /// Whether a task's folder is there.
    fn has_task(&self, task: &TaskName) -> bool {
        self.places.task(task).is_dir()
    }

    fn task_names(&self) -> io::Result<TaskNames> {
        let TaskNames { mut tasks, mut others } = TaskNames::default();
        for entry in fs::read_dir(self.root())? {
            let entry = entry?;
            let (name, path) = (entry.file_name().to_string_lossy().into_owned(), entry.path());
            // Of very many folders only the links are looked at one by one.
            let (is_dir, is_inside) = match entry.file_type()? {
                kind if kind.is_symlink() => {
                    (path.is_dir(), path.canonicalize().is_ok_and(|target| target.starts_with(self.root())))
                }
                kind => (kind.is_dir(), true),
            };
            if !is_dir || name.starts_with('.') {
                continue;
            }
            match name.parse::<TaskName>() {
                Err(e) => others.push((path, e.to_string())),
                Ok(_) if !is_inside => {
                    others.push((path, "it is a link that leads out of the prompts' folder".to_owned()));
                }
                Ok(task) => tasks.push((task, None)),
            }
        }
        tasks.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        Ok(TaskNames { tasks, others })
    }

    /// A version's files, or a plain PEFT directory's, as far as their names and times tell.
    fn found(&self, id: &str, dir: &Path) -> Found {
        Found { id: id.to_owned(), stamp: stamp(dir), stored_at: stored_at(dir) }
    }

    fn read_active(&self, task: &TaskName) -> Result<Option<Active>, String> {
        let said = |e: io::Error| e.to_string();
        let file = match File::open(self.places.active(task)) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            file => file.map_err(said)?,
        };
        let mut bytes = Vec::new();
        file.take(MAX_ACTIVE_BYTES).read_to_end(&mut bytes).map_err(said)?;
        parse_active(&bytes).map(Some)
    }

    fn replace_active(&self, task: &TaskName, active: &Active) -> io::Result<()> {
        let staging = self.staging()?;
        let file = staging.path().join(ACTIVE);
        write_active_file(&file, active)?;
        fs::rename(&file, self.places.active(task))?;
        sync_dir(&self.places.task(task))
    }

    fn add(&self, task: &TaskName, digest: Digest, files: &PromptFiles, active: Option<&Active>) -> io::Result<()> {
        let id = digest.id();
        if !self.has_task(task) {
            match self.add_task(task, &id, files, active) {
                // Where the folder could not be locked, another process may have been quicker.
                Err(_) if self.has_task(task) => {}
                outcome => return outcome,
            }
        }
        let staging = self.staging()?;
        let staged = staging.path().join(&id);
        files.write_dir(&staged)?;
        let versions = self.places.versions(task);
        let had_versions = versions.is_dir();
        fs::create_dir_all(&versions)?;
        let target = versions.join(&id);
        let replaced = staging.path().join("replaced");
        let was_there = rename_if_there(&target, &replaced)?;
        let stored = fs::rename(&staged, &target)
            .and_then(|()| sync_dir(&versions))
            .and_then(|()| sync_dir(&self.places.task(task)))
            .and_then(|()| active.map_or(Ok(()), |active| self.replace_active(task, active)));
        if stored.is_err() {
            // What cannot be undone either is a whole version that no name points to: harmless.
            let _ = rename_if_there(&target, &staging.path().join("undone"));
            if was_there {
                let _ = fs::rename(&replaced, &target);
            }
            if !had_versions {
                let _ = fs::remove_dir(&versions);
            }
        }
        stored
    }

    /// A task's first version comes with its folder in one rename.
    fn add_task(&self, task: &TaskName, id: &str, files: &PromptFiles, active: Option<&Active>) -> io::Result<()> {
        let staging = self.staging()?;
        let staged = staging.path().join(task.as_str());
        files.write_dir(&staged.join(VERSIONS).join(id))?;
        sync_dir(&staged.join(VERSIONS))?;
        if let Some(active) = active {
            write_active_file(&staged.join(ACTIVE), active)?;
        }
        sync_dir(&staged)?;
        fs::rename(&staged, self.places.task(task))?;
        sync_dir(self.root()).inspect_err(|_| {
            let _ = rename_if_there(&self.places.task(task), &staged);
        })
    }

    /// A hidden folder for what is not whole yet.
    fn staging(&self) -> io::Result<TempDir> {
        tempfile::Builder::new().prefix(STAGING).tempdir_in(self.root())
    }

    /// Call it with the lock held: then no folder is in use.
    fn clear_staging(&self) {
        let Ok(entries) = fs::read_dir(self.root()) else { return };
        for entry in entries.flatten().filter(|e| e.file_name().to_string_lossy().starts_with(STAGING)) {
            let dir = entry.path();
            if let Err(e) = fs::remove_dir_all(&dir) {
                tracing::warn!(path = %dir.display(), error = %e, "cannot remove the leftovers of an interrupted write");
            }
        }
    }
}

impl Store for FolderStore {
    fn places(&self) -> &Places {
        &self.places
    }

    fn health(&self) -> &Health {
        &self.health
    }

    fn notifying_folder(&self) -> Option<&Path> {
        Some(self.root())
    }

    fn lock(&self) -> Option<File> {
        let folder = File::open(self.root()).ok()?;
        folder.lock().ok()?;
        Some(folder)
    }

    fn list(&self, _marks: bool) -> io::Result<TaskNames> {
        self.health.note(&self.root().display(), self.task_names())
    }

    fn look(&self, task: &TaskName, known: &dyn Fn(&str) -> bool) -> io::Result<Option<Contents>> {
        if !self.has_task(task) {
            return Ok(None);
        }
        // First what is active: each version that it names was there before it.
        let active = self.read_active(task);
        let ids = match dir_names(&self.places.versions(task)) {
            Err(e) if e.kind() == ErrorKind::NotFound => Vec::new(),
            names => names?,
        };
        let version = |id: String| match known(&id) {
            true => Found { id, stamp: None, stored_at: SystemTime::UNIX_EPOCH },
            false => self.found(&id, &self.places.version(task, &id)),
        };
        let plain = Some(self.found("", &self.places.task(task))).filter(|found| found.stamp.is_some());
        Ok(Some(Contents {
            versions: ids.into_iter().map(version).collect(),
            plain,
            active,
            basis: Basis::default(),
            mark: None,
        }))
    }

    fn read_version(&self, task: &TaskName, id: &str) -> Result<PromptFiles, ReadError> {
        let dir = self.places.version(task, id);
        if !dir.is_dir() {
            return Err(ReadError::NotThere);
        }
        checked(id, PromptFiles::read_dir(&dir).map_err(|e| ReadError::Wrong(e.to_string()))?)
    }

    fn read_plain(&self, task: &TaskName) -> Result<PromptFiles, ReadError> {
        let wrong = |e: crate::prompt::format::Faults| ReadError::Wrong(e.to_string());
        let files = PromptFiles::read_dir(&self.places.task(task)).map_err(wrong)?;
        files.check_complete().map_err(wrong)?;
        Ok(files)
    }

    fn read_curve(&self, task: &TaskName, id: Option<&str>) -> io::Result<Option<Bytes>> {
        let dir = id.map_or_else(|| self.places.task(task), |id| self.places.version(task, id));
        match dir.is_dir() {
            true => PromptFiles::read_curve(&dir).map_err(|fault| io::Error::new(ErrorKind::InvalidData, fault.detail)),
            false => Ok(None),
        }
    }

    fn add_curve(&self, task: &TaskName, id: &str, curve: &Bytes) -> io::Result<()> {
        let dir = self.places.version(task, id);
        if !dir.is_dir() || dir.join(CURVE).exists() {
            return Ok(());
        }
        let staging = self.staging()?;
        let staged = staging.path().join(CURVE);
        let mut file = File::create_new(&staged)?;
        file.write_all(curve)?;
        file.sync_all()?;
        fs::rename(&staged, dir.join(CURVE))?;
        sync_dir(&dir)
    }

    fn add_version(
        &self,
        task: &TaskName,
        digest: Digest,
        files: &PromptFiles,
        active: Option<&Active>,
        _: &Basis,
    ) -> Result<SystemTime, WriteError> {
        self.add(task, digest, files, active)?;
        Ok(stored_at(&self.places.version(task, &digest.id())))
    }

    fn write_active(&self, task: &TaskName, active: &Active, _: &Basis) -> Result<(), WriteError> {
        Ok(self.replace_active(task, active)?)
    }

    fn remove_version(&self, task: &TaskName, id: &str, _: Option<&Active>, _: &Basis) -> Result<(), WriteError> {
        let staging = self.staging()?;
        rename_if_there(&self.places.version(task, id), &staging.path().join(id))?;
        match sync_dir(&self.places.versions(task)) {
            // A plain directory alone.
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            outcome => Ok(outcome?),
        }
    }

    fn remove_plain(&self, task: &TaskName) -> io::Result<()> {
        let staging = self.staging()?;
        let dir = self.places.task(task);
        let folders = adapter_folders(&dir);
        // The configuration last: while it is there, an interrupted removal shows as a fault.
        for name in [WEIGHTS, TASK, CURVE, OTHER_BASE, PICKLE, ADAPTER_CONFIG] {
            for folder in folders.iter().map(|folder| dir.join(folder)) {
                rename_if_there(&folder.join(name), &staging.path().join(name))?;
            }
        }
        rename_if_there(&dir.join(TASK), &staging.path().join(TASK))?;
        sync_dir(&dir)
    }

    fn remove_task(&self, task: &TaskName, _: &Basis) -> Result<(), WriteError> {
        let staging = self.staging()?;
        rename_if_there(&self.places.task(task), &staging.path().join(task.as_str()))?;
        Ok(sync_dir(self.root())?)
    }
}

/// The stamp of a folder's prompt, one folder down too; `None` if it has none of a prompt's files.
fn stamp(dir: &Path) -> Option<Stamp> {
    let stamp = |path: PathBuf| {
        let meta = fs::metadata(path).ok();
        let absent = (u64::MAX, SystemTime::UNIX_EPOCH, String::new());
        meta.map_or(absent, |meta| (meta.len(), meta.modified().unwrap_or(SystemTime::UNIX_EPOCH), String::new()))
    };
    let folders = adapter_folders(dir);
    if folders.is_empty() {
        return None;
    }
    let of_folder = |folder: PathBuf| {
        [ADAPTER_CONFIG, WEIGHTS, PICKLE, TASK, CURVE, OTHER_BASE].map(|name| dir.join(&folder).join(name))
    };
    let paths = folders.into_iter().flat_map(of_folder).chain([dir.join(TASK)]);
    Some(Stamp(paths.map(stamp).collect()))
}

/// When a folder's content was stored.
fn stored_at(dir: &Path) -> SystemTime {
    let modified = |path: &Path| fs::metadata(path).and_then(|m| m.modified()).ok();
    let weights = adapter_folders(dir).first().and_then(|folder| modified(&dir.join(folder).join(WEIGHTS)));
    weights.or_else(|| modified(dir)).unwrap_or(SystemTime::UNIX_EPOCH)
}

fn write_active_file(path: &Path, active: &Active) -> io::Result<()> {
    let mut file = File::create_new(path)?;
    file.write_all(&active_json(active)?)?;
    file.sync_all()
}

/// Whether there was something to rename.
fn rename_if_there(from: &Path, to: &Path) -> io::Result<bool> {
    match fs::rename(from, to) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

/// The names of the folders in a folder; hidden ones are left out.
fn dir_names(dir: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with('.') && entry.path().is_dir() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}
