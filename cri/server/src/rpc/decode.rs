//! From the wire to checked values. What a request may say is decided here; what it means is not.
//!
//! Every refusal names the field as the CRI spells it.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::path::{Component, Path, PathBuf};

use slipway_cri_api::v1;
use slipway_image::{AuthFields, Credentials};
use slipway_spec::{CapabilityRequest, IdMap, Propagation, SupplementalGroupsPolicy};

use crate::config::Runtime;
use crate::model::{
    Apparmor, ContainerConfig, ContainerMetadata, Device, Dns, ImageSpec, Mount, MountSource, PidNamespace,
    PodConfig, PodMetadata, PodNamespaces, PortMapping, Protocol, Resources, Scope, Seccomp, Security,
    StopSignal, StringMap, UserNamespace,
};

/// A request that cannot be taken at its word.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct Invalid {
    pub field: &'static str,
    pub reason: String,
}

fn invalid(field: &'static str, reason: impl Into<String>) -> Invalid {
    Invalid {
        field,
        reason: reason.into(),
    }
}

/// A whole RunPodSandbox request.
pub fn pod_config(
    config: Option<v1::PodSandboxConfig>,
    runtime_handler: String,
    runtime: &Runtime,
) -> Result<PodConfig, Invalid> {
    let config = config.ok_or_else(|| invalid("config", "is missing"))?;
    if runtime.handler(&runtime_handler).is_none() {
        let known: Vec<&str> = runtime.handler_names().collect();
        let shown = shown(&runtime_handler);
        return Err(invalid(
            "runtime_handler",
            format!("{shown} is not known here; {known:?} are"),
        ));
    }
    let linux = config.linux.unwrap_or_default();
    let security = linux.security_context.unwrap_or_default();
    Ok(PodConfig {
        metadata: pod_metadata(config.metadata)?,
        hostname: hostname(config.hostname)?,
        log_directory: log_directory(&config.log_directory)?,
        dns: config.dns_config.map(dns).transpose()?,
        port_mappings: port_mappings(config.port_mappings)?,
        labels: bounded_map("config.labels", config.labels)?,
        annotations: bounded_map("config.annotations", config.annotations)?,
        runtime_handler,
        cgroup_parent: cgroup_parent(linux.cgroup_parent)?,
        namespaces: pod_namespaces(security.namespace_options)?,
        privileged: security.privileged,
        sysctls: bounded_map("config.linux.sysctls", linux.sysctls)?,
        overhead: linux
            .overhead
            .map(|r| resources("config.linux.overhead", &r))
            .transpose()?,
        resources: linux
            .resources
            .map(|r| resources("config.linux.resources", &r))
            .transpose()?,
    })
}

fn pod_metadata(metadata: Option<v1::PodSandboxMetadata>) -> Result<PodMetadata, Invalid> {
    let metadata = metadata.ok_or_else(|| invalid("config.metadata", "is missing"))?;
    if metadata.name.is_empty() {
        return Err(invalid("config.metadata.name", "is empty"));
    }
    Ok(PodMetadata {
        name: name("config.metadata.name", metadata.name)?,
        uid: name("config.metadata.uid", metadata.uid)?,
        namespace: name("config.metadata.namespace", metadata.namespace)?,
        attempt: metadata.attempt,
    })
}

/// Longer than any name of Kubernetes, and than critest's.
const LONGEST_NAME: usize = 1024;

/// Part of a name: it goes into logs, errors and plugins' arguments. May be empty.
fn name(field: &'static str, text: String) -> Result<String, Invalid> {
    if text.len() > LONGEST_NAME {
        return Err(invalid(
            field,
            format!("{} bytes, more than {LONGEST_NAME}", text.len()),
        ));
    }
    if text.chars().any(char::is_control) {
        return Err(invalid(field, format!("{text:?} has control characters")));
    }
    Ok(text)
}

/// Of labels and annotations together, in keys and values; four times what Kubernetes allows an object's annotations.
const LARGEST_MAP: usize = 1 << 20;

/// Labels, annotations: any text, within bounds.
fn bounded_map(field: &'static str, map: HashMap<String, String>) -> Result<StringMap, Invalid> {
    let size: usize = map.iter().map(|(key, value)| key.len() + value.len()).sum();
    if size > LARGEST_MAP {
        return Err(invalid(field, format!("{size} bytes, more than {LARGEST_MAP}")));
    }
    match map
        .keys()
        .find(|key| key.is_empty() || key.chars().any(char::is_control))
    {
        Some(key) => Err(invalid(
            field,
            format!("the key {} is empty or has control characters", shown(key)),
        )),
        None => Ok(string_map(map)),
    }
}

/// A text as an error shows it: quoted, and not megabytes of it.
fn shown(text: &str) -> String {
    const MOST: usize = 128;
    match text.char_indices().nth(MOST) {
        Some((at, _)) => format!("{:?}…", &text[..at]),
        None => format!("{text:?}"),
    }
}

fn log_directory(text: &str) -> Result<Option<PathBuf>, Invalid> {
    const FIELD: &str = "config.log_directory";
    if text.chars().any(char::is_control) {
        return Err(invalid(FIELD, format!("{} has control characters", shown(text))));
    }
    optional_absolute(FIELD, text)
}

fn hostname(name: String) -> Result<String, Invalid> {
    // sethostname(2) takes 64 bytes; it becomes a line of /etc/hostname and /etc/hosts.
    if name.len() > 64
        || name
            .bytes()
            .any(|b| b.is_ascii_whitespace() || b.is_ascii_control() || b == b'/')
    {
        return Err(invalid(
            "config.hostname",
            format!("{} is too long, or has white space or a slash", shown(&name)),
        ));
    }
    Ok(name)
}

fn dns(config: v1::DnsConfig) -> Result<Dns, Invalid> {
    let one_word = |field: &'static str, values: &[String]| match values
        .iter()
        .find(|v| v.is_empty() || v.bytes().any(|b| b.is_ascii_whitespace() || b.is_ascii_control()))
    {
        Some(value) => Err(invalid(
            field,
            format!("{value:?} would not be one word of resolv.conf"),
        )),
        None => Ok(()),
    };
    one_word("config.dns_config.servers", &config.servers)?;
    one_word("config.dns_config.searches", &config.searches)?;
    one_word("config.dns_config.options", &config.options)?;
    Ok(Dns {
        servers: config.servers,
        searches: config.searches,
        options: config.options,
    })
}

fn port_mappings(mappings: Vec<v1::PortMapping>) -> Result<Vec<PortMapping>, Invalid> {
    let mut checked = Vec::with_capacity(mappings.len());
    for mapping in mappings {
        // Kubernetes lists every container port; only those with a host port are mapped.
        if mapping.host_port == 0 {
            continue;
        }
        let port = |field: &'static str, port: i32| {
            u16::try_from(port)
                .ok()
                .filter(|p| *p != 0)
                .ok_or_else(|| invalid(field, format!("{port} is no port")))
        };
        let protocol = match v1::Protocol::try_from(mapping.protocol) {
            Ok(v1::Protocol::Tcp) => Protocol::Tcp,
            Ok(v1::Protocol::Udp) => Protocol::Udp,
            Ok(v1::Protocol::Sctp) => Protocol::Sctp,
            Err(_) => return Err(unknown_enum("config.port_mappings.protocol", mapping.protocol)),
        };
        let host_ip =
            match mapping.host_ip.as_str() {
                "" => None,
                text => Some(text.parse::<IpAddr>().map_err(|_| {
                    invalid("config.port_mappings.host_ip", format!("{text:?} is no address"))
                })?),
            };
        checked.push(PortMapping {
            protocol,
            container_port: port("config.port_mappings.container_port", mapping.container_port)?,
            host_port: port("config.port_mappings.host_port", mapping.host_port)?,
            host_ip,
        });
    }
    Ok(checked)
}

fn cgroup_parent(parent: String) -> Result<Option<String>, Invalid> {
    if parent.is_empty() {
        return Ok(None);
    }
    let climbs = Path::new(&parent)
        .components()
        .any(|c| matches!(c, Component::ParentDir | Component::CurDir));
    if climbs || parent.bytes().any(|b| b.is_ascii_control()) {
        return Err(invalid(
            "config.linux.cgroup_parent",
            format!("{parent:?} is no cgroup path"),
        ));
    }
    Ok(Some(parent))
}

fn pod_namespaces(options: Option<v1::NamespaceOption>) -> Result<PodNamespaces, Invalid> {
    let options = options.unwrap_or_default();
    let network = scope("namespace_options.network", options.network)?;
    if network == Scope::Container {
        return Err(invalid(
            "namespace_options.network",
            "CONTAINER: a network is the pod's or the node's",
        ));
    }
    Ok(PodNamespaces {
        network,
        pid: scope("namespace_options.pid", options.pid)?,
        ipc: scope("namespace_options.ipc", options.ipc)?,
        user: user_namespace(options.userns_options)?,
    })
}

/// POD, CONTAINER or NODE; TARGET means something for a container's processes only.
fn scope(field: &'static str, mode: i32) -> Result<Scope, Invalid> {
    match v1::NamespaceMode::try_from(mode) {
        Ok(v1::NamespaceMode::Pod) => Ok(Scope::Pod),
        Ok(v1::NamespaceMode::Container) => Ok(Scope::Container),
        Ok(v1::NamespaceMode::Node) => Ok(Scope::Node),
        Ok(v1::NamespaceMode::Target) => {
            Err(invalid(field, "TARGET is only for a container's PID namespace"))
        }
        Err(_) => Err(unknown_enum(field, mode)),
    }
}

fn user_namespace(options: Option<v1::UserNamespace>) -> Result<Option<UserNamespace>, Invalid> {
    const FIELD: &str = "namespace_options.userns_options";
    let Some(options) = options else { return Ok(None) };
    match v1::NamespaceMode::try_from(options.mode) {
        Ok(v1::NamespaceMode::Node) => {
            if options.uids.is_empty() && options.gids.is_empty() {
                Ok(None)
            } else {
                Err(invalid(FIELD, "the node's user namespace takes no mappings"))
            }
        }
        Ok(v1::NamespaceMode::Pod) => {
            if options.uids.len() != 1 || options.gids.len() != 1 {
                return Err(invalid(
                    FIELD,
                    "a pod's user namespace takes exactly one uid and one gid mapping",
                ));
            }
            for map in options.uids.iter().chain(&options.gids) {
                let last = |first: u32| map.length.checked_sub(1).and_then(|more| first.checked_add(more));
                if last(map.container_id).is_none() || last(map.host_id).is_none() {
                    return Err(invalid(
                        FIELD,
                        format!(
                            "{}:{}:{} is no range of ids",
                            map.container_id, map.host_id, map.length
                        ),
                    ));
                }
            }
            Ok(Some(UserNamespace {
                uids: id_maps(&options.uids),
                gids: id_maps(&options.gids),
            }))
        }
        Ok(_) => Err(invalid(FIELD, "a user namespace is the pod's or the node's")),
        Err(_) => Err(unknown_enum(FIELD, options.mode)),
    }
}

fn id_maps(maps: &[v1::IdMapping]) -> Vec<IdMap> {
    maps.iter()
        .map(|m| IdMap {
            container: m.container_id,
            host: m.host_id,
            length: m.length,
        })
        .collect()
}

/// A whole CreateContainer request's container part.
pub fn container_config(config: Option<v1::ContainerConfig>) -> Result<ContainerConfig, Invalid> {
    let config = config.ok_or_else(|| invalid("config", "is missing"))?;
    let metadata = config
        .metadata
        .ok_or_else(|| invalid("config.metadata", "is missing"))?;
    if metadata.name.is_empty() {
        return Err(invalid("config.metadata.name", "is empty"));
    }
    for (field, words) in [("config.command", &config.command), ("config.args", &config.args)] {
        if words.iter().any(|word| word.contains('\0')) {
            return Err(invalid(field, "an argument has a NUL byte"));
        }
    }
    if config.working_dir.contains('\0') {
        return Err(invalid("config.working_dir", "has a NUL byte"));
    }
    let image = config.image.map(image_spec).filter(|i| !i.image.is_empty());
    let linux = config.linux.unwrap_or_default();
    Ok(ContainerConfig {
        metadata: ContainerMetadata {
            name: name("config.metadata.name", metadata.name)?,
            attempt: metadata.attempt,
        },
        image: image.ok_or_else(|| invalid("config.image", "is missing"))?,
        command: config.command,
        args: config.args,
        working_dir: config.working_dir,
        envs: config.envs.into_iter().map(env).collect::<Result<_, _>>()?,
        mounts: config.mounts.into_iter().map(mount).collect::<Result<_, _>>()?,
        devices: config.devices.into_iter().map(device).collect::<Result<_, _>>()?,
        cdi_devices: config.cdi_devices.into_iter().map(|d| d.name).collect(),
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

/// An image as a request names it; the name itself is checked when it is resolved.
pub fn image_spec(spec: v1::ImageSpec) -> ImageSpec {
    ImageSpec {
        image: spec.image,
        annotations: string_map(spec.annotations),
        user_specified_image: spec.user_specified_image,
        runtime_handler: spec.runtime_handler,
        image_ref: spec.image_ref,
    }
}

fn env(variable: v1::KeyValue) -> Result<(String, String), Invalid> {
    // The runtime spec is JSON: a value that is not UTF-8 cannot be carried. The value itself is never shown.
    let value = String::from_utf8(variable.value).map_err(|_| {
        invalid(
            "config.envs",
            format!("the value of {:?} is not UTF-8", variable.key),
        )
    })?;
    if variable.key.is_empty()
        || variable.key.contains('=')
        || variable.key.contains('\0')
        || value.contains('\0')
    {
        return Err(invalid(
            "config.envs",
            format!("{:?} cannot be an environment variable", variable.key),
        ));
    }
    Ok((variable.key, value))
}

fn mount(mount: v1::Mount) -> Result<Mount, Invalid> {
    const FIELD: &str = "config.mounts";
    if mount.container_path.is_empty() {
        return Err(invalid(FIELD, "container_path is empty"));
    }
    let source = match mount.image.filter(|i| !i.image.is_empty()) {
        Some(image) => {
            if !mount.host_path.is_empty() {
                return Err(invalid(
                    FIELD,
                    format!("{}: both an image and a host path", mount.container_path),
                ));
            }
            MountSource::Image {
                image: image_spec(image),
                sub_path: mount.image_sub_path,
            }
        }
        None if !mount.image_sub_path.is_empty() => {
            return Err(invalid(
                FIELD,
                format!("{}: image_sub_path without an image", mount.container_path),
            ));
        }
        None => MountSource::Host(
            optional_absolute(FIELD, &mount.host_path)?
                .ok_or_else(|| invalid(FIELD, format!("{}: host_path is empty", mount.container_path)))?,
        ),
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

fn device(device: v1::Device) -> Result<Device, Invalid> {
    const FIELD: &str = "config.devices";
    let host_path =
        optional_absolute(FIELD, &device.host_path)?.ok_or_else(|| invalid(FIELD, "host_path is empty"))?;
    if let Some(odd) = device.permissions.chars().find(|c| !"rwm".contains(*c)) {
        return Err(invalid(
            FIELD,
            format!("permissions {:?}: {odd:?} is none of r, w, m", device.permissions),
        ));
    }
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
            format!("{text:?} is not a path below the pod's log directory"),
        ));
    }
    Ok(Some(path.to_owned()))
}

/// A CRI resources message; whether the kernel takes each limit is found out when it is set.
pub fn resources(field: &'static str, r: &v1::LinuxContainerResources) -> Result<Resources, Invalid> {
    let least = |name: &str, value: i64, least: i64| {
        if value < least {
            Err(invalid(field, format!("{name} is {value}, less than {least}")))
        } else {
            Ok(())
        }
    };
    least("cpu_period", r.cpu_period, 0)?;
    least("cpu_quota", r.cpu_quota, -1)?;
    least("cpu_shares", r.cpu_shares, 0)?;
    least("memory_limit_in_bytes", r.memory_limit_in_bytes, -1)?;
    least("memory_swap_limit_in_bytes", r.memory_swap_limit_in_bytes, -1)?;
    least("oom_score_adj", r.oom_score_adj, -1000)?;
    if r.oom_score_adj > 1000 {
        return Err(invalid(
            field,
            format!("oom_score_adj is {}, more than 1000", r.oom_score_adj),
        ));
    }
    Ok(Resources {
        limits: slipway_spec::Resources {
            cpu_period: r.cpu_period,
            cpu_quota: r.cpu_quota,
            cpu_shares: r.cpu_shares,
            memory_limit: r.memory_limit_in_bytes,
            memory_swap_limit: r.memory_swap_limit_in_bytes,
            memory_reservation: 0,
            cpuset_cpus: r.cpuset_cpus.clone(),
            cpuset_mems: r.cpuset_mems.clone(),
            pids_limit: 0,
            hugepage_limits: r
                .hugepage_limits
                .iter()
                .map(|h| (h.page_size.clone(), h.limit))
                .collect(),
            unified: r.unified.iter().map(|(k, v)| (k.clone(), v.clone())).collect(),
        },
        oom_score_adj: r.oom_score_adj,
    })
}

fn security(context: v1::LinuxContainerSecurityContext) -> Result<Security, Invalid> {
    let namespaces = context.namespace_options.unwrap_or_default();
    if user_namespace(namespaces.userns_options.clone())?.is_some_and(|u| u.uids.is_empty()) {
        return Err(invalid("namespace_options.userns_options", "an empty mapping"));
    }
    #[allow(deprecated)]
    let (old_seccomp, old_apparmor) = (context.seccomp_profile_path, context.apparmor_profile);
    let capabilities = context.capabilities.unwrap_or_default();
    Ok(Security {
        capabilities: CapabilityRequest {
            add: capabilities.add_capabilities,
            drop: capabilities.drop_capabilities,
            ambient: capabilities.add_ambient_capabilities,
        },
        privileged: context.privileged,
        network: scope("namespace_options.network", namespaces.network)?,
        pid: pid_namespace(&namespaces)?,
        ipc: scope("namespace_options.ipc", namespaces.ipc)?,
        selinux: selinux(context.selinux_options),
        run_as_user: context.run_as_user.map(|v| v.value),
        run_as_group: context.run_as_group.map(|v| v.value),
        run_as_username: Some(context.run_as_username).filter(|name| !name.is_empty()),
        supplemental_groups: context.supplemental_groups,
        supplemental_groups_policy: match v1::SupplementalGroupsPolicy::try_from(
            context.supplemental_groups_policy,
        ) {
            Ok(v1::SupplementalGroupsPolicy::Merge) => SupplementalGroupsPolicy::Merge,
            Ok(v1::SupplementalGroupsPolicy::Strict) => SupplementalGroupsPolicy::Strict,
            Err(_) => {
                return Err(unknown_enum(
                    "supplemental_groups_policy",
                    context.supplemental_groups_policy,
                ));
            }
        },
        readonly_rootfs: context.readonly_rootfs,
        no_new_privs: context.no_new_privs,
        masked_paths: context.masked_paths,
        readonly_paths: context.readonly_paths,
        seccomp: seccomp(context.seccomp, &old_seccomp)?,
        apparmor: apparmor(context.apparmor, &old_apparmor)?,
    })
}

fn pid_namespace(options: &v1::NamespaceOption) -> Result<PidNamespace, Invalid> {
    const FIELD: &str = "namespace_options.pid";
    match v1::NamespaceMode::try_from(options.pid) {
        Ok(v1::NamespaceMode::Pod) => Ok(PidNamespace::Pod),
        Ok(v1::NamespaceMode::Container) => Ok(PidNamespace::Container),
        Ok(v1::NamespaceMode::Node) => Ok(PidNamespace::Node),
        Ok(v1::NamespaceMode::Target) if options.target_id.is_empty() => {
            Err(invalid(FIELD, "TARGET without a target_id"))
        }
        Ok(v1::NamespaceMode::Target) => Ok(PidNamespace::Target(options.target_id.clone())),
        Err(_) => Err(unknown_enum(FIELD, options.pid)),
    }
}

fn selinux(options: Option<v1::SeLinuxOption>) -> Option<String> {
    let o = options?;
    let all_empty = [&o.user, &o.role, &o.r#type, &o.level]
        .iter()
        .all(|s| s.is_empty());
    (!all_empty).then(|| format!("{}:{}:{}:{}", o.user, o.role, o.r#type, o.level))
}

fn seccomp(profile: Option<v1::SecurityProfile>, old: &str) -> Result<Seccomp, Invalid> {
    const FIELD: &str = "security_context.seccomp";
    let Some(profile) = profile else {
        return match old {
            "" | "unconfined" => Ok(Seccomp::Unconfined),
            "runtime/default" | "docker/default" => Ok(Seccomp::RuntimeDefault),
            other => seccomp_file(FIELD, other),
        };
    };
    match v1::security_profile::ProfileType::try_from(profile.profile_type) {
        Ok(v1::security_profile::ProfileType::RuntimeDefault) => Ok(Seccomp::RuntimeDefault),
        Ok(v1::security_profile::ProfileType::Unconfined) => Ok(Seccomp::Unconfined),
        Ok(v1::security_profile::ProfileType::Localhost) => seccomp_file(FIELD, &profile.localhost_ref),
        Err(_) => Err(unknown_enum(FIELD, profile.profile_type)),
    }
}

/// The kubelet sends an absolute path, older callers "localhost/" before it.
fn seccomp_file(field: &'static str, localhost_ref: &str) -> Result<Seccomp, Invalid> {
    let text = localhost_ref.strip_prefix("localhost/").unwrap_or(localhost_ref);
    let path =
        optional_absolute(field, text)?.ok_or_else(|| invalid(field, "Localhost without a localhost_ref"))?;
    Ok(Seccomp::Localhost(path))
}

fn apparmor(profile: Option<v1::SecurityProfile>, old: &str) -> Result<Apparmor, Invalid> {
    const FIELD: &str = "security_context.apparmor";
    let local = |name: &str| match name.strip_prefix("localhost/").unwrap_or(name) {
        "" => Err(invalid(FIELD, "Localhost without a localhost_ref")),
        name => Ok(Apparmor::Localhost(name.to_owned())),
    };
    let Some(profile) = profile else {
        return match old {
            "" | "runtime/default" => Ok(Apparmor::RuntimeDefault),
            "unconfined" => Ok(Apparmor::Unconfined),
            other => local(other),
        };
    };
    match v1::security_profile::ProfileType::try_from(profile.profile_type) {
        Ok(v1::security_profile::ProfileType::RuntimeDefault) => Ok(Apparmor::RuntimeDefault),
        Ok(v1::security_profile::ProfileType::Unconfined) => Ok(Apparmor::Unconfined),
        Ok(v1::security_profile::ProfileType::Localhost) => local(&profile.localhost_ref),
        Err(_) => Err(unknown_enum(FIELD, profile.profile_type)),
    }
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

/// What the kubelet sends of an image pull secret. They are never logged.
pub fn credentials(auth: v1::AuthConfig) -> Result<Option<Credentials>, Invalid> {
    let fields = AuthFields {
        username: &auth.username,
        password: &auth.password,
        auth: &auth.auth,
        identity_token: &auth.identity_token,
        registry_token: &auth.registry_token,
    };
    Credentials::from_fields(&fields).map_err(|error| invalid("auth", error.to_string()))
}

/// A command for ExecSync.
pub fn command(cmd: Vec<String>) -> Result<Vec<String>, Invalid> {
    if cmd.is_empty() || cmd[0].is_empty() {
        return Err(invalid("cmd", "is empty"));
    }
    if cmd.iter().any(|arg| arg.contains('\0')) {
        return Err(invalid("cmd", "an argument has a NUL byte"));
    }
    Ok(cmd)
}

/// One of an enumeration's values in a filter.
pub fn known<E: TryFrom<i32>>(field: &'static str, value: i32) -> Result<E, Invalid> {
    E::try_from(value).map_err(|_| unknown_enum(field, value))
}

/// Seconds; negative ones are refused, 0 means none.
pub fn seconds(field: &'static str, value: i64) -> Result<u64, Invalid> {
    u64::try_from(value).map_err(|_| invalid(field, format!("{value} is negative")))
}

fn optional_absolute(field: &'static str, text: &str) -> Result<Option<PathBuf>, Invalid> {
    if text.is_empty() {
        return Ok(None);
    }
    let path = Path::new(text);
    if !path.is_absolute() || text.contains('\0') || path.components().any(|c| c == Component::ParentDir) {
        return Err(invalid(
            field,
            format!("{text:?} is not an absolute path without \"..\""),
        ));
    }
    Ok(Some(path.to_owned()))
}

fn unknown_enum(field: &'static str, value: i32) -> Invalid {
    invalid(field, format!("{value} is no value of its enumeration"))
}

pub(super) fn string_map(map: HashMap<String, String>) -> StringMap {
    map.into_iter().collect::<BTreeMap<_, _>>()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runtime() -> Runtime {
        crate::config::Config::load(&crate::cli::Flags {
            config: Some("/dev/null".into()),
            ..Default::default()
        })
        .unwrap()
        .runtime
    }

    fn minimal_pod() -> v1::PodSandboxConfig {
        v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: "p".into(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn minimal_container() -> v1::ContainerConfig {
        v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata {
                name: "c".into(),
                attempt: 0,
            }),
            image: Some(v1::ImageSpec {
                image: "busybox".into(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn pod_field(change: impl FnOnce(&mut v1::PodSandboxConfig)) -> Result<PodConfig, Invalid> {
        let mut pod = minimal_pod();
        change(&mut pod);
        pod_config(Some(pod), String::new(), &runtime())
    }

    fn container_field(change: impl FnOnce(&mut v1::ContainerConfig)) -> Result<ContainerConfig, Invalid> {
        let mut container = minimal_container();
        change(&mut container);
        container_config(Some(container))
    }

    #[test]
    fn a_missing_config_or_metadata_is_named() {
        assert_eq!(
            pod_config(None, String::new(), &runtime()).unwrap_err().field,
            "config"
        );
        assert_eq!(
            pod_field(|p| p.metadata = None).unwrap_err().field,
            "config.metadata"
        );
        assert_eq!(container_config(None).unwrap_err().field, "config");
        assert_eq!(
            container_field(|c| c.image = None).unwrap_err().field,
            "config.image"
        );
    }

    #[test]
    fn an_unknown_runtime_handler_is_refused_and_our_own_name_is_not() {
        assert_eq!(
            pod_config(Some(minimal_pod()), "kata".into(), &runtime())
                .unwrap_err()
                .field,
            "runtime_handler"
        );
        pod_config(Some(minimal_pod()), "slipway".into(), &runtime()).unwrap();
    }

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
    fn ports_without_a_host_port_are_dropped_and_impossible_ones_refused() {
        let map = |host_port, container_port| v1::PortMapping {
            host_port,
            container_port,
            ..Default::default()
        };
        let pod = pod_field(|p| p.port_mappings = vec![map(0, 80), map(8080, 80)]).unwrap();
        assert_eq!(pod.port_mappings.len(), 1);
        assert_eq!(pod.port_mappings[0].host_port, 8080);
        assert!(pod_field(|p| p.port_mappings = vec![map(70_000, 80)]).is_err());
        assert!(pod_field(|p| p.port_mappings = vec![map(80, -1)]).is_err());
    }

    #[test]
    fn words_of_resolv_conf_cannot_bring_lines_of_their_own() {
        let dns = v1::DnsConfig {
            servers: vec!["1.1.1.1\nnameserver 6.6.6.6".into()],
            ..Default::default()
        };
        assert!(pod_field(|p| p.dns_config = Some(dns)).is_err());
    }

    #[test]
    fn a_target_pid_namespace_needs_its_target() {
        let with = |target: &str| {
            container_field(|c| {
                c.linux = Some(v1::LinuxContainerConfig {
                    resources: None,
                    security_context: Some(v1::LinuxContainerSecurityContext {
                        namespace_options: Some(v1::NamespaceOption {
                            pid: v1::NamespaceMode::Target as i32,
                            target_id: target.into(),
                            ..Default::default()
                        }),
                        ..Default::default()
                    }),
                });
            })
        };
        assert!(with("").is_err());
        assert_eq!(
            with("abc").unwrap().security.unwrap().pid,
            PidNamespace::Target("abc".into())
        );
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

    #[test]
    fn old_spellings_of_seccomp_profiles_still_mean_the_same() {
        assert_eq!(seccomp(None, "").unwrap(), Seccomp::Unconfined);
        assert_eq!(seccomp(None, "runtime/default").unwrap(), Seccomp::RuntimeDefault);
        assert_eq!(
            seccomp(None, "localhost//etc/p.json").unwrap(),
            Seccomp::Localhost("/etc/p.json".into())
        );
        assert!(seccomp(None, "localhost/p.json").is_err());
    }

    #[test]
    fn names_maps_and_numbers_out_of_bounds_are_refused_by_field() {
        let pod = |change: &dyn Fn(&mut v1::PodSandboxConfig)| pod_field(|p| change(p)).unwrap_err().field;
        let metadata =
            |p: &mut v1::PodSandboxConfig, name: &str| p.metadata.as_mut().unwrap().name = name.into();
        assert_eq!(pod(&|p| metadata(p, "a\nb")), "config.metadata.name");
        assert_eq!(pod(&|p| metadata(p, &"x".repeat(2000))), "config.metadata.name");
        let large = || HashMap::from([("note".to_owned(), "x".repeat(10 << 20))]);
        assert_eq!(pod(&|p| p.annotations = large()), "config.annotations");
        assert_eq!(
            pod(&|p| p.labels = HashMap::from([("a\nb".into(), String::new())])),
            "config.labels"
        );
        assert_eq!(
            pod(&|p| p.log_directory = "/var/log/../../etc".into()),
            "config.log_directory"
        );
        assert_eq!(
            pod(&|p| p.log_directory = "/var/log/a\nb".into()),
            "config.log_directory"
        );
        assert_eq!(pod(&|p| p.hostname = "a/b".into()), "config.hostname");
        let limits = |change: &dyn Fn(&mut v1::LinuxContainerResources)| {
            let mut resources = v1::LinuxContainerResources::default();
            change(&mut resources);
            let linux = v1::LinuxContainerConfig {
                resources: Some(resources),
                ..Default::default()
            };
            container_field(|c| c.linux = Some(linux))
                .unwrap_err()
                .to_string()
        };
        for (text, field) in [
            (limits(&|r| r.memory_limit_in_bytes = -5), "memory_limit_in_bytes"),
            (limits(&|r| r.cpu_period = -1), "cpu_period"),
            (limits(&|r| r.cpu_shares = -1), "cpu_shares"),
            (limits(&|r| r.oom_score_adj = 1001), "oom_score_adj"),
        ] {
            assert!(
                text.starts_with("config.linux.resources: ") && text.contains(field),
                "{text}"
            );
        }
        assert_eq!(
            container_field(|c| c.annotations = large()).unwrap_err().field,
            "config.annotations"
        );
        assert_eq!(
            container_field(|c| c.command = vec!["a\0".into()])
                .unwrap_err()
                .field,
            "config.command"
        );
    }

    #[test]
    fn an_error_about_a_long_text_is_short() {
        let error = pod_field(|p| p.hostname = "x".repeat(1 << 20)).unwrap_err();
        assert!(error.reason.len() < 300, "{} bytes", error.reason.len());
    }
}
