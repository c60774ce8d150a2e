//! The canonical layer tar of a snapshot: what changed against its parents, in bytes that depend on nothing else.
//!
//! Refuses to know where the bytes go (hash, file, registry) and what image they belong to.

use crate::error::{Result, at};
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::path::{Path, PathBuf};

/// What lies under the tree that is diffed: unchanged copy-ups are recognised against it.
#[derive(Clone, Copy, Debug, Default)]
pub enum Lower<'a> {
    /// Nothing: every entry is new.
    #[default]
    None,
    /// The parents as one mounted tree.
    Mounted(&'a Path),
    /// The parents' own trees, nearest first, in overlay's form.
    Layers(&'a [PathBuf]),
}

/// How to make the tar; kept with the layer, because making it again must give the same bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiffOptions<'a> {
    /// The parents' view.
    pub lower: Lower<'a>,
    /// No mtime is later than this (seconds since 1970): SOURCE_DATE_EPOCH.
    pub clamp_mtime: Option<i64>,
    /// Mount stubs, as paths inside the image: an empty file or childless directory there is not in the layer.
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

/// Writes the canonical tar of `upper` to `out`.
///
/// # Errors
/// When something cannot be read, changes while it is read, or `out` cannot take it.
pub fn write_tar(upper: &Path, _options: &DiffOptions<'_>, _out: &mut dyn Write) -> Result<DiffStats> {
    Err(at("read", upper)(std::io::ErrorKind::Unsupported.into()))
}
