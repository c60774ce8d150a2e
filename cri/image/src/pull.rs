//! Pull: from a reference to an image in the store.
//!
//! Owns the way from registry to store and what concurrent pulls share: connections, tokens, whole pulls and single
//! downloads. The protocol is [`crate::registry`]'s, unpacking and committing are the store's.

mod board;
mod choose;
mod download;
mod error;
mod fetch;
mod flight;
mod layers;
mod run;

pub use error::PullError;

use crate::digest::Digest;
use crate::image::Image;
use crate::platform::Platform;
use crate::progress::Progress;
use crate::reference::Reference;
use crate::registry::client::{Access, Registry, Session, Target};
use crate::registry::{Credentials, LocalBuilds, RegistryConfig};
use crate::store::Store;
use download::Downloads;
use flight::{Flights, Key};
use run::Run;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Pulls images into a store. One for a process, cheap to clone: it shares connections, tokens and downloads
/// between pulls.
#[derive(Clone, Debug)]
pub struct Puller {
    store: Store,
    registry: Arc<Registry>,
    flights: Arc<Flights>,
    downloads: Arc<Downloads>,
}

impl Puller {
    /// A puller into this store. Makes no request and reads no file.
    pub fn new(store: Store, config: RegistryConfig) -> Puller {
        Puller {
            store,
            registry: Registry::new(config),
            flights: Arc::default(),
            downloads: Arc::default(),
        }
    }

    /// Pulls an image and gives it the reference as its name (one with a digest only becomes a repository digest).
    /// Pulls of the same image at the same time share the work. When the returned future is dropped, and nobody
    /// else waits for the same image, the pull ends and leaves nothing but complete blobs, which garbage
    /// collection takes. Needs a tokio runtime with time and I/O.
    ///
    /// # Errors
    /// [`PullError`].
    pub async fn pull(
        &self,
        reference: &Reference,
        auth: Option<Credentials>,
        platform: &Platform,
        progress: &dyn Progress,
    ) -> Result<Image, PullError> {
        let local_builds = self.registry.config.local_builds;
        self.pull_as(reference, auth, platform, local_builds, progress)
            .await
    }

    /// As [`Puller::pull`], with its own rule for tags that a build on this node wrote.
    ///
    /// # Errors
    /// [`PullError`].
    pub async fn pull_as(
        &self,
        reference: &Reference,
        auth: Option<Credentials>,
        platform: &Platform,
        local_builds: LocalBuilds,
        progress: &dyn Progress,
    ) -> Result<Image, PullError> {
        let key = Key {
            reference: reference.canonical(),
            platform: Platform::new(&platform.os, &platform.architecture, platform.variant.as_deref()),
            credentials: auth,
            local_builds,
        };
        let flight = self.flights.join(&key, |board, stop| {
            let run = Run {
                store: self.store.clone(),
                registry: Arc::clone(&self.registry),
                downloads: Arc::clone(&self.downloads),
                key: key.clone(),
                board,
                committing: AtomicBool::new(false),
                failed_by_stranger: AtomicBool::new(false),
                alone: AtomicBool::new(false),
            };
            run.run(stop)
        });
        flight.land(reference, progress).await
    }

    /// The digest that the registry has for a reference now: of a manifest, or of an index for several platforms.
    ///
    /// # Errors
    /// [`PullError`].
    pub async fn resolve(
        &self,
        reference: &Reference,
        auth: Option<Credentials>,
    ) -> Result<Digest, PullError> {
        let failed = |failure: crate::registry::failure::Failure| failure.pull(reference, "its manifest");
        let session = Session::open(&self.registry, reference, auth, Access::Pull, Arc::new(|_| {}));
        let session = session.await.map_err(failed)?;
        let target = match (reference.digest(), reference.tag()) {
            (Some(digest), _) => Target::Digest(*digest),
            (None, tag) => Target::Tag(tag.unwrap_or("latest")),
        };
        Ok(session.resolve(target).await.map_err(failed)?.0)
    }
}
