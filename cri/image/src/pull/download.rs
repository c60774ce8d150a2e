//! Blobs on their way into the store, each once however many pulls want it of the same place in the same name.
//!
//! Who shares a download depends on whoever began it, so it is shared only where that makes no difference: the registry,
//! the credentials, the size and the URLs of a foreign layer are the same. The repository may be another one; when the
//! download fails for it, the others begin one of their own ([`Share::Own`]).
//!
//! A download writes into an ingest of the store while followers read from it. It has a lease of its own: it goes on
//! when the pull that began it ends, as long as another one holds it. When nobody does, it stops, and what was
//! written is removed.
//!
//! Order that matters: the outcome is told before the ingest is dropped, so that a follower's failure is never seen
//! earlier than its cause.

use super::error::PullError;
use super::fetch::{Fetch, Piece, Sink, Stop};
use crate::content::{BlobFile, Follower, Ingest};
use crate::digest::Digest;
use crate::error::StoreError;
use crate::held::Held;
use crate::registry::Credentials;
use crate::registry::client::Session;
use crate::registry::failure::Failure;
use crate::store::{Lease, Store};
use oci_spec::image::Descriptor;
use std::collections::HashMap;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

/// Pieces between the network and the disk; a piece is what one read of a socket brings.
const PIECES: usize = 4;

/// The downloads of a process.
#[derive(Debug, Default)]
pub(crate) struct Downloads {
    current: Mutex<HashMap<Key, Weak<Download>>>,
}

/// What makes two downloads the same.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    digest: Digest,
    size: u64,
    urls: Vec<String>,
    registry: String,
    credentials: Option<Credentials>,
}

/// Whose downloads a pull may wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Share {
    /// Also those that other pulls began.
    All,
    /// Its own.
    Own,
}

/// One download, held by those who want the blob.
#[derive(Debug)]
pub(crate) struct Download {
    pub digest: Digest,
    session: Weak<Session>,
    shared: Arc<Shared>,
    outcome: watch::Receiver<Outcome>,
    stopped: CancellationToken,
    _stop: DropGuard,
}

/// What remains to be waited for when a download is let go.
pub(crate) struct Parting {
    outcome: watch::Receiver<Outcome>,
    stopped: CancellationToken,
}

impl Parting {
    /// Waits until nothing of the download is left, unless somebody else wants it still.
    pub async fn gone(mut self) {
        let over = self.outcome.borrow().is_some();
        if over || self.stopped.is_cancelled() {
            // Its task holds the other end until the file is gone.
            while self.outcome.changed().await.is_ok() {}
        }
    }
}

type Outcome = Option<Result<(), PullError>>;

#[derive(Debug)]
struct Shared {
    /// `None` when the download is over or all bytes are being made durable.
    ingest: Mutex<Option<Ingest>>,
    done: Arc<AtomicU64>,
    /// What keeps the blob until everybody has it under a lease of his own.
    _lease: Held,
}

/// Where a layer's blob can be read.
pub(crate) enum Source {
    /// It is in the store.
    Here(BlobFile),
    /// It is on its way.
    Coming(Arc<Download>, Follower),
}

impl Downloads {
    /// The blob of a descriptor, or its download, begun now if need be. Blocks: not for async code.
    ///
    /// # Errors
    /// What the store answers.
    pub fn want(
        &self,
        store: &Store,
        session: &Arc<Session>,
        descriptor: &Descriptor,
        digest: Digest,
        lease: &Lease,
        share: Share,
    ) -> Result<Source, StoreError> {
        let key = Key {
            digest,
            size: descriptor.size(),
            urls: descriptor.urls().clone().unwrap_or_default(),
            registry: session.reference.registry().to_owned(),
            credentials: session.explicit().cloned(),
        };
        loop {
            if let Some(file) = lease.blob(&digest)? {
                return Ok(Source::Here(file));
            }
            let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
            current.retain(|_, download| download.strong_count() > 0);
            let known = current.get(&key).and_then(Weak::upgrade);
            match known.filter(|download| share == Share::All || download.is_of(session)) {
                Some(download) if !download.is_over() => {
                    if let Some(ingest) = &*download.shared.ingest() {
                        let follower = ingest.follow()?;
                        return Ok(Source::Coming(Arc::clone(&download), follower));
                    }
                    drop(current);
                    // Its last bytes are being made durable, or it fails this moment.
                    let mut outcome = download.outcome.clone();
                    let _ = Handle::current().block_on(outcome.wait_for(Option::is_some));
                }
                // One that ended well has left the blob: the next look finds it, unless it failed.
                Some(download) if download.succeeded() && lease.blob(&digest)?.is_some() => {}
                _ => {
                    let (download, follower) = begin(store, session, descriptor, digest)?;
                    current.insert(key, Arc::downgrade(&download));
                    return Ok(Source::Coming(download, follower));
                }
            }
        }
    }
}

impl Shared {
    fn ingest(&self) -> MutexGuard<'_, Option<Ingest>> {
        self.ingest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Download {
    /// Whether this session began it.
    pub fn is_of(&self, session: &Arc<Session>) -> bool {
        std::ptr::eq(self.session.as_ptr(), Arc::as_ptr(session))
    }

    /// Bytes so far.
    pub fn done(&self) -> u64 {
        self.shared.done.load(Ordering::Relaxed)
    }

    /// Waits for the end.
    pub async fn end(&self) -> Result<(), PullError> {
        let mut outcome = self.outcome.clone();
        let over = outcome.wait_for(Option::is_some).await;
        match over.map(|result| result.clone()) {
            Ok(Some(result)) => result,
            // Its task panicked: nothing says why.
            _ => Err(PullError::from(StoreError::Cancelled {
                what: format!("the download of {}", self.digest),
            })),
        }
    }

    /// For whoever lets it go and wants to see it gone.
    pub fn parting(&self) -> Parting {
        Parting {
            outcome: self.outcome.clone(),
            stopped: self.stopped.clone(),
        }
    }

    /// Whether it is about to end: all bytes are here, or it fails this moment.
    pub fn is_ending(&self) -> bool {
        !self.is_over() && self.shared.ingest().is_none()
    }

    fn is_over(&self) -> bool {
        self.outcome.borrow().is_some() || self.outcome.has_changed().is_err()
    }

    /// Whether it is over and did not succeed.
    pub fn failed(&self) -> bool {
        self.is_over() && !self.succeeded()
    }

    fn succeeded(&self) -> bool {
        matches!(&*self.outcome.borrow(), Some(Ok(())))
    }
}

fn begin(
    store: &Store,
    session: &Arc<Session>,
    descriptor: &Descriptor,
    digest: Digest,
) -> Result<(Arc<Download>, Follower), StoreError> {
    let lease = store.lease(&format!("download of {digest}"))?;
    let ingest = store.ingest(&lease)?;
    let follower = ingest.follow()?;
    let shared = Arc::new(Shared {
        ingest: Mutex::new(Some(ingest)),
        done: Arc::default(),
        _lease: Held::new(lease),
    });
    let (told, outcome) = watch::channel(None);
    let stop = CancellationToken::new();
    let task = Task {
        store: store.clone(),
        session: Arc::clone(session),
        descriptor: descriptor.clone(),
        digest,
        shared: Arc::clone(&shared),
    };
    let stopped = stop.clone();
    Handle::current().spawn(async move { task.run(stopped, told).await });
    Ok((
        Arc::new(Download {
            digest,
            session: Arc::downgrade(session),
            shared,
            outcome,
            stopped: stop.clone(),
            _stop: stop.drop_guard(),
        }),
        follower,
    ))
}

struct Task {
    store: Store,
    session: Arc<Session>,
    descriptor: Descriptor,
    digest: Digest,
    shared: Arc<Shared>,
}

impl Task {
    async fn run(self, stop: CancellationToken, told: watch::Sender<Outcome>) {
        let cancelled = || PullError::Cancelled {
            reference: self.session.reference.to_string(),
        };
        let result = tokio::select! {
            biased;
            () = stop.cancelled() => Err(cancelled()),
            result = self.transfer() => result,
        };
        told.send_replace(Some(result));
        let shared = self.shared;
        // Removes the file, when there is one still.
        let _ = tokio::task::spawn_blocking(move || shared.ingest().take()).await;
    }

    async fn transfer(&self) -> Result<(), PullError> {
        // The semaphore is never closed.
        let own = self.session.transfers.acquire().await.ok();
        let turn = (own, self.session.registry.transfers.acquire().await.ok());
        let (pieces, received) = mpsc::channel(PIECES);
        let (shared, root) = (Arc::clone(&self.shared), self.store.root().to_owned());
        let (digest, size) = (self.digest, self.descriptor.size());
        let writer = tokio::task::spawn_blocking(move || write(&shared, received, &digest, size, &root));
        let sink = Sink {
            pieces,
            done: Arc::clone(&self.shared.done),
        };
        let mut fetch = Fetch::new(&self.session, &self.descriptor, digest, sink);
        let fetched = fetch.run().await;
        let hosts = fetch.hosts.join(" and ");
        drop(fetch);
        // What is left is the disk's: the next transfer need not wait for it.
        drop(turn);
        let (reference, what) = (&self.session.reference, format!("layer {digest}"));
        if let Err(Stop::Failure(failure)) = fetched {
            return Err(failure.pull(reference, &what));
        }
        let cancelled = StoreError::Cancelled {
            what: format!("writing {what}"),
        };
        match writer.await.unwrap_or(Err(cancelled)) {
            Ok(()) => Ok(()),
            Err(error @ (StoreError::DigestMismatch { .. } | StoreError::SizeMismatch { .. })) => {
                Err(Failure::Corrupt {
                    host: hosts,
                    detail: error.to_string(),
                }
                .pull(reference, &what))
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// Takes the pieces to the ingest, and finishes it after the last.
fn write(
    shared: &Shared,
    mut pieces: mpsc::Receiver<Piece>,
    digest: &Digest,
    size: u64,
    root: &std::path::Path,
) -> Result<(), StoreError> {
    let cancelled = || StoreError::Cancelled {
        what: format!("writing blob {digest}"),
    };
    while let Some(piece) = pieces.blocking_recv() {
        match piece {
            Piece::Bytes(bytes) => {
                let mut ingest = shared.ingest();
                let ingest = ingest.as_mut().ok_or_else(cancelled)?;
                ingest
                    .write_all(&bytes)
                    .map_err(crate::error::at("write a blob under", root))?;
            }
            Piece::End => {
                let ingest = shared.ingest().take().ok_or_else(cancelled)?;
                return ingest.finish_behind(Some(digest), Some(size)).map(drop);
            }
        }
    }
    Err(cancelled())
}
