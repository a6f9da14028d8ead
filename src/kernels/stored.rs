//! Bytes of weights that are in memory, or still in a file: then they are read in pieces, by whoever packs them, so that
//! a matrix is never in memory twice.

use std::{
    fs::File,
    io::{Error, ErrorKind, Read as _, Result, Seek as _, SeekFrom},
    ops::Range,
    path::Path,
    sync::Arc,
};

/// The bytes of a tensor. Cheap to clone while they are in a file.
#[derive(Debug, Clone)]
pub enum StoredBytes {
    /// In memory.
    Memory(Vec<u8>),
    /// A range of a file.
    File { path: Arc<Path>, offset: u64, len: usize },
}

impl From<Vec<u8>> for StoredBytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Memory(bytes)
    }
}

impl StoredBytes {
    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            Self::Memory(bytes) => bytes.len(),
            Self::File { len, .. } => *len,
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All of them, in memory.
    ///
    /// # Errors
    /// The file cannot be read, or has become shorter.
    pub fn into_memory(self) -> Result<Vec<u8>> {
        match self {
            Self::Memory(bytes) => Ok(bytes),
            Self::File { len, .. } => {
                let mut bytes = Vec::new();
                self.read(0..len, &mut bytes)?;
                Ok(bytes)
            }
        }
    }

    /// Those of a range, which stay where they are if they are in a file.
    ///
    /// # Errors
    /// There is no such range.
    pub fn range(&self, range: Range<usize>) -> Result<Self> {
        self.check(&range)?;
        Ok(match self {
            Self::Memory(bytes) => Self::Memory(bytes[range].to_vec()),
            Self::File { path, offset, .. } => {
                Self::File { path: Arc::clone(path), offset: offset + range.start as u64, len: range.len() }
            }
        })
    }

    /// Those of a range: as they are in memory, or read into `space`.
    ///
    /// # Errors
    /// There is no such range; the file cannot be read, or has become shorter.
    pub fn read<'a>(&'a self, range: Range<usize>, space: &'a mut Vec<u8>) -> Result<&'a [u8]> {
        self.check(&range)?;
        match self {
            Self::Memory(bytes) => Ok(&bytes[range]),
            Self::File { path, offset, .. } => {
                space.resize(range.len(), 0);
                let start = SeekFrom::Start(offset + range.start as u64);
                let read = File::open(path).and_then(|mut file| {
                    file.seek(start)?;
                    file.read_exact(space)
                });
                read.map_err(|e| Error::new(e.kind(), format!("{}: {e}", path.display())))?;
                Ok(space)
            }
        }
    }

    fn check(&self, range: &Range<usize>) -> Result<()> {
        if range.start <= range.end && range.end <= self.len() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::InvalidInput, format!("bytes {range:?} of {}", self.len())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_in_a_file_are_those_in_memory() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bytes");
        let all: Vec<u8> = (0..100).collect();
        std::fs::write(&path, &all).unwrap();
        let in_file = StoredBytes::File { path: path.as_path().into(), offset: 10, len: 80 };
        let in_memory = StoredBytes::from(all[10..90].to_vec());
        let mut space = vec![7; 200];
        for stored in [&in_file, &in_memory] {
            assert_eq!(stored.len(), 80);
            assert_eq!(stored.read(0..80, &mut space).unwrap(), &all[10..90]);
            assert_eq!(stored.read(5..9, &mut space).unwrap(), [15, 16, 17, 18]);
            let part = stored.range(20..30).unwrap();
            assert_eq!(part.read(1..3, &mut space).unwrap(), [31, 32]);
            assert_eq!(part.into_memory().unwrap(), &all[30..40]);
            assert!(stored.read(0..81, &mut space).is_err() && stored.range(70..81).is_err());
        }
        std::fs::write(&path, &all[..50]).unwrap();
        let error = in_file.into_memory().unwrap_err();
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");
    }
}
