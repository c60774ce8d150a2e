//! The store: images, layers and snapshots of one root directory, shared by several processes.
//!
//! Owns the order in which files and catalog change. Refuses to know registries and containers.

mod lease;

pub use lease::Lease;

use crate::content::{BlobFile, Ingest};
use crate::digest::{ChainId, DiffId, Digest, ImageId};
use crate::error::{Result, StoreError};
use crate::image::{Image, NewImage, Removed, Writer};
use crate::reference::Reference;
use oci_spec::image::Descriptor;
use serde::{Deserialize, Serialize};
use slipway_snapshot::diff::DiffStats;
use slipway_snapshot::unpack::Limits;
use slipway_snapshot::{FsInfo, RootfsMount, SnapshotId, Usage};
use std::fmt;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

macro_rules! not_ready {
    ($what:literal $(, $unused:expr)*) => {{ $(let _ = &$unused;)* Err(StoreError::NotReady { what: $what }) }};
}

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

/// The store of one root directory. Clones share one owner lock and its connections. Every method blocks: callers
/// on an async runtime use `spawn_blocking`.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    root: PathBuf,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("root", &self.inner.root).finish_non_exhaustive()
    }
}

/// An owner that died and left something outside the store (see [`Store::set_estate`]). While this value lives,
/// nobody else sees the same dead owner.
#[derive(Debug)]
pub struct DeadOwner {
    /// Its id.
    pub id: String,
    /// What it was.
    pub kind: OwnerKind,
    /// What it said it would leave outside the store.
    pub estate: String,
}

impl DeadOwner {
    /// Undoes what it left in the store: leases, ingests, active snapshots. To be called when what it left
    /// outside (mounts, processes, cgroups) is gone.
    ///
    /// # Errors
    /// What the catalog answers, or a file that cannot be removed.
    pub fn bury(self) -> Result<()> {
        not_ready!("owners")
    }
}

/// A committed layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// The layer and everything below it.
    pub chain: ChainId,
    /// Its tar.
    pub diff_id: DiffId,
    /// The chain below; `None` for the lowest layer.
    pub parent: Option<ChainId>,
    /// Its directory.
    pub snapshot: SnapshotId,
    /// What its directory takes.
    pub usage: Usage,
    /// Bytes of its uncompressed tar.
    pub tar_bytes: u64,
}

/// An active snapshot: writable on top of a chain, or a read-only view of one.
#[derive(Clone, Debug)]
pub struct Active {
    /// The caller's name for it.
    pub key: String,
    /// Its directory.
    pub snapshot: SnapshotId,
    /// How to mount it.
    pub mount: RootfsMount,
    /// What was written to it, in overlay's form.
    pub upper: PathBuf,
    /// The chain it was prepared on, where it was prepared on one.
    pub parent: Option<ChainId>,
    /// The snapshots below, nearest first.
    pub lower: Vec<SnapshotId>,
}

/// How a step's layer is made of its snapshot; kept, because making it again must give the same bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerOptions {
    /// No mtime is later than this: SOURCE_DATE_EPOCH.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clamp_mtime: Option<i64>,
    /// Mount stubs, as absolute paths inside the image.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skip: Vec<PathBuf>,
}

/// An active snapshot's canonical tar, hashed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HashedLayer {
    /// Its identity.
    pub diff_id: DiffId,
    /// What is in it; `tar_bytes` long.
    pub stats: DiffStats,
    /// How it was made.
    pub options: LayerOptions,
}

/// One layer to unpack.
pub struct LayerSource {
    /// Media type, digest and size of the blob.
    pub descriptor: Descriptor,
    /// The blob's bytes.
    pub reader: Box<dyn Read + Send>,
    /// The bytes need no checking against the descriptor: they come from the store or a [`crate::Follower`].
    pub verified: bool,
    /// What the uncompressed tar must be.
    pub diff_id: DiffId,
}

/// How layers are unpacked.
#[derive(Clone, Default)]
pub struct UnpackOptions {
    /// Layers at a time; 0: as many as there are processors, at most 4.
    pub workers: usize,
    /// What one layer may hold at most.
    pub limits: Limits,
    /// Told of each layer's uncompressed bytes as they are written, by its position. Called from many threads.
    pub progress: Option<Arc<dyn Fn(usize, u64) + Send + Sync>>,
}

/// How a layer's blob is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// gzip in independent members, by all processors at once; level 1 to 9.
    Gzip(u32),
    /// zstd in independent frames, by all processors at once; level 1 to 19.
    Zstd(i32),
    /// The tar itself.
    None,
}

/// A manifest ready to be pushed or exported.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// The exact bytes.
    pub bytes: Vec<u8>,
    /// Its digest.
    pub digest: Digest,
    /// Its media type.
    pub media_type: String,
    /// The configuration's descriptor; the bytes are [`Store::config`].
    pub config: Descriptor,
    /// The layers' blobs, bottom first.
    pub layers: Vec<Descriptor>,
}

/// What garbage collection did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GcReport {
    /// Blobs removed.
    pub blobs: u64,
    /// Snapshots removed (layers and those that no row knew).
    pub snapshots: u64,
    /// Bytes given back.
    pub bytes: u64,
}

/// The result of one build step, by its cache key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheEntry {
    /// The step's key.
    pub key: Digest,
    /// The chain after the step, for a step that made a layer (or had one below).
    pub chain: Option<ChainId>,
    /// What else the step did, in the engine's own words.
    pub value: String,
    /// When it was made.
    pub created_at: SystemTime,
    /// When it was last found.
    pub used_at: SystemTime,
}

/// Which cache entries to forget. Those that fit any of the limits go.
#[derive(Clone, Copy, Debug, Default)]
pub struct CachePrune {
    /// All of them.
    pub all: bool,
    /// Not found for this long.
    pub unused_for: Option<Duration>,
    /// The oldest, until the layers that only the cache holds take no more than this.
    pub keep_bytes: Option<u64>,
}

/// The right to execute the step with one key; given up when dropped.
#[derive(Debug)]
pub struct CacheLock {}

/// The format of an image archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArchiveFormat {
    /// OCI image layout in a tar.
    Oci,
    /// What `docker save` writes and `docker load` reads.
    Docker,
}

/// Typed JSON of slipwayd: pods, containers, names, intents.
#[derive(Clone, Copy)]
pub struct Records<'a> {
    store: &'a Store,
}

/// One runtime record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its id, unique within its kind.
    pub id: String,
    /// Its name, unique within its kind, if it has one.
    pub name: Option<String>,
    /// Its contents.
    pub json: String,
}

/// A row of the list of active snapshots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ActiveInfo {
    /// Its key.
    pub key: String,
    /// Its directory.
    pub snapshot: SnapshotId,
    /// The lease that holds it.
    pub lease: String,
    /// When it was made.
    pub created_at: SystemTime,
}

impl Store {
    /// Opens the store under a root, making it (0700) when it is not there; takes an owner lock, and undoes what
    /// dead owners left, except those that left something outside the store ([`Store::dead_owners`]).
    ///
    /// # Errors
    /// Another schema, a full disk, a root that cannot be used.
    pub fn open(root: &Path, kind: OwnerKind) -> Result<Store> {
        not_ready!("store", (root, kind, |root| Store { inner: Arc::new(Inner { root }) }))
    }

    /// The root directory.
    pub fn root(&self) -> &Path {
        &self.inner.root
    }

    /// This owner's id: the name of its lock under `owners/`.
    pub fn owner_id(&self) -> &str {
        ""
    }

    /// Says what this owner has outside the store (shim directories, mounts, cgroups), in its own words, before it
    /// makes them. Should it die, its leases and snapshots stay until somebody who understands the words has
    /// cleaned that up and calls [`DeadOwner::bury`]. `None`: nothing any more.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn set_estate(&self, estate: Option<&str>) -> Result<()> {
        not_ready!("owners", estate)
    }

    /// Dead owners with an estate; each is locked by the answer, so that two callers never get the same.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn dead_owners(&self) -> Result<Vec<DeadOwner>> {
        not_ready!("owners")
    }

    /// Whether an owner is alive.
    ///
    /// # Errors
    /// When its lock cannot be asked.
    pub fn owner_alive(&self, id: &str) -> Result<bool> {
        not_ready!("owners", id)
    }

    // ---- images

    /// Finds an image by id (`sha256:…`, or at least 12 hexadecimal digits) or reference (tag or digest, Docker's
    /// defaults). One that is torn is not found: it has to be pulled again.
    ///
    /// # Errors
    /// [`StoreError::Ambiguous`]; what the catalog answers.
    pub fn resolve(&self, name: &str) -> Result<Option<Image>> {
        not_ready!("images", name)
    }

    /// As [`Store::resolve`], but finds torn images too: for inspecting and removing.
    ///
    /// # Errors
    /// As [`Store::resolve`].
    pub fn find(&self, name: &str) -> Result<Option<Image>> {
        not_ready!("images", name)
    }

    /// All images, newest first.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn images(&self) -> Result<Vec<Image>> {
        not_ready!("images")
    }

    /// The exact bytes of an image's configuration.
    ///
    /// # Errors
    /// [`StoreError::NoImage`].
    pub fn config(&self, id: &ImageId) -> Result<Vec<u8>> {
        not_ready!("images", id)
    }

    /// Gives an image a name, taking it from the image that had it.
    ///
    /// # Errors
    /// [`StoreError::NoImage`].
    pub fn tag(&self, id: &ImageId, name: &Reference, by: Writer) -> Result<()> {
        not_ready!("images", (id, name, by))
    }

    /// Takes a name away; the image stays. `false`: nobody had it.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn untag(&self, name: &Reference) -> Result<bool> {
        not_ready!("images", name)
    }

    /// Who wrote a name last, and when.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn name_writer(&self, name: &Reference) -> Result<Option<(Writer, SystemTime)>> {
        not_ready!("images", name)
    }

    /// Removes an image with all its names and what only it needed; absent is fine. Works on a full disk.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn remove_image(&self, id: &ImageId) -> Result<Removed> {
        not_ready!("images", id)
    }

    /// Pins an image or takes the pin away. A never-pushed build stays pinned by itself.
    ///
    /// # Errors
    /// [`StoreError::NoImage`].
    pub fn set_pinned(&self, id: &ImageId, pinned: bool) -> Result<()> {
        not_ready!("images", (id, pinned))
    }

    /// How long a never-pushed build counts as pinned; `None` (as at the start): for ever.
    pub fn pin_builds_for(&self, time: Option<Duration>) {
        let _ = time;
    }

    /// Records that an image was pushed: it exists elsewhere, under this manifest.
    ///
    /// # Errors
    /// [`StoreError::NoImage`].
    pub fn record_push(&self, id: &ImageId, repo_digest: &str, manifest: &Manifest) -> Result<()> {
        not_ready!("images", (id, repo_digest, manifest))
    }

    /// Commits an image in one transaction that is durable when it returns.
    ///
    /// # Errors
    /// [`StoreError::BadConfig`], [`StoreError::NoLayer`] when a layer is missing.
    pub fn commit_image(&self, new: NewImage<'_>) -> Result<Image> {
        not_ready!("images", new.config)
    }

    /// A manifest by digest: its bytes and media type.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn manifest_bytes(&self, digest: &Digest) -> Result<Option<(Vec<u8>, String)>> {
        not_ready!("images", digest)
    }

    // ---- layers and snapshots

    /// A layer that is here and whole. To use it, ask [`Lease::layer`].
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn layer(&self, chain: &ChainId) -> Result<Option<Layer>> {
        not_ready!("layers", chain)
    }

    /// Makes a writable snapshot on a chain (`None`: on nothing), held by the lease.
    ///
    /// # Errors
    /// [`StoreError::NoLayer`], [`StoreError::SnapshotExists`], [`StoreError::LeaseGone`].
    pub fn prepare(&self, key: &str, parent: Option<&ChainId>, lease: &Lease) -> Result<Active> {
        not_ready!("layers", (key, parent, lease))
    }

    /// Makes a writable snapshot on another active one that nobody writes any more: the next step of a build
    /// starts before the layer below has been hashed.
    ///
    /// # Errors
    /// As [`Store::prepare`].
    pub fn prepare_on(&self, key: &str, below: &Active, lease: &Lease) -> Result<Active> {
        not_ready!("layers", (key, below, lease))
    }

    /// A read-only view of a chain, under a key of its own.
    ///
    /// # Errors
    /// As [`Store::prepare`].
    pub fn view(&self, key: &str, chain: Option<&ChainId>, lease: &Lease) -> Result<Active> {
        not_ready!("layers", (key, chain, lease))
    }

    /// The active snapshot with this key.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn active(&self, key: &str) -> Result<Option<Active>> {
        not_ready!("layers", key)
    }

    /// All active snapshots that have a key.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn actives(&self) -> Result<Vec<ActiveInfo>> {
        not_ready!("layers")
    }

    /// Removes an active snapshot; absent is fine. The caller has unmounted it. Works on a full disk.
    ///
    /// # Errors
    /// When something in it cannot be removed.
    pub fn remove_active(&self, key: &str) -> Result<()> {
        not_ready!("layers", key)
    }

    /// Disk use of an active snapshot.
    ///
    /// # Errors
    /// [`StoreError::NoSnapshot`].
    pub fn usage(&self, key: &str) -> Result<Usage> {
        not_ready!("layers", key)
    }

    /// Writes the canonical tar of an active snapshot (nobody writes to it any more).
    ///
    /// # Errors
    /// When something cannot be read, or `out` cannot take it.
    pub fn diff(&self, active: &Active, options: &LayerOptions, out: &mut dyn Write) -> Result<DiffStats> {
        not_ready!("layers", (active, options, &out as *const _))
    }

    /// Hashes the canonical tar of an active snapshot.
    ///
    /// # Errors
    /// As [`Store::diff`].
    pub fn hash_layer(&self, active: &Active, options: &LayerOptions) -> Result<HashedLayer> {
        not_ready!("layers", (active, options))
    }

    /// Makes active snapshots layers, each on the one before it and the first on `base`: one syncfs, then one
    /// transaction. A chain that is in the store already is answered with what is there.
    ///
    /// # Errors
    /// [`StoreError::NoSnapshot`], [`StoreError::LeaseGone`], a full disk.
    pub fn commit_layers(
        &self,
        base: Option<&ChainId>,
        layers: Vec<(Active, HashedLayer)>,
        lease: &Lease,
    ) -> Result<Vec<Layer>> {
        not_ready!("layers", (base, layers, lease))
    }

    /// Makes one active snapshot a layer on `base`.
    ///
    /// # Errors
    /// As [`Store::commit_layers`].
    pub fn commit_layer(
        &self,
        active: Active,
        hashed: HashedLayer,
        base: Option<&ChainId>,
        lease: &Lease,
    ) -> Result<Layer> {
        let layers = self.commit_layers(base, vec![(active, hashed)], lease)?;
        layers.into_iter().next().ok_or(StoreError::NotReady { what: "layers" })
    }

    /// Hashes and syncs at the same time, then commits: the shortest way from a step's end to a layer.
    ///
    /// # Errors
    /// As [`Store::hash_layer`] and [`Store::commit_layers`].
    pub fn seal_layer(
        &self,
        active: Active,
        options: &LayerOptions,
        base: Option<&ChainId>,
        lease: &Lease,
    ) -> Result<Layer> {
        not_ready!("layers", (active, options, base, lease))
    }

    /// Unpacks an image's layers (bottom first) in parallel, checks digests and DiffIDs while they stream, fixes
    /// what depends on the layers below in order, and commits them with one syncfs. Layers that are here already
    /// are not read. On failure nothing of it remains.
    ///
    /// # Errors
    /// [`StoreError::Unpack`], [`StoreError::DigestMismatch`], [`StoreError::Read`], [`StoreError::DiskFull`].
    pub fn unpack_layers(
        &self,
        layers: Vec<LayerSource>,
        options: &UnpackOptions,
        lease: &Lease,
    ) -> Result<Vec<Layer>> {
        not_ready!("unpack", (layers.len(), &options.workers, lease))
    }

    // ---- leases

    /// A new lease of this owner; `what` is for people.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn lease(&self, what: &str) -> Result<Lease> {
        not_ready!("lease", what)
    }

    /// The persistent lease with this name, made when it is not there.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn persistent_lease(&self, name: &str) -> Result<Lease> {
        not_ready!("lease", name)
    }

    /// Releases a persistent lease with what it held; absent is fine. Active snapshots under it are removed.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn release_lease(&self, name: &str) -> Result<()> {
        not_ready!("lease", name)
    }

    // ---- content

    /// A blob that is here. To use it, ask [`Lease::blob`].
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn blob(&self, digest: &Digest) -> Result<Option<BlobFile>> {
        not_ready!("content", digest)
    }

    /// Starts to write a blob; it will be held by the lease.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn ingest(&self, lease: &Lease) -> Result<Ingest> {
        not_ready!("content", lease)
    }

    /// Remembers that a repository (`registry/repository`) has a blob: for mounting it across repositories.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn add_blob_source(&self, digest: &Digest, repository: &str) -> Result<()> {
        not_ready!("content", (digest, repository))
    }

    /// The repositories that are known to have a blob, newest first.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn blob_sources(&self, digest: &Digest) -> Result<Vec<String>> {
        not_ready!("content", digest)
    }

    // ---- variants and archives

    /// The blob of a layer, held by the lease: the original of a pulled one, else the variant, made now when it is
    /// not there.
    ///
    /// # Errors
    /// [`StoreError::NotReproducible`], [`StoreError::BlobPruned`], [`StoreError::NoLayer`].
    pub fn layer_blob(&self, chain: &ChainId, compression: Compression, lease: &Lease) -> Result<Descriptor> {
        not_ready!("variants", (chain, compression, lease))
    }

    /// The descriptor of a layer's blob where it is known without making it (it may have been pruned).
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn known_layer_blob(&self, diff_id: &DiffId, compression: Compression) -> Result<Option<Descriptor>> {
        not_ready!("variants", (diff_id, compression))
    }

    /// The manifest of an image: the original of a pulled one, else made of its layers' blobs, which the lease
    /// holds then.
    ///
    /// # Errors
    /// As [`Store::layer_blob`]; [`StoreError::NoImage`].
    pub fn manifest(&self, id: &ImageId, compression: Compression, lease: &Lease) -> Result<Manifest> {
        not_ready!("variants", (id, compression, lease))
    }

    /// Loads the images of an OCI or docker archive (also a compressed one).
    ///
    /// # Errors
    /// [`StoreError::BadArchive`] and what unpacking says.
    pub fn import(&self, tar: &mut dyn Read, options: &UnpackOptions) -> Result<Vec<Image>> {
        not_ready!("import", (&tar as *const _, options.workers))
    }

    /// Writes images (by name or id) as one archive.
    ///
    /// # Errors
    /// [`StoreError::NoImage`] and as [`Store::layer_blob`].
    pub fn export(&self, names: &[&str], format: ArchiveFormat, out: &mut dyn Write) -> Result<()> {
        not_ready!("export", (names, format, &out as *const _))
    }

    // ---- housekeeping

    /// Removes what no image, lease, active snapshot or cache entry needs. Works on a full disk.
    ///
    /// # Errors
    /// What the catalog answers, or a file that cannot be removed.
    pub fn gc(&self) -> Result<GcReport> {
        not_ready!("gc")
    }

    /// The filesystem under the store, with what images and snapshots take of it.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub fn fs_info(&self) -> Result<FsInfo> {
        not_ready!("fs_info")
    }

    // ---- build cache

    /// The entry of a step; its layer is held by the lease from now on. One whose layer is gone is not found.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn cache_get(&self, key: &Digest, lease: &Lease) -> Result<Option<CacheEntry>> {
        not_ready!("cache", (key, lease))
    }

    /// Records a step's result, replacing an older one.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn cache_put(&self, key: &Digest, chain: Option<&ChainId>, value: &str) -> Result<()> {
        not_ready!("cache", (key, chain, value))
    }

    /// Forgets entries; how many. The layers go with the next [`Store::gc`].
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn cache_prune(&self, which: CachePrune) -> Result<u64> {
        not_ready!("cache", which)
    }

    /// The right to execute the step with this key, waiting while another process has it.
    ///
    /// # Errors
    /// [`StoreError::Timeout`].
    pub fn cache_lock(&self, key: &Digest, wait: Duration) -> Result<CacheLock> {
        not_ready!("cache", (key, wait))
    }

    /// The runtime records.
    pub fn records(&self) -> Records<'_> {
        Records { store: self }
    }
}

impl Records<'_> {
    /// Writes a record, replacing the one with its id.
    ///
    /// # Errors
    /// [`StoreError::NameTaken`] when another record of the kind has the name.
    pub fn put(&self, kind: &str, id: &str, name: Option<&str>, json: &str) -> Result<()> {
        not_ready!("records", (self.store, kind, id, name, json))
    }

    /// One record.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn get(&self, kind: &str, id: &str) -> Result<Option<Record>> {
        not_ready!("records", (kind, id))
    }

    /// The record that has a name.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn by_name(&self, kind: &str, name: &str) -> Result<Option<Record>> {
        not_ready!("records", (kind, name))
    }

    /// All records of a kind, oldest first.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn list(&self, kind: &str) -> Result<Vec<Record>> {
        not_ready!("records", kind)
    }

    /// Removes a record; absent is fine. Works on a full disk.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn delete(&self, kind: &str, id: &str) -> Result<()> {
        not_ready!("records", (kind, id))
    }
}
