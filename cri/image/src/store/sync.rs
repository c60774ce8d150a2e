//! Syncing the filesystem of the store, once for everybody who wants it at the moment.
//!
//! A syncfs makes durable what everybody has written before it began: who asks while one is running waits for the
//! next, and whoever comes before that begins shares it. A blob whose layer is being unpacked is in no hurry: it
//! waits for the sync that the layer needs anyway, instead of making the disk write in the middle of the unpacking.
//!
//! # Failures
//! The kernel tells of a page that could not be written once, to the first sync after it, whoever asks for that one. So
//! a failed sync is told to everybody who had begun to write before it: each says since when ([`Since`]).
//!
//! While something large is being written that will be synced in a moment, the disk had better not wait for that
//! moment: [`Flushing`] has it write along.

use slipway_snapshot::{Result, SnapshotError, is_full};
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// So long a blob waits for its layer's sync.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often a flusher looks.
const LOOK: Duration = Duration::from_millis(200);
/// So much written and not on disk is worth a flush.
const WORTH_FLUSHING: u64 = 32 << 20;

#[derive(Debug)]
pub(crate) struct Syncer {
    /// One directory on each filesystem of the store: usually there is one.
    filesystems: Vec<Filesystem>,
    state: Mutex<State>,
    changed: Condvar,
    /// Bytes that wait for the disk, of the whole machine.
    dirty: fn() -> u64,
}

/// It is opened once: the kernel tells of a failed write at the next sync through a descriptor that is older than it.
#[derive(Debug)]
struct Filesystem {
    path: PathBuf,
    open: Mutex<Option<File>>,
}

/// Syncs are numbered from 1.
#[derive(Debug, Default)]
struct State {
    begun: u64,
    /// The last one that succeeded.
    done: u64,
    running: bool,
    unpacking: usize,
    flushing: usize,
    flusher: bool,
    /// The last one that failed.
    failed: Option<(u64, SnapshotError)>,
}

/// When something began to be written: the last sync that was over then. A later one may fail because of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Since(u64);

/// What was written between two moments.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Written {
    since: Since,
    /// The first sync that covers it.
    ticket: u64,
}

impl Written {
    pub(crate) fn since(self) -> Since {
        self.since
    }
}

impl State {
    fn since(&self) -> Since {
        Since(self.begun - u64::from(self.running))
    }

    /// Why some of what was written since then may never be on the disk.
    fn lost(&self, since: Since) -> Result<()> {
        match &self.failed {
            Some((number, error)) if *number > since.0 => Err(again(error)),
            _ => Ok(()),
        }
    }
}

/// The same error for somebody else.
fn again(error: &SnapshotError) -> SnapshotError {
    match error {
        SnapshotError::DiskFull { act, path } => SnapshotError::DiskFull {
            act,
            path: path.clone(),
        },
        SnapshotError::Io { act, path, source } => SnapshotError::Io {
            act,
            path: path.clone(),
            source: source
                .raw_os_error()
                .map_or_else(|| source.kind().into(), io::Error::from_raw_os_error),
        },
        other => SnapshotError::Io {
            act: "sync",
            path: PathBuf::new(),
            source: io::Error::other(other.to_string()),
        },
    }
}

/// Layers are being unpacked, and will be synced.
pub(crate) struct Unpacking<'a>(&'a Syncer);

impl Drop for Unpacking<'_> {
    fn drop(&mut self) {
        self.0.lock().unpacking -= 1;
        self.0.changed.notify_all();
    }
}

/// Something is being written that will be synced: while it is held, the disk writes along.
#[derive(Debug)]
pub struct Flushing(Arc<Syncer>);

impl Drop for Flushing {
    fn drop(&mut self) {
        self.0.lock().flushing -= 1;
        self.0.changed.notify_all();
    }
}

impl Syncer {
    pub(crate) fn new(directories: &[&Path]) -> Syncer {
        let mut seen = Vec::new();
        let mut filesystems = Vec::new();
        for dir in directories {
            let device = std::fs::metadata(dir).map(|meta| meta.dev()).ok();
            if device.is_none() || !seen.contains(&device) {
                seen.push(device);
                filesystems.push(Filesystem {
                    path: dir.to_path_buf(),
                    open: Mutex::new(File::open(dir).ok()),
                });
            }
        }
        Syncer {
            filesystems,
            state: Mutex::default(),
            changed: Condvar::new(),
            dirty,
        }
    }

    /// To be asked before the first byte is written of what will be synced.
    pub(crate) fn since(&self) -> Since {
        self.lock().since()
    }

    /// What has been written since then, up to now.
    pub(crate) fn written(&self, since: Since) -> Written {
        let ticket = self.lock().begun + 1;
        Written { since, ticket }
    }

    /// Returns when everything written before the call is durable.
    pub(crate) fn sync(&self, since: Since) -> Result<()> {
        self.sync_since(self.written(since))
    }

    /// Returns when what was written is durable: at once when it is.
    pub(crate) fn sync_since(&self, written: Written) -> Result<()> {
        let mut state = self.lock();
        loop {
            state.lost(written.since)?;
            if state.done >= written.ticket {
                return Ok(());
            }
            state = match state.running {
                true => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                false => self.run(state),
            };
        }
    }

    /// Runs one sync.
    fn run<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.running = true;
        state.begun += 1;
        let number = state.begun;
        drop(state);
        let result = self.filesystems.iter().try_for_each(Filesystem::sync);
        let mut state = self.lock();
        state.running = false;
        match result {
            Ok(()) => state.done = number,
            Err(error) => state.failed = Some((number, error)),
        }
        self.changed.notify_all();
        state
    }

    /// As [`Syncer::sync_since`], in no hurry while layers are being unpacked.
    pub(crate) fn sync_behind(&self, written: Written) -> Result<()> {
        let start = Instant::now();
        let mut state = self.lock();
        while state.done < written.ticket && state.unpacking > 0 {
            state.lost(written.since)?;
            let Some(left) = PATIENCE.checked_sub(start.elapsed()) else {
                break;
            };
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(state);
        self.sync_since(written)
    }

    /// To be held while layers are unpacked that a sync will follow.
    pub(crate) fn unpacking(&self) -> Unpacking<'_> {
        self.lock().unpacking += 1;
        Unpacking(self)
    }

    /// To be held while something large may be written that a sync will follow.
    pub(crate) fn flushing(self: &Arc<Syncer>) -> Flushing {
        let mut state = self.lock();
        state.flushing += 1;
        if !state.flusher {
            let syncer = Arc::clone(self);
            let started = std::thread::Builder::new()
                .name("flusher".to_owned())
                .spawn(move || syncer.flush());
            state.flusher = started.is_ok();
        }
        Flushing(Arc::clone(self))
    }

    /// Syncs whenever there is much to write, as long as somebody asks for it.
    fn flush(&self) {
        let mut state = self.lock();
        while state.flushing > 0 {
            let waited = self.changed.wait_timeout(state, LOOK);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            if state.flushing == 0 || state.running || (self.dirty)() < WORTH_FLUSHING {
                continue;
            }
            state = self.run(state);
        }
        state.flusher = false;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Filesystem {
    fn sync(&self) -> Result<()> {
        let failed = |source: io::Error| {
            let (act, path) = ("sync", self.path.clone());
            match is_full(&source) {
                true => SnapshotError::DiskFull { act, path },
                false => SnapshotError::Io { act, path, source },
            }
        };
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.is_none() {
            *open = Some(File::open(&self.path).map_err(failed)?);
        }
        match &*open {
            Some(file) => rustix::fs::syncfs(file).map_err(|e| failed(e.into())),
            None => Ok(()),
        }
    }
}

/// What /proc/meminfo says; 0 where it says nothing.
fn dirty() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Dirty:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_sync_is_shared_by_those_who_came_before_it_began() {
        let dir = tempfile::tempdir().unwrap();
        let syncer = Arc::new(Syncer::new(&[dir.path(), dir.path()]));
        assert_eq!(syncer.filesystems.len(), 1);
        let threads: Vec<_> = (0..16)
            .map(|_| {
                let syncer = Arc::clone(&syncer);
                std::thread::spawn(move || syncer.sync(syncer.since()).unwrap())
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        let state = syncer.lock();
        assert!(state.begun <= 16 && state.done == state.begun && !state.running);
    }

    #[test]
    fn who_is_in_no_hurry_waits_for_the_sync_of_an_unpacking_or_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let syncer = Arc::new(Syncer::new(&[dir.path()]));
        for succeeds in [true, false] {
            let unpacking = syncer.unpacking();
            let before = syncer.lock().begun;
            let other = Arc::clone(&syncer);
            let waiting = std::thread::spawn(move || other.sync_behind(now(&other)).unwrap());
            std::thread::sleep(Duration::from_millis(50));
            assert!(!waiting.is_finished());
            assert_eq!(syncer.lock().begun, before);
            if succeeds {
                syncer.sync(syncer.since()).unwrap();
                waiting.join().unwrap();
                assert_eq!(syncer.lock().begun, before + 1, "one for both");
                drop(unpacking);
            } else {
                drop(unpacking);
                waiting.join().unwrap();
                assert_eq!(syncer.lock().begun, before + 1, "its own");
            }
        }
        syncer.sync_behind(now(&syncer)).unwrap();
    }

    #[test]
    fn while_something_large_is_written_the_disk_writes_along() {
        let dir = tempfile::tempdir().unwrap();
        let mut syncer = Syncer::new(&[dir.path()]);
        assert!(dirty() < 1 << 50, "bytes of memory");
        syncer.dirty = || WORTH_FLUSHING;
        let syncer = Arc::new(syncer);
        let (first, second) = (syncer.flushing(), syncer.flushing());
        drop(first);
        let written = now(&syncer);
        while syncer.lock().done < written.ticket {
            std::thread::yield_now();
        }
        drop(second);
        while syncer.lock().flusher {
            std::thread::yield_now();
        }
        let before = syncer.lock().begun;
        // What a flush has made durable needs no further sync.
        syncer.sync_since(written).unwrap();
        assert_eq!(syncer.lock().begun, before);
        drop(syncer.flushing());
    }

    #[test]
    fn a_flush_that_failed_is_told_to_everybody_who_was_writing_then_and_to_nobody_else() {
        let dir = tempfile::tempdir().unwrap();
        let gone = dir.path().join("gone");
        let mut syncer = Syncer::new(&[&gone]);
        syncer.dirty = || WORTH_FLUSHING;
        let syncer = Arc::new(syncer);
        let (first, second) = (syncer.since(), syncer.since());
        let flushing = syncer.flushing();
        while syncer.lock().failed.is_none() {
            std::thread::yield_now();
        }
        drop(flushing);
        while syncer.lock().flusher {
            std::thread::yield_now();
        }
        // The kernel has said it once and says no more.
        std::fs::create_dir(&gone).unwrap();
        let later = syncer.since();
        assert!(syncer.sync(first).is_err());
        syncer.sync(later).unwrap();
        assert!(syncer.sync(second).is_err());
        assert!(syncer.sync_behind(syncer.written(second)).is_err());
    }

    #[test]
    fn a_failed_sync_is_told_to_whoever_waited_for_it_and_who_writes_anew_tries_again() {
        let dir = tempfile::tempdir().unwrap();
        let gone = dir.path().join("gone");
        let syncer = Syncer::new(&[&gone]);
        let (first, second) = (now(&syncer), now(&syncer));
        assert!(syncer.sync_since(first).is_err());
        std::fs::create_dir(&gone).unwrap();
        // The sync that the other wanted was this one: what it had written may be what is lost.
        assert!(syncer.sync_since(second).is_err());
        syncer.sync_since(now(&syncer)).unwrap();
    }

    #[test]
    fn who_begins_to_write_while_a_sync_runs_is_told_of_its_failure() {
        let syncer = Syncer::new(&[]);
        let state = State {
            begun: 7,
            done: 6,
            running: true,
            ..State::default()
        };
        let since = state.since();
        *syncer.lock() = State {
            running: false,
            failed: Some((
                7,
                again(&SnapshotError::DiskFull {
                    act: "sync",
                    path: PathBuf::new(),
                }),
            )),
            ..state
        };
        assert!(syncer.sync(since).is_err());
        syncer.sync(syncer.since()).unwrap();
    }

    /// What was written this moment.
    fn now(syncer: &Syncer) -> Written {
        syncer.written(syncer.since())
    }
}
