//! One blob being written: hashed on the way, durable before it is visible, readable while it grows.

use super::BlobFile;
use crate::catalog::{Durability, blobs, leases};
use crate::digest::Digest;
use crate::error::{Result, StoreError, at, snap};
use crate::failpoint;
use crate::store::{Since, Store};
use sha2::Digest as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How often a waiting follower looks whether it should give up.
const LOOK: Duration = Duration::from_millis(100);

/// A blob being written. Dropping it unfinished removes what was written.
pub struct Ingest {
    store: Store,
    lease: String,
    path: PathBuf,
    file: File,
    hash: sha2::Sha256,
    written: u64,
    growth: Arc<Growth>,
    since: Since,
    finished: bool,
}

/// What a writer tells its followers.
#[derive(Debug, Default)]
struct Growth {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    written: u64,
    outcome: Outcome,
    /// Of a good one.
    digest: Option<Digest>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Outcome {
    #[default]
    Open,
    Good,
    Bad,
}

impl Growth {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }
}

impl std::fmt::Debug for Ingest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ingest")
            .field("path", &self.path)
            .field("written", &self.written)
            .finish_non_exhaustive()
    }
}

impl Ingest {
    pub(crate) fn start(store: &Store, lease: &str) -> Result<Ingest> {
        let since = store.inner.syncer.since();
        let path = store.inner.content.fresh(store.owner_id());
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(at("create", &path))?;
        Ok(Ingest {
            store: store.clone(),
            lease: lease.to_owned(),
            path,
            file,
            hash: sha2::Sha256::new(),
            written: 0,
            growth: Arc::default(),
            since,
            finished: false,
        })
    }

    /// Bytes so far: where a broken download goes on.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// A reader of the same bytes, from the start, that waits for those not yet written. It ends when the ingest
    /// is finished, and fails when the ingest is dropped or its digest is wrong: who reads to the end has
    /// read checked contents.
    ///
    /// # Errors
    /// When the file cannot be opened again.
    pub fn follow(&self) -> Result<Follower> {
        let file = File::open(&self.path).map_err(at("open", &self.path))?;
        Ok(Follower {
            file,
            position: 0,
            growth: Arc::clone(&self.growth),
            cancelled: None,
        })
    }

    /// Checks digest and size, makes the blob durable and visible, and lets the lease hold it. A blob that is
    /// there already is fine.
    ///
    /// # Errors
    /// [`StoreError::DigestMismatch`], [`StoreError::SizeMismatch`], [`StoreError::DiskFull`],
    /// [`StoreError::LeaseGone`]. What was written is gone then.
    pub fn finish(mut self, expected: Option<&Digest>, size: Option<u64>) -> Result<BlobFile> {
        let digest = self.check(expected, size)?;
        let synced = self.file.sync_all().map_err(at("sync", &self.path));
        synced.map_err(|error| self.store.note_full(&self.lease, error))?;
        let blob = self.place(digest)?;
        slipway_snapshot::sync_dir(self.store.inner.content.blobs_dir())
            .map_err(snap("make a blob's name durable"))?;
        Ok(blob)
    }

    /// As [`Ingest::finish`], in no hurry: while layers are being unpacked it waits for the sync they need anyway, half
    /// a minute at most. For a download whose followers unpack it: they are told at once that all bytes are good.
    ///
    /// # Errors
    /// As [`Ingest::finish`].
    pub fn finish_behind(mut self, expected: Option<&Digest>, size: Option<u64>) -> Result<BlobFile> {
        let store = self.store.clone();
        let syncer = &store.inner.syncer;
        // Before the followers are told: then the sync of the layer that the last of them unpacks covers this blob.
        let written = syncer.written(self.since);
        let digest = self.check(expected, size)?;
        let synced = syncer.sync_behind(written).map_err(snap("make a blob durable"));
        synced.map_err(|error| store.note_full(&self.lease, error))?;
        let blob = self.place(digest)?;
        let synced = syncer
            .sync(self.since)
            .map_err(snap("make a blob's name durable"));
        synced.map_err(|error| store.note_full(&self.lease, error))?;
        Ok(blob)
    }

    /// Compares, and tells the followers the outcome: who has read to the end then has read checked contents, though
    /// they are not durable yet.
    fn check(&mut self, expected: Option<&Digest>, size: Option<u64>) -> Result<Digest> {
        if let Some(expected) = size.filter(|size| *size != self.written) {
            return Err(StoreError::SizeMismatch {
                what: "a blob".to_owned(),
                expected,
                found: self.written,
            });
        }
        let digest = Digest::from_hash(std::mem::take(&mut self.hash));
        if let Some(expected) = expected.filter(|expected| **expected != digest) {
            let what = format!("a blob of {} bytes", self.written);
            return Err(StoreError::DigestMismatch {
                what,
                expected: *expected,
                found: digest,
            });
        }
        self.growth.tell(|state| {
            state.outcome = Outcome::Good;
            state.digest = Some(digest);
        });
        Ok(digest)
    }

    /// Renames the file into its place and records it. The write lock of the catalog is held over both, so that
    /// garbage collection sees either none of it or all.
    fn place(&mut self, digest: Digest) -> Result<BlobFile> {
        let store = self.store.clone();
        let inner = &store.inner;
        let path = inner.content.path(&digest);
        failpoint::reach("ingest.before_rename");
        let placed = inner.catalog.write(Durability::Normal, |c| {
            leases::hold(c, &self.lease, leases::Item::Blob, &digest)?;
            if blobs::size(c, &digest)?
                .and_then(|size| inner.content.file(&digest, size))
                .is_some()
            {
                return Ok(());
            }
            std::fs::rename(&self.path, &path).map_err(at("rename", &self.path))?;
            self.finished = true;
            failpoint::reach("ingest.after_rename");
            blobs::put(c, &digest, self.written)
        });
        if let Err(error) = placed {
            if self.finished {
                self.take_back(&digest);
            }
            return Err(store.note_full(&self.lease, error));
        }
        Ok(BlobFile {
            digest,
            size: self.written,
            path,
        })
    }
}

impl Ingest {
    /// The file has its name, and the catalog could not be told. Whoever places the same blob meanwhile has the name:
    /// only what no row knows is ours to remove. (What cannot be removed now is swept by garbage collection.)
    fn take_back(&self, digest: &Digest) {
        let inner = &self.store.inner;
        let path = inner.content.path(digest);
        let removed = inner
            .catalog
            .write(Durability::Normal, |c| match blobs::has_row(c, digest)? {
                true => Ok(()),
                false => std::fs::remove_file(&path).map_err(at("remove", &path)),
            });
        if let Err(error) = removed {
            tracing::warn!(path = %path.display(), %error, "a blob that could not be recorded could not be removed either");
        }
    }
}

impl Write for Ingest {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.write(bytes).inspect_err(|error| {
            if slipway_snapshot::is_full(error) {
                self.store.inner.lock_full().insert(self.lease.clone());
            }
        })?;
        self.hash.update(&bytes[..n]);
        self.written += n as u64;
        self.growth.tell(|state| state.written = self.written);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Ingest {
    fn drop(&mut self) {
        self.growth.tell(|state| {
            if state.outcome == Outcome::Open {
                state.outcome = Outcome::Bad;
            }
        });
        if !self.finished
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "an unfinished blob could not be removed");
        }
    }
}

/// Reads a blob while it is being written.
#[derive(Debug)]
pub struct Follower {
    file: File,
    position: u64,
    growth: Arc<Growth>,
    cancelled: Option<Arc<AtomicBool>>,
}

impl Follower {
    /// Makes it fail soon after the flag becomes true, also while it waits.
    #[must_use]
    pub fn cancel_when(mut self, flag: Arc<AtomicBool>) -> Follower {
        self.cancelled = Some(flag);
        self
    }

    /// What the blob is, once it is complete and its digest is as it should be: known before it is durable.
    pub fn digest(&self) -> Option<Digest> {
        self.growth.lock().digest
    }

    /// Waits for more than has been read; how far it may read, or the end.
    fn wait(&self) -> io::Result<Option<u64>> {
        let mut state = self.growth.lock();
        loop {
            if self
                .cancelled
                .as_ref()
                .is_some_and(|flag| flag.load(Ordering::Relaxed))
            {
                return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "cancelled"));
            }
            match state.outcome {
                Outcome::Bad => {
                    let why = "the transfer of this blob failed, or its digest was wrong";
                    return Err(io::Error::new(io::ErrorKind::ConnectionAborted, why));
                }
                _ if state.written > self.position => return Ok(Some(state.written)),
                Outcome::Good => return Ok(None),
                Outcome::Open => {
                    let waited = self.growth.changed.wait_timeout(state, LOOK);
                    state = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
    }
}

impl Read for Follower {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        let Some(end) = self.wait()? else { return Ok(0) };
        let room = usize::try_from(end - self.position)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let n = self.file.read_at(&mut buffer[..room], self.position)?;
        self.position += n as u64;
        Ok(n)
    }
}

impl Seek for Follower {
    /// # Errors
    /// From the end: it may not be known yet.
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
            SeekFrom::End(_) => None,
        };
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}
