//! The story of one pull: resolve → manifest → configuration → layers → commit.
//!
//! ```text
//!  socket ─▶ ingest (hash, disk) ─▶ follower ─▶ gunzip ─▶ hash ─▶ directory      for each layer, all at a time
//!                                                                     └▶ ordered fix-ups, one commit of all
//! ```
//! A lease holds everything from the first layer to the commit. When the pull ends early, its downloads stop and the
//! unpacking gives up; both clean up after themselves. Refuses to know who waits.

use super::board::Board;
use super::choose::Chosen;
use super::download::Downloads;
use super::error::PullError;
use super::flight::Key;
use crate::digest::Digest;
use crate::error::{StoreError, chain};
use crate::held::Held;
use crate::image::{Image, NewImage, PulledManifest, Writer};
use crate::platform::Platform;
use crate::progress::ProgressEvent;
use crate::registry::LocalBuilds;
use crate::registry::client::{Access, Fetched, Registry, Session, Target};
use crate::registry::failure::Failure;
use crate::registry::manifest::ConfigFacts;
use crate::store::Store;
use slipway_snapshot::unpack::UnpackError;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Another host is tried after a corrupt object, so often.
const MOST_CORRUPT: usize = 3;
/// How long the registry may take to say what a tag means when a build on this node has that name.
const PATIENCE_WITH_BUILD: Duration = Duration::from_secs(10);

/// What a pull needs.
pub(crate) struct Run {
    pub store: Store,
    pub registry: Arc<Registry>,
    pub downloads: Arc<Downloads>,
    pub key: Key,
    pub board: Arc<Board>,
    /// That the layers are unpacked is told once.
    pub committing: AtomicBool,
    /// A download that another pull began has failed.
    pub failed_by_stranger: AtomicBool,
    /// It waits for no other pull's downloads any more.
    pub alone: AtomicBool,
}

impl Run {
    /// Pulls, and falls back to a build on this node where the registry has no say.
    pub async fn run(self, stop: CancellationToken) -> Result<Image, PullError> {
        let run = Arc::new(self);
        let result = tokio::select! {
            biased;
            () = stop.cancelled() => Err(PullError::Cancelled { reference: run.key.reference.to_string() }),
            result = run.pull() => result,
        };
        match result {
            Err(error) if error.is_about_absence() => run.answer_with_build(error).await,
            result => result,
        }
    }

    async fn pull(self: &Arc<Run>) -> Result<Image, PullError> {
        let board = Arc::clone(&self.board);
        let notify = Arc::new(move |event| board.post(event));
        let (reference, credentials) = (&self.key.reference, self.key.credentials.clone());
        let session = Session::open(&self.registry, reference, credentials, Access::Pull, notify).await;
        let session = Arc::new(session.map_err(|failure| failure.pull(reference, "the configuration"))?);
        let mut corrupt = 0;
        loop {
            match self.attempt(&session).await {
                Err(PullError::Corrupt {
                    host, what, detail, ..
                }) if corrupt < MOST_CORRUPT && session.distrust(&host) => {
                    corrupt += 1;
                    tracing::warn!(%reference, host, what, detail, "corrupt object; asking another host");
                }
                // Another repository of the registry may not have the layer, or not for whoever asked.
                Err(error)
                    if !matches!(error, PullError::Store(_))
                        && self.failed_by_stranger.swap(false, Ordering::Relaxed)
                        && !self.alone.swap(true, Ordering::Relaxed) =>
                {
                    tracing::info!(%reference, error = chain(&error), "another pull's download failed; asking ourselves");
                }
                result => return result,
            }
        }
    }

    async fn attempt(self: &Arc<Run>, session: &Arc<Session>) -> Result<Image, PullError> {
        let (known, has_build) = self.local().await?;
        let resolving = self.resolve(session, known.as_ref());
        let top = match has_build {
            false => resolving.await?,
            true => tokio::time::timeout(PATIENCE_WITH_BUILD, resolving)
                .await
                .unwrap_or_else(|_| {
                    let host = session.reference.registry().to_owned();
                    let detail = format!("no answer within {} s", PATIENCE_WITH_BUILD.as_secs());
                    Err(self.failed(
                        Failure::Unreachable {
                            host,
                            detail,
                            hopeless: true,
                        },
                        "its name",
                    ))
                })?,
        };
        let top = match top {
            Top::Known(image) => return Ok(*image),
            Top::Fetched(fetched) => fetched,
        };
        self.board.post(ProgressEvent::Resolved {
            digest: top.digest,
            host: top.host.clone(),
        });
        let chosen = self.choose(session, top).await?;
        let (config, diff_ids) = self.config(session, &chosen).await?;
        let lease = self
            .blocking(|run| {
                run.store
                    .lease(&format!("pull of {}", run.key.reference))
                    .map(Held::new)
            })
            .await?;
        let lease = Arc::new(lease);
        let unpacked = self.layers(session, &chosen, &diff_ids, &lease).await;
        if let Err(error) = unpacked {
            self.give_up(lease, error.is_disk_full()).await;
            return Err(error);
        }
        self.commit(chosen, config, lease)
            .await
            .map_err(|error| self.stored(error))
    }

    /// Lets go of what came so far. It is kept for another attempt, but not when there is no room for it.
    async fn give_up(self: &Arc<Run>, lease: Arc<Held>, full: bool) {
        let given_up = self.blocking(move |run| {
            Held::release(lease);
            if full {
                run.store.gc()?;
            }
            Ok(())
        });
        if let Err(error) = given_up.await {
            tracing::warn!(%error, "what a failed pull left could not be collected");
        }
    }

    /// What the store has under the name, and whether a build on this node gave it the name.
    async fn local(self: &Arc<Run>) -> Result<(Option<Image>, bool), PullError> {
        self.blocking(|run| {
            let reference = &run.key.reference;
            let image = run.store.resolve_for(&reference.to_string(), &run.key.platform)?;
            let writer = match reference.digest() {
                Some(_) => None,
                None => run.store.name_writer(reference)?,
            };
            let built = image.is_some() && matches!(writer, Some((Writer::Build, _)));
            Ok((image, built))
        })
        .await
    }

    /// What the reference means. Where an image with that digest is here already, nothing more is asked for; that
    /// the registry was asked at all is what makes "Always" mean something.
    async fn resolve(self: &Arc<Run>, session: &Session, known: Option<&Image>) -> Result<Top, PullError> {
        let reference = &self.key.reference;
        let target = match (reference.digest(), reference.tag()) {
            (Some(digest), _) => Target::Digest(*digest),
            (None, tag) => Target::Tag(tag.unwrap_or("latest")),
        };
        let failed = |failure| self.failed(failure, "its manifest");
        if known.is_none() {
            return session.document(target).await.map(Top::Fetched).map_err(failed);
        }
        let (digest, host) = session.resolve(target).await.map_err(failed)?;
        if let Some(image) = self.have(digest).await? {
            self.board.post(ProgressEvent::Resolved { digest, host });
            return Ok(Top::Known(Box::new(image)));
        }
        session
            .document(Target::Digest(digest))
            .await
            .map(Top::Fetched)
            .map_err(failed)
    }

    /// The image of this repository digest, when it is here, whole and for our platform; it gets the name.
    async fn have(self: &Arc<Run>, digest: Digest) -> Result<Option<Image>, PullError> {
        self.blocking(move |run| {
            let reference = &run.key.reference;
            let Some(image) = run
                .store
                .resolve_for(&reference.with_digest(digest).to_string(), &run.key.platform)?
            else {
                return Ok(None);
            };
            let config = run.store.config(&image.id)?;
            let platform = ConfigFacts::parse(&config)
                .ok()
                .and_then(|facts| facts.platform());
            if platform
                .as_ref()
                .is_some_and(|p| run.key.platform.rank(p) != Some(0))
            {
                return Ok(None);
            }
            let named = platform.as_ref().is_none_or(runs_here);
            if reference.digest().is_none() && named {
                run.store.tag(&image.id, reference, Writer::Pull)?;
            }
            run.store.resolve(&image.id.to_string())
        })
        .await
    }

    async fn commit(
        self: &Arc<Run>,
        chosen: Chosen,
        config: Vec<u8>,
        lease: Arc<Held>,
    ) -> Result<Image, PullError> {
        self.committing();
        self.blocking(move |run| {
            let reference = &run.key.reference;
            // A name means what runs on this node; another platform's image is found by its digest.
            let platform = ConfigFacts::parse(&config)
                .ok()
                .and_then(|facts| facts.platform());
            let named = reference.digest().is_none() && platform.as_ref().is_none_or(runs_here);
            let names = Vec::from_iter(named.then(|| reference.clone()));
            for layer in &chosen.layers {
                if let Ok(digest) = Digest::try_from(layer.digest()) {
                    run.store.add_blob_source(&digest, &reference.name())?;
                }
            }
            let image = run.store.commit_image(NewImage {
                config: &config,
                manifest: Some(PulledManifest {
                    bytes: &chosen.bytes,
                    media_type: chosen.media_type,
                    layers: chosen.layers,
                }),
                names,
                repo_digests: vec![reference.with_digest(chosen.top).to_string()],
                writer: Writer::Pull,
                lease: &lease,
            })?;
            Held::release(lease);
            Ok(image)
        })
        .await
    }

    /// The build on this node that has the name, in place of an error (design: "Built here, nowhere else").
    async fn answer_with_build(self: &Arc<Run>, error: PullError) -> Result<Image, PullError> {
        let wanted = self.key.local_builds == LocalBuilds::Answer;
        let (image, built) = match wanted {
            true => self.local().await?,
            false => (None, false),
        };
        match image.filter(|_| built) {
            Some(image) => {
                let reason = chain(&error);
                // Whoever listens says it aloud.
                tracing::debug!(
                    reference = %self.key.reference, image = %image.id, reason,
                    "answering a pull with the build on this node"
                );
                self.board.post(ProgressEvent::AnsweredByBuild { reason });
                Ok(image)
            }
            None => Err(error),
        }
    }

    pub(super) async fn blocking<T: Send + 'static>(
        self: &Arc<Run>,
        work: impl FnOnce(&Run) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, PullError> {
        let run = Arc::clone(self);
        match tokio::task::spawn_blocking(move || work(&run)).await {
            Ok(result) => result.map_err(PullError::from),
            Err(_) => Err(PullError::Cancelled {
                reference: self.key.reference.to_string(),
            }),
        }
    }

    /// Tells that all layers are unpacked, unless it was told.
    pub(super) fn committing(&self) {
        if !self.committing.swap(true, Ordering::Relaxed) {
            self.board.post(ProgressEvent::Committing);
        }
    }

    pub(super) fn failed(&self, failure: Failure, what: &str) -> PullError {
        failure.pull(&self.key.reference, what)
    }

    /// What the store finds wrong with the image is said of the image; the rest is the store's own trouble.
    pub(super) fn stored(&self, error: PullError) -> PullError {
        let PullError::Store(inner) = &error else {
            return error;
        };
        match &**inner {
            // We set no limit of our own, so the limit is the room there is.
            StoreError::Unpack {
                what,
                source: UnpackError::TooLarge {
                    what: "bytes", limit, ..
                },
            } => {
                let act = format!("unpack {what}, which holds more than the {limit} bytes there are");
                PullError::from(StoreError::DiskFull { act })
            }
            StoreError::DigestMismatch { .. }
            | StoreError::SizeMismatch { .. }
            | StoreError::Unpack { .. }
            | StoreError::Read { .. }
            | StoreError::MediaType { .. }
            | StoreError::BadConfig { .. } => self.unusable("a part", chain(&**inner)),
            _ => error,
        }
    }

    pub(super) fn unusable(&self, what: &str, reason: String) -> PullError {
        PullError::Unusable {
            reference: self.key.reference.to_string(),
            what: what.to_owned(),
            reason,
        }
    }

    pub(super) fn no_platform(&self, mut available: Vec<Platform>) -> PullError {
        available.retain(|platform| platform.os != "unknown");
        available.sort();
        available.dedup();
        available.truncate(50);
        let (reference, wanted) = (
            self.key.reference.to_string(),
            Box::new(self.key.platform.clone()),
        );
        PullError::NoPlatform {
            reference,
            wanted,
            available,
        }
    }
}

/// Whether an image of a platform can run on this machine.
fn runs_here(platform: &Platform) -> bool {
    Platform::host().rank(platform).is_some()
}

/// What resolving came to.
enum Top {
    Known(Box<Image>),
    Fetched(Fetched),
}
