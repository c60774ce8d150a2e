//! Id-mapped mounts, which libcontainer does not support: prepared here on staging directories, from which it then makes
//! ordinary bind mounts. They are unmounted when the container is created, or was not.

use libcontainer::oci_spec::runtime::{LinuxIdMapping, Mount};
use slipway_sys::mount;
use slipway_sys::ns::{self, IdMap, IdMaps};
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

/// The staged mounts.
#[derive(Debug)]
pub struct Staged {
    dir: PathBuf,
    targets: Vec<PathBuf>,
}

impl Drop for Staged {
    fn drop(&mut self) {
        // The container has copies of its own; nobody is left to tell.
        for target in &self.targets {
            let _ = mount::unmount(target, true);
            let _ = fs::remove_dir(target).or_else(|_| fs::remove_file(target));
        }
        let _ = fs::remove_dir(&self.dir);
    }
}

/// Why one could not be made.
#[derive(Debug, thiserror::Error)]
#[error("make an id-mapped mount of {} for {}", source_path.display(), destination.display())]
pub struct IdmapError {
    source_path: PathBuf,
    destination: PathBuf,
    #[source]
    source: io::Error,
}

/// Replaces the sources of all mounts with id mappings by staged copies below `dir`, which is made when needed.
pub fn stage(mounts: &mut [Mount], dir: &Path) -> Result<Staged, IdmapError> {
    let mut staged = Staged {
        dir: dir.to_path_buf(),
        targets: Vec::new(),
    };
    for m in mounts {
        if m.uid_mappings().is_none() && m.gid_mappings().is_none() {
            continue;
        }
        let from = m.source().clone().unwrap_or_default();
        let target = dir.join(staged.targets.len().to_string());
        staged.targets.push(target.clone());
        stage_one(m, &from, dir, &target).map_err(|source| IdmapError {
            source_path: from,
            destination: m.destination().clone(),
            source,
        })?;
        m.set_source(Some(target));
        m.set_uid_mappings(None);
        m.set_gid_mappings(None);
    }
    Ok(staged)
}

fn stage_one(m: &Mount, from: &Path, dir: &Path, target: &Path) -> io::Result<()> {
    let has = |names: &[&str]| m.options().iter().flatten().any(|o| names.contains(&o.as_str()));
    let recursive = has(&["rbind", "ridmap"]);
    let maps = IdMaps {
        uids: ranges(m.uid_mappings()),
        gids: ranges(m.gid_mappings()),
    };
    let userns = ns::user_namespace(&maps)?;
    let tree = mount::idmapped_clone(from, userns.as_fd(), recursive)?;
    match fs::create_dir(dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    if fs::metadata(from)?.is_dir() {
        fs::create_dir(target)?;
    } else {
        fs::File::create_new(target)?;
    }
    mount::attach(tree.as_fd(), target)
}

fn ranges(list: &Option<Vec<LinuxIdMapping>>) -> Vec<IdMap> {
    let range = |m: &LinuxIdMapping| IdMap {
        container_id: m.container_id(),
        host_id: m.host_id(),
        length: m.size(),
    };
    list.iter().flatten().map(range).collect()
}
