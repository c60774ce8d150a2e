//! What a push can fail with: every variant names the destination and, where the user can do something, what.

use crate::error::StoreError;

/// A push failed. Every variant names the reference and, where the user can do something, what.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PushError {
    /// A reference with a digest cannot be pushed to: the digest is the outcome.
    #[error("{reference} has a digest: push to a tag")]
    Digest {
        /// The destination.
        reference: String,
    },
    /// The registry wants credentials, or others than it got.
    #[error(
        "the registry {host} refuses to take {reference} ({detail}): log in with an account that may push there"
    )]
    Unauthorized {
        /// The destination.
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
        /// The destination.
        reference: String,
        /// Who does not answer.
        host: String,
        /// The causes.
        detail: String,
    },
    /// The registry failed or refused.
    #[error("the registry {host} did not take {what} of {reference}: {detail}")]
    Registry {
        /// The destination.
        reference: String,
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
        reference: String,
        /// What is wrong with which file.
        detail: String,
    },
    /// The store failed: also a full disk.
    #[error(transparent)]
    Store(#[from] StoreError),
}
