//! Zip archives within bounds: NumPy's npz, KoboldAI's soft prompts, torch's files.

use std::io::{Cursor, Read as _};

use bytes::Bytes;
use serde::Deserialize;
use zip::ZipArchive;

use super::{ConvertError, Foreign, Format, npy, torch};
use crate::prompt::files::WEIGHTS;

/// The most entries of an archive.
const MAX_ENTRIES: usize = 1024;

/// The array's and the description's names in a KoboldAI soft prompt.
const KOBOLD_TENSOR: &str = "tensor.npy";
const KOBOLD_META: &str = "meta.json";

/// A zip archive that unpacks to a bounded number of bytes, all entries together. Entries are read
/// by name into memory; none becomes a file.
#[derive(Debug)]
pub struct Zip<'a> {
    archive: ZipArchive<Cursor<&'a [u8]>>,
    left: u64,
    limit: u64,
}

impl<'a> Zip<'a> {
    /// Opens an archive, of which at most `limit` bytes will be unpacked.
    pub fn open(bytes: &'a [u8], limit: u64) -> Result<Self, ConvertError> {
        let archive = ZipArchive::new(Cursor::new(bytes)).map_err(|e| damaged(e.to_string()))?;
        if archive.len() > MAX_ENTRIES {
            return Err(damaged(format!("it has {} entries; the maximum is {MAX_ENTRIES}", archive.len())));
        }
        if archive.has_duplicate_names() {
            return Err(damaged("two entries have one name".to_owned()));
        }
        Ok(Self { archive, left: limit, limit })
    }

    /// Names of all entries that have a readable one.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.archive.file_names().filter_map(|name| match name {
            Ok(std::borrow::Cow::Borrowed(name)) => Some(name),
            _ => None,
        })
    }

    /// Whether there is an entry of that name.
    pub fn has(&self, name: &str) -> bool {
        self.names().any(|n| n == name)
    }

    /// Bytes that may still be unpacked.
    pub fn left(&self) -> u64 {
        self.left
    }

    /// Counts bytes against the limit.
    pub fn spend(&mut self, bytes: u64) -> Result<(), ConvertError> {
        let too_large =
            ConvertError::TooLarge { what: "what the zip archive unpacks to".to_owned(), limit: self.limit };
        self.left = self.left.checked_sub(bytes).ok_or(too_large)?;
        Ok(())
    }

    /// The whole content of an entry.
    pub fn read(&mut self, name: &str) -> Result<Bytes, ConvertError> {
        let short: String = name.chars().take(120).collect();
        let fail = |reason: String| damaged(format!("entry {short:?}: {reason}"));
        let size = self.archive.by_name(name).map_err(|e| fail(e.to_string()))?.size();
        // What the entry claims is held against the limit before anything is allocated for it.
        self.spend(size)?;
        let entry = self.archive.by_name(name).map_err(|e| fail(e.to_string()))?;
        let mut bytes = Vec::with_capacity(size as usize + 1);
        entry.take(size + 1).read_to_end(&mut bytes).map_err(|e| fail(e.to_string()))?;
        if bytes.len() as u64 != size {
            return Err(fail(format!("it claims {size} bytes and unpacks to {}", bytes.len())));
        }
        Ok(bytes.into())
    }
}

fn damaged(reason: String) -> ConvertError {
    ConvertError::Damaged { format: "zip archive", reason }
}

/// Reads whichever of the formats the entries' names tell.
pub fn read_zip(bytes: &[u8], limit: u64) -> Result<Foreign, ConvertError> {
    let mut zip = Zip::open(bytes, limit)?;
    if zip.names().any(|name| torch::in_folder(name, torch::PICKLE)) {
        return Ok(Foreign::new(Format::Torch, torch::read_zip(&mut zip)?));
    }
    if zip.has(KOBOLD_TENSOR) {
        return kobold(&mut zip);
    }
    let arrays: Vec<String> = zip.names().filter(|name| name.ends_with(".npy")).map(str::to_owned).collect();
    if !arrays.is_empty() {
        let mut tensors = Vec::new();
        for name in &arrays {
            let bytes = zip.read(name)?;
            let tensor = npy::read(name.trim_end_matches(".npy"), bytes, zip.left())?;
            zip.spend(tensor.data.len() as u64)?;
            tensors.push(tensor);
        }
        return Ok(Foreign::new(Format::Npz, tensors));
    }
    if zip.names().any(|name| torch::in_folder(name, WEIGHTS)) {
        return Err(damaged("it is a packed PEFT directory, which is served as it is: softserve push".to_owned()));
    }
    let names: Vec<String> = zip.names().take(8).map(|n| n.chars().take(80).collect()).collect();
    let reason = format!(
        "it has {names:?}, expected data.pkl of a torch file, {KOBOLD_TENSOR} of a KoboldAI soft prompt, or .npy arrays; \
         unpack a zipped PEFT directory first"
    );
    Err(damaged(reason))
}

/// What `meta.json` says. KoboldAI writes more.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Meta {
    name: Option<String>,
    author: Option<String>,
    description: Option<String>,
}

/// A KoboldAI (mkultra, mtj-softtuner) soft prompt.
fn kobold(zip: &mut Zip<'_>) -> Result<Foreign, ConvertError> {
    let fail = |reason: String| ConvertError::Damaged { format: Format::Kobold.name(), reason };
    let bytes = zip.read(KOBOLD_TENSOR)?;
    let mut foreign = Foreign::new(Format::Kobold, vec![npy::read("tensor", bytes, zip.left())?]);
    if zip.has(KOBOLD_META) {
        let meta = zip.read(KOBOLD_META)?;
        let meta: Meta =
            serde_json::from_slice(&meta).map_err(|e| fail(format!("its {KOBOLD_META} is not as expected: {e}")))?;
        let text = |text: Option<String>| text.map(|t| t.trim().to_owned()).filter(|t| !t.is_empty());
        let by = text(meta.author).map(|author| format!(" (by {author})")).unwrap_or_default();
        foreign.description = match (text(meta.name), text(meta.description)) {
            (Some(name), Some(description)) => Some(format!("{name}{by}: {description}")),
            (Some(one), None) | (None, Some(one)) => Some(format!("{one}{by}")),
            (None, None) => None,
        };
    }
    Ok(foreign)
}
