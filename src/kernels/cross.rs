//! What a decoder finds in an encoder's output: keys and values of each layer, of one input for serving,
//! of a batch for tuning.

use std::ops::Range;

use candle_core::{Result, Tensor, bail};

/// The cross-attention's keys and values of one encoder's input, for every layer, on the device.
#[derive(Debug, Clone)]
pub struct CrossKeyValues {
    /// Both `[positions, kv_heads, head_dim]` in the type of activations.
    layers: Vec<(Tensor, Tensor)>,
    positions: usize,
}

impl CrossKeyValues {
    /// Copies `positions` rows from `first` on of each layer's keys and values, `[t, kv_heads, head_dim]`.
    ///
    /// # Errors
    /// There are no such rows.
    pub fn of_rows(layers: &[(Tensor, Tensor)], first: usize, positions: usize) -> Result<Self> {
        // A copy: a part of the batch's tensor would keep all of it in memory.
        let copy = |x: &Tensor| x.narrow(0, first, positions)?.copy();
        let layers = layers.iter().map(|(k, v)| Ok((copy(k)?, copy(v)?)));
        Ok(Self { layers: layers.collect::<Result<_>>()?, positions })
    }

    /// How many positions the input has.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// The keys and values of a layer.
    ///
    /// # Errors
    /// There is no such layer.
    pub fn layer(&self, layer: usize) -> Result<(&Tensor, &Tensor)> {
        match self.layers.get(layer) {
            Some((keys, values)) => Ok((keys, values)),
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
