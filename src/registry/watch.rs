//! Follows the prompt store: the system's notifications of a folder, and a poll for buckets and for file systems that send
//! none.

use std::{
    io,
    path::{Component, Path, PathBuf},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use notify::{
    Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher as _,
    event::{AccessKind, AccessMode},
};

use super::Registry;

/// A change is read once the folder has been quiet for this long.
const QUIET: Duration = Duration::from_millis(200);
/// A folder that is never quiet is read this often.
const MAX_DELAY: Duration = Duration::from_secs(2);
/// Looking at a folder takes at most this part of the time: with very many tasks it is done less often. Looking at a bucket is
/// mostly waiting for it, which costs nothing.
const SCAN_SHARE: u32 = 20;
/// How often versions are looked for that have become too old to be kept.
const COLLECT_EVERY: Duration = Duration::from_secs(10 * 60);
/// With more tasks than this no notifications are asked for: each folder would cost the system and this process memory.
const MAX_NOTIFIED_TASKS: usize = 2_000;

/// Follows the folder while it lives.
#[derive(Debug)]
pub struct Watcher {
    signals: mpsc::Sender<Signal>,
    /// Ends the reading ahead.
    stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    /// `None` where the system cannot notify; the poll does it alone then.
    _notifications: Option<RecommendedWatcher>,
}

enum Signal {
    Changed,
    Stop,
}

impl Watcher {
    pub(super) fn start(registry: &Arc<Registry>) -> io::Result<Self> {
        let (signals, mail) = mpsc::channel();
        let poll = registry.config.poll_interval;
        let notifications = match registry.store.notifying_folder() {
            Some(_) if registry.tasks.len() > MAX_NOTIFIED_TASKS => {
                let tasks = registry.tasks.len();
                tracing::info!(tasks, "too many tasks for change notifications; checking the folder every {poll:?}");
                None
            }
            Some(root) => notifications(root, signals.clone())
                .inspect_err(|e| {
                    tracing::warn!(path = %root.display(), error = %e, "the system sends no change notifications; checking the folder every {poll:?}");
                })
                .ok(),
            None => None,
        };
        let stopping = Arc::new(AtomicBool::new(false));
        let registry = Arc::downgrade(registry);
        let stop = Arc::clone(&stopping);
        let thread = std::thread::Builder::new().name("prompts-watcher".into()).spawn(move || {
            if let Some(registry) = registry.upgrade() {
                registry.read_ahead(|| !stop.load(Ordering::Relaxed));
            }
            follow(&registry, &mail, poll, &stop);
        })?;
        // A change between the registry's last scan and the first notification.
        let _ = signals.send(Signal::Changed);
        Ok(Self { signals, stopping, thread: Some(thread), _notifications: notifications })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Relaxed);
        let _ = self.signals.send(Signal::Stop);
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!("the thread that watched the prompts' folder had panicked");
        }
    }
}

fn notifications(root: &Path, signals: mpsc::Sender<Signal>) -> notify::Result<RecommendedWatcher> {
    let watched: PathBuf = root.to_owned();
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
        if event.map_or(true, |event| is_change(&event, &watched)) {
            let _ = signals.send(Signal::Changed);
        }
    })?;
    watcher.watch(root, RecursiveMode::Recursive)?;
    Ok(watcher)
}

/// Whether an event may have changed what is served. Reading must not count, or each scan would
/// cause the next; neither must the staging folders of this and other processes.
fn is_change(event: &Event, root: &Path) -> bool {
    let wrote = match event.kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => true,
        EventKind::Access(_) => event.need_rescan(),
        _ => true,
    };
    let hidden = |path: &PathBuf| {
        let below = path.strip_prefix(root).ok().and_then(|below| below.components().next());
        matches!(below, Some(Component::Normal(name)) if name.to_string_lossy().starts_with('.'))
    };
    wrote && (event.paths.is_empty() || !event.paths.iter().all(hidden))
}

fn follow(registry: &Weak<Registry>, mail: &Receiver<Signal>, interval: Duration, stop: &AtomicBool) {
    let mut poll = interval;
    let mut collected = Instant::now();
    loop {
        match mail.recv_timeout(poll) {
            Ok(Signal::Changed) => {
                if !wait_for_quiet(mail) {
                    return;
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Ok(Signal::Stop) | Err(RecvTimeoutError::Disconnected) => return,
        }
        let Some(registry) = registry.upgrade() else { return };
        let began = Instant::now();
        let scanned = registry.rescan();
        // From one look to the next, however long it took.
        poll = interval.saturating_sub(began.elapsed()).max(interval / 2);
        match scanned {
            Ok(()) if registry.store.notifying_folder().is_some() => poll = interval.max(began.elapsed() * SCAN_SHARE),
            Ok(()) => {}
            // That it does not answer was logged when it began.
            Err(error) => tracing::debug!(%error, "cannot read the prompt store; serving what was read before"),
        }
        if collected.elapsed() >= COLLECT_EVERY {
            registry.collect_all(|| !stop.load(Ordering::Relaxed));
            collected = Instant::now();
        }
    }
}

/// Whether to go on.
fn wait_for_quiet(mail: &Receiver<Signal>) -> bool {
    let first = Instant::now();
    while first.elapsed() < MAX_DELAY {
        match mail.recv_timeout(QUIET) {
            Ok(Signal::Changed) => {}
            Err(RecvTimeoutError::Timeout) => return true,
            Ok(Signal::Stop) | Err(RecvTimeoutError::Disconnected) => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests;
