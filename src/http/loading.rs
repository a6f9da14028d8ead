//! The version that a request asks for, in memory or read from the store first. Reading is bounded: a few at a time, and a
//! request waits for its turn for a limited time.

use std::{sync::Arc, time::Instant};

use metrics::histogram;

use super::{
    App,
    access::Caller,
    blocking,
    problem::{Code, Problem},
};
use crate::{prompt::Version, telemetry};

impl App {
    /// The version that answers: see [`Registry::resolve_drawn`](crate::registry::Registry::resolve_drawn).
    ///
    /// # Errors
    /// The caller may not use it, there is none, its files cannot be read, or too many other requests wait for theirs.
    pub async fn version(&self, caller: &Caller, task: &str, version: Option<&str>) -> Result<Arc<Version>, Problem> {
        caller.check_task(task)?;
        let draw = caller.draw();
        let in_memory = self.registry.resolve_in_memory(task, version, draw).map_err(|error| caller.problem(error))?;
        if let Some(found) = in_memory {
            return Ok(found);
        }
        let started = Instant::now();
        let wait = self.limits.max_load_wait.min(self.limits.request_timeout);
        let Ok(permit) = tokio::time::timeout(wait, Arc::clone(&self.loads).acquire_owned()).await else {
            let detail = format!(
                "the learned prompt is not in memory, and others were read from the store for {wait:?}: retry later, or \
                 start the server with a larger --prompt-memory"
            );
            return Err(Problem::new(Code::Overloaded, detail));
        };
        let (registry, caller) = (Arc::clone(&self.registry), caller.clone());
        let (task, version) = (task.to_owned(), version.map(str::to_owned));
        let found = blocking(move || {
            // The permit is held until the disk has answered, even if the client has gone.
            let _permit = permit;
            registry.resolve_drawn(&task, version.as_deref(), caller.draw()).map_err(|error| caller.problem(error))
        })
        .await;
        histogram!(telemetry::PROMPT_LOAD_SECONDS).record(started.elapsed().as_secs_f64());
        found
    }
}
