//! `softserve serve`: load, listen, and stop in order.

use std::{
    io::Write as _,
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use tokio::{net::TcpListener, sync::oneshot};

use super::{model, model_source};
use crate::{
    config::{Access, ByteSize, Config, LogFormat, ModelSource, ServeArgs},
    demo,
    engine::{Engine, EngineThread, StartError},
    http::{self, App, AppState, Settings, audit::AuditLog, router},
    kernels::{self, DeviceMemory},
    model::{Model, ModelInfo},
    prompt::format::Fit,
    registry::{PromptLocation, Registry, RegistryConfig},
    telemetry,
    tokenizer::Tokenizer,
};

/// How often to look whether the files of keys have changed.
const KEYS_POLL: Duration = Duration::from_secs(2);

/// Connections get this long beyond the drain to send their last bytes.
const LAST_BYTES: Duration = Duration::from_secs(2);

pub fn run(args: ServeArgs) -> anyhow::Result<()> {
    let config = args.check()?;
    telemetry::init(&config.log).context("--log-level")?;
    telemetry::metrics();
    model::use_threads(config.threads)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    // Before the model is loaded: a busy port is then known at once.
    let listener = runtime.block_on(bind(config.listen))?;
    let Loaded { app, thread, root, _watcher } = load(&config)?;
    let address = listener.local_addr()?;
    announce(&config, &app, &root, address);
    let stopped = runtime.block_on(serve(&config, listener, Arc::clone(&app), thread));
    // Blocked threads of the runtime must not keep the process.
    runtime.shutdown_timeout(LAST_BYTES);
    stopped
}

/// Everything that is there before the first request.
pub(super) struct Loaded {
    pub(super) app: AppState,
    thread: EngineThread,
    root: PromptLocation,
    _watcher: crate::registry::Watcher,
}

/// Loads the model and the prompts, and starts the engine.
pub(super) fn load(config: &Config) -> anyhow::Result<Loaded> {
    let files = model_source::files(&config.model)?.with_context_length(config.context);
    let backend = model_source::backend(config.device, config.backend, config.dtype)?;
    tracing::info!(model = files.name(), from = files.location(), "loading the model");
    let started = Instant::now();
    let tokenizer = Tokenizer::load(&files)?;
    // What making the tokenizer took, before the weights need as much.
    kernels::return_freed_memory();
    let kernels_name = backend.name();
    let dtype = model_source::dtype(config.dtype, &*backend);
    let model = Model::load(&files, backend, dtype)?;
    let info = model.info().clone();
    let mut engine = config.engine;
    if let Some(memory) = model.backend().memory()?.filter(|_| !config.kv_cache_is_given) {
        engine.kv_cache_bytes = kv_cache_bytes(memory, config.gpu_memory)?;
    }
    let started_engine = Engine::start(model, engine).map_err(|error| match error {
        StartError::KvCacheTooSmall { .. } => anyhow::anyhow!("{error}; increase --kv-cache"),
        StartError::Tensor(error) => error.into(),
    });
    let (engine, thread) = started_engine.context("cannot start the model")?;
    tracing::info!(
        seconds = started.elapsed().as_secs_f64(),
        parameters = info.num_parameters,
        kernels = kernels_name,
        "the model is loaded"
    );
    let root = prompts_root(config, &info)?;
    let registry = open_registry(config, &info, root.clone())?;
    let watcher = registry.watch().context("cannot watch the prompts")?;
    let files = config.files.clone().map_or_else(|| data_folder(config, &info), Ok)?;
    let audit = match &config.audit_log {
        Some(path) => AuditLog::open(path).with_context(|| format!("cannot open the audit log {}", path.display()))?,
        None => AuditLog::default(),
    };
    let shown = files.display().to_string();
    let settings = Settings { limits: config.limits.clone(), access: config.access.clone(), audit, files };
    let app = App::new(engine, registry, tokenizer, info, settings)
        .with_context(|| format!("cannot open {shown}: choose another folder with --files"))?;
    kernels::return_freed_memory();
    Ok(Loaded { app, thread, root, _watcher: watcher })
}

/// What the weights leave for the KV cache of the part of a GPU's memory that may be used.
fn kv_cache_bytes(memory: DeviceMemory, fraction: f64) -> anyhow::Result<usize> {
    let unused = (memory.total as f64 * (1.0 - fraction)) as usize;
    let bytes = memory.free.saturating_sub(unused);
    if bytes == 0 {
        let size = |bytes: usize| ByteSize(bytes as u64);
        anyhow::bail!(
            "the GPU has {} of memory, of which {} are free after the weights; --gpu-memory {fraction} leaves {} unused, so \
             there is nothing for the KV cache. Free memory of other programs (nvidia-smi lists them), increase \
             --gpu-memory, or set --kv-cache",
            size(memory.total),
            size(memory.free),
            size(unused)
        );
    }
    tracing::info!(
        gpu_memory = %ByteSize(memory.total as u64),
        free_after_weights = %ByteSize(memory.free as u64),
        kv_cache = %ByteSize(bytes as u64),
        "the KV cache gets what the weights leave of the GPU's memory"
    );
    Ok(bytes)
}

/// Where the prompts are; the demo's own are put there on the first start.
fn prompts_root(config: &Config, info: &ModelInfo) -> anyhow::Result<PromptLocation> {
    if let Some(root) = &config.prompts {
        return Ok(root.clone());
    }
    let root = data_folder(config, info)?.join("prompts");
    let made =
        if config.model == ModelSource::Demo { demo::seed_prompts(&root) } else { std::fs::create_dir_all(&root) };
    made.with_context(|| {
        format!("cannot create the prompts folder {}: choose another with --prompts", root.display())
    })?;
    Ok(root.into())
}

/// The folder for this model in the user's data directory.
fn data_folder(config: &Config, info: &ModelInfo) -> anyhow::Result<PathBuf> {
    let data = directories::ProjectDirs::from("", "", "softserve")
        .context("there is no data directory for this user: choose folders with --prompts and --files")?;
    let name = if config.model == ModelSource::Demo { "demo".to_owned() } else { folder_name(&info.name) };
    Ok(data.data_dir().join(format!("{name}-{}", info.fingerprint)))
}

fn folder_name(model: &str) -> String {
    model.chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' || c == '.' { c } else { '_' }).collect()
}

fn open_registry(config: &Config, info: &ModelInfo, root: PromptLocation) -> anyhow::Result<Arc<Registry>> {
    let fit = Fit::from(info);
    let shown = root.to_string();
    let limits = &config.limits;
    let registry = RegistryConfig {
        root,
        fit,
        max_tasks: limits.max_tasks,
        max_versions_per_task: limits.max_versions,
        max_loaded_bytes: limits.prompt_memory,
        poll_interval: config.poll_interval,
        keep: config.keep,
    };
    Registry::open(registry).with_context(|| format!("cannot open the prompts in {shown}"))
}

async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| {
        format!("cannot listen on {address}: use another with --listen, or port 0 for one that is free")
    })
}

/// A few lines for the person who started us; a log line for programs.
fn announce(config: &Config, app: &App, root: &PromptLocation, address: SocketAddr) {
    let num_tasks = app.registry.num_tasks();
    let url = format!("http://{address}");
    tracing::info!(url, tasks = num_tasks, "listening");
    if config.log.format == LogFormat::Json {
        return;
    }
    let model = &app.model;
    let names = app.registry.first_names(8).iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let shown = match num_tasks {
        0 => "none yet".to_owned(),
        n if n > 8 => format!("{names}, and {} more", n - 8),
        _ => names,
    };
    let millions = model.num_parameters as f64 / 1e6;
    let dtype = model.dtype.as_str();
    let lines = [
        format!("softserve {}", env!("CARGO_PKG_VERSION")),
        format!("  model    {} ({millions:.1} M parameters, {dtype}, context {})", model.name, model.context_length),
        format!("  tasks    {shown}"),
        format!("  prompts  {root}"),
        format!("  docs     {url}/docs"),
        format!("  listen   {url}"),
    ];
    // Nobody may be reading; that is no reason to stop.
    let _ = writeln!(std::io::stdout(), "{}", lines.join("\n"));
}

/// Answers until a signal or the engine's end, then drains.
async fn serve(config: &Config, listener: TcpListener, app: AppState, thread: EngineThread) -> anyhow::Result<()> {
    let mut signals = Signals::new()?;
    let mut engine = joined(thread)?;
    app.resume_batches();
    tokio::spawn(follow_keys(config.access.clone()));
    let mut server = tokio::spawn(http::serve(listener, router(Arc::clone(&app)), app.stopping()));

    let failed = tokio::select! {
        signal = signals.next() => {
            tracing::info!(signal, drain_timeout = ?config.drain_timeout, "stopping: waiting for running requests");
            false
        }
        _ = &mut engine => true,
    };
    app.stop();
    app.engine.drain(Instant::now() + config.drain_timeout);
    if failed {
        // Waiting handlers see the engine's end and answer; they need no time.
        let _ = tokio::time::timeout(LAST_BYTES, server).await;
        bail!("the engine has failed; the log has the cause");
    }
    tokio::select! {
        done = tokio::time::timeout(config.drain_timeout + LAST_BYTES, &mut server) => match done {
            Ok(done) => done?,
            Err(_) => tracing::warn!("some connections were still open when the drain timeout expired"),
        },
        signal = signals.next() => {
            tracing::warn!(signal, "stopping at once: running requests are cancelled");
            app.engine.drain(Instant::now());
            let _ = tokio::time::timeout(LAST_BYTES, &mut server).await;
        }
    }
    let sound = tokio::time::timeout(LAST_BYTES, engine).await;
    match sound {
        Ok(Ok(true)) => tracing::info!("stopped"),
        Ok(_) => bail!("the engine failed while it was stopping; the log has the cause"),
        Err(_) => bail!("the engine did not stop in time"),
    }
    Ok(())
}

/// Reads the files of keys again when they change.
async fn follow_keys(access: Access) {
    let mut ticks = tokio::time::interval(KEYS_POLL);
    while access.has_files() {
        ticks.tick().await;
        let access = access.clone();
        match tokio::task::spawn_blocking(move || access.reload()).await {
            Ok(Ok(None)) => {}
            Ok(Ok(Some(keys))) => tracing::info!(keys, "the keys were read again"),
            Ok(Err(error)) => tracing::error!(%error, "the keys stay as they were"),
            Err(error) => return tracing::error!(%error, "cannot read the keys again"),
        }
    }
}

/// Whether the engine's thread ended well, once it has ended.
fn joined(thread: EngineThread) -> anyhow::Result<oneshot::Receiver<bool>> {
    let (tell, ended) = oneshot::channel();
    std::thread::Builder::new().name("engine-join".to_owned()).spawn(move || {
        // Nobody listens any more when the process is about to end anyway.
        let _ = tell.send(thread.join());
    })?;
    Ok(ended)
}

/// The signals that ask us to stop. Made once, so that none is lost between two of them.
struct Signals {
    #[cfg(unix)]
    terminate: tokio::signal::unix::Signal,
    #[cfg(unix)]
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    #[cfg(unix)]
    fn new() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    #[cfg(not(unix))]
    fn new() -> std::io::Result<Self> {
        Ok(Self {})
    }

    /// Waits for one.
    #[cfg(unix)]
    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }

    #[cfg(not(unix))]
    async fn next(&mut self) -> &'static str {
        if let Err(error) = tokio::signal::ctrl_c().await {
            tracing::error!(%error, "cannot wait for Ctrl-C");
        }
        "Ctrl-C"
    }
}
