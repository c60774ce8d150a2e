//! The build cache: step key → chain and the engine's own words, and the right to execute a step.
//!
//! ```text
//! locks/<64 digits>      locked while a step with this key is executed; removed by whoever held it last
//! ```

use super::owners::{lock_file, try_lock};
use super::{Lease, Store};
use crate::catalog::{Durability, cache, now};
use crate::digest::{ChainId, Digest};
use crate::error::{Result, StoreError, at};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

/// Entries forgotten in one transaction: others wait for the write lock no longer than for these.
const BATCH: usize = 100;

/// The result of one build step, by its cache key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheEntry {
    /// The step's key.
    pub key: Digest,
    /// The chain after the step, for a step that made a layer (or had one below).
    pub chain: Option<ChainId>,
    /// What else the step did, in the engine's own words.
    pub value: String,
    /// When it was made.
    pub created_at: SystemTime,
    /// When it was last found.
    pub used_at: SystemTime,
}

/// Which cache entries to forget. Those that fit any of the limits go.
#[derive(Clone, Copy, Debug, Default)]
pub struct CachePrune {
    /// All of them.
    pub all: bool,
    /// Not found for this long.
    pub unused_for: Option<Duration>,
    /// The oldest, until the layers that only the cache holds take no more than this.
    pub keep_bytes: Option<u64>,
}

/// The right to execute the step with one key; given up when dropped.
#[derive(Debug)]
pub struct CacheLock {
    path: PathBuf,
    file: File,
}

impl Drop for CacheLock {
    fn drop(&mut self) {
        // While the lock is held, nobody else can take the file under this name for theirs: they compare inodes.
        if same_file(&self.file, &self.path) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn same_file(file: &File, path: &std::path::Path) -> bool {
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

impl Store {
    /// The entry of a step; its layer is held by the lease from now on. One whose layer is gone is not found.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn cache_get(&self, key: &Digest, lease: &Lease) -> Result<Option<CacheEntry>> {
        let Some(entry) = self.inner.catalog.read(|c| cache::get(c, key))? else {
            return Ok(None);
        };
        if let Some(chain) = &entry.chain
            && (lease.layer(chain)?.is_none() || !self.intact(Some(chain))?)
        {
            return Ok(None);
        }
        self.inner
            .catalog
            .write(Durability::Normal, |c| cache::touch(c, key))?;
        Ok(Some(entry))
    }

    /// Records a step's result, replacing an older one.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn cache_put(&self, key: &Digest, chain: Option<&ChainId>, value: &str) -> Result<()> {
        self.inner
            .catalog
            .write(Durability::Normal, |c| cache::put(c, key, chain, value))
    }

    /// Forgets entries; how many. The layers go with the next [`Store::gc`].
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn cache_prune(&self, which: CachePrune) -> Result<u64> {
        let inner = &self.inner;
        let old = || {
            inner.catalog.write(Durability::Normal, |c| {
                let mut gone = 0;
                if which.all {
                    gone += cache::delete_unused(c, i64::MAX)?;
                }
                if let Some(time) = which.unused_for {
                    let millis = i64::try_from(time.as_millis()).unwrap_or(i64::MAX);
                    gone += cache::delete_unused(c, now().saturating_sub(millis))?;
                }
                Ok(gone)
            })
        };
        let mut gone = inner.with_reserve(old)?;
        if let Some(limit) = which.keep_bytes {
            // Nobody waits while it is found out what has to go; one that was used meanwhile stays.
            for some in inner.catalog.read(|c| cache::beyond(c, limit))?.chunks(BATCH) {
                gone += inner.with_reserve(|| {
                    inner.catalog.write(Durability::Normal, |c| {
                        some.iter().try_fold(0, |gone, (key, used)| {
                            Ok(gone + cache::delete_unless_used(c, key, *used)?)
                        })
                    })
                })?;
            }
        }
        Ok(gone)
    }

    /// The right to execute the step with this key, waiting while another process has it.
    ///
    /// # Errors
    /// [`StoreError::Timeout`].
    pub fn cache_lock(&self, key: &Digest, wait: Duration) -> Result<CacheLock> {
        let dir = self.inner.root.join("locks");
        std::fs::create_dir_all(&dir).map_err(at("create", &dir))?;
        let path = dir.join(key.hex());
        let what = format!("another build to finish the step {key}");
        let start = Instant::now();
        loop {
            let left = wait.saturating_sub(start.elapsed());
            let file = match lock_file(&path, &what, left) {
                Err(StoreError::Timeout { what, .. }) => {
                    return Err(StoreError::Timeout {
                        what,
                        seconds: wait.as_secs(),
                    });
                }
                other => other?,
            };
            // Whoever had it before removed the name: the lock that counts is on the file that has it now.
            if same_file(&file, &path) && try_lock(&file, &path)? {
                return Ok(CacheLock { path, file });
            }
        }
    }
}
