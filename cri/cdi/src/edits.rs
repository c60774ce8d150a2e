//! How a container's edits change its OCI specification, and what has to be known of the host
//! before they can. Pure: device nodes are looked up by a function of the caller's.

use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime as oci;

use crate::types::{ContainerEdits, DeviceEdit, DeviceKind, DeviceNode, Hook, IntelRdt, Mount};

/// Why edits cannot be applied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EditError {
    /// The host does not have a device node.
    #[error("look up device node {host_path} (for {path} in the container)")]
    Lookup {
        /// On the host.
        host_path: PathBuf,
        /// In the container.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The host has another kind of device node.
    #[error("device node {host_path} is of another type than the {kind:?} that the CDI file says")]
    OtherKind {
        /// On the host.
        host_path: PathBuf,
        /// As the file says.
        kind: String,
    },
    /// Applied before it was completed.
    #[error("device node {0} has no type or number")]
    Incomplete(String),
    /// A moment that OCI does not know.
    #[error("{0:?} is not the name of an OCI hook")]
    UnknownHook(String),
}

impl ContainerEdits {
    /// Fills in what device nodes leave out, from the host.
    ///
    /// # Errors
    /// A node that the host lacks and the file does not fully describe, or of another type.
    pub fn complete(&mut self, lookup: &dyn Fn(&Path) -> io::Result<DeviceNode>) -> Result<(), EditError> {
        self.device_nodes
            .iter_mut()
            .try_for_each(|node| complete(node, lookup))
    }

    /// Applies completed edits to a specification whose user, mounts and devices are in place.
    ///
    /// What replaces what: an environment variable one of the same name, a device node or mount one
    /// at the same path. Mounts are sorted by depth afterwards.
    ///
    /// # Errors
    /// A device node without type or numbers ([`ContainerEdits::complete`] was not called), or a
    /// hook that OCI does not know.
    pub fn apply(&self, spec: &mut oci::Spec) -> Result<(), EditError> {
        self.apply_env(spec);
        for node in &self.device_nodes {
            apply_device(node, spec)?;
        }
        self.apply_net_devices(spec);
        self.apply_mounts(spec);
        for hook in &self.hooks {
            apply_hook(hook, spec)?;
        }
        if let Some(rdt) = &self.intel_rdt {
            linux(spec).set_intel_rdt(Some(intel_rdt(rdt)));
        }
        self.apply_gids(spec);
        Ok(())
    }

    fn apply_env(&self, spec: &mut oci::Spec) {
        if self.env.is_empty() {
            return;
        }
        let process = spec.process_mut().get_or_insert_default();
        let env = process.env_mut().get_or_insert_default();
        for entry in &self.env {
            let name = entry.split('=').next().unwrap_or(entry);
            match env.iter_mut().find(|e| e.split('=').next() == Some(name)) {
                Some(old) => old.clone_from(entry),
                None => env.push(entry.clone()),
            }
        }
    }

    fn apply_net_devices(&self, spec: &mut oci::Spec) {
        for dev in &self.net_devices {
            let mut to = oci::LinuxNetDevice::default();
            to.set_name(Some(dev.name.clone()));
            linux(spec)
                .net_devices_mut()
                .get_or_insert_default()
                .insert(dev.host_interface_name.clone(), to);
        }
    }

    fn apply_mounts(&self, spec: &mut oci::Spec) {
        if self.mounts.is_empty() {
            return;
        }
        let maps = spec
            .linux()
            .as_ref()
            .and_then(|l| Some((l.uid_mappings().clone()?, l.gid_mappings().clone()?)));
        let mounts = spec.mounts_mut().get_or_insert_default();
        for mount in &self.mounts {
            let mut new = oci_mount(mount);
            if let Some((uids, gids)) = &maps
                && new.typ().as_deref() == Some("bind")
            {
                new.set_uid_mappings(Some(uids.clone()));
                new.set_gid_mappings(Some(gids.clone()));
            }
            mounts.retain(|m| m.destination() != new.destination());
            mounts.push(new);
        }
        mounts.sort_by_key(|m| depth(m.destination()));
    }

    fn apply_gids(&self, spec: &mut oci::Spec) {
        let process = spec.process_mut().get_or_insert_default();
        for gid in self.additional_gids.iter().filter(|g| **g != 0) {
            let gids = process.user_mut().additional_gids_mut().get_or_insert_default();
            if !gids.contains(gid) {
                gids.push(*gid);
            }
        }
    }
}

/// Number of components: `/` is 0, `/a/b` is 2.
fn depth(path: &Path) -> usize {
    path.components()
        .filter(|c| matches!(c, std::path::Component::Normal(_)))
        .count()
}

fn linux(spec: &mut oci::Spec) -> &mut oci::Linux {
    spec.linux_mut().get_or_insert_default()
}

fn kind_letter(kind: DeviceKind) -> &'static str {
    match kind {
        DeviceKind::Block => "b",
        DeviceKind::Char => "c",
        DeviceKind::Fifo => "p",
    }
}

fn complete(
    node: &mut DeviceEdit,
    lookup: &dyn Fn(&Path) -> io::Result<DeviceNode>,
) -> Result<(), EditError> {
    let host_path = PathBuf::from(if node.host_path.is_empty() {
        &node.path
    } else {
        &node.host_path
    });
    let described = !node.kind.is_empty() && (node.major != 0 || node.kind == "p");
    let found = match lookup(&host_path) {
        Ok(found) => found,
        // The file says all that is needed: the node need not exist on the host.
        Err(_) if described => return Ok(()),
        Err(source) => {
            return Err(EditError::Lookup {
                host_path,
                path: node.path.clone(),
                source,
            });
        }
    };
    if node.file_mode.is_none() {
        node.file_mode = Some(found.mode);
    }
    if described {
        return Ok(());
    }
    let kind = kind_letter(found.kind);
    let same = node.kind.is_empty() || node.kind == kind || (node.kind == "u" && kind == "c");
    if !same {
        return Err(EditError::OtherKind {
            host_path,
            kind: node.kind.clone(),
        });
    }
    if node.kind.is_empty() {
        kind.clone_into(&mut node.kind);
    }
    if node.kind != "p" {
        node.major = i64::from(found.major);
        node.minor = i64::from(found.minor);
    }
    Ok(())
}

fn apply_device(node: &DeviceEdit, spec: &mut oci::Spec) -> Result<(), EditError> {
    let typ = match node.kind.as_str() {
        "b" => oci::LinuxDeviceType::B,
        "c" => oci::LinuxDeviceType::C,
        "u" => oci::LinuxDeviceType::U,
        "p" => oci::LinuxDeviceType::P,
        _ => return Err(EditError::Incomplete(node.path.clone())),
    };
    let owner = spec
        .process()
        .as_ref()
        .map(|p| (p.user().uid(), p.user().gid()))
        .unwrap_or_default();
    let mut device = oci::LinuxDevice::default();
    device.set_path(PathBuf::from(&node.path));
    device.set_typ(typ);
    device.set_major(node.major);
    device.set_minor(node.minor);
    device.set_file_mode(node.file_mode.map(|m| m & 0o7777));
    device.set_uid(node.uid.or((owner.0 > 0).then_some(owner.0)));
    device.set_gid(node.gid.or((owner.1 > 0).then_some(owner.1)));

    let devices = linux(spec).devices_mut().get_or_insert_default();
    devices.retain(|d| d.path() != device.path());
    devices.push(device);

    let access = match node.permissions.as_str() {
        "" => "rwm",
        "none" => return Ok(()),
        given => given,
    };
    // A `u` is an unbuffered character device: the device cgroup knows only `c`.
    let rule = match typ {
        oci::LinuxDeviceType::B => oci::LinuxDeviceType::B,
        oci::LinuxDeviceType::C | oci::LinuxDeviceType::U => oci::LinuxDeviceType::C,
        _ => return Ok(()),
    };
    let mut allow = oci::LinuxDeviceCgroup::default();
    allow.set_allow(true);
    allow.set_typ(Some(rule));
    allow.set_major(Some(node.major));
    allow.set_minor(Some(node.minor));
    allow.set_access(Some(access.to_owned()));
    let resources = linux(spec).resources_mut().get_or_insert_default();
    resources.devices_mut().get_or_insert_default().push(allow);
    Ok(())
}

fn oci_mount(mount: &Mount) -> oci::Mount {
    let mut options = mount.options.clone();
    let bind = mount.kind.is_empty() || mount.kind == "bind" || mount.kind == "none";
    if bind && !options.iter().any(|o| o == "bind" || o == "rbind") {
        options.insert(0, "bind".to_owned());
    }
    let mut new = oci::Mount::default();
    new.set_destination(PathBuf::from(&mount.container_path));
    new.set_source(Some(PathBuf::from(&mount.host_path)));
    new.set_typ(Some(if bind {
        "bind".to_owned()
    } else {
        mount.kind.clone()
    }));
    new.set_options(Some(options));
    new
}

/// The names of the moments, as OCI and CDI spell them.
pub(crate) const HOOK_NAMES: [&str; 6] = [
    "prestart",
    "createRuntime",
    "createContainer",
    "startContainer",
    "poststart",
    "poststop",
];

#[allow(deprecated, reason = "CDI files still name prestart hooks")]
fn apply_hook(hook: &Hook, spec: &mut oci::Spec) -> Result<(), EditError> {
    let mut new = oci::Hook::default();
    new.set_path(PathBuf::from(&hook.path));
    new.set_args((!hook.args.is_empty()).then(|| hook.args.clone()));
    // Always set: an absent environment would mean the runtime's own, or the container's
    // (CVE-2025-23266).
    new.set_env(Some(hook.env.clone()));
    new.set_timeout(hook.timeout);
    let hooks = spec.hooks_mut().get_or_insert_default();
    let list = match hook.hook_name.as_str() {
        "prestart" => hooks.prestart_mut(),
        "createRuntime" => hooks.create_runtime_mut(),
        "createContainer" => hooks.create_container_mut(),
        "startContainer" => hooks.start_container_mut(),
        "poststart" => hooks.poststart_mut(),
        "poststop" => hooks.poststop_mut(),
        other => return Err(EditError::UnknownHook(other.to_owned())),
    };
    list.get_or_insert_default().push(new);
    Ok(())
}

#[allow(
    deprecated,
    reason = "CDI files before 1.1.0 still say enableCMT and enableMBM"
)]
fn intel_rdt(rdt: &IntelRdt) -> oci::LinuxIntelRdt {
    let some = |s: &String| (!s.is_empty()).then(|| s.clone());
    let mut new = oci::LinuxIntelRdt::default();
    new.set_clos_id(some(&rdt.clos_id));
    new.set_l3_cache_schema(some(&rdt.l3_cache_schema));
    new.set_mem_bw_schema(some(&rdt.mem_bw_schema));
    new.set_schemata((!rdt.schemata.is_empty()).then(|| rdt.schemata.clone()));
    let monitoring = rdt.enable_monitoring || rdt.enable_cmt || rdt.enable_mbm;
    new.set_enable_monitoring(monitoring.then_some(true));
    new
}

#[cfg(test)]
mod tests;
