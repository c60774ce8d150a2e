//! What can go wrong in the store, named by act and object.
//!
//! Refuses to know registries (their errors are the registry module's) and gRPC codes.

use crate::digest::{ChainId, DiffId, Digest, DigestError};
use slipway_snapshot::SnapshotError;
use std::io;
use std::path::{Path, PathBuf};

/// An operation on the store failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A system call on a path failed.
    #[error("{act} {}", path.display())]
    Io {
        /// The verb.
        act: &'static str,
        /// The object.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The filesystem under the store has no room left.
    #[error("no space left on the filesystem of the store while trying to {act}")]
    DiskFull {
        /// What was attempted, with its object.
        act: String,
    },
    /// The catalog could not be read or written.
    #[error("{act} in the catalog")]
    Catalog {
        /// What was attempted.
        act: &'static str,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
    /// The catalog was written by a version that does not let this one touch it.
    #[error(
        "the catalog {} has schema {found} and admits programs of schema {needs} or newer; this one is {ours}: \
         use the newer version of slipway",
        path.display()
    )]
    SchemaTooNew {
        /// The catalog.
        path: PathBuf,
        /// Its schema.
        found: i64,
        /// The oldest program it admits.
        needs: i64,
        /// The schema of this program.
        ours: i64,
    },
    /// The file is a database, but not of ours.
    #[error("{} is not a catalog of slipway", path.display())]
    NotACatalog {
        /// The file.
        path: PathBuf,
    },
    /// A row of the catalog holds something that no version of ours writes.
    #[error("the catalog holds a {what} that cannot be read: {value:?}")]
    BadRow {
        /// What kind of value.
        what: &'static str,
        /// The value, shortened.
        value: String,
    },
    /// The snapshotter failed.
    #[error("{act}")]
    Snapshot {
        /// What was attempted, with its object.
        act: String,
        /// Why.
        #[source]
        source: SnapshotError,
    },
    /// There is no such layer, or it is torn and has to be pulled again.
    #[error("layer {chain} is not in the store (or torn): pull its image again")]
    NoLayer {
        /// The chain.
        chain: ChainId,
    },
    /// There is no such blob.
    #[error("blob {digest} is not in the store")]
    NoBlob {
        /// The digest.
        digest: Digest,
    },
    /// There is no such image.
    #[error("image {name} is not in the store")]
    NoImage {
        /// What was asked for.
        name: String,
    },
    /// The short id fits several images.
    #[error("{prefix} is the start of {count} image ids: give more digits")]
    Ambiguous {
        /// What was given.
        prefix: String,
        /// How many.
        count: usize,
    },
    /// There is no active snapshot under this key.
    #[error("there is no active snapshot {key:?}")]
    NoSnapshot {
        /// The key.
        key: String,
    },
    /// The key of an active snapshot is taken.
    #[error("an active snapshot {key:?} exists already")]
    SnapshotExists {
        /// The key.
        key: String,
    },
    /// This owner was taken for dead, and what it held was undone.
    #[error("the owner {owner} of this opening of the store is no longer known: it was taken for dead")]
    OwnerGone {
        /// Its id.
        owner: String,
    },
    /// The lease is gone: it was released, or its owner was taken for dead.
    #[error("lease {lease} no longer exists")]
    LeaseGone {
        /// Its name.
        lease: String,
    },
    /// The contents are not what the digest says.
    #[error("{what} has digest {found}, expected {expected}")]
    DigestMismatch {
        /// Which object.
        what: String,
        /// By its descriptor.
        expected: Digest,
        /// Of the bytes.
        found: Digest,
    },
    /// The contents are not as long as the descriptor says.
    #[error("{what} has {found} bytes, expected {expected}")]
    SizeMismatch {
        /// Which object.
        what: String,
        /// By its descriptor.
        expected: u64,
        /// So far, or at the end.
        found: u64,
    },
    /// Making a layer's blob again gave other bytes than the first time.
    #[error("encoding layer {diff_id} again as {encoder} gave {found}, the first time it was {expected}")]
    NotReproducible {
        /// The layer.
        diff_id: DiffId,
        /// Encoder, version and level.
        encoder: String,
        /// As recorded.
        expected: Digest,
        /// Now.
        found: Digest,
    },
    /// A pulled layer's blob is not here and must come from where it was pulled.
    #[error("the blob {digest} of layer {diff_id} was pruned and can only be had from its registry")]
    BlobPruned {
        /// The layer.
        diff_id: DiffId,
        /// Its original blob.
        digest: Digest,
    },
    /// A layer's archive is broken, hostile or not supported.
    #[error("unpack {what}")]
    Unpack {
        /// Which layer.
        what: String,
        /// Why.
        #[source]
        source: slipway_snapshot::unpack::UnpackError,
    },
    /// The stream of a layer could not be read or decompressed.
    #[error("read {what}")]
    Read {
        /// Which layer or archive.
        what: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An archive could not be written to where it goes.
    #[error("write {what}")]
    Write {
        /// Which archive.
        what: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The media type of a layer is not one we can unpack.
    #[error("{what} has media type {media_type}, which cannot be unpacked")]
    MediaType {
        /// Which layer.
        what: String,
        /// The type.
        media_type: String,
    },
    /// The image configuration cannot be used.
    #[error("the configuration of image {id} cannot be used: {reason}")]
    BadConfig {
        /// The image.
        id: Digest,
        /// Why.
        reason: String,
    },
    /// An image archive cannot be used.
    #[error("the image archive cannot be used: {reason}")]
    BadArchive {
        /// Why.
        reason: String,
    },
    /// A digest from outside is malformed.
    #[error("read a digest of {what}")]
    Digest {
        /// Of what.
        what: &'static str,
        /// Why.
        #[source]
        source: DigestError,
    },
    /// The name of a runtime record is taken.
    #[error("the {kind} name {name:?} is taken by {by}")]
    NameTaken {
        /// The kind of record.
        kind: String,
        /// The name.
        name: String,
        /// Who has it.
        by: String,
    },
    /// An image name in the catalog or an archive is not a reference.
    #[error("{name:?} is not an image reference: {reason}")]
    BadName {
        /// The name.
        name: String,
        /// Why.
        reason: String,
    },
    /// The work was given up because another part of it failed or the caller asked.
    #[error("{what} was cancelled")]
    Cancelled {
        /// Which work.
        what: String,
    },
    /// A wait reached its deadline.
    #[error("waited {seconds} s for {what}")]
    Timeout {
        /// For what.
        what: String,
        /// How long.
        seconds: u64,
    },
}

/// The result of an operation on the store.
pub type Result<T> = std::result::Result<T, StoreError>;

/// Names the act and the object of a failed system call; a full disk becomes its own variant.
pub(crate) fn at(act: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError + use<> {
    let path = path.to_path_buf();
    move |source| match slipway_snapshot::is_full(&source) {
        true => StoreError::DiskFull {
            act: format!("{act} {}", path.display()),
        },
        false => StoreError::Io { act, path, source },
    }
}

/// Names what was attempted in the catalog; a full disk becomes its own variant.
pub(crate) fn sql(act: &'static str) -> impl FnOnce(rusqlite::Error) -> StoreError + use<> {
    move |source| match is_full(&source) {
        true => StoreError::DiskFull {
            act: format!("{act} in the catalog"),
        },
        false => StoreError::Catalog { act, source },
    }
}

/// Some system calls of SQLite's report a full disk as an I/O error of their own: growing the log's index.
fn is_full(error: &rusqlite::Error) -> bool {
    match error {
        rusqlite::Error::SqliteFailure(failure, _) => {
            failure.code == rusqlite::ErrorCode::DiskFull
                || failure.extended_code == rusqlite::ffi::SQLITE_IOERR_SHMSIZE
        }
        _ => false,
    }
}

/// Names what was attempted with a snapshot; a full disk becomes its own variant.
pub(crate) fn snap(act: impl Into<String>) -> impl FnOnce(SnapshotError) -> StoreError {
    let act = act.into();
    move |source| match source {
        SnapshotError::DiskFull { .. } => StoreError::DiskFull { act },
        source => StoreError::Snapshot { act, source },
    }
}

impl StoreError {
    /// Whether the filesystem under the store is full: removing something and trying again may help.
    pub fn is_disk_full(&self) -> bool {
        matches!(self, StoreError::DiskFull { .. })
    }
}

/// An error and its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}
