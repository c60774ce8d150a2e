//! The reserve: a preallocated file, given up so that deleting still commits on a full disk.
//!
//! A row cannot be deleted without writing to the database's log. Refuses to know what is deleted.

use super::Inner;
use crate::error::{Result, at};
use rustix::fs::FallocateFlags;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// The log grows by a few pages a transaction; a big one marks thousands of rows.
const SIZE: u64 = 4 << 20;
/// The reserve is not filled up again while the disk has less than this.
const MARGIN: u64 = 2 * SIZE;

/// Fills the reserve up where the disk has room for it.
pub(super) fn fill(root: &Path) {
    let path = root.join("reserve");
    let attempt = || -> std::io::Result<()> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)?;
        if file.metadata()?.len() >= SIZE || available(root)? < MARGIN {
            return Ok(());
        }
        match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, SIZE) {
            Err(rustix::io::Errno::OPNOTSUPP) => write_zeros(file),
            other => Ok(other?),
        }
    };
    if let Err(error) = attempt() {
        tracing::warn!(path = %path.display(), %error, "the reserve for a full disk could not be made");
    }
}

/// Gives the reserve up.
pub(super) fn free(root: &Path) -> Result<()> {
    let path = root.join("reserve");
    match OpenOptions::new()
        .write(true)
        .open(&path)
        .and_then(|file| file.set_len(0))
    {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(at("give up", &path)(e)),
        _ => Ok(()),
    }
}

fn write_zeros(mut file: File) -> std::io::Result<()> {
    std::io::copy(&mut std::io::Read::take(std::io::repeat(0), SIZE), &mut file)?;
    Ok(())
}

fn available(root: &Path) -> std::io::Result<u64> {
    let fs = rustix::fs::statvfs(root)?;
    Ok(fs.f_bavail.saturating_mul(fs.f_frsize))
}

impl Inner {
    /// Runs something that gives space back. When the disk is full it gets the reserve, once.
    pub(crate) fn with_reserve<T>(&self, work: impl Fn() -> Result<T>) -> Result<T> {
        match work() {
            Err(error) if error.is_disk_full() => {
                tracing::warn!(%error, "the disk is full: using the reserve to give space back");
                free(&self.root)?;
                work()
            }
            other => other,
        }
    }

    /// To be called when space was given back.
    pub(crate) fn refill_reserve(&self) {
        fill(&self.root);
    }
}
