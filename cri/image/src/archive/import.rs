//! Reading an archive: its files become blobs, then its index or manifest says which of them are images.

use super::{DockerImage, NAME, REF_NAME};
use crate::codec::{Window, decoder};
use crate::digest::{DiffId, Digest, ImageId};
use crate::error::{Result, StoreError, chain};
use crate::image::{Image, NewImage, PulledManifest, Writer};
use crate::platform::Platform;
use crate::reference::Reference;
use crate::store::{LayerSource, Lease, Store, UnpackOptions};
use oci_spec::image::{Descriptor, ImageConfiguration, ImageIndex, ImageManifest, MediaType};
use slipway_snapshot::tar::{Header, Kind, Reader};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufReader, Read, Write};
use std::str::FromStr;

/// A JSON document of an archive is not larger than this.
const MAX_JSON: u64 = 4 << 20;
/// Files in an archive, and images in an index or a list.
const MAX_FILES: usize = 100_000;
/// Bytes of all names and targets of links together: they are kept until the archive's end.
const MAX_NAMES: usize = 32 << 20;
const MAX_IMAGES: usize = 1_000;
const MAX_NESTING: u32 = 3;

/// Read and written at a time.
const BUFFER: usize = 256 << 10;

/// What was found in the archive: where each file's bytes are now.
struct Contents {
    /// `index.json`, `manifest.json`.
    documents: BTreeMap<String, Vec<u8>>,
    /// Path in the archive → blob.
    files: BTreeMap<String, (Digest, u64)>,
    /// Path → path, for the links of old docker archives.
    links: BTreeMap<String, String>,
}

/// Loads every image of the archive for this machine's platform. What a failed load had written is given back.
pub(crate) fn import(store: &Store, tar: &mut dyn Read, options: &UnpackOptions) -> Result<Vec<Image>> {
    let lease = store.lease("load of an image archive")?;
    let images = load(store, tar, options, &lease);
    drop(lease);
    // Also of a good one: documents came as blobs, and files that nothing names.
    if let Err(error) = store.gc() {
        tracing::warn!(%error, "what a load no longer needs could not be collected");
    }
    images
}

fn load(store: &Store, tar: &mut dyn Read, options: &UnpackOptions, lease: &Lease) -> Result<Vec<Image>> {
    let contents = read(store, tar, lease)?;
    let mut images = Vec::new();
    let mut docker: Vec<DockerImage> = match contents.documents.get("manifest.json") {
        Some(bytes) => parse(bytes, "manifest.json")?,
        None => Vec::new(),
    };
    if docker.len() > MAX_IMAGES {
        return Err(bad(format!(
            "its manifest.json lists more than {MAX_IMAGES} images"
        )));
    }
    if let Some(index) = contents.documents.get("index.json") {
        let index: ImageIndex = parse(index, "index.json")?;
        let mut found = Vec::new();
        find(store, &index, &[], 0, &mut found)?;
        for (manifest, names) in found {
            images.push(oci_image(store, &manifest, names, &mut docker, options, lease)?);
        }
    } else {
        for image in distinct(docker, &contents)? {
            images.push(docker_image(store, &contents, &image, options, lease)?);
        }
    }
    if images.is_empty() {
        return Err(bad(
            "it has neither an index.json nor a manifest.json with an image for this machine",
        ));
    }
    Ok(images)
}

fn bad(reason: impl Into<String>) -> StoreError {
    StoreError::BadArchive {
        reason: reason.into(),
    }
}

fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8], what: &str) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|e| bad(format!("{what} is not what it should be: {e}")))
}

/// A path of the archive as a key: no leading `./` or `/`, no `.` components, `..` resolved inside the archive.
fn key(path: &[u8]) -> String {
    let text = String::from_utf8_lossy(path);
    let mut parts: Vec<&str> = Vec::new();
    for part in text.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

fn read(store: &Store, tar: &mut dyn Read, lease: &Lease) -> Result<Contents> {
    let mut contents = Contents {
        documents: BTreeMap::new(),
        files: BTreeMap::new(),
        links: BTreeMap::new(),
    };
    let (_, plain) = decoder(Box::new(tar), Window::Large).map_err(|source| StoreError::Read {
        what: "the image archive".to_owned(),
        source,
    })?;
    let mut reader = Reader::new(BufReader::with_capacity(BUFFER, plain));
    let damaged = |e| bad(chain(&e));
    let mut names = 0;
    while let Some(header) = reader.next_entry().map_err(damaged)? {
        // A link's target is kept behind the directory it is in.
        names += 2 * header.path.len() + header.link.len();
        if names > MAX_NAMES {
            return Err(bad(format!("its names have more than {} MiB", MAX_NAMES >> 20)));
        }
        if contents.files.len() + contents.links.len() >= MAX_FILES {
            return Err(bad(format!("it holds more than {MAX_FILES} files")));
        }
        let path = key(&header.path);
        match header.kind {
            Kind::File if matches!(path.as_str(), "index.json" | "manifest.json") => {
                contents.documents.insert(path, document(&mut reader, &header)?);
            }
            Kind::File => {
                let blob = ingest(store, &mut reader, &path, lease)?;
                contents.files.insert(path, blob);
            }
            Kind::Symlink => {
                let dir = path.rsplit_once('/').map_or("", |(dir, _)| dir);
                let target = [dir.as_bytes(), b"/", &header.link].concat();
                contents.links.insert(path, key(&target));
            }
            Kind::HardLink => {
                contents.links.insert(path, key(&header.link));
            }
            _ => {}
        }
    }
    // To the end: whoever writes the stream must not find it closed.
    reader.finish().map_err(|e| bad(chain(&e)))?;
    Ok(contents)
}

fn document(reader: &mut Reader<impl Read>, header: &Header) -> Result<Vec<u8>> {
    if header.size > MAX_JSON {
        return Err(bad(format!("{} has {} bytes", key(&header.path), header.size)));
    }
    let mut bytes = vec![0; usize::try_from(header.size).unwrap_or(0)];
    let mut filled = 0;
    while filled < bytes.len() {
        match reader
            .read_body(&mut bytes[filled..])
            .map_err(|e| bad(chain(&e)))?
        {
            0 => break,
            n => filled += n,
        }
    }
    bytes.truncate(filled);
    Ok(bytes)
}

/// Writes a file of the archive as a blob. One below `blobs/sha256` must be what its name says.
fn ingest(store: &Store, reader: &mut Reader<impl Read>, path: &str, lease: &Lease) -> Result<(Digest, u64)> {
    let expected = match path.strip_prefix("blobs/sha256/") {
        Some(hex) => Some(Digest::from_hex(hex).map_err(|source| StoreError::Digest {
            what: "a blob in the archive",
            source,
        })?),
        None => None,
    };
    let mut out = store.ingest(lease)?;
    let mut buffer = vec![0; BUFFER];
    loop {
        match reader.read_body(&mut buffer).map_err(|e| bad(chain(&e)))? {
            0 => break,
            n => out
                .write_all(&buffer[..n])
                .map_err(|source| match slipway_snapshot::is_full(&source) {
                    true => StoreError::DiskFull {
                        act: format!("write {path} of the image archive"),
                    },
                    false => StoreError::Read {
                        what: format!("{path} of the image archive"),
                        source,
                    },
                })?,
        }
    }
    let blob = out.finish(expected.as_ref(), None)?;
    Ok((blob.digest, blob.size))
}

/// A small document that is a blob.
fn blob_json(store: &Store, digest: &Digest) -> Result<Vec<u8>> {
    let blob = store
        .blob(digest)?
        .ok_or_else(|| bad(format!("it refers to {digest}, which is not in it")))?;
    if blob.size > MAX_JSON {
        return Err(bad(format!("the document {digest} has {} bytes", blob.size)));
    }
    let mut bytes = Vec::new();
    let read = |source| StoreError::Read {
        what: digest.to_string(),
        source,
    };
    blob.open()?
        .take(MAX_JSON)
        .read_to_end(&mut bytes)
        .map_err(read)?;
    Ok(bytes)
}

fn digest_of(descriptor: &Descriptor) -> Result<Digest> {
    Digest::try_from(descriptor.digest()).map_err(|source| StoreError::Digest {
        what: "a descriptor in the archive",
        source,
    })
}

fn platform_of(descriptor: &Descriptor) -> Option<Platform> {
    let p = descriptor.platform().as_ref()?;
    Some(Platform::new(
        &p.os().to_string(),
        &p.architecture().to_string(),
        p.variant().as_deref(),
    ))
}

/// The manifests an index leads to, one for each name: of a nested index, the one for this machine.
fn find(
    store: &Store,
    index: &ImageIndex,
    names: &[String],
    depth: u32,
    found: &mut Vec<(Descriptor, Vec<String>)>,
) -> Result<()> {
    let offers: Vec<Descriptor> = match depth {
        // At the top every entry is an image of its own.
        0 => index.manifests().clone(),
        _ => {
            let platforms: Vec<Option<Platform>> = index.manifests().iter().map(platform_of).collect();
            let best = Platform::host().choose(platforms.iter().map(Option::as_ref));
            best.and_then(|n| index.manifests().get(n))
                .cloned()
                .into_iter()
                .collect()
        }
    };
    if depth > MAX_NESTING || offers.len() > MAX_IMAGES {
        return Err(bad("its index is nested too deeply or lists too many images"));
    }
    for descriptor in offers {
        let mut named = names.to_vec();
        if let Some(a) = descriptor.annotations() {
            named.extend(
                a.get(NAME)
                    .or_else(|| a.get(REF_NAME).filter(|n| n.contains([':', '/'])))
                    .cloned(),
            );
        }
        match descriptor.media_type() {
            MediaType::ImageIndex => {
                let nested: ImageIndex =
                    parse(&blob_json(store, &digest_of(&descriptor)?)?, "a nested index")?;
                find(store, &nested, &named, depth + 1, found)?;
            }
            MediaType::Other(t) if t.ends_with("manifest.list.v2+json") => {
                let nested: ImageIndex =
                    parse(&blob_json(store, &digest_of(&descriptor)?)?, "a manifest list")?;
                find(store, &nested, &named, depth + 1, found)?;
            }
            _ => match found.iter_mut().find(|(d, _)| d.digest() == descriptor.digest()) {
                Some((_, known)) => known.extend(named),
                None => found.push((descriptor, named)),
            },
        }
    }
    Ok(())
}

fn references(names: impl IntoIterator<Item = String>) -> Result<Vec<Reference>> {
    let mut seen = BTreeSet::new();
    let mut all = Vec::new();
    for name in names {
        let r = Reference::parse(&name).map_err(|e| StoreError::BadName {
            name: name.chars().take(300).collect(),
            reason: e.to_string(),
        })?;
        if seen.insert(r.to_string()) {
            all.push(r);
        }
    }
    Ok(all)
}

fn oci_image(
    store: &Store,
    descriptor: &Descriptor,
    mut names: Vec<String>,
    docker: &mut [DockerImage],
    options: &UnpackOptions,
    lease: &Lease,
) -> Result<Image> {
    let bytes = blob_json(store, &digest_of(descriptor)?)?;
    let manifest: ImageManifest = parse(&bytes, "an image manifest")?;
    let id = digest_of(manifest.config())?;
    if names.is_empty() {
        // docker's archives name their images in manifest.json only.
        let hex = id.hex();
        for image in docker.iter_mut().filter(|i| i.config.contains(&hex)) {
            names.append(&mut image.repo_tags);
        }
    }
    let layers = manifest.layers().clone();
    let media_type = descriptor.media_type().to_string();
    let pulled = PulledManifest {
        bytes: &bytes,
        media_type,
        layers: layers.clone(),
    };
    commit(store, &id, layers, Some(pulled), names, options, lease)
}

impl Contents {
    /// A file that manifest.json names, perhaps through links.
    fn named(&self, path: &str) -> Result<(Digest, u64)> {
        let mut path = key(path.as_bytes());
        for _ in 0..8 {
            if let Some(found) = self.files.get(&path) {
                return Ok(*found);
            }
            let Some(target) = self.links.get(&path) else {
                break;
            };
            path.clone_from(target);
        }
        Err(bad(format!("manifest.json names {path}, which is not in it")))
    }
}

/// Each image once, with all its names: a configuration is an image's identity.
fn distinct(docker: Vec<DockerImage>, contents: &Contents) -> Result<Vec<DockerImage>> {
    let mut images: Vec<DockerImage> = Vec::new();
    let mut known: BTreeMap<Digest, usize> = BTreeMap::new();
    for image in docker {
        let (id, _) = contents.named(&image.config)?;
        match known.get(&id) {
            Some(at) => images[*at].repo_tags.extend(image.repo_tags),
            None => {
                known.insert(id, images.len());
                images.push(image);
            }
        }
    }
    Ok(images)
}

fn docker_image(
    store: &Store,
    contents: &Contents,
    image: &DockerImage,
    options: &UnpackOptions,
    lease: &Lease,
) -> Result<Image> {
    let (id, _) = contents.named(&image.config)?;
    let mut layers = Vec::new();
    for path in &image.layers {
        let (digest, size) = contents.named(path)?;
        layers.push(Descriptor::new(media_type(store, &digest)?, size, digest));
    }
    commit(store, &id, layers, None, image.repo_tags.clone(), options, lease)
}

/// An archive's layers may be compressed or not, whatever they are called; a push has to say which.
fn media_type(store: &Store, digest: &Digest) -> Result<MediaType> {
    let blob = store
        .blob(digest)?
        .ok_or(StoreError::NoBlob { digest: *digest })?;
    let (format, _) = decoder(Box::new(blob.open()?), Window::Usual).map_err(|source| StoreError::Read {
        what: digest.to_string(),
        source,
    })?;
    Ok(format.media_type())
}

fn commit(
    store: &Store,
    id: &Digest,
    layers: Vec<Descriptor>,
    manifest: Option<PulledManifest<'_>>,
    names: Vec<String>,
    options: &UnpackOptions,
    lease: &Lease,
) -> Result<Image> {
    let config = blob_json(store, id)?;
    let parsed = ImageConfiguration::from_reader(&config[..]).map_err(|e| StoreError::BadConfig {
        id: *id,
        reason: e.to_string(),
    })?;
    let diffs = parsed.rootfs().diff_ids();
    if diffs.len() != layers.len() {
        let reason = format!(
            "it has {} DiffIDs and the archive {} layers",
            diffs.len(),
            layers.len()
        );
        return Err(StoreError::BadConfig { id: *id, reason });
    }
    let names = references(names)?;
    let mut sources = Vec::new();
    for (descriptor, diff) in layers.iter().cloned().zip(diffs) {
        let digest = digest_of(&descriptor)?;
        let blob = lease
            .blob(&digest)?
            .ok_or_else(|| bad(format!("the layer {digest} is not in it")))?;
        let diff = Digest::from_str(diff).map_err(|source| StoreError::Digest {
            what: "a layer's tar",
            source,
        })?;
        let (diff_id, reader) = (DiffId::from(diff), Box::new(blob.open()?));
        sources.push(LayerSource {
            descriptor,
            reader,
            verified: true,
            diff_id,
        });
    }
    store.unpack_layers(sources, options, lease)?;
    let id = ImageId::from(*id);
    // What an archive without manifests brings gets one, which says what its blobs are; an image that has one keeps it.
    let made = match (&manifest, store.image(&id)?) {
        (None, None) => Some(store.make_manifest(&id, &config, layers)?),
        (None, Some(there)) if there.manifest.is_none() && !there.built_here => {
            Some(store.make_manifest(&id, &config, layers)?)
        }
        _ => None,
    };
    let manifest = manifest.or(made.as_ref().map(|made| PulledManifest {
        bytes: &made.bytes,
        media_type: made.media_type.clone(),
        layers: made.layers.clone(),
    }));
    let (repo_digests, writer) = (Vec::new(), Writer::Load);
    store.commit_image(NewImage {
        config: &config,
        manifest,
        names,
        repo_digests,
        writer,
        lease,
    })
}
