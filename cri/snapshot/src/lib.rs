//! Snapshots: the directories under containers and layers, their overlay mounts, and the two ways between a
//! directory and a layer's tar (diff and unpack).
//!
//! Owns the [`Snapshotter`] contract, its overlay implementation, the tar format. Refuses to know the catalog,
//! images, registries and compression.
#![forbid(unsafe_code)]

mod attributes;
pub mod diff;
mod error;
mod id;
mod lower;
mod overlay;
mod rootfs;
mod scaffold;
mod snapshotter;
pub mod tar;
#[cfg(test)]
mod testing;
pub mod unpack;
mod usage;

pub use error::{Result, SnapshotError, is_full};
pub use id::SnapshotId;
pub use overlay::{Overlay, fs_info, sync_dir, sync_filesystem};
pub use rootfs::{RootfsMount, maps_owners, unmount};
pub use scaffold::{Scaffold, Survey};
pub use slipway_sys::mount::{mounts_under, remove_tree};
pub use slipway_sys::root::Root;
pub use snapshotter::{Access, Commit, FsInfo, Snapshotter, Usage};
pub use usage::of_tree as tree_usage;
