//! The host's device nodes. One of the two modules of this crate that touch the host; it reads
//! metadata only and opens no device.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::types::{DeviceKind, DeviceNode};

/// Most device nodes that one folder is taken to have.
const MAX_NODES: usize = 16_384;

/// A device node found below a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundDevice {
    /// Its path in the container.
    pub container_path: String,
    /// What it is.
    pub node: DeviceNode,
}

/// Looks a device node up; symbolic links are followed.
///
/// # Errors
/// When it is missing or not a device.
pub fn lookup(path: &Path) -> io::Result<DeviceNode> {
    node_of(&fs::metadata(path)?)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not a device node"))
}

/// All device nodes that a request for `host_path` means: the node itself, or those below a folder.
///
/// # Errors
/// When the path is missing, or is neither a device nor a folder, or holds absurdly many.
pub fn expand(host_path: &Path, container_path: &str) -> io::Result<Vec<FoundDevice>> {
    let meta = fs::metadata(host_path)?;
    if let Some(node) = node_of(&meta) {
        return Ok(vec![FoundDevice {
            container_path: container_path.to_owned(),
            node,
        }]);
    }
    if !meta.is_dir() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "neither a device node nor a directory",
        ));
    }
    let mut found = Vec::new();
    walk(host_path, Path::new(container_path), &[], &mut found)?;
    Ok(found)
}

/// Every device node of the host, for a privileged container: /dev without what a container gets
/// of its own (terminals, queues, shared memory).
///
/// # Errors
/// When /dev cannot be read.
pub fn all() -> io::Result<Vec<FoundDevice>> {
    const SKIP: [&str; 8] = [
        "/dev/pts",
        "/dev/shm",
        "/dev/mqueue",
        "/dev/fd",
        "/dev/.udev",
        "/dev/.lxc",
        "/dev/console",
        "/dev/ptmx",
    ];
    let mut found = Vec::new();
    walk(Path::new("/dev"), Path::new("/dev"), &SKIP, &mut found)?;
    Ok(found)
}

fn walk(dir: &Path, inside: &Path, skip: &[&str], found: &mut Vec<FoundDevice>) -> io::Result<()> {
    let mut entries: Vec<_> = fs::read_dir(dir)?.collect::<io::Result<_>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (path, inside): (PathBuf, PathBuf) = (entry.path(), inside.join(entry.file_name()));
        if skip.iter().any(|s| path == Path::new(s)) {
            continue;
        }
        // Nodes come and go (hot plug): what vanished meanwhile is not there.
        let Ok(meta) = fs::symlink_metadata(&path) else {
            continue;
        };
        if meta.is_dir() {
            walk(&path, &inside, skip, found)?;
        } else if let Some(node) = node_of(&meta)
            && node.kind != DeviceKind::Fifo
            && let Some(inside) = inside.to_str()
        {
            if found.len() == MAX_NODES {
                return Err(io::Error::other(format!("more than {MAX_NODES} device nodes")));
            }
            found.push(FoundDevice {
                container_path: inside.to_owned(),
                node,
            });
        }
    }
    Ok(())
}

fn node_of(meta: &fs::Metadata) -> Option<DeviceNode> {
    let kind = match meta.file_type() {
        t if t.is_block_device() => DeviceKind::Block,
        t if t.is_char_device() => DeviceKind::Char,
        t if t.is_fifo() => DeviceKind::Fifo,
        _ => return None,
    };
    let (major, minor) = if kind == DeviceKind::Fifo {
        (0, 0)
    } else {
        numbers(meta.rdev())
    };
    Some(DeviceNode {
        kind,
        major,
        minor,
        mode: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
    })
}

/// Splits a dev_t as glibc's `major()` and `minor()` do.
fn numbers(dev: u64) -> (u32, u32) {
    let major = ((dev >> 8) & 0xfff) | ((dev >> 32) & 0xffff_f000);
    let minor = (dev & 0xff) | ((dev >> 12) & 0xffff_ff00);
    (major as u32, minor as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dev_null_is_character_device_1_3() {
        let node = lookup(Path::new("/dev/null")).unwrap();
        assert_eq!((node.kind, node.major, node.minor), (DeviceKind::Char, 1, 3));
        assert!(lookup(Path::new("/etc/passwd")).is_err());
        assert!(lookup(Path::new("/dev/absent")).is_err());
    }

    #[test]
    fn a_folder_means_the_nodes_below_it_under_their_new_names() {
        let found = expand(Path::new("/dev"), "/host-dev").unwrap();
        assert!(found.iter().any(|d| d.container_path == "/host-dev/null"));
        assert!(expand(Path::new("/etc"), "/x").unwrap().is_empty());
        assert!(expand(Path::new("/etc/passwd"), "/x").is_err());
    }

    #[test]
    fn all_devices_leave_out_what_a_container_has_of_its_own() {
        let all = all().unwrap();
        assert!(all.iter().any(|d| d.container_path == "/dev/null"));
        assert!(
            !all.iter()
                .any(|d| d.container_path.starts_with("/dev/pts/") || d.container_path == "/dev/console")
        );
    }

    #[test]
    fn device_numbers_are_split_as_glibc_does() {
        assert_eq!(numbers(0x0103), (1, 3));
        assert_eq!(numbers(0x0010_0305), (3, 0x105));
    }
}
