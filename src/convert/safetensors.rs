//! Safetensors with any tensors by any names.

use bytes::Bytes;

use super::{ConvertError, Format, RawTensor};

/// The longest header: a prompt's few tensors need some hundred bytes.
const MAX_HEADER_BYTES: u64 = 1024 * 1024;

/// Reads all tensors, in the order of their names. Their data is not copied.
pub fn read(bytes: &Bytes) -> Result<Vec<RawTensor>, ConvertError> {
    let damaged = |reason: String| ConvertError::Damaged { format: Format::Safetensors.name(), reason };
    let header = bytes.first_chunk::<8>().map(|n| u64::from_le_bytes(*n));
    let header = header.ok_or_else(|| damaged(format!("it has {} bytes, expected 8 or more", bytes.len())))?;
    let rest = bytes.len() as u64 - 8;
    if header > rest {
        return Err(damaged(format!("its header claims {header} bytes and {rest} follow")));
    }
    if header > MAX_HEADER_BYTES {
        return Err(damaged(format!("its header has {header} bytes; the maximum is {MAX_HEADER_BYTES}")));
    }
    let file = ::safetensors::SafeTensors::deserialize(bytes).map_err(|e| damaged(e.to_string()))?;
    let mut tensors: Vec<RawTensor> = file
        .iter()
        .map(|(name, view)| RawTensor {
            name: name.to_owned(),
            dtype: view.dtype(),
            shape: view.shape().to_vec(),
            data: bytes.slice_ref(view.data()),
        })
        .collect();
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(tensors)
}
