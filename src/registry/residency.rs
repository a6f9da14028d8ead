//! Which versions are in memory: those used most, bounded by bytes. A version that is evicted is read from the store again
//! when a request needs it.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use quick_cache::{Lifecycle, OptionsBuilder, Weighter, sync::Cache};

use crate::prompt::{Digest, TaskName, Version};

/// What a version takes beside its tensors and texts, in bytes: above all the tables of its parsed template.
const FIXED_BYTES: u64 = 24 * 1024;

/// Versions of this size are expected when the cache sizes its tables, in bytes.
const USUAL_BYTES: u64 = 64 * 1024;

/// The part of the bound that versions read ahead may fill: the rest is for those that requests ask for.
const READ_AHEAD_SHARE: u64 = 4;

/// A version of a task.
type Key = (TaskName, Digest);

/// The versions in memory, evicted by how recently and how often they were used (S3-FIFO's kin, by `quick_cache`).
#[derive(Debug)]
pub(super) struct Residency {
    versions: Cache<Key, Arc<Version>, Bytes, quick_cache::DefaultHashBuilder, CountEvictions>,
    evictions: Arc<AtomicU64>,
    loads: AtomicU64,
}

/// Counts of versions in memory, for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResidencyStats {
    /// Versions in memory.
    pub versions: usize,
    /// The bytes that they take.
    pub bytes: u64,
    /// Versions read from the store because a request, or an activation, needed them.
    pub loads: u64,
    /// Versions that made room for others.
    pub evictions: u64,
}

#[derive(Debug, Clone)]
struct Bytes;

impl Weighter<Key, Arc<Version>> for Bytes {
    fn weight(&self, _: &Key, version: &Arc<Version>) -> u64 {
        num_bytes(version)
    }
}

#[derive(Debug, Clone)]
struct CountEvictions(Arc<AtomicU64>);

impl Lifecycle<Key, Arc<Version>> for CountEvictions {
    type RequestState = ();

    fn on_evict(&self, (): &mut (), _: Key, _: Arc<Version>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// The memory that a version takes, in bytes: its tensors, and an estimate for the rest.
fn num_bytes(version: &Version) -> u64 {
    let spec = &version.spec;
    let labels: usize =
        spec.labels.iter().map(|(label, words)| label.len() + words.iter().map(String::len).sum::<usize>()).sum();
    // A label is also a row of the verbalizer, and later a list of token ids.
    let texts = 4 * version.template.source().len() + 8 * labels;
    FIXED_BYTES + version.prompt.num_bytes() as u64 + texts as u64
}

impl Residency {
    /// Keeps at most `max_bytes` of versions.
    pub(super) fn new(max_bytes: u64) -> Self {
        let evictions = Arc::new(AtomicU64::new(0));
        let items = usize::try_from(max_bytes / USUAL_BYTES).unwrap_or(usize::MAX).clamp(16, 1 << 20);
        // One shard: a shard takes no version that is larger than its part of the bound.
        let options =
            OptionsBuilder::new().shards(1).estimated_items_capacity(items).weight_capacity(max_bytes).build();
        let counting = CountEvictions(Arc::clone(&evictions));
        let hasher = quick_cache::DefaultHashBuilder::default();
        let versions = match options {
            Ok(options) => Cache::with_options(options, Bytes, hasher, counting),
            // All that `build` needs is given above.
            Err(_) => Cache::with(items, max_bytes, Bytes, hasher, counting),
        };
        Self { versions, evictions, loads: AtomicU64::new(0) }
    }

    /// A version that is in memory, which counts as a use.
    pub(super) fn get(&self, task: &TaskName, digest: Digest) -> Option<Arc<Version>> {
        self.versions.get(&(task.clone(), digest))
    }

    /// A version that is in memory, without counting as a use.
    pub(super) fn peek(&self, task: &TaskName, digest: Digest) -> Option<Arc<Version>> {
        self.versions.peek(&(task.clone(), digest))
    }

    /// A version that is in memory, or that `read` reads. One thread reads it; others that ask at the same time wait for it.
    pub(super) fn get_or_load<E>(
        &self,
        task: &TaskName,
        digest: Digest,
        read: impl FnOnce() -> Result<Arc<Version>, E>,
    ) -> Result<Arc<Version>, E> {
        self.versions.get_or_insert_with(&(task.clone(), digest), || {
            self.loads.fetch_add(1, Ordering::Relaxed);
            read()
        })
    }

    /// Puts a version into memory, since requests will ask for it; others make room.
    pub(super) fn insert(&self, version: Arc<Version>) {
        self.versions.insert((version.task.clone(), version.digest), version);
    }

    /// Puts a version that was read ahead into memory, if there is room without evicting another.
    pub(super) fn offer(&self, version: Arc<Version>) {
        if self.versions.weight() + num_bytes(&version) <= self.versions.capacity() / READ_AHEAD_SHARE {
            self.insert(version);
        }
    }

    /// Takes a version out of memory; whoever holds it keeps it.
    pub(super) fn remove(&self, task: &TaskName, digest: Digest) {
        self.versions.remove(&(task.clone(), digest));
    }

    /// The present counts.
    pub(super) fn stats(&self) -> ResidencyStats {
        ResidencyStats {
            versions: self.versions.len(),
            bytes: self.versions.weight(),
            loads: self.loads.load(Ordering::Relaxed),
            evictions: self.evictions.load(Ordering::Relaxed),
        }
    }
}
