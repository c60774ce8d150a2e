//! Syncing the filesystem of the store, once for everybody who wants it at the moment.
//!
//! A syncfs makes durable what everybody has written before it began: who asks while one is running waits for the
//! next, and whoever comes before that begins shares it. A blob whose layer is being unpacked is in no hurry: it
//! waits for the sync that the layer needs anyway, instead of making the disk write in the middle of the unpacking.

use slipway_snapshot::{Result, sync_filesystem};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// So long a blob waits for its layer's sync.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub(crate) struct Syncer {
    /// One directory on each filesystem of the store: usually there is one.
    filesystems: Vec<PathBuf>,
    state: Mutex<State>,
    changed: Condvar,
}

/// Syncs are numbered from 1.
#[derive(Debug, Default)]
struct State {
    begun: u64,
    /// The last one that succeeded.
    done: u64,
    running: bool,
    unpacking: usize,
}

/// Layers are being unpacked, and will be synced.
pub(crate) struct Unpacking<'a>(&'a Syncer);

impl Drop for Unpacking<'_> {
    fn drop(&mut self) {
        self.0.lock().unpacking -= 1;
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
                filesystems.push(dir.to_path_buf());
            }
        }
        Syncer {
            filesystems,
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Returns when everything written before the call is durable.
    pub(crate) fn sync(&self) -> Result<()> {
        let mut state = self.lock();
        let wanted = state.begun + 1;
        while state.done < wanted {
            if state.running {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            // Ours; also when one that would have done for us has failed.
            state.running = true;
            state.begun += 1;
            let number = state.begun;
            drop(state);
            let result = self.sync_now();
            state = self.lock();
            state.running = false;
            if result.is_ok() {
                state.done = number;
            }
            self.changed.notify_all();
            result?;
        }
        Ok(())
    }

    /// The number of the first sync that covers what has been written up to now.
    pub(crate) fn ticket(&self) -> u64 {
        self.lock().begun + 1
    }

    /// Returns when what had been written when the ticket was taken is durable; in no hurry while layers are being
    /// unpacked.
    pub(crate) fn sync_behind(&self, ticket: u64) -> Result<()> {
        let start = Instant::now();
        let mut state = self.lock();
        while state.done < ticket && state.unpacking > 0 {
            let Some(left) = PATIENCE.checked_sub(start.elapsed()) else {
                break;
            };
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let done = state.done >= ticket;
        drop(state);
        if done { Ok(()) } else { self.sync() }
    }

    /// To be held while layers are unpacked that a sync will follow.
    pub(crate) fn unpacking(&self) -> Unpacking<'_> {
        self.lock().unpacking += 1;
        Unpacking(self)
    }

    fn sync_now(&self) -> Result<()> {
        for filesystem in &self.filesystems {
            sync_filesystem(filesystem)?;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
                std::thread::spawn(move || syncer.sync().unwrap())
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
            let waiting = std::thread::spawn(move || other.sync_behind(other.ticket()).unwrap());
            std::thread::sleep(Duration::from_millis(50));
            assert!(!waiting.is_finished());
            assert_eq!(syncer.lock().begun, before);
            if succeeds {
                syncer.sync().unwrap();
                waiting.join().unwrap();
                assert_eq!(syncer.lock().begun, before + 1, "one for both");
                drop(unpacking);
            } else {
                drop(unpacking);
                waiting.join().unwrap();
                assert_eq!(syncer.lock().begun, before + 1, "its own");
            }
        }
        syncer.sync_behind(syncer.ticket()).unwrap();
    }

    #[test]
    fn a_failed_sync_is_told_to_whoever_made_it_and_the_next_tries_again() {
        let dir = tempfile::tempdir().unwrap();
        let gone = dir.path().join("gone");
        let syncer = Syncer::new(&[&gone]);
        assert!(syncer.sync().is_err());
        std::fs::create_dir(&gone).unwrap();
        syncer.sync().unwrap();
    }
}
