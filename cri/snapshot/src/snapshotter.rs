//! The contract of a snapshotter, and the plain values it speaks in.
//!
//! Refuses to know the graph: which snapshot lies on which, which are layers of images and who uses them are
//! rows of the catalog (slipway-image). A snapshotter knows directories, and is told the parents at each call.
//!
//! # The life of a snapshot
//! ```text
//!            prepare(id)                    commit(id)
//!  (absent) ────────────▶ active: writable ────────────▶ committed: never written again
//!     ▲                      │ remove(id)                   │ remove(id)
//!     └──────────────────────┴──────────────────────────────┘
//! ```
//! * `prepare` makes an empty writable directory. The same id twice is [`SnapshotError::Exists`].
//! * An active snapshot is filled in one of two ways: through a mount ([`Snapshotter::mounts`] with
//!   [`Access::ReadWrite`]), or directly under [`Snapshotter::fs_dir`] (an unpacked layer, whiteouts in
//!   overlay's own form).
//! * `commit` is *durable before visible*: when it returns, everything under `fs_dir` and the marker that says so
//!   have reached the disk. A snapshot without a whole marker is not committed, whatever its directory holds: a
//!   power loss in the middle leaves something that [`Snapshotter::committed`] answers `None` for.
//! * A committed snapshot may be a parent in any number of mounts. The implementation never changes it.
//! * `remove` is idempotent, works on any state and after a crash in the middle of itself. The caller has
//!   unmounted it. What is being removed is no longer listed by `ids`.
//! * Parents are named nearest first, and are committed, or active ones that nobody writes any more.

use crate::SnapshotId;
use crate::error::Result;
use crate::rootfs::RootfsMount;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Disk use of a snapshot's own tree (not of its parents).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Bytes of allocated blocks.
    pub bytes: u64,
    /// Inodes: a file with several names counts once.
    pub inodes: u64,
}

impl std::ops::Add for Usage {
    type Output = Usage;
    fn add(self, other: Usage) -> Usage {
        Usage {
            bytes: self.bytes + other.bytes,
            inodes: self.inodes + other.inodes,
        }
    }
}

impl std::iter::Sum for Usage {
    fn sum<I: Iterator<Item = Usage>>(iter: I) -> Usage {
        iter.fold(Usage::default(), |a, b| a + b)
    }
}

/// How a snapshot is to be mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Its own tree takes the writes (overlay's upper directory).
    ReadWrite,
    /// Its own tree is the topmost of the read-only ones.
    ReadOnly,
}

/// What a filesystem that holds snapshots has, and how much of it they take.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsInfo {
    /// The directory that holds the snapshots: what CRI calls the filesystem's mount point.
    pub mountpoint: PathBuf,
    /// Bytes used by what this store keeps there.
    pub used_bytes: u64,
    /// Inodes used by what this store keeps there.
    pub used_inodes: u64,
    /// Size of the filesystem in bytes.
    pub capacity_bytes: u64,
    /// Bytes that can still be written.
    pub available_bytes: u64,
    /// Inodes of the filesystem (0 where it has no fixed number).
    pub capacity_inodes: u64,
    /// Inodes still free (0 where it has no fixed number).
    pub available_inodes: u64,
}

/// One snapshot to commit; the usage is counted when it is not given.
#[derive(Clone, Debug)]
pub struct Commit {
    /// The active snapshot.
    pub id: SnapshotId,
    /// Its usage, where the caller has counted while filling it.
    pub usage: Option<Usage>,
}

/// Keeps the directories of layers and of containers' writable layers. The module's text is the contract.
pub trait Snapshotter: Send + Sync {
    /// Makes an empty, writable snapshot.
    ///
    /// # Errors
    /// [`SnapshotError::Exists`](crate::SnapshotError::Exists) when the id is taken.
    fn prepare(&self, id: &SnapshotId) -> Result<()>;

    /// The snapshot's own tree: what a layer holds, or what was written to an active snapshot.
    fn fs_dir(&self, id: &SnapshotId) -> PathBuf;

    /// Describes the mount of a snapshot on its parents (nearest first); mounts nothing.
    fn mounts(&self, id: &SnapshotId, parents: &[SnapshotId], access: Access) -> RootfsMount;

    /// Makes an active snapshot durable and read-only: one syncfs, then its marker.
    ///
    /// # Errors
    /// [`SnapshotError::NotFound`](crate::SnapshotError::NotFound); a full disk.
    fn commit(&self, id: &SnapshotId) -> Result<Usage> {
        let committed = self.commit_all(&[Commit {
            id: id.clone(),
            usage: None,
        }])?;
        Ok(committed.into_iter().next().unwrap_or_default())
    }

    /// Commits several snapshots with one syncfs for all of them; the answers are in the order of the question.
    ///
    /// # Errors
    /// As [`Snapshotter::commit`]; some may have been committed then.
    fn commit_all(&self, commits: &[Commit]) -> Result<Vec<Usage>>;

    /// The usage kept in the marker of a committed snapshot; `None` when it is not there, not committed or torn.
    ///
    /// # Errors
    /// When the marker exists and cannot be read.
    fn committed(&self, id: &SnapshotId) -> Result<Option<Usage>>;

    /// Counts a snapshot's own tree, active or committed.
    ///
    /// # Errors
    /// [`SnapshotError::NotFound`](crate::SnapshotError::NotFound).
    fn usage(&self, id: &SnapshotId) -> Result<Usage>;

    /// Removes a snapshot; absent is fine.
    ///
    /// # Errors
    /// When something in it cannot be removed.
    fn remove(&self, id: &SnapshotId) -> Result<()>;

    /// Every snapshot there is, in no order.
    ///
    /// # Errors
    /// When the directory cannot be read.
    fn ids(&self) -> Result<Vec<SnapshotId>>;

    /// The filesystem under the snapshots, with what they take of it.
    ///
    /// # Errors
    /// When it cannot be asked.
    fn filesystem(&self) -> Result<FsInfo>;
}
