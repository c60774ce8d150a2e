//! Directories that RUN --mount=type=cache keeps between builds: their place, their locks, their end.
//!
//! ```text
//! <root>/cache-mounts/<hash of its identity>[-<n>]/   0700
//!   lock                                        flock: shared by `sharing=shared`, alone by the others;
//!                                               its mtime is the last use
//!   fs                                          what is mounted; appears whole
//!   new                                         what a new one is filled in, by whoever has the directory alone
//! ```

use std::fs::File;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::FlockOperation;
use slipway_image::Digest;

/// The mode of a cache that does not say.
pub(crate) const MODE: u32 = 0o755;

/// Somebody who removes a directory each time that it is made again does not go on for so long.
const MOST_TRIES: u32 = 16;

/// What tells one cache from another. As in BuildKit, not the id alone: who asks for other owners, another mode or
/// other first contents does not get what somebody else has made under the same id.
#[derive(Debug, Clone)]
pub(crate) struct Identity<'a> {
    pub id: &'a str,
    /// The key of the root file system it starts as a copy of, and the path there.
    pub start: Option<(Digest, &'a str)>,
    pub mode: u32,
    pub owner: (u32, u32),
}

/// A cache directory with its lock; unused again when dropped.
#[derive(Debug)]
pub(crate) struct CacheDir {
    /// The directory that holds `fs`.
    pub dir: PathBuf,
    lock: File,
}

impl CacheDir {
    /// The directory of a cache.
    pub fn path(root: &Path, cache: &Identity<'_>) -> PathBuf {
        let mut words = cache.id.as_bytes().to_vec();
        if cache.start.is_some() || cache.mode != MODE || cache.owner != (0, 0) {
            let start = cache.start.map(|(key, path)| format!("{key} {path}"));
            // No id has a NUL: it is a word of a Dockerfile.
            let (mode, owner, start) = (cache.mode, cache.owner, start.unwrap_or_default());
            words.extend(format!("\0{mode:o} {}:{} {start}", owner.0, owner.1).bytes());
        }
        root.join("cache-mounts").join(&Digest::of(&words).hex()[..32])
    }

    /// Takes a directory; `None`: somebody else has it.
    pub fn try_take(dir: &Path, shared: bool) -> io::Result<Option<CacheDir>> {
        let operation = if shared {
            FlockOperation::NonBlockingLockShared
        } else {
            FlockOperation::NonBlockingLockExclusive
        };
        let path = dir.join("lock");
        for _ in 0..MOST_TRIES {
            let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
            match made {
                // It was there, and is not any more.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists && !dir.exists() => continue,
                made => made?,
            }
            let opened = File::options()
                .create(true)
                .truncate(false)
                .write(true)
                .open(&path);
            let lock = match opened {
                Ok(lock) => lock,
                // It was pruned between our making and opening it.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(e),
            };
            if rustix::fs::flock(&lock, operation).is_err() {
                return Ok(None);
            }
            // Or between our opening and locking it.
            match std::fs::metadata(&path) {
                Ok(now) if now.ino() == lock.metadata()?.ino() => {
                    lock.set_modified(SystemTime::now())?;
                    let dir = dir.to_path_buf();
                    return Ok(Some(CacheDir { dir, lock }));
                }
                _ => {}
            }
        }
        Ok(None)
    }

    /// Gives others their part of a directory that was taken alone. `None`: somebody else has it now.
    pub fn share(self) -> io::Result<Option<CacheDir>> {
        // A lock is not turned into another one at once: in between it belongs to nobody.
        if rustix::fs::flock(&self.lock, FlockOperation::NonBlockingLockShared).is_err() {
            return Ok(None);
        }
        let same = match std::fs::metadata(self.dir.join("lock")) {
            Ok(now) => now.ino() == self.lock.metadata()?.ino(),
            Err(_) => false,
        };
        Ok(Some(self).filter(|cache| same && cache.fs().exists()))
    }

    /// Where a new cache is filled before it is what is mounted. Whoever calls this has the directory alone: what others
    /// began to fill and gave up is removed.
    pub fn fresh(&self) -> io::Result<PathBuf> {
        for entry in std::fs::read_dir(&self.dir)? {
            let entry = entry?;
            if entry.file_name().as_encoded_bytes().starts_with(b"new") {
                std::fs::remove_dir_all(entry.path())?;
            }
        }
        let fresh = self.dir.join("new");
        std::fs::create_dir(&fresh)?;
        Ok(fresh)
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

/// Removes cache mounts under a store's root: all, or those not used for some time. One in use stays, and one that cannot
/// be removed keeps no other.
///
/// # Errors
/// The first that cannot be read or removed, beside what was done.
pub fn prune_cache_mounts(
    root: &Path,
    unused_for: Option<Duration>,
    all: bool,
) -> (PrunedMounts, io::Result<()>) {
    let mut pruned = PrunedMounts::default();
    let entries = match std::fs::read_dir(root.join("cache-mounts")) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return (pruned, Ok(())),
        Err(e) => return (pruned, Err(e)),
    };
    let mut first = Ok(());
    for entry in entries {
        let done = entry.and_then(|entry| prune_one(&entry.path(), unused_for, all));
        match done {
            Ok(Some(bytes)) => {
                pruned.removed += 1;
                pruned.bytes += bytes;
            }
            Ok(None) => {}
            Err(error) => first = first.and(Err(error)),
        }
    }
    (pruned, first)
}

/// Removes one; the bytes it had, or `None` where it stays.
fn prune_one(dir: &Path, unused_for: Option<Duration>, all: bool) -> io::Result<Option<u64>> {
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
        return Ok(None);
    }
    let Some(taken) = CacheDir::try_take(dir, false)? else {
        return Ok(None);
    };
    let bytes = usage(&taken.fs())?;
    // Under another name first: what is half gone must not be taken for a whole one. The lock goes last.
    let gone = dir.join("new-gone");
    found(std::fs::remove_dir_all(&gone))?;
    found(std::fs::rename(taken.fs(), &gone))?;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found(std::fs::remove_dir_all(entry.path()))?;
        } else if entry.file_name() != "lock" {
            found(std::fs::remove_file(entry.path()))?;
        }
    }
    found(std::fs::remove_file(dir.join("lock")))?;
    drop(taken);
    match std::fs::remove_dir(dir) {
        // Somebody has made a cache of it again.
        Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(Some(bytes)),
        removed => found(removed).map(|()| Some(bytes)),
    }
}

/// That something is not there any more is what was wanted.
fn found(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
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

    fn identity(id: &str) -> Identity<'_> {
        Identity {
            id,
            start: None,
            mode: MODE,
            owner: (0, 0),
        }
    }

    #[test]
    fn first_contents_owner_and_mode_are_part_of_what_a_cache_is() {
        let plain = identity("pip");
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let all = [
            plain.clone(),
            identity("npm"),
            Identity {
                mode: 0o777,
                ..plain.clone()
            },
            Identity {
                owner: (1, 0),
                ..plain.clone()
            },
            Identity {
                owner: (0, 1),
                ..plain.clone()
            },
            Identity {
                start: Some((a, "/x")),
                ..plain.clone()
            },
            Identity {
                start: Some((b, "/x")),
                ..plain.clone()
            },
            Identity {
                start: Some((a, "/y")),
                ..plain
            },
        ];
        let paths: std::collections::BTreeSet<_> = all
            .iter()
            .map(|cache| CacheDir::path(Path::new("/r"), cache))
            .collect();
        assert_eq!(paths.len(), all.len());
    }

    #[test]
    fn a_cache_in_use_is_not_pruned_and_a_free_one_is() {
        let root = tempfile::tempdir().unwrap();
        let (used, free) = (
            CacheDir::path(root.path(), &identity("used")),
            CacheDir::path(root.path(), &identity("free")),
        );
        let held = CacheDir::try_take(&used, true).unwrap().unwrap();
        let other = CacheDir::try_take(&free, true).unwrap().unwrap();
        std::fs::create_dir(other.fs()).unwrap();
        std::fs::write(other.fs().join("x"), vec![1; 10_000]).unwrap();
        drop(other);
        let pruned = prune_cache_mounts(root.path(), None, true).0;
        assert_eq!(pruned.removed, 1);
        assert!(pruned.bytes >= 10_000);
        assert!(used.exists() && !free.exists());
        drop(held);
        assert_eq!(
            prune_cache_mounts(root.path(), Some(Duration::from_secs(3600)), false)
                .0
                .removed,
            0
        );
        assert_eq!(
            prune_cache_mounts(root.path(), Some(Duration::ZERO), false)
                .0
                .removed,
            1
        );
    }

    #[test]
    fn builds_take_caches_while_they_are_pruned() {
        let root = tempfile::tempdir().unwrap();
        let dir = CacheDir::path(root.path(), &identity("pip"));
        let pruning = std::sync::atomic::AtomicBool::new(true);
        let use_it = || {
            let Some(taken) = CacheDir::try_take(&dir, false)? else {
                return Ok(());
            };
            if !taken.fs().exists() {
                std::fs::create_dir(taken.fs())?;
                std::fs::write(taken.fs().join("x"), "x")?;
            }
            Ok::<_, io::Error>(())
        };
        let (used, pruned) = std::thread::scope(|scope| {
            let pruned = scope.spawn(|| {
                while pruning.load(std::sync::atomic::Ordering::Relaxed) {
                    prune_cache_mounts(root.path(), None, true).1?;
                }
                Ok::<_, io::Error>(())
            });
            let used = (0..2000).try_for_each(|_| use_it());
            pruning.store(false, std::sync::atomic::Ordering::Relaxed);
            (used, pruned.join().unwrap())
        });
        used.unwrap();
        pruned.unwrap();
    }

    #[test]
    fn a_cache_mount_that_cannot_be_removed_keeps_no_other() {
        let root = tempfile::tempdir().unwrap();
        for n in 0..8 {
            let dir = root.path().join("cache-mounts").join(n.to_string());
            match n % 2 {
                0 => drop(CacheDir::try_take(&dir, false).unwrap()),
                // No directory at all.
                _ => std::fs::write(&dir, "x").unwrap(),
            }
        }
        let (pruned, first) = prune_cache_mounts(root.path(), None, true);
        assert_eq!(pruned.removed, 4);
        assert!(first.is_err());
    }

    #[test]
    fn one_id_is_one_directory_and_a_locked_one_is_alone() {
        let root = tempfile::tempdir().unwrap();
        let dir = CacheDir::path(root.path(), &identity("pip"));
        assert_eq!(dir, CacheDir::path(root.path(), &identity("pip")));
        let first = CacheDir::try_take(&dir, true).unwrap();
        assert!(CacheDir::try_take(&dir, true).unwrap().is_some());
        assert!(CacheDir::try_take(&dir, false).unwrap().is_none());
        drop(first);
        assert!(CacheDir::try_take(&dir, false).unwrap().is_some());
    }

    #[test]
    fn what_was_taken_alone_can_be_shared_once_it_is_filled_and_leftovers_go() {
        let root = tempfile::tempdir().unwrap();
        let dir = CacheDir::path(root.path(), &identity("pip"));
        let alone = CacheDir::try_take(&dir, false).unwrap().unwrap();
        std::fs::create_dir_all(dir.join("new-old/left")).unwrap();
        let fresh = alone.fresh().unwrap();
        std::fs::write(fresh.join("half"), "x").unwrap();
        assert_eq!(alone.fresh().unwrap(), fresh);
        assert_eq!(
            std::fs::read_dir(&dir).unwrap().count(),
            2,
            "the lock and an empty one"
        );
        std::fs::rename(&fresh, alone.fs()).unwrap();
        assert!(CacheDir::try_take(&dir, true).unwrap().is_none());
        let shared = alone.share().unwrap().unwrap();
        assert!(CacheDir::try_take(&dir, true).unwrap().is_some());
        assert!(CacheDir::try_take(&dir, false).unwrap().is_none());
        drop(shared);
        // One that was taken away before it could be shared is not there.
        let alone = CacheDir::try_take(&dir, false).unwrap().unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
        assert!(alone.share().unwrap().is_none());
    }
}
