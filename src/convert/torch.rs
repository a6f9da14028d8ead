//! What `torch.save` writes: a zip with a pickle that names storages beside it, or, before torch
//! 1.6, several pickles in a row with the storages behind them (torch/serialization.py).

use std::collections::HashMap;

use bytes::Bytes;

use super::{
    ConvertError, Format, RawTensor,
    pickle::{Node, Pickle, PickleError, Ref, Storage},
    tensor::item_size,
    zip::Zip,
};

/// What the older form begins with: a pickle of torch's magic number.
pub const LEGACY_MAGIC: &[u8] = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.";

/// The pickle's name in the zip, below the one folder that everything lies in.
pub(super) const PICKLE: &str = "data.pkl";

/// The most tensors of a file, and the most values that are looked at for them.
const MAX_TENSORS: usize = 1024;
const MAX_VISITS: usize = 16 * 1024;
/// How deep a tensor may lie in dicts.
const MAX_DEPTH: usize = 4;

/// Reads all tensors of a zip: a bare one without a name, those of a state dict by their keys, which
/// are joined by dots where dicts are nested. Everything else in it is left alone.
pub fn read_zip(zip: &mut Zip<'_>) -> Result<Vec<RawTensor>, ConvertError> {
    let format = Format::Torch;
    let damaged = |reason: String| ConvertError::Damaged { format: format.name(), reason };
    let pickles: Vec<&str> = zip.names().filter(|name| in_folder(name, PICKLE)).collect();
    let &[pickle] = &pickles[..] else {
        return Err(damaged(format!("it has {} entries {PICKLE}, expected one", pickles.len())));
    };
    let folder = pickle.strip_suffix(PICKLE).unwrap_or_default().to_owned();
    let order = format!("{folder}byteorder");
    if zip.has(&order) && zip.read(&order)?.as_ref() != b"little" {
        return Err(damaged("its values are big-endian; save it again on a little-endian machine".to_owned()));
    }
    let bytes = zip.read(&format!("{folder}{PICKLE}"))?;
    let pickle = Pickle::read(&bytes).map_err(|e| refused(format, e))?;
    let mut storages: HashMap<String, Bytes> = HashMap::new();
    let mut fetch = |zip: &mut Zip<'_>, storage: &Storage<'_>| match storages.get(storage.key) {
        Some(bytes) => Ok::<_, ConvertError>(bytes.clone()),
        None => {
            let bytes = zip.read(&format!("{folder}data/{}", storage.key))?;
            storages.insert(storage.key.to_owned(), bytes.clone());
            Ok(bytes)
        }
    };
    let mut tensors = Vec::new();
    for (name, at) in tensors_of(&pickle).map_err(damaged)? {
        let Node::Tensor(storage, view) = pickle.get(at) else { continue };
        let Node::Storage(storage) = pickle.get(*storage) else { continue };
        let bytes = fetch(zip, storage)?;
        let (item, bytes) = check(storage, bytes).map_err(damaged)?;
        let (shape, data) = view.cut(&bytes, item, zip.left()).map_err(damaged)?;
        zip.spend(data.len() as u64)?;
        tensors.push(RawTensor { name, dtype: storage.dtype, shape, data });
    }
    Ok(tensors)
}

/// Reads the older form; what is said of [`read_zip`] holds here.
pub fn read_legacy(bytes: &Bytes, limit: u64) -> Result<Vec<RawTensor>, ConvertError> {
    let format = Format::TorchLegacy;
    let damaged = |reason: String| ConvertError::Damaged { format: format.name(), reason };
    let file = Legacy::read(bytes, format)?;
    let found = tensors_of(&file.pickle).map_err(damaged)?;
    let storage_of = |at: Ref| match file.pickle.get(at) {
        Node::Tensor(storage, view) => match file.pickle.get(*storage) {
            Node::Storage(storage) => Some((storage, view)),
            _ => None,
        },
        _ => None,
    };
    let formats: HashMap<&str, &Storage<'_>> =
        found.iter().filter_map(|(_, at)| storage_of(*at)).map(|(storage, _)| (storage.key, storage)).collect();
    let storages = file.storages(&formats).map_err(damaged)?;
    let mut left = limit;
    let mut tensors = Vec::new();
    for (name, at) in found {
        let Some((storage, view)) = storage_of(at) else { continue };
        let stored = storages.get(storage.key).copied();
        let stored = stored.ok_or_else(|| damaged("a tensor's storage is not in the file".to_owned()))?;
        let (item, stored) = check(storage, bytes.slice_ref(stored)).map_err(damaged)?;
        let (shape, data) = view.cut(&stored, item, left).map_err(damaged)?;
        left -= data.len() as u64;
        tensors.push(RawTensor { name, dtype: storage.dtype, shape, data });
    }
    Ok(tensors)
}

/// Reads the tensors of a bare pickle, which Python's `pickle` made: each storage is a file of the older form within it.
pub fn read_bare(bytes: &Bytes, format: Format, limit: u64) -> Result<Vec<RawTensor>, ConvertError> {
    let damaged = |reason: String| ConvertError::Damaged { format: format.name(), reason };
    let pickle = Pickle::read_bare(bytes).map_err(|e| refused(format, e))?;
    let mut left = limit;
    let mut tensors = Vec::new();
    for (name, at) in tensors_of(&pickle).map_err(damaged)? {
        let Node::Tensor(storage, view) = pickle.get(at) else { continue };
        let Node::SavedStorage(saved) = pickle.get(*storage) else {
            return Err(damaged("a tensor's values are not in the pickle".to_owned()));
        };
        let file = Legacy::read(saved, format)?;
        let Node::Storage(storage) = file.pickle.get(file.pickle.root()) else {
            return Err(damaged("a tensor's storage is not one".to_owned()));
        };
        let storages = file.storages(&HashMap::from([(storage.key, storage)])).map_err(damaged)?;
        let stored = storages.get(storage.key).copied();
        let stored = stored.ok_or_else(|| damaged("a tensor's storage is not in the pickle".to_owned()))?;
        let (item, stored) = check(storage, bytes.slice_ref(stored)).map_err(damaged)?;
        let (shape, data) = view.cut(&stored, item, left).map_err(damaged)?;
        left -= data.len() as u64;
        tensors.push(RawTensor { name, dtype: storage.dtype, shape, data });
    }
    Ok(tensors)
}

/// A file of the older form: what was saved, and the keys of its storages, whose values follow.
struct Legacy<'a> {
    pickle: Pickle<'a>,
    keys: Pickle<'a>,
    values: &'a [u8],
}

impl<'a> Legacy<'a> {
    fn read(bytes: &'a [u8], format: Format) -> Result<Self, ConvertError> {
        let damaged = |reason: &str| ConvertError::Damaged { format: format.name(), reason: reason.to_owned() };
        let Some(mut values) = bytes.strip_prefix(LEGACY_MAGIC) else {
            return Err(damaged("a storage in it is not one that torch saved"));
        };
        let mut next = || {
            let pickle = Pickle::read(values).map_err(|e| refused(format, e))?;
            values = &values[pickle.len..];
            Ok::<_, ConvertError>(pickle)
        };
        let (protocol, system, pickle, keys) = (next()?, next()?, next()?, next()?);
        if !matches!(protocol.get(protocol.root()), Node::Int(1001)) {
            return Err(damaged("its protocol is not 1001, the only one there was"));
        }
        if let Node::Dict(entries) = system.get(system.root()) {
            let big = |(key, value): &(Ref, Ref)| {
                matches!((system.get(*key), system.get(*value)), (Node::Text("little_endian"), Node::Bool(false)))
            };
            if entries.iter().any(big) {
                return Err(damaged("its values are big-endian; save it again on a little-endian machine"));
            }
        }
        Ok(Self { pickle, keys, values })
    }

    /// The values of each storage, by its key. `known` has the storages that tensors use.
    fn storages(&self, known: &HashMap<&str, &Storage<'_>>) -> Result<HashMap<&str, &'a [u8]>, String> {
        let Node::List(keys) = self.keys.get(self.keys.root()) else {
            return Err("it has no list of its storages".to_owned());
        };
        let mut storages = HashMap::new();
        let mut rest = self.values;
        for key in keys {
            let Node::Text(key) = self.keys.get(*key) else {
                return Err("a storage's key is not text".to_owned());
            };
            // A storage of a tensor that is not looked at has no known size, so nothing behind it has a place.
            let Some(storage) = known.get(key) else {
                return Err("it has a storage that no tensor uses; save the prompt's tensor alone".to_owned());
            };
            let item = item_size(storage.dtype).unwrap_or(1) as u64;
            let bytes = rest.first_chunk::<8>().map(|n| u64::from_le_bytes(*n)).and_then(|n| n.checked_mul(item));
            let end = bytes.and_then(|n| usize::try_from(n).ok()).and_then(|n| n.checked_add(8));
            let Some(stored) = end.and_then(|end| rest.get(8..end)) else {
                return Err("it ends within its values".to_owned());
            };
            storages.insert(*key, stored);
            rest = &rest[8 + stored.len()..];
        }
        Ok(storages)
    }
}

/// Whether an entry lies under that name at the top or in a folder there.
pub(super) fn in_folder(entry: &str, name: &str) -> bool {
    entry.strip_suffix(name).is_some_and(|folder| folder.is_empty() || folder.find('/') == Some(folder.len() - 1))
}

pub(super) fn refused(format: Format, error: PickleError) -> ConvertError {
    match error {
        PickleError::Global(global) => ConvertError::Global { global },
        damaged @ PickleError::Damaged { .. } => {
            ConvertError::Damaged { format: format.name(), reason: damaged.to_string() }
        }
    }
}

/// Bytes a value, and the storage if it is as long as the pickle says.
fn check(storage: &Storage<'_>, bytes: Bytes) -> Result<(usize, Bytes), String> {
    let item = item_size(storage.dtype).unwrap_or(1);
    if storage.len.checked_mul(item as u64) != Some(bytes.len() as u64) {
        let key: String = storage.key.chars().take(20).collect();
        return Err(format!("storage {key:?} is said to have {} values and has {} bytes", storage.len, bytes.len()));
    }
    Ok((item, bytes))
}

/// Each tensor with its name.
fn tensors_of(pickle: &Pickle<'_>) -> Result<Vec<(String, Ref)>, String> {
    let mut found = Vec::new();
    let mut visits = 0;
    // What is still to be looked at, the next one last.
    let mut open = vec![(String::new(), pickle.root(), 0)];
    while let Some((name, at, depth)) = open.pop() {
        match pickle.get(at) {
            Node::Tensor(..) if found.len() < MAX_TENSORS => found.push((name, at)),
            Node::Tensor(..) => return Err(format!("it has more than {MAX_TENSORS} tensors")),
            Node::List(items) | Node::Tuple(items) if depth < MAX_DEPTH => {
                visits += items.len();
                if visits > MAX_VISITS {
                    return Err(format!("it has more than {MAX_VISITS} values"));
                }
                let name = |i: usize| if name.is_empty() { i.to_string() } else { format!("{name}.{i}") };
                open.extend(items.iter().enumerate().rev().map(|(i, item)| (name(i), *item, depth + 1)));
            }
            Node::Dict(entries) if depth < MAX_DEPTH => {
                visits += entries.len();
                if visits > MAX_VISITS {
                    return Err(format!("it has more than {MAX_VISITS} values"));
                }
                for (key, value) in entries.iter().rev() {
                    let Node::Text(key) = pickle.get(*key) else { continue };
                    let key: String = key.chars().take(200).collect();
                    let name = if name.is_empty() { key } else { format!("{name}.{key}") };
                    open.push((name, *value, depth + 1));
                }
            }
            _ => {}
        }
    }
    Ok(found)
}
