//! Leases: what keeps things from garbage collection while they are used.
//!
//! A lease belongs to an owner, and is gone when it is dropped or its owner is dead; a persistent one belongs to
//! nobody and stays until it is released by name (a container's, named by its id). Using a thing through a lease
//! finds it and protects it in one transaction, so that collection can never come in between.

use super::{Layer, Store};
use crate::catalog::leases::{self, Item};
use crate::catalog::{Durability, blobs, images, layers};
use crate::content::BlobFile;
use crate::digest::{ChainId, Digest, ImageId};
use crate::error::{Result, StoreError};
use slipway_snapshot::Snapshotter;
use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};

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

    /// The layer of a chain, protected from now on; `None` when it is not in the store or torn.
    ///
    /// # Errors
    /// [`StoreError::LeaseGone`]; what the catalog answers.
    pub fn layer(&self, chain: &ChainId) -> Result<Option<Layer>> {
        let inner = &self.store.inner;
        inner.catalog.write(Durability::Normal, |c| {
            leases::check(c, &self.name)?;
            let Some(layer) = layers::get(c, chain)? else {
                return Ok(None);
            };
            if inner.committed(&layer.snapshot)?.is_none() {
                return Ok(None);
            }
            leases::hold(c, &self.name, Item::Layer, chain)?;
            Ok(Some(layer))
        })
    }

    /// A blob, protected from now on; `None` when it is not in the store.
    ///
    /// # Errors
    /// [`StoreError::LeaseGone`]; what the catalog answers.
    pub fn blob(&self, digest: &Digest) -> Result<Option<BlobFile>> {
        let inner = &self.store.inner;
        inner.catalog.write(Durability::Normal, |c| {
            leases::check(c, &self.name)?;
            let file = blobs::size(c, digest)?.and_then(|size| inner.content.file(digest, size));
            if file.is_some() {
                leases::hold(c, &self.name, Item::Blob, digest)?;
            }
            Ok(file)
        })
    }

    /// Protects an image (its layers with it); `false` when it is not in the store.
    ///
    /// # Errors
    /// [`StoreError::LeaseGone`]; what the catalog answers.
    pub fn image(&self, id: &ImageId) -> Result<bool> {
        self.store.inner.catalog.write(Durability::Normal, |c| {
            leases::check(c, &self.name)?;
            let Some(image) = images::get(c, id)? else {
                return Ok(false);
            };
            leases::hold(c, &self.name, Item::Image, id)?;
            // The layers by themselves, too: the image may be removed while they are in use.
            if let Some(chain) = image.chain {
                leases::hold(c, &self.name, Item::Layer, &chain)?;
            }
            Ok(true)
        })
    }

    /// Releases it and says so when that fails, which dropping cannot. Active snapshots under it are removed.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn release(mut self) -> Result<()> {
        self.persistent = true; // nothing is left for drop
        self.store.release_lease(&self.name)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.persistent
            && let Err(error) = self.store.release_lease(&self.name)
        {
            // It goes with its owner.
            tracing::warn!(lease = %self.name, %error, "a lease could not be released");
        }
    }
}

impl Store {
    /// A new lease of this owner; `what` is for people.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn lease(&self, what: &str) -> Result<Lease> {
        let name = format!(
            "{}.{}",
            self.owner_id(),
            self.inner.next_lease.fetch_add(1, Ordering::Relaxed)
        );
        self.inner.catalog.write(Durability::Normal, |c| {
            leases::add(c, &name, Some(self.owner_id()), what)
        })?;
        Ok(Lease {
            store: self.clone(),
            name,
            persistent: false,
        })
    }

    /// The persistent lease with this name, made when it is not there.
    ///
    /// # Errors
    /// [`StoreError::LeaseGone`] when the name belongs to an ordinary lease; what the catalog answers.
    pub fn persistent_lease(&self, name: &str) -> Result<Lease> {
        self.inner.catalog.write(Durability::Normal, |c| {
            leases::add(c, name, None, "persistent")?;
            match leases::persistent(c, name)? {
                Some(true) => Ok(()),
                _ => Err(StoreError::LeaseGone {
                    lease: name.to_owned(),
                }),
            }
        })?;
        Ok(Lease {
            store: self.clone(),
            name: name.to_owned(),
            persistent: true,
        })
    }

    /// Releases a lease with what it held; absent is fine. Active snapshots under it are removed: the caller has
    /// unmounted them. Works on a full disk.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn release_lease(&self, name: &str) -> Result<()> {
        let inner = &self.inner;
        let full = inner.lock_full().remove(name);
        let doomed = inner.with_reserve(|| {
            inner
                .catalog
                .write(Durability::Normal, |c| leases::release(c, name))
        })?;
        // The lease is released; a directory that cannot be removed was told of, and is tried again.
        if !doomed.is_empty() {
            let _ = self.remove_doomed_snapshots();
        }
        if full {
            // What the work had put into the store before the disk was full is of no use to anybody.
            self.gc()?;
        }
        Ok(())
    }

    /// Work under a lease found the disk full: what it had made is collected when the lease is released. (After other
    /// failures it stays until the next collection, so that trying again does not start from nothing.)
    pub(crate) fn note_full(&self, lease: &str, error: StoreError) -> StoreError {
        if error.is_disk_full() {
            self.inner.lock_full().insert(lease.to_owned());
        }
        error
    }
}

impl super::Inner {
    pub(crate) fn lock_full(&self) -> MutexGuard<'_, HashSet<String>> {
        self.full_under.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The usage of a committed snapshot; `None` when it is torn.
    pub(crate) fn committed(
        &self,
        id: &slipway_snapshot::SnapshotId,
    ) -> Result<Option<slipway_snapshot::Usage>> {
        self.overlay
            .committed(id)
            .map_err(crate::error::snap(format!("look at snapshot {id}")))
    }
}
