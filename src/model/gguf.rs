//! A model in one GGUF file, or in the parts of one, as if it were a Hugging Face folder: its metadata
//! becomes a `config.json` and a tokenizer, its tensors go by Hugging Face's names.

pub(super) mod config;
mod header;
mod metadata;
pub(super) mod names;
mod pretokenizer;
mod rope;
mod tokenizer;

use std::{
    collections::BTreeMap,
    fs::File,
    io::BufReader,
    path::{Path, PathBuf},
    sync::Arc,
};

pub use crate::kernels::weight::Blocks;
use header::{Header, TensorInfo};
use metadata::Metadata;
use names::Change;

use super::{family::Family, tokenizer::SharedTokenizer};
use crate::kernels::stored::StoredBytes;

/// The most parts that a file is split into.
const MAX_PARTS: u64 = 1000;
/// Tensors that are part of the config, and the most values that they have.
const FACTORS: [&str; 3] = ["rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"];
const MAX_FACTORS: usize = 4096;

/// An opened file and its parts. The metadata are not kept: the vocabulary in them is large.
#[derive(Debug)]
pub struct Gguf {
    name: String,
    parts: Vec<Part>,
    tensors: BTreeMap<String, Place>,
    config: serde_json::Value,
    tokenizer_config: serde_json::Value,
}

/// One file.
#[derive(Debug)]
pub struct Part {
    pub path: Arc<Path>,
    pub len: u64,
    /// Where the tensors' data begin.
    pub data_start: u64,
}

/// Where a tensor is and what has to be done to it.
#[derive(Debug)]
struct Place {
    part: usize,
    info: TensorInfo,
    change: Change,
}

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct GgufError {
    path: PathBuf,
    reason: String,
}

impl Gguf {
    /// Opens a file and, if it is the first part of several, those beside it. Everything but the
    /// tensors' values is read and checked.
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        let error = |path: &Path, reason: String| GgufError { path: path.to_owned(), reason };
        let (first, part) = open_part(path)?;
        let Header { metadata, mut tensors, .. } = first;
        let mut parts = vec![part];
        let mut part_of: BTreeMap<String, usize> = BTreeMap::new();
        let others = other_parts(path, &metadata).map_err(|e| error(path, e))?;
        for (i, other) in others.iter().enumerate() {
            let (number, count) = (i as u64 + 2, others.len() + 1);
            if !other.exists() {
                let place = format!("part {number} of {count} is missing from the folder of the first part");
                return Err(error(other, format!("{place}: is the download complete?")));
            }
            let (header, part) = open_part(other)?;
            let no = header.metadata.unsigned("split.no").map_err(|e| error(other, e))?;
            if let Some(found) = no.map(|no| no.saturating_add(1)).filter(|found| *found != number) {
                let reason = format!("its metadata says part {found} of {count}, its name says part {number}");
                return Err(error(other, format!("{reason}: have files been renamed?")));
            }
            for (name, info) in header.tensors {
                if tensors.insert(name.clone(), info).is_some() {
                    return Err(error(other, format!("the tensor {name} is in an earlier part too")));
                }
                part_of.insert(name, i + 1);
            }
            parts.push(part);
        }
        let build = || {
            let architecture = architecture(&metadata)?;
            let (family, of_gguf) = Family::of_gguf(architecture)?;
            let mut factors = BTreeMap::new();
            for name in FACTORS {
                if let Some(info) = tensors.get(name) {
                    let part = &parts[part_of.get(name).copied().unwrap_or(0)];
                    factors.insert(name, read_factors(name, info, part)?);
                }
            }
            let source = config::Source { architecture, metadata: &metadata, tensors: &tensors, factors: &factors };
            let config = source.config(family.model_type, &of_gguf.config)?;
            let (heads, kv_heads) = source.heads()?;
            let mut places = BTreeMap::new();
            for (name, info) in &tensors {
                let Some((to, change)) = of_gguf.names.translate(name, heads, kv_heads)? else { continue };
                let part = part_of.get(name).copied().unwrap_or(0);
                places.insert(to, Place { part, info: info.clone(), change });
            }
            Ok((config, tokenizer::tokenizer_config_json(&metadata)?, places))
        };
        let (config, tokenizer_config, tensors) = build().map_err(|e| error(path, e))?;
        Ok(Self { name: stem(path), parts, tensors, config, tokenizer_config })
    }

    /// The file's name without its ending and the number of its part.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The first file.
    pub fn path(&self) -> &Path {
        &self.parts[0].path
    }

    /// All files.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// The `config.json` that the model has with Hugging Face.
    pub fn config_json(&self) -> Vec<u8> {
        self.config.to_string().into_bytes()
    }

    /// Its tokenizer, for which the metadata are read again.
    pub fn tokenizer(&self) -> Result<SharedTokenizer, GgufError> {
        let (header, _) = open_part(self.path())?;
        let built = tokenizer::tokenizer(header.metadata);
        built.map_err(|reason| GgufError { path: self.path().to_owned(), reason })
    }

    /// The `tokenizer_config.json`: which tokens begin and end, and the chat template if there is one.
    pub fn tokenizer_config_json(&self) -> Vec<u8> {
        self.tokenizer_config.to_string().into_bytes()
    }

    /// The tensors' names with Hugging Face, and their shapes.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, Vec<usize>)> {
        self.tensors.iter().map(|(name, place)| (name.as_str(), place.change.shape(&place.info.shape)))
    }

    /// Whether there is a tensor of that name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.get(name).map(|place| place.change.shape(&place.info.shape))
    }

    /// A tensor as Hugging Face has it; `None` if there is none of that name. One that has to be changed is read, of another
    /// only the place is given.
    pub fn read(&self, name: &str) -> Result<Option<Blocks>, GgufError> {
        let Some(place) = self.tensors.get(name) else { return Ok(None) };
        let part = &self.parts[place.part];
        let changed = place.change.apply(blocks_of(&place.info, part));
        let changed =
            changed.map_err(|e| GgufError { path: part.path.to_path_buf(), reason: format!("{name}: {e}") })?;
        Ok(Some(changed))
    }
}

/// Checks the header of a file that is read from anywhere; for fuzzing, which has no files. On success
/// everything has been built from it that does not need the tensors' values.
pub fn check(bytes: &[u8]) -> Result<(), String> {
    let header = Header::read(bytes, bytes.len() as u64)?;
    let architecture = architecture(&header.metadata)?;
    let (family, of_gguf) = Family::of_gguf(architecture)?;
    let factors = BTreeMap::new();
    let source =
        config::Source { architecture, metadata: &header.metadata, tensors: &header.tensors, factors: &factors };
    let (heads, kv_heads) = source.heads().unwrap_or((1, 1));
    for (name, info) in &header.tensors {
        let (start, end) = (info.offset as usize, (info.offset + info.num_bytes) as usize);
        let blocks =
            Blocks { format: info.format, shape: info.shape.clone(), bytes: bytes[start..end].to_vec().into() };
        if let Ok(Some((_, change))) = of_gguf.names.translate(name, heads, kv_heads) {
            let _ = change.apply(blocks);
        }
    }
    source.config(family.model_type, &of_gguf.config)?;
    tokenizer::tokenizer_config_json(&header.metadata)?;
    tokenizer::tokenizer(header.metadata).map(drop)
}

fn architecture(metadata: &Metadata) -> Result<&str, String> {
    metadata.text("general.architecture")?.ok_or_else(|| "general.architecture is missing".to_owned())
}

fn open_part(path: &Path) -> Result<(Header, Part), GgufError> {
    let error = |reason: String| GgufError { path: path.to_owned(), reason };
    let file = File::open(path).map_err(|e| error(e.to_string()))?;
    let len = file.metadata().map_err(|e| error(e.to_string()))?.len();
    let header = Header::read(BufReader::new(file), len).map_err(error)?;
    let part = Part { path: path.into(), len, data_start: header.data_start };
    Ok((header, part))
}

/// The parts after the first, which are beside it: `NAME-00002-of-00003.gguf` and so on.
fn other_parts(path: &Path, metadata: &Metadata) -> Result<Vec<PathBuf>, String> {
    let count = metadata.unsigned("split.count")?.unwrap_or(1);
    if count <= 1 {
        return Ok(Vec::new());
    }
    let no = metadata.unsigned("split.no")?.unwrap_or(0);
    if no != 0 {
        return Err(format!("it is part {} of {count}; give the first part, whose name has 00001", no + 1));
    }
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    let ending = format!("-00001-of-{count:05}.gguf");
    let Some(name) = file.strip_suffix(&ending).filter(|_| count <= MAX_PARTS) else {
        return Err(format!("it is the first of {count} parts, but is not called NAME{ending}"));
    };
    Ok((2..=count).map(|i| path.with_file_name(format!("{name}-{i:05}-of-{count:05}.gguf"))).collect())
}

/// Whether a file is a part of a model but the first.
pub fn is_later_part(path: &Path) -> bool {
    split_number(&path.file_stem().unwrap_or_default().to_string_lossy()).is_some_and(|(_, number)| number != "00001")
}

/// A stem in the form `NAME-00001-of-00003`: the name and the number.
fn split_number(stem: &str) -> Option<(&str, &str)> {
    let digits = |s: &str| s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit());
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (name, number) = rest.rsplit_once('-')?;
    (digits(count) && digits(number)).then_some((name, number))
}

fn stem(path: &Path) -> String {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    split_number(&stem).map_or(stem.as_ref(), |(name, _)| name).to_owned()
}

fn read_factors(name: &str, info: &TensorInfo, part: &Part) -> Result<Vec<f32>, String> {
    match info.shape.as_slice() {
        [n] if *n <= MAX_FACTORS => blocks_of(info, part).values().map_err(|e| format!("{name}: {e}")),
        shape => Err(format!("{name} has the shape {shape:?}, expected a vector of at most {MAX_FACTORS}")),
    }
}

fn blocks_of(info: &TensorInfo, part: &Part) -> Blocks {
    let (offset, len) = (info.offset, info.num_bytes as usize);
    let bytes = StoredBytes::File { path: Arc::clone(&part.path), offset, len };
    Blocks { format: info.format, shape: info.shape.clone(), bytes }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_a_model_have_one_name() {
        assert_eq!(stem(Path::new("/a/Llama-3.2-1B-Q4_K_M.gguf")), "Llama-3.2-1B-Q4_K_M");
        assert_eq!(stem(Path::new("big-00001-of-00003.gguf")), "big");
        assert!(is_later_part(Path::new("big-00002-of-00003.gguf")));
        assert!(!is_later_part(Path::new("big-00001-of-00003.gguf")));
        assert!(!is_later_part(Path::new("one-of-three.gguf")));
    }
}
