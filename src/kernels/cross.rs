//! What a decoder finds in an encoder's output: keys and values of each layer, of one input for serving,
//! of a batch for tuning.

use std::ops::Range;

use candle_core::{Result, Tensor, bail};

use super::cpu::tensors::with_values;

/// Keys and values of one encoder's input for the cross-attention of every layer.
#[derive(Debug, Clone)]
pub struct CrossKeyValues {
    layers: Vec<CrossLayer>,
    positions: usize,
}

/// Those of one layer, both `[positions, kv_heads, head_dim]` in f32.
#[derive(Debug, Clone)]
pub struct CrossLayer {
    pub keys: Vec<f32>,
    pub values: Vec<f32>,
}

impl CrossKeyValues {
    /// Copies `positions` rows from `first` on of each layer's keys and values, `[t, kv_heads,
    /// head_dim]` in f32 on the CPU.
    ///
    /// # Errors
    /// There are no such rows, or the tensors are of another type.
    pub fn of_rows(layers: &[(Tensor, Tensor)], first: usize, positions: usize) -> Result<Self> {
        let copy = |x: &Tensor| with_values(&x.narrow(0, first, positions)?, |values| Ok(values.to_vec()));
        let layers = layers.iter().map(|(k, v)| Ok(CrossLayer { keys: copy(k)?, values: copy(v)? }));
        Ok(Self { layers: layers.collect::<Result<_>>()?, positions })
    }

    /// How many positions the input has.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// The keys and values of a layer.
    pub fn layer(&self, layer: usize) -> Result<&CrossLayer> {
        match self.layers.get(layer) {
            Some(found) => Ok(found),
            None => bail!("layer {layer} asks for an encoder's keys and values, and there are {}", self.layers.len()),
        }
    }
}

/// Keys and values of the inputs of a batch, packed, for the cross-attention of every layer. Gradients
/// flow to them.
#[derive(Debug, Clone)]
pub struct EncodedBatch {
    /// For each layer of the decoder, both `[t, kv_heads, head_dim]`.
    pub layers: Vec<(Tensor, Tensor)>,
    /// The rows of each sequence's input. Sequences may have the same input.
    pub inputs: Vec<Range<usize>>,
}

impl EncodedBatch {
    /// The keys and values of a layer for so many sequences.
    pub(super) fn layer(&self, layer: usize, sequences: usize) -> Result<(&Tensor, &Tensor)> {
        let Some((keys, values)) = self.layers.get(layer) else {
            bail!("layer {layer} asks for an encoder's keys and values, and there are {}", self.layers.len());
        };
        let rows = keys.dim(0)?.min(values.dim(0)?);
        if self.inputs.len() != sequences || self.inputs.iter().any(|input| input.is_empty() || input.end > rows) {
            bail!("{:?} of {rows} rows are the inputs of {sequences} sequences", self.inputs);
        }
        Ok((keys, values))
    }
}
