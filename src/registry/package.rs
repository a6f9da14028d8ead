//! An upload's bytes to files, within bounds: zip, tar, tar.gz or a single safetensors file.

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
    io::{self, Cursor, Read},
};

use bytes::Bytes;

use crate::content;
use crate::prompt::{
    files::{ADAPTER_CONFIG, CURVE, EVAL, PICKLE, TASK, WEIGHTS},
    format::PromptFiles,
};

/// The most entries of an archive, whatever they are.
pub const MAX_ENTRIES: usize = 256;

/// What an archive may hold beside its files' content: headers and padding of each entry.
const MAX_OVERHEAD: u64 = MAX_ENTRIES as u64 * 4096;

/// What an upload holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Upload {
    pub files: PromptFiles,
    /// `eval.jsonl`: examples to compare the version with the active one.
    pub eval: Option<Bytes>,
}

/// How an upload is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    Safetensors,
    Zip,
    Tar,
    TarGz,
}

impl Packing {
    /// The packing's name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Safetensors => "safetensors file",
            Self::Zip => "zip archive",
            Self::Tar => "tar archive",
            Self::TarGz => "tar.gz archive",
        }
    }
}

/// Why an upload cannot be unpacked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PackageError {
    #[error("the upload is not a readable {format}: {reason}")]
    Damaged { format: &'static str, reason: String },
    /// The content is packed in another way than was said.
    #[error(
        "the content type of the upload is that of a {declared}, but the content is a {found}; send the content type that matches"
    )]
    Mismatch { declared: &'static str, found: &'static str },
    #[error("the upload has an unsafe entry {entry:?}: {reason}")]
    Unsafe { entry: String, reason: &'static str },
    #[error("the upload unpacks to more than {limit} bytes")]
    TooLarge { limit: u64 },
    #[error("the upload has more than {limit} entries; pack only the files of one prompt")]
    TooManyEntries { limit: usize },
    #[error("the upload holds no PEFT prompt: {found}")]
    NoPrompt { found: String },
    /// Each folder with a prompt of its own.
    #[error("the upload holds more than one prompt ({}); upload them one by one", folders.join(", "))]
    SeveralPrompts { folders: Vec<String> },
}

/// Unpacks one upload to at most `limit` bytes in all. A PEFT directory may lie at the top of an
/// archive or one folder down, where PEFT puts an adapter that has a name; files that are no part
/// of a prompt are left out. Archives must have `adapter_config.json`.
pub fn unpack(packing: Packing, body: Bytes, limit: u64) -> Result<Upload, PackageError> {
    if let Some(found) = sniff(&body).filter(|found| *found != packing) {
        return Err(PackageError::Mismatch { declared: packing.name(), found: found.name() });
    }
    // A safetensors file is looked at where it is read.
    if let Some(reason) = content::stand_in(&body).filter(|_| packing != Packing::Safetensors) {
        return Err(PackageError::Damaged { format: packing.name(), reason });
    }
    match packing {
        Packing::Safetensors if body.len() as u64 > limit => Err(PackageError::TooLarge { limit }),
        Packing::Safetensors => {
            let files = PromptFiles { weights: Some(body), ..PromptFiles::default() };
            Ok(Upload { files, eval: None })
        }
        Packing::Zip => unzip(&body, limit)?.into_prompt(),
        Packing::Tar => untar(&body[..], packing, limit)?.into_prompt(),
        Packing::TarGz => untar(flate2::read::GzDecoder::new(&body[..]), packing, limit)?.into_prompt(),
    }
}

/// How bytes are packed, by their first ones; `None` where that does not tell.
pub fn sniff(body: &[u8]) -> Option<Packing> {
    let header = body.first_chunk::<8>().map(|n| u64::from_le_bytes(*n));
    if body.starts_with(b"PK\x03\x04") || body.starts_with(b"PK\x05\x06") {
        Some(Packing::Zip)
    } else if body.starts_with(b"\x1f\x8b") {
        Some(Packing::TarGz)
    } else if body.get(257..262) == Some(b"ustar") {
        Some(Packing::Tar)
    } else if body.get(8) == Some(&b'{') && header.is_some_and(|n| n <= body.len() as u64 - 8) {
        Some(Packing::Safetensors)
    } else {
        None
    }
}

/// The files of an archive that may be part of a prompt, by folder and name.
struct Unpacked {
    /// Bytes still allowed.
    left: u64,
    limit: u64,
    entries: usize,
    folders: BTreeMap<String, BTreeMap<&'static str, Bytes>>,
    /// Names of everything, for an error.
    seen: BTreeSet<String>,
}

/// Names of interest; a pickle only to say that it is not read.
const WANTED: [&str; 6] = [ADAPTER_CONFIG, WEIGHTS, TASK, CURVE, EVAL, PICKLE];

impl Unpacked {
    fn new(limit: u64) -> Self {
        Self { left: limit, limit, entries: 0, folders: BTreeMap::new(), seen: BTreeSet::new() }
    }

    /// Counts an entry and checks its name.
    fn admit(&mut self, name: &str) -> Result<(), PackageError> {
        self.entries += 1;
        if self.entries > MAX_ENTRIES {
            return Err(PackageError::TooManyEntries { limit: MAX_ENTRIES });
        }
        let reason = if name.is_empty() {
            "it has no name"
        } else if name.contains('\0') {
            "its name has a NUL"
        } else if name.contains('\\') {
            "its name has a backslash; folders are separated by '/'"
        } else if name.starts_with('/') || name.as_bytes().get(1) == Some(&b':') {
            "its path is absolute"
        } else if name.split('/').any(|part| part == "..") {
            "its path leads out of the archive"
        } else {
            return Ok(());
        };
        Err(PackageError::Unsafe { entry: short(name), reason })
    }

    /// Keeps a regular file if it may be part of a prompt.
    fn take(&mut self, name: &str, format: &'static str, content: impl Read) -> Result<(), PackageError> {
        let parts: Vec<&str> = name.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
        self.seen.insert(short(&parts.join("/")));
        let (folder, file) = match parts[..] {
            [file] => ("", file),
            // What macOS adds beside each file.
            ["__MACOSX", _] => return Ok(()),
            [folder, file] => (folder, file),
            _ => return Ok(()),
        };
        let Some(file) = WANTED.into_iter().find(|wanted| *wanted == file) else { return Ok(()) };
        let mut bytes = Vec::new();
        if file != PICKLE {
            let read = content.take(self.left.saturating_add(1)).read_to_end(&mut bytes);
            read.map_err(|e| PackageError::Damaged { format, reason: e.to_string() })?;
        }
        self.left = self.left.checked_sub(bytes.len() as u64).ok_or(PackageError::TooLarge { limit: self.limit })?;
        match self.folders.entry(folder.to_owned()).or_default().insert(file, bytes.into()) {
            None => Ok(()),
            Some(_) => Err(PackageError::Unsafe { entry: short(name), reason: "it appears twice" }),
        }
    }

    fn into_prompt(mut self) -> Result<Upload, PackageError> {
        let holds_prompt = |files: &BTreeMap<&str, Bytes>| files.keys().any(|name| ![TASK, CURVE, EVAL].contains(name));
        let prompts: Vec<String> =
            self.folders.iter().filter(|(_, files)| holds_prompt(files)).map(|(folder, _)| folder.clone()).collect();
        let folder = match &prompts[..] {
            [folder] => folder.clone(),
            [] => return Err(PackageError::NoPrompt { found: self.listing() }),
            _ => {
                return Err(PackageError::SeveralPrompts {
                    folders: prompts.iter().map(|f| format!("{f}/")).collect(),
                });
            }
        };
        let mut files = self.folders.remove(&folder).unwrap_or_default();
        let mut at_top = |name: &str| self.folders.get_mut("").and_then(|top| top.remove(name));
        let (top_task, top_eval) = (at_top(TASK), at_top(EVAL));
        let eval = files.remove(EVAL).or(top_eval);
        let prompt = PromptFiles {
            adapter_config: files.remove(ADAPTER_CONFIG),
            weights: files.remove(WEIGHTS),
            task: files.remove(TASK).or(top_task),
            curve: files.remove(CURVE),
            // Only the query of an upload says so.
            other_base: None,
        };
        if prompt.weights.is_none() && files.contains_key(PICKLE) {
            return Err(PackageError::NoPrompt { found: crate::prompt::files::pickle_fault().detail });
        }
        match prompt.check_complete() {
            Ok(()) => Ok(Upload { files: prompt, eval }),
            Err(missing) => Err(PackageError::NoPrompt { found: format!("{missing}; {}", self.listing()) }),
        }
    }

    fn listing(&self) -> String {
        const SHOWN: usize = 10;
        let names: Vec<&str> = self.seen.iter().take(SHOWN).map(String::as_str).collect();
        match self.seen.len() {
            0 => "it is empty".to_owned(),
            n if n > SHOWN => format!("it has {} and {} more", names.join(", "), n - SHOWN),
            _ => format!("it has {}", names.join(", ")),
        }
    }
}

fn short(name: &str) -> String {
    name.chars().take(120).collect()
}

fn unzip(body: &[u8], limit: u64) -> Result<Unpacked, PackageError> {
    let format = Packing::Zip.name();
    let damaged = |e: zip::result::ZipError| PackageError::Damaged { format, reason: e.to_string() };
    let mut archive = zip::ZipArchive::new(Cursor::new(body)).map_err(damaged)?;
    if archive.len() > MAX_ENTRIES {
        return Err(PackageError::TooManyEntries { limit: MAX_ENTRIES });
    }
    if archive.has_duplicate_names() {
        let reason = "two entries have one name".to_owned();
        return Err(PackageError::Damaged { format, reason });
    }
    let mut unpacked = Unpacked::new(limit);
    for i in 0..archive.len() {
        let entry = archive.by_index(i).map_err(damaged)?;
        let name = entry.name().map_err(damaged)?.into_owned();
        unpacked.admit(&name)?;
        // The file type bits of Unix; a zip made elsewhere has none.
        let kind = entry.unix_mode().unwrap_or(0) & 0o170_000;
        if entry.is_symlink() || ![0, 0o100_000, 0o040_000].contains(&kind) {
            return Err(PackageError::Unsafe { entry: short(&name), reason: "it is a link or a device, not a file" });
        }
        if !entry.is_dir() {
            unpacked.take(&name, format, entry)?;
        }
    }
    Ok(unpacked)
}

fn untar(stream: impl Read, packing: Packing, limit: u64) -> Result<Unpacked, PackageError> {
    let over = Cell::new(false);
    let bounded = Bounded { inner: stream, left: limit.saturating_add(MAX_OVERHEAD), over: &over };
    match read_tar(bounded, packing.name(), limit) {
        Err(_) if over.get() => Err(PackageError::TooLarge { limit }),
        outcome => outcome,
    }
}

fn read_tar(stream: impl Read, format: &'static str, limit: u64) -> Result<Unpacked, PackageError> {
    // The reader's messages end with bytes of the file.
    let said = |e: io::Error| e.to_string().split(':').next().unwrap_or_default().to_owned();
    let damaged = |e: io::Error| PackageError::Damaged { format, reason: short(&said(e)) };
    let mut unpacked = Unpacked::new(limit);
    let mut archive = tar::Archive::new(stream);
    for entry in archive.entries().map_err(damaged)? {
        let entry = entry.map_err(damaged)?;
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let kind = entry.header().entry_type();
        if kind.is_pax_global_extensions() {
            continue;
        }
        unpacked.admit(&name)?;
        if kind.is_file() || kind.is_contiguous() {
            unpacked.take(&name, format, entry)?;
        } else if !kind.is_dir() {
            return Err(PackageError::Unsafe { entry: short(&name), reason: "it is a link or a device, not a file" });
        }
    }
    if unpacked.entries == 0 {
        return Err(PackageError::Damaged { format, reason: "it has no entry".to_owned() });
    }
    Ok(unpacked)
}

/// Ends a stream that unpacks to more than it may: also what is skipped must be decompressed.
struct Bounded<'a, R> {
    inner: R,
    left: u64,
    over: &'a Cell<bool>,
}

impl<R: Read> Read for Bounded<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        match self.left.checked_sub(n as u64) {
            Some(left) => self.left = left,
            None => {
                self.over.set(true);
                return Err(io::Error::other("it unpacks to too much"));
            }
        }
        Ok(n)
    }
}

#[cfg(test)]
mod tests;
