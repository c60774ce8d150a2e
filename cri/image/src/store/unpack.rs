//! Unpacking an image's layers side by side, and committing them in order.
//!
//! ```text
//!  blob ─▶ check digest and size ─▶ decompress ─▶ hash (DiffID) ─▶ tar ─▶ directory     a layer a worker
//!                                                         └▶ nothing, where the layer came as another blob before
//!                                                                             │
//!  bottom to top:  fix-ups from the layers below ─▶ one syncfs ─▶ markers ─▶ one syncfs ─▶ rows
//! ```
//! One syncfs for all layers of an image, not one a layer: nothing is visible before the last of them is
//! unpacked anyway, and a syncfs writes the whole filesystem, whoever else is writing to it.
//!
//! Only what was decoded here is recorded as a blob of a layer: whoever builds on the layer pushes that blob, so an
//! image's word for it is not enough.

use super::decoding::{Into, check_media_type, stream, wants_large_window};
use super::layers::Ready;
use super::{Layer, Lease, Since, Store};
use crate::catalog::snapshots::NewSnapshot;
use crate::catalog::variants::{self, BlobRow};
use crate::catalog::{Durability, leases, snapshots};
use crate::codec::{Format, Window};
use crate::digest::{ChainId, DiffId, Digest};
use crate::error::{Result, StoreError, snap};
use crate::failpoint;
use oci_spec::image::Descriptor;
use slipway_snapshot::unpack::{Limits, NameBudget, Options, UnpackError, Unpacked, fix_up};
use slipway_snapshot::{SnapshotId, Snapshotter};
use std::io::{self, Read, Seek};
use std::path::PathBuf;
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

/// A layer's blob to be read.
struct Job {
    position: usize,
    /// Where its files go.
    target: Target,
    source: LayerSource,
}

enum Target {
    /// The layer is not in the store yet.
    New(SnapshotId),
    /// It is, and came as another blob.
    There { tar_bytes: u64 },
}

/// A blob that was read, and is what it is said to be.
struct Done {
    position: usize,
    original: Original,
    /// A new layer's directory.
    filled: Option<Filled>,
}

/// A layer's directory, filled.
struct Filled {
    snapshot: SnapshotId,
    diff_id: DiffId,
    tar_bytes: u64,
    unpacked: Unpacked,
}

/// A blob that decodes to a layer's tar: what may be recorded for ever.
struct Original {
    diff_id: DiffId,
    blob: BlobRow,
    format: Format,
}

impl Store {
    /// Unpacks an image's layers (bottom first) in parallel, checks digests and DiffIDs while they stream, fixes
    /// what depends on the layers below in order, and commits them with one syncfs. Of a layer that is here already the
    /// blob is only checked, and not read at all when it is known ([`Store::is_blob_of`]). On failure nothing of it
    /// remains.
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
        let made: Vec<SnapshotId> = jobs.iter().filter_map(Job::snapshot).cloned().collect();
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
            let target = match &present[position] {
                None => Target::New(SnapshotId::new_random().map_err(snap("make a snapshot's name"))?),
                Some(layer) => {
                    let digest = digest_of(&source.descriptor)?;
                    if self.is_blob_of(&source.diff_id, &digest)? {
                        continue;
                    }
                    let tar_bytes = layer.tar_bytes;
                    Target::There { tar_bytes }
                }
            };
            jobs.push(Job {
                position,
                target,
                source,
            });
        }
        self.inner.catalog.write(Durability::Normal, |c| {
            leases::check(c, lease.name())?;
            for job in &jobs {
                let Some(snapshot) = job.snapshot() else { continue };
                let parent = job.position.checked_sub(1).map(|below| &chains[below]);
                let new = NewSnapshot {
                    id: snapshot,
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
        let mut originals = Vec::with_capacity(done.len());
        let mut new = Vec::with_capacity(done.len());
        for one in done {
            originals.push(one.original);
            new.extend(one.filled.map(|filled| (one.position, filled)));
        }
        let mut ready = new.into_iter().peekable();
        let mut filled: Vec<(usize, Ready)> = Vec::new();
        for (position, layer) in present.iter().enumerate() {
            let snapshot = match (layer, ready.next_if(|(at, _)| *at == position)) {
                (Some(layer), _) => layer.snapshot.clone(),
                (None, Some((_, one))) => {
                    let snapshot = one.snapshot.clone();
                    filled.push((position, self.fix(one, &below)?));
                    snapshot
                }
                (None, None) => continue,
            };
            below.insert(0, snapshot);
        }
        self.commit_runs(filled, &mut present, lease, since)?;
        self.record(&originals)?;
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

    /// Records which blobs are whose.
    fn record(&self, originals: &[Original]) -> Result<()> {
        self.inner.catalog.write(Durability::Normal, |c| {
            originals.iter().try_for_each(|one| {
                let media_type = one.format.media_type();
                variants::add_original(c, &one.diff_id, &one.blob, media_type.as_ref())
            })
        })
    }

    /// Whether a blob is known to decode to a layer's tar: it was decoded, or made, here.
    ///
    /// # Errors
    /// What the catalog answers.
    pub(crate) fn is_blob_of(&self, diff_id: &DiffId, blob: &Digest) -> Result<bool> {
        self.inner.catalog.read(|c| variants::is_known(c, diff_id, blob))
    }

    fn fix(&self, one: Filled, below: &[SnapshotId]) -> Result<Ready> {
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
            target,
            mut source,
        } = job;
        let digest = digest_of(&source.descriptor)?;
        let what = format!("layer {digest}");
        check_media_type(&what, source.descriptor.media_type().as_ref())?;
        if cancelled.load(Ordering::Relaxed) {
            return Err(StoreError::Cancelled { what });
        }
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
        let overlay = &self.inner.overlay;
        let into = match &target {
            Target::New(snapshot) => Into::Directory(overlay.fs_dir(snapshot), &unpack_options),
            Target::There { tar_bytes } => Into::Proof {
                tar_bytes: *tar_bytes,
                cancelled,
            },
        };
        let fresh = || match &target {
            Target::New(snapshot) => overlay
                .remove(snapshot)
                .and_then(|()| overlay.prepare(snapshot))
                .map_err(snap(format!("make a directory for {what}"))),
            Target::There { .. } => Ok(()),
        };
        fresh()?;
        let streamed = match stream(&mut source, &what, &into, Window::Usual) {
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
                fresh()?;
                stream(&mut source, &what, &into, Window::Large)?
            }
            streamed => streamed?,
        };
        let diff_id = source.diff_id;
        let filled = match (target, streamed.unpacked) {
            (Target::New(snapshot), Some(unpacked)) => Some(Filled {
                snapshot,
                diff_id,
                tar_bytes: streamed.tar_bytes,
                unpacked,
            }),
            _ => None,
        };
        let size = source.descriptor.size();
        Ok(Done {
            position,
            original: Original {
                diff_id,
                blob: BlobRow { digest, size },
                format: streamed.format,
            },
            filled,
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

impl Job {
    fn snapshot(&self) -> Option<&SnapshotId> {
        match &self.target {
            Target::New(snapshot) => Some(snapshot),
            Target::There { .. } => None,
        }
    }
}

fn digest_of(descriptor: &Descriptor) -> Result<Digest> {
    Digest::try_from(descriptor.digest()).map_err(|source| StoreError::Digest {
        what: "a layer's descriptor",
        source,
    })
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
