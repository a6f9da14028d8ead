//! Prompts that other programs wrote, as PEFT directories: a reader for each format gives tensors by name,
//! [`recognise`] says what they are, and [`peft`] makes the files that `serve` takes.
//!
//! No reader runs code, follows a path that a file names, or allocates more than it is allowed to.

pub mod archive;
mod error;
mod foreign;
mod key_values;
mod mkultra;
pub mod nemo;
mod network;
pub mod npy;
pub mod peft;
pub mod pickle;
pub mod recognise;
mod recognised;
pub mod safetensors;
pub mod tensor;
pub mod torch;
pub mod zip;

use std::{
    fs,
    io::Read as _,
    path::{Path, PathBuf},
};

use bytes::Bytes;

pub use error::ConvertError;
pub use foreign::{Foreign, Format, ModelPart};
pub use peft::{Converted, Target, TaskType};
pub use tensor::RawTensor;

use crate::{
    content,
    prompt::files::{ADAPTER_CONFIG, MAX_JSON_BYTES, MAX_WEIGHTS_BYTES, PICKLE, TASK, WEIGHTS},
};

/// The most bytes of a file, and of what is unpacked from it.
pub const MAX_BYTES: u64 = MAX_WEIGHTS_BYTES;

/// TGIS' files: what goes before the input of a decoder, and of an encoder.
const DECODER: &str = "decoder.pt";
const ENCODER: &str = "encoder.pt";

/// The files of a folder that are known by their names: PEFT's older form, and TGIS.
pub const PICKLES: [&str; 3] = [PICKLE, DECODER, ENCODER];

/// Reads a file, or a folder with one of the files that this knows by name. At most `limit` bytes
/// are read, and unpacked.
pub fn open(path: &Path, limit: u64) -> Result<Foreign, ConvertError> {
    let file = if path.is_dir() { file_in(path)? } else { path.to_owned() };
    let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let beside = |name: &str| {
        let path = file.with_file_name(name);
        if path.exists() { read_file(&path, MAX_JSON_BYTES).map(Some) } else { Ok(None) }
    };
    if name == WEIGHTS && file.with_file_name(ADAPTER_CONFIG).exists() {
        return Err(ConvertError::AlreadyPeft { path: path.to_owned() });
    }
    let mut foreign = parse(read_file(&file, limit)?, limit)?;
    match name.as_str() {
        PICKLE => {
            foreign.adapter_config = beside(ADAPTER_CONFIG)?;
            foreign.task = beside(TASK)?;
            // TGIS keeps it alone; then it is a torch file like any other.
            if foreign.adapter_config.is_some() {
                foreign.format = Format::PeftPickle;
            }
        }
        ENCODER => {
            foreign.part = Some(ModelPart::Encoder);
            if file.with_file_name(DECODER).exists() {
                foreign.notes.push(format!(
                    "{DECODER} beside it goes before the decoder's input, for which neither PEFT nor softserve has a \
                     place: without it answers may differ from TGIS'"
                ));
            }
        }
        DECODER => {
            foreign.part = Some(ModelPart::Decoder { has_encoder: file.with_file_name(ENCODER).exists() });
        }
        _ => {}
    }
    Ok(foreign)
}

/// Reads a file's bytes, whatever it is called. At most `limit` bytes are unpacked.
pub fn parse(bytes: Bytes, limit: u64) -> Result<Foreign, ConvertError> {
    if let Some(reason) = content::stand_in(&bytes) {
        return Err(ConvertError::StandIn { reason });
    }
    let start = &bytes[..bytes.len().min(16)];
    if start.starts_with(npy::MAGIC) {
        return Ok(Foreign::new(Format::Npy, vec![npy::read("", bytes, limit)?]));
    }
    if start.starts_with(b"PK\x03\x04") || start.starts_with(b"PK\x05\x06") {
        return archive::read_zip(&bytes, limit);
    }
    if start.starts_with(b"\x1f\x8b") || bytes.get(257..262) == Some(b"ustar") {
        return nemo::read(&bytes, limit);
    }
    if bytes.starts_with(torch::LEGACY_MAGIC) {
        return Ok(Foreign::new(Format::TorchLegacy, torch::read_legacy(&bytes, limit)?));
    }
    let header = bytes.first_chunk::<8>().map(|n| u64::from_le_bytes(*n));
    if start.get(8) == Some(&b'{') && header.is_some_and(|n| n <= bytes.len() as u64) {
        return Ok(Foreign::new(Format::Safetensors, safetensors::read(&bytes)?));
    }
    if matches!(start, [b'\x80', 2..=5, ..]) {
        return Ok(Foreign::new(Format::Pickle, torch::read_bare(&bytes, Format::Pickle, limit)?));
    }
    if matches!(start.trim_ascii_start(), [b'{', ..]) {
        return mkultra::read(&bytes, limit);
    }
    Err(ConvertError::Unknown { found: describe(start) })
}

/// What the first bytes look like.
fn describe(start: &[u8]) -> String {
    match start {
        [] => "it is empty".to_owned(),
        [b'G', b'G', b'U', b'F', ..] => "GGUF, which holds models".to_owned(),
        _ => format!("it begins with the bytes {}", hex::encode(&start[..start.len().min(8)])),
    }
}

/// The file of a folder that is meant.
fn file_in(folder: &Path) -> Result<PathBuf, ConvertError> {
    if folder.join(WEIGHTS).exists() {
        return Err(ConvertError::AlreadyPeft { path: folder.to_owned() });
    }
    let found: Vec<PathBuf> = PICKLES.iter().map(|name| folder.join(name)).filter(|p| p.exists()).collect();
    match &found[..] {
        [file] => Ok(file.clone()),
        _ => Err(ConvertError::Folder { path: folder.to_owned(), several: !found.is_empty() }),
    }
}

/// Reads a whole file of at most `limit` bytes.
pub fn read_file(path: &Path, limit: u64) -> Result<Bytes, ConvertError> {
    let fail = |source| ConvertError::Read { path: path.to_owned(), source };
    let too_large = || ConvertError::TooLarge { what: path.display().to_string(), limit };
    let meta = fs::metadata(path).map_err(fail)?;
    if !meta.is_file() {
        return Err(fail(std::io::Error::other("it is not a file")));
    }
    if meta.len() > limit {
        return Err(too_large());
    }
    let mut bytes = Vec::with_capacity(meta.len() as usize + 1);
    fs::File::open(path).and_then(|file| file.take(limit + 1).read_to_end(&mut bytes)).map_err(fail)?;
    if bytes.len() as u64 > limit { Err(too_large()) } else { Ok(bytes.into()) }
}
