//! Small records in a folder, a JSON file each, changed whole or not at all. Knows nothing of what they say.

use std::{
    fs, io,
    io::Write as _,
    path::{Path, PathBuf},
};

use dashmap::DashMap;
use serde::{Serialize, de::DeserializeOwned};
use tempfile::NamedTempFile;

/// Records by id. The folder is made when the first is put there.
#[derive(Debug)]
pub struct Records<T> {
    root: PathBuf,
    known: DashMap<String, T>,
}

impl<T: Clone + Serialize + DeserializeOwned> Records<T> {
    /// Reads the records of a folder; there may be no such folder yet. A file that is no record is left where it is, with a
    /// warning.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn open(root: &Path) -> io::Result<Self> {
        let known = DashMap::new();
        let entries = match fs::read_dir(root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self { root: root.to_owned(), known }),
            Err(error) => return Err(error),
        };
        for path in entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()? {
            let name = path.file_name().and_then(|name| name.to_str());
            let Some(id) = name.and_then(|name| name.strip_suffix(".json")).filter(|id| is_id(id)) else { continue };
            match fs::read(&path)
                .map_err(|e| e.to_string())
                .and_then(|b| serde_json::from_slice(&b).map_err(|e| e.to_string()))
            {
                Ok(record) => {
                    known.insert(id.to_owned(), record);
                }
                Err(error) => tracing::warn!(path = %path.display(), error, "a record cannot be read"),
            }
        }
        Ok(Self { root: root.to_owned(), known })
    }

    /// A file of this name beside the records, in the folder, which is made if it is not there.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn file(&self, name: &str) -> io::Result<PathBuf> {
        fs::create_dir_all(&self.root)?;
        Ok(self.root.join(name))
    }

    /// A file without a name yet, in the folder.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn unnamed(&self) -> io::Result<NamedTempFile> {
        fs::create_dir_all(&self.root)?;
        NamedTempFile::with_prefix_in(".new-", &self.root)
    }

    /// Writes a record, in place of the one of the same id.
    ///
    /// # Errors
    /// It cannot be written; the one before is still there.
    pub fn put(&self, id: &str, record: T) -> io::Result<()> {
        debug_assert!(is_id(id), "{id}");
        let mut file = self.unnamed()?;
        file.write_all(&serde_json::to_vec(&record)?)?;
        file.as_file().sync_all()?;
        file.persist(self.root.join(format!("{id}.json")))?;
        self.known.insert(id.to_owned(), record);
        Ok(())
    }

    /// The record of an id.
    pub fn get(&self, id: &str) -> Option<T> {
        self.known.get(id).map(|found| found.clone())
    }

    /// All records, in no order.
    pub fn all(&self) -> Vec<T> {
        self.known.iter().map(|record| record.clone()).collect()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// Removes a record, if there is one of this id.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove(&self, id: &str) -> io::Result<()> {
        if self.known.remove(id).is_some() {
            fs::remove_file(self.root.join(format!("{id}.json")))?;
        }
        Ok(())
    }
}

/// Whether an id is safe as a file's name.
pub fn is_id(id: &str) -> bool {
    (1..=80).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_there_after_a_restart_and_damaged_ones_do_not_keep_others_away() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("deep/records");
        let records = Records::<Vec<u32>>::open(&root).unwrap();
        assert!(records.is_empty() && !root.exists());
        records.put("a-1", vec![1]).unwrap();
        records.put("a-1", vec![2]).unwrap();
        records.put("b", vec![3]).unwrap();
        records.remove("b").unwrap();
        records.remove("never").unwrap();
        fs::write(root.join("c.json"), "{").unwrap();
        let again = Records::<Vec<u32>>::open(&root).unwrap();
        assert_eq!(
            (again.len(), again.get("a-1"), again.get("b"), again.all()),
            (1, Some(vec![2]), None, vec![vec![2]])
        );
        assert!(!is_id("../a") && !is_id("") && is_id("file-01"));
    }
}
