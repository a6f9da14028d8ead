//! mkultra's soft prompts: JSON with a description and, in base64, a Python pickle of the tensor.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::Deserialize;

use super::{ConvertError, Foreign, Format, torch};

#[derive(Deserialize)]
struct File {
    metadata: Option<Metadata>,
    tensor: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Metadata {
    name: Option<String>,
    description: Option<String>,
}

/// Reads the file; its tensor takes at most `limit` bytes.
///
/// # Errors
/// It is not such a file, or its pickle asks for more than a tensor.
pub fn read(bytes: &[u8], limit: u64) -> Result<Foreign, ConvertError> {
    let damaged = |reason: String| ConvertError::Damaged { format: Format::Mkultra.name(), reason };
    let file: File = serde_json::from_slice(bytes)
        .map_err(|e| damaged(format!("it is not JSON with a text \"tensor\", as mkultra writes it: {e}")))?;
    let pickle = STANDARD.decode(file.tensor.trim()).map_err(|e| damaged(format!("its tensor is not base64: {e}")))?;
    let mut foreign = Foreign::new(Format::Mkultra, torch::read_bare(&pickle.into(), Format::Mkultra, limit)?);
    let metadata = file.metadata.unwrap_or_default();
    let text = |text: Option<String>| text.map(|t| t.trim().to_owned()).filter(|t| !t.is_empty());
    foreign.description = match (text(metadata.name), text(metadata.description)) {
        (Some(name), Some(description)) => Some(format!("{name}: {description}")),
        (name, description) => name.or(description),
    };
    Ok(foreign)
}
