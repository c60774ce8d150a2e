//! Images: references, registries, the content store, the catalog, layers and their snapshots.
//!
//! Owns everything between a name and a mountable root filesystem, and the store that running and building share.
//! Refuses to know containers, CRI and Dockerfiles.
#![forbid(unsafe_code)]

mod archive;
mod catalog;
mod codec;
mod content;
mod digest;
mod error;
mod failpoint;
mod held;
mod image;
mod platform;
mod progress;
mod pull;
mod push;
mod reference;
mod registry;
mod store;
#[cfg(test)]
mod testing;

pub use archive::ArchiveFormat;
pub use content::{BlobFile, Follower, Ingest};
pub use digest::{ChainId, DiffId, Digest, DigestError, ImageId};
pub use error::{Result, StoreError};
pub use failpoint::ALL as FAILPOINTS;
pub use image::{Image, NewImage, PulledManifest, Removal, Removed, Writer};
pub use platform::{Platform, PlatformError};
pub use progress::{LayerProgress, Progress, ProgressEvent, Silent};
pub use pull::{PullError, Puller};
pub use push::{PushError, Pusher};
pub use reference::{DEFAULT_REGISTRY, Reference, ReferenceError};
pub use registry::{AuthFields, BadAuthField, Credentials, LocalBuilds, RegistryConfig};
pub use store::{
    Active, ActiveInfo, Blob, CacheEntry, CacheLock, CachePrune, Compression, DeadOwner, Flushing, GcReport,
    HashedLayer, Layer, LayerOptions, LayerSource, Lease, Manifest, OwnerKind, Record, Records, Store,
    UnpackOptions, Upkeep,
};
