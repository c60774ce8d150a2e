//! Active snapshots: what containers and build steps write to, and read-only views.
//!
//! The row is the intent: it is in the catalog before the directory is made, and goes after the directory is gone.

use super::sync::Since;
use super::{Inner, Lease, Store};
use crate::catalog::snapshots::{self, NewSnapshot, SnapshotRow};
use crate::catalog::{Durability, layers, leases};
use crate::digest::ChainId;
use crate::error::{Result, StoreError, chain, snap};
use crate::failpoint;
use slipway_snapshot::{Access, RootfsMount, SnapshotId, Snapshotter, Usage};
use std::path::PathBuf;
use std::time::SystemTime;

/// An active snapshot: writable on top of a chain, or a read-only view of one.
#[derive(Clone, Debug)]
pub struct Active {
    /// The caller's name for it.
    pub key: String,
    /// Its directory.
    pub snapshot: SnapshotId,
    /// How to mount it.
    pub mount: RootfsMount,
    /// What was written to it, in overlay's form (of a view: the topmost layer's own tree).
    pub upper: PathBuf,
    /// The chain it was prepared on, where it was prepared on one.
    pub parent: Option<ChainId>,
    /// The snapshots below, nearest first.
    pub lower: Vec<SnapshotId>,
    /// When it began to be written; of one that was found: before anything that this process syncs.
    pub(crate) since: Since,
}

/// A row of the list of active snapshots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ActiveInfo {
    /// Its key.
    pub key: String,
    /// Its directory.
    pub snapshot: SnapshotId,
    /// The lease that holds it.
    pub lease: String,
    /// When it was made.
    pub created_at: SystemTime,
}

/// What a new snapshot is put on.
enum On<'a> {
    Chain(Option<&'a ChainId>),
    Snapshot(&'a Active),
}

impl Store {
    /// Makes a writable snapshot on a chain (`None`: on nothing), held by the lease.
    ///
    /// # Errors
    /// [`StoreError::NoLayer`], [`StoreError::SnapshotExists`], [`StoreError::LeaseGone`].
    pub fn prepare(&self, key: &str, parent: Option<&ChainId>, lease: &Lease) -> Result<Active> {
        self.make(key, &On::Chain(parent), lease, false)
    }

    /// Makes a writable snapshot on another active one that nobody writes any more: the next step of a build
    /// starts before the layer below has been hashed. The one below may have become a layer meanwhile.
    ///
    /// # Errors
    /// As [`Store::prepare`].
    pub fn prepare_on(&self, key: &str, below: &Active, lease: &Lease) -> Result<Active> {
        self.make(key, &On::Snapshot(below), lease, false)
    }

    /// A read-only view of a chain, under a key of its own.
    ///
    /// # Errors
    /// As [`Store::prepare`].
    pub fn view(&self, key: &str, chain: Option<&ChainId>, lease: &Lease) -> Result<Active> {
        self.make(key, &On::Chain(chain), lease, true)
    }

    fn make(&self, key: &str, on: &On<'_>, lease: &Lease, read_only: bool) -> Result<Active> {
        let inner = &self.inner;
        let since = inner.syncer.since();
        let id = SnapshotId::new_random().map_err(snap("make a snapshot's name"))?;
        let (parent, below) = match on {
            On::Chain(chain) => (*chain, None),
            On::Snapshot(below) => (None, Some(&below.snapshot)),
        };
        let new = NewSnapshot {
            id: &id,
            key: Some(key),
            parent,
            below,
            lease: lease.name(),
            read_only,
        };
        let row = inner.catalog.write(Durability::Normal, |c| {
            leases::check(c, lease.name())?;
            if !snapshots::add(c, &new)? {
                return Err(StoreError::SnapshotExists { key: key.to_owned() });
            }
            let row = snapshots::by_id(c, &id)?;
            row.ok_or_else(|| StoreError::NoSnapshot { key: key.to_owned() })
        })?;
        failpoint::reach("prepare.after_row");
        let active = self.fill(key, &row, on).inspect_err(|_| {
            if let Err(error) = self.remove_active(key) {
                tracing::warn!(key, %error, "a snapshot that could not be made could not be removed either");
            }
        })?;
        Ok(Active { since, ..active })
    }

    fn fill(&self, key: &str, row: &SnapshotRow, on: &On<'_>) -> Result<Active> {
        let active = self.describe(key, row)?.ok_or_else(|| match on {
            On::Chain(Some(chain)) => StoreError::NoLayer { chain: **chain },
            On::Snapshot(below) => StoreError::NoSnapshot {
                key: below.key.clone(),
            },
            On::Chain(None) => StoreError::NoSnapshot { key: key.to_owned() },
        })?;
        // Torn layers are told apart from whole ones before anybody runs on them.
        let torn = |id: &SnapshotId| Ok(self.inner.committed(id)?.is_none());
        if let On::Chain(Some(chain)) = on {
            for id in &active.lower {
                if torn(id)? {
                    return Err(StoreError::NoLayer { chain: **chain });
                }
            }
        }
        if row.read_only && !active.lower.is_empty() {
            return Ok(active);
        }
        self.inner
            .overlay
            .prepare(&row.id)
            .map_err(snap(format!("make the snapshot {key:?}")))?;
        if let Some(nearest) = active.lower.first() {
            let nearest = self.inner.overlay.fs_dir(nearest);
            slipway_snapshot::unpack::inherit_root(&active.upper, &nearest)
                .map_err(snap(format!("make the snapshot {key:?}")))?;
        }
        Ok(active)
    }

    /// The value of a row; `None` when something below it is gone.
    fn describe(&self, key: &str, row: &SnapshotRow) -> Result<Option<Active>> {
        let Some(lower) = self.inner.catalog.read(|c| snapshots::lower(c, row))? else {
            return Ok(None);
        };
        let overlay = &self.inner.overlay;
        let (mount, upper) = match lower.split_first() {
            Some((top, rest)) if row.read_only => {
                (overlay.mounts(top, rest, Access::ReadOnly), overlay.fs_dir(top))
            }
            _ if row.read_only => (
                overlay.mounts(&row.id, &[], Access::ReadOnly),
                overlay.fs_dir(&row.id),
            ),
            _ => (
                overlay.mounts(&row.id, &lower, Access::ReadWrite),
                overlay.fs_dir(&row.id),
            ),
        };
        let (snapshot, parent) = (row.id.clone(), row.parent);
        Ok(Some(Active {
            key: key.to_owned(),
            snapshot,
            mount,
            upper,
            parent,
            lower,
            since: Since::default(),
        }))
    }

    /// The active snapshot with this key.
    ///
    /// # Errors
    /// [`StoreError::NoLayer`] when a layer below it is gone; what the catalog answers.
    pub fn active(&self, key: &str) -> Result<Option<Active>> {
        let Some(row) = self.inner.catalog.read(|c| snapshots::by_key(c, key))? else {
            return Ok(None);
        };
        match (self.describe(key, &row)?, row.parent) {
            (Some(active), _) => Ok(Some(active)),
            (None, Some(chain)) => Err(StoreError::NoLayer { chain }),
            (None, None) => Ok(None),
        }
    }

    /// All active snapshots that have a key.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn actives(&self) -> Result<Vec<ActiveInfo>> {
        self.inner.catalog.read(snapshots::actives)
    }

    /// Removes an active snapshot; absent is fine. The caller has unmounted it. Works on a full disk.
    ///
    /// # Errors
    /// When something in it cannot be removed.
    pub fn remove_active(&self, key: &str) -> Result<()> {
        let inner = &self.inner;
        let doomed = inner.with_reserve(|| {
            inner
                .catalog
                .write(Durability::Normal, |c| snapshots::doom_key(c, key))
        })?;
        match doomed {
            Some(id) => inner.remove_snapshot(&id),
            None => Ok(()),
        }
    }

    /// Disk use of an active snapshot.
    ///
    /// # Errors
    /// [`StoreError::NoSnapshot`].
    pub fn usage(&self, key: &str) -> Result<Usage> {
        let row = self.inner.catalog.read(|c| snapshots::by_key(c, key))?;
        let row = row.ok_or_else(|| StoreError::NoSnapshot { key: key.to_owned() })?;
        if row.read_only {
            return Ok(Usage::default());
        }
        self.inner
            .overlay
            .usage(&row.id)
            .map_err(snap(format!("count the snapshot {key:?}")))
    }

    /// Whether every layer of a chain is here and whole.
    pub(crate) fn intact(&self, chain: Option<&ChainId>) -> Result<bool> {
        let Some(chain) = chain else { return Ok(true) };
        let Some(all) = self.inner.catalog.read(|c| layers::chain(c, chain))? else {
            return Ok(false);
        };
        for layer in all {
            if self.inner.committed(&layer.snapshot)?.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Removes the directories of doomed snapshots, then their rows; says how many are gone. One that cannot be removed
    /// (a damaged file system, something mounted inside) stays doomed and keeps none of the others.
    ///
    /// # Errors
    /// The first that could not be removed, after all have been tried.
    pub(crate) fn remove_doomed_snapshots(&self) -> Result<u64> {
        let (mut removed, mut failed) = (0, None);
        for id in self.inner.catalog.read(snapshots::doomed)? {
            match self.inner.remove_snapshot(&id) {
                Ok(()) => removed += 1,
                Err(error) => {
                    tracing::warn!(snapshot = %id, "a snapshot cannot be removed: {}", chain(&error));
                    failed.get_or_insert(error);
                }
            }
        }
        failed.map_or(Ok(removed), Err)
    }
}

impl Inner {
    /// Removes a doomed snapshot's directory, then its row.
    pub(crate) fn remove_snapshot(&self, id: &SnapshotId) -> Result<()> {
        self.overlay
            .remove(id)
            .map_err(snap(format!("remove the snapshot {id}")))?;
        failpoint::reach("remove.after_directory");
        self.with_reserve(|| {
            self.catalog
                .write(Durability::Normal, |c| snapshots::delete_doomed(c, id))
        })
    }
}
