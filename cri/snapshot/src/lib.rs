//! Snapshots: the directories under containers and layers, their overlay mounts, and the two ways between a
//! directory and a layer's tar (diff and unpack).
//!
//! Owns the [`Snapshotter`] contract, its overlay implementation, the tar format. Refuses to know the catalog,
//! images, registries and compression.
#![forbid(unsafe_code)]

pub mod diff;
mod error;
mod id;
mod overlay;
mod rootfs;
mod snapshotter;
pub mod unpack;

pub use error::{Result, SnapshotError, is_full};
pub use id::SnapshotId;
pub use overlay::Overlay;
pub use rootfs::{RootfsMount, unmount};
pub use snapshotter::{Access, Commit, FsInfo, Snapshotter, Usage};
