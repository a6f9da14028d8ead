//! One version's files as bytes: their digest, and a folder of them.

use std::{
    fs,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use super::{
    Digest,
    format::{Fault, FaultKind, Faults},
};

/// The configuration's name in a PEFT directory.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";
/// The tensors' name in a PEFT directory.
pub const WEIGHTS: &str = "adapter_model.safetensors";
/// The name of what a task's author says beside the tensors.
pub const TASK: &str = "task.json";
/// The name of the picture that a tuning run draws of its losses. It says how the prompt came about and is no part of
/// what a version is.
pub const CURVE: &str = "loss.svg";
/// A file whose presence says that the version may be served by another base model than the one it was tuned on, such as a
/// quantised twin. It is no part of what a version is.
pub const OTHER_BASE: &str = "other_base_allowed";
/// Examples that an upload may carry, to compare its version with the active one. They are not stored.
pub const EVAL: &str = "eval.jsonl";
/// PEFT's older format, a Python pickle. It is never opened.
pub const PICKLE: &str = "adapter_model.bin";

/// The most bytes of `adapter_config.json` and of `task.json`.
pub const MAX_JSON_BYTES: u64 = 1024 * 1024;
/// The most bytes of `adapter_model.safetensors` in a folder.
pub const MAX_WEIGHTS_BYTES: u64 = 1024 * 1024 * 1024;

/// The most bytes of `loss.svg`.
pub const MAX_CURVE_BYTES: u64 = 1024 * 1024;

/// The most bytes of a file of this name.
pub(crate) fn size_limit(name: &str) -> u64 {
    match name {
        WEIGHTS => MAX_WEIGHTS_BYTES,
        CURVE => MAX_CURVE_BYTES,
        _ => MAX_JSON_BYTES,
    }
}

/// One version's files, as uploaded or as they lie in a folder.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PromptFiles {
    /// `adapter_config.json`
    pub adapter_config: Option<Bytes>,
    /// `adapter_model.safetensors`
    pub weights: Option<Bytes>,
    /// `task.json`
    pub task: Option<Bytes>,
    /// `loss.svg`, which is kept beside the others and does not count for the version.
    pub curve: Option<Bytes>,
    /// `other_base_allowed`, which is kept beside the others and does not count for the version.
    pub other_base: Option<Bytes>,
}

impl PromptFiles {
    /// The content's digest: equal files give equal versions, however they were packed.
    pub fn digest(&self) -> Digest {
        let mut hash = Sha256::new();
        for (name, bytes) in self.content() {
            for part in [name.as_bytes(), bytes.as_ref()] {
                hash.update((part.len() as u64).to_le_bytes());
                hash.update(part);
            }
        }
        Digest(hash.finalize().into())
    }

    /// The files that are there, by name, in a fixed order.
    pub fn present(&self) -> impl Iterator<Item = (&'static str, &Bytes)> {
        self.all().into_iter().filter_map(|(name, bytes)| Some((name, bytes.as_ref()?)))
    }

    /// The files that make the version, which its digest names: all that are there but those that are only kept beside it.
    pub fn content(&self) -> impl Iterator<Item = (&'static str, &Bytes)> {
        self.present().filter(|(name, _)| ![CURVE, OTHER_BASE].contains(name))
    }

    fn all(&self) -> [(&'static str, &Option<Bytes>); 5] {
        [
            (ADAPTER_CONFIG, &self.adapter_config),
            (WEIGHTS, &self.weights),
            (TASK, &self.task),
            (CURVE, &self.curve),
            (OTHER_BASE, &self.other_base),
        ]
    }

    /// Bytes of all files.
    pub fn num_bytes(&self) -> u64 {
        self.present().map(|(_, bytes)| bytes.len() as u64).sum()
    }

    /// Checks that nothing is missing from a PEFT directory, packed or not. A single safetensors
    /// file does without a configuration; a directory whose configuration is missing is cut short.
    pub fn check_complete(&self) -> Result<(), Faults> {
        let missing: Vec<_> = [(ADAPTER_CONFIG, &self.adapter_config), (WEIGHTS, &self.weights)]
            .into_iter()
            .filter(|(_, bytes)| bytes.is_none())
            .map(|(name, _)| malformed(format!("there is no {name}; add the one that PEFT's save_pretrained wrote")))
            .collect();
        if missing.is_empty() { Ok(()) } else { Err(Faults(missing)) }
    }

    /// What is over the bounds of [`read_dir`](Self::read_dir): it could not be read again.
    pub(super) fn size_faults(&self) -> Vec<Fault> {
        self.present()
            .filter(|(name, bytes)| bytes.len() as u64 > size_limit(name))
            .map(|(name, bytes)| {
                malformed(format!("{name} has {} bytes; the maximum is {}", bytes.len(), size_limit(name)))
            })
            .collect()
    }

    /// Reads a plain PEFT directory, with or without `task.json`; other files are left alone. The
    /// adapter may lie one folder down, where PEFT puts one that has a name. A symbolic link is
    /// followed only to a file within the directory.
    pub fn read_dir(dir: &Path) -> Result<Self, Faults> {
        Self::read_with(dir, Links::Within)
    }

    /// As [`read_dir`](Self::read_dir), and follows every link: for a directory that the user named, who may link to
    /// what they like, as Hugging Face's cache, Nix and DVC do.
    pub fn read_users_dir(dir: &Path) -> Result<Self, Faults> {
        Self::read_with(dir, Links::Anywhere)
    }

    fn read_with(dir: &Path, links: Links) -> Result<Self, Faults> {
        let (root, folder) = locate(dir).map_err(|fault| Faults(vec![fault]))?;
        let mut faults = Vec::new();
        let mut read = |folder: &Path, name| {
            read_file(&root, dir, &folder.join(name), links).unwrap_or_else(|fault| {
                faults.push(fault);
                None
            })
        };
        let files = Self {
            adapter_config: read(&folder, ADAPTER_CONFIG),
            weights: read(&folder, WEIGHTS),
            task: read(&folder, TASK).or_else(|| read(Path::new(""), TASK)),
            curve: read(&folder, CURVE),
            other_base: read(&folder, OTHER_BASE),
        };
        if faults.is_empty() && files.weights.is_none() && root.join(&folder).join(PICKLE).exists() {
            faults.push(pickle_fault());
        }
        if faults.is_empty() { Ok(files) } else { Err(Faults(faults)) }
    }

    /// Reads only the curve of a plain PEFT directory, as [`read_dir`](Self::read_dir) does; `None` if there is none.
    pub fn read_curve(dir: &Path) -> Result<Option<Bytes>, Fault> {
        let (root, folder) = locate(dir)?;
        read_file(&root, dir, &folder.join(CURVE), Links::Within)
    }

    /// Writes a plain PEFT directory and waits until the disk has it. The directory is made if it
    /// is not there; files of these names are replaced, others are left alone.
    pub fn write_dir(&self, dir: &Path) -> io::Result<()> {
        fs::create_dir_all(dir)?;
        for (name, bytes) in self.present() {
            let mut file = fs::File::create(dir.join(name))?;
            io::Write::write_all(&mut file, bytes)?;
            file.sync_all()?;
        }
        for (name, bytes) in self.all() {
            if bytes.is_none() {
                match fs::remove_file(dir.join(name)) {
                    Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                    _ => {}
                }
            }
        }
        sync_dir(dir)
    }
}

/// A PEFT directory without links in its path, and where in it its only adapter is, if it has one.
fn locate(dir: &Path) -> Result<(PathBuf, PathBuf), Fault> {
    let root = match dir.canonicalize() {
        Ok(root) if root.is_dir() => root,
        Ok(_) => return Err(malformed(format!("{} is not a folder", dir.display()))),
        Err(e) => return Err(malformed(format!("cannot open {}: {e}", dir.display()))),
    };
    match &adapter_folders(&root)[..] {
        [] => Ok((root, PathBuf::new())),
        [folder] => Ok((root, folder.clone())),
        several => Err(several_fault(dir, several)),
    }
}

/// Where the adapters of a PEFT directory are, relative to it: in itself if it has an adapter's files,
/// else in the folders below that have; sorted.
pub fn adapter_folders(dir: &Path) -> Vec<PathBuf> {
    let has_adapter = |folder: &Path| [ADAPTER_CONFIG, WEIGHTS, PICKLE].iter().any(|name| folder.join(name).exists());
    if has_adapter(dir) {
        return vec![PathBuf::new()];
    }
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let is_hidden = |name: &Path| name.to_string_lossy().starts_with('.');
    let mut folders: Vec<PathBuf> = entries
        .map(|entry| PathBuf::from(entry.file_name()))
        .filter(|name| !is_hidden(name) && has_adapter(&dir.join(name)))
        .collect();
    folders.sort();
    folders
}

fn several_fault(dir: &Path, folders: &[PathBuf]) -> Fault {
    const SHOWN: usize = 6;
    let shown: Vec<_> = folders.iter().take(SHOWN).map(|folder| folder.display().to_string()).collect();
    let more = if folders.len() > SHOWN { ", …" } else { "" };
    malformed(format!(
        "{} has {} adapters, in {}{more}; expected one: give the folder of one of them",
        dir.display(),
        folders.len(),
        shown.join(", ")
    ))
}

/// Waits until the disk has a folder's entries.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    // Windows cannot open a folder as a file and needs no such call; some network file systems
    // refuse it for folders.
    if !cfg!(unix) {
        return Ok(());
    }
    match fs::File::open(dir)?.sync_all() {
        Err(e) if matches!(e.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => Ok(()),
        outcome => outcome,
    }
}

/// Why a `.bin` file alone is refused.
pub fn pickle_fault() -> Fault {
    malformed(format!(
        "found {PICKLE} and no {WEIGHTS}; a .bin file is a Python pickle, which can run code and is never opened; \
         convert it with `softserve convert`, or load it in PEFT and call save_pretrained(..., safe_serialization=True)"
    ))
}

fn malformed(detail: String) -> Fault {
    Fault { kind: FaultKind::Malformed, detail }
}

/// Where a symbolic link may lead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Links {
    /// To a file within the directory.
    Within,
    Anywhere,
}

/// Reads a file of the folder `dir`, which is `root` without links, within the bound of its name.
fn read_file(root: &Path, dir: &Path, name: &Path, links: Links) -> Result<Option<Bytes>, Fault> {
    let bound = size_limit(&name.file_name().unwrap_or_default().to_string_lossy());
    read_bounded(root, name, bound, links)
        .map_err(|e| malformed(format!("cannot read {} of {}: {e}", name.display(), dir.display())))
}

fn read_bounded(root: &Path, name: &Path, limit: u64, links: Links) -> io::Result<Option<Bytes>> {
    let path = match root.join(name).canonicalize() {
        Ok(path) => path,
        Err(e) if e.kind() == io::ErrorKind::NotFound && root.join(name).symlink_metadata().is_err() => {
            return Ok(None);
        }
        Err(e) => return Err(e),
    };
    if links == Links::Within && !path.starts_with(root) {
        return Err(io::Error::other("it is a link that leads out of the folder; copy the file here"));
    }
    let meta = fs::metadata(&path)?;
    if !meta.is_file() {
        return Err(io::Error::other("it is not a file"));
    }
    let too_large = || io::Error::other(format!("it has more than {limit} bytes"));
    if meta.len() > limit {
        return Err(too_large());
    }
    let mut bytes = Vec::with_capacity(meta.len() as usize);
    fs::File::open(&path)?.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit { Err(too_large()) } else { Ok(Some(bytes.into())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files() -> PromptFiles {
        PromptFiles { adapter_config: Some("{}".into()), weights: Some("w".into()), ..PromptFiles::default() }
    }

    #[test]
    fn the_digest_tells_files_apart_by_name_and_content() {
        let other_name = PromptFiles { task: Some("{}".into()), adapter_config: None, ..files() };
        let other_cut = PromptFiles { adapter_config: Some("{".into()), weights: Some("}w".into()), ..files() };
        let with_task = PromptFiles { task: Some("".into()), ..files() };
        let digests = [&files(), &other_name, &other_cut, &with_task].map(PromptFiles::digest);
        for (i, a) in digests.iter().enumerate() {
            assert!(!digests[i + 1..].contains(a));
        }
        assert_eq!(files().digest(), files().digest());
    }

    #[test]
    fn a_curve_is_kept_beside_the_files_and_does_not_change_what_they_are() {
        let dir = tempfile::tempdir().expect("temp dir");
        let drawn = PromptFiles { curve: Some("<svg/>".into()), ..files() };
        assert_eq!(drawn.digest(), files().digest());
        assert_eq!((drawn.num_bytes(), drawn.content().count()), (files().num_bytes() + 6, 2));
        drawn.write_dir(dir.path()).expect("writes");
        assert_eq!(PromptFiles::read_dir(dir.path()).expect("reads"), drawn);
        assert_eq!(PromptFiles::read_curve(dir.path()).expect("reads"), drawn.curve);
        fs::write(dir.path().join(CURVE), vec![b' '; MAX_CURVE_BYTES as usize + 1]).expect("writes");
        let faults = PromptFiles::read_dir(dir.path()).expect_err("refused").to_string();
        assert!(faults.contains("loss.svg") && faults.contains("more than 1048576 bytes"), "{faults}");
        files().write_dir(dir.path()).expect("another prompt's curve goes");
        assert_eq!(PromptFiles::read_curve(dir.path()).expect("reads"), None);
    }

    #[test]
    fn a_folder_gives_back_what_was_written() {
        let dir = tempfile::tempdir().expect("temp dir");
        let with_task = PromptFiles { task: Some("{}".into()), ..files() };
        for files in [with_task, files()] {
            files.write_dir(&dir.path().join("x")).expect("writes");
            assert_eq!(PromptFiles::read_dir(&dir.path().join("x")).expect("reads"), files);
        }
    }

    #[test]
    fn a_folder_with_only_a_pickle_says_how_to_convert_it() {
        let dir = tempfile::tempdir().expect("temp dir");
        fs::write(dir.path().join(PICKLE), b"\x80\x04").expect("writes");
        let faults = PromptFiles::read_dir(dir.path()).expect_err("refused");
        assert!(faults.to_string().contains("safe_serialization=True"), "{faults}");
        files().write_dir(dir.path()).expect("writes");
        assert_eq!(PromptFiles::read_dir(dir.path()).expect("safetensors wins"), files());
    }

    #[cfg(unix)]
    #[test]
    fn a_link_out_of_the_folder_is_not_followed_and_one_within_is() {
        let dir = tempfile::tempdir().expect("temp dir");
        let (inside, outside) = (dir.path().join("in"), dir.path().join("out"));
        fs::create_dir_all(inside.join("..data")).expect("makes");
        fs::write(&outside, "secret").expect("writes");
        fs::write(inside.join("..data/task.json"), "{}").expect("writes");
        std::os::unix::fs::symlink("..data/task.json", inside.join(TASK)).expect("links");
        assert_eq!(PromptFiles::read_dir(&inside).expect("reads").task.as_deref(), Some(b"{}".as_ref()));
        std::os::unix::fs::symlink(&outside, inside.join(WEIGHTS)).expect("links");
        let faults = PromptFiles::read_dir(&inside).expect_err("refused");
        assert!(faults.to_string().contains("leads out of the folder"), "{faults}");
    }

    #[test]
    fn a_file_over_its_bound_is_not_read() {
        let dir = tempfile::tempdir().expect("temp dir");
        fs::write(dir.path().join(TASK), vec![b' '; MAX_JSON_BYTES as usize + 1]).expect("writes");
        let faults = PromptFiles::read_dir(dir.path()).expect_err("refused");
        assert!(faults.to_string().contains("more than"), "{faults}");
    }

    #[test]
    fn an_adapter_that_has_a_name_is_found_one_folder_down_and_two_are_refused() {
        let dir = tempfile::tempdir().expect("temp dir");
        files().write_dir(&dir.path().join("french")).expect("writes");
        fs::create_dir(dir.path().join("runs")).expect("makes");
        fs::write(dir.path().join(TASK), "{}").expect("writes");
        let with_task = PromptFiles { task: Some("{}".into()), ..files() };
        assert_eq!(PromptFiles::read_dir(dir.path()).expect("reads"), with_task);
        files().write_dir(&dir.path().join("german")).expect("writes");
        let faults = PromptFiles::read_dir(dir.path()).expect_err("two").to_string();
        assert!(faults.contains("2 adapters, in french, german"), "{faults}");
        // What lies in the directory itself is the adapter, as PEFT reads it.
        let top = PromptFiles { weights: Some("top".into()), ..files() };
        fs::write(dir.path().join(WEIGHTS), "top").expect("writes");
        fs::write(dir.path().join(ADAPTER_CONFIG), "{}").expect("writes");
        assert_eq!(PromptFiles::read_dir(dir.path()).expect("reads"), PromptFiles { task: Some("{}".into()), ..top });
    }

    #[cfg(unix)]
    #[test]
    fn a_folder_of_an_adapter_that_is_a_link_out_is_not_followed() {
        let dir = tempfile::tempdir().expect("temp dir");
        let (inside, outside) = (dir.path().join("in"), dir.path().join("out"));
        fs::create_dir(&inside).expect("makes");
        files().write_dir(&outside).expect("writes");
        std::os::unix::fs::symlink(&outside, inside.join("french")).expect("links");
        let faults = PromptFiles::read_dir(&inside).expect_err("refused");
        assert!(faults.to_string().contains("leads out of the folder"), "{faults}");
    }

    #[test]
    fn a_directory_must_have_its_configuration_and_its_weights() {
        let faults = PromptFiles::default().check_complete().expect_err("incomplete");
        assert_eq!(faults.0.len(), 2);
        assert!(files().check_complete().is_ok());
    }
}
