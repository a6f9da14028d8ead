//! The only module that knows the wire: routes, and the layers around them in order.
//!
//! A request passes, from the outside in: [`observe`] (request id, log, metrics, problems written
//! out), the panic catcher, [`access`] (keys; nothing is open that is not listed there), then its
//! route. Bodies are bounded where they are read, in [`extract`].

pub mod access;
pub mod admin;
pub mod audit;
mod batch;
pub mod classify;
mod connections;
pub mod extract;
pub mod generate;
pub mod health;
pub mod lines;
mod loading;
mod observe;
pub mod openai;
pub mod openapi;
mod page;
pub mod prepare;
pub mod problem;
mod quota;
pub mod running;
mod scoring;
pub mod tokenize;
pub mod types;

pub use connections::serve;

use std::{path::PathBuf, sync::Arc};

use axum::{
    Router,
    http::{HeaderName, HeaderValue, Method, Uri},
    middleware,
    response::{IntoResponse, Response},
};
use tokio::sync::{Semaphore, watch};
use tower_http::catch_panic::CatchPanicLayer;
use utoipa_axum::{router::OpenApiRouter, routes};
use utoipa_swagger_ui::SwaggerUi;

use crate::{
    config::{Access, Limits},
    engine::{Engine, request::CacheNamespace},
    grammar::Grammars,
    model::ModelInfo,
    prompt::{Version, chat::ChatTemplate},
    records::Records,
    registry::Registry,
    tokenizer::Tokenizer,
};
use audit::AuditLog;
use openai::{
    batches::{self, Work},
    files::FileRecord,
};
use problem::{Code, Problem};
use quota::Quotas;

/// The header that names the version that answered.
const X_VERSION: HeaderName = HeaderName::from_static("x-softserve-version");

/// What every handler sees.
#[derive(Debug)]
pub struct App {
    pub engine: Engine,
    pub registry: Arc<Registry>,
    pub tokenizer: Tokenizer,
    pub model: ModelInfo,
    /// What answers with a grammar are constrained by.
    pub grammars: Arc<Grammars>,
    /// The model without a learned prompt, which answers under its own name.
    pub base: Arc<Version>,
    pub limits: Limits,
    pub access: Access,
    quotas: Quotas,
    pub audit: AuditLog,
    /// What clients uploaded and batches wrote.
    pub files: Records<FileRecord>,
    pub batches: Work,
    /// One permit for each upload that may be read or checked now.
    uploads: Semaphore,
    /// One permit for each learned prompt that may be read from the store for a request now.
    loads: Arc<Semaphore>,
    /// Becomes true when the server stops.
    stopping: watch::Sender<bool>,
}

/// How the server is set up.
#[derive(Debug)]
pub struct Settings {
    pub limits: Limits,
    pub access: Access,
    pub audit: AuditLog,
    /// The folder of what clients upload and batches write.
    pub files: PathBuf,
}

/// Shared by all handlers.
pub type AppState = Arc<App>;

impl App {
    /// Also has the engine warm each learned prompt that answers, or begins to.
    ///
    /// # Errors
    /// There is no memory, or the folder of files (`files`) cannot be read.
    pub fn new(
        engine: Engine,
        registry: Arc<Registry>,
        tokenizer: Tokenizer,
        model: ModelInfo,
        Settings { limits, access, audit, files }: Settings,
    ) -> candle_core::Result<AppState> {
        let parse = |source: &str| {
            let parsed = ChatTemplate::parse(source);
            parsed.inspect_err(|error| tracing::warn!(model = model.name, %error, "the model's chat template")).ok()
        };
        let chat = model.chat.template.as_deref().and_then(parse);
        let base = Arc::new(Version::without_prompt(&model.fingerprint, model.hidden_size, chat)?);
        let uploads = Semaphore::new(limits.max_concurrent_uploads);
        let loads = Arc::new(Semaphore::new(limits.max_concurrent_loads));
        let warm = engine.clone();
        registry.on_active(move |version| {
            // Where a template places virtual tokens, what comes before them is not known yet.
            if !version.template.places_virtual_tokens() {
                warm.warm_up(Arc::clone(&version.prompt), CacheNamespace(version.digest.0));
            }
        });
        Ok(Arc::new(Self {
            grammars: Arc::new(Grammars::new(tokenizer.clone(), model.vocab_size, model.eos_token_ids.clone())),
            engine,
            registry,
            tokenizer,
            model,
            base,
            limits,
            access,
            quotas: Quotas::default(),
            audit,
            files: Records::open(&files.join("files"))?,
            batches: Work::new(Records::open(&files.join("batches"))?),
            uploads,
            loads,
            stopping: watch::Sender::new(false),
        }))
    }

    /// Goes on with the batches that had not ended when the server stopped. Within a runtime of tokio.
    pub fn resume_batches(self: &Arc<Self>) {
        batches::resume(self);
    }

    /// Readiness drops, so that load balancers send nothing more. Running requests go on; those whose body has not
    /// arrived yet are answered that the server is stopping.
    pub fn stop(&self) {
        self.stopping.send_replace(true);
    }

    /// Whether the server stops, for whoever waits for it.
    pub fn stopping(&self) -> watch::Receiver<bool> {
        self.stopping.subscribe()
    }

    /// Waits until the server stops.
    async fn stopped(&self) {
        // The sender is a part of the app, so it is there.
        let _ = self.stopping().wait_for(|stopping| *stopping).await;
    }

    /// Whether requests are answered: a forward pass has run, the engine lives, nobody said stop.
    pub fn is_ready(&self) -> bool {
        !*self.stopping.borrow() && self.engine.stats().ready
    }
}

/// The whole server, without a socket.
pub fn router(app: AppState) -> Router {
    let (router, spec) = routes().split_for_parts();
    router
        .merge(page::routes())
        .merge(SwaggerUi::new("/docs").url("/openapi.json", openapi::finish(spec)))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::from_fn_with_state(Arc::clone(&app), access::check))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::from_fn(observe::observe))
        .with_state(app)
}

/// The routes that ask something, for requests that do not come over a connection: the caller is an extension of each.
fn asking(app: AppState) -> Router {
    let (router, _) = asking_routes().split_for_parts();
    router
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::from_fn(observe::observe))
        .with_state(app)
}

/// Routes that ask the model something, with their places in the specification.
fn asking_routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(generate::generate))
        .routes(routes!(classify::classify))
        .routes(routes!(classify::score))
        .routes(routes!(generate::generate_batch))
        .merge(openai::asking_routes())
}

/// Every route with its place in the specification.
fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::with_openapi(openapi::head())
        .merge(asking_routes())
        .routes(routes!(generate::list_tasks))
        .routes(routes!(generate::get_task))
        .merge(openai::other_routes())
        .routes(routes!(tokenize::tokenize))
        .routes(routes!(tokenize::detokenize))
        .merge(admin::routes())
        .routes(routes!(health::live))
        .routes(routes!(health::ready))
        .routes(routes!(health::metrics))
}

/// An answer of a version, which its header names.
fn answered(version: &Version, answer: impl IntoResponse) -> Response {
    let mut response = answer.into_response();
    if let Ok(id) = HeaderValue::from_str(&version.digest.id()) {
        response.headers_mut().insert(X_VERSION, id);
    }
    response
}

/// Runs what blocks (disk, long texts) off the async threads.
pub(crate) async fn blocking<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, Problem>
where
    T: Send + 'static,
    E: Into<Problem> + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(Into::into),
        Err(error) => Err(Problem::internal(error)),
    }
}

async fn not_found(uri: Uri) -> Problem {
    let path: String = uri.path().chars().take(80).collect();
    Problem::new(Code::NotFound, format!("there is no path {path}; see /docs for the paths of this server"))
}

async fn method_not_allowed(method: Method, uri: Uri) -> Problem {
    let detail = format!("{} does not accept {method}; the Allow header lists the methods that it accepts", uri.path());
    Problem::new(Code::MethodNotAllowed, detail)
}

fn panicked(_: Box<dyn std::any::Any + Send>) -> Response {
    Problem::internal("a handler panicked").into_response()
}
