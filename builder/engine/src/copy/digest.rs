//! What a selection contains, as one digest: paths, kinds, modes, owners, link targets, extended
//! attributes and contents; no times, so that a fresh checkout of the same files finds its cache.

use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::fs::{FileType, OFlags};
use sha2::{Digest as _, Sha256};

use super::CopyError;
use super::tree::{Entry, Found, Tree};
use crate::cancel::Cancel;

/// Size of a read.
const CHUNK: usize = 256 * 1024;

/// One match with everything below it that is to be copied.
pub struct Selection {
    /// The match.
    pub found: Found,
    /// Its entries, the top first.
    pub entries: Vec<Entry>,
    /// `--parents` and a directory's contents: the top itself is not copied, only what is below it.
    pub contents_only: bool,
}

/// An extended attribute.
pub type Xattr = (Vec<u8>, Vec<u8>);

/// The digest of some selections, in order. Contents are read by as many threads as there are processors.
///
/// # Errors
/// When something cannot be read, or `cancel` is set.
pub fn digest(tree: &Tree, selections: &[Selection], cancel: &Cancel) -> Result<[u8; 32], CopyError> {
    let jobs: Vec<(usize, usize)> = selections
        .iter()
        .enumerate()
        .flat_map(|(s, selection)| (0..selection.entries.len()).map(move |e| (s, e)))
        .collect();
    let results: Mutex<Vec<Option<[u8; 32]>>> = Mutex::new(vec![None; jobs.len()]);
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism()
        .map_or(2, usize::from)
        .min(16)
        .min(jobs.len().max(1));
    let work = || -> Result<(), CopyError> {
        let mut buffer = vec![0; CHUNK];
        loop {
            let n = next.fetch_add(1, Ordering::Relaxed);
            let Some((s, e)) = jobs.get(n).copied() else {
                return Ok(());
            };
            if cancel.is_set() {
                return Err(CopyError::Cancelled);
            }
            let one = entry_digest(
                tree,
                &selections[s],
                &selections[s].entries[e],
                &mut buffer,
                cancel,
            )?;
            if let Some(slot) = results
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .get_mut(n)
            {
                *slot = Some(one);
            }
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        // A panic in a worker is a panic here.
        workers
            .into_iter()
            .try_for_each(|w| w.join().unwrap_or_else(|p| std::panic::resume_unwind(p)))
    })?;
    let results = results
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut total = Sha256::new();
    let mut at = results.into_iter();
    for selection in selections {
        total.update(b"selection");
        framed(&mut total, selection.found.name.as_bytes());
        total.update([
            u8::from(selection.contents_only),
            u8::from(selection.found.is_dir()),
        ]);
        for one in at.by_ref().take(selection.entries.len()).flatten() {
            total.update(one);
        }
    }
    Ok(total.finalize().into())
}

fn entry_digest(
    tree: &Tree,
    selection: &Selection,
    entry: &Entry,
    buffer: &mut [u8],
    cancel: &Cancel,
) -> Result<[u8; 32], CopyError> {
    let mut hash = Sha256::new();
    framed(&mut hash, entry.path.as_os_str().as_bytes());
    let kind = entry.kind();
    hash.update((kind.as_raw_mode()).to_le_bytes());
    if selection.contents_only && entry.path.as_os_str().is_empty() {
        // A directory whose contents are copied gives neither its mode nor its owner.
        return Ok(hash.finalize().into());
    }
    hash.update(entry.stat.st_uid.to_le_bytes());
    hash.update(entry.stat.st_gid.to_le_bytes());
    if kind != FileType::Symlink {
        hash.update((entry.stat.st_mode & 0o7777).to_le_bytes());
    }
    match kind {
        FileType::Symlink => {
            framed(
                &mut hash,
                entry
                    .target
                    .as_deref()
                    .map(OsStrExt::as_bytes)
                    .unwrap_or_default(),
            );
        }
        FileType::CharacterDevice | FileType::BlockDevice => hash.update(entry.stat.st_rdev.to_le_bytes()),
        FileType::RegularFile if !entry.socket => {
            let mut file = open_entry(tree, selection, entry)?;
            for (name, value) in xattrs(&file) {
                framed(&mut hash, &name);
                framed(&mut hash, &value);
            }
            contents(tree, selection, entry, &mut file, buffer, &mut hash, cancel)?;
        }
        FileType::Directory => {
            for (name, value) in xattrs(&open_entry(tree, selection, entry)?) {
                framed(&mut hash, &name);
                framed(&mut hash, &value);
            }
        }
        _ => {}
    }
    Ok(hash.finalize().into())
}

fn contents(
    tree: &Tree,
    selection: &Selection,
    entry: &Entry,
    file: &mut File,
    buffer: &mut [u8],
    hash: &mut Sha256,
    cancel: &Cancel,
) -> Result<(), CopyError> {
    let real = real_path(selection, entry);
    let mut size: i64 = 0;
    hash.update(b"content");
    loop {
        if cancel.is_set() {
            return Err(CopyError::Cancelled);
        }
        let n = file
            .read(buffer)
            .map_err(|e| CopyError::at("read", &tree.name, &real, e))?;
        if n == 0 {
            break;
        }
        size += i64::try_from(n).unwrap_or(i64::MAX);
        hash.update(&buffer[..n]);
    }
    if size != entry.stat.st_size {
        return Err(CopyError::Changed {
            path: real,
            place: tree.name.clone(),
        });
    }
    hash.update(size.to_le_bytes());
    Ok(())
}

/// Opens a regular file or directory of a selection, and makes sure that it is the one that was listed.
///
/// # Errors
/// When it cannot be opened or is another one now.
pub fn open_entry(tree: &Tree, selection: &Selection, entry: &Entry) -> Result<File, CopyError> {
    let real = real_path(selection, entry);
    let path = if real.as_os_str().is_empty() {
        PathBuf::from("/")
    } else {
        real.clone()
    };
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = tree
        .root()
        .open_file(&path, flags)
        .map_err(|e| CopyError::at("open", &tree.name, &path, e))?;
    let now = rustix::fs::fstat(&file).map_err(|e| CopyError::at("read", &tree.name, &path, e.into()))?;
    if !same(&now, &entry.stat) {
        return Err(CopyError::Changed {
            path: real,
            place: tree.name.clone(),
        });
    }
    Ok(file)
}

/// Whether nobody wrote to a node between two looks at it.
#[must_use]
pub fn same(a: &rustix::fs::Stat, b: &rustix::fs::Stat) -> bool {
    let times = |s: &rustix::fs::Stat| (s.st_mtime, s.st_mtime_nsec, s.st_ctime, s.st_ctime_nsec);
    let is_dir = FileType::from_raw_mode(a.st_mode) == FileType::Directory;
    (a.st_ino, a.st_dev) == (b.st_ino, b.st_dev)
        && (is_dir || (a.st_size == b.st_size && times(a) == times(b)))
}

/// Where an entry is in its tree.
#[must_use]
pub fn real_path(selection: &Selection, entry: &Entry) -> PathBuf {
    if entry.path.as_os_str().is_empty() {
        selection.found.real.clone()
    } else {
        selection.found.real.join(&entry.path)
    }
}

/// The extended attributes of an open file, sorted; those of the host's own bookkeeping left out.
#[must_use]
pub fn xattrs(file: &File) -> Vec<Xattr> {
    let mut names = Vec::new();
    // 64 KiB is the kernel's own limit (XATTR_LIST_MAX); most files have none, which costs one call.
    match rustix::fs::flistxattr(file, &mut [0u8; 0][..]) {
        Ok(0) | Err(_) => return Vec::new(),
        Ok(size) => names.resize(size, 0u8),
    }
    let Ok(size) = rustix::fs::flistxattr(file, &mut names[..]) else {
        return Vec::new();
    };
    names.truncate(size);
    let mut found = Vec::new();
    for name in names.split(|b| *b == 0).filter(|n| !n.is_empty()) {
        if super::is_overlays(name) || name == b"security.selinux" || name == b"security.ima" {
            continue;
        }
        let mut value = vec![0u8; 65536];
        if let Ok(size) = rustix::fs::fgetxattr(file, name, &mut value[..]) {
            value.truncate(size);
            found.push((name.to_vec(), value));
        }
    }
    found.sort();
    found
}

/// Hashes bytes with their length before them, so that no two sequences of fields look alike.
pub(crate) fn framed(hash: &mut Sha256, bytes: &[u8]) {
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}
