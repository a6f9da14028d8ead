//! An upload's body, however it is packed, to a version in the registry.

use std::{sync::Arc, time::Instant};

use axum::{
    body::Body,
    extract::{self, FromRequest as _, Multipart},
    http::{HeaderMap, request::Parts},
};
use bytes::Bytes;

use super::{
    gate,
    types::{UploadQuery, Uploaded},
};
use crate::{
    engine::{
        SubmitError,
        request::{Event, FinishReason, Request},
    },
    http::{
        AppState,
        access::Caller,
        audit::Change,
        blocking,
        extract::{media_type, read_body},
        problem::{Code, Problem},
    },
    prompt::{LearnedPrompt, TaskName, files::EVAL},
    registry::package::{Packing, Upload, unpack},
};

/// Reads, checks and publishes what a request carries. Also says what that changed.
pub(super) async fn store(
    app: &AppState,
    caller: &Caller,
    task: &str,
    query: &UploadQuery,
    request: extract::Request,
) -> Result<(Uploaded, Change), Problem> {
    let task: TaskName = task.parse()?;
    let _permit = app.uploads.try_acquire().map_err(|_| {
        let limit = app.limits.max_concurrent_uploads;
        Problem::new(
            Code::Overloaded,
            format!("{limit} uploads are being processed, which is the maximum; retry later"),
        )
    })?;
    let package = Package::of(request.headers())?;
    let (parts, body) = request.into_parts();
    let head = extract::Request::from_parts(parts.clone(), body);
    let body = read_body(head, app.limits.max_upload, app).await?;
    let limit = app.limits.max_upload;
    let Upload { mut files, eval } = match package {
        Package::Packed(packing) => blocking(move || unpack(packing, body, limit)).await?,
        Package::Form => form(parts, body).await?,
    };
    if query.allow_other_base {
        files.other_base = Some(Bytes::from_static(b"The upload allowed another base model.\n"));
    }
    let registry = Arc::clone(&app.registry);
    let (version, files) =
        blocking(move || registry.read_version(task, &files).map(|version| (version, files))).await?;
    try_prompt(app, Arc::clone(&version.prompt)).await?;
    let gate = match query.gate {
        Some(metric) => Some(gate::check(app, caller, metric, &version, eval).await?),
        None => None,
    };
    let activate = query.activate && gate.as_ref().is_none_or(|gate| gate.passed);
    let registry = Arc::clone(&app.registry);
    let published = blocking(move || registry.publish_checked(version, files, activate)).await?;
    let change = Change {
        version: Some(published.version.digest.id()),
        before: published.active_before,
        after: published.active_after,
    };
    let uploaded = Uploaded {
        task: published.version.task.clone(),
        created: published.created,
        active: published.active,
        generation: published.generation,
        gate,
        meta: (&*published.version).into(),
    };
    Ok((uploaded, change))
}

/// Runs one forward pass with the prompt: values that are finite can still overflow on their way through the model.
async fn try_prompt(app: &AppState, prompt: Arc<LearnedPrompt>) -> Result<(), Problem> {
    let deadline = Some(Instant::now() + app.limits.request_timeout);
    let mut events = match app.engine.submit(Request { deadline, ..Request::probe(prompt) }) {
        Ok(events) => events,
        // No request can use it, and each says so.
        Err(SubmitError::TooLong { .. } | SubmitError::EncoderTooLong { .. }) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    loop {
        match events.next().await {
            Some(Event::Token(_)) => {}
            Some(Event::Finished { reason: FinishReason::Stop | FinishReason::Length, .. }) => return Ok(()),
            Some(Event::Finished { reason: FinishReason::Timeout, .. }) => {
                let detail = "the model was too busy to try the learned prompt; retry later";
                return Err(Problem::new(Code::Overloaded, detail));
            }
            Some(Event::Finished { reason: FinishReason::Cancelled, .. }) | None => return Err(Problem::stopping()),
            Some(Event::NotFinite) => return Err(Problem::not_finite(0)),
            Some(Event::Failed | Event::NoTokenAllowed(_) | Event::Scored { .. }) => {
                return Err(Problem::internal("the forward pass that tries a prompt failed"));
            }
        }
    }
}

/// How an upload is packed.
enum Package {
    Packed(Packing),
    Form,
}

impl Package {
    fn of(headers: &HeaderMap) -> Result<Self, Problem> {
        let media_type = media_type(headers);
        Ok(match media_type.as_deref() {
            Some("application/octet-stream") => Self::Packed(Packing::Safetensors),
            Some("application/zip" | "application/x-zip-compressed") => Self::Packed(Packing::Zip),
            Some("application/x-tar") => Self::Packed(Packing::Tar),
            Some("application/gzip" | "application/x-gzip" | "application/x-gtar") => Self::Packed(Packing::TarGz),
            Some("multipart/form-data") => Self::Form,
            found => {
                let detail = format!(
                    "found {}, expected application/octet-stream for one safetensors file, application/zip, \
                     application/x-tar or application/gzip for a PEFT directory, or multipart/form-data for its files",
                    found.unwrap_or("no content type")
                );
                return Err(Problem::new(Code::UnsupportedMediaType, detail));
            }
        })
    }
}

/// A form's parts, by their names or else by their files' names.
async fn form(parts: Parts, body: Bytes) -> Result<Upload, Problem> {
    let damaged = |e: String| Problem::new(Code::InvalidUpload, format!("the upload is not a readable form: {e}"));
    let request = extract::Request::from_parts(parts, Body::from(body));
    let mut form = Multipart::from_request(request, &()).await.map_err(|e| damaged(e.body_text()))?;
    let Upload { mut files, mut eval } = Upload::default();
    while let Some(part) = form.next_field().await.map_err(|e| damaged(e.body_text()))? {
        let names = [part.name(), part.file_name()].map(|n| n.unwrap_or_default().to_owned());
        let place = match names.iter().map(String::as_str).find(|n| KNOWN_FILES.contains(n)) {
            Some("adapter_config.json") => &mut files.adapter_config,
            Some("adapter_model.safetensors") => &mut files.weights,
            Some("task.json") => &mut files.task,
            Some("loss.svg") => &mut files.curve,
            Some(EVAL) => &mut eval,
            _ => {
                let found: String = names[0].chars().take(80).collect();
                let detail = format!("found a part named {found:?}, expected one of: {}", KNOWN_FILES.join(", "));
                return Err(Problem::new(Code::InvalidUpload, detail));
            }
        };
        if place.is_some() {
            return Err(Problem::new(Code::InvalidUpload, format!("the part {:?} appears twice", names[0])));
        }
        *place = Some(part.bytes().await.map_err(|e| damaged(e.body_text()))?);
    }
    files.check_complete()?;
    Ok(Upload { files, eval })
}

const KNOWN_FILES: [&str; 5] = ["adapter_config.json", "adapter_model.safetensors", "task.json", "loss.svg", EVAL];
