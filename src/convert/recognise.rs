//! What the tensors of a foreign file are: the rows of a soft prompt, a table of keys and values, or a network that
//! computes one of them. Every tensor has to be accounted for. A file with tensors that are not understood is refused
//! unless the user names the one that is the prompt.

use super::{
    ConvertError, RawTensor, key_values, network,
    recognised::{Recognised, ends_with, prompt_embeddings, shown},
};
use crate::prompt::peft_type::PeftType;

/// The last parts of a name that says that the tensor is a table of keys and values (P-tuning v2, ChatGLM).
const PREFIX_TABLE: &str = "prefix_encoder.embedding.weight";

/// What PEFT calls the parts of a multitask prompt that belong to a task.
const OF_TASKS: [&str; 2] = ["prefix_task_cols", "prefix_task_rows"];

/// Says what the tensors are. `asked` is the tensor that the user named.
///
/// # Errors
/// There is no such tensor, more than one tensor could be the prompt, or a network is not one that is known.
pub fn recognise(tensors: &[RawTensor], asked: Option<&str>) -> Result<Recognised, ConvertError> {
    // Counters and flags of a training run have one value.
    let floats: Vec<&RawTensor> = tensors.iter().filter(|t| t.is_float() && t.shape.iter().any(|&n| n != 1)).collect();
    if let Some(name) = asked {
        return named(tensors, &floats, name);
    }
    if floats.iter().any(|tensor| OF_TASKS.iter().any(|part| ends_with(&tensor.name, part))) {
        let reason = "this is PEFT's multitask prompt, which needs its adapter_config.json; give the folder that has \
                      both files";
        return Err(ConvertError::Unfit(reason.to_owned()));
    }
    if let Some(cartridge) = key_values::cartridge(&floats)? {
        return Ok(cartridge);
    }
    if let Some(rows) = list_of_rows(&floats) {
        return rows.map(|rows| soft_prompt(&rows)).unwrap_or_else(|reason| Err(ConvertError::Unfit(reason)));
    }
    match &network::find(&floats)[..] {
        [] => {}
        [network] if network.num_tensors() == floats.len() => return network.compute(),
        _ => return Err(ConvertError::Ambiguous { found: list(tensors) }),
    }
    match floats[..] {
        [tensor] if tensor.matrix().is_some() => matrix(tensor),
        _ => match floats.iter().filter(|tensor| tensor.matrix().is_some()).count() {
            0 => Err(none("the file has no matrix of floats".to_owned(), tensors)),
            _ => Err(ConvertError::Ambiguous { found: list(tensors) }),
        },
    }
}

/// The prompt that the user named by one of its tensors.
fn named(tensors: &[RawTensor], floats: &[&RawTensor], name: &str) -> Result<Recognised, ConvertError> {
    let Some(tensor) = tensors.iter().find(|tensor| tensor.name == name) else {
        return Err(none(format!("there is no tensor {name:?}"), tensors));
    };
    let networks = network::find(floats);
    let network = networks.iter().find(|network| network.embedding() == name);
    let (mut found, used) = match network {
        Some(network) => (network.compute()?, network.num_tensors()),
        None => (matrix(tensor)?, 1),
    };
    let others: Vec<&str> = floats
        .iter()
        .map(|tensor| tensor.name.as_str())
        .filter(|other| *other != name && network.is_none_or(|network| !network.has(other)))
        .collect();
    if floats.len() > used && !others.is_empty() {
        let shown = others.iter().take(8).map(|name| shown(name)).collect::<Vec<_>>().join(", ");
        let more = if others.len() > 8 { format!(" and {} more", others.len() - 8) } else { String::new() };
        found.notes.push(format!("not used: {shown}{more}"));
    }
    Ok(found)
}

/// One matrix: rows of embeddings, or a table of keys and values if its name says so.
fn matrix(tensor: &RawTensor) -> Result<Recognised, ConvertError> {
    match ends_with(&tensor.name, PREFIX_TABLE) {
        true => key_values::table(tensor),
        false => soft_prompt(tensor),
    }
}

/// The rows of a soft prompt: embeddings that go before the input.
fn soft_prompt(tensor: &RawTensor) -> Result<Recognised, ConvertError> {
    Ok(Recognised {
        peft_type: PeftType::PromptTuning,
        token_dim: tensor.matrix().map(|(_, columns)| columns),
        rows: prompt_embeddings(tensor)?,
        num_layers: None,
        num_heads: None,
        num_frozen_tokens: 0,
        notes: Vec::new(),
    })
}

/// The rows of a list of vectors, which are numbered from 0; `None` if the tensors are anything else.
fn list_of_rows(floats: &[&RawTensor]) -> Option<Result<RawTensor, String>> {
    let vector = |tensor: &RawTensor| match tensor.shape[..] {
        [columns] | [1, columns] => Some(columns),
        _ => None,
    };
    let number = |tensor: &RawTensor| {
        let (list, number) = tensor.name.rsplit_once('.').unwrap_or(("", &tensor.name));
        Some((list.to_owned(), number.parse::<usize>().ok()?))
    };
    let first = floats.first()?;
    let (list, _) = number(first)?;
    let columns = vector(first)?;
    let mut rows: Vec<Option<&RawTensor>> = vec![None; floats.len()];
    for tensor in floats {
        vector(tensor)?;
        let (of, at) = number(tensor)?;
        if of != list {
            return None;
        }
        *rows.get_mut(at)? = Some(tensor);
    }
    let rows: Vec<&RawTensor> = rows.into_iter().collect::<Option<_>>()?;
    if let Some(other) = rows.iter().find(|row| vector(row) != Some(columns) || row.dtype != first.dtype) {
        return Some(Err(format!(
            "the rows of the list differ: the first is {}, another is {}",
            first.describe(),
            other.describe()
        )));
    }
    let data = rows.iter().flat_map(|row| row.data.iter().copied()).collect::<Vec<u8>>().into();
    Some(Ok(RawTensor { name: list, dtype: first.dtype, shape: vec![rows.len(), columns], data }))
}

fn none(reason: String, tensors: &[RawTensor]) -> ConvertError {
    ConvertError::NoTensor { reason, found: list(tensors) }
}

/// The tensors of a file, for a message.
fn list(tensors: &[RawTensor]) -> String {
    let found: Vec<String> = tensors.iter().take(12).map(RawTensor::describe).collect();
    let more = tensors.len().saturating_sub(12);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    if found.is_empty() { "no tensor".to_owned() } else { found.join(", ") + &more }
}
