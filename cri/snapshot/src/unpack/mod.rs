//! A layer's tar into a directory of overlay's form, whatever the tar tries.
//!
//! The archive is hostile: no name leads out of the directory, no link is followed out of it, nothing is written
//! through something that an earlier entry put there, and the memory used does not grow with what a header
//! claims. Directories are held by descriptors and entered one name at a time without following links; a link
//! among the directories of a name is resolved by hand, within the layer, and one that climbs above the layer's
//! root is an error.
//!
//! What an entry means does not depend on the order in the archive, as far as the image spec goes: a whiteout
//! hides what lies *below*, never what the same layer holds.
//!
//! # What depends on the layers below
//! Layers are unpacked side by side, so what needs the parents is written down ([`FixUps`]) and done afterwards,
//! in order, by [`fix_up`]: directories the archive only implies (they take owner, mode, times and attributes from
//! below), hard links to files of lower layers (the file is copied up, as overlayfs does for a link), and a root
//! marked opaque (which overlayfs does not honour: each name below gets its own whiteout), and whiteouts of what is
//! not there (overlayfs shows them in the list of a directory that only this layer has).
//!
//! Refuses to know compression, digests and where the layer came from.

mod apply;
mod books;
mod descent;
mod fixup;
mod tree;

pub use books::{NameBudget, NamePool};
pub use fixup::{fix_up, inherit_root};

use crate::snapshotter::Usage;
use crate::tar::TarError;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::path::Path;
use std::sync::atomic::AtomicBool;

/// What one layer may hold at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all files together; `None`: what the filesystem has free when the unpacking starts.
    pub bytes: Option<u64>,
    /// Entries, directories it only implies included.
    pub entries: u64,
    /// Bytes of memory for the names that have to be remembered until the archive, or the image, is complete:
    /// directories, deleted names, links to files of lower layers.
    pub names: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            bytes: None,
            entries: 20_000_000,
            // Some 800,000 directories.
            names: 128 << 20,
        }
    }
}

/// How to take an archive.
#[derive(Clone, Copy, Default)]
pub struct Options<'a> {
    /// What it may hold at most.
    pub limits: Limits,
    /// Memory for names that is shared with other layers; `None`: [`Limits::names`] for this one alone.
    pub names: Option<&'a NameBudget>,
    /// Names that start with a slash are taken from the root of the tree instead of refused.
    pub absolute_names: bool,
    /// The archive is a plain one and not a layer: names that start with `.wh.` are ordinary, the archive's root
    /// entry changes nothing, and a hard link must find its target in the tree.
    pub plain: bool,
    /// Where in the tree the archive's root is put; links are resolved in the whole tree.
    pub prefix: &'a str,
    /// The owner of everything, instead of what the archive says.
    pub owner: Option<(u32, u32)>,
    /// Give up when this becomes true.
    pub cancelled: Option<&'a AtomicBool>,
    /// Told of bytes of contents as they are written.
    pub progress: Option<&'a (dyn Fn(u64) + Sync)>,
}

/// What was unpacked.
#[derive(Debug, Default)]
pub struct Unpacked {
    /// What it takes, counted while writing.
    pub usage: Usage,
    /// Entries of the archive.
    pub entries: u64,
    /// What is to be done once the layers below are there.
    pub fix_ups: FixUps,
}

/// What depends on the layers below. Paths are real ones, relative to the layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FixUps {
    /// Directories without an entry of their own; `false`: nothing below shows through, they keep the defaults.
    pub(crate) implied: BTreeMap<Vec<u8>, bool>,
    /// Hard links whose target this layer does not hold: link → target.
    pub(crate) links: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Deleted names: those that turn out to hide nothing must go again.
    pub(crate) whiteouts: BTreeSet<Vec<u8>>,
    /// The root itself is marked opaque.
    pub(crate) opaque_root: bool,
}

impl FixUps {
    /// Whether the layer's directory depends on what lies below.
    pub fn is_empty(&self) -> bool {
        self.implied.is_empty() && self.links.is_empty() && self.whiteouts.is_empty() && !self.opaque_root
    }
}

/// A layer could not be unpacked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnpackError {
    /// The archive is damaged or not supported.
    #[error("the layer's archive is not usable")]
    Tar(#[from] TarError),
    /// A name or link leads out of the layer, or could.
    #[error("{entry:?} would lead out of the layer: {why}")]
    Escape {
        /// The entry.
        entry: String,
        /// How.
        why: &'static str,
    },
    /// A name that no filesystem takes.
    #[error("{entry:?}… is not a usable name: {why}")]
    Name {
        /// The entry, shortened.
        entry: String,
        /// What is wrong.
        why: &'static str,
    },
    /// The entry needs a directory where the layer has something else.
    #[error("{entry:?} lies in {parent:?}, which is not a directory")]
    NotADirectory {
        /// The entry.
        entry: String,
        /// What should be a directory.
        parent: String,
    },
    /// A hard link to a directory or to nothing.
    #[error("the hard link {entry:?} to {target:?} cannot be made: {why}")]
    Link {
        /// The entry.
        entry: String,
        /// Its target.
        target: String,
        /// Why.
        why: &'static str,
    },
    /// The layer holds more than it may.
    #[error("the layer holds more than {limit} {what} (at {entry:?})")]
    TooLarge {
        /// The entry at which it was noticed.
        entry: String,
        /// Bytes or entries.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// The disk is full.
    #[error("no space left while unpacking {entry:?}")]
    DiskFull {
        /// The entry.
        entry: String,
    },
    /// A system call failed.
    #[error("{act} {entry:?}")]
    Io {
        /// The verb.
        act: &'static str,
        /// The entry.
        entry: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Somebody asked to stop.
    #[error("unpacking was cancelled")]
    Cancelled,
}

impl UnpackError {
    /// Whether the disk is full.
    pub fn is_disk_full(&self) -> bool {
        match self {
            UnpackError::DiskFull { .. } => true,
            UnpackError::Tar(TarError::Read(e)) => crate::is_full(e),
            _ => false,
        }
    }
}

/// Unpacks a layer into `dir`, which exists and is empty (or holds a tree to add to, with
/// [`Options::plain`]). Reads the archive to its very end. What is written is not synced.
///
/// # Errors
/// See [`UnpackError`]; what was written up to then stays in `dir`, and nothing outside it was touched.
pub fn unpack(dir: &Path, archive: &mut dyn Read, options: &Options<'_>) -> Result<Unpacked, UnpackError> {
    apply::unpack(dir, archive, options)
}

/// Names the act and the entry of a failed system call; a full disk becomes its own variant.
pub(crate) fn at(act: &'static str, entry: &[u8]) -> impl FnOnce(io::Error) -> UnpackError + use<> {
    let entry = shown(entry);
    move |source| match crate::is_full(&source) {
        true => UnpackError::DiskFull { entry },
        false => UnpackError::Io { act, entry, source },
    }
}

pub(crate) fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(&path[..path.len().min(300)]).into_owned()
}

#[cfg(test)]
mod golden;
#[cfg(test)]
mod tests;
