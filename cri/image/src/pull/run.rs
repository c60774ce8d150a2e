//! The story of one pull: resolve → manifest → configuration → layers → commit.
//!
//! ```text
//!  socket ─▶ ingest (hash, disk) ─▶ follower ─▶ gunzip ─▶ hash ─▶ directory      for each layer, all at a time
//!                                                                     └▶ ordered fix-ups, one commit of all
//! ```
//! A lease holds everything from the first layer to the commit. When the pull ends early, its downloads stop and the
//! unpacking gives up; both clean up after themselves. Refuses to know who waits.

use super::board::Board;
use super::download::{Download, Downloads, Source};
use super::error::PullError;
use super::fetch::{downloaded, fetch_small};
use super::flight::Key;
use crate::digest::{ChainId, DiffId, Digest, ImageId};
use crate::error::StoreError;
use crate::image::{Image, NewImage, PulledManifest, Writer};
use crate::progress::{LayerProgress, ProgressEvent};
use crate::registry::client::{Access, Fetched, Registry, Session, Target};
use crate::registry::failure::{Failure, chain};
use crate::registry::manifest::{self, ConfigFacts, Document, LONGEST_CONFIG, ManifestError};
use crate::store::{LayerSource, Lease, Store, UnpackOptions};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use oci_spec::image::Descriptor;
use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// How often running totals are told.
const TELL: Duration = Duration::from_millis(100);
/// Indexes inside indexes.
const DEEPEST_INDEX: usize = 3;
/// Entries of an index that do not say their platform are looked into; at most so many.
const MOST_LOOKED_INTO: usize = 4;
/// Another host is tried after a corrupt object, so often.
const MOST_CORRUPT: usize = 3;
/// How long the registry may take to say what a tag means when a build on this node has that name.
const PATIENCE_WITH_BUILD: Duration = Duration::from_secs(10);
/// How long the cause of a broken layer may stay unknown.
const CAUSE: Duration = Duration::from_secs(10);

/// What a pull needs.
pub(crate) struct Run {
    pub store: Store,
    pub registry: Arc<Registry>,
    pub downloads: Arc<Downloads>,
    pub key: Key,
    pub board: Arc<Board>,
}

/// The one image of a reference that is for our platform.
struct Chosen {
    /// What the reference means: a manifest or an index.
    top: Digest,
    bytes: Vec<u8>,
    media_type: String,
    config: Descriptor,
    config_digest: Digest,
    layers: Vec<Descriptor>,
}

/// A layer on its way.
struct Coming {
    digest: Digest,
    size: u64,
    download: Option<Arc<Download>>,
    unpacked: Arc<AtomicU64>,
}

/// Sets the flag when it goes out of scope: what runs on blocking threads gives up.
struct GiveUp(Arc<AtomicBool>);

impl Drop for GiveUp {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Run {
    /// Pulls, and falls back to a build on this node where the registry has no say.
    pub async fn run(self, stop: CancellationToken) -> Result<Image, PullError> {
        let run = Arc::new(self);
        let result = tokio::select! {
            biased;
            () = stop.cancelled() => Err(PullError::Cancelled { reference: run.key.reference.clone() }),
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
            .blocking(|run| run.store.lease(&format!("pull of {}", run.key.reference)))
            .await?;
        let lease = Arc::new(lease);
        self.layers(session, &chosen, &diff_ids, &lease).await?;
        self.commit(chosen, config, lease)
            .await
            .map_err(|error| self.stored(error))
    }

    /// What the store has under the name, and whether a build on this node gave it the name.
    async fn local(self: &Arc<Run>) -> Result<(Option<Image>, bool), PullError> {
        self.blocking(|run| {
            let reference = &run.key.reference;
            let image = run.store.resolve(&reference.to_string())?;
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
            let Some(image) = run.store.resolve(&reference.with_digest(digest).to_string())? else {
                return Ok(None);
            };
            let config = run.store.config(&image.id)?;
            let platform = ConfigFacts::parse(&config)
                .ok()
                .and_then(|facts| facts.platform());
            if platform.is_some_and(|platform| run.key.platform.rank(&platform) != Some(0)) {
                return Ok(None);
            }
            if reference.digest().is_none() {
                run.store.tag(&image.id, reference, Writer::Pull)?;
            }
            run.store.resolve(&image.id.to_string())
        })
        .await
    }

    /// Goes from an index to the manifest for our platform.
    async fn choose(&self, session: &Session, top: Fetched) -> Result<Chosen, PullError> {
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
        config: Descriptor,
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
                reference: self.key.reference.clone(),
            },
            error => self.unusable("the manifest", chain(&error)),
        })
    }

    /// The configuration, checked against the manifest and our platform, and its DiffIDs.
    async fn config(&self, session: &Session, chosen: &Chosen) -> Result<(Vec<u8>, Vec<DiffId>), PullError> {
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

    /// Downloads and unpacks what is missing.
    async fn layers(
        self: &Arc<Run>,
        session: &Arc<Session>,
        chosen: &Chosen,
        diff_ids: &[DiffId],
        lease: &Arc<Lease>,
    ) -> Result<(), PullError> {
        let give_up = GiveUp(Arc::default());
        let (sources, coming) = self.sources(session, chosen, diff_ids, lease, &give_up).await?;
        if sources.is_empty() {
            return Ok(());
        }
        let counters: Vec<Arc<AtomicU64>> = coming.iter().map(|layer| Arc::clone(&layer.unpacked)).collect();
        let progress = move |position: usize, bytes: u64| {
            if let Some(counter) = counters.get(position) {
                counter.fetch_add(bytes, Ordering::Relaxed);
            }
        };
        let options = UnpackOptions {
            progress: Some(Arc::new(progress)),
            cancelled: Some(Arc::clone(&give_up.0)),
            ..UnpackOptions::default()
        };
        let (store, held) = (self.store.clone(), Arc::clone(lease));
        let unpack =
            tokio::task::spawn_blocking(move || store.unpack_layers(sources, &options, &held).map(drop));
        let unpack = async {
            let cancelled = || StoreError::Cancelled {
                what: "unpacking".to_owned(),
            };
            unpack.await.unwrap_or_else(|_| Err(cancelled()))
        };
        let result = tokio::select! {
            biased;
            result = both(unpack, &coming, &give_up) => result.map_err(|error| self.stored(error)),
            never = self.tell(&coming) => never,
        };
        self.post_totals(&coming);
        result
    }

    /// Looks for each layer in the store, and begins to fetch those that are not there.
    async fn sources(
        self: &Arc<Run>,
        session: &Arc<Session>,
        chosen: &Chosen,
        diff_ids: &[DiffId],
        lease: &Arc<Lease>,
        give_up: &GiveUp,
    ) -> Result<(Vec<LayerSource>, Vec<Coming>), PullError> {
        let descriptors = chosen.layers.clone();
        let diff_ids = diff_ids.to_vec();
        let (session, lease, flag) = (Arc::clone(session), Arc::clone(lease), Arc::clone(&give_up.0));
        self.blocking(move |run| {
            let mut sources = Vec::with_capacity(descriptors.len());
            let mut coming = Vec::with_capacity(descriptors.len());
            let mut told = Vec::with_capacity(descriptors.len());
            let mut missing = false;
            for ((descriptor, diff_id), chain) in
                descriptors.iter().zip(&diff_ids).zip(ChainId::all(&diff_ids))
            {
                let digest = Digest::try_from(descriptor.digest()).map_err(|source| StoreError::Digest {
                    what: "a layer in the manifest",
                    source,
                })?;
                let mut layer = Coming {
                    digest,
                    size: descriptor.size(),
                    download: None,
                    unpacked: Arc::default(),
                };
                let reader: Box<dyn Read + Send> = if lease.layer(&chain)?.is_some() {
                    Box::new(io::empty())
                } else {
                    missing = true;
                    let (store, downloads) = (&run.store, &run.downloads);
                    match downloads.want(store, &session, descriptor, digest, &lease)? {
                        Source::Here(file) => Box::new(file.open()?),
                        Source::Coming(download, follower) => {
                            layer.download = Some(download);
                            Box::new(follower.cancel_when(Arc::clone(&flag)))
                        }
                    }
                };
                let present = layer.download.is_none();
                told.push(LayerProgress {
                    digest,
                    size: layer.size,
                    present,
                });
                let descriptor = descriptor.clone();
                sources.push(LayerSource {
                    descriptor,
                    reader,
                    verified: true,
                    diff_id: *diff_id,
                });
                coming.push(layer);
            }
            run.board.post(ProgressEvent::Layers { layers: told });
            if !missing {
                sources.clear();
            }
            Ok((sources, coming))
        })
        .await
    }

    /// Tells the running totals, for ever.
    async fn tell(&self, coming: &[Coming]) -> Result<(), PullError> {
        let mut before = 0;
        loop {
            tokio::time::sleep(TELL).await;
            self.post_totals(coming);
            let arrived = coming
                .iter()
                .all(|layer| layer.download.as_ref().is_none_or(|d| d.done() == layer.size));
            let unpacked: u64 = coming
                .iter()
                .map(|layer| layer.unpacked.load(Ordering::Relaxed))
                .sum();
            // Nothing more comes and nothing more is unpacked: what is left is to make it durable.
            if arrived && unpacked == before && unpacked > 0 {
                self.board.post(ProgressEvent::Committing);
                return std::future::pending().await;
            }
            before = unpacked;
        }
    }

    fn post_totals(&self, coming: &[Coming]) {
        for layer in coming {
            if let Some(download) = &layer.download {
                let done = download.done();
                if done > 0 {
                    self.board.post(downloaded(layer.digest, done, layer.size));
                }
            }
            let done = layer.unpacked.load(Ordering::Relaxed);
            if done > 0 {
                self.board.post(ProgressEvent::Unpacked {
                    layer: layer.digest,
                    done,
                });
            }
        }
    }

    async fn commit(
        self: &Arc<Run>,
        chosen: Chosen,
        config: Vec<u8>,
        lease: Arc<Lease>,
    ) -> Result<Image, PullError> {
        self.blocking(move |run| {
            let reference = &run.key.reference;
            let names = match reference.digest() {
                Some(_) => Vec::new(),
                None => vec![reference.clone()],
            };
            for layer in &chosen.layers {
                if let Ok(digest) = Digest::try_from(layer.digest()) {
                    run.store.add_blob_source(&digest, &reference.name())?;
                }
            }
            run.store.commit_image(NewImage {
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
            })
        })
        .await
    }

    /// The build on this node that has the name, in place of an error (design: "Built here, nowhere else").
    async fn answer_with_build(self: &Arc<Run>, error: PullError) -> Result<Image, PullError> {
        let wanted = self.key.local_builds == crate::registry::LocalBuilds::Answer;
        let (image, built) = match wanted {
            true => self.local().await?,
            false => (None, false),
        };
        match image.filter(|_| built) {
            Some(image) => {
                let reason = chain(&error);
                tracing::info!(
                    reference = %self.key.reference, image = %image.id, reason,
                    "answering a pull with the build on this node"
                );
                self.board.post(ProgressEvent::AnsweredByBuild { reason });
                Ok(image)
            }
            None => Err(error),
        }
    }

    async fn blocking<T: Send + 'static>(
        self: &Arc<Run>,
        work: impl FnOnce(&Run) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, PullError> {
        let run = Arc::clone(self);
        match tokio::task::spawn_blocking(move || work(&run)).await {
            Ok(result) => result.map_err(PullError::from),
            Err(_) => Err(PullError::Cancelled {
                reference: self.key.reference.clone(),
            }),
        }
    }

    fn failed(&self, failure: Failure, what: &str) -> PullError {
        failure.pull(&self.key.reference, what)
    }

    /// What the store finds wrong with the image is said of the image; the rest is the store's own trouble.
    fn stored(&self, error: PullError) -> PullError {
        let PullError::Store(inner) = &error else {
            return error;
        };
        match **inner {
            StoreError::DigestMismatch { .. }
            | StoreError::SizeMismatch { .. }
            | StoreError::Unpack { .. }
            | StoreError::Read { .. }
            | StoreError::MediaType { .. }
            | StoreError::BadConfig { .. } => self.unusable("a part", chain(&**inner)),
            _ => error,
        }
    }

    fn unusable(&self, what: &str, reason: String) -> PullError {
        PullError::Unusable {
            reference: self.key.reference.clone(),
            what: what.to_owned(),
            reason,
        }
    }

    fn no_platform(&self, mut available: Vec<crate::platform::Platform>) -> PullError {
        available.retain(|platform| platform.os != "unknown");
        available.sort();
        available.dedup();
        available.truncate(50);
        let (reference, wanted) = (self.key.reference.clone(), self.key.platform.clone());
        PullError::NoPlatform {
            reference,
            wanted,
            available,
        }
    }
}

/// What resolving came to.
enum Top {
    Known(Box<Image>),
    Fetched(Fetched),
}

/// Downloads and unpacking together: each stops the other when it fails, and the cause is the answer.
async fn both(
    unpack: impl Future<Output = Result<(), StoreError>>,
    coming: &[Coming],
    give_up: &GiveUp,
) -> Result<(), PullError> {
    let failed_download: OnceLock<PullError> = OnceLock::new();
    let watch = async {
        let mut ends: FuturesUnordered<_> = coming
            .iter()
            .filter_map(|layer| layer.download.as_ref())
            .map(|download| download.end())
            .collect();
        while let Some(end) = ends.next().await {
            if let Err(error) = end {
                let _ = failed_download.set(error);
                give_up.0.store(true, Ordering::Relaxed);
                break;
            }
        }
        std::future::pending::<()>().await;
    };
    let unpacked = tokio::select! {
        biased;
        result = unpack => result,
        () = watch => return Ok(()),
    };
    let Err(error) = unpacked else { return Ok(()) };
    if let Some(cause) = failed_download.into_inner() {
        return Err(cause);
    }
    // A reader that failed may have been the first to know that its download did.
    for download in coming.iter().filter_map(|layer| layer.download.as_ref()) {
        if (download.is_ending() || download.failed())
            && let Ok(Err(cause)) = tokio::time::timeout(CAUSE, download.end()).await
        {
            return Err(cause);
        }
    }
    Err(error.into())
}
