//! Images made in memory.

use flate2::Compression;
use flate2::write::GzEncoder;
use slipway_image::Digest;
use std::io::Write;

pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// One layer's blob.
#[derive(Clone)]
pub struct Blob {
    pub digest: Digest,
    pub diff_id: Digest,
    pub bytes: Vec<u8>,
}

/// An image as a registry has it.
#[derive(Clone)]
pub struct Made {
    pub config: Vec<u8>,
    pub layers: Vec<Blob>,
    pub manifest: Vec<u8>,
    pub media_type: String,
    pub digest: Digest,
}

/// A tar of plain files (and directories, whose names end with a slash).
pub fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, contents) in files {
        let mut header = [0u8; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        let kind = if name.ends_with('/') { b'5' } else { b'0' };
        let mode = if kind == b'5' { b"0000755\0" } else { b"0000644\0" };
        header[100..108].copy_from_slice(mode);
        header[108..116].copy_from_slice(b"0000000\0");
        header[116..124].copy_from_slice(b"0000000\0");
        header[124..136].copy_from_slice(format!("{:011o}\0", contents.len()).as_bytes());
        header[136..148].copy_from_slice(b"14000000000\0");
        header[148..156].copy_from_slice(b"        ");
        header[156] = kind;
        header[257..265].copy_from_slice(b"ustar\x0000");
        let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        out.extend_from_slice(&header);
        out.extend_from_slice(contents);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Bytes that do not compress.
pub fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut out = Vec::with_capacity(length + 8);
    while out.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(length);
    out
}

pub fn layer(files: &[(&str, &[u8])]) -> Blob {
    let tar = tar(files);
    let bytes = gzip(&tar);
    Blob {
        digest: Digest::of(&bytes),
        diff_id: Digest::of(&tar),
        bytes,
    }
}

/// An OCI image for a platform.
pub fn oci(layers: &[Blob], architecture: &str) -> Made {
    make(
        layers,
        architecture,
        OCI_MANIFEST,
        "application/vnd.oci.image.config.v1+json",
        |_| "application/vnd.oci.image.layer.v1.tar+gzip".to_owned(),
    )
}

/// A docker schema 2 image.
pub fn docker(layers: &[Blob], architecture: &str) -> Made {
    make(
        layers,
        architecture,
        DOCKER_MANIFEST,
        "application/vnd.docker.container.image.v1+json",
        |_| "application/vnd.docker.image.rootfs.diff.tar.gzip".to_owned(),
    )
}

fn make(
    layers: &[Blob],
    architecture: &str,
    media_type: &str,
    config_type: &str,
    layer_type: impl Fn(usize) -> String,
) -> Made {
    let diff_ids: Vec<String> = layers.iter().map(|layer| layer.diff_id.to_string()).collect();
    let config = serde_json::json!({
        "architecture": architecture, "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": ["/hello"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": layers.iter().map(|_| serde_json::json!({"created_by": "test"})).collect::<Vec<_>>(),
    });
    let config = serde_json::to_vec(&config).unwrap();
    let descriptors: Vec<_> = layers
        .iter()
        .enumerate()
        .map(|(n, layer)| {
            serde_json::json!({
                "mediaType": layer_type(n), "digest": layer.digest.to_string(), "size": layer.bytes.len(),
            })
        })
        .collect();
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": media_type,
        "config": {"mediaType": config_type, "digest": Digest::of(&config).to_string(), "size": config.len()},
        "layers": descriptors,
    });
    with_manifest(config, layers, manifest, media_type)
}

pub fn with_manifest(
    config: Vec<u8>,
    layers: &[Blob],
    manifest: serde_json::Value,
    media_type: &str,
) -> Made {
    // Indented, so that nobody gets away with writing it anew.
    let manifest = serde_json::to_vec_pretty(&manifest).unwrap();
    let digest = Digest::of(&manifest);
    Made {
        config,
        layers: layers.to_vec(),
        manifest,
        media_type: media_type.to_owned(),
        digest,
    }
}

/// An index of images with their platforms; bytes and digest.
pub fn index(images: &[(&Made, Option<&str>)], media_type: &str) -> (Vec<u8>, Digest) {
    let entries: Vec<_> = images
        .iter()
        .map(|(image, architecture)| {
            let mut entry = serde_json::json!({
                "mediaType": image.media_type, "digest": image.digest.to_string(), "size": image.manifest.len(),
            });
            if let Some(architecture) = architecture {
                entry["platform"] = serde_json::json!({"os": "linux", "architecture": architecture});
            }
            entry
        })
        .collect();
    let index = serde_json::json!({"schemaVersion": 2, "mediaType": media_type, "manifests": entries});
    let bytes = serde_json::to_vec_pretty(&index).unwrap();
    let digest = Digest::of(&bytes);
    (bytes, digest)
}

/// Three small layers; `salt` makes them another image's.
pub fn three_layers(salt: &str) -> Vec<Blob> {
    vec![
        layer(&[("etc/", b""), ("etc/base", salt.as_bytes())]),
        layer(&[("etc/", b""), ("etc/middle", b"middle"), ("etc/.wh.base", b"")]),
        layer(&[("hello", format!("hello {salt}").as_bytes())]),
    ]
}
