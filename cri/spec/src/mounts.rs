//! Everything that is mounted into a container: what every container has, what was asked for, and
//! which of them wins. Whether a source exists is the caller's to know.

use std::path::{Path, PathBuf};

use oci_spec::runtime as oci;

use crate::error::SpecError;
use crate::input::{IdMap, Mount, Namespace, Propagation, SpecInput};
use crate::path::{clean_absolute, is_at_or_below};

/// Files of /proc that may be covered (LXCFS does); nothing else of it may.
const PROC_FILES: [&str; 10] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/slabinfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/sys/crypto/fips_enabled",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/uptime",
];

/// Options a request may add to a mount; they only take away or concern access times.
const EXTRA_OPTIONS: [&str; 12] = [
    "noexec",
    "nosuid",
    "nodev",
    "exec",
    "suid",
    "dev",
    "noatime",
    "atime",
    "nodiratime",
    "relatime",
    "strictatime",
    "nosymfollow",
];

/// All mounts, in the order they are to be made, and how the root propagates.
pub(crate) fn mounts(input: &SpecInput) -> Result<(Vec<oci::Mount>, Option<String>), SpecError> {
    let asked = input
        .mounts
        .iter()
        .map(|m| asked_mount(m, input))
        .collect::<Result<Vec<_>, _>>()?;
    let mut all = default_mounts(input);
    all.extend(pod_files(input));
    // The caller's mounts replace the defaults at the same place, and those below a /dev or /sys
    // of the caller's own.
    all.retain(|default| {
        !asked.iter().any(|(at, _)| {
            let place = default.destination().to_string_lossy();
            *at == place || (matches!(at.as_str(), "/dev" | "/sys") && is_at_or_below(&place, at))
        })
    });
    for (at, mount) in asked {
        // Of two mounts at one place the later one stays.
        all.retain(|m| m.destination() != Path::new(&at));
        all.push(mount);
    }
    all.sort_by_key(|m| m.destination().components().count());
    Ok((all, root_propagation(&input.mounts)))
}

/// Anonymous volumes of the image that no mount covers: the caller makes a directory for each, and
/// adds a mount of it to [`SpecInput::mounts`].
///
/// # Errors
/// A volume that is not an absolute path, or has a `..` component (CVE-2022-23648).
pub fn volumes(image: &crate::ImageDefaults, mounts: &[Mount]) -> Result<Vec<PathBuf>, SpecError> {
    let taken: Vec<String> = mounts
        .iter()
        .filter_map(|m| clean_absolute("mounts", &m.container_path).ok())
        .collect();
    let mut found = Vec::new();
    for volume in &image.volumes {
        let at = destination("volumes", volume)?;
        if !taken.contains(&at) && !found.contains(&PathBuf::from(&at)) {
            found.push(PathBuf::from(at));
        }
    }
    Ok(found)
}

/// Where a mount may go.
fn destination(field: &'static str, text: &str) -> Result<String, SpecError> {
    let at = clean_absolute(field, text)?;
    if at == "/" {
        return Err(SpecError::invalid(field, text, "is the root itself"));
    }
    if is_at_or_below(&at, "/proc") && !PROC_FILES.contains(&at.as_str()) {
        return Err(SpecError::invalid(field, text, "lies in /proc"));
    }
    Ok(at)
}

fn asked_mount(mount: &Mount, input: &SpecInput) -> Result<(String, oci::Mount), SpecError> {
    let at = destination("mounts.container_path", &mount.container_path)?;
    let source = mount.host_path.to_str().unwrap_or("");
    if !mount.host_path.is_absolute() || source.is_empty() || source.contains('\0') {
        let shown = mount.host_path.to_string_lossy();
        return Err(SpecError::invalid(
            "mounts.host_path",
            shown,
            "is not an absolute path of text",
        ));
    }
    let mut options = vec!["rbind".to_owned(), propagation(mount.propagation).to_owned()];
    if mount.recursive_read_only {
        recursively_read_only(mount, input)?;
        options.push("rro".to_owned());
    } else {
        options.push(if mount.readonly { "ro" } else { "rw" }.to_owned());
    }
    for option in &mount.options {
        if !EXTRA_OPTIONS.contains(&option.as_str()) {
            return Err(SpecError::invalid(
                "mounts.mount_options",
                option.as_str(),
                "is not an option that can be asked for",
            ));
        }
        options.push(option.clone());
    }
    let mut new = bind(&at, source.into(), options);
    if mount.uid_mappings.is_empty() != mount.gid_mappings.is_empty() {
        return Err(SpecError::invalid(
            "mounts.uid_mappings",
            at,
            "has a map of users or of groups alone",
        ));
    }
    if !mount.uid_mappings.is_empty() {
        new.set_uid_mappings(Some(id_maps("mounts.uid_mappings", &mount.uid_mappings)?));
        new.set_gid_mappings(Some(id_maps("mounts.gid_mappings", &mount.gid_mappings)?));
    }
    Ok((at, new))
}

/// CRI: recursive_read_only needs readonly and private propagation; the kernel needs
/// mount_setattr's AT_RECURSIVE.
fn recursively_read_only(mount: &Mount, input: &SpecInput) -> Result<(), SpecError> {
    let at = mount.container_path.as_str();
    let field = "mounts.recursive_read_only";
    if !mount.readonly {
        return Err(SpecError::invalid(field, at, "needs readonly"));
    }
    if mount.propagation != Propagation::Private {
        return Err(SpecError::invalid(field, at, "needs private propagation"));
    }
    if input.host.kernel < (5, 12) {
        return Err(SpecError::Unsupported {
            field,
            value: at.to_owned(),
            reason: "the kernel is older than 5.12",
        });
    }
    Ok(())
}

fn propagation(p: Propagation) -> &'static str {
    match p {
        Propagation::Private => "rprivate",
        Propagation::HostToContainer => "rslave",
        Propagation::Bidirectional => "rshared",
    }
}

/// The root must let through what its mounts let through. Without the `r` that mount options have:
/// libcontainer takes these words only.
fn root_propagation(mounts: &[Mount]) -> Option<String> {
    let any = |p| mounts.iter().any(|m| m.propagation == p);
    if any(Propagation::Bidirectional) {
        Some("shared".to_owned())
    } else {
        any(Propagation::HostToContainer).then(|| "slave".to_owned())
    }
}

/// Checks and converts a map of ids.
pub(crate) fn id_maps(field: &'static str, maps: &[IdMap]) -> Result<Vec<oci::LinuxIdMapping>, SpecError> {
    maps.iter()
        .map(|m| {
            let shown = || format!("{}:{}:{}", m.container, m.host, m.length);
            if m.length == 0 {
                return Err(SpecError::invalid(field, shown(), "is an empty range"));
            }
            if m.container.checked_add(m.length - 1).is_none() || m.host.checked_add(m.length - 1).is_none() {
                return Err(SpecError::invalid(field, shown(), "goes beyond the largest id"));
            }
            let map = oci::LinuxIdMappingBuilder::default()
                .container_id(m.container)
                .host_id(m.host)
                .size(m.length);
            Ok(map.build().expect("all fields are set"))
        })
        .collect()
}

fn mount(at: &str, kind: &str, source: &str, options: &[&str]) -> oci::Mount {
    let mut new = oci::Mount::default();
    new.set_destination(PathBuf::from(at));
    new.set_typ(Some(kind.to_owned()));
    new.set_source(Some(PathBuf::from(source)));
    new.set_options(Some(options.iter().map(|o| (*o).to_owned()).collect()));
    new
}

fn bind(at: &str, source: PathBuf, options: Vec<String>) -> oci::Mount {
    let mut new = mount(at, "bind", "", &[]);
    new.set_source(Some(source));
    new.set_options(Some(options));
    new
}

/// What every container has. In a user namespace, file systems of a namespace that is still the
/// host's cannot be mounted: the host's own are bound instead.
fn default_mounts(input: &SpecInput) -> Vec<oci::Mount> {
    let userns = input.namespaces.user.is_some();
    let foreign = |n: &Namespace| userns && *n == Namespace::Host;
    let access = if input.privileged { "rw" } else { "ro" };
    let mut pts = vec!["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"];
    if maps_gid_5(input) {
        pts.push("gid=5");
    }
    // What is mounted below comes along, for it is locked to what it lies in (mount_namespaces(7)); without these, as the host
    // has it.
    let locked = [
        "rbind", "rprivate", "nosuid", "noexec", "nodev", "rnosuid", "rnoexec", "rnodev",
    ];
    let mut all = vec![
        if foreign(&input.namespaces.pid) {
            mount("/proc", "bind", "/proc", &locked)
        } else {
            mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"])
        },
        mount(
            "/dev",
            "tmpfs",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        mount("/dev/pts", "devpts", "devpts", &pts),
        if foreign(&input.namespaces.ipc) {
            mount("/dev/mqueue", "bind", "/dev/mqueue", &locked)
        } else {
            mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"])
        },
        if foreign(&input.namespaces.network) {
            let mut options = locked.to_vec();
            options.push(access);
            options.extend((!input.privileged).then_some("rro"));
            mount("/sys", "bind", "/sys", &options)
        } else {
            mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", access])
        },
        mount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", access],
        ),
    ];
    all.push(match &input.shm {
        Some(shm) => bind(
            "/dev/shm",
            shm.clone(),
            ["rbind", "rprivate", "nosuid", "noexec", "nodev", "rw"]
                .map(str::to_owned)
                .into(),
        ),
        None => mount(
            "/dev/shm",
            "tmpfs",
            "shm",
            &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
        ),
    });
    all
}

/// Terminals belong to group 5 (tty) where the user namespace has one.
fn maps_gid_5(input: &SpecInput) -> bool {
    let covers = |m: &IdMap| m.container <= 5 && 5 - m.container < m.length;
    input
        .namespaces
        .user
        .as_ref()
        .is_none_or(|u| u.gids.iter().any(covers))
}

fn pod_files(input: &SpecInput) -> Vec<oci::Mount> {
    let files = &input.pod_files;
    let access = if input.readonly_rootfs { "ro" } else { "rw" };
    [
        ("/etc/resolv.conf", &files.resolv_conf),
        ("/etc/hosts", &files.hosts),
        ("/etc/hostname", &files.hostname),
    ]
    .into_iter()
    .filter_map(|(at, source)| {
        let options = ["rbind", "rprivate", access].map(str::to_owned).into();
        Some(bind(at, source.clone()?, options))
    })
    .collect()
}

/// How the file system that holds `path` propagates, from /proc/self/mountinfo; `None` when no
/// mount holds it. A mount that is to propagate needs a source that does: callers check it with
/// [`check_propagation`] before they create.
fn shared_or_slave(mountinfo: &str, path: &Path) -> Option<(bool, bool)> {
    let mut best: Option<(usize, (bool, bool))> = None;
    for line in mountinfo.lines() {
        let Some((left, _)) = line.split_once(" - ") else {
            continue;
        };
        let mut fields = left.split(' ');
        let Some(point) = fields.nth(4).map(unescape) else {
            continue;
        };
        let point = PathBuf::from(point);
        if path.starts_with(&point) {
            let tags: Vec<&str> = fields.skip(1).collect();
            let has = |p: &str| tags.iter().any(|t| t.starts_with(p));
            let length = point.components().count();
            // Of two mounts at one place the later line is on top.
            if best.is_none_or(|(l, _)| length >= l) {
                best = Some((length, (has("shared:"), has("master:"))));
            }
        }
    }
    best.map(|(_, tags)| tags)
}

/// Octal escapes of mountinfo.
fn unescape(field: &str) -> String {
    field
        .replace("\\040", " ")
        .replace("\\011", "\t")
        .replace("\\012", "\n")
        .replace("\\134", "\\")
}

/// Checks that a mount that is to propagate has a source that can, given /proc/self/mountinfo and
/// real (symlink-free) host paths.
///
/// # Errors
/// The mount whose source is private, or not shared where it must be.
pub fn check_propagation(mountinfo: &str, mounts: &[Mount]) -> Result<(), SpecError> {
    for mount in mounts.iter().filter(|m| m.propagation != Propagation::Private) {
        let (shared, slave) = shared_or_slave(mountinfo, &mount.host_path).unwrap_or_default();
        let enough = shared || (slave && mount.propagation == Propagation::HostToContainer);
        if !enough {
            let reason = match mount.propagation {
                Propagation::Bidirectional => "is not on a shared mount (mount --make-rshared makes it so)",
                _ => "is on a mount that is neither shared nor slave (mount --make-rshared makes it so)",
            };
            let shown = mount.host_path.to_string_lossy();
            return Err(SpecError::invalid("mounts.propagation", shown, reason));
        }
    }
    Ok(())
}
