//! Content: blobs by digest, complete and durable under `content/sha256`, being written under `content/ingest`.
//!
//! Only layers' blobs are files; configurations and manifests are small and live in the catalog, so that an image
//! is committed by one transaction. Refuses to know who needs a blob.

mod ingest;

pub use ingest::{Follower, Ingest};

use crate::digest::Digest;
use crate::error::{Result, at};
use std::fs::File;
use std::path::PathBuf;

/// A complete blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobFile {
    /// What it is.
    pub digest: Digest,
    /// How long it is.
    pub size: u64,
    /// Where it is.
    pub path: PathBuf,
}

impl BlobFile {
    /// Opens it for reading.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(&self) -> Result<File> {
        File::open(&self.path).map_err(at("open", &self.path))
    }
}
