//! Leases: what keeps things from garbage collection while they are used.
//!
//! A lease belongs to an owner, and is gone when it is dropped or its owner is dead; a persistent one belongs to
//! nobody and stays until it is released by name (a container's, named by its id). Using a thing through a lease
//! finds it and protects it in one transaction, so that collection can never come in between.

use super::Store;
use crate::content::BlobFile;
use crate::digest::{ChainId, Digest, ImageId};
use crate::error::{Result, StoreError};
use crate::store::Layer;

/// Protects what is used through it. Dropping it releases it (not a persistent one).
#[derive(Debug)]
pub struct Lease {
    store: Store,
    name: String,
    persistent: bool,
}

impl Lease {
    /// Its name: unique in the store.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it outlives its owner.
    pub fn persistent(&self) -> bool {
        self.persistent
    }

    /// The layer of a chain, protected from now on; `None` when it is not in the store or torn.
    ///
    /// # Errors
    /// [`StoreError::LeaseGone`]; what the catalog answers.
    pub fn layer(&self, chain: &ChainId) -> Result<Option<Layer>> {
        let _ = (&self.store, chain);
        Err(StoreError::NotReady { what: "lease" })
    }

    /// A blob, protected from now on; `None` when it is not in the store.
    ///
    /// # Errors
    /// [`StoreError::LeaseGone`]; what the catalog answers.
    pub fn blob(&self, digest: &Digest) -> Result<Option<BlobFile>> {
        let _ = digest;
        Err(StoreError::NotReady { what: "lease" })
    }

    /// Protects an image (its layers with it); `false` when it is not in the store.
    ///
    /// # Errors
    /// [`StoreError::LeaseGone`]; what the catalog answers.
    pub fn image(&self, id: &ImageId) -> Result<bool> {
        let _ = id;
        Err(StoreError::NotReady { what: "lease" })
    }

    /// Releases it and says so when that fails, which dropping cannot.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn release(self) -> Result<()> {
        Err(StoreError::NotReady { what: "lease" })
    }
}
