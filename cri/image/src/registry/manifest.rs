//! Manifests and indexes as they come from registries: OCI's and docker's schema 2.
//!
//! Pure. Owns what is refused: schema 1, documents that could be read as two things, artifacts that are no images,
//! and lists without measure.

use crate::digest::Digest;
use crate::platform::Platform;
use oci_spec::image::Descriptor;
use serde::Deserialize;

/// No manifest or index is longer (distribution spec, "Pushing Manifests": registries should take 4 MiB).
pub(crate) const LONGEST_MANIFEST: usize = 4 << 20;
/// No configuration is longer.
pub(crate) const LONGEST_CONFIG: usize = 8 << 20;
/// Entries of an index, and layers of a manifest.
const MOST_ENTRIES: usize = 1000;
const MOST_LAYERS: usize = 500;

pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub(crate) const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const SCHEMA1: [&str; 2] = [
    "application/vnd.docker.distribution.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
];
const CONFIGS: [&str; 2] = [
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
];

/// What we accept. Without `*/*`: a registry that has only schema 1 says so with 404 or with the type.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
     application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.docker.distribution.manifest.v2+json, */*;q=0.1";

/// A document that came from a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Document {
    /// One image.
    Image {
        config: Box<Descriptor>,
        layers: Vec<Descriptor>,
    },
    /// Images for several platforms.
    Index { entries: Vec<Descriptor> },
}

/// A document that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ManifestError {
    #[error("it is of Docker's schema 1")]
    Schema1,
    #[error("it is not JSON as the OCI image specification has it: {0}")]
    Json(String),
    #[error("{0}")]
    Form(&'static str),
    #[error("it is an artifact of type {0}, not a container image")]
    Artifact(String),
    #[error("it has {0} entries")]
    TooMany(usize),
    #[error("{0}")]
    Digest(#[from] crate::digest::DigestError),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wire {
    schema_version: Option<u32>,
    media_type: Option<String>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
    fs_layers: Option<serde::de::IgnoredAny>,
    history: Option<serde::de::IgnoredAny>,
}

/// Reads a document of the media type that came with it.
pub(crate) fn parse(bytes: &[u8], media_type: &str) -> Result<Document, ManifestError> {
    let media_type = essence(media_type);
    if SCHEMA1.contains(&media_type.as_str()) {
        return Err(ManifestError::Schema1);
    }
    let wire: Wire = match serde_json::from_slice::<Wire>(bytes) {
        Ok(wire) => wire,
        Err(error) => return Err(ManifestError::Json(error.to_string())),
    };
    if wire.schema_version == Some(1) || wire.fs_layers.is_some() || wire.history.is_some() {
        return Err(ManifestError::Schema1);
    }
    if wire.schema_version != Some(2) {
        return Err(ManifestError::Form("it does not have schemaVersion 2"));
    }
    let inside = wire.media_type.as_deref().map(essence);
    let known = [OCI_MANIFEST, DOCKER_MANIFEST, OCI_INDEX, DOCKER_LIST];
    let named = known.contains(&media_type.as_str());
    // A document must not mean two things to two readers (OCI image spec, "mediaType"; CVE-2021-41190).
    if named && inside.as_ref().is_some_and(|inside| *inside != media_type) {
        return Err(ManifestError::Form("its mediaType is not the type it came as"));
    }
    let image = wire.config.is_some() || wire.layers.is_some();
    if image && wire.manifests.is_some() {
        return Err(ManifestError::Form("it has both layers and manifests"));
    }
    let told = if named { Some(media_type) } else { inside };
    let is_index = told.as_deref().map(|t| matches!(t, OCI_INDEX | DOCKER_LIST));
    let is_image = told
        .as_deref()
        .map(|t| matches!(t, OCI_MANIFEST | DOCKER_MANIFEST));
    if let Some(entries) = wire.manifests {
        if is_image == Some(true) {
            return Err(ManifestError::Form("it is an index that came as a manifest"));
        }
        if entries.len() > MOST_ENTRIES {
            return Err(ManifestError::TooMany(entries.len()));
        }
        return Ok(Document::Index { entries });
    }
    let (Some(config), Some(layers)) = (wire.config, wire.layers) else {
        return Err(ManifestError::Form(
            "it has neither config and layers nor manifests",
        ));
    };
    if is_index == Some(true) {
        return Err(ManifestError::Form("it is a manifest that came as an index"));
    }
    if layers.len() > MOST_LAYERS {
        return Err(ManifestError::TooMany(layers.len()));
    }
    let config_type = config.media_type().to_string();
    if !CONFIGS.contains(&config_type.as_str()) {
        return Err(ManifestError::Artifact(config_type.chars().take(100).collect()));
    }
    for descriptor in layers.iter().chain([&config]) {
        Digest::try_from(descriptor.digest())?;
    }
    Ok(Document::Image {
        config: Box::new(config),
        layers,
    })
}

/// The media type that a manifest is kept and pushed under.
pub(crate) fn media_type(bytes: &[u8], came_as: &str) -> String {
    let came_as = essence(came_as);
    if [OCI_MANIFEST, DOCKER_MANIFEST, OCI_INDEX, DOCKER_LIST].contains(&came_as.as_str()) {
        return came_as;
    }
    let wire = serde_json::from_slice::<Wire>(bytes).ok();
    match wire {
        Some(Wire {
            media_type: Some(inside),
            ..
        }) => essence(&inside),
        Some(Wire {
            manifests: Some(_), ..
        }) => OCI_INDEX.to_owned(),
        _ => OCI_MANIFEST.to_owned(),
    }
}

/// A media type without parameters, in lower case.
fn essence(media_type: &str) -> String {
    media_type
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase()
}

/// The platform an index says an entry is for; `None` when it does not say. Attestations say unknown/unknown,
/// which fits nobody.
pub(crate) fn platform_of(entry: &Descriptor) -> Option<Platform> {
    let platform = entry.platform().as_ref()?;
    let (os, architecture) = (platform.os().to_string(), platform.architecture().to_string());
    Some(Platform::new(&os, &architecture, platform.variant().as_deref()))
}

/// The fields of a configuration that decide whether it can be used here.
#[derive(Debug, Deserialize)]
pub(crate) struct ConfigFacts {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    variant: Option<String>,
    rootfs: RootFs,
}

#[derive(Debug, Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Vec<Digest>,
}

impl ConfigFacts {
    /// Reads a configuration.
    pub fn parse(bytes: &[u8]) -> Result<ConfigFacts, ManifestError> {
        serde_json::from_slice(bytes).map_err(|error| ManifestError::Json(error.to_string()))
    }

    /// The platform it says it is for; `None` when it does not say.
    pub fn platform(&self) -> Option<Platform> {
        let says = !self.os.is_empty() && !self.architecture.is_empty();
        says.then(|| Platform::new(&self.os, &self.architecture, self.variant.as_deref()))
    }

    /// The digests of the uncompressed layers, bottom first.
    pub fn diff_ids(&self) -> &[Digest] {
        &self.rootfs.diff_ids
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(media_type: &str) -> String {
        format!(
            r#"{{"mediaType":"{media_type}","digest":"sha256:{}","size":7}}"#,
            "0a".repeat(32)
        )
    }

    fn image(extra: &str) -> String {
        let config = descriptor("application/vnd.oci.image.config.v1+json");
        let layer = descriptor("application/vnd.oci.image.layer.v1.tar+gzip");
        format!(r#"{{"schemaVersion":2,"config":{config},"layers":[{layer}]{extra}}}"#)
    }

    #[test]
    fn manifests_and_indexes_of_both_families_are_read() {
        for media_type in [OCI_MANIFEST, DOCKER_MANIFEST, "application/json", ""] {
            let parsed = parse(image("").as_bytes(), media_type).unwrap();
            assert!(
                matches!(parsed, Document::Image { layers, .. } if layers.len() == 1),
                "{media_type}"
            );
        }
        let index = format!(
            r#"{{"schemaVersion":2,"manifests":[{}]}}"#,
            descriptor(OCI_MANIFEST)
        );
        for media_type in [
            OCI_INDEX,
            DOCKER_LIST,
            "text/plain",
            "application/vnd.oci.image.index.v1+json; charset=utf-8",
        ] {
            let parsed = parse(index.as_bytes(), media_type).unwrap();
            assert!(matches!(parsed, Document::Index { .. }), "{media_type}");
        }
        assert_eq!(media_type(index.as_bytes(), "text/plain"), OCI_INDEX);
        assert_eq!(media_type(image("").as_bytes(), DOCKER_MANIFEST), DOCKER_MANIFEST);
    }

    #[test]
    fn schema_1_is_recognised_by_type_and_by_form() {
        assert_eq!(parse(b"{}", SCHEMA1[1]), Err(ManifestError::Schema1));
        let text = br#"{"schemaVersion":1,"name":"x","fsLayers":[]}"#;
        assert_eq!(parse(text, "application/json"), Err(ManifestError::Schema1));
    }

    #[test]
    fn a_document_that_means_two_things_is_refused() {
        let both = image(r#","manifests":[]"#);
        assert!(matches!(
            parse(both.as_bytes(), OCI_MANIFEST),
            Err(ManifestError::Form(_))
        ));
        let other = image(&format!(r#","mediaType":"{OCI_INDEX}""#));
        assert!(matches!(
            parse(other.as_bytes(), OCI_MANIFEST),
            Err(ManifestError::Form(_))
        ));
        assert!(matches!(
            parse(image("").as_bytes(), OCI_INDEX),
            Err(ManifestError::Form(_))
        ));
    }

    #[test]
    fn artifacts_and_endless_lists_are_refused() {
        let chart = image("").replace("oci.image.config.v1", "cncf.helm.config.v1");
        assert!(matches!(
            parse(chart.as_bytes(), OCI_MANIFEST),
            Err(ManifestError::Artifact(_))
        ));
        let entries = vec![descriptor(OCI_MANIFEST); MOST_ENTRIES + 1].join(",");
        let index = format!(r#"{{"schemaVersion":2,"manifests":[{entries}]}}"#);
        assert!(matches!(
            parse(index.as_bytes(), OCI_INDEX),
            Err(ManifestError::TooMany(1001))
        ));
    }

    #[test]
    fn a_digest_of_another_algorithm_is_refused_by_name() {
        let text = image("").replace(
            &format!("sha256:{}", "0a".repeat(32)),
            &format!("sha512:{}", "0a".repeat(64)),
        );
        let error = parse(text.as_bytes(), OCI_MANIFEST).unwrap_err().to_string();
        assert!(error.contains("sha512"), "{error}");
    }
}
