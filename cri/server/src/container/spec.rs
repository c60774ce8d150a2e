//! From a container's record to its runtime specification: gathers what `slipway_spec::generate` wants to know.
//!
//! This is where files are read for it (passwd, group, a seccomp profile, device nodes); what any of it means is decided
//! there.

use std::io::Read;
use std::path::{Path, PathBuf};

use slipway_image::Image;
use slipway_snapshot::Root;
use slipway_spec::user::{FILE_LIMIT, ResolvedUser};
use slipway_spec::{
    Device, ImageDefaults, Namespace, Namespaces, PodFiles, SelinuxLabels, SpecInput, UserSpec,
};

use super::Container;
use super::bundle::Bundle;
use crate::config::CgroupDriver;
use crate::daemon::Daemon;
use crate::error::Error;
use crate::model::{Apparmor, PidNamespace, Scope, Seccomp, Security};
use crate::pod::Pod;
use crate::pod::dir::PodDir;
use crate::pod::run::cgroup_parent;

/// The largest seccomp profile that is read.
const PROFILE_LIMIT: u64 = 16 << 20;
/// Before the container's name in a systemd scope.
const SCOPE_PREFIX: &str = "slipway";

/// What a specification is made of.
pub struct Wanted<'a> {
    pub daemon: &'a Daemon,
    pub pod: &'a Pod,
    pub container: &'a Container,
    pub image: &'a Image,
    pub bundle: &'a Bundle,
    /// Mounts and volumes, their sources existing.
    pub binds: Vec<slipway_spec::Mount>,
}

/// A specification and what else came of it.
pub struct MadeSpec {
    pub json: Vec<u8>,
    pub user: ResolvedUser,
    pub stop_signal: String,
    pub warnings: Vec<String>,
}

/// Makes the specification.
pub fn make(wanted: &Wanted<'_>) -> Result<MadeSpec, Error> {
    let id = wanted.container.id().to_string();
    let input = input(wanted)?;
    let made = slipway_spec::generate(&input).map_err(Error::spec(&id))?;
    let process = made.spec.process().as_ref();
    if let Some(profile) = process.and_then(|process| process.apparmor_profile().as_ref()) {
        wanted.daemon.apparmor.ensure(profile)?;
    }
    let json = serde_json::to_vec(&made.spec).map_err(|source| Error::Encode {
        what: "config.json",
        id,
        source,
    })?;
    Ok(MadeSpec {
        json,
        user: made.user,
        stop_signal: made.stop_signal,
        warnings: made.warnings,
    })
}

fn input(wanted: &Wanted<'_>) -> Result<SpecInput, Error> {
    let (daemon, pod, config) = (wanted.daemon, wanted.pod, &wanted.container.record().config);
    let dir = PodDir::new(&daemon.paths.pods, pod.id());
    let default_security = Security::default();
    let security = config.security.as_ref().unwrap_or(&default_security);
    let handler = pod.handler(daemon);
    let (passwd, group) = user_files(&wanted.bundle.rootfs())?;
    Ok(SpecInput {
        image: ImageDefaults::from_config(&wanted.image.config),
        command: config.command.clone(),
        args: config.args.clone(),
        envs: config.envs.clone(),
        working_dir: config.working_dir.clone(),
        mounts: wanted.binds.clone(),
        shm: shm(pod, security, &dir),
        pod_files: PodFiles {
            resolv_conf: Some(dir.resolv_conf()),
            hosts: Some(dir.hosts()),
            hostname: Some(dir.hostname()),
        },
        devices: devices(wanted.container)?,
        host_devices: if security.privileged && !handler.privileged_without_host_devices {
            host_devices()?
        } else {
            Vec::new()
        },
        user: user(security),
        passwd,
        group,
        capabilities: security.capabilities.clone(),
        privileged: security.privileged,
        default_capabilities: handler.default_capabilities,
        no_new_privs: security.no_new_privs || handler.no_new_privileges,
        annotation_passthrough: handler.pass_annotations,
        readonly_rootfs: security.readonly_rootfs,
        masked_paths: config.security.as_ref().map(|s| s.masked_paths.clone()),
        readonly_paths: config.security.as_ref().map(|s| s.readonly_paths.clone()),
        seccomp: seccomp(&security.seccomp)?,
        apparmor: match &security.apparmor {
            Apparmor::RuntimeDefault => slipway_spec::Apparmor::RuntimeDefault,
            Apparmor::Unconfined => slipway_spec::Apparmor::Unconfined,
            Apparmor::Localhost(name) => slipway_spec::Apparmor::Localhost(name.clone()),
        },
        selinux: security
            .selinux
            .as_ref()
            .filter(|_| daemon.host.selinux)
            .map(|label| SelinuxLabels {
                process: label.clone(),
                mount: label.clone(),
            }),
        oom_score_adj: Some(config.resources.oom_score_adj),
        resources: config.resources.limits.clone(),
        block_io: daemon.block_io.of(wanted.container, pod)?,
        cgroups_path: cgroups_path(daemon, pod, wanted.container),
        namespaces: namespaces(wanted, security),
        tty: config.tty,
        hostname: Some(crate::pod::dir::hostname(&pod.record().config)),
        annotations: config.annotations.clone(),
        cdi: cdi(daemon, wanted.container)?,
        stop_signal: config.stop_signal.as_ref().map(|signal| signal.0.clone()),
        rootfs: PathBuf::from("rootfs"),
        host: daemon.host.clone(),
        ..Default::default()
    })
}

/// `linux.cgroupsPath` in the form the driver wants.
pub fn cgroups_path(daemon: &Daemon, pod: &Pod, container: &Container) -> String {
    let parent = cgroup_parent(daemon, pod);
    match daemon.config.runtime.cgroup_driver {
        CgroupDriver::Cgroupfs => format!("{}/{}", parent.trim_end_matches('/'), container.id()),
        CgroupDriver::Systemd => format!("{parent}:{SCOPE_PREFIX}:{}", container.id()),
    }
}

/// Where /dev/shm comes from: the pod's, the host's, or a private one.
fn shm(pod: &Pod, security: &Security, dir: &PodDir) -> Option<PathBuf> {
    match (pod.record().config.namespaces.ipc, security.ipc) {
        (_, Scope::Node) | (Scope::Node, _) => Some(PathBuf::from("/dev/shm")),
        (Scope::Pod, Scope::Pod) => Some(dir.shm()),
        (Scope::Container, _) | (_, Scope::Container) => None,
    }
}

fn namespaces(wanted: &Wanted<'_>, security: &Security) -> Namespaces {
    let pod = wanted.pod.record().config.namespaces.clone();
    let pinned = |kind: &str| wanted.pod.namespace(wanted.daemon, kind);
    let shared = |scope: Scope, kind: &str| match scope {
        Scope::Pod => Namespace::Path(pinned(kind)),
        Scope::Node => Namespace::Host,
        Scope::Container => Namespace::New,
    };
    // The network and the name are the pod's; a container says them again, and cannot say otherwise.
    Namespaces {
        network: shared(pod.network, "net"),
        uts: shared(pod.network, "uts"),
        ipc: match security.ipc {
            Scope::Container => Namespace::New,
            Scope::Node => Namespace::Host,
            Scope::Pod => shared(pod.ipc, "ipc"),
        },
        pid: match (&security.pid, pod.pid) {
            (PidNamespace::Container, _) => Namespace::New,
            (PidNamespace::Node, _) => Namespace::Host,
            // The shim puts the target's in its place: a path by a pid could lead to another process's.
            (PidNamespace::Target(_), _) => Namespace::New,
            // Pod: whatever the pod says. One whose containers each have their own shares nothing.
            (PidNamespace::Pod, scope) => shared(scope, "pid"),
        },
        cgroup: Namespace::New,
        user: pod.user.map(|user| slipway_spec::UserNamespace {
            path: Some(pinned("user")),
            uids: user.uids,
            gids: user.gids,
        }),
    }
}

fn user(security: &Security) -> UserSpec {
    UserSpec {
        uid: security.run_as_user,
        gid: security.run_as_group,
        username: security.run_as_username.clone(),
        image_user: String::new(),
        supplemental_groups: security.supplemental_groups.clone(),
        policy: security.supplemental_groups_policy,
    }
}

/// The image's passwd and group, looked up without leaving its root; bounded (CVE-2026-47262). Missing is empty.
fn user_files(rootfs: &Path) -> Result<(Vec<u8>, Vec<u8>), Error> {
    let root = Root::open(rootfs).map_err(Error::io("open", rootfs))?;
    let read = |path: &str| {
        root.read(Path::new(path), FILE_LIMIT)
            .map(Option::unwrap_or_default)
            .map_err(Error::io("read the image's", path))
    };
    Ok((read("/etc/passwd")?, read("/etc/group")?))
}

fn seccomp(profile: &Seccomp) -> Result<slipway_spec::Seccomp, Error> {
    match profile {
        Seccomp::RuntimeDefault => Ok(slipway_spec::Seccomp::RuntimeDefault),
        Seccomp::Unconfined => Ok(slipway_spec::Seccomp::Unconfined),
        Seccomp::Localhost(path) => {
            let mut json = Vec::new();
            std::fs::File::open(path)
                .and_then(|file| file.take(PROFILE_LIMIT).read_to_end(&mut json))
                .map_err(asked_for(
                    "security_context.seccomp",
                    "read the seccomp profile",
                    path,
                ))?;
            Ok(slipway_spec::Seccomp::Localhost(json))
        }
    }
}

/// A file that a request names: where it is not there, the request is wrong.
fn asked_for(field: &'static str, act: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |error| match error.kind() {
        std::io::ErrorKind::NotFound | std::io::ErrorKind::IsADirectory => {
            Error::invalid(field, format!("{}: {error}", path.display()))
        }
        _ => Error::io(act, path)(error),
    }
}

fn devices(container: &Container) -> Result<Vec<Device>, Error> {
    let mut nodes = Vec::new();
    for device in &container.record().config.devices {
        let found = slipway_cdi::host::expand(&device.host_path, &device.container_path).map_err(
            asked_for("config.devices", "look up the device", &device.host_path),
        )?;
        nodes.extend(found.into_iter().map(|found| Device {
            container_path: found.container_path,
            node: found.node,
            permissions: device.permissions.clone(),
        }));
    }
    Ok(nodes)
}

fn host_devices() -> Result<Vec<Device>, Error> {
    let found = slipway_cdi::host::all().map_err(Error::io("list the devices in", "/dev"))?;
    Ok(found
        .into_iter()
        .map(|found| Device {
            container_path: found.container_path,
            node: found.node,
            permissions: String::new(),
        })
        .collect())
}

/// The devices that the request's field names, then those of its annotations: as containerd has it.
fn cdi(daemon: &Daemon, container: &Container) -> Result<Vec<slipway_cdi::ContainerEdits>, Error> {
    let config = &container.record().config;
    let resolve = || {
        let mut names = config.cdi_devices.clone();
        names.extend(slipway_cdi::devices_in_annotations(&config.annotations)?);
        daemon.cdi.resolve(&names, &slipway_cdi::host::lookup)
    };
    resolve().map_err(|source| Error::Cdi {
        id: container.id().to_string(),
        source: Box::new(source),
    })
}
