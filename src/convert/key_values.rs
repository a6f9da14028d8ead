//! Keys and values of every layer, as other programs store them, in PEFT's layout: a row for each virtual token, which
//! holds the key and the value of the first layer, then those of the next.

use std::collections::BTreeMap;

use super::{
    ConvertError, RawTensor,
    recognised::{Recognised, prompt_embeddings, shown},
    tensor::item_size,
};
use crate::prompt::peft_type::PeftType;

/// The prefix of P-tuning v2 and ChatGLM: one table, [virtual tokens, 2 x layers x width]. They divide a row as PEFT
/// does, so the table is PEFT's. Its number of layers is not in the file; PEFT and softserve take it from the model.
pub fn table(tensor: &RawTensor) -> Result<Recognised, ConvertError> {
    let rows = prompt_embeddings(tensor)?;
    if rows.shape[1] % 2 != 0 {
        return Err(ConvertError::Unfit(format!(
            "{} is a prefix by its name, but its rows do not divide into keys and values",
            tensor.describe()
        )));
    }
    let notes = vec!["a prefix: keys and values for every layer, divided as the model's configuration says".to_owned()];
    Ok(prefix(rows, None, notes))
}

/// A prefix of which the number of layers may be known.
pub(super) fn prefix(rows: RawTensor, num_layers: Option<usize>, notes: Vec<String>) -> Recognised {
    Recognised {
        peft_type: PeftType::PrefixTuning,
        num_layers,
        num_heads: None,
        token_dim: None,
        num_frozen_tokens: 0,
        rows,
        notes,
    }
}

/// Which of a layer's tensors one is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    FrozenKeys,
    FrozenValues,
    Keys,
    Values,
}

/// The cartridge that the tensors are: lists `trainable_keys` and `trainable_values`, with `frozen_` or `fixed_` ones
/// for the positions before them (HazyResearch), or `layers.N.attention.prefix.keys` and `values` (torchtitan).
/// A layer's tensor is [heads, virtual tokens, head dim], with a batch of 1 in front or without. `None` if no tensor has
/// such a name.
///
/// # Errors
/// One of the tensors is missing, has another shape than the others or does not belong to a cartridge.
pub fn cartridge(floats: &[&RawTensor]) -> Result<Option<Recognised>, ConvertError> {
    let mut parts = BTreeMap::new();
    let mut others = Vec::new();
    for tensor in floats {
        match part(&tensor.name) {
            Some(at) => {
                if let Some(other) = parts.insert(at, *tensor) {
                    let reason = format!("the file is a cartridge, but has both {} and {}", other.name, tensor.name);
                    return Err(ConvertError::Unfit(shown(&reason)));
                }
            }
            None => others.push(shown(&tensor.name)),
        }
    }
    if parts.is_empty() {
        return Ok(None);
    }
    let unfit = |reason: String| Err(ConvertError::Unfit(format!("the file is a cartridge, but {reason}")));
    if !others.is_empty() {
        return unfit(format!("its tensors {} do not belong to one", others.join(", ")));
    }
    let num_layers = parts.keys().map(|(layer, _)| *layer).max().unwrap_or(0).saturating_add(1);
    let is_frozen = parts.keys().any(|(_, part)| *part == Part::FrozenKeys);
    let groups: &[[Part; 2]] = match is_frozen {
        true => &[[Part::FrozenKeys, Part::FrozenValues], [Part::Keys, Part::Values]],
        false => &[[Part::Keys, Part::Values]],
    };
    if parts.len() != num_layers.saturating_mul(groups.len() * 2) {
        return unfit(format!(
            "it has {} tensors for {num_layers} layers, expected keys and values of each",
            parts.len()
        ));
    }
    let Some(first) = parts.values().next() else { return Ok(None) };
    let Some([num_heads, _, head_dim]) = shape(first) else {
        return unfit(format!("{} is not [heads, virtual tokens, head dim]", first.describe()));
    };
    let width = num_heads * head_dim * item_size(first.dtype).unwrap_or(1);
    let mut data = Vec::with_capacity(parts.values().map(|tensor| tensor.data.len()).sum());
    let mut lengths = Vec::new();
    for group in groups {
        let mut layers = Vec::new();
        for (layer, part) in (0..num_layers).flat_map(|layer| group.map(|part| (layer, part))) {
            let Some(tensor) = parts.get(&(layer, part)) else {
                return unfit(format!("layer {layer} has no {part:?}"));
            };
            layers.push(*tensor);
        }
        let length = shape(layers[0]).map_or(0, |[_, length, _]| length);
        if let Some(other) =
            layers.iter().find(|t| shape(t) != Some([num_heads, length, head_dim]) || t.dtype != first.dtype)
        {
            return unfit(format!("{} differs from {}", other.describe(), layers[0].describe()));
        }
        for token in 0..length {
            for tensor in &layers {
                copy_token(&mut data, tensor, token, [num_heads, length, width / num_heads.max(1)]);
            }
        }
        lengths.push(length);
    }
    let (virtual_tokens, token_dim) = (lengths.iter().sum(), num_heads * head_dim);
    let rows = RawTensor {
        name: "cartridge".to_owned(),
        dtype: first.dtype,
        shape: vec![virtual_tokens, 2 * num_layers * token_dim],
        data: data.into(),
    };
    Ok(Some(Recognised {
        peft_type: PeftType::Cartridge,
        rows: prompt_embeddings(&rows)?,
        num_layers: Some(num_layers),
        num_heads: Some(num_heads),
        token_dim: Some(token_dim),
        num_frozen_tokens: if is_frozen { lengths[0] } else { 0 },
        notes: vec![format!("a cartridge of {num_layers} layers, {num_heads} heads of {head_dim} dimensions each")],
    }))
}

/// Appends one position of every head; `bytes` is the size of a head's vector.
fn copy_token(out: &mut Vec<u8>, tensor: &RawTensor, token: usize, [heads, length, bytes]: [usize; 3]) {
    for head in 0..heads {
        let start = (head * length + token) * bytes;
        out.extend_from_slice(&tensor.data[start..start + bytes]);
    }
}

/// [heads, virtual tokens, head dim]; none of them 0.
fn shape(tensor: &RawTensor) -> Option<[usize; 3]> {
    match tensor.shape[..] {
        [heads, length, dim] | [1, heads, length, dim] if heads > 0 && length > 0 && dim > 0 => {
            Some([heads, length, dim])
        }
        _ => None,
    }
}

/// The layer and the part that a name stands for.
fn part(name: &str) -> Option<(usize, Part)> {
    let parts: Vec<&str> = name.split('.').collect();
    match parts[..] {
        [.., list, layer] if layer.parse::<usize>().is_ok() => {
            let part = match list {
                "trainable_keys" => Part::Keys,
                "trainable_values" => Part::Values,
                "frozen_keys" | "fixed_keys" => Part::FrozenKeys,
                "frozen_values" | "fixed_values" => Part::FrozenValues,
                _ => return None,
            };
            Some((layer.parse().ok()?, part))
        }
        [.., "layers", layer, "attention", "prefix", kind] => {
            let part = match kind {
                "keys" => Part::Keys,
                "values" => Part::Values,
                _ => return None,
            };
            Some((layer.parse().ok()?, part))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;

    use super::*;

    /// Values that tell layer, part, head, token and dimension apart.
    fn tensor(name: &str, shape: &[usize], value: impl Fn(usize) -> f32) -> RawTensor {
        let count = shape.iter().product();
        let data: Vec<u8> = (0..count).flat_map(|i| value(i).to_le_bytes()).collect();
        RawTensor { name: name.to_owned(), dtype: Dtype::F32, shape: shape.to_vec(), data: data.into() }
    }

    fn found(tensors: &[RawTensor]) -> Result<Option<Recognised>, ConvertError> {
        cartridge(&tensors.iter().collect::<Vec<_>>())
    }

    #[test]
    fn a_row_has_the_keys_and_then_the_values_of_each_layer_and_frozen_rows_are_first() {
        // 2 heads of 1 dimension; 1 frozen token and 2 others.
        let list = |name: &'static str, length: usize, from: f32| {
            (0..2).map(move |layer| {
                tensor(&format!("{name}.{layer}"), &[1, 2, length, 1], move |i| from + 10.0 * layer as f32 + i as f32)
            })
        };
        let all: Vec<RawTensor> = list("trainable_keys", 2, 100.0)
            .chain(list("trainable_values", 2, 200.0))
            .chain(list("fixed_keys", 1, 300.0))
            .chain(list("fixed_values", 1, 400.0))
            .collect();
        let prompt = found(&all).unwrap().unwrap();
        assert_eq!((prompt.rows.shape.as_slice(), prompt.num_frozen_tokens), (&[3, 8][..], 1));
        assert_eq!((prompt.num_layers, prompt.num_heads, prompt.token_dim), (Some(2), Some(2), Some(2)));
        assert_eq!(
            prompt.rows.values(),
            [
                [300.0, 301.0, 400.0, 401.0, 310.0, 311.0, 410.0, 411.0],
                [100.0, 102.0, 200.0, 202.0, 110.0, 112.0, 210.0, 212.0],
                [101.0, 103.0, 201.0, 203.0, 111.0, 113.0, 211.0, 213.0],
            ]
            .concat()
        );
    }

    #[test]
    fn a_cartridge_that_is_not_whole_is_refused() {
        let name = |layer: usize, kind: &str| format!("layers.{layer}.attention.prefix.{kind}");
        let of = |layer: usize, kind: &str, shape: &[usize]| tensor(&name(layer, kind), shape, |i| i as f32);
        let whole = [of(0, "keys", &[2, 3, 4]), of(0, "values", &[2, 3, 4])];
        assert_eq!(found(&whole).unwrap().unwrap().rows.shape, [3, 16]);
        assert_eq!(found(&[tensor("rows", &[2, 3], |_| 0.0)]).unwrap(), None);
        for (bad, words) in [
            (vec![of(0, "keys", &[2, 3, 4])], "keys and values of each"),
            (vec![of(0, "keys", &[2, 3, 4]), of(1, "values", &[2, 3, 4])], "keys and values of each"),
            (vec![of(0, "keys", &[2, 3, 4]), of(0, "values", &[2, 3, 5])], "differs"),
            (vec![of(0, "keys", &[6, 4]), of(0, "values", &[6, 4])], "[heads, virtual tokens, head dim]"),
            (vec![of(0, "keys", &[2, 0, 4]), of(0, "values", &[2, 0, 4])], "[heads, virtual tokens, head dim]"),
            ([whole.to_vec(), vec![tensor("mlp.weight", &[2, 2], |_| 0.0)]].concat(), "mlp.weight"),
        ] {
            let error = found(&bad).expect_err(words).to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
