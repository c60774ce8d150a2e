//! Images that a build starts from or takes files from: in the store, or pulled into it. Each is looked up once a
//! build, whatever number of stages ask for it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use serde_json::Value;
use slipway_dockerfile::{BaseImage, Platform};
use slipway_image::{Digest, Image, Lease, Puller, Reference, Store};
use tokio::sync::{Mutex, OnceCell};

use crate::cancel::Cancel;
use crate::error::BaseError;
use crate::key;
use crate::layer::Tip;
use crate::progress::{Event, Outcome, Progress, StepId, StepLabel};

/// An image that the build's lease holds.
#[derive(Debug, Clone)]
pub(crate) struct Base {
    /// Its files.
    pub tip: Tip,
    /// Its key.
    pub key: Digest,
    /// Its configuration as it is.
    pub config: Value,
    /// How many layers it has.
    pub layers: usize,
    /// Its full name, for the display.
    pub name: String,
}

impl Base {
    /// What it brings to expansion.
    pub fn image(&self) -> Result<BaseImage, BaseError> {
        serde_json::from_value(self.config.clone()).map_err(BaseError::Config)
    }
}

/// An image that was, or is just being, looked up.
type Known = Arc<OnceCell<Arc<Base>>>;

/// The images of one build.
pub(crate) struct Images {
    store: Store,
    lease: Arc<Lease>,
    puller: Arc<Puller>,
    always_pull: bool,
    progress: Arc<dyn Progress>,
    cancel: Cancel,
    known: Mutex<HashMap<(String, Platform), Known>>,
}

impl Images {
    pub fn new(
        store: Store,
        lease: Arc<Lease>,
        puller: Arc<Puller>,
        always_pull: bool,
        progress: Arc<dyn Progress>,
        cancel: Cancel,
    ) -> Images {
        Images {
            store,
            lease,
            puller,
            always_pull,
            progress,
            cancel,
            known: Mutex::default(),
        }
    }

    /// The image, pulled if need be; `within` is the step that it is needed for, `None`: the pull is shown as one
    /// of its own, `number` its number.
    pub async fn get(
        &self,
        name: &str,
        platform: &Platform,
        number: StepId,
        within: bool,
    ) -> Result<Arc<Base>, BaseError> {
        let key = (name.to_owned(), platform.clone());
        let cell = Arc::clone(self.known.lock().await.entry(key).or_default());
        let base = cell
            .get_or_try_init(|| self.find(name, platform, number, within))
            .await?;
        Ok(Arc::clone(base))
    }

    async fn find(
        &self,
        name: &str,
        platform: &Platform,
        number: StepId,
        within: bool,
    ) -> Result<Arc<Base>, BaseError> {
        let local = self.local(name, platform).await?;
        let image = match local {
            Some(image) if !self.always_pull => image,
            _ if within => self.pull_or_cancel(name, platform, number).await?,
            _ => {
                let text = format!("pull {name}");
                let label = StepLabel {
                    stage: None,
                    number: 0,
                    total: 0,
                    text,
                };
                self.progress.event(Event::Started { step: number, label });
                let began = Instant::now();
                let pulled = self.pull_or_cancel(name, platform, number).await;
                let outcome = match &pulled {
                    Ok(_) => Outcome::Done,
                    Err(BaseError::Cancelled) => Outcome::Cancelled,
                    Err(_) => Outcome::Failed,
                };
                self.progress.event(Event::Ended {
                    step: number,
                    outcome,
                    elapsed: began.elapsed(),
                });
                pulled?
            }
        };
        self.hold(image, name).await.map(Arc::new)
    }

    /// With --pull, what was built here and is nowhere else is the puller's answer as well.
    async fn pull_or_cancel(
        &self,
        name: &str,
        platform: &Platform,
        step: StepId,
    ) -> Result<Image, BaseError> {
        tokio::select! {
            pulled = self.pull(name, platform, step) => pulled,
            () = self.cancel.wait() => Err(BaseError::Cancelled),
        }
    }

    async fn local(&self, name: &str, platform: &Platform) -> Result<Option<Image>, BaseError> {
        let (store, asked, wanted) = (self.store.clone(), name.to_owned(), wanted(platform));
        let image = blocking(move || store.resolve_for(&asked, &wanted)).await?;
        Ok(image.filter(|image| fits(image, platform)))
    }

    async fn pull(&self, name: &str, platform: &Platform, step: StepId) -> Result<Image, BaseError> {
        let reference = Reference::parse(name).map_err(|source| BaseError::Name {
            name: name.to_owned(),
            source,
        })?;
        let progress = Pulling {
            progress: Arc::clone(&self.progress),
            step,
        };
        self.puller
            .pull(&reference, None, &wanted(platform), &progress)
            .await
            .map_err(|e| BaseError::Pull(Box::new(e)))
    }

    /// Has the lease hold the image, and reads its configuration.
    async fn hold(&self, image: Image, name: &str) -> Result<Base, BaseError> {
        let (store, lease) = (self.store.clone(), Arc::clone(&self.lease));
        let name = Reference::parse(name).map_or_else(|_| name.to_owned(), |r| r.to_string());
        tokio::task::spawn_blocking(move || {
            if !lease.image(&image.id)? {
                return Err(BaseError::Gone);
            }
            let config = serde_json::from_slice(&store.config(&image.id)?).map_err(BaseError::Config)?;
            Ok(Base {
                tip: image.chain.map_or_else(Tip::scratch, Tip::committed),
                key: key::image(image.chain.as_ref()),
                config,
                layers: image.layers.len(),
                name,
            })
        })
        .await
        .unwrap_or(Err(BaseError::Gone))
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, slipway_image::StoreError> + Send + 'static,
) -> Result<T, BaseError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(BaseError::Gone),
    }
}

/// A platform as the store spells it.
fn wanted(platform: &Platform) -> slipway_image::Platform {
    let variant = Some(platform.variant.as_str()).filter(|v| !v.is_empty());
    slipway_image::Platform::new(&platform.os, &platform.architecture, variant)
}

/// Whether an image in the store is for the platform; one that does not say is taken.
fn fits(image: &Image, wanted: &Platform) -> bool {
    let architecture = image.config.architecture().to_string();
    let os = image.config.os().to_string();
    let own = Platform {
        os,
        architecture,
        variant: wanted.variant.clone(),
    }
    .normalized();
    own.architecture.is_empty() || own == *wanted
}

struct Pulling {
    progress: Arc<dyn Progress>,
    step: StepId,
}

impl slipway_image::Progress for Pulling {
    fn event(&self, event: slipway_image::ProgressEvent) {
        crate::pulling::forward(&*self.progress, self.step, event);
    }
}
