//! A root filesystem that can be mounted: the description of one overlay mount, and the act.
//!
//! Refuses to know images and containers: it has directories and a target.

use crate::error::{Result, at};
use std::path::{Path, PathBuf};

/// One overlay mount, described: parents nearest first, and the writable directories if it has them.
///
/// There is always at least one lower directory (an empty one for a snapshot on nothing), so that what is
/// written has overlay's meaning also in the first layer of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootfsMount {
    pub(crate) lower: Vec<PathBuf>,
    pub(crate) upper_work: Option<(PathBuf, PathBuf)>,
}

impl RootfsMount {
    /// The read-only directories, nearest first.
    pub fn lower(&self) -> &[PathBuf] {
        &self.lower
    }

    /// The directory that takes the writes; `None` for a read-only mount.
    pub fn upper(&self) -> Option<&Path> {
        self.upper_work.as_ref().map(|(upper, _)| upper.as_path())
    }

    /// Whether nothing can be written through it.
    pub fn read_only(&self) -> bool {
        self.upper_work.is_none()
    }

    /// Mounts it on an existing directory, with redirect_dir, metacopy and index off, so that the upper directory
    /// alone is the difference.
    ///
    /// # Errors
    /// What the kernel answers, with the target.
    pub fn mount(&self, target: &Path) -> Result<()> {
        self.mount_with(target, &[])
    }

    /// As [`RootfsMount::mount`], but nobody's fsync reaches the disk through it, and unmounting it does not sync the
    /// filesystem below: for what is made durable by other means (a commit's syncfs), or never. Its upper directory
    /// can be mounted so only once.
    ///
    /// # Errors
    /// What the kernel answers, with the target.
    pub fn mount_volatile(&self, target: &Path) -> Result<()> {
        // Without an upper directory there is nothing that could be synced, and the kernel refuses the option.
        let options: &[&str] = if self.read_only() { &[] } else { &["volatile"] };
        self.mount_with(target, options)
    }

    fn mount_with(&self, target: &Path, options: &[&str]) -> Result<()> {
        let upper_work = self
            .upper_work
            .as_ref()
            .map(|(upper, work)| (upper.as_path(), work.as_path()));
        slipway_sys::mount::mount_overlay(&self.lower, upper_work, target, options)
            .map_err(at("mount a root filesystem on", target))
    }
}

/// Unmounts a target; one that is not mounted or not there is fine.
///
/// # Errors
/// What the kernel answers, with the target.
pub fn unmount(target: &Path) -> Result<()> {
    slipway_sys::mount::unmount(target, false).map_err(at("unmount", target))
}
