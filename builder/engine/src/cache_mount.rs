//! Directories that RUN --mount=type=cache keeps between builds: their place, their locks, their end.
//!
//! ```text
//! <root>/cache-mounts/<hash of the id>[-<n>]/   0700
//!   lock                                        flock: shared by `sharing=shared`, alone by the others;
//!                                               its mtime is the last use
//!   fs                                          what is mounted
//! ```

use std::fs::File;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::FlockOperation;
use slipway_image::Digest;

/// A cache directory with its lock; unused again when dropped.
#[derive(Debug)]
pub(crate) struct CacheDir {
    /// The directory that holds `fs`.
    pub dir: PathBuf,
    lock: File,
}

impl CacheDir {
    /// The directory of an id.
    pub fn path(root: &Path, id: &str) -> PathBuf {
        root.join("cache-mounts")
            .join(&Digest::of(id.as_bytes()).hex()[..32])
    }

    /// Takes a directory; `None`: somebody else has it.
    pub fn try_take(dir: &Path, shared: bool) -> io::Result<Option<CacheDir>> {
        let operation = if shared {
            FlockOperation::NonBlockingLockShared
        } else {
            FlockOperation::NonBlockingLockExclusive
        };
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)?;
        let path = dir.join("lock");
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)?;
        if rustix::fs::flock(&lock, operation).is_err() {
            return Ok(None);
        }
        // Somebody may have removed it between our opening and locking it.
        match std::fs::metadata(&path) {
            Ok(now) if now.ino() == lock.metadata()?.ino() => {
                lock.set_modified(SystemTime::now())?;
                Ok(Some(CacheDir {
                    dir: dir.to_path_buf(),
                    lock,
                }))
            }
            _ => Ok(None),
        }
    }

    /// What is mounted.
    pub fn fs(&self) -> PathBuf {
        self.dir.join("fs")
    }
}

/// What pruning did.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct PrunedMounts {
    /// Directories removed.
    pub removed: u64,
    /// Bytes given back.
    pub bytes: u64,
}

/// Removes cache mounts under a store's root: all, or those not used for some time. One in use stays.
///
/// # Errors
/// What cannot be read or removed.
pub fn prune_cache_mounts(root: &Path, unused_for: Option<Duration>, all: bool) -> io::Result<PrunedMounts> {
    let mut pruned = PrunedMounts::default();
    let entries = match std::fs::read_dir(root.join("cache-mounts")) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(pruned),
        Err(e) => return Err(e),
    };
    for entry in entries {
        let dir = entry?.path();
        let age = std::fs::metadata(dir.join("lock"))
            .and_then(|m| m.modified())
            .ok()
            .and_then(|used| SystemTime::now().duration_since(used).ok());
        let old = match (age, unused_for) {
            (Some(age), Some(limit)) => age >= limit,
            (None, _) => true,
            (_, None) => false,
        };
        if !all && !old {
            continue;
        }
        let Some(taken) = CacheDir::try_take(&dir, false)? else {
            continue;
        };
        pruned.bytes += usage(&taken.fs())?;
        // The lock goes last: until then nobody can use what is half gone.
        let gone = std::fs::remove_dir_all(taken.fs());
        if let Err(e) = gone
            && e.kind() != io::ErrorKind::NotFound
        {
            return Err(e);
        }
        std::fs::remove_dir_all(&dir)?;
        drop(taken.lock);
        pruned.removed += 1;
    }
    Ok(pruned)
}

fn usage(dir: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    let mut pending = vec![dir.to_path_buf()];
    while let Some(dir) = pending.pop() {
        let entries = match std::fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(e),
        };
        for entry in entries {
            let entry = entry?;
            let meta = entry.path().symlink_metadata()?;
            bytes += meta.blocks() * 512;
            if meta.is_dir() {
                pending.push(entry.path());
            }
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_in_use_is_not_pruned_and_a_free_one_is() {
        let root = tempfile::tempdir().unwrap();
        let (used, free) = (
            CacheDir::path(root.path(), "used"),
            CacheDir::path(root.path(), "free"),
        );
        let held = CacheDir::try_take(&used, true).unwrap().unwrap();
        let other = CacheDir::try_take(&free, true).unwrap().unwrap();
        std::fs::create_dir(other.fs()).unwrap();
        std::fs::write(other.fs().join("x"), vec![1; 10_000]).unwrap();
        drop(other);
        let pruned = prune_cache_mounts(root.path(), None, true).unwrap();
        assert_eq!(pruned.removed, 1);
        assert!(pruned.bytes >= 10_000);
        assert!(used.exists() && !free.exists());
        drop(held);
        assert_eq!(
            prune_cache_mounts(root.path(), Some(Duration::from_secs(3600)), false)
                .unwrap()
                .removed,
            0
        );
        assert_eq!(
            prune_cache_mounts(root.path(), Some(Duration::ZERO), false)
                .unwrap()
                .removed,
            1
        );
    }

    #[test]
    fn one_id_is_one_directory_and_a_locked_one_is_alone() {
        let root = tempfile::tempdir().unwrap();
        let dir = CacheDir::path(root.path(), "pip");
        assert_eq!(dir, CacheDir::path(root.path(), "pip"));
        let first = CacheDir::try_take(&dir, true).unwrap();
        assert!(CacheDir::try_take(&dir, true).unwrap().is_some());
        assert!(CacheDir::try_take(&dir, false).unwrap().is_none());
        drop(first);
        assert!(CacheDir::try_take(&dir, false).unwrap().is_some());
    }
}
