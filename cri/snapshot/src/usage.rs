//! Counting what a tree takes on disk.

use crate::attributes::kind;
use crate::snapshotter::Usage;
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;
use std::collections::HashSet;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

/// Deeper than any tree a process can name: each level holds a descriptor.
const MAX_DEPTH: usize = 400;

/// Blocks and inodes of a tree; a file with several names counts once. What disappears meanwhile is not counted.
///
/// # Errors
/// The tree cannot be read.
pub fn of_tree(dir: &Path) -> io::Result<Usage> {
    let root = rustix::fs::openat(
        CWD,
        dir,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let mut usage = Usage {
        bytes: blocks(rustix::fs::fstat(&root)?.st_blocks),
        inodes: 1,
    };
    count(&root, &mut usage, &mut HashSet::new(), 0)?;
    Ok(usage)
}

fn count(dir: &OwnedFd, usage: &mut Usage, seen: &mut HashSet<u64>, depth: usize) -> io::Result<()> {
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        if matches!(entry.file_name().to_bytes(), b"." | b"..") {
            continue;
        }
        let stat = match rustix::fs::statat(dir, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => continue,
            Err(e) => return Err(e.into()),
        };
        let directory = kind(&stat) == FileType::Directory;
        if !directory && stat.st_nlink > 1 && !seen.insert(stat.st_ino) {
            continue;
        }
        usage.bytes += blocks(stat.st_blocks);
        usage.inodes += 1;
        if directory && depth < MAX_DEPTH {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            match rustix::fs::openat(dir, entry.file_name(), flags, Mode::empty()) {
                Ok(child) => count(&child, usage, seen, depth + 1)?,
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
    Ok(())
}

fn blocks(blocks: i64) -> u64 {
    u64::try_from(blocks).unwrap_or(0) * 512
}
