//! A container's configuration.

use std::path::{Component, Path, PathBuf};

use slipway_cri_api::v1;
use slipway_spec::Propagation;

use super::security::{id_maps, security};
use super::{
    Invalid, bounded_map, image_spec, invalid, name, optional_absolute, path_length, resources, shown, sizes,
    unknown_enum, words,
};
use crate::model::{ContainerConfig, ContainerMetadata, Device, Mount, MountSource, StopSignal};

/// A whole CreateContainer request's container part.
pub fn container_config(config: Option<v1::ContainerConfig>) -> Result<ContainerConfig, Invalid> {
    let config = config.ok_or_else(|| invalid("config", "is missing"))?;
    let metadata = config
        .metadata
        .ok_or_else(|| invalid("config.metadata", "is missing"))?;
    if metadata.name.is_empty() {
        return Err(invalid("config.metadata.name", "is empty"));
    }
    words("config.command", &config.command)?;
    words("config.args", &config.args)?;
    if config.working_dir.contains('\0') {
        return Err(invalid("config.working_dir", "has a NUL byte"));
    }
    path_length("config.working_dir", &config.working_dir)?;
    sizes(
        "config.envs",
        config.envs.iter().map(|env| env.key.len() + 1 + env.value.len()),
    )?;
    let image = config
        .image
        .ok_or_else(|| invalid("config.image", "is missing"))?;
    let linux = config.linux.unwrap_or_default();
    Ok(ContainerConfig {
        metadata: ContainerMetadata {
            name: name("config.metadata.name", metadata.name)?,
            attempt: metadata.attempt,
        },
        image: image_spec("config.image", image)?,
        command: config.command,
        args: config.args,
        working_dir: config.working_dir,
        envs: config.envs.into_iter().map(env).collect::<Result<_, _>>()?,
        mounts: config.mounts.into_iter().map(mount).collect::<Result<_, _>>()?,
        devices: config.devices.into_iter().map(device).collect::<Result<_, _>>()?,
        cdi_devices: config
            .cdi_devices
            .into_iter()
            .map(|d| name("config.CDI_devices", d.name))
            .collect::<Result<_, _>>()?,
        labels: bounded_map("config.labels", config.labels)?,
        annotations: bounded_map("config.annotations", config.annotations)?,
        log_path: log_path(&config.log_path)?,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        tty: config.tty,
        resources: linux
            .resources
            .as_ref()
            .map(|r| resources("config.linux.resources", r))
            .transpose()?
            .unwrap_or_default(),
        security: linux.security_context.map(security).transpose()?,
        stop_signal: stop_signal(config.stop_signal)?,
    })
}

fn env(variable: v1::KeyValue) -> Result<(String, String), Invalid> {
    // The runtime spec is JSON: a value that is not UTF-8 cannot be carried. The value itself is never shown.
    let value = String::from_utf8(variable.value).map_err(|_| {
        invalid(
            "config.envs",
            format!("the value of {} is not UTF-8", shown(&variable.key)),
        )
    })?;
    if variable.key.is_empty()
        || variable.key.contains('=')
        || variable.key.contains('\0')
        || value.contains('\0')
    {
        return Err(invalid(
            "config.envs",
            format!("{} cannot be an environment variable", shown(&variable.key)),
        ));
    }
    Ok((variable.key, value))
}

fn mount(mount: v1::Mount) -> Result<Mount, Invalid> {
    const FIELD: &str = "config.mounts";
    if mount.container_path.is_empty() {
        return Err(invalid(FIELD, "container_path is empty"));
    }
    path_length("config.mounts.container_path", &mount.container_path)?;
    let source = match mount.image.filter(|i| !i.image.is_empty()) {
        Some(image) => {
            if !mount.host_path.is_empty() {
                return Err(invalid(
                    FIELD,
                    format!("{}: both an image and a host path", shown(&mount.container_path)),
                ));
            }
            MountSource::Image {
                image: image_spec("config.mounts.image", image)?,
                sub_path: sub_path(mount.image_sub_path)?,
            }
        }
        None if !mount.image_sub_path.is_empty() => {
            return Err(invalid(
                FIELD,
                format!(
                    "{}: image_sub_path without an image",
                    shown(&mount.container_path)
                ),
            ));
        }
        None => MountSource::Host(optional_absolute(FIELD, &mount.host_path)?.ok_or_else(|| {
            invalid(
                FIELD,
                format!("{}: host_path is empty", shown(&mount.container_path)),
            )
        })?),
    };
    let propagation = match v1::MountPropagation::try_from(mount.propagation) {
        Ok(v1::MountPropagation::PropagationPrivate) => Propagation::Private,
        Ok(v1::MountPropagation::PropagationHostToContainer) => Propagation::HostToContainer,
        Ok(v1::MountPropagation::PropagationBidirectional) => Propagation::Bidirectional,
        Err(_) => return Err(unknown_enum(FIELD, mount.propagation)),
    };
    Ok(Mount {
        container_path: mount.container_path,
        source,
        readonly: mount.readonly,
        recursive_read_only: mount.recursive_read_only,
        propagation,
        selinux_relabel: mount.selinux_relabel,
        uid_mappings: id_maps(&mount.uid_mappings),
        gid_mappings: id_maps(&mount.gid_mappings),
        options: mount.mount_options,
    })
}

/// A place in an image: it leads down only.
fn sub_path(text: String) -> Result<String, Invalid> {
    const FIELD: &str = "config.mounts.image_sub_path";
    let climbs = Path::new(&text)
        .components()
        .any(|c| matches!(c, Component::ParentDir));
    if climbs || text.contains('\0') {
        let shown = shown(&text);
        return Err(invalid(FIELD, format!("{shown} is not a path without \"..\"")));
    }
    path_length(FIELD, &text)?;
    Ok(text)
}

fn device(device: v1::Device) -> Result<Device, Invalid> {
    const FIELD: &str = "config.devices";
    let host_path =
        optional_absolute(FIELD, &device.host_path)?.ok_or_else(|| invalid(FIELD, "host_path is empty"))?;
    if let Some(odd) = device.permissions.chars().find(|c| !"rwm".contains(*c)) {
        return Err(invalid(
            FIELD,
            format!(
                "permissions {}: {odd:?} is none of r, w, m",
                shown(&device.permissions)
            ),
        ));
    }
    path_length("config.devices.container_path", &device.container_path)?;
    let container_path = if device.container_path.is_empty() {
        device.host_path
    } else {
        device.container_path
    };
    Ok(Device {
        container_path,
        host_path,
        permissions: device.permissions,
    })
}

/// The log file's place below the pod's log directory. It may not lead out of it (CVE-2024-5154, CVE-2025-0750 of peers).
fn log_path(text: &str) -> Result<Option<PathBuf>, Invalid> {
    if text.is_empty() {
        return Ok(None);
    }
    let path = Path::new(text);
    let inside = path
        .components()
        .all(|c| matches!(c, Component::Normal(_) | Component::CurDir));
    if !inside || path.file_name().is_none() || text.ends_with('/') || text.contains(['\0', '\n']) {
        return Err(invalid(
            "config.log_path",
            format!("{} is not a path below the pod's log directory", shown(text)),
        ));
    }
    path_length("config.log_path", text)?;
    Ok(Some(path.to_owned()))
}

fn stop_signal(number: i32) -> Result<Option<StopSignal>, Invalid> {
    const FIELD: &str = "config.stop_signal";
    match v1::Signal::try_from(number) {
        Ok(v1::Signal::RuntimeDefault) => Ok(None),
        // SIGNAL_SIGRTMINPLUS1 on the wire is SIGRTMIN+1 everywhere else.
        Ok(signal) => match slipway_spec::signal::parse(signal.as_str_name()) {
            Some(parsed) => Ok(Some(StopSignal(parsed.name))),
            None => Err(invalid(
                FIELD,
                format!("{} does not exist on Linux", signal.as_str_name()),
            )),
        },
        Err(_) => Err(unknown_enum(FIELD, number)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::samples::container_field;
    use super::*;

    #[test]
    fn log_paths_cannot_leave_the_log_directory() {
        for bad in ["/abs.log", "../x.log", "a/../../x", "a/..", "dir/", "x\ny", "."] {
            let result = container_field(|c| c.log_path = bad.into());
            assert!(result.is_err(), "{bad:?} was accepted: {result:?}");
        }
        let good = container_field(|c| c.log_path = "web/0.log".into()).unwrap();
        assert_eq!(good.log_path.as_deref(), Some(Path::new("web/0.log")));
    }

    #[test]
    fn environment_values_that_json_cannot_carry_are_refused_without_being_shown() {
        let variable = v1::KeyValue {
            key: "SECRET".into(),
            value: vec![b'x', 0xff],
        };
        let error = container_field(|c| c.envs = vec![variable]).unwrap_err();
        assert!(
            error.reason.contains("SECRET") && !error.reason.contains('x'),
            "{error}"
        );
    }

    #[test]
    fn every_signal_of_the_cri_is_known() {
        for number in 1..=65 {
            assert!(stop_signal(number).unwrap().is_some(), "{number}");
        }
        assert_eq!(stop_signal(0).unwrap(), None);
        assert_eq!(
            stop_signal(v1::Signal::Sigrtminplus1 as i32).unwrap(),
            Some(StopSignal("SIGRTMIN+1".into()))
        );
        assert!(stop_signal(66).is_err());
    }
}
