//! What libcontainer is shown: a stage, in a mount namespace of this process's own, that goes when the process goes.
//!
//! ```text
//! <stage>            a tmpfs on some directory everybody may enter and nobody here needs ([`PLACES`])
//! <stage>/cgroup     the container's view of its cgroup, for its mount of it
//! <stage>/idle       the cgroup libcontainer may manage: none
//! <stage>/mounts/N   copies of sources of the container's bind mounts
//! <stage>/rootfs     a copy of the rootfs mount
//! <stage>/dev/N      in a user namespace: device nodes of the container, to be bound to their places
//! <stage>/config.json, console.sock
//! ```
//! Why: its cgroup managers would read the mount table a dozen times, write the pid into the cgroup it is in already (which
//! takes a lock that costs an RCU grace period, 5 to 12 ms, more than the rest of a create) and, after a failure, kill
//! everything in the cgroup, this process first. It does not know id-mapped mounts. And in a user namespace it looks up sources, rootfs
//! and namespaces as a user whom our directories (0700) do not let pass.
//!
//! A container with a mount that travels back to the host (`rshared`) needs the host's own mount namespace: it gets a directory
//! below the state directory instead, and libcontainer's manager, which repeats what has been done.

use crate::Asked;
use libcontainer::oci_spec::runtime::{
    LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, LinuxIdMapping, LinuxNamespaceType, Mount, Spec,
};
use slipway_sys::cgroup::{Facade, Layout, is_covered};
use slipway_sys::mount::{self, Propagation};
use slipway_sys::ns::{self, IdMap, IdMaps};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Directories that a stage may cover: where a system has things of its users, not of its own.
const PLACES: [&str; 7] = ["/mnt", "/media", "/srv", "/home", "/opt", "/tmp", "/var"];

/// One that is made where there is no other: a minimal system has few of them, and a container may need those. Users of a user
/// namespace have to get there, so it cannot be below a directory that is root's alone.
const OWN_PLACE: &str = "/run/slipway-stage";

/// Character devices that libcontainer binds into every container.
const EVERY_CONTAINERS: [(&str, i64, i64); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// Where libcontainer works.
#[derive(Debug)]
pub struct Stage {
    /// Writable, its own.
    pub dir: PathBuf,
    /// What libcontainer is to take for the container's cgroup.
    pub cgroup: PathBuf,
    /// What has to be taken down by hand, since the host sees it.
    public: bool,
    mounted: Vec<PathBuf>,
    /// Namespaces, which the container's init opens again through `/proc/self/fd`.
    _held: Vec<OwnedFd>,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// A step.
    #[error("{act}")]
    Io {
        /// What was attempted.
        act: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A source that cannot be shown.
    #[error("prepare the mount of {} on {}", from.display(), destination.display())]
    Source {
        /// What is to be mounted.
        from: PathBuf,
        /// Where in the container.
        destination: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Every place is needed.
    #[error("neither one of {PLACES:?} nor {OWN_PLACE} is a directory that could be covered for a moment")]
    NoPlace,
}

fn step(act: impl Into<String>) -> impl FnOnce(io::Error) -> StageError {
    let act = act.into();
    move |source| StageError::Io { act, source }
}

impl Stage {
    /// Builds it, and points `spec` to it. `rootfs` is absolute and without links.
    pub fn build(spec: &mut Spec, asked: &Asked, rootfs: &Path) -> Result<Stage, StageError> {
        let layout = Layout::detect().map_err(|e| step("read the cgroup layout")(io::Error::other(e)))?;
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        let propagates = spec.linux().as_ref().and_then(|l| l.rootfs_propagation().clone());
        let shared = |o: &str| matches!(o, "shared" | "rshared");
        let public = !layout.has_v2()
            || propagates.as_deref().is_some_and(shared)
            || mounts
                .iter()
                .any(|m| m.options().iter().flatten().any(|o| shared(o)));
        let stage = if public {
            Stage::public(&mut mounts, &layout, asked)
        } else {
            Stage::private(spec, &mut mounts, &layout, asked, rootfs)
        }?;
        spec.set_mounts(Some(mounts));
        Ok(stage)
    }

    fn public(mounts: &mut [Mount], layout: &Layout, asked: &Asked) -> Result<Stage, StageError> {
        let state = fs::canonicalize(&asked.state).map_err(step("find the state directory"))?;
        let dir = state.join(format!("{}.work", asked.id));
        // Left by a worker that was killed.
        mount::remove_tree(&dir).map_err(step(format!("clear {}", dir.display())))?;
        fs::create_dir(&dir).map_err(step(format!("make {}", dir.display())))?;
        // Empty: with v1, wherever we are in each hierarchy.
        let own = if layout.is_v2() {
            layout.own_v2().map(PathBuf::from)
        } else {
            None
        };
        let cgroup = own.unwrap_or_default();
        let mut stage = Stage {
            dir,
            cgroup,
            public: true,
            mounted: Vec::new(),
            _held: Vec::new(),
        };
        let copies = copy_sources(mounts, is_id_mapped)?;
        stage.show_copies(mounts, &copies)?;
        Ok(stage)
    }

    fn private(
        spec: &mut Spec,
        mounts: &mut Vec<Mount>,
        layout: &Layout,
        asked: &Asked,
        rootfs: &Path,
    ) -> Result<Stage, StageError> {
        let in_user_namespace = has_user_namespace(spec);
        mount::unshare().map_err(step("leave the host's mount namespace"))?;
        mount::set_propagation(Path::new("/"), Propagation::Slave, true)
            .map_err(step("keep mounts from the host"))?;
        let copies = copy_sources(mounts, |m| {
            is_id_mapped(m)
                || (is_bind(m) && (in_user_namespace || m.source().as_deref().is_some_and(is_covered)))
        })?;
        let root = if in_user_namespace {
            Some(mount::clone_tree(rootfs, true))
        } else {
            None
        };
        let root = root.transpose().map_err(step("copy the rootfs mount"))?;
        let held = if in_user_namespace {
            hold_namespaces(spec)
        } else {
            Ok(Vec::new())
        };
        let held = held.map_err(step("open the namespaces"))?;
        let writable = mounts.iter().any(|m| is_cgroup(m) && !has(m, &["ro"]));
        let facade = Facade::take(layout, !writable).map_err(step("copy the cgroup mounts"))?;

        let dir = place(
            &needed(spec, mounts, &copies, asked, rootfs),
            Path::new(OWN_PLACE),
        )?;
        mount::tmpfs(&dir, 16 << 20, 0o755).map_err(step("mount the stage"))?;
        let view = facade.show(&dir).map_err(step("show the cgroups"))?;
        let cgroup = view.idle;
        let mut stage = Stage {
            dir,
            cgroup,
            public: false,
            mounted: Vec::new(),
            _held: held,
        };
        stage.show_copies(mounts, &copies)?;
        if in_user_namespace {
            stage.show_devices(spec, mounts)?;
        }
        for m in mounts.iter_mut().filter(|m| is_cgroup(m)) {
            bind_view(m, &view.container);
        }
        if let (Some(tree), Some(root)) = (root, spec.root_mut().as_mut()) {
            let target = stage
                .show(&tree, "rootfs", true)
                .map_err(step("show the rootfs"))?;
            root.set_path(target);
        }
        Ok(stage)
    }

    /// Puts the copies on the stage, and points the mounts to them.
    fn show_copies(&mut self, mounts: &mut [Mount], copies: &[Copied]) -> Result<(), StageError> {
        if !copies.is_empty() {
            let dir = self.dir.join("mounts");
            fs::create_dir(&dir).map_err(step(format!("make {}", dir.display())))?;
        }
        for (n, copy) in copies.iter().enumerate() {
            let m = &mut mounts[copy.mount];
            let shown = self.show(&copy.tree, &format!("mounts/{n}"), copy.is_dir);
            let target = shown.map_err(|source| failed_source(m, source))?;
            m.set_source(Some(target))
                .set_uid_mappings(None)
                .set_gid_mappings(None);
            if let Some(options) = m.options_mut() {
                options.retain(|o| o != "idmap" && o != "ridmap");
            }
        }
        Ok(())
    }

    /// In a user namespace nodes cannot be made, only bound; libcontainer would bind whatever the host has at the path that
    /// the container is to see, which can be another device. So the nodes are made here, as asked, and bound as files.
    fn show_devices(&mut self, spec: &mut Spec, mounts: &mut Vec<Mount>) -> Result<(), StageError> {
        let Some(linux) = spec.linux_mut() else {
            return Ok(());
        };
        let mut devices = linux.devices().clone().unwrap_or_default();
        // libcontainer gives these to every container, and stumbles over one that is there already.
        devices.retain(|d| !EVERY_CONTAINERS.contains(&(&*d.path().to_string_lossy(), d.major(), d.minor())));
        if devices.is_empty() {
            linux.set_devices(None);
            return Ok(());
        }
        let dir = self.dir.join("dev");
        fs::create_dir(&dir).map_err(step(format!("make {}", dir.display())))?;
        mount::tmpfs_of_devices(&dir).map_err(step("mount the device nodes"))?;
        let owners = (ranges(linux.uid_mappings()), ranges(linux.gid_mappings()));
        let rules = linux.resources().as_ref().and_then(|r| r.devices().clone());
        for (n, device) in devices.iter().enumerate() {
            let node = dir.join(n.to_string());
            let owners = is_granted(device, rules.as_deref().unwrap_or_default()).then_some(&owners);
            make_node(&node, device, owners)
                .map_err(step(format!("make the device node {}", device.path().display())))?;
            let mut m = Mount::default();
            m.set_destination(device.path().clone())
                .set_typ(Some("bind".into()))
                .set_source(Some(node))
                .set_options(Some(vec!["bind".into(), "nosuid".into(), "noexec".into()]));
            mounts.push(m);
        }
        linux.set_devices(None);
        Ok(())
    }

    fn show(&mut self, tree: &OwnedFd, name: &str, is_dir: bool) -> io::Result<PathBuf> {
        let target = self.dir.join(name);
        if is_dir {
            fs::create_dir(&target)
        } else {
            fs::File::create_new(&target).map(drop)
        }?;
        mount::attach(tree.as_fd(), &target)?;
        self.mounted.push(target.clone());
        Ok(target)
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if self.public {
            // The container has copies of its own; nobody is left to tell.
            for target in self.mounted.iter().rev() {
                let _ = mount::unmount(target, true);
            }
            let _ = mount::remove_tree(&self.dir);
        }
    }
}

/// A copy of the source of the mount with this index.
struct Copied {
    mount: usize,
    tree: OwnedFd,
    is_dir: bool,
}

fn copy_sources(mounts: &[Mount], wanted: impl Fn(&Mount) -> bool) -> Result<Vec<Copied>, StageError> {
    let copy = |(n, m): (usize, &Mount)| copy_source(n, m).map_err(|source| failed_source(m, source));
    mounts
        .iter()
        .enumerate()
        .filter(|(_, m)| wanted(m))
        .map(copy)
        .collect()
}

fn copy_source(mount: usize, m: &Mount) -> io::Result<Copied> {
    let from = m.source().as_deref().ok_or(io::ErrorKind::InvalidInput)?;
    let recursive = has(m, &["rbind", "ridmap"]);
    let is_dir = fs::metadata(from)?.is_dir();
    let tree = if is_id_mapped(m) {
        let maps = IdMaps {
            uids: ranges(m.uid_mappings()),
            gids: ranges(m.gid_mappings()),
        };
        mount::idmapped_clone(from, ns::user_namespace(&maps)?.as_fd(), recursive)?
    } else {
        mount::clone_tree(from, recursive)?
    };
    Ok(Copied { mount, tree, is_dir })
}

fn failed_source(m: &Mount, source: io::Error) -> StageError {
    StageError::Source {
        from: m.source().clone().unwrap_or_default(),
        destination: m.destination().clone(),
        source,
    }
}

/// Whether a rule names just this device. A privileged container has all of the host's devices, and a rule for everything.
fn is_granted(device: &LinuxDevice, rules: &[LinuxDeviceCgroup]) -> bool {
    let kind = match device.typ() {
        LinuxDeviceType::U => LinuxDeviceType::C,
        other => other,
    };
    let this = |r: &&LinuxDeviceCgroup| {
        r.typ() == Some(kind) && r.major() == Some(device.major()) && r.minor() == Some(device.minor())
    };
    rules.iter().filter(this).any(|r| r.allow())
}

/// Who owns a node says who may open it. A device that the container was given by name belongs to its users, as without a
/// user namespace; `owners` are they on the host. Any other stays the host's, so that being root in a user namespace opens
/// none of the host's disks.
fn make_node(at: &Path, device: &LinuxDevice, owners: Option<&(Vec<IdMap>, Vec<IdMap>)>) -> io::Result<()> {
    use rustix::fs::{CWD, FileType, Gid, Mode, Uid};
    let kind = match device.typ() {
        LinuxDeviceType::B => FileType::BlockDevice,
        LinuxDeviceType::P => FileType::Fifo,
        LinuxDeviceType::C | LinuxDeviceType::U => FileType::CharacterDevice,
        LinuxDeviceType::A => return Err(io::ErrorKind::InvalidInput.into()),
    };
    let number = |n: i64| u32::try_from(n).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
    let dev = rustix::fs::makedev(number(device.major())?, number(device.minor())?);
    rustix::fs::mknodat(CWD, at, kind, Mode::empty(), dev)?;
    let host = |id: Option<u32>, maps: &[IdMap]| host_id(id.unwrap_or(0), maps).or_else(|| host_id(0, maps));
    let (uid, gid) = match owners {
        Some((uids, gids)) => (host(device.uid(), uids), host(device.gid(), gids)),
        None => (Some(device.uid().unwrap_or(0)), Some(device.gid().unwrap_or(0))),
    };
    rustix::fs::chownat(
        CWD,
        at,
        uid.map(Uid::from_raw),
        gid.map(Gid::from_raw),
        rustix::fs::AtFlags::SYMLINK_NOFOLLOW,
    )?;
    let mode = device.file_mode().unwrap_or(0o666) & 0o777;
    Ok(rustix::fs::chmodat(
        CWD,
        at,
        Mode::from_raw_mode(mode),
        rustix::fs::AtFlags::empty(),
    )?)
}

fn host_id(id: u32, maps: &[IdMap]) -> Option<u32> {
    let within = |m: &&IdMap| (m.container_id..m.container_id.saturating_add(m.length)).contains(&id);
    maps.iter()
        .find(within)
        .map(|m| m.host_id.saturating_add(id - m.container_id))
}

/// In a user namespace libcontainer may not walk to where namespaces are pinned; a descriptor it may open again.
fn hold_namespaces(spec: &mut Spec) -> io::Result<Vec<OwnedFd>> {
    let mut held = Vec::new();
    let namespaces = spec
        .linux_mut()
        .as_mut()
        .and_then(|l| l.namespaces_mut().as_mut());
    for namespace in namespaces.into_iter().flatten() {
        if let Some(path) = namespace.path() {
            let fd = ns::open(path)?;
            namespace.set_path(Some(format!("/proc/self/fd/{}", fd.as_raw_fd()).into()));
            held.push(fd);
        }
    }
    Ok(held)
}

/// The paths that must not be covered.
fn needed(spec: &Spec, mounts: &[Mount], copies: &[Copied], asked: &Asked, rootfs: &Path) -> Vec<PathBuf> {
    let mut paths = vec![asked.bundle.clone(), asked.state.clone(), rootfs.to_path_buf()];
    let copied = |n: usize| copies.iter().any(|c| c.mount == n);
    let sources = mounts
        .iter()
        .enumerate()
        .filter(|(n, m)| is_bind(m) && !copied(*n));
    paths.extend(sources.filter_map(|(_, m)| m.source().clone()));
    let namespaces = spec.linux().as_ref().and_then(|l| l.namespaces().as_ref());
    paths.extend(namespaces.into_iter().flatten().filter_map(|n| n.path().clone()));
    if let Some(hooks) = spec.hooks() {
        let lists = [
            hooks.prestart(),
            hooks.create_runtime(),
            hooks.create_container(),
            hooks.start_container(),
        ];
        paths.extend(lists.into_iter().flatten().flatten().map(|h| h.path().clone()));
    }
    paths
        .into_iter()
        .map(|p| fs::canonicalize(&p).unwrap_or(p))
        .collect()
}

/// The first place that nothing which is needed lies below.
fn place(needed: &[PathBuf], own: &Path) -> Result<PathBuf, StageError> {
    let free = |place: &Path| {
        let open =
            fs::symlink_metadata(place).is_ok_and(|m| m.is_dir() && m.permissions().mode() & 0o001 != 0);
        open && !needed.iter().any(|path| path.starts_with(place))
    };
    if let Some(place) = PLACES.into_iter().map(Path::new).find(|place| free(place)) {
        return Ok(place.to_owned());
    }
    // It stays, empty, for the next one that finds no other.
    match fs::DirBuilder::new().mode(0o711).create(own) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(step(format!("make {}", own.display()))(e)),
        _ if free(own) => Ok(own.to_owned()),
        _ => Err(StageError::NoPlace),
    }
}

fn bind_view(m: &mut Mount, view: &Path) {
    let mut options = m.options().clone().unwrap_or_default();
    options.retain(|o| {
        matches!(
            o.as_str(),
            "ro" | "rw" | "nosuid" | "nodev" | "noexec" | "relatime"
        )
    });
    options.push("rbind".into());
    m.set_typ(Some("bind".into()))
        .set_source(Some(view.to_path_buf()))
        .set_options(Some(options));
}

/// Whether it has a user namespace, of its own or another's.
pub fn has_user_namespace(spec: &Spec) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|l| l.namespaces().as_ref());
    namespaces
        .into_iter()
        .flatten()
        .any(|n| n.typ() == LinuxNamespaceType::User)
}

fn is_cgroup(m: &Mount) -> bool {
    matches!(m.typ().as_deref(), Some("cgroup" | "cgroup2"))
}

/// Whether a mount shows something that is elsewhere already.
pub fn is_bind(m: &Mount) -> bool {
    m.typ().as_deref() == Some("bind") || has(m, &["bind", "rbind"])
}

fn is_id_mapped(m: &Mount) -> bool {
    m.uid_mappings().is_some() || m.gid_mappings().is_some()
}

fn has(m: &Mount, names: &[&str]) -> bool {
    m.options().iter().flatten().any(|o| names.contains(&o.as_str()))
}

fn ranges(list: &Option<Vec<LinuxIdMapping>>) -> Vec<IdMap> {
    let range = |m: &LinuxIdMapping| IdMap {
        container_id: m.container_id(),
        host_id: m.host_id(),
        length: m.size(),
    };
    list.iter().flatten().map(range).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_granted_by_a_rule_of_its_own_only() {
        let rules = |json: &str| -> Vec<LinuxDeviceCgroup> { serde_json::from_str(json).expect("rules") };
        let mut device = LinuxDevice::default();
        device.set_typ(LinuxDeviceType::C).set_major(195).set_minor(2);
        let own = r#"[{"allow":false,"access":"rwm"},{"allow":true,"type":"c","major":195,"minor":2,"access":"rw"}]"#;
        assert!(is_granted(&device, &rules(own)));
        for other in [
            r#"[{"allow":true,"type":"a","access":"rwm"}]"#,
            r#"[{"allow":true,"type":"c","major":195,"access":"rwm"}]"#,
            r#"[{"allow":true,"type":"b","major":195,"minor":2,"access":"rwm"}]"#,
            r#"[{"allow":false,"type":"c","major":195,"minor":2,"access":"rwm"}]"#,
        ] {
            assert!(!is_granted(&device, &rules(other)), "{other}");
        }
    }

    #[test]
    fn ids_are_those_of_the_host_or_none() {
        let map = |container_id, host_id, length| IdMap {
            container_id,
            host_id,
            length,
        };
        let maps = [map(0, 100_000, 1000), map(1000, 5000, 1)];
        assert_eq!(host_id(44, &maps), Some(100_044));
        assert_eq!(host_id(1000, &maps), Some(5000));
        assert_eq!(host_id(1001, &maps), None);
    }

    #[test]
    fn a_place_that_is_needed_is_left_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let own = dir.path().join("stage");
        let free = place(&[], &own).expect("a place");
        let other = place(&[free.join("data")], &own).expect("another");
        assert_ne!(free, other);
        assert!(!own.exists(), "it is not made while there are others");
        let mut all: Vec<PathBuf> = PLACES.iter().map(PathBuf::from).collect();
        for _ in 0..2 {
            assert_eq!(place(&all, &own).expect("its own"), own);
            let mode = fs::metadata(&own).expect("made").permissions().mode();
            assert_eq!(mode & 0o7777, 0o711);
        }
        all.push(own.join("data"));
        assert!(matches!(place(&all, &own), Err(StageError::NoPlace)));
    }
}
