//! What a zip archive is by its entries: NumPy's npz, a KoboldAI soft prompt, or a torch file.

use serde::Deserialize;

use super::{
    ConvertError, Foreign, Format, npy, torch,
    zip::{Zip, damaged},
};
use crate::prompt::files::WEIGHTS;

/// The array's and the description's names in a KoboldAI soft prompt.
const KOBOLD_TENSOR: &str = "tensor.npy";
const KOBOLD_META: &str = "meta.json";

/// Reads whichever of the formats the entries' names tell.
pub fn read_zip(bytes: &[u8], limit: u64) -> Result<Foreign, ConvertError> {
    let mut zip = Zip::open(bytes, limit)?;
    if zip.names().any(|name| torch::in_folder(name, torch::PICKLE)) {
        return Ok(Foreign::new(Format::Torch, torch::read_zip(&mut zip)?));
    }
    if zip.has(KOBOLD_TENSOR) {
        return kobold(&mut zip);
    }
    let arrays: Vec<String> = zip.names().filter(|name| name.ends_with(".npy")).map(str::to_owned).collect();
    if !arrays.is_empty() {
        let mut tensors = Vec::new();
        for name in &arrays {
            let bytes = zip.read(name)?;
            let tensor = npy::read(name.trim_end_matches(".npy"), bytes, zip.left())?;
            zip.spend(tensor.data.len() as u64)?;
            tensors.push(tensor);
        }
        return Ok(Foreign::new(Format::Npz, tensors));
    }
    if zip.names().any(|name| torch::in_folder(name, WEIGHTS)) {
        return Err(damaged("it is a packed PEFT directory, which is served as it is: softserve push".to_owned()));
    }
    let names: Vec<String> = zip.names().take(8).map(|n| n.chars().take(80).collect()).collect();
    let reason = format!(
        "it has {names:?}, expected data.pkl of a torch file, {KOBOLD_TENSOR} of a KoboldAI soft prompt, or .npy arrays; \
         unpack a zipped PEFT directory first"
    );
    Err(damaged(reason))
}

/// What `meta.json` says. KoboldAI writes more.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Meta {
    name: Option<String>,
    author: Option<String>,
    description: Option<String>,
}

/// A KoboldAI (mkultra, mtj-softtuner) soft prompt.
fn kobold(zip: &mut Zip<'_>) -> Result<Foreign, ConvertError> {
    let fail = |reason: String| ConvertError::Damaged { format: Format::Kobold.name(), reason };
    let bytes = zip.read(KOBOLD_TENSOR)?;
    let mut foreign = Foreign::new(Format::Kobold, vec![npy::read("tensor", bytes, zip.left())?]);
    if zip.has(KOBOLD_META) {
        let meta = zip.read(KOBOLD_META)?;
        let meta: Meta =
            serde_json::from_slice(&meta).map_err(|e| fail(format!("its {KOBOLD_META} is not as expected: {e}")))?;
        let text = |text: Option<String>| text.map(|t| t.trim().to_owned()).filter(|t| !t.is_empty());
        let by = text(meta.author).map(|author| format!(" (by {author})")).unwrap_or_default();
        foreign.description = match (text(meta.name), text(meta.description)) {
            (Some(name), Some(description)) => Some(format!("{name}{by}: {description}")),
            (Some(one), None) | (None, Some(one)) => Some(format!("{one}{by}")),
            (None, None) => None,
        };
    }
    Ok(foreign)
}
