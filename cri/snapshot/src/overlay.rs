//! The overlay snapshotter: one directory a snapshot, mounted with overlayfs.
//!
//! ```text
//! <dir>/                        0700
//!   .empty/                     the lower directory of a snapshot on nothing
//!   .gone-<id>                  being removed; swept by the next opener
//!   <id>/fs                     the layer's own tree, or overlay's upper directory
//!   <id>/work                   overlay's work directory; gone once committed
//!   <id>/committed              the marker: written and synced after everything under fs was
//! ```
//! Refuses to know the graph of snapshots and the catalog.

use crate::SnapshotId;
use crate::error::{Result, at};
use crate::rootfs::RootfsMount;
use crate::snapshotter::{Access, Commit, FsInfo, Snapshotter, Usage};
use std::path::{Path, PathBuf};

/// Snapshots as directories under one folder, mounted with overlayfs (redirect_dir, metacopy and index off).
#[derive(Debug)]
pub struct Overlay {
    dir: PathBuf,
}

impl Overlay {
    /// Opens the folder, making it (0700) when it is not there.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(dir: &Path) -> Result<Overlay> {
        std::fs::create_dir_all(dir.join(".empty")).map_err(at("create", dir))?;
        Ok(Overlay { dir: dir.to_path_buf() })
    }
}

fn not_ready(path: &Path) -> crate::SnapshotError {
    at("use", path)(std::io::ErrorKind::Unsupported.into())
}

impl Snapshotter for Overlay {
    fn prepare(&self, _id: &SnapshotId) -> Result<()> {
        Err(not_ready(&self.dir))
    }

    fn fs_dir(&self, id: &SnapshotId) -> PathBuf {
        self.dir.join(id.as_str()).join("fs")
    }

    fn mounts(&self, id: &SnapshotId, parents: &[SnapshotId], access: Access) -> RootfsMount {
        let mut lower: Vec<PathBuf> = parents.iter().map(|p| self.fs_dir(p)).collect();
        let upper_work = match access {
            Access::ReadWrite => Some((self.fs_dir(id), self.dir.join(id.as_str()).join("work"))),
            Access::ReadOnly => {
                lower.insert(0, self.fs_dir(id));
                None
            }
        };
        let enough = if upper_work.is_some() { 1 } else { 2 };
        if lower.len() < enough {
            lower.push(self.dir.join(".empty"));
        }
        RootfsMount { lower, upper_work }
    }

    fn commit_all(&self, _commits: &[Commit]) -> Result<Vec<Usage>> {
        Err(not_ready(&self.dir))
    }

    fn committed(&self, _id: &SnapshotId) -> Result<Option<Usage>> {
        Err(not_ready(&self.dir))
    }

    fn usage(&self, _id: &SnapshotId) -> Result<Usage> {
        Err(not_ready(&self.dir))
    }

    fn remove(&self, _id: &SnapshotId) -> Result<()> {
        Err(not_ready(&self.dir))
    }

    fn ids(&self) -> Result<Vec<SnapshotId>> {
        Err(not_ready(&self.dir))
    }

    fn filesystem(&self) -> Result<FsInfo> {
        Err(not_ready(&self.dir))
    }
}
