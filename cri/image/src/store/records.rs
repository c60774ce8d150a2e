//! Runtime records: slipwayd's pods, containers and intents. The store keeps them and knows nothing of them.

use super::Store;
use crate::catalog::{Durability, records};
use crate::error::Result;

/// Typed JSON of slipwayd: pods, containers, names, intents.
#[derive(Clone, Copy)]
pub struct Records<'a> {
    store: &'a Store,
}

/// One runtime record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its id, unique within its kind.
    pub id: String,
    /// Its name, unique within its kind, if it has one.
    pub name: Option<String>,
    /// Its contents.
    pub json: String,
}

impl Store {
    /// The runtime records.
    pub fn records(&self) -> Records<'_> {
        Records { store: self }
    }
}

impl Records<'_> {
    /// Writes a record, replacing the one with its id.
    ///
    /// # Errors
    /// [`StoreError::NameTaken`](crate::StoreError::NameTaken) when another record of the kind has the name.
    pub fn put(&self, kind: &str, id: &str, name: Option<&str>, json: &str) -> Result<()> {
        self.store
            .inner
            .catalog
            .write(Durability::Normal, |c| records::put(c, kind, id, name, json))
    }

    /// Changes a record that says what is being given back (an exit, a removal). Works on a full disk.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn put_giving_back(&self, kind: &str, id: &str, json: &str) -> Result<()> {
        let inner = &self.store.inner;
        inner.with_reserve(|| {
            inner
                .catalog
                .write(Durability::Normal, |c| records::put(c, kind, id, None, json))
        })
    }

    /// One record.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn get(&self, kind: &str, id: &str) -> Result<Option<Record>> {
        self.store.inner.catalog.read(|c| records::get(c, kind, id))
    }

    /// The record that has a name.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn by_name(&self, kind: &str, name: &str) -> Result<Option<Record>> {
        self.store.inner.catalog.read(|c| records::by_name(c, kind, name))
    }

    /// All records of a kind, oldest first.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn list(&self, kind: &str) -> Result<Vec<Record>> {
        self.store.inner.catalog.read(|c| records::list(c, kind))
    }

    /// Removes a record; absent is fine. Works on a full disk.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn delete(&self, kind: &str, id: &str) -> Result<()> {
        let inner = &self.store.inner;
        inner.with_reserve(|| {
            inner
                .catalog
                .write(Durability::Normal, |c| records::delete(c, kind, id))
        })
    }
}
