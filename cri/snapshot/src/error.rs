//! What can go wrong with snapshots, named by act and object.
//!
//! Refuses to know gRPC codes and what a caller should answer: it only says what was attempted on what.

use std::io;
use std::path::{Path, PathBuf};

/// An operation on a snapshot, or on the directory that holds them, failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// A name that is not 1 to 32 characters of `[a-z0-9]`.
    #[error("{name:?} is not a snapshot's name (1 to 32 of a-z, 0-9)")]
    BadId {
        /// What was given.
        name: String,
    },
    /// The kernel's random source could not be read.
    #[error("read /dev/urandom")]
    Random {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is no such snapshot.
    #[error("snapshot {id} does not exist")]
    NotFound {
        /// Its name.
        id: String,
    },
    /// The snapshot is there already.
    #[error("snapshot {id} exists already")]
    Exists {
        /// Its name.
        id: String,
    },
    /// A system call on a path failed.
    #[error("{act} {}", path.display())]
    Io {
        /// The verb: "create", "sync".
        act: &'static str,
        /// The object.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The canonical tar of a snapshot could not be made.
    #[error("make the layer of {}", upper.display())]
    Diff {
        /// The snapshot's tree.
        upper: PathBuf,
        /// Why.
        #[source]
        source: crate::diff::DiffError,
    },
    /// The filesystem under the store has no room left.
    #[error("no space left while trying to {act} {}", path.display())]
    DiskFull {
        /// The verb.
        act: &'static str,
        /// The object.
        path: PathBuf,
    },
}

/// The result of an operation on snapshots.
pub type Result<T> = std::result::Result<T, SnapshotError>;

/// Names the act and the object of a failed system call; a full disk becomes its own variant.
pub(crate) fn at(act: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SnapshotError + use<> {
    let path = path.to_path_buf();
    move |source| match is_full(&source) {
        true => SnapshotError::DiskFull { act, path },
        false => SnapshotError::Io { act, path, source },
    }
}

/// Whether an error says that the disk, its inodes or the quota are used up.
pub fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}
