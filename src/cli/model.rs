//! The model that a sub-command works on, as typed.

use anyhow::Context as _;
use clap::Args;

use super::model_source;
use crate::{
    config::{BackendChoice, ConfigError, DeviceChoice, DtypeChoice, ModelSource, check_threads},
    kernels,
    model::Model,
    tokenizer::Tokenizer,
};

/// Which model, where and in which number format.
#[derive(Debug, Clone, Args)]
pub struct ModelArgs {
    /// The frozen model: a folder with config.json, tokenizer.json and safetensors, a GGUF file, or a
    /// Hugging Face id (org/name or org/name@revision) [default: the small demo model inside this program]
    #[arg(long, value_name = "DIR|FILE.gguf|HUB_ID", env = "SOFTSERVE_MODEL")]
    pub model: Option<String>,

    /// Use random weights instead of a model, to measure speed. Takes a config.json, or the name of a
    /// built-in shape: smollm2-135m or qwen2.5-0.5b
    #[arg(long, value_name = "CONFIG", env = "SOFTSERVE_RANDOM_WEIGHTS")]
    pub random_weights: Option<String>,

    /// The most positions of one sequence, where the model's positions have no bound (rotary, ALiBi and
    /// relative ones) or fewer are wanted [default: as the model's configuration says]
    #[arg(long, value_name = "N", env = "SOFTSERVE_CONTEXT")]
    pub context: Option<usize>,

    /// Where the model runs: cpu, cuda or cuda:N (the GPU of that number), or auto: the first GPU if the
    /// program was built for GPUs and there is one, and otherwise the CPU [default: auto]
    #[arg(long, env = "SOFTSERVE_DEVICE")]
    pub device: Option<DeviceChoice>,

    /// Which implementation of the model's operations to use: auto (the device's fast kernels) or
    /// reference (plain operations; slow, for comparison) [default: auto]
    #[arg(long, env = "SOFTSERVE_BACKEND", hide_short_help = true)]
    pub backend: Option<BackendChoice>,

    /// The number format of the weights in memory. auto means f32 on a CPU and bf16 on a GPU; bf16 takes
    /// half the memory and is several times as fast on a processor with AVX512-BF16 or AMX. Quantised
    /// weights of a GGUF file are multiplied as integers on a CPU; f32 computes with their exact values
    /// instead [default: auto]
    #[arg(long, env = "SOFTSERVE_DTYPE")]
    pub dtype: Option<DtypeChoice>,

    /// The number of processor threads that the model uses [default: one for each core]
    #[arg(long, value_name = "N", env = "SOFTSERVE_THREADS")]
    pub threads: Option<usize>,
}

/// Has the model use so many processor threads, if it is said how many. It works once in a process.
pub fn use_threads(threads: Option<usize>) -> anyhow::Result<()> {
    if let Some(threads) = threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().context("--threads")?;
        kernels::set_threads(threads);
    }
    Ok(())
}

impl ModelArgs {
    /// Which model was asked for.
    pub fn source(&self) -> Result<ModelSource, ConfigError> {
        ModelSource::chosen(self.model.as_deref(), self.random_weights.as_deref())
    }

    /// Reads the model and its tokenizer.
    pub fn load(&self) -> anyhow::Result<(Model, Tokenizer)> {
        use_threads(self.threads.map(check_threads).transpose()?)?;
        let files = model_source::files(&self.source()?)?.with_context_length(self.context);
        let dtype = self.dtype.unwrap_or_default();
        let (device, backend) = (self.device.unwrap_or_default(), self.backend.unwrap_or_default());
        let backend = model_source::backend(device, backend, dtype)?;
        let tokenizer = Tokenizer::load(&files)?;
        // What making the tokenizer took, before the weights need as much.
        kernels::return_freed_memory();
        let dtype = model_source::dtype(dtype, &*backend);
        let model = Model::load(&files, backend, dtype)?;
        kernels::return_freed_memory();
        Ok((model, tokenizer))
    }
}
