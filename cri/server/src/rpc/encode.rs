//! From our values to the wire.

use slipway_cri_api::v1;
use slipway_image::Image;
use slipway_shim_client::pod as wire;
use slipway_snapshot::FsInfo;
use slipway_spec::{IdMap, Propagation};

use crate::container::list::Visible;
use crate::container::stats::{ContainerStats, PodStats};
use crate::container::{Container, update};
use crate::model::{ImageSpec, Mount, MountSource, PodMetadata, PodNamespaces, Resources, Scope, StringMap};
use crate::pod::Pod;
use crate::pod::stats::Interface;
use crate::records::{ContainerPhase, Exited, PodNetworkState, PodPhase};

pub fn pod(pod: &Pod) -> v1::PodSandbox {
    let record = pod.record();
    v1::PodSandbox {
        id: record.id.to_string(),
        metadata: Some(pod_metadata(&record.config.metadata)),
        state: pod_state(&pod.phase()),
        created_at: record.created_at_ns,
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
        runtime_handler: record.config.runtime_handler.clone(),
    }
}

pub fn pod_status(pod: &Pod) -> v1::PodSandboxStatus {
    let record = pod.record();
    v1::PodSandboxStatus {
        id: record.id.to_string(),
        metadata: Some(pod_metadata(&record.config.metadata)),
        state: pod_state(&pod.phase()),
        created_at: record.created_at_ns,
        network: network(&pod.state().network),
        linux: Some(v1::LinuxPodSandboxStatus {
            namespaces: Some(v1::Namespace {
                options: Some(namespaces(&record.config.namespaces)),
            }),
        }),
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
        runtime_handler: record.config.runtime_handler.clone(),
    }
}

fn pod_metadata(metadata: &PodMetadata) -> v1::PodSandboxMetadata {
    v1::PodSandboxMetadata {
        name: metadata.name.clone(),
        uid: metadata.uid.clone(),
        namespace: metadata.namespace.clone(),
        attempt: metadata.attempt,
    }
}

fn pod_state(phase: &PodPhase) -> i32 {
    match phase {
        PodPhase::Ready => v1::PodSandboxState::SandboxReady as i32,
        PodPhase::Starting
        | PodPhase::NotReady { .. }
        | PodPhase::Stopping
        | PodPhase::Stopped
        | PodPhase::Removing => v1::PodSandboxState::SandboxNotready as i32,
    }
}

/// The addresses, the first one apart. On the host's network they are the kubelet's to know.
fn network(state: &PodNetworkState) -> Option<v1::PodSandboxNetworkStatus> {
    let ips = match state {
        PodNetworkState::Attached(attachment) => attachment.ips.as_slice(),
        PodNetworkState::Host | PodNetworkState::Planned(_) | PodNetworkState::Released => &[],
    };
    let (first, more) = match ips {
        [] => (String::new(), Vec::new()),
        [first, more @ ..] => (
            first.to_string(),
            more.iter().map(|ip| v1::PodIp { ip: ip.to_string() }).collect(),
        ),
    };
    Some(v1::PodSandboxNetworkStatus {
        ip: first,
        additional_ips: more,
    })
}

fn namespaces(ns: &PodNamespaces) -> v1::NamespaceOption {
    let mode = |scope: Scope| match scope {
        Scope::Pod => v1::NamespaceMode::Pod,
        Scope::Container => v1::NamespaceMode::Container,
        Scope::Node => v1::NamespaceMode::Node,
    } as i32;
    v1::NamespaceOption {
        network: mode(ns.network),
        pid: mode(ns.pid),
        ipc: mode(ns.ipc),
        target_id: String::new(),
        userns_options: ns.user.as_ref().map(|user| v1::UserNamespace {
            mode: v1::NamespaceMode::Pod as i32,
            uids: id_maps(&user.uids),
            gids: id_maps(&user.gids),
        }),
    }
}

pub fn container(container: &Container) -> v1::Container {
    let (record, state) = (container.record(), container.state());
    v1::Container {
        id: record.id.to_string(),
        pod_sandbox_id: record.pod.to_string(),
        metadata: Some(container_metadata(container)),
        image: Some(image_spec(&record.config.image)),
        image_ref: state.made.image_ref.clone(),
        state: container_state(&state.phase),
        created_at: record.created_at_ns,
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
        image_id: state.made.image_id,
    }
}

pub fn container_status(container: &Container) -> v1::ContainerStatus {
    let (record, state) = (container.record(), container.state());
    let (started_at, end) = match &state.phase {
        ContainerPhase::Running { started_at_ns } => (*started_at_ns, None),
        ContainerPhase::Exited(end) | ContainerPhase::Removing(Some(end)) => {
            (end.started_at_ns, Some(end.clone()))
        }
        ContainerPhase::Creating | ContainerPhase::Created | ContainerPhase::Removing(None) => (0, None),
    };
    let end = end.unwrap_or_default();
    let Exited {
        finished_at_ns,
        code,
        reason,
        message,
        ..
    } = end;
    v1::ContainerStatus {
        id: record.id.to_string(),
        metadata: Some(container_metadata(container)),
        state: container_state(&state.phase),
        created_at: record.created_at_ns,
        started_at,
        finished_at: finished_at_ns,
        exit_code: code,
        image: Some(v1::ImageSpec {
            image: state.made.image_name.clone(),
            ..image_spec(&record.config.image)
        }),
        image_ref: state.made.image_ref.clone(),
        reason,
        message,
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
        mounts: record.config.mounts.iter().map(mount).collect(),
        log_path: state
            .made
            .log_path
            .as_ref()
            .map(|p| p.to_string_lossy().into_owned())
            .unwrap_or_default(),
        resources: Some(v1::ContainerResources {
            linux: Some(resources(&update::in_force(container))),
            windows: None,
        }),
        image_id: state.made.image_id.clone(),
        user: Some(v1::ContainerUser {
            linux: Some(v1::LinuxContainerUser {
                uid: i64::from(state.made.uid),
                gid: i64::from(state.made.gid),
                supplemental_groups: state
                    .made
                    .supplemental_groups
                    .iter()
                    .copied()
                    .map(i64::from)
                    .collect(),
            }),
        }),
        stop_signal: signal(&state.made.stop_signal),
    }
}

fn container_metadata(container: &Container) -> v1::ContainerMetadata {
    let metadata = &container.record().config.metadata;
    v1::ContainerMetadata {
        name: metadata.name.clone(),
        attempt: metadata.attempt,
    }
}

fn container_state(phase: &ContainerPhase) -> i32 {
    match Visible::from(phase) {
        Visible::Created => v1::ContainerState::ContainerCreated as i32,
        Visible::Running => v1::ContainerState::ContainerRunning as i32,
        Visible::Exited => v1::ContainerState::ContainerExited as i32,
        Visible::Unknown => v1::ContainerState::ContainerUnknown as i32,
    }
}

fn mount(mount: &Mount) -> v1::Mount {
    let (host_path, image, image_sub_path) = match &mount.source {
        MountSource::Host(path) => (path.to_string_lossy().into_owned(), None, String::new()),
        MountSource::Image { image, sub_path } => (String::new(), Some(image_spec(image)), sub_path.clone()),
    };
    v1::Mount {
        container_path: mount.container_path.clone(),
        host_path,
        readonly: mount.readonly,
        selinux_relabel: mount.selinux_relabel,
        propagation: match mount.propagation {
            Propagation::Private => v1::MountPropagation::PropagationPrivate,
            Propagation::HostToContainer => v1::MountPropagation::PropagationHostToContainer,
            Propagation::Bidirectional => v1::MountPropagation::PropagationBidirectional,
        } as i32,
        uid_mappings: id_maps(&mount.uid_mappings),
        gid_mappings: id_maps(&mount.gid_mappings),
        recursive_read_only: mount.recursive_read_only,
        image,
        image_sub_path,
        mount_options: mount.options.clone(),
    }
}

fn id_maps(maps: &[IdMap]) -> Vec<v1::IdMapping> {
    maps.iter()
        .map(|m| v1::IdMapping {
            host_id: m.host,
            container_id: m.container,
            length: m.length,
        })
        .collect()
}

fn resources(resources: &Resources) -> v1::LinuxContainerResources {
    let limits = &resources.limits;
    v1::LinuxContainerResources {
        cpu_period: limits.cpu_period,
        cpu_quota: limits.cpu_quota,
        cpu_shares: limits.cpu_shares,
        memory_limit_in_bytes: limits.memory_limit,
        oom_score_adj: resources.oom_score_adj,
        cpuset_cpus: limits.cpuset_cpus.clone(),
        cpuset_mems: limits.cpuset_mems.clone(),
        hugepage_limits: limits
            .hugepage_limits
            .iter()
            .map(|(page_size, limit)| v1::HugepageLimit {
                page_size: page_size.clone(),
                limit: *limit,
            })
            .collect(),
        unified: limits.unified.clone(),
        memory_swap_limit_in_bytes: limits.memory_swap_limit,
    }
}

/// The CRI's number of a signal, by ours. Aliases (SIGIOT, SIGCLD, SIGPOLL) answer as the first of their number.
fn signal(name: &str) -> i32 {
    let Some(wanted) = slipway_spec::signal::parse(name) else {
        return v1::Signal::RuntimeDefault as i32;
    };
    (1..=v1::Signal::Sigrtmax as i32)
        .find(|value| {
            v1::Signal::try_from(*value)
                .ok()
                .and_then(|signal| slipway_spec::signal::parse(signal.as_str_name()))
                .is_some_and(|signal| signal.number == wanted.number)
        })
        .unwrap_or(v1::Signal::RuntimeDefault as i32)
}

fn image_spec(spec: &ImageSpec) -> v1::ImageSpec {
    v1::ImageSpec {
        image: spec.image.clone(),
        annotations: spec.annotations.clone(),
        user_specified_image: spec.user_specified_image.clone(),
        runtime_handler: spec.runtime_handler.clone(),
        image_ref: spec.image_ref.clone(),
    }
}

pub fn image(image: &Image) -> v1::Image {
    let user = image
        .config
        .config()
        .as_ref()
        .and_then(|c| c.user().clone())
        .unwrap_or_default();
    let (uid, username) = image_user(&user);
    v1::Image {
        id: image.id.to_string(),
        repo_tags: image
            .names
            .iter()
            .filter(|name| name.digest().is_none())
            .map(ToString::to_string)
            .collect(),
        repo_digests: image.repo_digests.clone(),
        size: image.size,
        uid,
        username,
        spec: Some(v1::ImageSpec {
            image: image.id.to_string(),
            ..Default::default()
        }),
        pinned: image.pinned,
    }
}

/// The image's USER without its group: a number, or a name.
fn image_user(user: &str) -> (Option<v1::Int64Value>, String) {
    let name = user.split(':').next().unwrap_or_default();
    match name.parse::<i64>() {
        Ok(value) => (Some(v1::Int64Value { value }), String::new()),
        Err(_) => (None, name.to_owned()),
    }
}

pub fn filesystem(info: &FsInfo) -> v1::FilesystemUsage {
    v1::FilesystemUsage {
        timestamp: crate::time::now_ns(),
        fs_id: Some(v1::FilesystemIdentifier {
            mountpoint: info.mountpoint.to_string_lossy().into_owned(),
        }),
        used_bytes: value(info.used_bytes),
        inodes_used: value(info.used_inodes),
    }
}

pub fn container_stats(stats: &ContainerStats, mountpoint: &str) -> v1::ContainerStats {
    let config = &stats.container.record().config;
    v1::ContainerStats {
        attributes: Some(v1::ContainerAttributes {
            id: stats.container.id().to_string(),
            metadata: Some(container_metadata(&stats.container)),
            labels: config.labels.clone(),
            annotations: config.annotations.clone(),
        }),
        cpu: stats.cgroup.as_ref().map(|c| cpu(c, stats.nano_cores)),
        memory: stats.cgroup.as_ref().map(memory),
        writable_layer: stats.layer.map(|layer| v1::FilesystemUsage {
            timestamp: layer.at_ns,
            fs_id: Some(v1::FilesystemIdentifier {
                mountpoint: mountpoint.to_owned(),
            }),
            used_bytes: value(layer.usage.bytes),
            inodes_used: value(layer.usage.inodes),
        }),
        swap: stats.cgroup.as_ref().map(swap),
        io: stats.cgroup.as_ref().map(io),
    }
}

pub fn pod_stats(stats: &PodStats, interfaces: &[Interface], mountpoint: &str) -> v1::PodSandboxStats {
    let config = &stats.pod.record().config;
    let now = crate::time::now_ns();
    let interface = |i: &Interface| v1::NetworkInterfaceUsage {
        name: i.name.clone(),
        rx_bytes: value(i.rx_bytes),
        rx_errors: value(i.rx_errors),
        tx_bytes: value(i.tx_bytes),
        tx_errors: value(i.tx_errors),
    };
    let default = interfaces
        .iter()
        .find(|i| i.name == "eth0")
        .or(interfaces.first());
    v1::PodSandboxStats {
        attributes: Some(v1::PodSandboxAttributes {
            id: stats.pod.id().to_string(),
            metadata: Some(pod_metadata(&config.metadata)),
            labels: config.labels.clone(),
            annotations: config.annotations.clone(),
        }),
        linux: Some(v1::LinuxPodSandboxStats {
            cpu: stats.cgroup.as_ref().map(|c| cpu(c, stats.nano_cores)),
            memory: stats.cgroup.as_ref().map(memory),
            network: default.map(|default| v1::NetworkUsage {
                timestamp: now,
                default_interface: Some(interface(default)),
                // The default one too: kubelet shows it as one of them.
                interfaces: interfaces.iter().map(interface).collect(),
            }),
            process: stats.cgroup.as_ref().map(|c| v1::ProcessUsage {
                timestamp: c.time_ns,
                process_count: value(if c.processes > 0 { c.processes } else { c.pids }),
            }),
            containers: stats
                .containers
                .iter()
                .map(|c| container_stats(c, mountpoint))
                .collect(),
            io: stats.cgroup.as_ref().map(io),
        }),
        windows: None,
    }
}

fn cpu(c: &wire::CgroupStats, nano_cores: Option<u64>) -> v1::CpuUsage {
    v1::CpuUsage {
        timestamp: c.time_ns,
        usage_core_nano_seconds: value(c.cpu_usage_ns),
        usage_nano_cores: nano_cores.and_then(value),
        psi: c.cpu_psi.as_ref().map(psi),
    }
}

fn memory(c: &wire::CgroupStats) -> v1::MemoryUsage {
    v1::MemoryUsage {
        timestamp: c.time_ns,
        working_set_bytes: value(c.memory_working_set),
        available_bytes: (c.memory_limit > 0).then(|| v1::UInt64Value {
            value: c.memory_limit.saturating_sub(c.memory_working_set),
        }),
        usage_bytes: value(c.memory_usage),
        rss_bytes: value(c.memory_rss),
        page_faults: value(c.memory_page_faults),
        major_page_faults: value(c.memory_major_page_faults),
        psi: c.memory_psi.as_ref().map(psi),
    }
}

fn swap(c: &wire::CgroupStats) -> v1::SwapUsage {
    v1::SwapUsage {
        timestamp: c.time_ns,
        swap_available_bytes: c.swap_limited.then(|| v1::UInt64Value {
            value: c.swap_limit.saturating_sub(c.swap_usage),
        }),
        swap_usage_bytes: value(c.swap_usage),
    }
}

fn io(c: &wire::CgroupStats) -> v1::IoUsage {
    v1::IoUsage {
        timestamp: c.time_ns,
        psi: c.io_psi.as_ref().map(psi),
    }
}

fn psi(p: &wire::Psi) -> v1::PsiStats {
    let data = |d: &wire::PsiData| v1::PsiData {
        // The kernel counts in microseconds, the CRI in nanoseconds.
        total: d.total_us.saturating_mul(1_000),
        avg10: d.avg10,
        avg60: d.avg60,
        avg300: d.avg300,
    };
    v1::PsiStats {
        full: p.full.as_ref().map(data),
        some: p.some.as_ref().map(data),
    }
}

#[allow(clippy::unnecessary_wraps)]
fn value(value: u64) -> Option<v1::UInt64Value> {
    Some(v1::UInt64Value { value })
}

/// One JSON document under the key that crictl unpacks.
pub fn info(json: &serde_json::Value) -> StringMap {
    StringMap::from([("info".to_owned(), json.to_string())])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_come_back_as_they_were_sent() {
        for sent in [
            v1::Signal::Sigterm,
            v1::Signal::Sigkill,
            v1::Signal::Sigrtminplus3,
            v1::Signal::Sigrtmaxminus1,
        ] {
            let name = slipway_spec::signal::parse(sent.as_str_name()).unwrap().name;
            assert_eq!(signal(&name), sent as i32, "{name}");
        }
        assert_eq!(signal("no signal"), 0);
    }

    #[test]
    fn an_images_user_is_a_number_or_a_name() {
        assert_eq!(
            image_user("1000:1000"),
            (Some(v1::Int64Value { value: 1000 }), String::new())
        );
        assert_eq!(image_user("app:staff"), (None, "app".to_owned()));
        assert_eq!(image_user(""), (None, String::new()));
    }
}
