//! A container's bundle under the state: made, mounted, unmounted, removed.
//!
//! ```text
//! <state>/containers/<id>/  0700
//!   config.json     the runtime specification
//!   rootfs/         the overlay mount, volatile
//!   layers/         in a user namespace, for the moment of mounting: the layers with mapped owners
//!   volumes/<n>/    mounts of image volumes
//! ```

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use slipway_snapshot::RootfsMount;

use crate::error::Error;
use crate::ids::ContainerId;
use crate::pod::dir::{unmount, unmount_below};

/// The names in a bundle.
#[derive(Debug, Clone)]
pub struct Bundle {
    path: PathBuf,
    id: String,
}

impl Bundle {
    pub fn new(containers: &Path, id: &ContainerId) -> Bundle {
        Bundle {
            path: containers.join(id.as_str()),
            id: id.to_string(),
        }
    }

    /// For what was found in the state directory.
    pub fn at(path: PathBuf) -> Bundle {
        let id = path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        Bundle { path, id }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn rootfs(&self) -> PathBuf {
        self.path.join("rootfs")
    }

    fn layers(&self) -> PathBuf {
        self.path.join("layers")
    }

    pub fn config(&self) -> PathBuf {
        self.path.join("config.json")
    }

    pub fn volume(&self, number: usize) -> PathBuf {
        self.path.join("volumes").join(number.to_string())
    }

    /// Makes the directories and mounts the rootfs. The container's id is new, so a bundle that exists is an error.
    pub fn mount(&self, rootfs: &RootfsMount, userns: Option<&Path>) -> Result<(), Error> {
        let make = |path: &Path, mode| {
            DirBuilder::new()
                .mode(mode)
                .create(path)
                .map_err(Error::io("create", path))
        };
        make(&self.path, 0o700)?;
        make(&self.rootfs(), 0o755)?;
        self.mount_on(rootfs, &self.rootfs(), userns)
    }

    /// Mounts an image volume.
    pub fn mount_volume(
        &self,
        number: usize,
        image: &RootfsMount,
        userns: Option<&Path>,
    ) -> Result<PathBuf, Error> {
        let target = self.volume(number);
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&target)
            .map_err(Error::io("create", &target))?;
        self.mount_on(image, &target, userns)?;
        Ok(target)
    }

    fn mount_on(&self, mount: &RootfsMount, target: &Path, userns: Option<&Path>) -> Result<(), Error> {
        // Volatile: unmounting an ordinary overlay syncs the whole filesystem below, at every container's end, and a
        // container's layer is never mounted again after the boot it was made in.
        let mounted = match userns {
            None => mount.mount_volatile(target),
            Some(userns) => mount.mount_mapped(target, userns, &self.layers()),
        };
        mounted.map_err(|source| Error::Snapshot {
            act: "mount the root",
            id: self.id.clone(),
            source: Box::new(source),
        })
    }

    /// Unmounts everything in it. Not mounted, or no bundle at all: fine.
    pub fn unmount(&self) -> Result<(), Error> {
        unmount(&self.rootfs())?;
        if self.path.join("volumes").exists() || self.layers().exists() {
            unmount_below(&self.path)?;
        }
        Ok(())
    }

    /// Unmounts and removes it. Absent is fine.
    pub fn remove(&self) -> Result<(), Error> {
        self.unmount()?;
        // The worker's record may hold mounts of the container's sources, left by one that was killed.
        slipway_snapshot::remove_tree(&self.path).map_err(Error::io("remove", &self.path))
    }
}
