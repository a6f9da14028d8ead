//! From `--model`, `--device` and `--dtype` to a model's files and where they go.

use std::sync::Arc;

use candle_core::{DType, Device};

use crate::{
    config::{BackendChoice, DeviceChoice, DtypeChoice, ModelSource},
    demo,
    kernels::{self, Backend, BackendKind, QuantisedProducts},
    model::{ModelError, ModelFiles, random::RandomModel},
};

/// Why there is no model to run.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[cfg(feature = "hub")]
    #[error("{0:?} is neither a folder or GGUF file nor a hub id such as org/name or org/name@revision")]
    NotAHubId(String),
    #[cfg(not(feature = "hub"))]
    #[error(
        "there is no folder {id}, and this build cannot fetch it from the Hugging Face hub: \
         run `hf download {id}{revision} --local-dir FOLDER`, then use --model FOLDER"
    )]
    NoHub { id: String, revision: String },
    #[error(
        "--device cuda:{0}: this program was built for CPUs only; build it with `cargo build --release --features cuda`, \
         or use --device cpu"
    )]
    NotBuiltForGpus(usize),
    #[error(
        "--device cuda:{ordinal}: there is no such GPU or no driver for it ({reason}); `nvidia-smi` lists the GPUs that \
         the driver knows; use --device cpu to run without one"
    )]
    NoGpu { ordinal: usize, reason: String },
    #[error("cannot open the backend: {0}")]
    Backend(#[from] candle_core::Error),
}

/// The files of the model.
pub fn files(source: &ModelSource) -> Result<ModelFiles, SourceError> {
    match source {
        ModelSource::Demo => Ok(demo::model()),
        ModelSource::Dir(path) => Ok(ModelFiles::open(path)?),
        ModelSource::Hub { id, revision } => hub(id, revision.as_deref()),
        ModelSource::Random(shape) => Ok(ModelFiles::random(RandomModel::open(shape)?)),
    }
}

#[cfg(feature = "hub")]
fn hub(id: &str, revision: Option<&str>) -> Result<ModelFiles, SourceError> {
    use crate::model::hub::HubId;

    let text = revision.map_or_else(|| id.to_owned(), |revision| format!("{id}@{revision}"));
    let hub_id = HubId::parse(&text).ok_or(SourceError::NotAHubId(text))?;
    Ok(hub_id.fetch()?)
}

#[cfg(not(feature = "hub"))]
fn hub(id: &str, revision: Option<&str>) -> Result<ModelFiles, SourceError> {
    let revision = revision.map_or_else(String::new, |revision| format!(" --revision {revision}"));
    Err(SourceError::NoHub { id: id.to_owned(), revision })
}

/// What the model runs on: the one place that chooses.
pub fn backend(
    device: DeviceChoice,
    choice: BackendChoice,
    dtype: DtypeChoice,
) -> Result<Arc<dyn Backend>, SourceError> {
    let kind = match choice {
        BackendChoice::Auto => BackendKind::Own,
        BackendChoice::Reference => BackendKind::Reference,
    };
    // Who asks for f32 gets every value as it is.
    let quantised = match dtype {
        DtypeChoice::Auto => QuantisedProducts::Integers,
        DtypeChoice::F32 | DtypeChoice::Bf16 | DtypeChoice::F16 => QuantisedProducts::Exact,
    };
    let device = match device {
        DeviceChoice::Cpu => Device::Cpu,
        DeviceChoice::Cuda(ordinal) if !kernels::HAS_CUDA => return Err(SourceError::NotBuiltForGpus(ordinal)),
        DeviceChoice::Cuda(ordinal) => gpu(ordinal)?,
        DeviceChoice::Auto if !kernels::HAS_CUDA => Device::Cpu,
        DeviceChoice::Auto => {
            let opened = gpu(0).and_then(|device| Ok(kernels::open(kind, &device, quantised)?));
            match opened {
                Ok(backend) => return Ok(backend),
                Err(error) => {
                    tracing::warn!(%error, "no GPU can be used; the model runs on the CPU");
                    Device::Cpu
                }
            }
        }
    };
    Ok(kernels::open(kind, &device, quantised)?)
}

fn gpu(ordinal: usize) -> Result<Device, SourceError> {
    // A backtrace may follow the first line.
    let reason = |error: candle_core::Error| error.to_string().lines().next().unwrap_or_default().to_owned();
    kernels::gpu(ordinal).map_err(|error| SourceError::NoGpu { ordinal, reason: reason(error) })
}

/// The number format of its weights. Unless asked otherwise, f32 on a CPU, which answers as PEFT does in f32 (bf16 is
/// several times as fast where the processor has instructions for it), and bf16 on a GPU, all of which have.
pub fn dtype(choice: DtypeChoice, backend: &dyn Backend) -> DType {
    match choice {
        DtypeChoice::Auto if backend.device().is_cuda() => DType::BF16,
        DtypeChoice::Auto | DtypeChoice::F32 => DType::F32,
        DtypeChoice::Bf16 => DType::BF16,
        DtypeChoice::F16 => DType::F16,
    }
}
