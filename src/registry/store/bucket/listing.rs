//! Which objects make a prompt, and which of them were deleted.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    time::SystemTime,
};

use object_store::ObjectMeta;

use super::super::interface::{Mark, Stamp, VERSIONS};
use crate::prompt::files::{ADAPTER_CONFIG, CURVE, OTHER_BASE, PICKLE, TASK, WEIGHTS};

/// An object below a folder: the parts of its name after the folder's.
pub(super) type Entry = (Vec<String>, ObjectMeta);

/// The objects of one prompt, by file name.
#[derive(Debug, Default)]
pub(super) struct PromptObjects {
    pub(super) files: BTreeMap<&'static str, ObjectMeta>,
}

impl PromptObjects {
    /// A prompt's objects among those of a folder: in the folder itself, or one folder down, where PEFT puts an adapter that
    /// has a name. `None` if there are none; an error if there are several prompts.
    pub(super) fn of(entries: &[Entry]) -> Option<Result<Self, String>> {
        const ADAPTER: [&str; 3] = [ADAPTER_CONFIG, WEIGHTS, PICKLE];
        let is_adapter = |name: &str| ADAPTER.contains(&name);
        let in_top = entries.iter().any(|(parts, _)| parts.len() == 1 && is_adapter(&parts[0]));
        let mut folders: Vec<&str> = match in_top {
            true => vec![""],
            false => {
                entries.iter().filter_map(|(parts, _)| sub_folder(parts).filter(|_| is_adapter(&parts[1]))).collect()
            }
        };
        folders.sort_unstable();
        folders.dedup();
        let folder = match folders[..] {
            [] => return None,
            [folder] => folder,
            _ => {
                return Some(Err(format!(
                    "it has {} adapters, in {}; expected one",
                    folders.len(),
                    folders.join(", ")
                )));
            }
        };
        let mut files = BTreeMap::new();
        for (parts, meta) in entries {
            let known = |name: &str| {
                [ADAPTER_CONFIG, WEIGHTS, TASK, CURVE, OTHER_BASE, PICKLE].into_iter().find(|known| *known == name)
            };
            let name = match &parts[..] {
                [name] if folder.is_empty() => known(name),
                [in_folder, name] if in_folder == folder => known(name),
                // A task.json may lie beside the adapter's folder.
                [name] if name == TASK && !files.contains_key(TASK) => known(name),
                _ => None,
            };
            if let Some(name) = name {
                files.insert(name, meta.clone());
            }
        }
        Some(Ok(Self { files }))
    }

    pub(super) fn stamp(&self) -> Stamp {
        let of = |meta: &ObjectMeta| (meta.size, time(meta), meta.e_tag.clone().unwrap_or_else(|| "none".to_owned()));
        Stamp(self.files.values().map(of).collect())
    }

    /// When the last of them was written.
    pub(super) fn stored_at(&self) -> SystemTime {
        let weights = self.files.get(WEIGHTS).or_else(|| self.files.values().next());
        weights.map_or(SystemTime::UNIX_EPOCH, time)
    }
}

/// The folder of an object one folder down that may hold an adapter.
fn sub_folder(parts: &[String]) -> Option<&str> {
    match parts {
        [folder, _] if folder != VERSIONS && !folder.starts_with('.') => Some(folder),
        _ => None,
    }
}

pub(super) fn time(meta: &ObjectMeta) -> SystemTime {
    meta.last_modified.into()
}

/// An object's time as text that sorts by time.
pub(super) fn written(meta: &ObjectMeta) -> String {
    humantime::format_rfc3339_nanos(time(meta)).to_string()
}

/// A hash of one object as it is now. Those of several are added up, since no order is promised.
pub(super) fn mark(parts: &[String], meta: &ObjectMeta) -> Mark {
    let mut hash = DefaultHasher::new();
    (parts, meta.size, &meta.e_tag).hash(&mut hash);
    // Times are not equally exact in all answers, and an ETag says as much.
    if meta.e_tag.is_none() {
        meta.last_modified.timestamp().hash(&mut hash);
    }
    hash.finish()
}
