//! What an image is to the rest of the program: plain values, no I/O.
//!
//! # Identity
//! `Image.id` is the digest of the configuration and never changes. A name points at one image and remembers who
//! wrote it last. Repository digests are empty until the image was pulled or pushed. A build that was never pushed
//! is the only copy there is, so it counts as pinned.

use crate::digest::{ChainId, DiffId, Digest, ImageId};
use crate::error::{Result, StoreError};
use crate::reference::Reference;
use crate::store::Lease;
use oci_spec::image::{Descriptor, ImageConfiguration};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::time::SystemTime;

/// Who gave an image its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Writer {
    /// A build on this node.
    Build,
    /// A pull.
    Pull,
    /// An imported archive.
    Load,
    /// A person, by `tag`.
    User,
}

impl fmt::Display for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Writer::Build => "build",
            Writer::Pull => "pull",
            Writer::Load => "load",
            Writer::User => "user",
        })
    }
}

impl FromStr for Writer {
    type Err = StoreError;
    fn from_str(text: &str) -> Result<Writer> {
        match text {
            "build" => Ok(Writer::Build),
            "pull" => Ok(Writer::Pull),
            "load" => Ok(Writer::Load),
            "user" => Ok(Writer::User),
            other => Err(StoreError::BadRow {
                what: "writer of a name",
                value: other.chars().take(40).collect(),
            }),
        }
    }
}

/// An image in the store.
#[derive(Clone, Debug)]
pub struct Image {
    /// The digest of the configuration.
    pub id: ImageId,
    /// The parsed configuration; [`Store::config`](crate::Store::config) has the exact bytes.
    pub config: ImageConfiguration,
    /// Its names, sorted.
    pub names: Vec<Reference>,
    /// `repository@sha256:…`, sorted; empty until it was pulled or pushed.
    pub repo_digests: Vec<String>,
    /// The chain of all its layers; `None` when it has none.
    pub chain: Option<ChainId>,
    /// Its layers, bottom first.
    pub layers: Vec<DiffId>,
    /// Bytes it takes on the node: its unpacked layers and its configuration (always > 0).
    pub size: u64,
    /// Not to be removed by garbage collection: pinned by hand, or a build that exists nowhere else.
    pub pinned: bool,
    /// When it came into this store.
    pub created_at: SystemTime,
    /// Made by a build on this node.
    pub built_here: bool,
    /// The manifest it was pulled or last pushed with.
    pub manifest: Option<Digest>,
    /// Every layer is here and whole. An image that is not must be pulled again; `resolve` does not find it.
    pub intact: bool,
}

/// The manifest an image was pulled with.
#[derive(Clone, Debug)]
pub struct PulledManifest<'a> {
    /// The exact bytes.
    pub bytes: &'a [u8],
    /// Its media type.
    pub media_type: String,
    /// The layers' descriptors as the manifest has them, bottom first.
    pub layers: Vec<Descriptor>,
}

/// An image to be committed: everything it refers to is in the store already and held by the lease.
pub struct NewImage<'a> {
    /// The exact bytes of the configuration; their digest is the image's id.
    pub config: &'a [u8],
    /// The manifest, when it came from a registry or an archive that has one.
    pub manifest: Option<PulledManifest<'a>>,
    /// The names it gets; each is taken from the image that had it.
    pub names: Vec<Reference>,
    /// `repository@sha256:…` strings: pulled images only.
    pub repo_digests: Vec<String>,
    /// Who makes it.
    pub writer: Writer,
    /// What protects the layers until the image does.
    pub lease: &'a Lease,
}

/// What removing an image did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// The names that are gone, as text.
    pub names: Vec<String>,
    /// Bytes given back so far: layers in use by containers stay until those are removed.
    pub freed: u64,
}

/// What a removal that was to be decided under the catalog's lock came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Removal {
    /// A name is gone; the image has others.
    Untagged,
    /// The image is gone.
    Removed {
        /// Which.
        id: ImageId,
        /// The names that went with it, as text.
        names: Vec<String>,
    },
    /// The image has these names, more than it might have: it stays.
    Named(Vec<String>),
    /// There is no such name or image.
    Absent,
}
