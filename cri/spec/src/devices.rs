//! Device nodes a container has and the rules of its device cgroup.

use std::path::{Path, PathBuf};

use oci_spec::runtime as oci;
use slipway_cdi::DeviceKind;

use crate::error::SpecError;
use crate::input::{Device, SpecInput};
use crate::path::{clean_absolute, is_at_or_below};

/// What the runtime itself makes in every container: null, zero, full, random, urandom, tty,
/// console, ptmx, and the terminals below pts.
const EVERYWHERE: [(i64, Option<i64>); 9] = [
    (1, Some(3)),
    (1, Some(5)),
    (1, Some(7)),
    (1, Some(8)),
    (1, Some(9)),
    (5, Some(0)),
    (5, Some(1)),
    (5, Some(2)),
    (136, None),
];

/// The nodes to make and the rules, complete: nothing has to be added to them.
pub(crate) fn devices(
    input: &SpecInput,
) -> Result<(Vec<oci::LinuxDevice>, Vec<oci::LinuxDeviceCgroup>), SpecError> {
    let mut nodes: Vec<oci::LinuxDevice> = Vec::new();
    let mut rules = Vec::new();
    if input.privileged {
        rules.push(rule(true, oci::LinuxDeviceType::A, None, None, "rwm"));
    } else {
        rules.push(rule(false, oci::LinuxDeviceType::A, None, None, "rwm"));
        // Making nodes is harmless where opening them is not allowed.
        rules.push(rule(true, oci::LinuxDeviceType::C, None, None, "m"));
        rules.push(rule(true, oci::LinuxDeviceType::B, None, None, "m"));
        for (major, minor) in EVERYWHERE {
            rules.push(rule(true, oci::LinuxDeviceType::C, Some(major), minor, "rwm"));
        }
    }
    let host: &[Device] = if input.privileged {
        &input.host_devices
    } else {
        &[]
    };
    for device in host.iter().chain(&input.devices) {
        let at = place(device)?;
        let permissions = permissions(device)?;
        let node = node(&at, device);
        if !input.privileged && device.node.kind != DeviceKind::Fifo {
            rules.push(rule(
                true,
                node.typ(),
                Some(node.major()),
                Some(node.minor()),
                permissions,
            ));
        }
        nodes.retain(|n| n.path() != Path::new(&at));
        nodes.push(node);
    }
    Ok((nodes, rules))
}

fn place(device: &Device) -> Result<String, SpecError> {
    let field = "devices.container_path";
    let at = clean_absolute(field, &device.container_path)?;
    if at == "/" || is_at_or_below(&at, "/proc") || is_at_or_below(&at, "/sys") {
        return Err(SpecError::invalid(field, at, "is no place for a device node"));
    }
    Ok(at)
}

fn permissions(device: &Device) -> Result<&str, SpecError> {
    let asked = device.permissions.as_str();
    if asked.chars().any(|c| !"rwm".contains(c)) {
        return Err(SpecError::invalid(
            "devices.permissions",
            asked,
            "has others than r, w, m",
        ));
    }
    Ok(if asked.is_empty() { "rwm" } else { asked })
}

fn node(at: &str, device: &Device) -> oci::LinuxDevice {
    let mut node = oci::LinuxDevice::default();
    node.set_path(PathBuf::from(at));
    node.set_typ(match device.node.kind {
        DeviceKind::Block => oci::LinuxDeviceType::B,
        DeviceKind::Char => oci::LinuxDeviceType::C,
        DeviceKind::Fifo => oci::LinuxDeviceType::P,
    });
    node.set_major(i64::from(device.node.major));
    node.set_minor(i64::from(device.node.minor));
    node.set_file_mode(Some(device.node.mode & 0o7777));
    node.set_uid(Some(device.node.uid));
    node.set_gid(Some(device.node.gid));
    node
}

fn rule(
    allow: bool,
    kind: oci::LinuxDeviceType,
    major: Option<i64>,
    minor: Option<i64>,
    access: &str,
) -> oci::LinuxDeviceCgroup {
    let mut rule = oci::LinuxDeviceCgroup::default();
    rule.set_allow(allow);
    rule.set_typ(Some(kind));
    rule.set_major(major);
    rule.set_minor(minor);
    rule.set_access(Some(access.to_owned()));
    rule
}
