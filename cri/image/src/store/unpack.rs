//! Unpacking an image's layers side by side, and committing them in order.
//!
//! ```text
//!  blob ─▶ check digest and size ─▶ decompress ─▶ hash (DiffID) ─▶ tar ─▶ directory     a layer a worker
//!                                                                             │
//!  bottom to top:  fix-ups from the layers below ─▶ one syncfs ─▶ markers ─▶ one syncfs ─▶ rows
//! ```
//! One syncfs for all layers of an image, not one a layer: nothing is visible before the last of them is
//! unpacked anyway, and a syncfs writes the whole filesystem, whoever else is writing to it.

use super::layers::Ready;
use super::{Layer, Lease, Since, Store};
use crate::catalog::snapshots::NewSnapshot;
use crate::catalog::{Durability, leases, snapshots};
use crate::codec::{Window, WindowTooLarge, decoder};
use crate::digest::{ChainId, DiffId, Digest};
use crate::error::{Result, StoreError, snap};
use crate::failpoint;
use oci_spec::image::Descriptor;
use sha2::Digest as _;
use slipway_snapshot::tar::TarError;
use slipway_snapshot::unpack::{Limits, NameBudget, Options, UnpackError, Unpacked, fix_up, unpack};
use slipway_snapshot::{SnapshotId, Snapshotter};
use std::cell::RefCell;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// More layers at a time only fight for the disk.
const MOST_WORKERS: usize = 4;

/// One layer to unpack.
pub struct LayerSource {
    /// Media type, digest and size of the blob.
    pub descriptor: Descriptor,
    /// The blob's bytes; read again from the start where that needs more memory than at first.
    pub reader: Box<dyn Blob>,
    /// The bytes need no checking against the descriptor: they come from the store or a [`crate::Follower`].
    pub verified: bool,
    /// What the uncompressed tar must be.
    pub diff_id: DiffId,
}

/// What a layer's bytes come from.
pub trait Blob: Read + Seek + Send {}

impl<T: Read + Seek + Send> Blob for T {}

/// Blobs with large windows ([`Window::Large`]) that are read at the same time, by all of the process's pulls. Each has
/// arrived: nobody waits here for somebody else's network.
static LARGE_WINDOWS: Mutex<()> = Mutex::new(());

/// How layers are unpacked.
#[derive(Clone, Default)]
pub struct UnpackOptions {
    /// Layers at a time; 0: as many as there are processors, at most 4.
    pub workers: usize,
    /// What one layer may hold at most; the memory for names is that of all together.
    pub limits: Limits,
    /// Told of each layer's uncompressed bytes as they are written, by its position. Called from many threads.
    pub progress: Option<Arc<dyn Fn(usize, u64) + Send + Sync>>,
    /// Becomes true when one layer failed; whoever sets it makes the unpacking give up. To be shared with
    /// followers ([`crate::Follower::cancel_when`]), so that they do not wait for what nobody needs.
    pub cancelled: Option<Arc<AtomicBool>>,
}

/// A layer that is not in the store yet.
struct Job {
    position: usize,
    snapshot: SnapshotId,
    source: LayerSource,
}

/// A layer's directory, filled.
struct Done {
    position: usize,
    snapshot: SnapshotId,
    diff_id: DiffId,
    tar_bytes: u64,
    unpacked: Unpacked,
}

impl Store {
    /// Unpacks an image's layers (bottom first) in parallel, checks digests and DiffIDs while they stream, fixes
    /// what depends on the layers below in order, and commits them with one syncfs. Layers that are here already
    /// are not read. On failure nothing of it remains.
    ///
    /// # Errors
    /// [`StoreError::Unpack`], [`StoreError::DigestMismatch`], [`StoreError::Read`], [`StoreError::DiskFull`].
    pub fn unpack_layers(
        &self,
        layers: Vec<LayerSource>,
        options: &UnpackOptions,
        lease: &Lease,
    ) -> Result<Vec<Layer>> {
        let since = self.inner.syncer.since();
        let diffs: Vec<DiffId> = layers.iter().map(|layer| layer.diff_id).collect();
        let chains = ChainId::all(&diffs);
        let mut present: Vec<Option<Layer>> = Vec::with_capacity(chains.len());
        for chain in &chains {
            present.push(lease.layer(chain)?);
        }
        let jobs = self.intend(layers, &chains, &present, lease)?;
        if jobs.is_empty() {
            return Ok(present.into_iter().flatten().collect());
        }
        let _unpacking = self.inner.syncer.unpacking();
        let _flushing = self.inner.syncer.flushing();
        let made: Vec<SnapshotId> = jobs.iter().map(|job| job.snapshot.clone()).collect();
        failpoint::reach("unpack.after_rows");
        self.fill_and_commit(jobs, present, options, lease, since)
            .map_err(|error| {
                self.give_up(&made);
                self.note_full(lease.name(), error)
            })
    }

    /// Writes down which directories are about to be made.
    fn intend(
        &self,
        layers: Vec<LayerSource>,
        chains: &[ChainId],
        present: &[Option<Layer>],
        lease: &Lease,
    ) -> Result<Vec<Job>> {
        let mut jobs = Vec::new();
        for (position, source) in layers.into_iter().enumerate() {
            if present[position].is_none() {
                let snapshot = SnapshotId::new_random().map_err(snap("make a snapshot's name"))?;
                jobs.push(Job {
                    position,
                    snapshot,
                    source,
                });
            }
        }
        self.inner.catalog.write(Durability::Normal, |c| {
            leases::check(c, lease.name())?;
            for job in &jobs {
                let parent = job.position.checked_sub(1).map(|below| &chains[below]);
                let new = NewSnapshot {
                    id: &job.snapshot,
                    key: None,
                    parent,
                    below: None,
                    lease: lease.name(),
                    read_only: false,
                };
                snapshots::add(c, &new)?;
            }
            Ok(())
        })?;
        Ok(jobs)
    }

    fn fill_and_commit(
        &self,
        jobs: Vec<Job>,
        mut present: Vec<Option<Layer>>,
        options: &UnpackOptions,
        lease: &Lease,
        since: Since,
    ) -> Result<Vec<Layer>> {
        // Until the fix-ups are done, which remember names.
        let names = self.inner.names.budget(options.limits.names);
        let mut done = self.fill_all(jobs, options, &names)?;
        done.sort_by_key(|one| one.position);
        failpoint::reach("unpack.after_files");
        // Bottom to top; the layers below each are there by then, old or new.
        let mut below: Vec<SnapshotId> = Vec::new();
        let mut ready = done.into_iter().peekable();
        let mut filled: Vec<(usize, Ready)> = Vec::new();
        for (position, layer) in present.iter().enumerate() {
            let snapshot = match (layer, ready.next_if(|one| one.position == position)) {
                (Some(layer), _) => layer.snapshot.clone(),
                (None, Some(one)) => {
                    let snapshot = one.snapshot.clone();
                    filled.push((position, self.fix(one, &below)?));
                    snapshot
                }
                (None, None) => continue,
            };
            below.insert(0, snapshot);
        }
        self.commit_runs(filled, &mut present, lease, since)?;
        Ok(present.into_iter().flatten().collect())
    }

    /// Commits filled layers: usually one run on what was there, with one syncfs. Where old layers lie between new
    /// ones, each run by itself.
    fn commit_runs(
        &self,
        filled: Vec<(usize, Ready)>,
        present: &mut [Option<Layer>],
        lease: &Lease,
        since: Since,
    ) -> Result<()> {
        let mut filled = filled.into_iter().peekable();
        while let Some((first, ready)) = filled.next() {
            let mut run = vec![ready];
            while let Some((_, ready)) = filled.next_if(|(position, _)| *position == first + run.len()) {
                run.push(ready);
            }
            let base = first
                .checked_sub(1)
                .and_then(|below| present[below].as_ref())
                .map(|layer| layer.chain);
            let written = self.inner.syncer.written(since);
            let committed = self.commit_ready(base.as_ref(), run, lease, written)?;
            for (at, layer) in committed.into_iter().enumerate() {
                present[first + at] = Some(layer);
            }
        }
        Ok(())
    }

    fn fix(&self, one: Done, below: &[SnapshotId]) -> Result<Ready> {
        let overlay = &self.inner.overlay;
        let parents: Vec<PathBuf> = below.iter().map(|id| overlay.fs_dir(id)).collect();
        let added = fix_up(&overlay.fs_dir(&one.snapshot), &parents, &one.unpacked.fix_ups)
            .map_err(|source| unpack_error(format!("layer {}", one.diff_id), source))?;
        Ok(Ready {
            snapshot: one.snapshot,
            diff_id: one.diff_id,
            tar_bytes: one.tar_bytes,
            usage: Some(one.unpacked.usage + added),
            options: None,
        })
    }

    /// Unpacks all jobs with a few workers; the first failure stops the others and is the answer.
    fn fill_all(&self, jobs: Vec<Job>, options: &UnpackOptions, names: &NameBudget) -> Result<Vec<Done>> {
        let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let workers = if options.workers == 0 {
            processors.min(MOST_WORKERS)
        } else {
            options.workers
        };
        let workers = workers.min(jobs.len());
        let cancelled = options.cancelled.clone().unwrap_or_default();
        let queue = Mutex::new(jobs.into_iter());
        let results: Mutex<Vec<Result<Done>>> = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| {
                    loop {
                        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
                        let Some(job) = job else { return };
                        let result = self.fill_one(job, options, names, &cancelled);
                        if result.is_err() {
                            cancelled.store(true, Ordering::Relaxed);
                        }
                        results
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .push(result);
                    }
                });
            }
        });
        let mut done = Vec::new();
        let mut failure = None;
        for result in results.into_inner().unwrap_or_else(PoisonError::into_inner) {
            match (result, &failure) {
                (Ok(one), _) => done.push(one),
                // Those that were told to stop say so; the one that failed first says why.
                (Err(error), None) => failure = Some(error),
                (Err(error), Some(StoreError::Cancelled { .. })) => failure = Some(error),
                (Err(_), Some(_)) => {}
            }
        }
        match failure {
            Some(error) => Err(error),
            None => Ok(done),
        }
    }

    fn fill_one(
        &self,
        job: Job,
        options: &UnpackOptions,
        names: &NameBudget,
        cancelled: &AtomicBool,
    ) -> Result<Done> {
        let Job {
            position,
            snapshot,
            mut source,
        } = job;
        let what = format!("layer {}", source.descriptor.digest());
        check_media_type(&what, source.descriptor.media_type().as_ref())?;
        if cancelled.load(Ordering::Relaxed) {
            return Err(StoreError::Cancelled { what });
        }
        let overlay = &self.inner.overlay;
        overlay
            .prepare(&snapshot)
            .map_err(snap(format!("make a directory for {what}")))?;
        let told = |bytes| {
            if let Some(progress) = &options.progress {
                progress(position, bytes);
            }
        };
        let unpack_options = Options {
            limits: options.limits,
            names: Some(names),
            cancelled: Some(cancelled),
            progress: Some(&told),
            ..Options::default()
        };
        let diff_id = source.diff_id;
        let dir = overlay.fs_dir(&snapshot);
        let (unpacked, tar_bytes) = match stream(&mut source, &what, &dir, &unpack_options, Window::Usual) {
            Err(error) if wants_large_window(&error) => {
                // All of it has to be here before others may have to wait for it.
                let arrived = io::copy(&mut source.reader, &mut io::sink());
                arrived
                    .and_then(|_| source.reader.rewind())
                    .map_err(|source| StoreError::Read {
                        what: what.clone(),
                        source,
                    })?;
                let _turn = LARGE_WINDOWS.lock().unwrap_or_else(PoisonError::into_inner);
                let again = || {
                    overlay.remove(&snapshot)?;
                    overlay.prepare(&snapshot)
                };
                again().map_err(snap(format!("make a directory for {what}")))?;
                stream(&mut source, &what, &dir, &unpack_options, Window::Large)?
            }
            streamed => streamed?,
        };
        Ok(Done {
            position,
            snapshot,
            diff_id,
            tar_bytes,
            unpacked,
        })
    }

    /// Undoes what was begun and not committed.
    fn give_up(&self, made: &[SnapshotId]) {
        let doom = || {
            self.inner.catalog.write(Durability::Normal, |c| {
                made.iter().try_for_each(|id| snapshots::doom(c, id).map(|_| ()))
            })
        };
        let result = self
            .inner
            .with_reserve(doom)
            .and_then(|()| self.remove_doomed_snapshots().map(drop));
        self.inner.refill_reserve();
        if let Err(error) = result {
            tracing::warn!(%error, "layers that could not be unpacked could not be removed either");
        }
    }
}

/// Brings one blob into a directory, and checks it and its tar on the way.
fn stream(
    source: &mut LayerSource,
    what: &str,
    dir: &Path,
    options: &Options<'_>,
    window: Window,
) -> Result<(Unpacked, u64)> {
    let expected = Digest::try_from(source.descriptor.digest()).map_err(|source| StoreError::Digest {
        what: "a layer's descriptor",
        source,
    })?;
    let checked = Checked::new(&mut source.reader, source.descriptor.size(), source.verified);
    let blob = Rc::new(RefCell::new(checked));
    let unpacked = decode(&blob, what, &source.diff_id, dir, options, window);
    // A wrong blob shows in many ways; that it is wrong is what matters. (Not so when the disk, the caller or the source
    // ended it.)
    let beside = |error: &StoreError| {
        error.is_disk_full() || is_cancelled(error) || wants_large_window(error) || blob.borrow().failed
    };
    if !source.verified && !unpacked.as_ref().is_err_and(beside) {
        blob.borrow_mut().check(what, &expected)?;
    }
    unpacked
}

fn decode(
    blob: &Rc<RefCell<Checked<'_>>>,
    what: &str,
    diff_id: &DiffId,
    dir: &Path,
    options: &Options<'_>,
    window: Window,
) -> Result<(Unpacked, u64)> {
    let read = |source| StoreError::Read {
        what: what.to_owned(),
        source,
    };
    let (_, decoded) = decoder(Box::new(Shared(Rc::clone(blob))), window).map_err(read)?;
    let mut tar = Hashed {
        inner: decoded,
        hash: sha2::Sha256::new(),
        bytes: 0,
    };
    let unpacked = unpack(dir, &mut tar, options).map_err(|source| unpack_error(what.to_owned(), source))?;
    let found = Digest::from_hash(tar.hash);
    if found != *diff_id.digest() {
        let what = format!("the uncompressed tar of {what}");
        return Err(StoreError::DigestMismatch {
            what,
            expected: *diff_id.digest(),
            found,
        });
    }
    Ok((unpacked, tar.bytes))
}

/// Counts and hashes a blob's bytes as they are read.
struct Checked<'a> {
    inner: &'a mut dyn Read,
    hash: Option<sha2::Sha256>,
    read: u64,
    size: u64,
    failed: bool,
}

impl<'a> Checked<'a> {
    fn new(inner: &'a mut dyn Read, size: u64, verified: bool) -> Checked<'a> {
        Checked {
            inner,
            hash: (!verified).then(sha2::Sha256::new),
            read: 0,
            size,
            failed: false,
        }
    }

    /// Reads what the decoder left, and compares.
    fn check(&mut self, what: &str, expected: &Digest) -> Result<()> {
        let mut buffer = vec![0u8; 64 << 10];
        while self.read <= self.size {
            match self.read(&mut buffer) {
                Ok(0) => break,
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(StoreError::Read {
                        what: what.to_owned(),
                        source,
                    });
                }
            }
        }
        if self.read != self.size {
            return Err(StoreError::SizeMismatch {
                what: what.to_owned(),
                expected: self.size,
                found: self.read,
            });
        }
        let found = Digest::from_hash(self.hash.take().unwrap_or_default());
        if found != *expected {
            return Err(StoreError::DigestMismatch {
                what: what.to_owned(),
                expected: *expected,
                found,
            });
        }
        Ok(())
    }
}

impl Read for Checked<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // One byte more than there should be is enough to know that it is wrong.
        let room = usize::try_from((self.size + 1).saturating_sub(self.read)).unwrap_or(usize::MAX);
        let room = room.min(buffer.len());
        let read = self.inner.read(&mut buffer[..room]);
        match &read {
            Ok(n) => {
                self.read += *n as u64;
                if let Some(hash) = &mut self.hash {
                    hash.update(&buffer[..*n]);
                }
            }
            Err(e) => self.failed = e.kind() != io::ErrorKind::Interrupted,
        }
        read
    }
}

/// The blob, which the decoder reads and the check at the end reads on.
struct Shared<'a>(Rc<RefCell<Checked<'a>>>);

impl Read for Shared<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.borrow_mut().read(buffer)
    }
}

/// Hashes the tar as it is read.
struct Hashed<'a> {
    inner: Box<dyn Read + 'a>,
    hash: sha2::Sha256,
    bytes: u64,
}

impl Read for Hashed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.hash.update(&buffer[..n]);
        self.bytes += n as u64;
        Ok(n)
    }
}

/// Whether a larger window is all that is missing.
fn wants_large_window(error: &StoreError) -> bool {
    match error {
        StoreError::Unpack {
            source: UnpackError::Tar(TarError::Read(source)),
            ..
        } => WindowTooLarge::is_cause(source),
        _ => false,
    }
}

fn is_cancelled(error: &StoreError) -> bool {
    matches!(error, StoreError::Cancelled { .. })
}

pub(crate) fn unpack_error(what: String, source: UnpackError) -> StoreError {
    match source {
        UnpackError::Cancelled => StoreError::Cancelled { what },
        source if source.is_disk_full() => StoreError::DiskFull {
            act: format!("unpack {what}"),
        },
        source => StoreError::Unpack { what, source },
    }
}

/// Layers of other kinds (encrypted, WebAssembly, …) are nobody's root filesystem.
fn check_media_type(what: &str, media_type: &str) -> Result<()> {
    let base = media_type.split(';').next().unwrap_or("").trim();
    let known = matches!(
        base,
        "application/vnd.oci.image.layer.v1.tar"
            | "application/vnd.oci.image.layer.v1.tar+gzip"
            | "application/vnd.oci.image.layer.v1.tar+zstd"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"
            | "application/vnd.docker.image.rootfs.diff.tar"
            | "application/vnd.docker.image.rootfs.diff.tar.gzip"
            | "application/vnd.docker.image.rootfs.diff.tar.zstd"
            | "application/vnd.docker.image.rootfs.foreign.diff.tar"
            | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
    );
    if known {
        return Ok(());
    }
    Err(StoreError::MediaType {
        what: what.to_owned(),
        media_type: media_type.chars().take(100).collect(),
    })
}
