//! What is done for a batch in the background: its file is checked, its requests are answered, its files are made known.

use std::{collections::HashSet, io, sync::Arc, time::Instant};

use dashmap::DashMap;
use futures::{StreamExt as _, pin_mut};
use tokio::{
    fs::{File, OpenOptions},
    io::{AsyncBufReadExt as _, AsyncSeekExt as _, AsyncWriteExt as _, BufReader},
    sync::{Semaphore, watch},
};

use super::{
    super::files::{self, content_name, now},
    Batch, BatchError, BatchErrors, BatchRecord, RequestCounts, Status,
};
use crate::{
    config::TaskPatterns,
    http::{
        App, AppState,
        access::Caller,
        lines::{Line, Lines},
    },
    records::Records,
};

/// Batches that are worked on at the same time.
const AT_ONCE: usize = 2;
/// Lines of one batch that are asked at the same time.
const LINES_AT_ONCE: usize = 128;
/// The most faults of a file that are told.
const MAX_ERRORS: usize = 100;

/// All batches, and what is being done for them.
#[derive(Debug)]
pub struct Work {
    pub records: Records<BatchRecord>,
    running: DashMap<String, Running>,
    permits: Semaphore,
}

#[derive(Debug)]
struct Running {
    /// Becomes true when the batch is to end.
    cancel: watch::Sender<bool>,
    counts: RequestCounts,
}

impl Work {
    /// With the batches that were known before.
    pub fn new(records: Records<BatchRecord>) -> Self {
        Self { records, running: DashMap::new(), permits: Semaphore::new(AT_ONCE) }
    }

    /// What came of a running batch's requests so far.
    pub fn counts(&self, id: &str) -> Option<RequestCounts> {
        self.running.get(id).map(|running| running.counts).filter(|counts| counts.total > 0)
    }

    /// Has a batch end soon, if it has not ended.
    pub fn cancel(&self, id: &str) -> io::Result<Option<Batch>> {
        let changed = self.update(id, |batch| {
            if !batch.status.is_final() {
                batch.status = Status::Cancelling;
                batch.cancelling_at = Some(now());
            }
        })?;
        if let Some(running) = self.running.get(id) {
            running.cancel.send_replace(true);
        }
        Ok(changed)
    }

    /// Changes a batch and writes it.
    fn update(&self, id: &str, change: impl FnOnce(&mut Batch)) -> io::Result<Option<Batch>> {
        let Some(mut record) = self.records.get(id) else { return Ok(None) };
        change(&mut record.batch);
        let batch = record.batch.clone();
        self.records.put(id, record)?;
        Ok(Some(batch))
    }
}

/// Goes on with the batches that had not ended when the server stopped.
pub fn resume(app: &AppState) {
    for BatchRecord { batch, .. } in app.batches.records.all() {
        if !batch.status.is_final() {
            start(app, &batch.id);
        }
    }
}

/// Begins to work on a batch.
pub(super) fn start(app: &AppState, id: &str) {
    let (app, id) = (Arc::clone(app), id.to_owned());
    let (cancel, cancelled) = watch::channel(false);
    app.batches.running.insert(id.clone(), Running { cancel, counts: RequestCounts::default() });
    tokio::spawn(async move {
        let worked = work(&app, &id, cancelled).await;
        app.batches.running.remove(&id);
        if let Err(error) = worked {
            tracing::error!(batch = id, %error, "a batch failed");
            let _ = app.batches.update(&id, |batch| fail(batch, vec![fault("internal", None, error.to_string())]));
        }
    });
}

fn fault(code: &str, line: Option<u64>, message: String) -> BatchError {
    BatchError { code: code.to_owned(), line, message, param: None }
}

fn fail(batch: &mut Batch, data: Vec<BatchError>) {
    batch.status = Status::Failed;
    batch.failed_at = Some(now());
    batch.errors = Some(BatchErrors { object: "list".to_owned(), data });
}

async fn work(app: &AppState, id: &str, mut cancelled: watch::Receiver<bool>) -> io::Result<()> {
    let mut stopping = app.stopping();
    let permit = tokio::select! {
        permit = app.batches.permits.acquire() => permit,
        // It goes on after the next start.
        _ = stopping.wait_for(|stopping| *stopping) => return Ok(()),
    };
    let _permit = permit.map_err(io::Error::other)?;
    let Some(record) = app.batches.records.get(id) else { return Ok(()) };
    let batch = &record.batch;
    let path = app.files.file(&content_name(&batch.input_file_id))?;
    let total = match check(File::open(&path).await?, &batch.endpoint).await? {
        Ok(total) => total,
        Err(faults) => {
            app.batches.update(id, |batch| fail(batch, faults))?;
            return Ok(());
        }
    };
    app.batches.update(id, |batch| {
        if batch.status == Status::Validating {
            batch.status = Status::InProgress;
        }
        batch.in_progress_at.get_or_insert_with(now);
        batch.request_counts.total = total;
    })?;
    let mut output = Output::open(app, &record.output_id).await?;
    let mut errors = Output::open(app, &record.error_id).await?;
    let mut counts = RequestCounts { total, completed: output.lines, failed: errors.lines };
    let lines = lines(File::open(&path).await?).skip((output.lines + errors.lines) as usize);
    let caller = Caller::of_batch(record.tenant, TaskPatterns::new(record.tasks.clone()));
    let answers = Lines::new(Arc::clone(app), caller).only(&batch.endpoint).answers(lines, LINES_AT_ONCE);
    pin_mut!(answers);
    let expires = batch.expires_at.map(|at| std::time::Duration::from_secs(at.saturating_sub(now())));
    let expires = Instant::now() + expires.unwrap_or(std::time::Duration::MAX / 4);
    let ended = loop {
        if *cancelled.borrow() || app.batches.records.get(id).is_some_and(|r| r.batch.status == Status::Cancelling) {
            break Status::Cancelled;
        }
        if let Some(mut running) = app.batches.running.get_mut(id) {
            running.counts = counts;
        }
        let answer = tokio::select! {
            answer = answers.next() => answer,
            _ = cancelled.wait_for(|cancelled| *cancelled) => break Status::Cancelled,
            _ = stopping.wait_for(|stopping| *stopping) => return Ok(()),
            () = tokio::time::sleep_until(expires.into()) => break Status::Expired,
        };
        let Some(answer) = answer.transpose()? else { break Status::Completed };
        if answer.is_success() {
            output.write(&answer).await?;
            counts.completed += 1;
        } else {
            errors.write(&answer).await?;
            counts.failed += 1;
        }
    };
    app.batches.update(id, |batch| {
        batch.status = Status::Finalizing;
        batch.finalizing_at = Some(now());
    })?;
    let output_id = output.finish(app, &record, "output").await?;
    let error_id = errors.finish(app, &record, "errors").await?;
    app.batches.update(id, |batch| {
        batch.status = ended;
        batch.request_counts = counts;
        batch.output_file_id = output_id;
        batch.error_file_id = error_id;
        let at = match ended {
            Status::Cancelled => &mut batch.cancelled_at,
            Status::Expired => &mut batch.expired_at,
            _ => &mut batch.completed_at,
        };
        *at = Some(now());
    })?;
    Ok(())
}

/// The lines of a file, empty ones left out.
fn lines(file: File) -> impl futures::Stream<Item = io::Result<String>> {
    async_stream::stream! {
        let mut lines = BufReader::new(file).lines();
        loop {
            match lines.next_line().await {
                Ok(None) => break,
                Ok(Some(line)) if line.trim().is_empty() => {}
                Ok(Some(line)) => yield Ok(line),
                Err(error) => {
                    yield Err(error);
                    break;
                }
            }
        }
    }
}

/// The number of requests in a file, or what is wrong with it.
async fn check(file: File, endpoint: &str) -> io::Result<Result<u64, Vec<BatchError>>> {
    let lines = lines(file);
    pin_mut!(lines);
    let (mut faults, mut ids, mut number) = (Vec::new(), HashSet::new(), 0);
    while let Some(line) = lines.next().await {
        number += 1;
        let line = match line {
            Ok(line) => line,
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                faults.push(fault("invalid_json_line", Some(number), "the file is not UTF-8".to_owned()));
                break;
            }
            Err(error) => return Err(error),
        };
        let found = match Line::parse(&line) {
            Err((_, error)) => Some(("invalid_json_line", error.message)),
            Ok(Line { url, .. }) if url != endpoint => Some((
                "mismatched_endpoint",
                format!("url: found {url:?}, expected {endpoint:?}, the batch's endpoint"),
            )),
            Ok(Line { custom_id: None, .. }) => {
                Some(("missing_required_parameter", "custom_id: found none".to_owned()))
            }
            Ok(Line { custom_id: Some(id), .. }) => {
                let repeated = format!("custom_id: found {id:?} a second time");
                (!ids.insert(id)).then_some(("duplicate_custom_id", repeated))
            }
        };
        faults.extend(found.map(|(code, message)| fault(code, Some(number), message)));
        if faults.len() >= MAX_ERRORS {
            break;
        }
    }
    if number == 0 {
        faults.push(fault("empty_file", None, "the file has no requests".to_owned()));
    }
    Ok(if faults.is_empty() { Ok(number) } else { Err(faults) })
}

/// A file that answers are appended to.
struct Output {
    id: String,
    file: File,
    lines: u64,
}

impl Output {
    /// Opens the file, and cuts off an answer that was not written whole.
    async fn open(app: &App, id: &str) -> io::Result<Self> {
        let path = app.files.file(&content_name(id))?;
        let mut options = OpenOptions::new();
        let mut file = options.read(true).write(true).create(true).truncate(false).open(path).await?;
        let mut reader = BufReader::new(&mut file);
        let (mut lines, mut whole, mut line) = (0, 0, Vec::new());
        loop {
            line.clear();
            let read = reader.read_until(b'\n', &mut line).await?;
            if read == 0 || line.last() != Some(&b'\n') {
                break;
            }
            lines += 1;
            whole += read as u64;
        }
        drop(reader);
        file.set_len(whole).await?;
        file.seek(io::SeekFrom::End(0)).await?;
        Ok(Self { id: id.to_owned(), file, lines })
    }

    async fn write(&mut self, answer: &impl serde::Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(answer)?;
        line.push(b'\n');
        self.lines += 1;
        self.file.write_all(&line).await?;
        self.file.flush().await
    }

    /// Makes the file known, or removes it if nothing was written. Returns its id.
    async fn finish(self, app: &App, record: &BatchRecord, kind: &str) -> io::Result<Option<String>> {
        let Self { id, file, lines } = self;
        file.sync_all().await?;
        if lines == 0 {
            tokio::fs::remove_file(app.files.file(&content_name(&id))?).await?;
            return Ok(None);
        }
        let known = files::File {
            id: id.clone(),
            object: "file".to_owned(),
            bytes: file.metadata().await?.len(),
            created_at: now(),
            expires_at: None,
            filename: format!("{}_{kind}.jsonl", record.batch.id),
            purpose: "batch_output".to_owned(),
            status: "processed".to_owned(),
        };
        files::register(&app.files, record.tenant, known)?;
        Ok(Some(id))
    }
}
