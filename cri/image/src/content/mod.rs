//! Content: blobs by digest, complete and durable under `content/sha256`, being written under `content/ingest`.
//!
//! ```text
//! content/
//!   sha256/<64 digits>       complete, checked, synced; has a row in the catalog
//!   ingest/<owner>-<n>       being written, or renamed away to be removed; goes with its owner
//! ```
//! Only layers' blobs are files; configurations and manifests are small and live in the catalog, so that an image
//! is committed by one transaction. Refuses to know who needs a blob.

mod ingest;

pub use ingest::{Follower, Ingest};

use crate::catalog::{Catalog, blobs};
use crate::digest::Digest;
use crate::error::{Result, at};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

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
    /// Opens it for reading. An open blob stays readable whatever becomes of the store.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(&self) -> Result<File> {
        File::open(&self.path).map_err(at("open", &self.path))
    }
}

/// The directories of one store.
#[derive(Debug)]
pub(crate) struct Content {
    blobs: PathBuf,
    ingest: PathBuf,
    next: AtomicU64,
}

impl Content {
    pub(crate) fn open(root: &Path) -> Result<Content> {
        let content = Content {
            blobs: root.join("content/sha256"),
            ingest: root.join("content/ingest"),
            next: AtomicU64::new(0),
        };
        for dir in [&content.blobs, &content.ingest] {
            std::fs::create_dir_all(dir).map_err(at("create", dir))?;
        }
        Ok(content)
    }

    pub(crate) fn blobs_dir(&self) -> &Path {
        &self.blobs
    }

    pub(crate) fn ingest_dir(&self) -> &Path {
        &self.ingest
    }

    /// Where a complete blob is.
    pub(crate) fn path(&self, digest: &Digest) -> PathBuf {
        self.blobs.join(digest.hex())
    }

    /// A name nobody has used, for something that goes with its owner.
    pub(crate) fn fresh(&self, owner: &str) -> PathBuf {
        self.ingest
            .join(format!("{owner}-{}", self.next.fetch_add(1, Ordering::Relaxed)))
    }

    /// A blob with this row, if its file is what the row says.
    pub(crate) fn file(&self, digest: &Digest, size: u64) -> Option<BlobFile> {
        let path = self.path(digest);
        let there = std::fs::metadata(&path).is_ok_and(|meta| meta.is_file() && meta.len() == size);
        there.then_some(BlobFile {
            digest: *digest,
            size,
            path,
        })
    }

    pub(crate) fn find(&self, catalog: &Catalog, digest: &Digest) -> Result<Option<BlobFile>> {
        let size = catalog.read(|c| blobs::size(c, digest))?;
        Ok(size.and_then(|size| self.file(digest, size)))
    }
}
