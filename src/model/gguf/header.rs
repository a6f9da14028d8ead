//! The header of a GGUF file: metadata and the tensors' places. Nothing in it is believed: every
//! count and length is held against the bytes that the file has left before anything is made of it.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, versions 2 and 3.

use std::{collections::BTreeMap, io::Read};

use super::metadata::{Array, Kind, Metadata, Value};
use crate::content;
use crate::kernels::quantized::BlockFormat;

/// Keys of one file; real ones have about 40.
const MAX_KEYS: u64 = 1 << 16;
/// Tensors of one file; real ones have about 2000.
const MAX_TENSORS: u64 = 1 << 16;
/// Bytes of a key or of a tensor's name.
const MAX_NAME: u64 = 1 << 16;
const MAX_DIMS: u32 = 4;
const MAX_DIM: usize = 1 << 40;
const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_ALIGNMENT: u64 = 1 << 20;

/// What a file says of itself.
#[derive(Debug)]
pub struct Header {
    pub metadata: Metadata,
    pub tensors: BTreeMap<String, TensorInfo>,
    /// Where the tensors' data begin in the file.
    pub data_start: u64,
}

/// Where one tensor is and how it is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    pub format: BlockFormat,
    /// As in Hugging Face's files, the fastest-running dimension last; GGUF writes them the other way.
    pub shape: Vec<usize>,
    /// Bytes from the beginning of the file.
    pub offset: u64,
    pub num_bytes: u64,
}

impl Header {
    /// Reads the header of a file of `len` bytes. The error says what is wrong and where.
    pub fn read(source: impl Read, len: u64) -> Result<Self, String> {
        let mut bytes = Bytes { source, at: 0, len };
        let magic = bytes.take(4, "the magic number")?;
        if magic != b"GGUF" {
            let mut start = magic.to_vec();
            // What it is instead is a better answer, where it can be read.
            let _ = bytes.source.take(1020).read_to_end(&mut start);
            return Err(content::stand_in(&start)
                .unwrap_or_else(|| format!("it begins with {:?}, not with GGUF", String::from_utf8_lossy(&magic))));
        }
        match bytes.u32("the version")? {
            2 | 3 => {}
            version if matches!(version.swap_bytes(), 1..=3) => {
                return Err("it is big-endian, which is not supported; convert it with gguf-convert-endian".into());
            }
            version => return Err(format!("GGUF version {version} is not supported; supported are 2 and 3")),
        }
        let num_tensors = at_most(bytes.u64("the number of tensors")?, MAX_TENSORS, "tensors")?;
        let num_keys = at_most(bytes.u64("the number of keys")?, MAX_KEYS, "keys")?;
        let mut metadata = Metadata::default();
        for _ in 0..num_keys {
            let key = bytes.name("a key")?;
            let value = bytes.value(&key)?;
            metadata.insert(key, value)?;
        }
        let alignment = metadata.unsigned("general.alignment")?.unwrap_or(DEFAULT_ALIGNMENT);
        if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
            return Err(format!("general.alignment is {alignment}, expected a power of two up to {MAX_ALIGNMENT}"));
        }
        let mut tensors = BTreeMap::new();
        for _ in 0..num_tensors {
            let name = bytes.name("a tensor's name")?;
            let info = bytes.tensor(&name, alignment)?;
            if tensors.insert(name.clone(), info).is_some() {
                return Err(format!("the tensor {name} appears twice"));
            }
        }
        let data_start = bytes.at.next_multiple_of(alignment);
        for (name, info) in &mut tensors {
            let end = data_start.checked_add(info.offset).and_then(|start| start.checked_add(info.num_bytes));
            if end.is_none_or(|end| end > len) {
                return Err(format!(
                    "the tensor {name} has {} bytes at {} of the data, which is past the end of the file ({len} bytes); \
                     is the download complete?",
                    info.num_bytes, info.offset
                ));
            }
            info.offset += data_start;
        }
        Ok(Self { metadata, tensors, data_start: data_start.min(len) })
    }
}

fn at_most(n: u64, most: u64, what: &str) -> Result<u64, String> {
    if n > most { Err(format!("it claims {n} {what}, expected at most {most}")) } else { Ok(n) }
}

/// A file that is read from the beginning, and how much of it there is.
struct Bytes<R> {
    source: R,
    at: u64,
    len: u64,
}

impl<R: Read> Bytes<R> {
    fn take(&mut self, n: u64, what: &str) -> Result<Vec<u8>, String> {
        let mut out = Vec::new();
        self.append(n, what, &mut out)?;
        Ok(out)
    }

    /// Appends the next `n` bytes to `out`.
    fn append(&mut self, n: u64, what: &str, out: &mut Vec<u8>) -> Result<(), String> {
        let left = self.len.saturating_sub(self.at);
        if n > left {
            return Err(format!("{what} at byte {} needs {n} bytes, and {left} are left", self.at));
        }
        let before = out.len();
        out.resize(before + n as usize, 0);
        self.source.read_exact(&mut out[before..]).map_err(|e| format!("{what} at byte {}: {e}", self.at))?;
        self.at += n;
        Ok(())
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], String> {
        let bytes = self.take(N as u64, what)?;
        bytes.try_into().map_err(|_| format!("{what} is cut off"))
    }

    fn u32(&mut self, what: &str) -> Result<u32, String> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, String> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn name(&mut self, what: &str) -> Result<String, String> {
        let at = self.at;
        let len = self.u64(what)?;
        if len > MAX_NAME {
            return Err(format!("{what} at byte {at} has {len} bytes, expected at most {MAX_NAME}"));
        }
        let bytes = self.take(len, what)?;
        String::from_utf8(bytes).map_err(|_| format!("{what} at byte {at} is not UTF-8"))
    }

    fn value(&mut self, key: &str) -> Result<Value, String> {
        let kind = Kind::new(self.u32(key)?).map_err(|e| format!("{key} has {e}"))?;
        match (kind, kind.size()) {
            (_, Some(size)) => Ok(kind.number(&self.take(size as u64, key)?)),
            (Kind::Array, None) => Ok(Value::Array(self.values(key)?)),
            (_, None) => {
                let len = self.u64(key)?;
                let bytes = self.take(len, key)?;
                let text = String::from_utf8(bytes).map_err(|_| format!("{key} is not UTF-8"))?;
                Ok(Value::Text(text))
            }
        }
    }

    fn values(&mut self, key: &str) -> Result<Array, String> {
        let kind = Kind::new(self.u32(key)?).map_err(|e| format!("{key} has values of {e}"))?;
        let len = self.u64(key)?;
        let bytes = match kind {
            Kind::Array => return Err(format!("{key} is an array of arrays, which is not supported")),
            Kind::Text => {
                let mut all = Vec::new();
                for _ in 0..len {
                    let mut n = [0; 8];
                    let at = all.len();
                    self.append(8, key, &mut all)?;
                    n.copy_from_slice(&all[at..]);
                    self.append(u64::from_le_bytes(n), key, &mut all)?;
                }
                all
            }
            _ => {
                let size = kind.size().unwrap_or(1) as u64;
                let n = len.checked_mul(size).ok_or_else(|| format!("{key} claims {len} values"))?;
                self.take(n, key)?
            }
        };
        let len = usize::try_from(len).map_err(|_| format!("{key} claims {len} values"))?;
        Ok(Array::new(kind, len, bytes))
    }

    /// The place within the data; the file's is not known before all tensors are.
    fn tensor(&mut self, name: &str, alignment: u64) -> Result<TensorInfo, String> {
        let num_dims = self.u32(name)?;
        if num_dims == 0 || num_dims > MAX_DIMS {
            return Err(format!("the tensor {name} has {num_dims} dimensions, expected 1 to {MAX_DIMS}"));
        }
        let mut shape = Vec::new();
        for _ in 0..num_dims {
            let n = self.u64(name)?;
            match usize::try_from(n) {
                Ok(n) if (1..=MAX_DIM).contains(&n) => shape.push(n),
                _ => return Err(format!("the tensor {name} has a dimension of {n}, expected 1 to {MAX_DIM}")),
            }
        }
        let id = self.u32(name)?;
        let format = block_format(id).ok_or_else(|| {
            format!(
                "the tensor {name} is written as {}, which is not supported; supported are F32, F16, BF16, Q4_0, Q4_1, \
                 Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K and Q6_K",
                type_name(id)
            )
        })?;
        let row = shape[0];
        let row_bytes = format.row_bytes(row).ok_or_else(|| {
            format!("the tensor {name} has rows of {row} values, which are not whole blocks of {format:?}")
        })?;
        let num_bytes = shape[1..].iter().try_fold(row_bytes, |n, d| n.checked_mul(*d));
        let values = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
        let (Some(num_bytes), Some(_)) = (num_bytes, values) else {
            return Err(format!("the tensor {name} has the dimensions {shape:?}, more than there can be"));
        };
        let offset = self.u64(name)?;
        if !offset.is_multiple_of(alignment) {
            return Err(format!("the tensor {name} lies at {offset}, which is not a multiple of {alignment}"));
        }
        shape.reverse();
        Ok(TensorInfo { format, shape, offset, num_bytes: num_bytes as u64 })
    }
}

fn block_format(id: u32) -> Option<BlockFormat> {
    use BlockFormat::*;
    const FORMATS: [(u32, BlockFormat); 13] = [
        (0, F32),
        (1, F16),
        (2, Q4_0),
        (3, Q4_1),
        (6, Q5_0),
        (7, Q5_1),
        (8, Q8_0),
        (10, Q2K),
        (11, Q3K),
        (12, Q4K),
        (13, Q5K),
        (14, Q6K),
        (30, Bf16),
    ];
    FORMATS.iter().find(|(known, _)| *known == id).map(|(_, format)| *format)
}

fn type_name(id: u32) -> String {
    const NAMES: [(u32, &str); 19] = [
        (9, "Q8_1"),
        (15, "Q8_K"),
        (16, "IQ2_XXS"),
        (17, "IQ2_XS"),
        (18, "IQ3_XXS"),
        (19, "IQ1_S"),
        (20, "IQ4_NL"),
        (21, "IQ3_S"),
        (22, "IQ2_S"),
        (23, "IQ4_XS"),
        (24, "I8"),
        (25, "I16"),
        (26, "I32"),
        (27, "I64"),
        (28, "F64"),
        (29, "IQ1_M"),
        (34, "TQ1_0"),
        (35, "TQ2_0"),
        (39, "MXFP4"),
    ];
    let name = NAMES.iter().find(|(known, _)| *known == id).map(|(_, name)| (*name).to_owned());
    name.unwrap_or_else(|| format!("type {id}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of the given parts, each already in bytes.
    fn file(parts: &[&[u8]]) -> Vec<u8> {
        parts.concat()
    }

    fn text(s: &str) -> Vec<u8> {
        [&(s.len() as u64).to_le_bytes(), s.as_bytes()].concat()
    }

    fn start(tensors: u64, keys: u64) -> Vec<u8> {
        file(&[b"GGUF", &3u32.to_le_bytes(), &tensors.to_le_bytes(), &keys.to_le_bytes()])
    }

    fn tensor(name: &str, dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
        let dims: Vec<u8> =
            (dims.len() as u32).to_le_bytes().into_iter().chain(dims.iter().flat_map(|d| d.to_le_bytes())).collect();
        file(&[&text(name), &dims, &kind.to_le_bytes(), &offset.to_le_bytes()])
    }

    fn read(bytes: &[u8]) -> Result<Header, String> {
        Header::read(bytes, bytes.len() as u64)
    }

    #[test]
    fn keys_and_tensors_are_read_with_their_places() {
        let mut bytes = file(&[
            &start(2, 3),
            &text("a"),
            &5u32.to_le_bytes(),
            &(-7i32).to_le_bytes(),
            &text("b"),
            &8u32.to_le_bytes(),
            &text("word"),
            &text("c"),
            &9u32.to_le_bytes(),
            &8u32.to_le_bytes(),
            &2u64.to_le_bytes(),
            &text("x"),
            &text(""),
            &tensor("w", &[32, 3], 8, 0),
            &tensor("v", &[5], 0, 128),
        ]);
        bytes.resize(bytes.len().next_multiple_of(32) + 128 + 20, 0);
        let header = read(&bytes).unwrap();
        assert_eq!(header.metadata.get("a"), Some(&Value::Signed(-7)));
        assert_eq!(header.metadata.text("b").unwrap(), Some("word"));
        let array = header.metadata.array("c").unwrap().unwrap();
        assert_eq!(array.len(), 2);
        assert_eq!(array.texts().unwrap().collect::<Vec<_>>(), [b"x".as_slice(), b""]);
        assert!(array.numbers().is_none());
        let w = &header.tensors["w"];
        assert_eq!((w.shape.as_slice(), w.format, w.num_bytes), ([3, 32].as_slice(), BlockFormat::Q8_0, 3 * 34));
        assert_eq!(header.tensors["v"].offset, header.data_start + 128);
        bytes.pop();
        assert!(read(&bytes).unwrap_err().contains("past the end"));
    }

    #[test]
    fn what_is_wrong_is_said() {
        let huge = 1u64 << 60;
        let string = |n: u64| file(&[&start(0, 1), &text("k"), &8u32.to_le_bytes(), &n.to_le_bytes()]);
        let array = |kind: u32, n: u64| {
            file(&[&start(0, 1), &text("k"), &9u32.to_le_bytes(), &kind.to_le_bytes(), &n.to_le_bytes()])
        };
        let one = |tensor: Vec<u8>| file(&[&start(1, 0), &tensor, &[0; 64]]);
        let key = file(&[&text("k"), &0u32.to_le_bytes(), &[1]]);
        for (bytes, named) in [
            (b"GGU".to_vec(), "3 are left"),
            (b"ABCD\x00\x00\x00\x00".to_vec(), "\"ABCD\""),
            (b"version https://git-lfs.github.com/spec/v1\noid".to_vec(), "git lfs pull"),
            (file(&[b"GGUF", &1u32.to_le_bytes()]), "version 1"),
            (file(&[b"GGUF", &3u32.to_be_bytes()]), "big-endian"),
            (start(huge, 0), "1152921504606846976 tensors"),
            (start(0, huge), "1152921504606846976 keys"),
            (start(0, 1), "0 are left"),
            (string(huge), "0 are left"),
            (string(u64::MAX), "0 are left"),
            (array(8, huge), "0 are left"),
            (array(4, huge), "0 are left"),
            (array(12, u64::MAX), "claims"),
            (array(9, 1), "array of arrays"),
            (array(77, 1), "type 77"),
            (file(&[&start(0, 2), &key, &key]), "k appears twice"),
            (one(tensor("t", &[1 << 40, 1 << 40], 0, 0)), "more than there can be"),
            (one(tensor("t", &[1 << 62], 0, 0)), "a dimension of 4611686018427387904"),
            (one(tensor("t", &[0, huge, huge], 0, 0)), "a dimension of 0"),
            (one(tensor("t", &[33], 8, 0)), "not whole blocks"),
            (one(tensor("t", &[4], 0, 8)), "not a multiple of 32"),
            (one(tensor("t", &[4], 0, huge)), "past the end"),
            (one(tensor("t", &[4], 0, u64::MAX - 31)), "past the end"),
            (one(tensor("t", &[32], 20, 0)), "IQ4_NL"),
            (one(tensor("t", &[], 0, 0)), "0 dimensions"),
            (file(&[&start(2, 0), &tensor("t", &[4], 0, 0), &tensor("t", &[4], 0, 0), &[0; 64]]), "t appears twice"),
        ] {
            let error = read(&bytes).unwrap_err();
            assert!(error.contains(named), "{named}: {error}");
        }
    }
}
