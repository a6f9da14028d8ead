//! A model of hidden size 8 for prompts to fit, and a prompt that does.

use bytes::Bytes;
use candle_core::{DType, Device};
use softserve::prompt::{
    files::PromptFiles,
    format::{self, Fit},
};

pub const LIMIT: u64 = 1 << 20;

/// Reads the files as an upload is read, by a decoder-only model and by one with an encoder.
pub fn read(files: &PromptFiles) {
    for encoder_layers in [None, Some(2)] {
        read_for(encoder_layers, files);
    }
}

fn read_for(encoder_layers: Option<usize>, files: &PromptFiles) {
    let fit = Fit {
        model_name: "tiny".into(),
        fingerprint: "0123456789abcdef".into(),
        hidden_size: 8,
        num_layers: 2,
        encoder_layers,
        num_kv_heads: 1,
        head_dim: 4,
        embedding_scale: None,
        context_length: 64,
        device: Device::Cpu,
        dtype: DType::F32,
    };
    if let Ok(name) = "fuzzed".parse() {
        let _ = format::read(name, files, &fit);
    }
}

/// One row of zeros, as safetensors.
pub fn weights() -> Bytes {
    let mut header = br#"{"prompt_embeddings":{"dtype":"F32","shape":[1,8],"data_offsets":[0,32]}}"#.to_vec();
    header.resize(header.len().next_multiple_of(8), b' ');
    [&(header.len() as u64).to_le_bytes()[..], &header, &[0; 32]].concat().into()
}
