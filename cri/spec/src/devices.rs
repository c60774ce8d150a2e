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
    let mut rules = if input.privileged {
        vec![rule(true, oci::LinuxDeviceType::A, None, None, "rwm")]
    } else {
        general_rules()
    };
    // Of two devices at one place the later one stays, with its rule.
    let mut placed: Vec<(oci::LinuxDevice, Option<oci::LinuxDeviceCgroup>)> = Vec::new();
    let host: &[Device] = if input.privileged {
        &input.host_devices
    } else {
        &[]
    };
    let host = host.iter().map(|device| (device, false));
    let asked = input.devices.iter().map(|device| (device, true));
    for (device, asked) in host.chain(asked) {
        let at = place(device)?;
        let permissions = permissions(device)?;
        let node = node(&at, device);
        // Also where everything is allowed: in a user namespace a device belongs to the container when a rule names it.
        let ruled = asked && device.node.kind != DeviceKind::Fifo;
        let allow = ruled.then(|| {
            rule(
                true,
                node.typ(),
                Some(node.major()),
                Some(node.minor()),
                permissions,
            )
        });
        placed.retain(|(n, _)| n.path() != Path::new(&at));
        placed.push((node, allow));
    }
    let (nodes, allowed): (Vec<_>, Vec<_>) = placed.into_iter().unzip();
    rules.extend(allowed.into_iter().flatten());
    Ok((nodes, rules))
}

/// Nothing but what every container has. Making nodes is harmless where opening them is not
/// allowed.
fn general_rules() -> Vec<oci::LinuxDeviceCgroup> {
    let mut rules = vec![
        rule(false, oci::LinuxDeviceType::A, None, None, "rwm"),
        rule(true, oci::LinuxDeviceType::C, None, None, "m"),
        rule(true, oci::LinuxDeviceType::B, None, None, "m"),
    ];
    let everywhere = EVERYWHERE.iter();
    rules.extend(everywhere.map(|(a, b)| rule(true, oci::LinuxDeviceType::C, Some(*a), *b, "rwm")));
    rules
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

#[cfg(test)]
mod tests {
    use super::*;
    use slipway_cdi::DeviceNode;

    fn device(at: &str, minor: u32) -> Device {
        Device {
            container_path: at.to_owned(),
            permissions: "r".to_owned(),
            node: DeviceNode {
                kind: DeviceKind::Char,
                major: 10,
                minor,
                mode: 0o660,
                uid: 0,
                gid: 0,
            },
        }
    }

    #[test]
    fn a_device_that_is_asked_for_has_a_rule_of_its_own_also_where_everything_is_allowed() {
        let input = SpecInput {
            privileged: true,
            host_devices: vec![device("/dev/fuse", 229), device("/dev/kvm", 232)],
            devices: vec![device("/dev/mine", 200), device("/dev/kvm", 232)],
            ..SpecInput::default()
        };
        let (nodes, rules) = devices(&input).expect("devices");
        assert_eq!(nodes.len(), 3);
        assert_eq!(rules[0].typ(), Some(oci::LinuxDeviceType::A));
        let named: Vec<_> = rules[1..].iter().map(|r| (r.allow(), r.minor())).collect();
        assert_eq!(named, [(true, Some(200)), (true, Some(232))]);
    }
}
