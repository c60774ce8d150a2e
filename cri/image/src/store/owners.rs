//! Owners: who has the store open, alive as long as a lock is held.
//!
//! ```text
//! owners/.gate         locked while owners are made, looked for and buried
//! owners/<id>          locked by the owner for as long as it lives
//! ```
//! Who can take an owner's lock knows that the owner is dead; pids mean nothing across containers and reboots. The
//! gate keeps a new owner's file from being found between its making and its locking.
//!
//! Lock order: the gate, then an owner's file, then the catalog.

use super::{OwnerKind, Store};
use crate::catalog::{Durability, owners};
use crate::error::{Result, StoreError, at, snap};
use slipway_snapshot::SnapshotId;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const GATE: &str = ".gate";
/// Scans take milliseconds.
const GATE_WAIT: Duration = Duration::from_secs(60);

/// This opening's lock.
#[derive(Debug)]
pub(crate) struct OwnerLock {
    pub(crate) id: String,
    pub(crate) path: PathBuf,
    /// Held open: closing it gives the lock up.
    _file: File,
}

/// An owner that died and left something outside the store (see [`Store::set_estate`]). While this value lives,
/// nobody else sees the same dead owner.
#[derive(Debug)]
pub struct DeadOwner {
    /// Its id.
    pub id: String,
    /// What it was.
    pub kind: OwnerKind,
    /// What it said it would leave outside the store.
    pub estate: String,
    store: Store,
    _lock: File,
}

impl DeadOwner {
    /// Undoes what it left in the store: leases, ingests, active snapshots. To be called when what it left
    /// outside (mounts, processes, cgroups) is gone.
    ///
    /// # Errors
    /// What the catalog answers, or a file that cannot be removed.
    pub fn bury(self) -> Result<()> {
        {
            let _gate = gate(&self.store.inner.root)?;
            bury(&self.store, &self.id)?;
        }
        // A large tree takes long, and nobody waits for it.
        self.store.remove_doomed_snapshots().map(drop)
    }
}

/// Takes a lock file, waiting for whoever has it.
pub(crate) fn lock_file(path: &Path, what: &str, wait: Duration) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(at("open", path))?;
    let start = Instant::now();
    let mut pause = Duration::from_millis(1);
    while !try_lock(&file, path)? {
        if start.elapsed() >= wait {
            return Err(StoreError::Timeout {
                what: what.to_owned(),
                seconds: wait.as_secs(),
            });
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
    Ok(file)
}

pub(crate) fn try_lock(file: &File, path: &Path) -> Result<bool> {
    match rustix::fs::flock(file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(e) => Err(at("lock", path)(e.into())),
    }
}

pub(crate) fn gate(root: &Path) -> Result<File> {
    lock_file(
        &root.join("owners").join(GATE),
        "the gate of the store's owners",
        GATE_WAIT,
    )
}

/// Becomes an owner. The gate is held.
pub(crate) fn become_owner(root: &Path, kind: OwnerKind) -> Result<OwnerLock> {
    let random = SnapshotId::new_random().map_err(snap("make an owner's name"))?;
    let id = format!("{}-{}", kind.as_str(), &random.as_str()[..12]);
    let path = root.join("owners").join(&id);
    let file = lock_file(&path, "a lock of our own", Duration::ZERO)?;
    Ok(OwnerLock {
        id,
        path,
        _file: file,
    })
}

impl Store {
    /// This owner's id: the name of its lock under `owners/`.
    pub fn owner_id(&self) -> &str {
        &self.inner.owner.id
    }

    /// Says what this owner has outside the store (shim directories, mounts, cgroups), in its own words, before it
    /// makes them. Should it die, its leases and snapshots stay until somebody who understands the words has
    /// cleaned that up and calls [`DeadOwner::bury`]. `None`: nothing any more.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn set_estate(&self, estate: Option<&str>) -> Result<()> {
        self.inner.catalog.write(Durability::Normal, |c| {
            owners::set_estate(c, self.owner_id(), estate)
        })
    }

    /// Dead owners with an estate; each is locked by the answer, so that two callers never get the same.
    ///
    /// # Errors
    /// What the catalog answers.
    pub fn dead_owners(&self) -> Result<Vec<DeadOwner>> {
        let _gate = gate(&self.inner.root)?;
        let mut dead = Vec::new();
        for (id, lock) in self.lockable()? {
            let row = self.inner.catalog.read(|c| owners::get(c, &id))?;
            let Some((kind, Some(estate))) = row.map(|row| (row.kind, row.estate)) else {
                continue;
            };
            dead.push(DeadOwner {
                id,
                kind,
                estate,
                store: self.clone(),
                _lock: lock,
            });
        }
        Ok(dead)
    }

    /// Whether an owner is alive.
    ///
    /// # Errors
    /// When its lock cannot be asked.
    #[cfg(test)]
    pub(crate) fn owner_alive(&self, id: &str) -> Result<bool> {
        if id == self.owner_id() {
            return Ok(true);
        }
        if id.contains('/') || id.starts_with('.') {
            return Ok(false);
        }
        let _gate = gate(&self.inner.root)?;
        let path = self.inner.root.join("owners").join(id);
        match File::open(&path) {
            Ok(file) => Ok(!try_lock(&file, &path)?),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(at("open", &path)(e)),
        }
    }

    /// Undoes what dead owners without an estate left.
    pub(crate) fn undo_dead_owners(&self) -> Result<()> {
        {
            let _gate = gate(&self.inner.root)?;
            let mut present = Vec::new();
            for (id, _lock) in self.lockable()? {
                let row = self.inner.catalog.read(|c| owners::get(c, &id))?;
                present.push(id.clone());
                if row.is_some_and(|row| row.estate.is_some()) {
                    continue;
                }
                tracing::info!(owner = %id, "undoing what a dead owner left in the store");
                bury(self, &id)?;
            }
            self.forget_owners_without_lock(&present)?;
        }
        self.remove_doomed_snapshots().map(drop)
    }

    /// Rows whose lock file somebody removed by hand: nobody can be alive under them.
    fn forget_owners_without_lock(&self, present: &[String]) -> Result<()> {
        for id in self.inner.catalog.read(owners::ids)? {
            let path = self.inner.root.join("owners").join(&id);
            if id != self.owner_id() && !present.contains(&id) && !path.exists() {
                bury(self, &id)?;
            }
        }
        Ok(())
    }

    /// Owners whose lock we could take, with the lock. The gate is held.
    fn lockable(&self) -> Result<Vec<(String, File)>> {
        let dir = self.inner.root.join("owners");
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&dir).map_err(at("list", &dir))? {
            let name = entry.map_err(at("list", &dir))?.file_name();
            let Ok(id) = name.into_string() else { continue };
            if id.starts_with('.') || id == self.owner_id() {
                continue;
            }
            let path = dir.join(&id);
            let file = match File::open(&path) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                other => other.map_err(at("open", &path))?,
            };
            if try_lock(&file, &path)? {
                found.push((id, file));
            }
        }
        found.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(found)
    }
}

/// Removes an owner's rows, ingests and lock. The gate is held, and so is the owner's lock.
pub(crate) fn bury(store: &Store, id: &str) -> Result<()> {
    let inner = &store.inner;
    inner.with_reserve(|| inner.catalog.write(Durability::Normal, |c| owners::bury(c, id)))?;
    remove_ingests(inner.content.ingest_dir(), id)?;
    let path = inner.root.join("owners").join(id);
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(at("remove", &path)(e)),
        _ => Ok(()),
    }
}

/// Removes `<owner>-<n>` files.
fn remove_ingests(dir: &Path, owner: &str) -> Result<()> {
    for entry in std::fs::read_dir(dir).map_err(at("list", dir))? {
        let name = entry.map_err(at("list", dir))?.file_name();
        if name
            .to_str()
            .and_then(|name| name.rsplit_once('-'))
            .is_some_and(|(of, _)| of == owner)
        {
            let path = dir.join(&name);
            match std::fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(at("remove", &path)(e)),
                _ => {}
            }
        }
    }
    Ok(())
}
