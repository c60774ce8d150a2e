//! One layer on its way into a registry: known there, mounted, sent from a file, or sent while it is made.

use super::error::PushError;
use super::upload::{Arrival, Blob, Uploader};
use crate::content::Follower;
use crate::digest::{ChainId, DiffId, Digest};
use crate::error::StoreError;
use crate::held::Held;
use crate::progress::ProgressEvent;
use crate::registry::failure::Failure;
use crate::store::{Compression, Lease, Store};
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::{BoxStream, unfold};
use oci_spec::image::Descriptor;
use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc, oneshot};

/// How often running totals are told.
const TELL: Duration = Duration::from_millis(100);
/// A layer whose tar is shorter is made first and sent then: it may turn out to be there already.
const WORTH_STREAMING: u64 = 16 << 20;
/// Bytes of a blob in the making that are read at a time, and how many of these wait for the network.
const READ: usize = 256 << 10;
const WAITING: usize = 8;
/// Repositories that a mount is tried from.
const MOST_MOUNTS: usize = 3;

/// What the layers of one push share.
pub(super) struct Pushing<'a> {
    pub store: &'a Store,
    pub uploader: &'a Uploader<'a>,
    pub compression: Compression,
    pub lease: &'a Arc<Held>,
    /// One layer is made at a time: making one keeps all processors busy.
    pub making: Semaphore,
}

/// One layer of the image.
pub(super) struct Layer {
    pub index: usize,
    pub chain: ChainId,
    pub diff_id: DiffId,
    /// As the manifest that the image was pulled with describes it.
    pub original: Option<Descriptor>,
}

/// A blob that is being made, and the reader that follows it.
struct Making {
    made: tokio::task::JoinHandle<Result<Descriptor, StoreError>>,
    started: oneshot::Receiver<Follower>,
}

impl Pushing<'_> {
    /// Has the layer's blob in the registry in the end; its descriptor.
    pub async fn push(&self, layer: Layer) -> Result<(usize, Descriptor), PushError> {
        let index = layer.index;
        let known = match &layer.original {
            Some(original) => Some(original.clone()),
            None => {
                let (diff_id, compression) = (layer.diff_id, self.compression);
                self.blocking(move |store, _| store.known_layer_blob(&diff_id, compression))
                    .await?
            }
        };
        if let Some(descriptor) = known {
            if is_foreign(&descriptor) {
                return Ok((index, descriptor));
            }
            self.announce(index, &descriptor)?;
            if self.is_there(index, &descriptor).await? {
                return Ok((index, descriptor));
            }
            if layer.original.is_some() {
                self.send(&layer, &descriptor).await?;
                return Ok((index, descriptor));
            }
        }
        self.make(layer).await
    }

    /// Looks for the blob in the repository, and in others of the same registry that are known to have it.
    async fn is_there(&self, index: usize, descriptor: &Descriptor) -> Result<bool, PushError> {
        let digest = digest_of(descriptor)?;
        let what = format!("layer {digest}");
        let arrival = async {
            if self.uploader.exists(&digest).await? {
                return Ok(Some(Arrival::Existed));
            }
            let reference = &self.uploader.session.reference;
            let store = self.store.clone();
            let sources = tokio::task::spawn_blocking(move || store.blob_sources(&digest)).await;
            let sources = sources.ok().and_then(Result::ok).unwrap_or_default();
            let own = format!("{}/", reference.registry());
            let repositories = sources.iter().filter_map(|source| source.strip_prefix(&own));
            let others = repositories.filter(|repository| *repository != reference.repository());
            for from in others.take(MOST_MOUNTS) {
                if self.uploader.mount(&digest, from).await? {
                    return Ok(Some(Arrival::Mounted {
                        from: from.to_owned(),
                    }));
                }
            }
            Ok(None)
        };
        let arrival = arrival
            .await
            .map_err(|failure: Failure| self.failed(failure, &what))?;
        match &arrival {
            Some(Arrival::Existed) => self.tell(ProgressEvent::Exists { index }),
            Some(Arrival::Mounted { from }) => {
                self.tell(ProgressEvent::Mounted {
                    index,
                    from: from.clone(),
                });
            }
            None => {}
        }
        Ok(arrival.is_some())
    }

    /// Makes the layer's blob (when it is not in the store) and sends it, at the same time where that is worth it.
    async fn make(&self, layer: Layer) -> Result<(usize, Descriptor), PushError> {
        let index = layer.index;
        // The semaphore is never closed.
        let turn = self.making.acquire().await.ok();
        let chain = layer.chain;
        let tar_bytes = self
            .blocking(move |_, lease| {
                Ok(lease
                    .layer(&chain)?
                    .ok_or(StoreError::NoLayer { chain })?
                    .tar_bytes)
            })
            .await?;
        self.tell(ProgressEvent::Compressing {
            index,
            total: tar_bytes,
        });
        let Making { made, started } = self.start_making(chain);
        let sent_early = match tar_bytes >= WORTH_STREAMING {
            true => started.await.ok(),
            false => None,
        };
        let cancelled = || StoreError::Cancelled {
            what: format!("making layer {}", layer.diff_id),
        };
        let descriptor = match sent_early {
            None => made.await.unwrap_or_else(|_| Err(cancelled()))?,
            Some(follower) => {
                let (descriptor, sent) = self.send_while_making(index, made, follower).await;
                let descriptor = descriptor.unwrap_or_else(|| Err(cancelled()))?;
                drop(turn);
                self.announce(index, &descriptor)?;
                if sent {
                    return Ok((index, descriptor));
                }
                return self.send_if_missing(layer, descriptor).await;
            }
        };
        drop(turn);
        self.announce(index, &descriptor)?;
        self.send_if_missing(layer, descriptor).await
    }

    async fn send_if_missing(
        &self,
        layer: Layer,
        descriptor: Descriptor,
    ) -> Result<(usize, Descriptor), PushError> {
        if !self.is_there(layer.index, &descriptor).await? {
            self.send(&layer, &descriptor).await?;
        }
        Ok((layer.index, descriptor))
    }

    fn start_making(&self, chain: ChainId) -> Making {
        let (store, lease, compression) = (self.store.clone(), Arc::clone(self.lease), self.compression);
        let (tell, started) = oneshot::channel();
        let made = tokio::task::spawn_blocking(move || {
            store.layer_blob_with(&chain, compression, &lease, |follower| {
                // Nobody wants to follow: fine.
                let _ = tell.send(follower);
            })
        });
        Making { made, started }
    }

    /// Sends the blob while it is made. That it is sent is only a gain of time: if it fails, the blob is made all
    /// the same, and sent anew.
    async fn send_while_making(
        &self,
        index: usize,
        made: tokio::task::JoinHandle<Result<Descriptor, StoreError>>,
        follower: Follower,
    ) -> (Option<Result<Descriptor, StoreError>>, bool) {
        let session = self.uploader.session;
        let _transfer = session.registry.transfers.acquire().await.ok();
        let sent = Arc::new(AtomicU64::new(0));
        // The registry hears the digest when the last byte is made: it need not wait for our own disk.
        let (tell, digest) = oneshot::channel();
        let made = async { made.await.ok() };
        let upload = self
            .uploader
            .send_stream(pieces_of(follower, tell), async { digest.await.ok() }, &sent);
        let both = async { tokio::join!(made, upload) };
        let (descriptor, uploaded) = tokio::select! {
            both = both => both,
            never = self.tell_totals(index, &sent, None) => never,
        };
        if let Err(failure) = &uploaded {
            tracing::debug!(%failure, index, "sending a layer while making it failed; sending it from its file");
        }
        (descriptor, uploaded.is_ok())
    }

    /// Sends a blob of the store.
    async fn send(&self, layer: &Layer, descriptor: &Descriptor) -> Result<(), PushError> {
        let digest = digest_of(descriptor)?;
        let (chain, diff_id, size) = (layer.chain, layer.diff_id, descriptor.size());
        let file = self
            .blocking(move |store, lease| {
                store
                    .have_blob(&chain, &diff_id, &digest, lease)?
                    .ok_or(StoreError::BlobPruned { diff_id, digest })
            })
            .await?;
        // The semaphore is never closed.
        let _turn = self.uploader.session.registry.transfers.acquire().await.ok();
        let sent = Arc::new(AtomicU64::new(0));
        let blob = Blob::File(file.path);
        let result = tokio::select! {
            result = self.uploader.send(&blob, &digest, size, &sent) => result,
            never = self.tell_totals(layer.index, &sent, Some(size)) => never,
        };
        result.map_err(|failure| self.failed(failure, &format!("layer {digest}")))?;
        self.tell(ProgressEvent::Uploaded {
            index: layer.index,
            done: size,
            total: Some(size),
        });
        Ok(())
    }

    /// Tells the running total, for ever.
    async fn tell_totals<T>(&self, index: usize, sent: &AtomicU64, total: Option<u64>) -> T {
        let mut last = 0;
        loop {
            tokio::time::sleep(TELL).await;
            let done = sent.load(Ordering::Relaxed);
            if done != last {
                last = done;
                self.tell(ProgressEvent::Uploaded { index, done, total });
            }
        }
    }

    fn announce(&self, index: usize, descriptor: &Descriptor) -> Result<(), PushError> {
        let layer = digest_of(descriptor)?;
        self.tell(ProgressEvent::PushLayer {
            index,
            layer,
            size: descriptor.size(),
        });
        Ok(())
    }

    fn tell(&self, event: ProgressEvent) {
        self.uploader.session.tell(event);
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store, &Lease) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, PushError> {
        let (store, lease) = (self.store.clone(), Arc::clone(self.lease));
        let done = tokio::task::spawn_blocking(move || work(&store, &lease)).await;
        let cancelled = || StoreError::Cancelled {
            what: "a push".to_owned(),
        };
        done.unwrap_or_else(|_| Err(cancelled())).map_err(PushError::from)
    }

    fn failed(&self, failure: Failure, what: &str) -> PushError {
        failure.push(&self.uploader.session.reference, what)
    }
}

/// Layers that stay where their licence keeps them (OCI image spec, non-distributable layers).
fn is_foreign(descriptor: &Descriptor) -> bool {
    let media_type = descriptor.media_type().to_string();
    media_type.contains("foreign") || media_type.contains("nondistributable")
}

fn digest_of(descriptor: &Descriptor) -> Result<Digest, StoreError> {
    let what = "a layer's descriptor";
    Digest::try_from(descriptor.digest()).map_err(|source| StoreError::Digest { what, source })
}

/// The bytes of a blob in the making, read on a thread of their own; its digest after the last.
fn pieces_of(
    mut follower: Follower,
    digest: oneshot::Sender<Digest>,
) -> BoxStream<'static, io::Result<Bytes>> {
    let (send, received) = mpsc::channel(WAITING);
    tokio::task::spawn_blocking(move || {
        loop {
            let mut piece = vec![0; READ];
            let read = follower.read(&mut piece);
            let piece = match read {
                Ok(0) => {
                    if let Some(found) = follower.digest() {
                        // The upload may have failed already.
                        let _ = digest.send(found);
                    }
                    return;
                }
                Ok(n) => {
                    piece.truncate(n);
                    Ok(Bytes::from(piece))
                }
                Err(error) => Err(error),
            };
            let failed = piece.is_err();
            // Nobody takes it: the upload has failed.
            if send.blocking_send(piece).is_err() || failed {
                return;
            }
        }
    });
    unfold(received, async |mut received| {
        Some((received.recv().await?, received))
    })
    .boxed()
}
