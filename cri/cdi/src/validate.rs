//! Which CDI files are valid: versions and the fields they allow, names, and edits that make sense.

use std::collections::{BTreeMap, HashSet};

use crate::edits::HOOK_NAMES;
use crate::name::{self, NameError};
use crate::types::{ContainerEdits, Spec};

/// Versions of the CDI specification, oldest first; the newest is what we know.
const VERSIONS: [&str; 10] = [
    "0.1.0", "0.2.0", "0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0",
];

/// Limits of Kubernetes' annotations, which CDI takes over.
const MAX_ANNOTATIONS: usize = 256 << 10;

/// Why a file is not valid.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ValidationError {
    /// A version that is none.
    #[error("cdiVersion {0:?} is not a version of the CDI specification (known: 0.1.0 to 1.1.0)")]
    UnknownVersion(String),
    /// Fields that the version does not have yet.
    #[error("cdiVersion {version} does not have {field}, which needs {needs}")]
    TooOld {
        /// As the file says.
        version: String,
        /// What it uses.
        field: &'static str,
        /// Since when that exists.
        needs: &'static str,
    },
    /// A bad kind or device name.
    #[error("bad name")]
    Name(#[from] NameError),
    /// The same device twice.
    #[error("device {0:?} is there twice")]
    Duplicate(String),
    /// A file without devices.
    #[error("there are no devices")]
    NoDevices,
    /// A device that changes nothing.
    #[error("device {0:?} has no edits")]
    EmptyDevice(String),
    /// An edit that makes no sense.
    #[error("{place}: {what} {value:?} {reason}")]
    Edit {
        /// `containerEdits`, or the device's name.
        place: String,
        /// Which edit.
        what: &'static str,
        /// Its value.
        value: String,
        /// What is wrong.
        reason: &'static str,
    },
}

impl Spec {
    /// Checks the file as a whole.
    ///
    /// # Errors
    /// The first thing found wrong.
    pub fn validate(&self) -> Result<(), ValidationError> {
        self.validate_version()?;
        name::check_kind(&self.kind)?;
        check_annotations("annotations", &self.annotations)?;
        check_edits("containerEdits", &self.container_edits)?;
        let mut seen = HashSet::new();
        for device in &self.devices {
            name::check_device(&device.name)?;
            if !seen.insert(&device.name) {
                return Err(ValidationError::Duplicate(device.name.clone()));
            }
            if device.container_edits.is_empty() {
                return Err(ValidationError::EmptyDevice(device.name.clone()));
            }
            check_annotations(&device.name, &device.annotations)?;
            check_edits(&device.name, &device.container_edits)?;
        }
        if self.devices.is_empty() {
            Err(ValidationError::NoDevices)
        } else {
            Ok(())
        }
    }

    /// The oldest version that has everything this file uses, and what it is that needs it.
    pub fn minimum_version(&self) -> (&'static str, &'static str) {
        let all: Vec<&ContainerEdits> = self
            .devices
            .iter()
            .map(|d| &d.container_edits)
            .chain([&self.container_edits])
            .collect();
        let any = |f: fn(&ContainerEdits) -> bool| all.iter().any(|e| f(e));
        let rdt_11 = |e: &ContainerEdits| {
            e.intel_rdt
                .as_ref()
                .is_some_and(|r| !r.schemata.is_empty() || r.enable_monitoring)
        };
        let class_dot = self
            .kind
            .split_once('/')
            .is_some_and(|(_, class)| class.contains('.'));
        let digit = self
            .devices
            .iter()
            .any(|d| d.name.starts_with(|c: char| c.is_ascii_digit()));
        let noted = !self.annotations.is_empty() || self.devices.iter().any(|d| !d.annotations.is_empty());
        let needs = [
            (any(|e| !e.net_devices.is_empty()), "1.1.0", "netDevices"),
            (any(rdt_11), "1.1.0", "intelRdt.schemata or enableMonitoring"),
            (any(|e| e.intel_rdt.is_some()), "0.7.0", "intelRdt"),
            (any(|e| !e.additional_gids.is_empty()), "0.7.0", "additionalGids"),
            (noted, "0.6.0", "annotations"),
            (class_dot, "0.6.0", "a class with a dot"),
            (digit, "0.5.0", "a device name that begins with a digit"),
            (
                any(|e| e.device_nodes.iter().any(|n| !n.host_path.is_empty())),
                "0.5.0",
                "deviceNodes.hostPath",
            ),
            (
                any(|e| e.mounts.iter().any(|m| !m.kind.is_empty())),
                "0.4.0",
                "mounts.type",
            ),
        ];
        needs
            .iter()
            .find(|(used, ..)| *used)
            .map_or(("0.3.0", "devices"), |(_, version, field)| (version, field))
    }

    fn validate_version(&self) -> Result<(), ValidationError> {
        let place = |v: &str| VERSIONS.iter().position(|known| *known == v);
        let version = self.cdi_version.strip_prefix('v').unwrap_or(&self.cdi_version);
        let Some(have) = place(version) else {
            return Err(ValidationError::UnknownVersion(self.cdi_version.clone()));
        };
        let (needs, field) = self.minimum_version();
        if place(needs) > Some(have.max(2)) {
            return Err(ValidationError::TooOld {
                version: version.to_owned(),
                field,
                needs,
            });
        }
        Ok(())
    }
}

fn check_annotations(place: &str, annotations: &BTreeMap<String, String>) -> Result<(), ValidationError> {
    let error = |value: &str, reason| Err(edit_error(place, "annotation", value, reason));
    let size: usize = annotations.iter().map(|(k, v)| k.len() + v.len()).sum();
    if size > MAX_ANNOTATIONS {
        return error("…", "makes the annotations larger than 256 KiB");
    }
    for key in annotations.keys() {
        let (prefix, name) = key.rsplit_once('/').unwrap_or(("x", key));
        let sound = |s: &str, max: usize| {
            (1..=max).contains(&s.len())
                && s.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
                && s.starts_with(|c: char| c.is_ascii_alphanumeric())
                && s.ends_with(|c: char| c.is_ascii_alphanumeric())
        };
        if !sound(prefix, 253) || !sound(name, 63) {
            return error(key, "is not a qualified name");
        }
    }
    Ok(())
}

fn edit_error(place: &str, what: &'static str, value: &str, reason: &'static str) -> ValidationError {
    ValidationError::Edit {
        place: place.to_owned(),
        what,
        value: value.to_owned(),
        reason,
    }
}

fn check_edits(place: &str, edits: &ContainerEdits) -> Result<(), ValidationError> {
    let error = |what, value: &str, reason| Err(edit_error(place, what, value, reason));
    let bad_env = |e: &&String| e.find('=').is_none_or(|at| at == 0) || e.contains('\0');
    if let Some(bad) = edits.env.iter().find(bad_env) {
        return error(
            "env",
            bad.split('=').next().unwrap_or(""),
            "is not of the form NAME=value",
        );
    }
    for node in &edits.device_nodes {
        if !is_clean_absolute(&node.path) {
            return error(
                "deviceNodes.path",
                &node.path,
                "is not an absolute path without .. below the root",
            );
        }
        if !node.host_path.is_empty() && !node.host_path.starts_with('/') {
            return error("deviceNodes.hostPath", &node.host_path, "is not absolute");
        }
        if !matches!(node.kind.as_str(), "" | "b" | "c" | "u" | "p") {
            return error("deviceNodes.type", &node.kind, "is none of b, c, u, p");
        }
        if node.permissions != "none" && node.permissions.chars().any(|c| !"rwm".contains(c)) {
            return error(
                "deviceNodes.permissions",
                &node.permissions,
                "has others than r, w, m",
            );
        }
        let range = 0..=i64::from(u32::MAX);
        if !range.contains(&node.major) || !range.contains(&node.minor) {
            return error("deviceNodes.major/minor", &node.path, "has a number out of range");
        }
    }
    for mount in &edits.mounts {
        if mount.host_path.is_empty() {
            return error("mounts.hostPath", &mount.container_path, "has an empty host path");
        }
        // Sources of other file systems ("tmpfs") are only names.
        let bind = matches!(mount.kind.as_str(), "" | "bind" | "none")
            || mount.options.iter().any(|o| o == "bind" || o == "rbind");
        if bind && (!mount.host_path.starts_with('/') || mount.host_path.contains('\0')) {
            return error("mounts.hostPath", &mount.host_path, "is not absolute");
        }
        if !is_clean_absolute(&mount.container_path) {
            return error(
                "mounts.containerPath",
                &mount.container_path,
                "is not an absolute path without .. below the root",
            );
        }
    }
    for hook in &edits.hooks {
        if !HOOK_NAMES.contains(&hook.hook_name.as_str()) {
            return error(
                "hooks.hookName",
                &hook.hook_name,
                "is not the name of an OCI hook",
            );
        }
        if !hook.path.starts_with('/') {
            return error("hooks.path", &hook.path, "is not absolute");
        }
        if hook.env.iter().any(|e| bad_env(&e)) {
            return error(
                "hooks.env",
                &hook.path,
                "has an entry that is not of the form NAME=value",
            );
        }
        if hook.timeout.is_some_and(|t| t <= 0) {
            return error("hooks.timeout", &hook.path, "is not positive");
        }
    }
    check_net_devices(place, edits)?;
    if let Some(rdt) = &edits.intel_rdt {
        let id = rdt.clos_id.as_str();
        if id != "/" && (id.len() >= 4096 || id == "." || id == ".." || id.contains(['/', '\n'])) {
            return error("intelRdt.closID", id, "is not a file name");
        }
    }
    Ok(())
}

fn check_net_devices(place: &str, edits: &ContainerEdits) -> Result<(), ValidationError> {
    let (mut hosts, mut names) = (HashSet::new(), HashSet::new());
    for dev in &edits.net_devices {
        for (what, name, seen) in [
            (
                "netDevices.hostInterfaceName",
                &dev.host_interface_name,
                &mut hosts,
            ),
            ("netDevices.name", &dev.name, &mut names),
        ] {
            // IFNAMSIZ is 16 with the final zero.
            let sound = (1..16).contains(&name.len())
                && !name.contains(['/', ' ', '\0'])
                && name != "."
                && name != "..";
            if !sound {
                return Err(edit_error(
                    place,
                    what,
                    name,
                    "is not the name of a network interface",
                ));
            }
            if !seen.insert(name.as_str()) {
                return Err(edit_error(place, what, name, "is there twice"));
            }
        }
    }
    Ok(())
}

/// Absolute, without `..`, and not the root. More than CDI asks; a device or mount outside the container's own tree, or in
/// place of all of it, is never meant.
fn is_clean_absolute(path: &str) -> bool {
    path.starts_with('/')
        && !path.split('/').any(|c| c == "..")
        && path.split('/').any(|c| !matches!(c, "" | "."))
        && !path.contains('\0')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(version: &str, edits: &str) -> Result<(), String> {
        let json = format!(
            r#"{{"cdiVersion":"{version}","kind":"v.com/c","devices":[{{"name":"d","containerEdits":{edits}}}]}}"#
        );
        let spec = Spec::from_json(json.as_bytes()).map_err(|e| e.to_string())?;
        spec.validate().map_err(|e| e.to_string())
    }

    const ENV: &str = r#"{"env":["A=b"]}"#;

    #[test]
    fn known_versions_are_valid_and_others_are_not() {
        for version in VERSIONS {
            spec(version, ENV).unwrap();
        }
        for version in ["", "0.9.0", "2.0.0", "1.1", "latest"] {
            assert!(
                spec(version, ENV).unwrap_err().contains("cdiVersion"),
                "{version}"
            );
        }
    }

    #[test]
    fn fields_need_the_version_that_brought_them() {
        for (edits, before, since) in [
            (
                r#"{"mounts":[{"hostPath":"/a","containerPath":"/b","type":"tmpfs"}]}"#,
                "0.3.0",
                "0.4.0",
            ),
            (
                r#"{"deviceNodes":[{"path":"/dev/a","hostPath":"/dev/b"}]}"#,
                "0.4.0",
                "0.5.0",
            ),
            (r#"{"additionalGids":[5]}"#, "0.6.0", "0.7.0"),
            (r#"{"intelRdt":{"closID":"x"}}"#, "0.6.0", "0.7.0"),
            (r#"{"intelRdt":{"schemata":["x"]}}"#, "1.0.0", "1.1.0"),
            (
                r#"{"netDevices":[{"hostInterfaceName":"eth1","name":"net0"}]}"#,
                "1.0.0",
                "1.1.0",
            ),
        ] {
            assert!(spec(before, edits).unwrap_err().contains(since), "{edits}");
            spec(since, edits).unwrap();
        }
    }

    #[test]
    fn edits_that_make_no_sense_are_refused() {
        for edits in [
            "{}",
            r#"{"env":["A"]}"#,
            r#"{"env":["=b"]}"#,
            r#"{"deviceNodes":[{"path":"dev/a"}]}"#,
            r#"{"deviceNodes":[{"path":"/dev/../a"}]}"#,
            r#"{"deviceNodes":[{"path":"/dev/a","type":"x"}]}"#,
            r#"{"deviceNodes":[{"path":"/dev/a","permissions":"rx"}]}"#,
            r#"{"deviceNodes":[{"path":"/dev/a","major":-1}]}"#,
            r#"{"mounts":[{"hostPath":"","containerPath":"/b"}]}"#,
            r#"{"mounts":[{"hostPath":"/a","containerPath":"/b/../../c"}]}"#,
            r#"{"mounts":[{"hostPath":"/a","containerPath":"/./"}]}"#,
            r#"{"mounts":[{"hostPath":"a/b","containerPath":"/b"}]}"#,
            r#"{"mounts":[{"hostPath":"../b","containerPath":"/b","type":"none","options":["rbind"]}]}"#,
            r#"{"deviceNodes":[{"path":"/"}]}"#,
            r#"{"hooks":[{"hookName":"never","path":"/x"}]}"#,
            r#"{"hooks":[{"hookName":"poststop","path":"x"}]}"#,
            r#"{"netDevices":[{"hostInterfaceName":"a-name-too-long-for-it","name":"b"}]}"#,
            r#"{"netDevices":[{"hostInterfaceName":"a","name":"b"},{"hostInterfaceName":"c","name":"b"}]}"#,
            r#"{"intelRdt":{"closID":"a/b"}}"#,
        ] {
            assert!(spec("1.1.0", edits).is_err(), "{edits}");
        }
    }

    #[test]
    fn device_permissions_may_be_none() {
        spec(
            "0.5.0",
            r#"{"deviceNodes":[{"path":"/dev/a","permissions":"none"}]}"#,
        )
        .unwrap();
    }

    #[test]
    fn a_device_named_twice_or_a_file_without_any_is_refused() {
        let twice = r#"{"cdiVersion":"0.5.0","kind":"v.com/c","devices":[
            {"name":"d","containerEdits":{"env":["A=b"]}},{"name":"d","containerEdits":{"env":["A=b"]}}]}"#;
        assert!(matches!(
            Spec::from_json(twice.as_bytes()).unwrap().validate(),
            Err(ValidationError::Duplicate(_))
        ));
        let none = r#"{"cdiVersion":"0.5.0","kind":"v.com/c","devices":[]}"#;
        assert!(matches!(
            Spec::from_json(none.as_bytes()).unwrap().validate(),
            Err(ValidationError::NoDevices)
        ));
    }

    #[test]
    fn annotations_are_qualified_names_of_bounded_size() {
        let with = |key: &str| Spec {
            cdi_version: "0.6.0".into(),
            kind: "v.com/c".into(),
            annotations: [(key.to_owned(), "v".to_owned())].into(),
            devices: vec![crate::Device {
                name: "d".into(),
                container_edits: ContainerEdits {
                    env: vec!["A=b".into()],
                    ..ContainerEdits::default()
                },
                ..crate::Device::default()
            }],
            ..Spec::default()
        };
        with("example.com/note").validate().unwrap();
        assert!(with("bad key").validate().is_err());
        assert!(with("/x").validate().is_err());
    }
}
