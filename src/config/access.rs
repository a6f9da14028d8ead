//! Who may call: where keys are written down, and the keys that were read there last.

use std::{
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
    time::SystemTime,
};

use super::{
    key_file,
    keys::{Key, Keys, Roles},
};

/// Keys that are not written as they should be, or a file of them that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("--{option}: {reason}")]
pub struct KeyError {
    /// The option that names them.
    pub option: &'static str,
    pub reason: String,
}

/// Where keys are written down.
#[derive(Debug, Clone, Default)]
pub struct KeySources {
    pub api_keys: Vec<String>,
    pub api_key_file: Option<PathBuf>,
    pub admin_keys: Vec<String>,
    pub admin_key_file: Option<PathBuf>,
    /// The file of `--keys`.
    pub keys: Option<PathBuf>,
}

impl KeySources {
    /// Reads all keys.
    ///
    /// # Errors
    /// A file cannot be read, or a key is not written as it should be.
    fn read(&self) -> Result<Read, KeyError> {
        let stamps = self.stamps();
        let option = |option| move |reason| KeyError { option, reason };
        let api = Keys::read(&self.api_keys, self.api_key_file.as_deref(), Roles::API).map_err(option("api-key"))?;
        let admin =
            Keys::read(&self.admin_keys, self.admin_key_file.as_deref(), Roles::ADMIN).map_err(option("admin-key"))?;
        let more = self.keys.as_deref().map(key_file::read).transpose().map_err(option("keys"))?;
        let needs_key = !api.is_empty() || more.is_some();
        Ok(Read { keys: Arc::new(api.and(admin).and(more.unwrap_or_default())), needs_key, stamps })
    }

    /// When each file was changed last, and its size.
    fn stamps(&self) -> Vec<Option<(SystemTime, u64)>> {
        let files = [&self.api_key_file, &self.admin_key_file, &self.keys];
        let stamp = |path: &PathBuf| {
            let meta = std::fs::metadata(path).ok()?;
            Some((meta.modified().ok()?, meta.len()))
        };
        files.into_iter().flatten().map(stamp).collect()
    }
}

/// Who may call. Cheap to clone; what is read again is seen by all clones.
#[derive(Debug, Clone)]
pub struct Access {
    read: Arc<RwLock<Read>>,
    sources: Arc<KeySources>,
    /// Only this machine can reach the address that we listen on.
    loopback: bool,
}

#[derive(Debug)]
struct Read {
    keys: Arc<Keys>,
    /// Whether there are keys that are not only for the admin routes.
    needs_key: bool,
    stamps: Vec<Option<(SystemTime, u64)>>,
}

impl Access {
    /// Reads the keys.
    ///
    /// # Errors
    /// A file cannot be read, or a key is not written as it should be.
    pub fn open(sources: KeySources, loopback: bool) -> Result<Self, KeyError> {
        let read = Arc::new(RwLock::new(sources.read()?));
        Ok(Self { read, sources: Arc::new(sources), loopback })
    }

    /// The key that `shown` is, be it expired or not.
    pub fn find(&self, shown: &str) -> Option<Arc<Key>> {
        self.keys().find(shown).cloned()
    }

    /// Whether any key is set, be it expired or not.
    pub fn has_keys(&self) -> bool {
        !self.keys().is_empty()
    }

    /// Whether anyone may ask the model and read the metrics: no key is set, or only keys of `--admin-key` and its file.
    pub fn infer_is_open(&self) -> bool {
        !self.read.read().unwrap_or_else(PoisonError::into_inner).needs_key
    }

    /// Whether anyone may call the admin routes: no key is set at all, and only this machine can reach us.
    pub fn admin_is_open(&self) -> bool {
        self.loopback && !self.has_keys()
    }

    /// Whether a key can open the admin routes.
    pub fn has_admin_keys(&self) -> bool {
        self.keys().iter().any(|key| key.roles.admin)
    }

    /// Whether keys are written in files, which can change.
    pub fn has_files(&self) -> bool {
        !self.sources.stamps().is_empty()
    }

    /// Reads the files again if one of them has changed. How many keys there are now; `None` if nothing has changed.
    ///
    /// # Errors
    /// A file cannot be read, or is wrong: the keys stay as they were.
    pub fn reload(&self) -> Result<Option<usize>, KeyError> {
        let stamps = self.sources.stamps();
        if self.read.read().unwrap_or_else(PoisonError::into_inner).stamps == stamps {
            return Ok(None);
        }
        let new = self.sources.read();
        let mut read = self.read.write().unwrap_or_else(PoisonError::into_inner);
        // A file that is wrong is complained about once.
        read.stamps = stamps;
        *read = new?;
        Ok(Some(read.keys.iter().count()))
    }

    fn keys(&self) -> Arc<Keys> {
        Arc::clone(&self.read.read().unwrap_or_else(PoisonError::into_inner).keys)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_changes_is_read_again_and_one_that_is_wrong_leaves_the_keys_as_they_were() -> Result<(), KeyError> {
        let dir = tempfile::tempdir().expect("temp dir");
        let file = dir.path().join("keys.toml");
        let write =
            |name: &str, key: &str| std::fs::write(&file, format!("[[key]]\nname = \"{name}\"\nkey = \"{key}\"\n"));
        write("a", "first-long-key").expect("writes");
        let sources = KeySources { keys: Some(file.clone()), ..KeySources::default() };
        let access = Access::open(sources, true)?;
        assert!(access.find("first-long-key").is_some() && !access.infer_is_open() && access.has_files());
        assert_eq!(access.reload()?, None);
        write("a", "another-long-key").expect("writes");
        assert_eq!(access.clone().reload()?, Some(1));
        assert!(access.find("first-long-key").is_none() && access.find("another-long-key").is_some());
        std::fs::write(&file, "[[key]]\nname = 3").expect("writes");
        assert!(access.reload().is_err());
        assert!(access.find("another-long-key").is_some());
        assert_eq!(access.reload()?, None, "it is complained about once");
        Ok(())
    }
}
