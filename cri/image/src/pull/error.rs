//! What a pull can fail with.
//!
//! Every variant names the reference and, where the user can do something, what. The causes are text: an error is
//! given to everybody who waited for the same pull.

use crate::error::StoreError;
use crate::platform::Platform;
use std::sync::Arc;

/// A pull failed. Every variant names the reference and, where the user can do something, what.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PullError {
    /// No registry that was asked has the image.
    #[error("{reference} is not in the registry {host}: check name and tag, and that it was pushed")]
    NotFound {
        /// What was asked for.
        reference: String,
        /// Who was asked last.
        host: String,
    },
    /// The registry wants credentials, or others than it got.
    #[error(
        "the registry {host} refuses access to {reference} ({detail}): log in, or give the pod an imagePullSecret"
    )]
    Unauthorized {
        /// What was asked for.
        reference: String,
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
        reference: String,
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
        reference: String,
        /// Who refuses.
        host: String,
    },
    /// The registry failed.
    #[error("the registry {host} could not give {what} of {reference}: {detail}")]
    Registry {
        /// What was asked for.
        reference: String,
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
        reference: String,
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
        reference: String,
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
        reference: String,
        /// For which platform.
        wanted: Box<Platform>,
        /// What there is.
        available: Vec<Platform>,
    },
    /// The manifest is of Docker's schema 1.
    #[error(
        "{reference} has a manifest of Docker's schema 1, which nobody supports any more: push it again with a newer tool"
    )]
    Schema1 {
        /// What was asked for.
        reference: String,
    },
    /// hosts.toml, config.json, a certificate or a credential helper of this node is at fault.
    #[error("{reference} cannot be pulled because of this node's configuration: {detail}")]
    Config {
        /// What was asked for.
        reference: String,
        /// What is wrong with which file.
        detail: String,
    },
    /// The pull was given up because nobody waits for it any more.
    #[error("the pull of {reference} was cancelled")]
    Cancelled {
        /// What was asked for.
        reference: String,
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

impl PullError {
    /// Whether the registry has no say in the matter: it does not know the image, does not let us see it, or
    /// cannot be reached.
    pub fn is_about_absence(&self) -> bool {
        matches!(
            self,
            PullError::NotFound { .. } | PullError::Unauthorized { .. } | PullError::Unreachable { .. }
        )
    }

    /// Whether the filesystem under the store is full.
    pub fn is_disk_full(&self) -> bool {
        matches!(self, PullError::Store(error) if error.is_disk_full())
    }
}
