//! Layers: from an active snapshot to a committed one, and the tar in between.
//!
//! The order is that of "durable before visible": directory, one syncfs, markers, one more, rows.

use super::sync::{Flushing, Since, Written};
use super::{Active, Lease, Store};
use crate::catalog::leases::{self, Item};
use crate::catalog::{Durability, layers, snapshots};
use crate::digest::{ChainId, DiffId, Digest};
use crate::error::{Result, StoreError, snap};
use crate::failpoint;
use serde::{Deserialize, Serialize};
use sha2::Digest as _;
use slipway_snapshot::diff::{DiffOptions, DiffStats, Lower, write_tar};
use slipway_snapshot::{SnapshotId, Snapshotter, Usage};
use std::io::{self, Write};
use std::path::PathBuf;

/// A committed layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// The layer and everything below it.
    pub chain: ChainId,
    /// Its tar.
    pub diff_id: DiffId,
    /// The chain below; `None` for the lowest layer.
    pub parent: Option<ChainId>,
    /// Its directory.
    pub snapshot: SnapshotId,
    /// What its directory takes.
    pub usage: Usage,
    /// Bytes of its uncompressed tar.
    pub tar_bytes: u64,
}

/// How a step's layer is made of its snapshot; kept, because making it again must give the same bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerOptions {
    /// No mtime is later than this: SOURCE_DATE_EPOCH.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clamp_mtime: Option<i64>,
    /// Mount points that were made for a step alone, as absolute paths inside the image.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skip: Vec<PathBuf>,
}

/// An active snapshot's canonical tar, hashed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HashedLayer {
    /// Its identity.
    pub diff_id: DiffId,
    /// What is in it; `tar_bytes` long.
    pub stats: DiffStats,
    /// How it was made.
    pub options: LayerOptions,
}

/// A layer whose directory is filled.
pub(crate) struct Ready {
    pub(crate) snapshot: SnapshotId,
    pub(crate) diff_id: DiffId,
    pub(crate) tar_bytes: u64,
    pub(crate) usage: Option<Usage>,
    pub(crate) options: Option<LayerOptions>,
}

/// Hashes what is written to it.
#[derive(Default)]
pub(crate) struct HashSink(pub(crate) sha2::Sha256);

impl Write for HashSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Store {
    /// A layer that is here and whole. To use it, ask [`Lease::layer`].
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn layer(&self, chain: &ChainId) -> Result<Option<Layer>> {
        let Some(layer) = self.inner.catalog.read(|c| layers::get(c, chain))? else {
            return Ok(None);
        };
        Ok(self.inner.committed(&layer.snapshot)?.map(|_| layer))
    }

    /// Writes the canonical tar of an active snapshot (nobody writes to it any more).
    ///
    /// # Errors
    /// When something cannot be read, or `out` cannot take it.
    pub fn diff(&self, active: &Active, options: &LayerOptions, out: &mut dyn Write) -> Result<DiffStats> {
        self.write_layer(&active.snapshot, &active.lower, options, out)
    }

    pub(crate) fn write_layer(
        &self,
        id: &SnapshotId,
        lower: &[SnapshotId],
        options: &LayerOptions,
        out: &mut dyn Write,
    ) -> Result<DiffStats> {
        let overlay = &self.inner.overlay;
        let lower: Vec<PathBuf> = lower.iter().map(|id| overlay.fs_dir(id)).collect();
        let options = DiffOptions {
            lower: Lower::Layers(&lower),
            clamp_mtime: options.clamp_mtime,
            skip: &options.skip,
        };
        write_tar(&overlay.fs_dir(id), &options, out)
            .map_err(snap(format!("read the snapshot {id} as a layer")))
    }

    /// Hashes the canonical tar of an active snapshot.
    ///
    /// # Errors
    /// As [`Store::diff`].
    pub fn hash_layer(&self, active: &Active, options: &LayerOptions) -> Result<HashedLayer> {
        let mut sink = HashSink::default();
        let stats = self.diff(active, options, &mut sink)?;
        let diff_id = DiffId::from(Digest::from_hash(sink.0));
        Ok(HashedLayer {
            diff_id,
            stats,
            options: options.clone(),
        })
    }

    /// Makes active snapshots layers, each on the one before it and the first on `base`: one syncfs, then one
    /// transaction. A chain that is in the store already is answered with what is there.
    ///
    /// # Errors
    /// [`StoreError::NoSnapshot`], [`StoreError::NoLayer`], [`StoreError::LeaseGone`], a full disk.
    #[cfg(test)]
    pub(crate) fn commit_layers(
        &self,
        base: Option<&ChainId>,
        layers: Vec<(Active, HashedLayer)>,
        lease: &Lease,
    ) -> Result<Vec<Layer>> {
        let written = self
            .inner
            .syncer
            .written(since_first(layers.iter().map(|(active, _)| active)));
        self.commit_hashed(base, layers, lease, written)
    }

    fn commit_hashed(
        &self,
        base: Option<&ChainId>,
        layers: Vec<(Active, HashedLayer)>,
        lease: &Lease,
        written: Written,
    ) -> Result<Vec<Layer>> {
        let ready = layers
            .into_iter()
            .map(|(active, hashed)| Ready {
                snapshot: active.snapshot,
                diff_id: hashed.diff_id,
                tar_bytes: hashed.stats.tar_bytes,
                usage: None,
                options: Some(hashed.options),
            })
            .collect();
        self.commit_ready(base, ready, lease, written)
    }

    /// Hashes active snapshots (nobody writes to them any more) and syncs them at the same time, then commits them as
    /// layers, each on the one before it and the first on `base`: the shortest way from a step's end to a layer.
    ///
    /// # Errors
    /// As [`Store::hash_layer`]; [`StoreError::NoSnapshot`], [`StoreError::NoLayer`], [`StoreError::LeaseGone`], a full disk.
    pub fn seal_layers(
        &self,
        base: Option<&ChainId>,
        layers: &[(&Active, &LayerOptions)],
        lease: &Lease,
    ) -> Result<Vec<Layer>> {
        let syncer = &self.inner.syncer;
        let written = syncer.written(since_first(layers.iter().map(|(active, _)| *active)));
        let hashed = std::thread::scope(|scope| {
            let sync = scope.spawn(|| syncer.sync_since(written));
            let workers: Vec<_> = layers
                .iter()
                .map(|(active, options)| scope.spawn(|| self.hash_layer(active, options)))
                .collect();
            let hashed = workers
                .into_iter()
                .zip(layers)
                .map(|(worker, (active, _))| {
                    let hashed = worker.join().unwrap_or_else(|p| std::panic::resume_unwind(p));
                    hashed.map(|hashed| ((*active).clone(), hashed))
                })
                .collect::<Result<Vec<_>>>();
            let synced = sync.join().unwrap_or_else(|p| std::panic::resume_unwind(p));
            synced.map_err(snap("make layers durable"))?;
            hashed
        })?;
        self.commit_hashed(base, hashed, lease, written)
    }

    /// As [`Store::seal_layers`], for one.
    ///
    /// # Errors
    /// As [`Store::seal_layers`].
    #[cfg(test)]
    pub(crate) fn seal_layer(
        &self,
        active: Active,
        options: &LayerOptions,
        base: Option<&ChainId>,
        lease: &Lease,
    ) -> Result<Layer> {
        let layers = self.seal_layers(base, &[(&active, options)], lease)?;
        let key = active.key;
        layers.into_iter().next().ok_or(StoreError::NoSnapshot { key })
    }

    /// Has the disk write along while something large may be written that a commit will sync.
    pub fn flushing(&self) -> Flushing {
        self.inner.syncer.flushing()
    }

    /// Commits filled directories as layers, bottom first, on `base`. They were filled when `written` was
    /// asked for.
    pub(crate) fn commit_ready(
        &self,
        base: Option<&ChainId>,
        ready: Vec<Ready>,
        lease: &Lease,
        written: Written,
    ) -> Result<Vec<Layer>> {
        let mut parent = base.copied();
        let mut layers = Vec::with_capacity(ready.len());
        let mut commits = Vec::new();
        for one in &ready {
            let chain = ChainId::child(parent.as_ref(), &one.diff_id);
            // Somebody else may have made the same layer; then ours is not worth a sync, and theirs has to stay.
            if lease.layer(&chain)?.is_none() {
                commits.push(slipway_snapshot::Commit {
                    id: one.snapshot.clone(),
                    usage: one.usage,
                });
            }
            layers.push(Layer {
                chain,
                diff_id: one.diff_id,
                parent,
                snapshot: one.snapshot.clone(),
                usage: Usage::default(),
                tar_bytes: one.tar_bytes,
            });
            parent = Some(chain);
        }
        failpoint::reach("commit.before_sync");
        let syncer = &self.inner.syncer;
        let usages = self
            .inner
            .overlay
            .commit_with(&commits, &|| syncer.sync_since(written), &|| {
                syncer.sync(written.since())
            })
            .map_err(snap("commit layers"))?;
        for (commit, usage) in commits.iter().zip(usages) {
            layers
                .iter_mut()
                .filter(|l| l.snapshot == commit.id)
                .for_each(|l| l.usage = usage);
        }
        failpoint::reach("commit.after_sync");
        self.inner.catalog.write(Durability::Normal, |c| {
            if let Some(base) = base
                && layers::get(c, base)?.is_none()
            {
                return Err(StoreError::NoLayer { chain: *base });
            }
            for (layer, one) in layers.iter_mut().zip(&ready) {
                if !snapshots::commit(c, &one.snapshot)? {
                    return Err(StoreError::NoSnapshot {
                        key: one.snapshot.to_string(),
                    });
                }
                match layers::get(c, &layer.chain)? {
                    Some(there) if self.inner.committed(&there.snapshot)?.is_some() => *layer = there,
                    _ if self.inner.committed(&one.snapshot)?.is_some() => {
                        layers::put(c, layer, one.options.as_ref())?;
                    }
                    // Theirs is torn since we looked, and ours was not synced.
                    _ => return Err(StoreError::NoLayer { chain: layer.chain }),
                }
                leases::hold(c, lease.name(), Item::Layer, &layer.chain)?;
            }
            Ok(())
        })?;
        Ok(layers)
    }
}

/// When the first of several snapshots began to be written.
fn since_first<'a>(actives: impl Iterator<Item = &'a Active>) -> Since {
    actives.map(|active| active.since).min().unwrap_or_default()
}
