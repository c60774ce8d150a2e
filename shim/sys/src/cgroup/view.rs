//! A process's own cgroup as a container is to see it, and the rest of the cgroups out of the way.
//!
//! In a mount namespace of the calling process's own (which must have one thread), `/sys/fs/cgroup` is covered:
//! ```text
//! /sys/fs/cgroup                    tmpfs, private: nothing of this reaches the host
//! /sys/fs/cgroup/container          v2: the own cgroup
//! /sys/fs/cgroup/container/v1-cpu   v1: the own cgroup in each hierarchy; `cpu` is a link to it
//! ```
//! What is started from here finds no hierarchy to change, and can bind `container` into a container. The `v1-` is there
//! because libcontainer knows a hierarchy by the last part of its mount point.

use super::Layout;
use super::layout::Hierarchy;
use crate::error::{failed, invalid};
use crate::mount::{self, Propagation};
use rustix::fs::CWD;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

const ROOT: &str = "/sys/fs/cgroup";

/// Covers `/sys/fs/cgroup`; returns the directory to bind into the container. With `read_only` its mounts are.
///
/// # Errors
/// What the calls say; `InvalidInput` when nothing is mounted on `/sys/fs/cgroup`. The mount namespace of the process is
/// then a new one and may be half changed: good for nothing but to report.
pub fn hide_behind_view(layout: &Layout, read_only: bool) -> io::Result<PathBuf> {
    let act = || format!("cover {ROOT}");
    let root = Path::new(ROOT);
    let mut below = mount::mounts_under(root)?;
    if below.pop().as_deref() != Some(root) {
        return Err(failed(act)(invalid("nothing is mounted there")));
    }
    mount::unshare()?;
    mount::set_propagation(root, Propagation::Private, true)?;
    let own = layout
        .hierarchies
        .iter()
        .map(|h| own_directory(h, read_only))
        .collect::<io::Result<Vec<_>>>()?;
    for path in &below {
        mount::unmount(path, true)?;
    }
    mount::tmpfs(root, 1 << 20, 0o755)?;
    let view = root.join("container");
    std::fs::create_dir(&view).map_err(failed(act))?;
    for (h, tree) in layout.hierarchies.iter().zip(own) {
        place(h, &tree, &view, layout.is_v2())?;
    }
    Ok(view)
}

/// A detached copy of the mount of our own directory.
fn own_directory(h: &Hierarchy, read_only: bool) -> io::Result<OwnedFd> {
    let path = h.mount.join(h.own.strip_prefix("/").unwrap_or(&h.own));
    let tree = mount::clone_tree(&path, false)?;
    mount::restrict(tree.as_fd(), false, read_only)?;
    Ok(tree)
}

fn place(h: &Hierarchy, tree: &OwnedFd, view: &Path, v2_alone: bool) -> io::Result<()> {
    if v2_alone {
        // A named v1 hierarchy beside v2 has nothing to show.
        return if h.v2 {
            mount::attach(tree.as_fd(), view)
        } else {
            Ok(())
        };
    }
    let (name, links) = names(h);
    let target = view.join(name.as_str());
    std::fs::create_dir(&target).map_err(failed(|| format!("make {}", target.display())))?;
    mount::attach(tree.as_fd(), &target)?;
    for link in links {
        rustix::fs::symlinkat(name.as_str(), CWD, view.join(&link))
            .map_err(failed(|| format!("link {link} to {name}")))?;
    }
    Ok(())
}

/// The directory's name and the links to it.
fn names(h: &Hierarchy) -> (String, Vec<String>) {
    if h.v2 {
        return ("unified".into(), Vec::new());
    }
    let joined = h.controllers.join(",");
    if let Some(name) = joined.strip_prefix("name=") {
        return (name.to_string(), Vec::new());
    }
    let mut links = h.controllers.clone();
    if links.len() > 1 {
        links.push(joined.clone());
    }
    (format!("v1-{joined}"), links)
}

/// Whether a bind mount of `source` would show the cover instead of the machine's cgroups.
pub fn is_covered(source: &Path) -> bool {
    let root = Path::new(ROOT);
    match std::fs::canonicalize(source) {
        Ok(path) => root.starts_with(&path) || path.starts_with(root),
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_named_so_that_their_mount_points_end_in_no_controller() {
        let h = |names: &[&str], v2| Hierarchy {
            controllers: names.iter().map(|n| n.to_string()).collect(),
            v2,
            mount: PathBuf::new(),
            own: PathBuf::new(),
        };
        let links = |n: &[&str]| n.iter().map(|n| n.to_string()).collect::<Vec<_>>();
        assert_eq!(names(&h(&["pids"], false)), ("v1-pids".into(), links(&["pids"])));
        let both = names(&h(&["cpu", "cpuacct"], false));
        assert_eq!(
            both,
            ("v1-cpu,cpuacct".into(), links(&["cpu", "cpuacct", "cpu,cpuacct"]))
        );
        assert_eq!(
            names(&h(&["name=systemd"], false)),
            ("systemd".into(), links(&[]))
        );
        assert_eq!(names(&h(&[], true)), ("unified".into(), links(&[])));
        assert!(
            is_covered(Path::new("/")) && is_covered(Path::new("/sys")) && !is_covered(Path::new("/etc"))
        );
    }
}
