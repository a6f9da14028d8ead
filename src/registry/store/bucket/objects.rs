//! Objects of a bucket, read and written by threads that may wait: each call runs on a thread of the bucket's own.

use std::{fmt, future::Future, io, sync::Arc, sync::mpsc};

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, future::try_join_all};
use object_store::{
    Error, ListResult, ObjectMeta, ObjectStore, ObjectStoreExt as _, PutMode, PutOptions, PutPayload, UpdateVersion,
    path::Path as Key,
};
use tokio::runtime::Runtime;

use super::super::{health::Health, interface::WriteError, location::Bucket};

/// Requests for one call that are sent at the same time.
const CONCURRENCY: usize = 8;

/// The objects under a prefix of a bucket.
pub(super) struct Objects {
    url: String,
    store: Arc<dyn ObjectStore>,
    prefix: Key,
    pub(super) health: Health,
    /// Only while it lives do calls come to an end. `None` once it is dropped.
    runtime: Option<Runtime>,
}

impl fmt::Debug for Objects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Objects").field("url", &self.url).finish_non_exhaustive()
    }
}

impl Drop for Objects {
    fn drop(&mut self) {
        // The last owner may be an async task, which must not wait for threads.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Objects {
    pub(super) fn open(bucket: &Bucket) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("prompt-store")
            .enable_all()
            .build()?;
        Ok(Self {
            url: bucket.url.clone(),
            store: Arc::clone(&bucket.objects),
            prefix: bucket.prefix.clone(),
            health: Health::default(),
            runtime: Some(runtime),
        })
    }

    /// The key of an object below the prefix.
    pub(super) fn key(&self, parts: &[&str]) -> Key {
        parts.iter().fold(self.prefix.clone(), |key, part| key.join(*part))
    }

    /// The parts of a key after a folder's; `None` if it is not in that folder.
    pub(super) fn below(folder: &Key, key: &Key) -> Option<Vec<String>> {
        Some(key.prefix_match(folder)?.map(|part| part.as_ref().to_owned()).collect())
    }

    /// An object and what is known of it; `None` if it is not there. One of more than `limit` bytes is not read.
    pub(super) fn get(&self, key: &Key, limit: u64) -> io::Result<Option<(Bytes, ObjectMeta)>> {
        let (store, key) = (Arc::clone(&self.store), key.clone());
        let read = async move {
            let found = store.get(&key).await?;
            let meta = found.meta.clone();
            let bytes = if meta.size > limit { Bytes::new() } else { found.bytes().await? };
            Ok((bytes, meta))
        };
        match self.wait(read) {
            Ok(found) => Ok(Some(found)),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(io_error(error)),
        }
    }

    /// Several objects, in the order of their keys.
    pub(super) fn get_all(&self, keys: Vec<Key>) -> io::Result<Vec<Bytes>> {
        let store = Arc::clone(&self.store);
        let read = async move {
            let one = |key: Key| {
                let store = Arc::clone(&store);
                async move { store.get(&key).await?.bytes().await }
            };
            try_join_all(keys.into_iter().map(one)).await
        };
        self.wait(read).map_err(io_error)
    }

    /// All objects below a folder.
    pub(super) fn list(&self, folder: &Key) -> io::Result<Vec<ObjectMeta>> {
        let (store, folder) = (Arc::clone(&self.store), folder.clone());
        self.wait(async move { store.list(Some(&folder)).try_collect().await }).map_err(io_error)
    }

    /// What lies directly under the prefix.
    pub(super) fn list_top(&self) -> io::Result<ListResult> {
        let (store, prefix) = (Arc::clone(&self.store), self.prefix.clone());
        self.wait(async move { store.list_with_delimiter(Some(&prefix)).await }).map_err(io_error)
    }

    /// Writes objects, all at once; each is whole or not there.
    pub(super) fn put_all(&self, objects: Vec<(Key, Bytes)>) -> io::Result<()> {
        let store = Arc::clone(&self.store);
        let write = async move {
            let one = |(key, bytes): (Key, Bytes)| {
                let store = Arc::clone(&store);
                async move { store.put(&key, PutPayload::from_bytes(bytes)).await }
            };
            try_join_all(objects.into_iter().map(one)).await.map(drop)
        };
        self.wait(write).map_err(io_error)
    }

    /// Writes an object if it is still as it was read, or is still not there if `basis` is `None`.
    pub(super) fn put_if(&self, key: &Key, bytes: Bytes, basis: Option<UpdateVersion>) -> Result<(), WriteError> {
        let (store, to) = (Arc::clone(&self.store), key.clone());
        let mode = basis.map_or(PutMode::Create, PutMode::Update);
        let payload = PutPayload::from_bytes(bytes.clone());
        let write = async move { store.put_opts(&to, payload, PutOptions::from(mode)).await };
        let error = match self.wait(write) {
            Ok(_) => return Ok(()),
            Err(error) => error,
        };
        // An answer may have been lost on its way, and the write, or its repetition, been refused for its own sake.
        match self.get(key, bytes.len() as u64) {
            Ok(Some((found, _))) if found == bytes => Ok(()),
            _ if matches!(error, Error::Precondition { .. } | Error::AlreadyExists { .. } | Error::NotFound { .. }) => {
                Err(WriteError::Conflict)
            }
            _ => Err(WriteError::Store(io_error(error))),
        }
    }

    /// Deletes objects; one that is not there is no error.
    pub(super) fn delete_all(&self, keys: Vec<Key>) -> io::Result<()> {
        let store = Arc::clone(&self.store);
        let delete = async move {
            let one = |key: Key| {
                let store = Arc::clone(&store);
                async move {
                    match store.delete(&key).await {
                        Err(Error::NotFound { .. }) => Ok(()),
                        outcome => outcome,
                    }
                }
            };
            futures::stream::iter(keys).map(one).buffer_unordered(CONCURRENCY).try_collect::<()>().await
        };
        self.wait(delete).map_err(io_error)
    }

    /// Runs a call on the bucket's own thread, from any thread.
    fn wait<T: Send + 'static>(
        &self,
        call: impl Future<Output = object_store::Result<T>> + Send + 'static,
    ) -> object_store::Result<T> {
        let (answer, answered) = mpsc::sync_channel(1);
        if let Some(runtime) = &self.runtime {
            runtime.spawn(async move {
                // Nobody waits any more if the caller has panicked.
                let _ = answer.send(call.await);
            });
        }
        let stopped = |_| Error::Generic { store: "bucket", source: "the thread that calls it has stopped".into() };
        let outcome = answered.recv().map_err(stopped).flatten();
        let (shown, is_up) = (&self.url, outcome.as_ref().map_or_else(answers, |_| true));
        let note = match &outcome {
            Err(error) if !is_up => Err(io::Error::other(error.to_string())),
            _ => Ok(()),
        };
        let _ = self.health.note(shown, note);
        outcome
    }
}

/// Whether an error is an answer of a store that works.
fn answers(error: &Error) -> bool {
    matches!(
        error,
        Error::NotFound { .. }
            | Error::AlreadyExists { .. }
            | Error::Precondition { .. }
            | Error::NotModified { .. }
            | Error::PermissionDenied { .. }
            | Error::NotImplemented { .. }
            | Error::NotSupported { .. }
            | Error::InvalidPath { .. }
    )
}

fn io_error(error: Error) -> io::Error {
    let kind = match &error {
        Error::NotFound { .. } => io::ErrorKind::NotFound,
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => io::ErrorKind::PermissionDenied,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, error.to_string())
}
