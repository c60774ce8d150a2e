//! The canonical layer tar of a snapshot: what changed against its parents, in bytes that depend on nothing else.
//!
//! What is in it: every entry of the upper directory, by name within its directory, whiteouts first; a directory
//! before what it holds. Whiteouts take the form of the image spec (`.wh.name`, `.wh..wh..opq`), and only where
//! there is something below for them to hide. What overlayfs copied up and nobody changed is left out, and so are
//! sockets, mount points that were made for a step alone and the attributes that belong to this host. Times are whole seconds. Names of one inode
//! are hard links to the first of them.
//!
//! Refuses to know where the bytes go (hash, file, registry) and what image they belong to.

mod compare;
mod walk;

use crate::error::{Result, SnapshotError};
use crate::is_full;
use serde::{Deserialize, Serialize};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// What lies under the tree that is diffed: unchanged copy-ups are recognised against it.
#[derive(Clone, Copy, Debug, Default)]
pub enum Lower<'a> {
    /// Not known: every entry counts as changed, every whiteout as needed.
    #[default]
    None,
    /// The parents as one mounted tree.
    Mounted(&'a Path),
    /// The parents' own trees, nearest first, in overlay's form; none at all for the lowest layer.
    Layers(&'a [PathBuf]),
}

/// How to make the tar; kept with the layer, because making it again must give the same bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiffOptions<'a> {
    /// The parents' view.
    pub lower: Lower<'a>,
    /// No mtime is later than this (seconds since 1970): SOURCE_DATE_EPOCH.
    pub clamp_mtime: Option<i64>,
    /// Mount points made for a step alone, as paths inside the image: an empty file or a directory without changed entries that lies
    /// there, and not below, is not in the layer.
    pub skip: &'a [PathBuf],
}

/// What went into the tar.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiffStats {
    /// Bytes of the tar.
    pub tar_bytes: u64,
    /// Entries in it.
    pub entries: u64,
    /// Copied-up entries left out because nothing about them changed.
    pub unchanged: u64,
    /// Sockets left out: tar cannot hold them.
    pub sockets: u64,
}

/// A layer's tar could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiffError {
    /// A system call on an entry failed, or the entry changed while it was read.
    #[error("{act} {path:?} of the layer")]
    Entry {
        /// The verb.
        act: &'static str,
        /// The entry, relative to the layer.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file of this name would delete another one when the layer is unpacked.
    #[error("{path:?} cannot be in a layer: names that start with .wh. are layers' marks for deleted files")]
    Reserved {
        /// The entry.
        path: String,
    },
    /// Directories nested deeper than anybody could name.
    #[error("{path:?}… is nested too deep for a layer")]
    TooDeep {
        /// The entry, shortened.
        path: String,
    },
    /// The bytes could not be handed on.
    #[error("write the layer's tar")]
    Write(#[source] io::Error),
}

/// Writes the canonical tar of `upper` to `out`.
///
/// # Errors
/// [`SnapshotError::Diff`] when something cannot be read, changes while it is read, cannot be in a layer, or `out`
/// cannot take it; [`SnapshotError::DiskFull`] when that is why.
pub fn write_tar(upper: &Path, options: &DiffOptions<'_>, out: &mut dyn Write) -> Result<DiffStats> {
    walk::write(upper, options, out).map_err(|source| match source {
        DiffError::Write(e) if is_full(&e) => SnapshotError::DiskFull {
            act: "write the layer's tar of",
            path: upper.to_path_buf(),
        },
        source => SnapshotError::Diff {
            upper: upper.to_path_buf(),
            source,
        },
    })
}

#[cfg(test)]
mod tests;
