//! From what a reference means to the one image of it that is for our platform, and its configuration.
//!
//! Owns the bounds: how deep indexes are followed, how many entries are looked into. The documents themselves are read
//! by [`crate::registry::manifest`].

use super::error::PullError;
use super::fetch::fetch_small;
use super::run::Run;
use crate::digest::{DiffId, Digest, ImageId};
use crate::error::chain;
use crate::registry::client::{Fetched, Session, Target};
use crate::registry::failure::Failure;
use crate::registry::manifest::{self, ConfigFacts, Document, LONGEST_CONFIG, ManifestError};
use oci_spec::image::Descriptor;

/// Indexes inside indexes.
const DEEPEST_INDEX: usize = 3;
/// Entries of an index that do not say their platform are looked into; at most so many.
const MOST_LOOKED_INTO: usize = 4;

/// The one image of a reference that is for our platform.
pub(super) struct Chosen {
    /// What the reference means: a manifest or an index.
    pub top: Digest,
    pub bytes: Vec<u8>,
    pub media_type: String,
    config: Box<Descriptor>,
    config_digest: Digest,
    pub layers: Vec<Descriptor>,
}

impl Run {
    /// Goes from an index to the manifest for our platform.
    pub(super) async fn choose(&self, session: &Session, top: Fetched) -> Result<Chosen, PullError> {
        let top_digest = top.digest;
        let mut fetched = top;
        for _ in 0..=DEEPEST_INDEX {
            let entries = match self.parse(&fetched)? {
                Document::Image { config, layers } => {
                    return self.chosen(top_digest, fetched, config, layers);
                }
                Document::Index { entries } => entries,
            };
            let platforms: Vec<_> = entries.iter().map(manifest::platform_of).collect();
            let at = self.key.platform.choose(platforms.iter().map(Option::as_ref));
            fetched = match at {
                Some(at) => self.entry(session, &entries[at]).await?,
                None => match self.look_into(session, &entries).await? {
                    Some(found) => found,
                    None => {
                        let available: Vec<_> = platforms.into_iter().flatten().collect();
                        return Err(self.no_platform(available));
                    }
                },
            };
        }
        Err(self.unusable(
            "the index",
            format!("indexes are nested more than {DEEPEST_INDEX} deep"),
        ))
    }

    fn chosen(
        &self,
        top: Digest,
        fetched: Fetched,
        config: Box<Descriptor>,
        layers: Vec<Descriptor>,
    ) -> Result<Chosen, PullError> {
        let config_digest = Digest::try_from(config.digest())
            .map_err(|error| self.unusable("the manifest", error.to_string()))?;
        let media_type = manifest::media_type(&fetched.bytes, &fetched.media_type);
        Ok(Chosen {
            top,
            bytes: fetched.bytes,
            media_type,
            config,
            config_digest,
            layers,
        })
    }

    async fn entry(&self, session: &Session, entry: &Descriptor) -> Result<Fetched, PullError> {
        let digest = Digest::try_from(entry.digest())
            .map_err(|error| self.unusable("the index", error.to_string()))?;
        let what = format!("manifest {digest}");
        let failed = |failure| match failure {
            // The image is there; a part of it is not.
            Failure::NotFound { host } => {
                let detail = "the index names it, but it is not there".to_owned();
                self.failed(Failure::Protocol { host, detail }, &what)
            }
            failure => self.failed(failure, &what),
        };
        let fetched = session.document(Target::Digest(digest)).await.map_err(failed)?;
        if fetched.bytes.len() as u64 != entry.size() {
            let detail = format!(
                "it has {} bytes, the index says {}",
                fetched.bytes.len(),
                entry.size()
            );
            return Err(self.failed(
                Failure::Corrupt {
                    host: fetched.host,
                    detail,
                },
                &what,
            ));
        }
        Ok(fetched)
    }

    /// Entries that do not say their platform: their configurations do.
    async fn look_into(
        &self,
        session: &Session,
        entries: &[Descriptor],
    ) -> Result<Option<Fetched>, PullError> {
        let silent = entries.iter().filter(|entry| entry.platform().is_none());
        for entry in silent.take(MOST_LOOKED_INTO) {
            let fetched = self.entry(session, entry).await?;
            match self.parse(&fetched) {
                Ok(Document::Index { .. }) => return Ok(Some(fetched)),
                Ok(Document::Image { config, layers }) => {
                    let chosen = self.chosen(fetched.digest, fetched.clone(), config, layers)?;
                    match self.config(session, &chosen).await {
                        Ok(_) => return Ok(Some(fetched)),
                        Err(PullError::NoPlatform { .. }) => {}
                        Err(error) => return Err(error),
                    }
                }
                // Signatures and the like live in indexes too.
                Err(_) => {}
            }
        }
        Ok(None)
    }

    fn parse(&self, fetched: &Fetched) -> Result<Document, PullError> {
        manifest::parse(&fetched.bytes, &fetched.media_type).map_err(|error| match error {
            ManifestError::Schema1 => PullError::Schema1 {
                reference: self.key.reference.to_string(),
            },
            error => self.unusable("the manifest", chain(&error)),
        })
    }

    /// The configuration, checked against the manifest and our platform, and its DiffIDs.
    pub(super) async fn config(
        &self,
        session: &Session,
        chosen: &Chosen,
    ) -> Result<(Vec<u8>, Vec<DiffId>), PullError> {
        let (store, id) = (self.store.clone(), ImageId::from(chosen.config_digest));
        let here = tokio::task::spawn_blocking(move || store.config(&id).ok())
            .await
            .ok()
            .flatten();
        let bytes = match here {
            Some(bytes) => bytes,
            None => fetch_small(session, &chosen.config, chosen.config_digest, LONGEST_CONFIG)
                .await
                .map_err(|failure| match failure {
                    Failure::NotFound { host } => {
                        let detail = "the manifest names it, but it is not there".to_owned();
                        self.failed(Failure::Protocol { host, detail }, "the configuration")
                    }
                    failure => self.failed(failure, "the configuration"),
                })?,
        };
        let facts = ConfigFacts::parse(&bytes)
            .map_err(|error| self.unusable("the configuration", error.to_string()))?;
        if let Some(platform) = facts.platform()
            && self.key.platform.rank(&platform).is_none()
        {
            return Err(self.no_platform(vec![platform]));
        }
        let (layers, diffs) = (chosen.layers.len(), facts.diff_ids().len());
        if layers != diffs {
            let reason = format!("it has {diffs} layers, the manifest {layers}");
            return Err(self.unusable("the configuration", reason));
        }
        let diff_ids = facts.diff_ids().iter().copied().map(DiffId::from).collect();
        Ok((bytes, diff_ids))
    }
}
