//! The layers of one pull: found in the store, or downloaded and unpacked at the same time.
//!
//! Owns what makes the two stop each other, and the running totals. Refuses to know manifests.

use super::choose::Chosen;
use super::download::{Download, Parting, Share, Source};
use super::error::PullError;
use super::fetch::downloaded;
use super::run::Run;
use crate::digest::{ChainId, DiffId, Digest};
use crate::error::StoreError;
use crate::held::Held;
use crate::progress::{LayerProgress, ProgressEvent};
use crate::registry::client::Session;
use crate::store::{Blob, LayerSource, UnpackOptions};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// How often running totals are told.
const TELL: Duration = Duration::from_millis(100);
/// How long the cause of a broken layer may stay unknown.
const CAUSE: Duration = Duration::from_secs(10);

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
    /// Downloads and unpacks what is missing.
    pub(super) async fn layers(
        self: &Arc<Run>,
        session: &Arc<Session>,
        chosen: &Chosen,
        diff_ids: &[DiffId],
        lease: &Arc<Held>,
    ) -> Result<(), PullError> {
        let give_up = GiveUp(Arc::default());
        let (sources, coming) = self.sources(session, chosen, diff_ids, lease, &give_up).await?;
        if coming.iter().all(|layer| layer.download.is_none()) && sources.is_empty() {
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
        let result = match result {
            Ok(()) => self.hold(&coming, lease).await,
            failed => failed,
        };
        if result.is_err() {
            let stranger = |download: &Download| download.failed() && !download.is_of(session);
            let strangers = coming
                .iter()
                .filter_map(|layer| layer.download.as_deref())
                .any(stranger);
            self.failed_by_stranger.store(strangers, Ordering::Relaxed);
            // Whoever is told of the failure finds nothing of it on the disk.
            let partings: Vec<_> = coming
                .iter()
                .filter_map(|layer| layer.download.as_ref())
                .map(|download| download.parting())
                .collect();
            drop(coming);
            let gone = futures_util::future::join_all(partings.into_iter().map(Parting::gone));
            let _ = tokio::time::timeout(CAUSE, gone).await;
        }
        result
    }

    /// Takes the blobs under the pull's own lease, before the downloads' leases go: until the image is committed nothing
    /// else says that they belong to it.
    async fn hold(self: &Arc<Run>, coming: &[Coming], lease: &Arc<Held>) -> Result<(), PullError> {
        let downloaded = coming.iter().filter(|layer| layer.download.is_some());
        let digests: Vec<Digest> = downloaded.map(|layer| layer.digest).collect();
        let lease = Arc::clone(lease);
        self.blocking(move |_| digests.iter().try_for_each(|digest| lease.blob(digest).map(drop)))
            .await
    }

    /// Looks for each layer in the store, and begins to fetch those that are not there.
    async fn sources(
        self: &Arc<Run>,
        session: &Arc<Session>,
        chosen: &Chosen,
        diff_ids: &[DiffId],
        lease: &Arc<Held>,
        give_up: &GiveUp,
    ) -> Result<(Vec<LayerSource>, Vec<Coming>), PullError> {
        let descriptors = chosen.layers.clone();
        let diff_ids = diff_ids.to_vec();
        let share = match self.alone.load(Ordering::Relaxed) {
            true => Share::Own,
            false => Share::All,
        };
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
                let known = lease.layer(&chain)?.is_some() && run.store.is_blob_of(diff_id, &digest)?;
                let reader: Box<dyn Blob> = if known {
                    // The manifest names this blob, and a push or a save of the image has to give it.
                    if !run.store.has_or_can_make(&chain, diff_id, &digest, &lease)?
                        && let Source::Coming(download, _) = run
                            .downloads
                            .want(&run.store, &session, descriptor, digest, &lease, share)?
                    {
                        layer.download = Some(download);
                    }
                    Box::new(io::empty())
                } else {
                    // Also where the same files came as another blob: that this one holds them is the image's word only.
                    missing = true;
                    let (store, downloads) = (&run.store, &run.downloads);
                    match downloads.want(store, &session, descriptor, digest, &lease, share)? {
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
                self.committing();
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
    let Err(error) = unpacked else {
        // All bytes were read and checked; that the blobs are durable too may take a little longer.
        for download in coming.iter().filter_map(|layer| layer.download.as_ref()) {
            download.end().await?;
        }
        return Ok(());
    };
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
