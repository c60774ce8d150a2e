//! Garbage collection: mark in a transaction, take the files away, forget the rows.
//!
//! What was marked is found by nobody any more. A blob that comes again between the mark and the removal is simply
//! there again: its row says so, and the removal looks at the row under the write lock before it touches the file.
//! Files are renamed under that lock and unlinked after it, so that nobody waits for a big one.
//!
//! Works on a full disk, and after a collection that died at any point.

use super::Store;
use super::owners::lock_file;
use crate::catalog::{Durability, layers, snapshots, sweep};
use crate::error::{Result, at, snap};
use crate::failpoint;
use slipway_snapshot::{FsInfo, Snapshotter, Usage};
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
        self.collect(false)
    }

    /// As [`Store::gc`], and removes the blobs that can be made again from their layers, too.
    ///
    /// # Errors
    /// As [`Store::gc`].
    pub fn prune_blobs(&self) -> Result<GcReport> {
        self.collect(true)
    }

    fn collect(&self, variants: bool) -> Result<GcReport> {
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
        let trash = self.rename_blobs(&doomed, &mut report)?;
        failpoint::reach("gc.after_rename");
        for path in trash {
            remove_file(&path)?;
        }
        // What cannot be removed keeps nothing else.
        let removed = self.remove_doomed_snapshots();
        let swept = self.sweep_files(&mut report);
        inner.refill_reserve();
        report.snapshots += removed?;
        swept?;
        Ok(report)
    }

    /// Takes doomed blobs out of the way and forgets them, and the layers.
    fn rename_blobs(&self, doomed: &sweep::Doomed, report: &mut GcReport) -> Result<Vec<PathBuf>> {
        let inner = &self.inner;
        let renamed = inner.with_reserve(|| {
            inner.catalog.write(Durability::Normal, |c| {
                let mut trash = Vec::new();
                for (blob, size) in &doomed.blobs {
                    if !sweep::is_doomed(c, blob)? {
                        continue;
                    }
                    let (from, to) = (inner.content.path(blob), inner.content.fresh(self.owner_id()));
                    match std::fs::rename(&from, &to) {
                        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                        other => {
                            other.map_err(at("rename", &from))?;
                            trash.push((to, *size));
                        }
                    }
                    sweep::delete_blob(c, blob)?;
                }
                sweep::delete_layers(c)?;
                Ok(trash)
            })
        })?;
        report.blobs += renamed.len() as u64;
        report.bytes += renamed.iter().map(|(_, size)| size).sum::<u64>();
        Ok(renamed.into_iter().map(|(path, _)| path).collect())
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
        let strays = inner.catalog.write(Durability::Normal, |c| {
            let known = sweep::all_blobs(c)?;
            let mut strays = Vec::new();
            for (path, name) in files(dir)? {
                if known.contains(&format!("sha256:{name}")) {
                    continue;
                }
                let to = inner.content.fresh(self.owner_id());
                std::fs::rename(&path, &to).map_err(at("rename", &path))?;
                strays.push(to);
            }
            Ok(strays)
        })?;
        for path in strays {
            report.bytes += std::fs::metadata(&path).map(|meta| meta.len()).unwrap_or(0);
            remove_file(&path)?;
            report.blobs += 1;
        }
        self.sweep_ingests()?;
        failed.map_or(Ok(()), Err)
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

fn remove_file(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(at("remove", path)(e)),
        _ => Ok(()),
    }
}
