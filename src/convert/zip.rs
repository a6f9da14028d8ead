//! A zip archive that is read within bounds.

use std::io::{Cursor, Read as _};

use bytes::Bytes;
use zip::ZipArchive;

use super::ConvertError;

/// The most entries of an archive.
const MAX_ENTRIES: usize = 1024;

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

pub(super) fn damaged(reason: String) -> ConvertError {
    ConvertError::Damaged { format: "zip archive", reason }
}
