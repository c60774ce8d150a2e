//! Which cgroup hierarchies this machine has and where they are mounted; the paths a container may ask for.

use super::{CgroupError, Result};
use serde::{Deserialize, Serialize};
use std::path::{Component, Path, PathBuf};

/// One mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hierarchy {
    /// v1: its controllers ("cpu", "cpuacct"; "name=systemd" for one without); v2: empty.
    pub(crate) controllers: Vec<String>,
    pub(crate) v2: bool,
    pub(crate) mount: PathBuf,
    /// Where the calling process is, below the mount ("/" when not known).
    pub(crate) own: PathBuf,
}

/// The machine's hierarchies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    pub(crate) hierarchies: Vec<Hierarchy>,
}

impl Layout {
    /// Reads this machine's layout from `/proc/self/mountinfo` and `/proc/self/cgroup`.
    ///
    /// # Errors
    /// When `/proc` cannot be read or no cgroup hierarchy is mounted.
    pub fn detect() -> Result<Layout> {
        let read = |path: &str| {
            std::fs::read(path).map_err(|source| CgroupError::Io {
                act: format!("read {path}"),
                source,
            })
        };
        let layout = Layout::of_tables(&read("/proc/self/mountinfo")?, &read("/proc/self/cgroup")?);
        if layout.hierarchies.is_empty() {
            let path = "/sys/fs/cgroup".to_string();
            return Err(CgroupError::Path {
                path,
                reason: "no cgroup file system is mounted on this machine",
            });
        }
        Ok(layout)
    }

    /// A layout of given directories: v1 ones by controllers ("cpu,cpuacct"), and v2's. For tests, and for machines
    /// that mount them elsewhere.
    pub fn at(v1: &[(&str, &Path)], unified: Option<&Path>) -> Layout {
        let own = PathBuf::from("/");
        let mut hierarchies: Vec<Hierarchy> = v1
            .iter()
            .map(|(names, mount)| Hierarchy {
                controllers: names.split(',').map(str::to_string).collect(),
                v2: false,
                mount: mount.to_path_buf(),
                own: own.clone(),
            })
            .collect();
        hierarchies.extend(unified.map(|mount| Hierarchy {
            controllers: Vec::new(),
            v2: true,
            mount: mount.to_path_buf(),
            own: own.clone(),
        }));
        Layout { hierarchies }
    }

    /// Whether v2 is all there is (no hybrid).
    pub fn is_v2(&self) -> bool {
        !self.hierarchies.is_empty()
            && self
                .hierarchies
                .iter()
                .all(|h| h.v2 || h.controllers[0].starts_with("name="))
    }

    /// The controllers that can limit something here, v1 and v2, sorted.
    pub fn controllers(&self) -> Vec<String> {
        let mut names: Vec<String> = Vec::new();
        for h in &self.hierarchies {
            if h.v2 {
                let listed = std::fs::read_to_string(h.mount.join("cgroup.controllers")).unwrap_or_default();
                names.extend(listed.split_ascii_whitespace().map(str::to_string));
            } else {
                names.extend(h.controllers.iter().filter(|c| !c.starts_with("name=")).cloned());
            }
        }
        names.sort();
        names.dedup();
        names
    }

    /// Whether v2 is mounted, alone or beside v1.
    pub fn has_v2(&self) -> bool {
        self.own_v2().is_some()
    }

    /// The calling process's own cgroup in v2, below its mount; `None` without v2.
    pub fn own_v2(&self) -> Option<&Path> {
        self.hierarchies.iter().find(|h| h.v2).map(|h| h.own.as_path())
    }

    /// Somewhere on the machine a mount point may have any bytes; ours are looked for among them.
    fn of_tables(mountinfo: &[u8], own: &[u8]) -> Layout {
        Layout::parse(&String::from_utf8_lossy(mountinfo), &String::from_utf8_lossy(own))
    }

    pub(crate) fn parse(mountinfo: &str, own: &str) -> Layout {
        let mut hierarchies: Vec<Hierarchy> = Vec::new();
        for line in mountinfo.lines() {
            let Some((left, right)) = line.split_once(" - ") else {
                continue;
            };
            let left: Vec<&str> = left.split(' ').collect();
            let right: Vec<&str> = right.split(' ').collect();
            let (Some(root), Some(mount), Some(kind)) = (left.get(3), left.get(4), right.first()) else {
                continue;
            };
            let v2 = match *kind {
                "cgroup2" => true,
                "cgroup" => false,
                _ => continue,
            };
            let controllers = if v2 {
                Vec::new()
            } else {
                v1_controllers(right.get(2).copied().unwrap_or_default())
            };
            if (!v2 && controllers.is_empty())
                || hierarchies
                    .iter()
                    .any(|h| h.v2 == v2 && h.controllers == controllers)
            {
                continue;
            }
            let own = below_mount(own_path(own, v2, &controllers), Path::new(root));
            hierarchies.push(Hierarchy {
                controllers,
                v2,
                mount: PathBuf::from(mount),
                own,
            });
        }
        Layout { hierarchies }
    }
}

/// The controllers among a v1 mount's options.
fn v1_controllers(options: &str) -> Vec<String> {
    let other = [
        "rw",
        "ro",
        "xattr",
        "clone_children",
        "noprefix",
        "cpuset_v2_mode",
        "favordynmods",
    ];
    let is_controller = |o: &&str| !other.contains(o) && !o.starts_with("release_agent=") && !o.is_empty();
    options
        .split(',')
        .filter(is_controller)
        .map(str::to_string)
        .collect()
}

/// The line of `/proc/self/cgroup` for this hierarchy.
fn own_path<'a>(own: &'a str, v2: bool, controllers: &[String]) -> &'a Path {
    let found = own.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (id, names, path) = (parts.next()?, parts.next()?, parts.next()?);
        let same = if v2 {
            id == "0" && names.is_empty()
        } else {
            names.split(',').any(|n| n == controllers[0])
        };
        same.then_some(path)
    });
    Path::new(found.unwrap_or("/"))
}

/// A path of `/proc/self/cgroup` as seen below a mount of the subtree `root`.
fn below_mount(own: &Path, root: &Path) -> PathBuf {
    match own.strip_prefix(root) {
        Ok(rest) => Path::new("/").join(rest),
        Err(_) => PathBuf::from("/"),
    }
}

/// Where a container's cgroup shall be: OCI's `linux.cgroupsPath`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum CgroupPath {
    /// "/a/b": below each hierarchy. "a/b": below the calling process's own cgroup in each.
    Fs(PathBuf),
    /// "slice:prefix:name": a systemd scope `prefix-name.scope` in that slice.
    Scope {
        /// "system.slice".
        slice: String,
        /// "slipway".
        prefix: String,
        /// The container's id.
        name: String,
    },
    /// A slice of systemd's, "a-b.slice": pods' parents.
    Slice(String),
}

impl CgroupPath {
    /// From `linux.cgroupsPath`.
    ///
    /// # Errors
    /// [`CgroupError::Path`] for "..", empty components, zero bytes, and names systemd cannot have.
    pub fn parse(path: &str) -> Result<CgroupPath> {
        let refuse = |reason| {
            Err(CgroupError::Path {
                path: path.to_string(),
                reason,
            })
        };
        if path.is_empty() || path.contains(['\0', '\n']) {
            return refuse("it is empty, or has a zero byte or a line break");
        }
        let parts: Vec<&str> = path.split(':').collect();
        if let [slice, prefix, name] = parts[..] {
            if !is_unit_name(name) || !(prefix.is_empty() || is_unit_name(prefix)) {
                return refuse("prefix and name must be letters, digits, and any of -_.@");
            }
            let slice = if slice.is_empty() { "system.slice" } else { slice };
            slice_path(slice)?;
            return Ok(CgroupPath::Scope {
                slice: slice.into(),
                prefix: prefix.into(),
                name: name.into(),
            });
        }
        if !path.contains('/') && path.ends_with(".slice") {
            slice_path(path)?;
            return Ok(CgroupPath::Slice(path.to_string()));
        }
        let dir = Path::new(path);
        if dir.components().any(|c| matches!(c, Component::ParentDir)) {
            return refuse("it contains \"..\"");
        }
        if !dir.components().any(|c| matches!(c, Component::Normal(_))) {
            return refuse("it names the root");
        }
        Ok(CgroupPath::Fs(dir.components().collect()))
    }

    /// The unit's name, when it is one.
    pub fn unit(&self) -> Option<String> {
        match self {
            CgroupPath::Fs(_) => None,
            CgroupPath::Slice(name) => Some(name.clone()),
            CgroupPath::Scope { prefix, name, .. } if prefix.is_empty() => Some(format!("{name}.scope")),
            CgroupPath::Scope { prefix, name, .. } => Some(format!("{prefix}-{name}.scope")),
        }
    }

    /// The directory below each hierarchy's mount; relative only for a relative [`CgroupPath::Fs`].
    pub fn dir(&self) -> Result<PathBuf> {
        match self {
            CgroupPath::Fs(path) => Ok(path.clone()),
            CgroupPath::Slice(name) => slice_path(name),
            CgroupPath::Scope { slice, .. } => Ok(slice_path(slice)?.join(self.unit().unwrap_or_default())),
        }
    }
}

fn is_unit_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 200
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'@'))
}

/// systemd.slice(5): "a-b.slice" lies in "a.slice"; "-.slice" is the root.
pub(crate) fn slice_path(slice: &str) -> Result<PathBuf> {
    let refuse = || {
        Err(CgroupError::Path {
            path: slice.to_string(),
            reason: "it is no name of a systemd slice",
        })
    };
    let Some(stem) = slice.strip_suffix(".slice") else {
        return refuse();
    };
    if stem == "-" {
        return Ok(PathBuf::from("/"));
    }
    if !is_unit_name(stem) || stem.split('-').any(str::is_empty) {
        return refuse();
    }
    let ends = stem.match_indices('-').map(|(n, _)| n).chain([stem.len()]);
    Ok(ends.fold(PathBuf::from("/"), |path, end| {
        path.join(format!("{}.slice", &stem[..end]))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
30 20 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw
31 30 0:27 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct
32 30 0:28 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
33 30 0:29 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,release_agent=/x,name=systemd
34 30 0:30 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
35 20 0:28 / /mnt/again rw - cgroup cgroup rw,memory
";

    #[test]
    fn a_hybrid_machine_is_read_once_per_hierarchy() {
        let layout = Layout::parse(HYBRID, "4:memory:/process/x\n2:cpu,cpuacct:/\n0::/\n");
        assert!(!layout.is_v2());
        let names: Vec<_> = layout
            .hierarchies
            .iter()
            .map(|h| (h.controllers.join(","), h.v2))
            .collect();
        let expected = [
            ("cpu,cpuacct", false),
            ("memory", false),
            ("name=systemd", false),
            ("", true),
        ];
        assert_eq!(names, expected.map(|(n, v)| (n.to_string(), v)));
        assert_eq!(layout.hierarchies[1].own, Path::new("/process/x"));
        assert_eq!(layout.hierarchies[1].mount, Path::new("/sys/fs/cgroup/memory"));
    }

    #[test]
    fn a_mount_point_of_any_bytes_elsewhere_hides_nothing() {
        let mut table = b"29 20 0:25 / /mnt/odd-\xff\xfe rw - tmpfs tmpfs rw\n".to_vec();
        table.extend_from_slice(HYBRID.as_bytes());
        let layout = Layout::of_tables(&table, b"0::/\n");
        assert_eq!(layout, Layout::parse(HYBRID, "0::/\n"));
    }

    #[test]
    fn a_v2_machine_in_a_container_sees_itself_below_the_mount() {
        let layout = Layout::parse(
            "1 0 0:1 /docker/x /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
            "0::/docker/x/y\n",
        );
        assert!(layout.is_v2());
        assert_eq!(layout.hierarchies[0].own, Path::new("/y"));
    }

    #[test]
    fn paths_are_read_as_runc_reads_them() {
        let dir = |p: &str| CgroupPath::parse(p).and_then(|p| p.dir()).unwrap();
        assert_eq!(dir("/kubepods/pod1/c"), Path::new("/kubepods/pod1/c"));
        assert_eq!(
            dir("kubepods-besteffort-pod1.slice:slipway:c"),
            Path::new(
                "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice/slipway-c.scope"
            )
        );
        assert_eq!(dir(":p:c"), Path::new("/system.slice/p-c.scope"));
        assert_eq!(dir("-.slice:p:c"), Path::new("/p-c.scope"));
        assert_eq!(dir("a-b.slice"), Path::new("/a.slice/a-b.slice"));
        for bad in [
            "",
            "/",
            "/a/../b",
            "../x",
            "x.slice:p:c/d",
            "a--b.slice:p:c",
            "a.slice:p:\n",
            "a:b:c:",
            "x:p:c",
        ] {
            let parsed = CgroupPath::parse(bad);
            assert!(parsed.is_err() || bad == "a:b:c:", "{bad:?} gave {parsed:?}");
        }
    }
}
