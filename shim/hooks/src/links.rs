//! Links and modes in a tree that somebody else has made.

use std::os::fd::AsRawFd;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;
use slipway_sys::root::Root;

use crate::args::Link;
use crate::{Step, Tree, step};

/// Makes the links, and the directories they are in. Whatever file has a link's name gives way.
pub fn create(tree: &Tree, links: &[Link]) -> Step<()> {
    for link in links {
        let (root, path) = tree.part(Path::new(&link.path));
        make(root, path, link).map_err(step(format!("make the link {} to {}", link.path, link.target)))?;
    }
    Ok(())
}

fn make(root: &Root, path: &Path, link: &Link) -> std::io::Result<()> {
    root.mkdir_all(path.parent().unwrap_or(Path::new("/")), 0o755, None)?;
    let (dir, name) = root.parent(path)?;
    match rustix::fs::readlinkat(&dir, name.as_os_str(), Vec::new()) {
        Ok(there) if there.as_bytes() == link.target.as_bytes() => return Ok(()),
        _ => {}
    }
    // Beside it first: at no moment is there neither the old nor the new one.
    let beside = format!(".slipway-link-{}", std::process::id());
    rustix::fs::symlinkat(link.target.as_str(), &dir, beside.as_str())?;
    rustix::fs::renameat(&dir, beside.as_str(), &dir, name.as_os_str()).map_err(|e| {
        let _ = rustix::fs::unlinkat(&dir, beside.as_str(), AtFlags::empty());
        e.into()
    })
}

/// Sets the mode of what is there.
pub fn chmod(tree: &Tree, mode: u32, paths: &[String]) -> Step<()> {
    for path in paths {
        let (root, inside) = tree.part(Path::new(path));
        set_mode(root, inside, mode).map_err(step(format!("set the mode of {path}")))?;
    }
    Ok(())
}

fn set_mode(root: &Root, path: &Path, mode: u32) -> std::io::Result<()> {
    let Some(stat) = root.metadata(path)? else {
        return Ok(());
    };
    let is_link = FileType::from_raw_mode(stat.st_mode) == FileType::Symlink;
    if is_link || stat.st_mode & 0o7777 == mode {
        return Ok(());
    }
    let file = root.open_file(path, OFlags::PATH)?;
    let opened = format!("/proc/self/fd/{}", file.as_raw_fd());
    match rustix::fs::chmodat(
        rustix::fs::CWD,
        opened,
        Mode::from_raw_mode(mode),
        AtFlags::empty(),
    ) {
        // All of the host's /dev is there, or a file system that cannot: its mode is not the container's to set.
        Err(Errno::PERM | Errno::ACCESS | Errno::ROFS) => Ok(()),
        other => Ok(other?),
    }
}
