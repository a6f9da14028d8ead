//! The prompts' folder: what lies where, and changes that happen whole or not at all.
//!
//! Everything new is first written to a hidden folder under the same root, waited for, and renamed
//! into place; everything that goes is first renamed away. A crash leaves only hidden folders,
//! which the next [`Store::open`] removes. Several processes may share the folder: a writer locks
//! it against the others' writers.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, ErrorKind, Read as _, Write as _},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use crate::prompt::{
    Digest, TaskName,
    files::{ADAPTER_CONFIG, CURVE, PICKLE, PromptFiles, TASK, WEIGHTS, adapter_folders, sync_dir},
    format::Faults,
};

const VERSIONS: &str = "versions";
const ACTIVE: &str = "active.json";
const STAGING: &str = ".staging-";
/// The most bytes of `active.json`.
const MAX_ACTIVE_BYTES: u64 = 64 * 1024;

/// The folder of all tasks.
#[derive(Debug)]
pub(super) struct Store {
    root: PathBuf,
}

/// The content of `active.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Active {
    pub version: String,
    /// Hand-written files may leave it out.
    #[serde(default)]
    pub generation: u64,
    /// The shares of several versions, if requests are split between them; `version` has the largest.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub versions: BTreeMap<String, f64>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub aliases: BTreeMap<String, String>,
    /// The versions that were active before, the last one first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub previous: Vec<String>,
}

/// Tells whether a folder's prompt changed, without reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stamp(Vec<(u64, SystemTime)>);

/// What lies in the root.
#[derive(Debug, Default)]
pub(super) struct TaskNames {
    /// Sorted.
    pub tasks: Vec<TaskName>,
    /// Folders that cannot be a task's, with why.
    pub others: Vec<(PathBuf, String)>,
}

impl Stamp {
    /// Whether a change within the clock's resolution could have gone unseen.
    pub fn is_fresh(&self) -> bool {
        let recent = |t: &SystemTime| t.elapsed().is_ok_and(|age| age < Duration::from_millis(100));
        self.0.iter().any(|(_, modified)| recent(modified))
    }
}

impl Store {
    /// Makes the folder if it is not there and clears what a crash left.
    pub fn open(root: &Path) -> io::Result<Self> {
        fs::create_dir_all(root)?;
        let store = Self { root: root.canonicalize()? };
        if let Some(_lock) = store.lock() {
            store.clear_staging();
        }
        Ok(store)
    }

    /// Keeps other processes from writing until it is dropped; waits for one that does. `None`
    /// where the file system cannot lock: there, nothing but the generation tells two writers apart.
    pub fn lock(&self) -> Option<File> {
        let folder = File::open(&self.root).ok()?;
        folder.lock().ok()?;
        Some(folder)
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn task_dir(&self, task: &TaskName) -> PathBuf {
        self.root.join(task.as_str())
    }

    pub fn versions_dir(&self, task: &TaskName) -> PathBuf {
        self.task_dir(task).join(VERSIONS)
    }

    pub fn version_dir(&self, task: &TaskName, id: &str) -> PathBuf {
        self.versions_dir(task).join(id)
    }

    pub fn active_path(&self, task: &TaskName) -> PathBuf {
        self.task_dir(task).join(ACTIVE)
    }

    /// The folders of all tasks.
    pub fn task_names(&self) -> io::Result<TaskNames> {
        let TaskNames { mut tasks, mut others } = TaskNames::default();
        for entry in fs::read_dir(&self.root)? {
            let entry = entry?;
            let (name, path) = (entry.file_name().to_string_lossy().into_owned(), entry.path());
            // Of very many folders only the links are looked at one by one.
            let (is_dir, is_inside) = match entry.file_type()? {
                kind if kind.is_symlink() => {
                    (path.is_dir(), path.canonicalize().is_ok_and(|target| target.starts_with(&self.root)))
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
                Ok(task) => tasks.push(task),
            }
        }
        tasks.sort();
        Ok(TaskNames { tasks, others })
    }

    /// The names of a task's version folders, whatever they hold.
    pub fn version_ids(&self, task: &TaskName) -> io::Result<Vec<String>> {
        match dir_names(&self.versions_dir(task)) {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            names => names,
        }
    }

    /// Reads a version's files; the folder's name must be the id of its content.
    pub fn read_version(&self, task: &TaskName, id: &str) -> Result<PromptFiles, String> {
        let files = PromptFiles::read_dir(&self.version_dir(task, id)).map_err(|e| e.to_string())?;
        match files.digest().id() {
            found if found == id => Ok(files),
            found => Err(format!(
                "the files' content is version {found}: files are missing or were changed by hand; a changed prompt is \
                 a new version, to be published or put into a folder of its own name"
            )),
        }
    }

    /// Reads the plain PEFT directory that a task's folder may be.
    pub fn read_plain(&self, task: &TaskName) -> Result<PromptFiles, Faults> {
        let files = PromptFiles::read_dir(&self.task_dir(task))?;
        files.check_complete()?;
        Ok(files)
    }

    /// The stamp of a folder's prompt, one folder down too; `None` if it has none of a prompt's files.
    pub fn stamp(&self, dir: &Path) -> Option<Stamp> {
        let stamp = |path: PathBuf| {
            let meta = fs::metadata(path).ok();
            let absent = (u64::MAX, SystemTime::UNIX_EPOCH);
            meta.map_or(absent, |meta| (meta.len(), meta.modified().unwrap_or(SystemTime::UNIX_EPOCH)))
        };
        let folders = adapter_folders(dir);
        if folders.is_empty() {
            return None;
        }
        let of_folder =
            |folder: PathBuf| [ADAPTER_CONFIG, WEIGHTS, PICKLE, TASK, CURVE].map(|name| dir.join(&folder).join(name));
        let paths = folders.into_iter().flat_map(of_folder).chain([dir.join(TASK)]);
        Some(Stamp(paths.map(stamp).collect()))
    }

    /// When a folder's content was stored.
    pub fn stored_at(&self, dir: &Path) -> SystemTime {
        let modified = |path: &Path| fs::metadata(path).and_then(|m| m.modified()).ok();
        let weights = adapter_folders(dir).first().and_then(|folder| modified(&dir.join(folder).join(WEIGHTS)));
        weights.or_else(|| modified(dir)).unwrap_or(SystemTime::UNIX_EPOCH)
    }

    /// Reads `active.json`; `None` if there is none.
    pub fn read_active(&self, task: &TaskName) -> io::Result<Option<Active>> {
        let file = match File::open(self.active_path(task)) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        let mut bytes = Vec::new();
        file.take(MAX_ACTIVE_BYTES).read_to_end(&mut bytes)?;
        serde_json::from_slice(&bytes).map(Some).map_err(io::Error::other)
    }

    /// Whether a task's folder is there.
    pub fn has_task(&self, task: &TaskName) -> bool {
        self.task_dir(task).is_dir()
    }

    /// Replaces `active.json`.
    pub fn write_active(&self, task: &TaskName, active: &Active) -> io::Result<()> {
        let staging = self.staging()?;
        let file = staging.path().join(ACTIVE);
        write_active_file(&file, active)?;
        fs::rename(&file, self.active_path(task))?;
        sync_dir(&self.task_dir(task))
    }

    /// Stores a version's files, and makes it the active one if `active` is given: both or
    /// neither. A folder of that name whose content is another is replaced.
    pub fn add_version(
        &self,
        task: &TaskName,
        digest: Digest,
        files: &PromptFiles,
        active: Option<&Active>,
    ) -> io::Result<()> {
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
        let versions = self.versions_dir(task);
        let had_versions = versions.is_dir();
        fs::create_dir_all(&versions)?;
        let target = versions.join(&id);
        let replaced = staging.path().join("replaced");
        let was_there = rename_if_there(&target, &replaced)?;
        let stored = fs::rename(&staged, &target)
            .and_then(|()| sync_dir(&versions))
            .and_then(|()| sync_dir(&self.task_dir(task)))
            .and_then(|()| active.map_or(Ok(()), |active| self.write_active(task, active)));
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
        fs::rename(&staged, self.task_dir(task))?;
        sync_dir(&self.root).inspect_err(|_| {
            let _ = rename_if_there(&self.task_dir(task), &staged);
        })
    }

    /// Removes a version's folder.
    pub fn remove_version(&self, task: &TaskName, id: &str) -> io::Result<()> {
        let staging = self.staging()?;
        rename_if_there(&self.version_dir(task, id), &staging.path().join(id))?;
        sync_dir(&self.versions_dir(task))
    }

    /// Removes the files of a task's plain PEFT directory and leaves the rest of its folder.
    pub fn remove_plain(&self, task: &TaskName) -> io::Result<()> {
        let staging = self.staging()?;
        let dir = self.task_dir(task);
        let folders = adapter_folders(&dir);
        // The configuration last: while it is there, an interrupted removal shows as a fault.
        for name in [WEIGHTS, TASK, CURVE, PICKLE, ADAPTER_CONFIG] {
            for folder in folders.iter().map(|folder| dir.join(folder)) {
                rename_if_there(&folder.join(name), &staging.path().join(name))?;
            }
        }
        rename_if_there(&dir.join(TASK), &staging.path().join(TASK))?;
        sync_dir(&dir)
    }

    /// Removes a task's folder with all that is in it.
    pub fn remove_task(&self, task: &TaskName) -> io::Result<()> {
        let staging = self.staging()?;
        rename_if_there(&self.task_dir(task), &staging.path().join(task.as_str()))?;
        sync_dir(&self.root)
    }

    /// A hidden folder for what is not whole yet.
    pub fn staging(&self) -> io::Result<TempDir> {
        tempfile::Builder::new().prefix(STAGING).tempdir_in(&self.root)
    }

    /// Call it with the lock held: then no folder is in use.
    fn clear_staging(&self) {
        let Ok(entries) = fs::read_dir(&self.root) else { return };
        for entry in entries.flatten().filter(|e| e.file_name().to_string_lossy().starts_with(STAGING)) {
            let dir = entry.path();
            if let Err(e) = fs::remove_dir_all(&dir) {
                tracing::warn!(path = %dir.display(), error = %e, "cannot remove the leftovers of an interrupted write");
            }
        }
    }
}

fn write_active_file(path: &Path, active: &Active) -> io::Result<()> {
    let mut file = File::create_new(path)?;
    file.write_all(&serde_json::to_vec(active)?)?;
    file.write_all(b"\n")?;
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
