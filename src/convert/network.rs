//! Networks that compute a prompt from an embedding table: the prompt encoders of PEFT's P-tuning (an MLP, or an LSTM
//! with an MLP after it; also Liu et al.'s P-tuning) and the projection of prefix tuning (PEFT's `transform`, P-tuning v2's
//! and ChatGLM's `trans`). A checkpoint of a training run has the network in it; the prompt is what comes out of it.

use candle_core::{D, Device, Tensor};
use safetensors::Dtype;

use super::{
    ConvertError, RawTensor, key_values,
    recognised::{Recognised, ends_with, prompt_embeddings, shown},
};
use crate::prompt::{files::MAX_WEIGHTS_BYTES, peft_type::PeftType};

/// The table that a network's input comes from.
const EMBEDDING: &str = "embedding.weight";

/// What the names of the networks' other tensors begin with, after the part that is common to all.
const PARTS: [&str; 4] = ["mlp_head.", "lstm_head.", "transform.", "trans."];

/// An embedding table and the tensors that belong to the same network.
#[derive(Debug)]
pub struct Network<'a> {
    /// The table and its path: `prompt_encoder.default.` for example.
    embedding: &'a RawTensor,
    path: &'a str,
    /// By their names below the path.
    parts: Vec<(&'a str, &'a RawTensor)>,
}

/// The embedding tables that have a network's tensors beside them.
pub fn find<'a>(floats: &[&'a RawTensor]) -> Vec<Network<'a>> {
    let tables = floats.iter().filter(|tensor| ends_with(&tensor.name, EMBEDDING));
    tables
        .filter_map(|embedding| {
            let path = embedding.name.strip_suffix(EMBEDDING)?;
            let below = |tensor: &&'a RawTensor| Some((tensor.name.strip_prefix(path)?, *tensor));
            let parts: Vec<_> = floats
                .iter()
                .filter_map(below)
                .filter(|(name, _)| PARTS.iter().any(|part| name.starts_with(part)))
                .collect();
            (!parts.is_empty()).then_some(Network { embedding, path, parts })
        })
        .collect()
}

impl<'a> Network<'a> {
    /// The name of its table.
    pub fn embedding(&self) -> &str {
        &self.embedding.name
    }

    /// The table and all others.
    pub fn num_tensors(&self) -> usize {
        1 + self.parts.len()
    }

    /// Whether a tensor is one of the network's.
    pub fn has(&self, name: &str) -> bool {
        name == self.embedding.name || self.parts.iter().any(|(_, tensor)| tensor.name == name)
    }

    /// What the network computes for each row of its table, in f32.
    ///
    /// # Errors
    /// The tensors are not those of a known network, or do not fit each other.
    pub fn compute(&self) -> Result<Recognised, ConvertError> {
        let mut left = self.parts.clone();
        let computed = self.rows(&mut left).map_err(|error| self.error(&error.to_string()))?;
        let Some((rows, is_prefix)) = computed.filter(|_| left.is_empty()) else {
            return Err(self.error("the network is not one that is known"));
        };
        let (virtual_tokens, columns) = rows.dims2().map_err(|error| self.error(&error.to_string()))?;
        let values = rows.flatten_all().and_then(|rows| rows.to_vec1::<f32>());
        let values = values.map_err(|error| self.error(&error.to_string()))?;
        let rows = RawTensor {
            name: self.embedding.name.clone(),
            dtype: Dtype::F32,
            shape: vec![virtual_tokens, columns],
            data: values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>().into(),
        };
        let rows = prompt_embeddings(&rows)?;
        let note = format!("computed from {} by the network that is stored with it", shown(&self.embedding.name));
        if is_prefix {
            // PEFT's and P-tuning v2's table is as wide as a layer's keys; ChatGLM's is as wide as what it computes.
            let width = self.embedding.matrix().map_or(0, |(_, width)| width);
            let layers = Some(columns / (2 * width).max(1)).filter(|n| *n > 0 && n * 2 * width == columns);
            return Ok(key_values::prefix(rows, layers, vec![note]));
        }
        Ok(Recognised {
            peft_type: PeftType::PromptTuning,
            token_dim: Some(columns),
            num_layers: None,
            num_heads: None,
            num_frozen_tokens: 0,
            rows,
            notes: vec![note],
        })
    }

    /// The rows, and whether they are keys and values. Takes the tensors that it used out of `left`.
    fn rows(&self, left: &mut Vec<(&'a str, &'a RawTensor)>) -> candle_core::Result<Option<(Tensor, bool)>> {
        let x = tensor(self.embedding)?;
        if x.dims2()?.0 == 0 {
            candle_core::bail!("its table has no rows");
        }
        for part in ["transform", "trans"] {
            if let Some(layers) = linears(left, part, &[0, 2])? {
                return Ok(Some((chain(x, &layers, Tensor::tanh)?, true)));
            }
        }
        if let Some(layers) = linears(left, "mlp_head", &[0, 2, 4])? {
            return Ok(Some((chain(x, &layers, Tensor::relu)?, false)));
        }
        let mut x = x;
        for layer in 0.. {
            let Some(cells) = lstm_cells(left, layer)? else { break };
            x = Tensor::cat(&[cells[0].run(&x, false)?, cells[1].run(&x, true)?], D::Minus1)?;
        }
        match linears(left, "mlp_head", &[0, 2])? {
            Some(layers) => Ok(Some((chain(x, &layers, Tensor::relu)?, false))),
            None => Ok(None),
        }
    }

    fn error(&self, reason: &str) -> ConvertError {
        let names: Vec<String> = self.parts.iter().take(12).map(|(_, tensor)| tensor.describe()).collect();
        let more = if self.parts.len() > 12 { format!(" and {} more", self.parts.len() - 12) } else { String::new() };
        ConvertError::Unfit(format!(
            "{} is the input of a network, and the prompt is what the network computes, but {reason}: it has {}{more}{}; \
             compute the rows in Python and save them, or save the prompt with PEFT's save_pretrained",
            self.embedding.describe(),
            names.join(", "),
            if self.path.is_empty() { String::new() } else { format!(" under {}", shown(self.path)) },
        ))
    }
}

/// A weight [out, in] and a bias [out].
type Linear = (Tensor, Tensor);

/// The linear layers of these numbers, if all of them are there, and takes them out.
fn linears(
    left: &mut Vec<(&str, &RawTensor)>,
    part: &str,
    numbers: &[usize],
) -> candle_core::Result<Option<Vec<Linear>>> {
    let names = numbers.iter().flat_map(|n| ["weight", "bias"].map(|kind| format!("{part}.{n}.{kind}")));
    let Some(tensors) = take(left, names.collect())? else { return Ok(None) };
    Ok(Some(tensors.chunks(2).map(|pair| (pair[0].clone(), pair[1].clone())).collect()))
}

/// One direction of an LSTM layer, as torch names and orders it: input, forget, cell and output gate.
struct LstmCell {
    input: Linear,
    hidden: Linear,
}

/// Both directions of layer `layer`, if all is there, and takes them out.
fn lstm_cells(left: &mut Vec<(&str, &RawTensor)>, layer: usize) -> candle_core::Result<Option<[LstmCell; 2]>> {
    let kinds = ["weight_ih", "bias_ih", "weight_hh", "bias_hh"];
    let names = ["", "_reverse"].iter().flat_map(|way| kinds.map(|kind| format!("lstm_head.{kind}_l{layer}{way}")));
    let Some(tensors) = take(left, names.collect())? else { return Ok(None) };
    let cell = |at: usize| LstmCell {
        input: (tensors[at].clone(), tensors[at + 1].clone()),
        hidden: (tensors[at + 2].clone(), tensors[at + 3].clone()),
    };
    Ok(Some([cell(0), cell(4)]))
}

/// All tensors of these names, taken out; none if one is missing.
fn take(left: &mut Vec<(&str, &RawTensor)>, names: Vec<String>) -> candle_core::Result<Option<Vec<Tensor>>> {
    let find = |name: &String| left.iter().find(|(other, _)| other == name).map(|(_, raw)| *raw);
    let Some(found) = names.iter().map(find).collect::<Option<Vec<_>>>() else { return Ok(None) };
    left.retain(|(name, _)| !names.iter().any(|taken| taken == name));
    Ok(Some(found.into_iter().map(tensor).collect::<candle_core::Result<_>>()?))
}

impl LstmCell {
    /// The hidden states of the rows of `x`, which are steps in time.
    fn run(&self, x: &Tensor, is_reverse: bool) -> candle_core::Result<Tensor> {
        let size = self.hidden.0.dim(1)?;
        let gates = linear(x, &self.input)?;
        let steps = gates.dim(0)?;
        let mut out = vec![Tensor::zeros((1, size), candle_core::DType::F32, &Device::Cpu)?; steps];
        let (mut hidden, mut cell) = (out[0].clone(), out[0].clone());
        for i in 0..steps {
            let at = if is_reverse { steps - 1 - i } else { i };
            let gates = (gates.narrow(0, at, 1)? + linear(&hidden, &self.hidden)?)?;
            let gate = |n: usize| gates.narrow(1, n * size, size);
            let sigmoid = |x: Tensor| (x.neg()?.exp()? + 1.0)?.recip();
            cell = ((sigmoid(gate(1)?)? * cell)? + (sigmoid(gate(0)?)? * gate(2)?.tanh()?)?)?;
            hidden = (sigmoid(gate(3)?)? * cell.tanh()?)?;
            out[at] = hidden.clone();
        }
        Tensor::cat(&out, 0)
    }
}

/// Linear layers with an activation between them.
fn chain(
    mut x: Tensor,
    layers: &[Linear],
    activation: fn(&Tensor) -> candle_core::Result<Tensor>,
) -> candle_core::Result<Tensor> {
    for (i, layer) in layers.iter().enumerate() {
        x = linear(&x, layer)?;
        if i + 1 < layers.len() {
            x = activation(&x)?;
        }
    }
    Ok(x)
}

fn linear(x: &Tensor, (weight, bias): &Linear) -> candle_core::Result<Tensor> {
    if bias.dims() != [weight.dim(0)?] {
        candle_core::bail!("a weight has {} rows, and its bias the shape {:?}", weight.dim(0)?, bias.dims());
    }
    let bytes = x.dim(0)?.saturating_mul(weight.dim(0)?).saturating_mul(4) as u64;
    if bytes > MAX_WEIGHTS_BYTES {
        candle_core::bail!("it computes {bytes} bytes; the maximum is {MAX_WEIGHTS_BYTES}");
    }
    x.matmul(&weight.t()?)?.broadcast_add(bias)
}

/// In f32, without the axes of size 1 in front of a matrix.
fn tensor(raw: &RawTensor) -> candle_core::Result<Tensor> {
    let shape = raw.matrix().map_or_else(|| raw.shape.clone(), |(rows, columns)| vec![rows, columns]);
    Tensor::from_vec(raw.values(), shape, &Device::Cpu)
}
