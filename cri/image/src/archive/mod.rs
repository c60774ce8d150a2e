//! Image archives: the OCI image layout in a tar, and what `docker save` writes, in either direction.
//!
//! Owns the two formats. An archive is hostile until checked: names in it are keys of a map and never paths on disk,
//! blobs go through the content store by digest, layers through the unpacker. Refuses to know registries (an archive
//! brings its blobs along) and how layers are stored.

mod export;
mod import;

use crate::error::Result;
use crate::image::Image;
use crate::store::{Store, UnpackOptions};
use serde::{Deserialize, Serialize};
use std::io::{Read, Write};

/// The format of an image archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArchiveFormat {
    /// OCI image layout in a tar.
    Oci,
    /// What `docker save` writes and `docker load` reads.
    Docker,
}

impl Store {
    /// Loads the images of an OCI or docker archive (also a compressed one).
    ///
    /// # Errors
    /// [`StoreError::BadArchive`](crate::StoreError::BadArchive) and what unpacking says.
    pub fn import(&self, tar: &mut dyn Read, options: &UnpackOptions) -> Result<Vec<Image>> {
        import::import(self, tar, options)
    }

    /// Writes images (by name or id) as one archive.
    ///
    /// # Errors
    /// [`StoreError::NoImage`](crate::StoreError::NoImage) and as [`Store::layer_blob`].
    pub fn export(&self, names: &[&str], format: ArchiveFormat, out: &mut dyn Write) -> Result<()> {
        export::export(self, names, format, out)
    }
}

/// What docker's `manifest.json` says of one image.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    #[serde(default, deserialize_with = "null_as_empty")]
    repo_tags: Vec<String>,
    #[serde(default, deserialize_with = "null_as_empty")]
    layers: Vec<String>,
}

fn null_as_empty<'de, D: serde::Deserializer<'de>>(d: D) -> std::result::Result<Vec<String>, D::Error> {
    Ok(Option::<Vec<String>>::deserialize(d)?.unwrap_or_default())
}

/// A full image name, where containerd looks for it.
const NAME: &str = "io.containerd.image.name";
/// A name or tag, by the OCI image layout.
const REF_NAME: &str = "org.opencontainers.image.ref.name";

#[cfg(test)]
mod tests;
