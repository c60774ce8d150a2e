//! Every pod and container this slipwayd knows, in memory, found by id or by an unambiguous beginning of one.
//!
//! It owns the maps only, and the names of those that exist and cannot be read. What an entity is and which changes it may go through is in `pod` and `container`. Locks are
//! held for a lookup, never across an await.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::container::Container;
use crate::error::Error;
use crate::ids::{ContainerId, PodId};
use crate::pod::Pod;
use crate::records::Unreadable;

/// The shortest beginning of an id that is looked up: crictl shows 13.
const SHORTEST_PREFIX: usize = 3;

/// The maps.
#[derive(Default)]
pub struct Registry {
    pods: RwLock<BTreeMap<String, Arc<Pod>>>,
    containers: RwLock<BTreeMap<String, Arc<Container>>>,
    /// Known to exist, and nothing else of them: asked for by name they are neither there nor gone.
    unreadable: RwLock<Arc<Unreadable>>,
}

impl Registry {
    pub fn insert_pod(&self, pod: Arc<Pod>) {
        write(&self.pods).insert(pod.id().to_string(), pod);
    }

    pub fn remove_pod(&self, id: &PodId) {
        write(&self.pods).remove(id.as_str());
    }

    pub fn insert_container(&self, container: Arc<Container>) {
        write(&self.containers).insert(container.id().to_string(), container);
    }

    pub fn remove_container(&self, id: &ContainerId) {
        write(&self.containers).remove(id.as_str());
    }

    /// # Errors
    /// [`Error::NotFound`], [`Error::Ambiguous`], [`Error::Unreadable`].
    pub fn pod(&self, id: &str) -> Result<Arc<Pod>, Error> {
        self.unless_unreadable(find(&read(&self.pods), "pod", id))
    }

    /// # Errors
    /// [`Error::NotFound`], [`Error::Ambiguous`], [`Error::Unreadable`].
    pub fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        self.unless_unreadable(find(&read(&self.containers), "container", id))
    }

    /// Pods and containers whose records cannot be read.
    pub fn unreadable(&self) -> Arc<Unreadable> {
        read(&self.unreadable).clone()
    }

    pub fn set_unreadable(&self, unreadable: Unreadable) {
        *write(&self.unreadable) = Arc::new(unreadable);
    }

    /// What is known to exist must not pass for gone.
    fn unless_unreadable<T>(&self, found: Result<T, Error>) -> Result<T, Error> {
        let Err(Error::NotFound { kind, id }) = found else {
            return found;
        };
        match self.unreadable().get(&id) {
            Some(untold) => Err(Error::Unreadable {
                kind,
                id,
                record: untold.kind,
                why: untold.why.clone(),
            }),
            None => Err(Error::NotFound { kind, id }),
        }
    }

    pub fn pods(&self) -> Vec<Arc<Pod>> {
        read(&self.pods).values().cloned().collect()
    }

    pub fn containers(&self) -> Vec<Arc<Container>> {
        read(&self.containers).values().cloned().collect()
    }

    pub fn containers_of(&self, pod: &PodId) -> Vec<Arc<Container>> {
        read(&self.containers)
            .values()
            .filter(|c| c.pod() == pod)
            .cloned()
            .collect()
    }
}

/// An id, or an unambiguous beginning of one.
fn find<T>(map: &BTreeMap<String, Arc<T>>, kind: &'static str, id: &str) -> Result<Arc<T>, Error> {
    if let Some(found) = map.get(id) {
        return Ok(found.clone());
    }
    let not_found = || Error::NotFound {
        kind,
        id: id.to_owned(),
    };
    if id.len() < SHORTEST_PREFIX {
        return Err(not_found());
    }
    let mut matches = map
        .range(id.to_owned()..)
        .take_while(|(key, _)| key.starts_with(id))
        .map(|(_, value)| value);
    let first = matches.next().ok_or_else(not_found)?;
    match matches.next() {
        None => Ok(first.clone()),
        Some(_) => Err(Error::Ambiguous {
            kind,
            id: id.to_owned(),
        }),
    }
}

fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map() -> BTreeMap<String, Arc<u32>> {
        [("abc123", 1), ("abc999", 2), ("def000", 3)]
            .into_iter()
            .map(|(k, v)| (k.to_owned(), Arc::new(v)))
            .collect()
    }

    #[test]
    fn a_whole_id_or_an_unambiguous_beginning_finds_it() {
        assert_eq!(*find(&map(), "pod", "abc123").unwrap(), 1);
        assert_eq!(*find(&map(), "pod", "def").unwrap(), 3);
    }

    #[test]
    fn an_ambiguous_or_too_short_beginning_is_an_error() {
        assert!(matches!(find(&map(), "pod", "abc"), Err(Error::Ambiguous { .. })));
        assert!(matches!(find(&map(), "pod", "de"), Err(Error::NotFound { .. })));
        assert!(matches!(find(&map(), "pod", ""), Err(Error::NotFound { .. })));
        assert!(matches!(find(&map(), "pod", "zzz"), Err(Error::NotFound { .. })));
    }
}
