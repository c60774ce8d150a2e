//! Push: from an image in the store to a registry.
//!
//! ```text
//!  snapshot ─▶ tar ─▶ gzip ─▶ blob file            a layer at a time, with all processors
//!                        └──▶ follower ─▶ PATCH    sent while it is made
//! ```
//! A layer whose blob is known is first looked for in the registry, then mounted from a repository that is known to
//! have it; only then it is made and sent. When all blobs are there, the manifest follows, and the store remembers.
//! Owns this order. The protocol is [`crate::registry`]'s, blobs are made by the store.

mod error;
mod layer;
mod upload;

pub use error::PushError;

use crate::digest::{ChainId, Digest};
use crate::error::StoreError;
use crate::held::Held;
use crate::image::Image;
use crate::progress::{Progress, ProgressEvent};
use crate::reference::Reference;
use crate::registry::client::{Access, Place, Registry, Session};
use crate::registry::failure::Failure;
use crate::registry::transport::{Payload, Request};
use crate::registry::{Credentials, RegistryConfig};
use crate::store::{Compression, Manifest, Store};
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use layer::{Layer, Pushing};
use oci_spec::image::Descriptor;
use reqwest::Method;
use reqwest::header::{CONTENT_TYPE, HeaderValue};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use tokio::sync::{Semaphore, mpsc};
use upload::{Blob, Uploader};

/// Pushes images of a store. One for a process, cheap to clone: it shares connections and tokens between pushes.
#[derive(Clone, Debug)]
pub struct Pusher {
    store: Store,
    registry: Arc<Registry>,
}

impl Pusher {
    /// A pusher from this store. Makes no request and reads no file.
    pub fn new(store: Store, config: RegistryConfig) -> Pusher {
        Pusher {
            store,
            registry: Registry::new(config),
        }
    }

    /// Pushes an image under a tag and records where it is now. Pulled images keep their manifest and blobs;
    /// built ones get gzip layers. Pushing again makes the same digests. When the returned future is dropped, the
    /// push ends; what the registry has by then it keeps.
    ///
    /// # Errors
    /// [`PushError`].
    pub async fn push(
        &self,
        image: &Image,
        to: &Reference,
        auth: Option<Credentials>,
        progress: &dyn Progress,
    ) -> Result<Digest, PushError> {
        self.push_as(image, to, auth, Compression::default(), progress)
            .await
    }

    /// As [`Pusher::push`], with the encoding that layers get which have none yet.
    ///
    /// # Errors
    /// [`PushError`].
    pub async fn push_as(
        &self,
        image: &Image,
        to: &Reference,
        auth: Option<Credentials>,
        compression: Compression,
        progress: &dyn Progress,
    ) -> Result<Digest, PushError> {
        if to.digest().is_some() {
            return Err(PushError::Digest {
                reference: to.to_string(),
            });
        }
        let (news, mut told) = mpsc::unbounded_channel();
        let notify = Arc::new(move |event| {
            // Nobody listens any more: the push is over.
            let _ = news.send(event);
        });
        let work = async move {
            let session = Session::open(&self.registry, to, auth, Access::Push, notify).await;
            let session = session.map_err(|failure| failure.push(to, "the configuration"))?;
            let run = Run {
                store: self.store.clone(),
                session,
                compression,
            };
            run.run(image).await
        };
        let mut work = std::pin::pin!(work);
        let result = loop {
            tokio::select! {
                biased;
                Some(event) = told.recv() => progress.event(event),
                result = &mut work => break result,
            }
        };
        while let Ok(event) = told.try_recv() {
            progress.event(event);
        }
        result
    }
}

struct Run {
    store: Store,
    session: Session,
    compression: Compression,
}

impl Run {
    async fn run(&self, image: &Image) -> Result<Digest, PushError> {
        let to = &self.session.reference;
        let (id, text) = (image.id, format!("push of {to}"));
        let (lease, config, original, image) = self
            .blocking(move |store, compression| {
                let lease = Held::new(store.lease(&text)?);
                if !lease.image(&id)? {
                    return Err(StoreError::NoImage { name: id.to_string() });
                }
                let image = store
                    .image(&id)?
                    .ok_or_else(|| StoreError::NoImage { name: id.to_string() })?;
                let config = store.config(&id)?;
                // A pulled image keeps its manifest; of a built one it is made when the blobs are known.
                let original = match !image.built_here && image.manifest.is_some() {
                    true => Some(store.manifest(&id, compression, &lease)?),
                    false => None,
                };
                Ok((lease, config, original, image))
            })
            .await?;
        let lease = Arc::new(lease);
        let place = self.place(id.digest()).await?;
        let uploader = Uploader {
            session: &self.session,
            place,
        };
        let layers = self.layers(&uploader, &image, original.as_ref(), &lease).await?;
        let config = Bytes::from(config);
        self.config(&uploader, id.digest(), &config).await?;
        let manifest = match original {
            Some(manifest) => manifest,
            None => {
                self.blocking(move |store, _| store.make_manifest(&id, &config, layers))
                    .await?
            }
        };
        self.manifest(place, &manifest).await?;
        self.record(&id, &manifest, lease).await?;
        self.session.tell(ProgressEvent::Pushed {
            digest: manifest.digest,
        });
        Ok(manifest.digest)
    }

    /// The first place that may be pushed to and answers.
    async fn place(&self, config: &Digest) -> Result<&Place, PushError> {
        let mut last = self.session.nowhere();
        for place in self.session.places(|endpoint| endpoint.push) {
            match (Uploader {
                session: &self.session,
                place,
            })
            .exists(config)
            .await
            {
                Ok(_) => return Ok(place),
                Err(failure) if failure.is_unreachable() => last = failure,
                Err(failure) => return Err(self.failed(failure, "the configuration")),
            }
        }
        Err(self.failed(last, "the configuration"))
    }

    async fn layers(
        &self,
        uploader: &Uploader<'_>,
        image: &Image,
        original: Option<&Manifest>,
        lease: &Arc<Held>,
    ) -> Result<Vec<Descriptor>, PushError> {
        let pushing = Pushing {
            store: &self.store,
            uploader,
            compression: self.compression,
            lease,
            making: Semaphore::new(1),
        };
        let layers = ChainId::all(&image.layers)
            .into_iter()
            .zip(&image.layers)
            .enumerate();
        let layers = layers.map(|(index, (chain, diff_id))| Layer {
            index,
            chain,
            diff_id: *diff_id,
            original: original.and_then(|manifest| manifest.layers.get(index)).cloned(),
        });
        let at_once = self.session.registry.config.max_concurrent.clamp(1, 64) + 1;
        let pushes = layers.map(|layer| pushing.push(layer));
        let mut done: Vec<(usize, Descriptor)> = futures_util::stream::iter(pushes)
            .buffer_unordered(at_once)
            .try_collect()
            .await?;
        done.sort_by_key(|(index, _)| *index);
        Ok(done.into_iter().map(|(_, descriptor)| descriptor).collect())
    }

    async fn config(
        &self,
        uploader: &Uploader<'_>,
        digest: &Digest,
        config: &Bytes,
    ) -> Result<(), PushError> {
        let what = "the configuration";
        if uploader
            .exists(digest)
            .await
            .map_err(|failure| self.failed(failure, what))?
        {
            return Ok(());
        }
        let blob = Blob::Bytes(config.clone());
        let sent = uploader
            .send(&blob, digest, config.len() as u64, &Arc::new(AtomicU64::new(0)))
            .await;
        sent.map_err(|failure| self.failed(failure, what))
    }

    async fn manifest(&self, place: &Place, manifest: &Manifest) -> Result<(), PushError> {
        let session = &self.session;
        let tag = session.reference.tag().unwrap_or("latest");
        let mut request = Request::new(
            Method::PUT,
            session.url(&place.endpoint, &format!("manifests/{tag}")),
        );
        let media_type = HeaderValue::from_str(&manifest.media_type).unwrap_or(HeaderValue::from_static(
            "application/vnd.oci.image.manifest.v1+json",
        ));
        request.headers.insert(CONTENT_TYPE, media_type);
        request.payload = Payload::Bytes(Bytes::from(manifest.bytes.clone()));
        let failed = |failure| self.failed(failure, "the manifest");
        let answer = session
            .call_patiently(place, "the manifest", &request)
            .await
            .map_err(failed)?;
        let told = answer
            .header("docker-content-digest")
            .and_then(|text| text.parse::<Digest>().ok());
        match told.filter(|told| *told != manifest.digest) {
            Some(told) => Err(failed(Failure::Protocol {
                host: answer.host,
                detail: format!("it recorded the manifest as {told}, it is {}", manifest.digest),
            })),
            None => Ok(()),
        }
    }

    async fn record(
        &self,
        id: &crate::digest::ImageId,
        manifest: &Manifest,
        lease: Arc<Held>,
    ) -> Result<(), PushError> {
        let (id, manifest) = (*id, manifest.clone());
        let to = self.session.reference.clone();
        self.blocking(move |store, _| {
            for layer in &manifest.layers {
                if let Ok(digest) = Digest::try_from(layer.digest()) {
                    store.add_blob_source(&digest, &to.name())?;
                }
            }
            match store.record_push(&id, &to.with_digest(manifest.digest).to_string(), &manifest) {
                // Removed while it was pushed: the registry has it all the same.
                Err(StoreError::NoImage { name }) => {
                    tracing::info!(image = name, to = %to, "an image was removed while it was pushed");
                }
                recorded => recorded?,
            }
            Held::release(lease);
            Ok(())
        })
        .await
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store, Compression) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, PushError> {
        let (store, compression) = (self.store.clone(), self.compression);
        let done = tokio::task::spawn_blocking(move || work(&store, compression)).await;
        let cancelled = || StoreError::Cancelled {
            what: format!("the push of {}", self.session.reference),
        };
        done.unwrap_or_else(|_| Err(cancelled())).map_err(PushError::from)
    }

    fn failed(&self, failure: Failure, what: &str) -> PushError {
        failure.push(&self.session.reference, what)
    }
}
