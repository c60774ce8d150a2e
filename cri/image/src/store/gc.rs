//! Garbage collection: mark in a transaction, take the files away, forget the rows.
//!
//! What was marked is found by nobody any more. A blob that comes again between the mark and the removal is simply
//! there again: its row says so, and the removal looks at the row under the write lock before it touches the file.
//! Files are renamed under that lock and unlinked after it, so that nobody waits for a big one.
//!
//! Works on a full disk, and after a collection that died at any point.

use super::Store;
use super::owners::lock_file;
use crate::catalog::sweep::Variants;
use crate::catalog::{Durability, layers, snapshots, sweep};
use crate::codec::encoder_names;
use crate::error::{Result, at, snap};
use crate::failpoint;
use slipway_snapshot::{FsInfo, Snapshotter, Usage};
use std::cell::RefCell;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Another process's collection is over after this, or hangs on a broken disk.
const WAIT: Duration = Duration::from_secs(600);

/// What garbage collection did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GcReport {
    /// Blobs removed.
    pub blobs: u64,
    /// Snapshots removed (layers and those that no row knew).
    pub snapshots: u64,
    /// Bytes given back.
    pub bytes: u64,
}

impl Store {
    /// Removes what no image, lease, active snapshot or cache entry needs. Works on a full disk.
    ///
    /// # Errors
    /// What the catalog answers, or a file that cannot be removed.
    pub fn gc(&self) -> Result<GcReport> {
        self.collect(&Variants::Keep)
    }

    /// As [`Store::gc`], and removes the blobs that can be made again from their layers, too.
    ///
    /// # Errors
    /// As [`Store::gc`].
    pub fn prune_blobs(&self) -> Result<GcReport> {
        self.collect(&Variants::MadeAgainBy(encoder_names()))
    }

    fn collect(&self, variants: &Variants) -> Result<GcReport> {
        let inner = &self.inner;
        let _one_at_a_time = lock_file(&inner.root.join("owners/.gc"), "another garbage collection", WAIT)?;
        let doomed = inner.with_reserve(|| {
            inner
                .catalog
                .write(Durability::Full, |c| sweep::mark(c, variants))
        })?;
        failpoint::reach("gc.after_mark");
        let mut report = GcReport {
            bytes: doomed.layer_bytes,
            ..GcReport::default()
        };
        // What cannot be removed keeps nothing else.
        let blobs = self.remove_blobs(&doomed, &mut report);
        let removed = self.remove_doomed_snapshots();
        let swept = self.sweep_files(&mut report);
        inner.refill_reserve();
        blobs?;
        report.snapshots += removed?;
        swept?;
        Ok(report)
    }

    /// Takes doomed blobs out of the way and forgets them, and the layers; then unlinks what was taken away. When the
    /// catalog cannot say so, too: what was renamed is found under no name, and a second try would not find it either.
    fn remove_blobs(&self, doomed: &sweep::Doomed, report: &mut GcReport) -> Result<()> {
        let inner = &self.inner;
        let trash = RefCell::new(Vec::new());
        let forgotten = inner.with_reserve(|| {
            inner.catalog.write(Durability::Normal, |c| {
                for (blob, size) in &doomed.blobs {
                    if !sweep::is_doomed(c, blob)? {
                        continue;
                    }
                    let (from, to) = (inner.content.path(blob), inner.content.fresh(self.owner_id()));
                    match std::fs::rename(&from, &to) {
                        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                        other => {
                            other.map_err(at("rename", &from))?;
                            trash.borrow_mut().push((to, *size));
                        }
                    }
                    sweep::delete_blob(c, blob)?;
                }
                sweep::delete_layers(c)
            })
        });
        failpoint::reach("gc.after_rename");
        unlink(trash.into_inner(), report).and(forgotten)
    }

    /// Removes files and directories that no row knows: what a dead process left between two steps.
    fn sweep_files(&self, report: &mut GcReport) -> Result<()> {
        let inner = &self.inner;
        // A directory is made after its row, so one listed before the rows are read and without a row is nobody's.
        let listed = inner.overlay.ids().map_err(snap("list the snapshots"))?;
        let known = inner.catalog.read(snapshots::all_ids)?;
        let mut failed = None;
        for id in listed.into_iter().filter(|id| !known.contains(id.as_str())) {
            let usage = inner.overlay.usage(&id).unwrap_or_default();
            match inner.overlay.remove(&id) {
                Ok(()) => {
                    report.snapshots += 1;
                    report.bytes += usage.bytes;
                }
                Err(error) => {
                    failed.get_or_insert(snap(format!("remove the stray snapshot {id}"))(error));
                }
            }
        }
        if let Err(error) = inner.overlay.sweep() {
            failed.get_or_insert(snap("finish the removal of snapshots")(error));
        }
        // A blob's file gets its name before its row is committed, both under the write lock: with the lock in
        // our hands, a file without a row is nobody's.
        let dir = inner.content.blobs_dir();
        let mut strays = Vec::new();
        let listed = inner.catalog.write(Durability::Normal, |c| {
            let known = sweep::all_blobs(c)?;
            for (path, name) in files(dir)? {
                if known.contains(&format!("sha256:{name}")) {
                    continue;
                }
                let to = inner.content.fresh(self.owner_id());
                std::fs::rename(&path, &to).map_err(at("rename", &path))?;
                let size = std::fs::metadata(&to).map(|meta| meta.len()).unwrap_or(0);
                strays.push((to, size));
            }
            Ok(())
        });
        let unlinked = unlink(strays, report);
        let ingests = self.sweep_ingests();
        failed.map_or(Ok(()), Err).and(listed).and(unlinked).and(ingests)
    }

    /// Files of owners that are not there any more.
    fn sweep_ingests(&self) -> Result<()> {
        for (path, name) in files(self.inner.content.ingest_dir())? {
            let owner = name.rsplit_once('-').map_or("", |(owner, _)| owner);
            // With its lock file an owner's ingests go, or stay for its estate.
            if !owner.is_empty() && self.inner.root.join("owners").join(owner).exists() {
                continue;
            }
            remove_file(&path)?;
        }
        Ok(())
    }

    /// The filesystem under the store, with what images take of it: layers and blobs. What containers write is
    /// theirs: [`Store::usage`].
    ///
    /// # Errors
    /// When it cannot be asked.
    pub fn fs_info(&self) -> Result<FsInfo> {
        let (layers, (bytes, inodes)) = self
            .inner
            .catalog
            .read(|c| Ok((layers::usage(c)?, sweep::blob_bytes(c)?)))?;
        let used = layers + Usage { bytes, inodes };
        slipway_snapshot::fs_info(&self.inner.root, used).map_err(snap("ask the filesystem of the store"))
    }
}

fn files(dir: &Path) -> Result<Vec<(PathBuf, String)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(at("list", dir))? {
        let entry = entry.map_err(at("list", dir))?;
        found.push((entry.path(), entry.file_name().to_string_lossy().into_owned()));
    }
    Ok(found)
}

/// Unlinks what was renamed away, as much of it as will go; the first that would not is the answer.
fn unlink(trash: Vec<(PathBuf, u64)>, report: &mut GcReport) -> Result<()> {
    let mut failed = Ok(());
    for (path, size) in trash {
        match remove_file(&path) {
            Ok(()) => {
                report.blobs += 1;
                report.bytes += size;
            }
            Err(error) => failed = failed.and(Err(error)),
        }
    }
    failed
}

fn remove_file(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(at("remove", path)(e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::OwnerKind;
    use crate::store::tests::full::Small;
    use crate::testing::{Bed, is_root, list};
    use std::io::Write;

    #[test]
    fn root_blobs_renamed_away_are_unlinked_though_the_first_try_to_forget_them_fails() {
        if !is_root("blobs_renamed_away_are_unlinked") {
            return;
        }
        let small = Small::new(40);
        let store = Store::open(&small.root(), OwnerKind::Daemon).unwrap();
        let lease = store.lease("t").unwrap();
        for n in 0..4u8 {
            let mut ingest = store.ingest(&lease).unwrap();
            ingest.write_all(&vec![n; 1 << 20]).unwrap();
            ingest.finish(None, None).unwrap();
        }
        drop(lease);
        let doomed = store
            .inner
            .catalog
            .write(Durability::Full, |c| sweep::mark(c, &Variants::Keep))
            .unwrap();
        small.fill_with_an_empty_log();
        let mut report = GcReport::default();
        store.remove_blobs(&doomed, &mut report).unwrap();
        assert_eq!((report.blobs, report.bytes), (4, 4 << 20));
        assert_eq!(list(&small.root().join("content/ingest")), [""; 0]);
        assert_eq!(list(&small.root().join("content/sha256")), [""; 0]);
        assert!(small.free() >= 4 << 20);
    }

    #[test]
    fn a_stray_that_cannot_be_removed_keeps_no_other() {
        let bed = Bed::new();
        let blobs = bed.root().join("content/sha256");
        for n in 0..20 {
            std::fs::write(blobs.join(format!("stray{n}")), "x").unwrap();
            std::fs::create_dir(blobs.join(format!("dir{n}"))).unwrap();
        }
        bed.store.gc().unwrap_err();
        let left = bed.root().join("content/ingest");
        let files = list(&left).into_iter().filter(|name| left.join(name).is_file());
        assert_eq!(files.count(), 0);
        assert_eq!(list(&blobs), [""; 0]);
    }
}
