//! Removes a tree without following anything out of it: links, mounts, or somebody who changes it meanwhile.

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

/// Directories deeper than this are moved up before they are emptied, so that descriptors stay bounded.
const MAX_OPEN_DIRS: usize = 128;
/// How often a tree may be found filled again before its removal is given up.
const MAX_FILLED_AGAIN: u32 = 64;

/// Removes the entry `name` of `dir` and all below it. Iterative, with at most [`MAX_OPEN_DIRS`] descriptors however
/// deep the tree is: a directory too deep is first moved up. Several may remove one tree at once, and one that was
/// interrupted is finished by the next.
pub(crate) fn remove_tree_at(dir: BorrowedFd<'_>, name: &OsStr) -> io::Result<()> {
    match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(e) => return Err(e.into()),
    }
    let Some(bottom) = open_dir(dir, name)? else {
        return Ok(());
    };
    let mut stack = vec![(bottom, name.to_os_string())];
    let mut moved = 0u64;
    let mut filled_again = 0;
    while let Some((top, _)) = stack.last() {
        let depth = stack.len();
        match empty_dir_once(top.as_fd())? {
            None => {
                let (fd, name) = stack.pop().expect("the loop's condition saw an element");
                let parent = stack.last().map_or(dir, |(fd, _)| fd.as_fd());
                match rustix::fs::unlinkat(parent, &name, AtFlags::REMOVEDIR) {
                    Ok(()) | Err(Errno::NOENT) => {}
                    // Somebody put something in while we looked. Above the bottom it is met again; at the bottom it is
                    // another remover moving a directory up, or a writer whom we cannot win against.
                    Err(Errno::NOTEMPTY) if depth > 1 => {}
                    Err(Errno::NOTEMPTY) if filled_again < MAX_FILLED_AGAIN => {
                        filled_again += 1;
                        stack.push((fd, name));
                    }
                    Err(e) => return Err(e.into()),
                }
            }
            Some(child) if depth >= MAX_OPEN_DIRS => {
                let bottom = stack.first().expect("depth is at least one").0.as_fd();
                move_up(top.as_fd(), &child, bottom, &mut moved)?;
            }
            Some(child) => {
                if let Some(fd) = open_dir(top.as_fd(), &child)? {
                    stack.push((fd, child));
                }
            }
        }
    }
    Ok(())
}

/// Moves a directory to where it is not deep, under a name that nothing has.
fn move_up(from: BorrowedFd<'_>, name: &OsStr, to: BorrowedFd<'_>, moved: &mut u64) -> io::Result<()> {
    loop {
        let up = OsString::from(format!(".slipway-removing-{moved}"));
        *moved += 1;
        match rustix::fs::renameat_with(from, name, to, &up, RenameFlags::NOREPLACE) {
            // Another remover has taken it, or left it there when it was interrupted.
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::EXIST) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// `None`: another remover was here first.
fn open_dir(dir: BorrowedFd<'_>, name: &OsStr) -> io::Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH;
    match rustix::fs::openat2(dir, name, flags, Mode::empty(), resolve) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Unlinks everything that is no directory; returns a directory found, or `None` when the directory is empty.
fn empty_dir_once(dir: BorrowedFd<'_>) -> io::Result<Option<OsString>> {
    let mut found = None;
    // Of a directory that is removed itself, "." cannot be opened any more, nor can it be read.
    let entries = match Dir::read_from(dir) {
        Err(Errno::NOENT) => return Ok(None),
        other => other?,
    };
    for entry in entries {
        let entry = match entry {
            Err(Errno::NOENT) => return Ok(None),
            other => other?,
        };
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let known_dir = entry.file_type() == FileType::Directory;
        if !known_dir {
            match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => continue,
                Err(Errno::ISDIR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        found = Some(OsStr::from_bytes(name.to_bytes()).to_os_string());
        if known_dir {
            // Try the cheap way first: most directories met last are empty.
            match rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR) {
                Ok(()) | Err(Errno::NOENT) => found = None,
                Err(_) => break,
            }
        }
        if found.is_some() {
            break;
        }
    }
    Ok(found)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::path::Path;

    /// A chain of directories `depth` deep below `at`, deeper than a path may be long, with a file in each.
    fn deep(at: &Path, depth: usize) {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        std::fs::create_dir_all(at).unwrap();
        let mut here = rustix::fs::open(at, flags, Mode::empty()).unwrap();
        for _ in 0..depth {
            let file = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
            rustix::fs::openat(&here, "file", file, Mode::from_raw_mode(0o600)).unwrap();
            rustix::fs::mkdirat(&here, "d", Mode::from_raw_mode(0o700)).unwrap();
            here = rustix::fs::openat(&here, "d", flags, Mode::empty()).unwrap();
        }
    }

    fn remove(dir: &Path, name: &str) -> io::Result<()> {
        let dir = std::fs::File::open(dir).unwrap();
        remove_tree_at(dir.as_fd(), OsStr::new(name))
    }

    #[test]
    fn an_interrupted_removal_of_a_deep_tree_is_finished_by_the_next() {
        let dir = tempfile::tempdir().unwrap();
        deep(&dir.path().join("tree"), 700);
        // What one leaves that died after it had moved directories up.
        for left in 0..3 {
            deep(&dir.path().join(format!("tree/.slipway-removing-{left}")), 2);
        }
        remove(dir.path(), "tree").unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        remove(dir.path(), "tree").unwrap();
    }

    #[test]
    fn several_removers_of_one_tree_all_succeed() {
        let dir = tempfile::tempdir().unwrap();
        for _ in 0..5 {
            for branch in 0..8 {
                deep(&dir.path().join(format!("tree/{branch}")), 20);
            }
            deep(&dir.path().join("tree/deep"), 300);
            std::thread::scope(|scope| {
                let all: Vec<_> = (0..4)
                    .map(|_| scope.spawn(|| remove(dir.path(), "tree")))
                    .collect();
                for one in all {
                    one.join().unwrap().unwrap();
                }
            });
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        }
    }
}
