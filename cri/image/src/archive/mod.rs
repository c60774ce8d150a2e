//! Image archives: the OCI image layout in a tar, and what `docker save` writes.
//!
//! Owns the two formats. An archive is hostile until checked: names in it are keys of a map and never paths on disk,
//! blobs go through the content store by digest, layers through the unpacker. Refuses to know how layers are stored.

mod export;
mod import;

pub(crate) use export::export;
pub(crate) use import::import;

use serde::{Deserialize, Serialize};

/// What an image list in docker's `manifest.json` says of one image.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    #[serde(default, deserialize_with = "null_as_empty")]
    repo_tags: Vec<String>,
    #[serde(default, deserialize_with = "null_as_empty")]
    layers: Vec<String>,
}

fn null_as_empty<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Vec<String>, D::Error> {
    Ok(Option::<Vec<String>>::deserialize(d)?.unwrap_or_default())
}

/// A full image name, where containerd looks for it.
const NAME: &str = "io.containerd.image.name";
/// A name or tag, by the OCI image layout.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
