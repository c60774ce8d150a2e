//! A process's own cgroup as a container is to see it, and the machine's cgroups out of the way.
//!
//! For a process with a mount namespace of its own, of which the host hears nothing:
//! ```text
//! <dir>/idle/cgroup.procs  a plain file: where libcontainer may write its pid
//! <dir>/cgroup             for the container: v2's own cgroup; or v1's, `v1-cpu` and so on, with links `cpu` to them
//! /sys/fs/cgroup           the own v2 cgroup, read-only (also on a hybrid machine)
//! ```
//! libcontainer takes this for a v2 machine, and its manager for the cgroup `idle` does nothing of consequence. The `v1-`
//! is there because it knows a v1 hierarchy by the last part of its mount point. Nothing else of `/sys` may be covered: a
//! user namespace may mount a sysfs only while it can see all of one.

use super::Layout;
use super::layout::Hierarchy;
use crate::error::{failed, invalid};
use crate::mount;
use rustix::fs::CWD;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

const ROOT: &str = "/sys/fs/cgroup";

/// What a process sees instead of the machine's cgroups.
#[derive(Debug)]
pub struct View {
    /// To be bound into the container.
    pub container: PathBuf,
    /// As a path below `/sys/fs/cgroup`: the cgroup that is none.
    pub idle: PathBuf,
}

/// Copies of the mounts of our own cgroup, nowhere yet.
#[derive(Debug)]
pub struct Facade {
    front: OwnedFd,
    own: Vec<(Hierarchy, OwnedFd)>,
    v2_alone: bool,
}

impl Facade {
    /// Takes the copies; changes nothing. With `read_only` the container's are.
    ///
    /// # Errors
    /// What the calls say; `InvalidInput` on a machine without v2.
    pub fn take(layout: &Layout, read_only: bool) -> io::Result<Facade> {
        let v2 = layout
            .hierarchies
            .iter()
            .find(|h| h.v2)
            .ok_or_else(|| invalid("cgroup v2 is not mounted"))?;
        let front = own_directory(v2, true)?;
        let own = layout
            .hierarchies
            .iter()
            .map(|h| own_directory(h, read_only).map(|tree| (h.clone(), tree)));
        Ok(Facade {
            front,
            own: own.collect::<io::Result<_>>()?,
            v2_alone: layout.is_v2(),
        })
    }

    /// Covers `/sys/fs/cgroup`, and fills `dir` (absolute, without links).
    ///
    /// # Errors
    /// What the calls say.
    pub fn show(self, dir: &Path) -> io::Result<View> {
        let make = |name: &str| {
            let dir = dir.join(name);
            std::fs::create_dir(&dir).map_err(failed(|| format!("make {}", dir.display())))?;
            Ok::<_, io::Error>(dir)
        };
        mount::attach(self.front.as_fd(), Path::new(ROOT))?;
        let idle = make("idle")?;
        let procs = idle.join("cgroup.procs");
        std::fs::write(&procs, "").map_err(failed(|| format!("make {}", procs.display())))?;
        let container = make("cgroup")?;
        for (h, tree) in &self.own {
            place(h, tree, &container, self.v2_alone)?;
        }
        let up = Path::new(ROOT)
            .components()
            .skip(1)
            .map(|_| "..")
            .collect::<PathBuf>();
        Ok(View {
            container,
            idle: up.join(idle.strip_prefix("/").unwrap_or(&idle)),
        })
    }
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

/// Whether a bind mount of `source` would show the cover instead of what the machine has there.
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
