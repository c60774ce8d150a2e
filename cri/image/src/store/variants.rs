//! The blobs of layers: the original of a pulled one, and what is made of a built one.
//!
//! A variant is recorded for ever: made again, it must have the same bytes. Pulled layers keep their descriptors and
//! are never compressed anew.

use super::images::no_image;
use super::layers::HashSink;
use super::{Layer, LayerOptions, Lease, Store};
use crate::catalog::variants::BlobRow;
use crate::catalog::{Durability, layers, variants};
use crate::codec::{Encoder, encoder_name, encoder_named};
use crate::content::{BlobFile, Follower, Ingest};
use crate::digest::{ChainId, DiffId, Digest, ImageId};
use crate::error::{Result, StoreError};
use oci_spec::image::{Descriptor, ImageManifest, ImageManifestBuilder, MediaType, SCHEMA_VERSION};
use serde::{Deserialize, Serialize};
use slipway_snapshot::{SnapshotError, SnapshotId};
use std::io::{self, Write};

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

impl Default for Compression {
    /// What every registry and every client can read, at the speed of zstd's level 3: a push waits for it.
    fn default() -> Compression {
        Compression::Gzip(1)
    }
}

impl Compression {
    fn media_type(self) -> MediaType {
        match self {
            Compression::Gzip(_) => MediaType::ImageLayerGzip,
            Compression::Zstd(_) => MediaType::ImageLayerZstd,
            Compression::None => MediaType::ImageLayer,
        }
    }
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

impl Store {
    /// The blob of a layer, held by the lease: the original of a pulled one, else the variant, made now when it is
    /// not there.
    ///
    /// # Errors
    /// [`StoreError::NotReproducible`], [`StoreError::BlobPruned`], [`StoreError::NoLayer`].
    pub fn layer_blob(&self, chain: &ChainId, compression: Compression, lease: &Lease) -> Result<Descriptor> {
        self.layer_blob_with(chain, compression, lease, |_| {})
    }

    /// As [`Store::layer_blob`]; when the blob has to be made, `started` gets a reader that follows it, so that it
    /// can be uploaded while it is made.
    ///
    /// # Errors
    /// As [`Store::layer_blob`].
    pub fn layer_blob_with(
        &self,
        chain: &ChainId,
        compression: Compression,
        lease: &Lease,
        started: impl FnOnce(Follower),
    ) -> Result<Descriptor> {
        let layer = lease.layer(chain)?.ok_or(StoreError::NoLayer { chain: *chain })?;
        let originals = self
            .inner
            .catalog
            .read(|c| variants::originals(c, &layer.diff_id))?;
        for (blob, media_type) in &originals {
            if lease.blob(&blob.digest)?.is_some() {
                return Ok(describe(blob, media_type.as_str().into()));
            }
        }
        for (blob, media_type) in &originals {
            if self
                .have_blob(chain, &layer.diff_id, &blob.digest, lease)?
                .is_some()
            {
                return Ok(describe(blob, media_type.as_str().into()));
            }
        }
        let options = self.inner.catalog.read(|c| layers::options(c, chain))?;
        let (options, None) = (options, originals.first()) else {
            let digest = originals
                .first()
                .map_or(*layer.diff_id.digest(), |(blob, _)| blob.digest);
            return Err(StoreError::BlobPruned {
                diff_id: layer.diff_id,
                digest,
            });
        };
        let Some(options) = options else {
            return Err(StoreError::BlobPruned {
                diff_id: layer.diff_id,
                digest: *layer.diff_id.digest(),
            });
        };
        let encoder = encoder_name(compression);
        let recorded = self
            .inner
            .catalog
            .read(|c| variants::get(c, &layer.diff_id, &encoder))?;
        if let Some(blob) = &recorded
            && lease.blob(&blob.digest)?.is_some()
        {
            return Ok(describe(blob, compression.media_type()));
        }
        let made = self.encode(chain, &layer.diff_id, &options, compression, lease, started)?;
        if let Some(before) = recorded
            && before != made
        {
            return Err(StoreError::NotReproducible {
                diff_id: layer.diff_id,
                encoder,
                expected: before.digest,
                found: made.digest,
            });
        }
        self.inner.catalog.write(Durability::Normal, |c| {
            variants::put(c, &layer.diff_id, &encoder, &made)
        })?;
        Ok(describe(&made, compression.media_type()))
    }

    /// How a blob that is not here can be made again: it was made here of this very layer, with this encoder.
    fn recipe(
        &self,
        chain: &ChainId,
        diff_id: &DiffId,
        blob: &Digest,
    ) -> Result<Option<(LayerOptions, Compression)>> {
        self.inner.catalog.read(|c| {
            let encoder = variants::encoder_of(c, diff_id, blob)?;
            let compression = encoder.as_deref().and_then(encoder_named);
            Ok(layers::options(c, chain)?.zip(compression))
        })
    }

    /// Whether a layer's blob is here, and held by the lease from now on, or can be made here.
    ///
    /// # Errors
    /// What the catalog answers.
    pub(crate) fn has_or_can_make(
        &self,
        chain: &ChainId,
        diff_id: &DiffId,
        blob: &Digest,
        lease: &Lease,
    ) -> Result<bool> {
        Ok(lease.blob(blob)?.is_some() || self.recipe(chain, diff_id, blob)?.is_some())
    }

    /// One certain blob of a layer, held by the lease: made again where it is not here and was made here before.
    /// `None`: it is not here, and came from elsewhere.
    ///
    /// # Errors
    /// [`StoreError::NotReproducible`]; what the catalog answers.
    pub(crate) fn have_blob(
        &self,
        chain: &ChainId,
        diff_id: &DiffId,
        blob: &Digest,
        lease: &Lease,
    ) -> Result<Option<BlobFile>> {
        if let Some(file) = lease.blob(blob)? {
            return Ok(Some(file));
        }
        let Some((options, compression)) = self.recipe(chain, diff_id, blob)? else {
            return Ok(None);
        };
        let made = self.encode(chain, diff_id, &options, compression, lease, |_| {})?;
        if made.digest != *blob {
            return Err(StoreError::NotReproducible {
                diff_id: *diff_id,
                encoder: encoder_name(compression),
                expected: *blob,
                found: made.digest,
            });
        }
        lease.blob(blob)
    }

    /// A layer that was made here and nowhere else, with how; held by the lease from now on.
    ///
    /// # Errors
    /// What the catalog answers.
    pub(crate) fn made_here(&self, chain: &ChainId, lease: &Lease) -> Result<Option<(Layer, LayerOptions)>> {
        let Some(layer) = lease.layer(chain)? else {
            return Ok(None);
        };
        let options = self.inner.catalog.read(|c| {
            let pulled = !variants::originals(c, &layer.diff_id)?.is_empty();
            Ok(layers::options(c, chain)?.filter(|_| !pulled))
        })?;
        Ok(options.map(|options| (layer, options)))
    }

    /// Writes the tar of a layer that was made here.
    ///
    /// # Errors
    /// [`StoreError::NotReproducible`], after everything was written; when `out` cannot take it.
    pub(crate) fn write_tar(
        &self,
        chain: &ChainId,
        diff_id: &DiffId,
        options: &LayerOptions,
        out: &mut dyn Write,
    ) -> Result<()> {
        let snapshots = self.chain_snapshots(chain)?;
        let (own, lower) = snapshots
            .split_first()
            .ok_or(StoreError::NoLayer { chain: *chain })?;
        let mut both = Both {
            hash: HashSink::default(),
            out,
        };
        self.write_layer(own, lower, options, &mut both)
            .map_err(|error| reading(diff_id, error))?;
        let found = Digest::from_hash(both.hash.0);
        match found == *diff_id.digest() {
            true => Ok(()),
            false => Err(StoreError::NotReproducible {
                diff_id: *diff_id,
                encoder: "tar".to_owned(),
                expected: *diff_id.digest(),
                found,
            }),
        }
    }

    fn encode(
        &self,
        chain: &ChainId,
        diff_id: &DiffId,
        options: &LayerOptions,
        compression: Compression,
        lease: &Lease,
        started: impl FnOnce(Follower),
    ) -> Result<BlobRow> {
        let _flushing = self.flushing();
        let ingest = self.ingest(lease)?;
        started(ingest.follow()?);
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let mut encoder = Encoder::new(compression, ingest, threads);
        self.write_tar(chain, diff_id, options, &mut encoder)?;
        let ingest: Ingest = encoder.finish().map_err(|source| writing(diff_id, source))?;
        let blob = ingest.finish(None, None)?;
        Ok(BlobRow {
            digest: blob.digest,
            size: blob.size,
        })
    }

    /// The snapshots of a chain, topmost first.
    pub(crate) fn chain_snapshots(&self, chain: &ChainId) -> Result<Vec<SnapshotId>> {
        let all = self.inner.catalog.read(|c| layers::chain(c, chain))?;
        let all = all.ok_or(StoreError::NoLayer { chain: *chain })?;
        Ok(all.into_iter().map(|layer| layer.snapshot).collect())
    }

    /// The descriptor of a layer's blob where it is known without making it (it may have been pruned).
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn known_layer_blob(&self, diff_id: &DiffId, compression: Compression) -> Result<Option<Descriptor>> {
        self.inner.catalog.read(|c| {
            if let Some((blob, media_type)) = variants::originals(c, diff_id)?.into_iter().next() {
                return Ok(Some(describe(&blob, media_type.as_str().into())));
            }
            let variant = variants::get(c, diff_id, &encoder_name(compression))?;
            Ok(variant.map(|blob| describe(&blob, compression.media_type())))
        })
    }

    /// The manifest of an image: the original of a pulled one, else made of its layers' blobs, which the lease
    /// holds then.
    ///
    /// # Errors
    /// As [`Store::layer_blob`]; [`StoreError::NoImage`].
    pub fn manifest(&self, id: &ImageId, compression: Compression, lease: &Lease) -> Result<Manifest> {
        let image = self.image(id)?.ok_or_else(|| no_image(id))?;
        lease.image(id)?;
        if let (false, Some(digest)) = (image.built_here, image.manifest)
            && let Some((bytes, media_type)) = self.manifest_bytes(&digest)?
        {
            let manifest = original(bytes, digest, media_type)?;
            // What is here of them stays, though the image may be removed meanwhile.
            for layer in &manifest.layers {
                if let Ok(digest) = Digest::try_from(layer.digest()) {
                    lease.blob(&digest)?;
                }
            }
            return Ok(manifest);
        }
        let mut layers = Vec::with_capacity(image.layers.len());
        for chain in ChainId::all(&image.layers) {
            layers.push(self.layer_blob(&chain, compression, lease)?);
        }
        let config_bytes = self.config(id)?;
        self.make_manifest(id, &config_bytes, layers)
    }

    /// Makes the manifest of an image from its layers' blobs: the same blobs give the same bytes.
    ///
    /// # Errors
    /// [`StoreError::BadConfig`] when a descriptor cannot be part of a manifest.
    pub fn make_manifest(&self, id: &ImageId, config: &[u8], layers: Vec<Descriptor>) -> Result<Manifest> {
        let bad = |e: String| StoreError::BadConfig {
            id: *id.digest(),
            reason: e,
        };
        let config = Descriptor::new(MediaType::ImageConfig, config.len() as u64, *id.digest());
        let layers: Vec<Descriptor> = layers.into_iter().map(as_oci).collect();
        let manifest: ImageManifest = ImageManifestBuilder::default()
            .schema_version(SCHEMA_VERSION)
            .media_type(MediaType::ImageManifest)
            .config(config.clone())
            .layers(layers.clone())
            .build()
            .map_err(|e| bad(e.to_string()))?;
        let bytes = serde_json::to_vec(&manifest).map_err(|e| bad(e.to_string()))?;
        let digest = Digest::of(&bytes);
        Ok(Manifest {
            bytes,
            digest,
            media_type: MediaType::ImageManifest.to_string(),
            config,
            layers,
        })
    }
}

fn original(bytes: Vec<u8>, digest: Digest, media_type: String) -> Result<Manifest> {
    let parsed: ImageManifest = serde_json::from_slice(&bytes).map_err(|_| StoreError::BadRow {
        what: "manifest",
        value: digest.to_string(),
    })?;
    let (config, layers) = (parsed.config().clone(), parsed.layers().clone());
    Ok(Manifest {
        bytes,
        digest,
        media_type,
        config,
        layers,
    })
}

fn describe(blob: &BlobRow, media_type: MediaType) -> Descriptor {
    Descriptor::new(media_type, blob.size, blob.digest)
}

/// Docker's names for the same kinds of layers: one manifest does not mix them.
fn as_oci(layer: Descriptor) -> Descriptor {
    let media_type = match layer.media_type().as_ref() {
        "application/vnd.docker.image.rootfs.diff.tar.gzip" => MediaType::ImageLayerGzip,
        "application/vnd.docker.image.rootfs.diff.tar.zstd" => MediaType::ImageLayerZstd,
        "application/vnd.docker.image.rootfs.diff.tar" => MediaType::ImageLayer,
        _ => return layer,
    };
    Descriptor::new(media_type, layer.size(), layer.digest().clone())
}

/// The tar goes to its hash and on.
struct Both<'a> {
    hash: HashSink,
    out: &'a mut dyn Write,
}

impl Write for Both<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write_all(bytes)?;
        self.hash.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn reading(diff_id: &DiffId, error: StoreError) -> StoreError {
    match error {
        StoreError::Snapshot {
            source: SnapshotError::DiskFull { .. },
            ..
        } => StoreError::DiskFull {
            act: format!("encode layer {diff_id}"),
        },
        other => other,
    }
}

fn writing(diff_id: &DiffId, source: io::Error) -> StoreError {
    if slipway_snapshot::is_full(&source) {
        return StoreError::DiskFull {
            act: format!("encode layer {diff_id}"),
        };
    }
    StoreError::Read {
        what: format!("the encoder of layer {diff_id}"),
        source,
    }
}
