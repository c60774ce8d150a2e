//! The books on what exists only provisionally: implied directories, links that wait for the layers below, deleted
//! names, times that are set last. All of it is kept by name, in memory, for as long as the archive lasts, so what the
//! names take is bounded: an archive of a few megabytes could imply gigabytes of them. Knows no files.

use super::{FixUps, UnpackError, shown};
use crate::tar::Time;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a name takes besides its own bytes: its allocation and its share of the tree.
const OVERHEAD: u64 = 96;

/// What an image may take without asking anybody: some 30,000 directories. So images as they usually are do not fail
/// because others take all there is.
const OWN: u64 = 4 << 20;

/// Memory for names, in bytes: what the images that are unpacked at the same time share beyond a few megabytes each.
#[derive(Clone, Debug)]
pub struct NamePool {
    size: u64,
    used: Arc<AtomicU64>,
}

impl NamePool {
    /// So many bytes.
    pub fn new(size: u64) -> NamePool {
        NamePool {
            size,
            used: Arc::default(),
        }
    }

    /// What one image may take: at most `limit`, and beyond 4 MiB only what the pool has.
    pub fn budget(&self, limit: u64) -> NameBudget {
        NameBudget {
            limit,
            taken: Mutex::default(),
            pool: Some(self.clone()),
        }
    }

    fn take(&self, bytes: u64) -> bool {
        let before = self.used.fetch_add(bytes, Ordering::Relaxed);
        let fits = before.saturating_add(bytes) <= self.size;
        if !fits {
            self.give(bytes);
        }
        fits
    }

    fn give(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// Memory for names, in bytes: what all layers of an image share. What was taken of a pool goes back when it is dropped.
#[derive(Debug)]
pub struct NameBudget {
    limit: u64,
    taken: Mutex<Taken>,
    pool: Option<NamePool>,
}

#[derive(Debug, Default)]
struct Taken {
    bytes: u64,
    /// How much of them is the pool's.
    pooled: u64,
}

impl Drop for NameBudget {
    fn drop(&mut self) {
        if let Some(pool) = &self.pool {
            pool.give(self.lock().pooled);
        }
    }
}

impl NameBudget {
    /// So many bytes.
    pub fn new(limit: u64) -> NameBudget {
        NameBudget {
            limit,
            taken: Mutex::default(),
            pool: None,
        }
    }

    fn take(&self, name: &[u8]) -> Result<(), UnpackError> {
        let mut taken = self.lock();
        let bytes = taken.bytes + name.len() as u64 + OVERHEAD;
        let more = bytes.saturating_sub(OWN).saturating_sub(taken.pooled);
        let limit = match &self.pool {
            _ if bytes > self.limit => self.limit,
            Some(pool) if !pool.take(more) => pool.size,
            pool => {
                taken.bytes = bytes;
                taken.pooled += pool.as_ref().map_or(0, |_| more);
                return Ok(());
            }
        };
        Err(UnpackError::TooLarge {
            entry: shown(name),
            what: "bytes of names that have to be remembered",
            limit,
        })
    }

    fn give(&self, name: &[u8]) {
        let mut taken = self.lock();
        taken.bytes -= name.len() as u64 + OVERHEAD;
        let less = taken.pooled.saturating_sub(taken.bytes.saturating_sub(OWN));
        if let Some(pool) = &self.pool {
            pool.give(less);
            taken.pooled -= less;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The books of one layer. Paths are real ones, relative to the layer.
pub(super) struct Books<'a> {
    budget: &'a NameBudget,
    fix_ups: FixUps,
    /// Times of directories with an entry of their own, set when nothing more is put into them.
    times: BTreeMap<Vec<u8>, Time>,
}

impl<'a> Books<'a> {
    /// Nothing but the root, which is implied.
    pub(super) fn new(budget: &'a NameBudget) -> Books<'a> {
        let mut fix_ups = FixUps::default();
        fix_ups.implied.insert(Vec::new(), true);
        Books {
            budget,
            fix_ups,
            times: BTreeMap::new(),
        }
    }

    /// A directory without an entry (yet); `false`: nothing below shows through.
    pub(super) fn imply(&mut self, path: Vec<u8>, inherits: bool) -> Result<(), UnpackError> {
        self.drop_link(&path);
        if !self.fix_ups.implied.contains_key(&path) {
            self.budget.take(&path)?;
        }
        self.fix_ups.implied.insert(path, inherits);
        Ok(())
    }

    /// The directory has an entry of its own.
    pub(super) fn made(&mut self, path: &[u8]) {
        self.drop_link(path);
        self.drop_implied(path);
    }

    /// The directory itself, not only its contents, is deleted below: nothing of it shows through.
    pub(super) fn cut_off(&mut self, path: &[u8]) {
        if let Some(inherits) = self.fix_ups.implied.get_mut(path) {
            *inherits = false;
        }
    }

    /// A hard link to a file that this layer does not hold.
    pub(super) fn wait_for(&mut self, link: Vec<u8>, target: Vec<u8>) -> Result<(), UnpackError> {
        self.drop_link(&link);
        self.budget.take(&target)?;
        self.budget.take(&link)?;
        self.fix_ups.links.insert(link, target);
        Ok(())
    }

    /// Whether any link waits: usually none does.
    pub(super) fn has_links(&self) -> bool {
        !self.fix_ups.links.is_empty()
    }

    /// Whether a link waits under this name.
    pub(super) fn has_link(&self, path: &[u8]) -> bool {
        self.has_links() && self.fix_ups.links.contains_key(path)
    }

    /// A deleted name.
    pub(super) fn delete(&mut self, path: Vec<u8>) -> Result<(), UnpackError> {
        if !self.fix_ups.whiteouts.contains(&path) {
            self.budget.take(&path)?;
            self.fix_ups.whiteouts.insert(path);
        }
        Ok(())
    }

    pub(super) fn hide_root(&mut self) {
        self.fix_ups.opaque_root = true;
    }

    /// A directory's time, to be set last.
    pub(super) fn set_time_last(&mut self, path: &[u8], time: Time) -> Result<(), UnpackError> {
        match self.times.get_mut(path) {
            Some(there) => *there = time,
            None => {
                self.budget.take(path)?;
                self.times.insert(path.to_vec(), time);
            }
        }
        Ok(())
    }

    /// An entry takes the place of whatever was expected at this path.
    pub(super) fn forget(&mut self, path: &[u8]) {
        self.drop_link(path);
        self.drop_implied(path);
        if self.times.remove(path).is_some() {
            self.budget.give(path);
        }
    }

    /// Everything below this path is gone. Takes as long as there is something to forget.
    pub(super) fn forget_below(&mut self, path: &[u8]) {
        // Everything that starts with "path/" sorts between "path/" and "path0": '0' follows '/'.
        let from = [path, b"/"].concat();
        let to = [path, b"0"].concat();
        let budget = self.budget;
        remove_range(&mut self.fix_ups.implied, &from, &to, |name, _| budget.give(name));
        remove_range(&mut self.fix_ups.links, &from, &to, |name, target| {
            budget.give(name);
            budget.give(target);
        });
        remove_range(&mut self.times, &from, &to, |name, _| budget.give(name));
    }

    /// The times that were to be set last.
    pub(super) fn take_times(&mut self) -> BTreeMap<Vec<u8>, Time> {
        let times = std::mem::take(&mut self.times);
        times.keys().for_each(|name| self.budget.give(name));
        times
    }

    /// What is left for [`super::fix_up`]; it stays on the budget.
    pub(super) fn close(mut self) -> FixUps {
        std::mem::take(&mut self.fix_ups)
    }

    fn drop_link(&mut self, path: &[u8]) {
        if self.has_link(path)
            && let Some(target) = self.fix_ups.links.remove(path)
        {
            self.budget.give(path);
            self.budget.give(&target);
        }
    }

    fn drop_implied(&mut self, path: &[u8]) {
        if self.fix_ups.implied.remove(path).is_some() && !path.is_empty() {
            self.budget.give(path);
        }
    }
}

/// What a layer that came to nothing had remembered is no longer kept.
impl Drop for Books<'_> {
    fn drop(&mut self) {
        let fix_ups = std::mem::take(&mut self.fix_ups);
        let implied = fix_ups.implied.into_keys().filter(|path| !path.is_empty());
        let links = fix_ups
            .links
            .into_iter()
            .flat_map(|(link, target)| [link, target]);
        let names = implied.chain(links).chain(fix_ups.whiteouts);
        names.for_each(|name| self.budget.give(&name));
        self.take_times();
    }
}

fn remove_range<V>(map: &mut BTreeMap<Vec<u8>, V>, from: &[u8], to: &[u8], mut gone: impl FnMut(&[u8], &V)) {
    let keys: Vec<Vec<u8>> = map
        .range(from.to_vec()..to.to_vec())
        .map(|(key, _)| key.clone())
        .collect();
    for key in keys {
        if let Some(value) = map.remove(&key) {
            gone(&key, &value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_forgotten_is_given_back_and_what_is_kept_is_counted_once() {
        let budget = NameBudget::new(10_000);
        let mut books = Books::new(&budget);
        for _ in 0..100 {
            books.imply(b"a".to_vec(), true).unwrap();
            books.imply(b"a/b".to_vec(), true).unwrap();
            books.wait_for(b"a/l".to_vec(), b"elsewhere".to_vec()).unwrap();
            books.delete(b"gone".to_vec()).unwrap();
            let time = Time::default();
            books.set_time_last(b"a/b", time).unwrap();
            books.set_time_last(b"a/b", time).unwrap();
            books.forget_below(b"a");
            books.forget(b"a");
        }
        assert_eq!(budget.lock().bytes, 4 + OVERHEAD, "the deleted name");
        books.made(b"");
        assert_eq!(budget.lock().bytes, 4 + OVERHEAD);
        let long = vec![b'x'; 5000];
        books.imply(long.clone(), true).unwrap();
        let error = books.set_time_last(&long, Time::default()).unwrap_err();
        assert!(
            matches!(error, UnpackError::TooLarge { limit: 10_000, .. }),
            "{error}"
        );
        assert!(error.to_string().len() < 500, "{error}");
        assert_eq!(budget.lock().bytes, 4 + 5000 + 2 * OVERHEAD);
    }

    #[test]
    fn what_a_failed_layer_remembered_is_given_back_and_what_a_good_one_did_is_kept() {
        let budget = NameBudget::new(10_000);
        for closed in [true, false] {
            let mut books = Books::new(&budget);
            books.imply(b"a".to_vec(), true).unwrap();
            books.wait_for(b"b".to_vec(), b"c".to_vec()).unwrap();
            books.delete(b"d".to_vec()).unwrap();
            books.set_time_last(b"e", Time::default()).unwrap();
            match closed {
                true => assert_eq!(books.close().links.len(), 1),
                false => drop(books),
            }
            assert_eq!(budget.lock().bytes, 4 * (1 + OVERHEAD));
        }
    }

    #[test]
    fn images_share_a_pool_beyond_what_each_may_have_anyway() {
        let pool = NamePool::new(3 << 20);
        let name = vec![b'x'; (1 << 20) - OVERHEAD as usize];
        let greedy = pool.budget(128 << 20);
        for _ in 0..7 {
            greedy.take(&name).unwrap();
        }
        let error = greedy.take(&name).unwrap_err();
        assert!(
            matches!(error, UnpackError::TooLarge { limit, .. } if limit == 3 << 20),
            "{error}"
        );
        let other = pool.budget(128 << 20);
        for _ in 0..4 {
            other.take(&name).unwrap();
        }
        other.take(b"").unwrap_err();
        greedy.give(&name);
        other.take(&name).unwrap();
        drop(greedy);
        for _ in 0..2 {
            other.take(&name).unwrap();
        }
        other.take(b"").unwrap_err();
        drop(other);
        assert_eq!(pool.used.load(Ordering::Relaxed), 0);
        let strict = pool.budget(1 << 20);
        strict.take(&name).unwrap();
        strict.take(b"").unwrap_err();
    }
}
