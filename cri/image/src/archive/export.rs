//! Writing an archive. The OCI form also carries docker's `manifest.json`, so that both loaders read it.

use super::{ArchiveFormat, DockerImage, NAME, REF_NAME};
use crate::digest::Digest;
use crate::error::{Result, StoreError};
use crate::image::Image;
use crate::store::{Compression, Layer, LayerOptions, Lease, Manifest, Store};
use slipway_snapshot::tar::{Header, Kind, Writer};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};

/// Layers of an OCI archive: the encoding a push uses, so that the digests are those of the registry.
const OCI_LAYERS: Compression = Compression::Gzip(1);

/// Writes the images named (or given by id) to `out`.
pub(crate) fn export(
    store: &Store,
    names: &[&str],
    format: ArchiveFormat,
    out: &mut dyn Write,
) -> Result<()> {
    let lease = store.lease("save of images")?;
    let mut tar = Archive {
        tar: Writer::new(out),
        written: BTreeSet::new(),
    };
    // One entry an image; each of the names it was asked for by.
    let mut images: Vec<(Image, Vec<String>)> = Vec::new();
    for name in names {
        let image = store.resolve(name)?.ok_or_else(|| StoreError::NoImage {
            name: (*name).to_owned(),
        })?;
        let wanted = crate::Reference::parse(name).ok().map(|r| r.to_string());
        let known = wanted.filter(|w| image.names.iter().any(|n| n.to_string() == *w));
        match images.iter_mut().find(|(i, _)| i.id == image.id) {
            Some((_, n)) => n.extend(known),
            None => images.push((image, known.into_iter().collect())),
        }
    }
    match format {
        ArchiveFormat::Oci => oci(store, &images, &lease, &mut tar)?,
        ArchiveFormat::Docker => docker(store, &images, &lease, &mut tar)?,
    }
    tar.tar.finish().map_err(write_error)?;
    Ok(())
}

fn write_error(source: io::Error) -> StoreError {
    match slipway_snapshot::is_full(&source) {
        true => StoreError::DiskFull {
            act: "write the image archive".into(),
        },
        false => StoreError::Write {
            what: "the image archive".into(),
            source,
        },
    }
}

struct Archive<'a> {
    tar: Writer<&'a mut dyn Write>,
    written: BTreeSet<String>,
}

impl Archive<'_> {
    fn file(&mut self, path: &str, size: u64, contents: &mut dyn Read) -> Result<()> {
        if !self.written.insert(path.to_owned()) {
            return Ok(());
        }
        let mut header = Header::new(path, Kind::File);
        header.mode = 0o644;
        header.size = size;
        self.tar.file(&header, contents).map_err(write_error)
    }

    /// A layer made here, as its tar: written as it is read, and kept nowhere.
    fn layer(&mut self, store: &Store, path: &str, layer: &Layer, options: &LayerOptions) -> Result<()> {
        if !self.written.insert(path.to_owned()) {
            return Ok(());
        }
        let mut header = Header::new(path, Kind::File);
        header.mode = 0o644;
        header.size = layer.tar_bytes;
        let mut contents = self.tar.begin(&header).map_err(write_error)?;
        store.write_tar(&layer.chain, &layer.diff_id, options, &mut contents)?;
        contents.end().map_err(write_error)
    }

    fn bytes(&mut self, path: &str, bytes: &[u8]) -> Result<()> {
        self.file(path, bytes.len() as u64, &mut &bytes[..])
    }

    fn blob(&mut self, store: &Store, path: &str, digest: &Digest) -> Result<()> {
        let blob = store
            .blob(digest)?
            .ok_or(StoreError::NoBlob { digest: *digest })?;
        self.file(path, blob.size, &mut blob.open()?)
    }
}

fn digest_of(d: &oci_spec::image::Descriptor) -> Result<Digest> {
    d.digest()
        .to_string()
        .parse()
        .map_err(|source| StoreError::Digest {
            what: "a layer",
            source,
        })
}

fn blob_path(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn oci(store: &Store, images: &[(Image, Vec<String>)], lease: &Lease, tar: &mut Archive<'_>) -> Result<()> {
    tar.bytes("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    let (mut manifests, mut docker) = (Vec::new(), Vec::new());
    for (image, names) in images {
        let manifest: Manifest = store.manifest(&image.id, OCI_LAYERS, lease)?;
        let mut layers = Vec::new();
        let chains = crate::ChainId::all(&image.layers);
        for ((layer, diff_id), chain) in manifest.layers.iter().zip(&image.layers).zip(&chains) {
            let digest = digest_of(layer)?;
            if store.have_blob(chain, diff_id, &digest, lease)?.is_none() {
                return Err(StoreError::BlobPruned {
                    diff_id: *diff_id,
                    digest,
                });
            }
            tar.blob(store, &blob_path(&digest), &digest)?;
            layers.push(blob_path(&digest));
        }
        let config = blob_path(image.id.digest());
        tar.bytes(&config, &store.config(&image.id)?)?;
        tar.bytes(&blob_path(&manifest.digest), &manifest.bytes)?;
        docker.push(DockerImage {
            config,
            repo_tags: names.clone(),
            layers,
        });
        let descriptor = |annotations: Option<serde_json::Value>| {
            let mut d = serde_json::json!({
                "mediaType": manifest.media_type,
                "digest": manifest.digest.to_string(),
                "size": manifest.bytes.len(),
            });
            if let (Some(a), Some(o)) = (annotations, d.as_object_mut()) {
                o.insert("annotations".into(), a);
            }
            d
        };
        if names.is_empty() {
            manifests.push(descriptor(None));
        }
        for name in names {
            let tag = name.rsplit_once(':').map_or("latest", |(_, t)| t);
            manifests.push(descriptor(Some(serde_json::json!({ NAME: name, REF_NAME: tag }))));
        }
    }
    let index = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": manifests,
    });
    tar.bytes("index.json", index.to_string().as_bytes())?;
    tar.bytes("manifest.json", serde_json::json!(docker).to_string().as_bytes())
}

fn docker(
    store: &Store,
    images: &[(Image, Vec<String>)],
    lease: &Lease,
    tar: &mut Archive<'_>,
) -> Result<()> {
    let mut list = Vec::new();
    let mut repositories: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
    for (image, names) in images {
        let mut layers = Vec::new();
        for (n, diff) in image.layers.iter().enumerate() {
            let chain = crate::ChainId::of(&image.layers[..=n]).ok_or_else(|| StoreError::NoImage {
                name: image.id.to_string(),
            })?;
            let path = format!("{}/layer.tar", diff.digest().hex());
            match store.made_here(&chain, lease)? {
                Some((layer, options)) => tar.layer(store, &path, &layer, &options)?,
                None => {
                    let blob = store.layer_blob(&chain, Compression::None, lease)?;
                    tar.blob(store, &path, &digest_of(&blob)?)?;
                }
            }
            layers.push(path);
        }
        let config = format!("{}.json", image.id.digest().hex());
        tar.bytes(&config, &store.config(&image.id)?)?;
        let top = image.layers.last().map(|d| d.digest().hex()).unwrap_or_default();
        for name in names {
            if let Some((repository, tag)) = name.rsplit_once(':') {
                repositories
                    .entry(repository.to_owned())
                    .or_default()
                    .insert(tag.to_owned(), top.clone());
            }
        }
        list.push(DockerImage {
            config,
            repo_tags: names.clone(),
            layers,
        });
    }
    tar.bytes("manifest.json", serde_json::json!(list).to_string().as_bytes())?;
    tar.bytes(
        "repositories",
        serde_json::json!(repositories).to_string().as_bytes(),
    )
}
