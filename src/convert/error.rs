//! Why a foreign file is not converted: facts. What a user can type against it is said by whoever asked.

use std::path::PathBuf;

/// Says what was found, what was expected and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: std::io::Error },
    #[error("{what} has more than {limit} bytes; a learned prompt is far smaller")]
    TooLarge { what: String, limit: u64 },
    /// Something else in place of the file.
    #[error("the file cannot be converted: {reason}")]
    StandIn { reason: String },
    /// None of the formats.
    #[error(
        "the format of the file is not known ({found}); expected safetensors, NumPy .npy or .npz, a KoboldAI \
         zip, mkultra JSON, a torch file (.pt, .bin) or a .nemo archive"
    )]
    Unknown { found: String },
    /// A known format that is broken or holds what is not read.
    #[error("the {format} cannot be read: {reason}")]
    Damaged { format: &'static str, reason: String },
    /// A pickle that wants more than tensors.
    #[error(
        "the torch file asks Python for {global}, and only tensors are built from a pickle, never objects or calls; if \
         you trust the file, load it in Python and save its tensor: \
         safetensors.torch.save_file({{\"prompt_embeddings\": tensor.contiguous()}}, \"prompt.safetensors\")"
    )]
    Global { global: String },
    #[error(
        "{} is already a PEFT directory with safetensors, which needs no conversion",
        path.display()
    )]
    AlreadyPeft { path: PathBuf },
    #[error(
        "{} is a folder with {} adapter_model.bin, decoder.pt and encoder.pt; give the file itself",
        path.display(), if *several { "more than one of" } else { "none of" }
    )]
    Folder { path: PathBuf, several: bool },
    /// No tensor that could be the prompt.
    #[error("{reason}; the file has {found}")]
    NoTensor { reason: String, found: String },
    /// More than one tensor could be the prompt.
    #[error("more than one tensor could be the prompt; the file has {found}")]
    Ambiguous { found: String },
    /// TGIS' prompt for the decoder of an encoder-decoder model.
    #[error(
        "decoder.pt of an encoder-decoder model goes before the decoder's input, and neither PEFT nor softserve has a \
         place for it; encoder.pt, which goes before the encoder's input, can be converted"
    )]
    DecoderOfTwo,
    /// A target was given for a file whose `adapter_config.json` has one.
    #[error("adapter_config.json already states the tensor, the model and the task type")]
    Described,
    /// A tensor that is not a prompt.
    #[error("{0}")]
    Unfit(String),
    /// What `serve` would say of the result.
    #[error("the result is not a prompt that can be served: {0}")]
    Faults(#[from] crate::prompt::format::Faults),
    #[error("{} exists and is not empty", path.display())]
    Exists { path: PathBuf },
}
