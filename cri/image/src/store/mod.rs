//! The store: images, layers and snapshots of one root directory, shared by several processes.
//!
//! Owns the order in which files and catalog change. Refuses to know registries and containers.
//!
//! ```text
//! <root>/                 0700
//!   owners/               who has it open (see the owners module)
//!   catalog.db            what there is (see the catalog)
//!   content/              blobs
//!   snapshots/            directories of layers and containers
//!   locks/                build steps being executed
//!   reserve               given up so that deleting still commits on a full disk
//! ```
//! # Order
//! *Making*: row (the intent: who, under which lease) → files → sync → row (visible). *Removing*: row (doomed:
//! visible to nobody) → files → row gone. Whatever dies in between leaves a row that says what to undo, or a file
//! that no row knows, which garbage collection sweeps.
//!
//! *Torn layers.* A committed snapshot has a marker that was written after its files were on disk. A layer whose
//! marker or directory is missing counts as absent: a pull unpacks it again and puts the new directory in its place.

mod active;
mod cache;
mod decoding;
mod gc;
mod images;
mod layers;
mod lease;
mod owners;
mod records;
mod reserve;
mod sync;
mod unpack;
mod upkeep;
mod variants;

pub use active::{Active, ActiveInfo};
pub use cache::{CacheEntry, CacheLock, CachePrune};
pub use gc::GcReport;
pub use layers::{HashedLayer, Layer, LayerOptions};
pub use lease::Lease;
pub use owners::DeadOwner;
pub use records::{Record, Records};
pub use sync::Flushing;
pub(crate) use sync::Since;
pub use unpack::{Blob, LayerSource, UnpackOptions};
pub use upkeep::Upkeep;
pub use variants::{Compression, Manifest};

use crate::catalog::{self, Catalog, Durability, blobs};
use crate::content::{BlobFile, Content, Ingest};
use crate::digest::Digest;
use crate::error::{Result, StoreError, at, chain, snap};
use owners::OwnerLock;
use serde::{Deserialize, Serialize};
use slipway_snapshot::Overlay;
use slipway_snapshot::unpack::NamePool;
use std::collections::HashSet;
use std::fmt;
use std::fs::{DirBuilder, Permissions};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Bytes of memory for names of all images that are being unpacked, beyond what each may have anyway.
const NAMES: u64 = 256 << 20;

/// Who has opened the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OwnerKind {
    /// slipwayd.
    Daemon,
    /// A build.
    Build,
    /// Any other command.
    Cli,
}

impl OwnerKind {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            OwnerKind::Daemon => "daemon",
            OwnerKind::Build => "build",
            OwnerKind::Cli => "cli",
        }
    }
}

impl FromStr for OwnerKind {
    type Err = StoreError;
    fn from_str(text: &str) -> Result<OwnerKind> {
        match text {
            "daemon" => Ok(OwnerKind::Daemon),
            "build" => Ok(OwnerKind::Build),
            "cli" => Ok(OwnerKind::Cli),
            other => Err(StoreError::BadRow {
                what: "kind of owner",
                value: other.chars().take(40).collect(),
            }),
        }
    }
}

/// The store of one root directory. Clones share one owner lock and its connections. Every method blocks: callers
/// on an async runtime use `spawn_blocking`.
#[derive(Clone)]
pub struct Store {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) root: PathBuf,
    pub(crate) catalog: Catalog,
    pub(crate) content: Content,
    pub(crate) overlay: Overlay,
    pub(crate) syncer: Arc<sync::Syncer>,
    /// Memory for names of all layers that are being unpacked.
    pub(crate) names: NamePool,
    pub(crate) owner: OwnerLock,
    next_lease: AtomicU64,
    pin_time: Mutex<Option<Duration>>,
    /// Leases under which the disk was found full.
    full_under: Mutex<HashSet<String>>,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("root", &self.inner.root)
            .field("owner", &self.inner.owner.id)
            .finish_non_exhaustive()
    }
}

impl Store {
    /// Opens the store under a root, making it (0700) when it is not there; takes an owner lock, and undoes what
    /// dead owners left, except those that left something outside the store ([`Store::dead_owners`]).
    ///
    /// # Errors
    /// Another schema, a full disk, a root that cannot be used.
    pub fn open(root: &Path, kind: OwnerKind) -> Result<Store> {
        let root = make_root(root)?;
        let store = {
            let _gate = owners::gate(&root)?;
            reserve::fill(&root);
            let catalog = open_catalog(&root)?;
            let owner = owners::become_owner(&root, kind)?;
            let boot = boot_id();
            catalog.write(Durability::Normal, |c| {
                catalog::owners::add(c, &owner.id, kind, std::process::id(), &boot)
            })?;
            let content = Content::open(&root)?;
            let overlay = Overlay::open(&root.join("snapshots")).map_err(snap("open the snapshots"))?;
            let snapshots = root.join("snapshots");
            let syncer = sync::Syncer::new(&[&snapshots, content.ingest_dir(), content.blobs_dir()]);
            let inner = Inner {
                root,
                catalog,
                content,
                overlay,
                syncer: Arc::new(syncer),
                names: NamePool::new(NAMES),
                owner,
                next_lease: AtomicU64::new(0),
                pin_time: Mutex::default(),
                full_under: Mutex::default(),
            };
            Store {
                inner: Arc::new(inner),
            }
        };
        // What cannot be undone stays as it is, and is tried again; it is no reason to have no store.
        if let Err(error) = store.undo_dead_owners() {
            tracing::warn!("what a dead owner left cannot be undone: {}", chain(&error));
        }
        Ok(store)
    }

    /// The root directory.
    pub fn root(&self) -> &Path {
        &self.inner.root
    }

    /// A blob that is here. To use it, ask [`Lease::blob`].
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn blob(&self, digest: &Digest) -> Result<Option<BlobFile>> {
        self.inner.content.find(&self.inner.catalog, digest)
    }

    /// Starts to write a blob; it will be held by the lease.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn ingest(&self, lease: &Lease) -> Result<Ingest> {
        Ingest::start(self, lease.name())
    }

    /// Remembers that a repository (`registry/repository`) has a blob: for mounting it across repositories.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn add_blob_source(&self, digest: &Digest, repository: &str) -> Result<()> {
        self.inner
            .catalog
            .write(Durability::Normal, |c| blobs::add_source(c, digest, repository))
    }

    /// The repositories that are known to have a blob, newest first.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn blob_sources(&self, digest: &Digest) -> Result<Vec<String>> {
        self.inner.catalog.read(|c| blobs::sources(c, digest))
    }
}

impl Drop for Inner {
    /// The last clone is gone: what this owner held, it no longer needs. An estate stays for whoever understands it.
    fn drop(&mut self) {
        let id = self.owner.id.clone();
        let leave = || -> Result<()> {
            let row = self.catalog.read(|c| catalog::owners::get(c, &id))?;
            if row.is_some_and(|row| row.estate.is_some()) {
                return Ok(());
            }
            let _gate = owners::gate(&self.root)?;
            self.with_reserve(|| {
                self.catalog
                    .write(Durability::Normal, |c| catalog::owners::bury(c, &id))
            })?;
            std::fs::remove_file(&self.owner.path).map_err(at("remove", &self.owner.path))
        };
        if let Err(error) = leave() {
            // The next opener finds the lock free and undoes it.
            tracing::debug!(owner = %self.owner.id, %error, "the store could not be left cleanly");
        }
    }
}

fn make_root(root: &Path) -> Result<PathBuf> {
    let mode = |mode| {
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(mode);
        builder
    };
    if let Some(parent) = root.parent() {
        mode(0o755).create(parent).map_err(at("create", parent))?;
    }
    mode(0o700).create(root).map_err(at("create", root))?;
    std::fs::set_permissions(root, Permissions::from_mode(0o700)).map_err(at("protect", root))?;
    // Mounts and other processes see it by this path, whatever the working directory.
    let root = std::fs::canonicalize(root).map_err(at("find", root))?;
    let owners = root.join("owners");
    mode(0o700).create(&owners).map_err(at("create", &owners))?;
    Ok(root)
}

fn open_catalog(root: &Path) -> Result<Catalog> {
    let path = root.join("catalog.db");
    match Catalog::open(&path) {
        // Opening writes: the log's index at least.
        Err(error) if error.is_disk_full() => {
            reserve::free(root)?;
            Catalog::open(&path)
        }
        other => other,
    }
}

/// Which boot of the machine this is; empty where the kernel does not tell.
fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|id| id.trim().to_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests;
