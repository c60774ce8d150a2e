//! A root filesystem that can be mounted: the description of one overlay mount, and the act.
//!
//! Refuses to know images and containers: it has directories and a target.

use crate::error::{Result, at};
use std::os::fd::AsFd as _;
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

    /// The same, read-only. It shows what is there when it is mounted, which is not to change while it is.
    #[must_use]
    pub fn to_read(&self) -> RootfsMount {
        RootfsMount {
            lower: self
                .upper()
                .map(Path::to_path_buf)
                .into_iter()
                .chain(self.lower.clone())
                .collect(),
            upper_work: None,
        }
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

    /// As [`RootfsMount::mount_volatile`], for a pod with a user namespace of its own, pinned at `userns`: who owns a file
    /// of the layers owns it through that namespace's maps, and what is written belongs to the mapped ids. `scratch` does
    /// not exist, and does not afterwards; the layers' mapped mounts stand there for a moment. A crash in between leaves
    /// mounts below it.
    ///
    /// # Errors
    /// What the kernel answers: a file system without id-mapped mounts, a kernel older than 5.19.
    pub fn mount_mapped(&self, target: &Path, userns: &Path, scratch: &Path) -> Result<()> {
        let made = self.mapped_layers(userns, scratch).and_then(|lower| {
            let mapped = RootfsMount {
                lower,
                upper_work: self.upper_work.clone(),
            };
            mapped.mount_volatile(target)
        });
        // The overlay holds mounts of its own.
        let gone = clear_scratch(scratch);
        made.and(gone)
    }

    fn mapped_layers(&self, userns: &Path, scratch: &Path) -> Result<Vec<PathBuf>> {
        let maps = slipway_sys::ns::open(userns).map_err(at("open the user namespace", userns))?;
        std::fs::create_dir(scratch).map_err(at("create", scratch))?;
        let mut layers = Vec::with_capacity(self.lower.len());
        for (number, layer) in self.lower.iter().enumerate() {
            let tree = slipway_sys::mount::idmapped_clone(layer, maps.as_fd(), false)
                .map_err(at("map the owners of the layer", layer))?;
            let place = scratch.join(number.to_string());
            std::fs::create_dir(&place).map_err(at("create", &place))?;
            slipway_sys::mount::attach(tree.as_fd(), &place).map_err(at("mount a layer on", &place))?;
            layers.push(place);
        }
        Ok(layers)
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

fn clear_scratch(scratch: &Path) -> Result<()> {
    let entries = match std::fs::read_dir(scratch) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(at("list", scratch))?,
    };
    for entry in entries {
        let place = entry.map_err(at("list", scratch))?.path();
        slipway_sys::mount::unmount(&place, true).map_err(at("unmount", &place))?;
        std::fs::remove_dir(&place).map_err(at("remove", &place))?;
    }
    std::fs::remove_dir(scratch).map_err(at("remove", scratch))
}

/// Whether file systems with this directory's type can be mounted with mapped owners, and user namespaces made at all:
/// tried out.
pub fn maps_owners(dir: &Path) -> bool {
    let map = slipway_sys::ns::IdMap {
        container_id: 0,
        host_id: 0,
        length: 1,
    };
    let maps = slipway_sys::ns::IdMaps {
        uids: vec![map],
        gids: vec![map],
    };
    slipway_sys::ns::user_namespace(&maps)
        .and_then(|userns| slipway_sys::mount::idmapped_clone(dir, userns.as_fd(), false))
        .is_ok()
}

/// Unmounts a target; one that is not mounted or not there is fine.
///
/// # Errors
/// What the kernel answers, with the target.
pub fn unmount(target: &Path) -> Result<()> {
    slipway_sys::mount::unmount(target, false).map_err(at("unmount", target))
}
