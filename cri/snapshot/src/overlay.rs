//! The overlay snapshotter: one directory a snapshot, mounted with overlayfs.
//!
//! ```text
//! <dir>/                        0700
//!   .empty/                     the lower directory of a snapshot on nothing
//!   .gone-<id>                  being removed; swept by whoever collects garbage
//!   <id>/fs                     the layer's own tree, or overlay's upper directory
//!   <id>/work                   overlay's work directory; gone once committed
//!   <id>/committed              the marker: written after everything under fs had reached the disk
//! ```
//! The marker is one line, `slipway layer 1 <bytes> <inodes>.`: a half-written one is no marker.
//!
//! Refuses to know the graph of snapshots and the catalog.

use crate::SnapshotId;
use crate::error::{Result, SnapshotError, at};
use crate::rootfs::RootfsMount;
use crate::snapshotter::{Access, Commit, FsInfo, Snapshotter, Usage};
use crate::usage;
use slipway_sys::root::Root;
use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

const EMPTY: &str = ".empty";
const GONE: &str = ".gone-";
const MARKER: &str = "committed";

/// Snapshots as directories under one folder, mounted with overlayfs (redirect_dir, metacopy and index off).
#[derive(Debug)]
pub struct Overlay {
    dir: PathBuf,
}

impl Overlay {
    /// Opens the folder, making it (0700) when it is not there.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(dir: &Path) -> Result<Overlay> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(at("create", dir))?;
        fs::set_permissions(dir, Permissions::from_mode(0o700)).map_err(at("protect", dir))?;
        let empty = dir.join(EMPTY);
        match DirBuilder::new().mode(0o755).create(&empty) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(at("create", &empty)(e)),
            _ => {}
        }
        Ok(Overlay {
            dir: dir.to_path_buf(),
        })
    }

    /// Finishes removals that somebody's death interrupted; how many. Somebody else may be at the same one.
    ///
    /// # Errors
    /// When the folder cannot be read, or something in it cannot be removed.
    pub fn sweep(&self) -> Result<u64> {
        let (mut swept, mut failed) = (0, None);
        for name in self.names()? {
            if name.starts_with(GONE) {
                match self.delete(&name) {
                    Ok(()) => swept += 1,
                    Err(error) => failed = failed.or(Some(error)),
                }
            }
        }
        failed.map_or(Ok(swept), Err)
    }

    /// As [`Snapshotter::commit_all`], with other ways to make everything in the trees durable, and then everything
    /// written so far.
    ///
    /// # Errors
    /// As [`Snapshotter::commit_all`].
    pub fn commit_with(
        &self,
        commits: &[Commit],
        sync_trees: &dyn Fn() -> Result<()>,
        sync: &dyn Fn() -> Result<()>,
    ) -> Result<Vec<Usage>> {
        if commits.is_empty() {
            return Ok(Vec::new());
        }
        let usages = commits
            .iter()
            .map(|commit| self.close(commit))
            .collect::<Result<Vec<_>>>()?;
        // One sync for the trees of all, one for all their markers: an fsync a marker would wait for the journal
        // each time. Only what was synced gets a marker.
        sync_trees()?;
        for (commit, usage) in commits.iter().zip(&usages) {
            let marker = self.home(&commit.id).join(MARKER);
            fs::write(&marker, marker_text(*usage)).map_err(at("write", &marker))?;
        }
        match commits {
            // Where it is alone, the other things on the filesystem need not be written for it.
            [one] => {
                let home = self.home(&one.id);
                let marker = home.join(MARKER);
                let file = fs::File::open(&marker).map_err(at("open", &marker))?;
                file.sync_all().map_err(at("sync", &marker))?;
                sync_dir(&home)?;
            }
            _ => sync()?,
        }
        Ok(usages)
    }

    fn home(&self, id: &SnapshotId) -> PathBuf {
        self.dir.join(id.as_str())
    }

    fn names(&self) -> Result<Vec<String>> {
        let entries = fs::read_dir(&self.dir).map_err(at("list", &self.dir))?;
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(at("list", &self.dir))?;
            names.extend(entry.file_name().into_string().ok());
        }
        Ok(names)
    }

    fn delete(&self, name: &str) -> Result<()> {
        let root = Root::open(&self.dir).map_err(at("open", &self.dir))?;
        root.remove_all(Path::new(name))
            .map_err(at("remove", &self.dir.join(name)))
    }

    /// What a commit does before the disk has everything.
    fn close(&self, commit: &Commit) -> Result<Usage> {
        let home = self.home(&commit.id);
        let fs_dir = home.join("fs");
        if !fs_dir.is_dir() {
            return Err(SnapshotError::NotFound {
                id: commit.id.to_string(),
            });
        }
        let root = Root::open(&home).map_err(at("open", &home))?;
        root.remove_all(Path::new("work"))
            .map_err(at("remove", &home.join("work")))?;
        match commit.usage {
            Some(usage) => Ok(usage),
            None => usage::of_tree(&fs_dir).map_err(at("count", &fs_dir)),
        }
    }
}

impl Snapshotter for Overlay {
    fn prepare(&self, id: &SnapshotId) -> Result<()> {
        let home = self.home(id);
        let made = DirBuilder::new().mode(0o700).create(&home);
        if matches!(&made, Err(e) if e.kind() == io::ErrorKind::AlreadyExists) {
            return Err(SnapshotError::Exists { id: id.to_string() });
        }
        made.map_err(at("create", &home))?;
        let fill = || {
            let (fs_dir, work) = (home.join("fs"), home.join("work"));
            fs::create_dir(&fs_dir).map_err(at("create", &fs_dir))?;
            // Whatever the umask: this is the root directory of a container.
            fs::set_permissions(&fs_dir, Permissions::from_mode(0o755)).map_err(at("create", &fs_dir))?;
            fs::create_dir(&work).map_err(at("create", &work))
        };
        fill().inspect_err(|_| {
            if let Err(error) = self.remove(id) {
                tracing::warn!(%id, %error, "a snapshot that could not be made could not be removed either");
            }
        })
    }

    fn fs_dir(&self, id: &SnapshotId) -> PathBuf {
        self.home(id).join("fs")
    }

    fn mounts(&self, id: &SnapshotId, parents: &[SnapshotId], access: Access) -> RootfsMount {
        let mut lower: Vec<PathBuf> = parents.iter().map(|parent| self.fs_dir(parent)).collect();
        let upper_work = match access {
            Access::ReadWrite => Some((self.fs_dir(id), self.home(id).join("work"))),
            Access::ReadOnly => {
                lower.insert(0, self.fs_dir(id));
                None
            }
        };
        // overlayfs wants one directory below an upper one, and two without.
        let wanted = if upper_work.is_some() { 1 } else { 2 };
        if lower.len() < wanted {
            lower.push(self.dir.join(EMPTY));
        }
        RootfsMount { lower, upper_work }
    }

    fn commit_all(&self, commits: &[Commit]) -> Result<Vec<Usage>> {
        let sync = || sync_filesystem(&self.dir);
        self.commit_with(commits, &sync, &sync)
    }

    fn committed(&self, id: &SnapshotId) -> Result<Option<Usage>> {
        let marker = self.home(id).join(MARKER);
        let text = match fs::read(&marker) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(at("read", &marker)(e)),
        };
        match parse_marker(&text) {
            Some(usage) if self.fs_dir(id).is_dir() => Ok(Some(usage)),
            _ => Ok(None),
        }
    }

    fn usage(&self, id: &SnapshotId) -> Result<Usage> {
        if let Some(usage) = self.committed(id)? {
            return Ok(usage);
        }
        let dir = self.fs_dir(id);
        match usage::of_tree(&dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                Err(SnapshotError::NotFound { id: id.to_string() })
            }
            other => other.map_err(at("count", &dir)),
        }
    }

    fn remove(&self, id: &SnapshotId) -> Result<()> {
        let gone = format!("{GONE}{id}");
        match fs::rename(self.home(id), self.dir.join(&gone)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            // A full disk may refuse even a rename, and an earlier removal may have been interrupted.
            Err(_) => self.delete(id.as_str())?,
            Ok(()) => {}
        }
        self.delete(&gone)
    }

    fn ids(&self) -> Result<Vec<SnapshotId>> {
        Ok(self
            .names()?
            .into_iter()
            .filter_map(|name| SnapshotId::new(name).ok())
            .collect())
    }

    fn filesystem(&self) -> Result<FsInfo> {
        let mut used = Usage::default();
        for id in self.ids()? {
            match self.usage(&id) {
                Ok(usage) => used = used + usage,
                Err(SnapshotError::NotFound { .. }) => {}
                Err(e) => return Err(e),
            }
        }
        fs_info(&self.dir, used)
    }
}

/// The filesystem a directory lies on, with what we know to use of it.
///
/// # Errors
/// When it cannot be asked.
pub fn fs_info(dir: &Path, used: Usage) -> Result<FsInfo> {
    let fs = slipway_sys::fs::statfs(dir).map_err(at("ask the filesystem of", dir))?;
    Ok(FsInfo {
        mountpoint: dir.to_path_buf(),
        used_bytes: used.bytes,
        used_inodes: used.inodes,
        capacity_bytes: fs.capacity_bytes,
        available_bytes: fs.available_bytes,
        capacity_inodes: fs.capacity_inodes,
        available_inodes: fs.capacity_inodes.saturating_sub(fs.used_inodes),
    })
}

/// Makes the names in a directory durable.
///
/// # Errors
/// What the system calls say.
pub fn sync_dir(dir: &Path) -> Result<()> {
    slipway_sys::fs::fsync_dir(dir).map_err(at("sync", dir))
}

/// Writes everything of the filesystem that holds a path to disk.
///
/// # Errors
/// What the system calls say.
pub fn sync_filesystem(path: &Path) -> Result<()> {
    slipway_sys::fs::syncfs(path).map_err(at("sync", path))
}

fn marker_text(usage: Usage) -> String {
    format!("slipway layer 1 {} {}.\n", usage.bytes, usage.inodes)
}

fn parse_marker(text: &[u8]) -> Option<Usage> {
    let text = std::str::from_utf8(text)
        .ok()?
        .strip_prefix("slipway layer 1 ")?
        .strip_suffix(".\n")?;
    let (bytes, inodes) = text.split_once(' ')?;
    Some(Usage {
        bytes: bytes.parse().ok()?,
        inodes: inodes.parse().ok()?,
    })
}

#[cfg(test)]
mod tests;
