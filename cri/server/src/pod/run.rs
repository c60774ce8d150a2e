//! RunPodSandbox, as a story: the name, the intent, the directory, the shim, the namespaces, the network, READY.
//!
//! The intent is on disk before the first outside effect, and everything a step makes lies where
//! [`remove::tear_down`] finds it from the record alone: that one function undoes a failed run here, and an
//! interrupted one at the next start.

use std::sync::Arc;

use slipway_shim_client::{Shim, pod as wire};
use slipway_spec::sysctl::OwnNamespaces;

use super::dir::PodDir;
use super::{Pod, describe, network, remove, watch};
use crate::config::CgroupDriver;
use crate::daemon::Daemon;
use crate::error::Error;
use crate::events::{self, What};
use crate::fail;
use crate::ids::PodId;
use crate::model::{PodConfig, Scope};
use crate::records::{Kind, PinnedNamespace, PodPhase, PodRecord, PodState};

const VERB: &str = "RunPodSandbox";

/// Runs a pod; its id once it is READY.
pub async fn run(daemon: &Arc<Daemon>, config: PodConfig) -> Result<PodId, Error> {
    check(daemon, &config)?;
    let name = config.metadata.reserved_name();
    let record = PodRecord {
        version: crate::records::version(),
        id: PodId::random().map_err(|source| Error::Random { source })?,
        created_at_ns: crate::time::now_ns(),
        boot_id: daemon.boot_id.clone(),
        config,
    };
    let id = record.id.clone();
    let pod = Arc::new(Pod::new(record, PodState::starting()));
    let _turn = pod.try_begin(VERB)?;
    // Known before it is reserved: whoever finds the name taken finds the taker too.
    daemon.registry.insert_pod(pod.clone());
    if let Err(error) = daemon
        .records
        .reserve(Kind::Pod, id.as_str(), &name, pod.record())
        .await
    {
        daemon.registry.remove_pod(&id);
        return Err(name_taken(daemon, error));
    }
    match set_up(daemon, &pod).await {
        Ok(()) => {
            events::of_pod(daemon, &pod, What::Created);
            events::of_pod(daemon, &pod, What::Started);
            Ok(id)
        }
        Err(error) => {
            remove::undo(daemon, &pod).await;
            Err(error)
        }
    }
}

/// What can be refused without having touched anything.
fn check(daemon: &Daemon, config: &PodConfig) -> Result<(), Error> {
    if config.namespaces.user.is_some() && !daemon.maps_owners {
        return Err(Error::invalid(
            "namespace_options.userns_options",
            "this kernel, or the file system of the root directory, has no mounts with mapped owners",
        ));
    }
    if let Some(user) = &config.namespaces.user
        && ![&user.uids, &user.gids]
            .into_iter()
            .all(|maps| maps.iter().any(|map| map.container == 0 && map.length > 0))
    {
        return Err(Error::invalid(
            "namespace_options.userns_options",
            "root of the container is not mapped: nothing could be set up for it",
        ));
    }
    network::bandwidth(config)?;
    let own = OwnNamespaces {
        network: config.namespaces.network == Scope::Pod,
        ipc: config.namespaces.ipc == Scope::Pod,
        uts: config.namespaces.network == Scope::Pod,
    };
    for (name, value) in &config.sysctls {
        slipway_spec::sysctl::check(name, value, own)
            .map_err(|error| Error::invalid("config.linux.sysctls", error.to_string()))?;
    }
    if let (CgroupDriver::Systemd, Some(parent)) =
        (daemon.config.runtime.cgroup_driver, &config.cgroup_parent)
        && !parent.trim_end_matches('/').ends_with(".slice")
    {
        return Err(Error::invalid(
            "config.linux.cgroup_parent",
            format!("{parent:?} is no slice, and the cgroup driver is systemd"),
        ));
    }
    if config.namespaces.network != Scope::Node
        && let slipway_network::NetworkStatus::NotReady { reason } = daemon.cni.status()
    {
        return Err(Error::NetworkNotReady { reason });
    }
    Ok(())
}

/// Turns "somebody has the name" into who, and what it is doing.
fn name_taken(daemon: &Daemon, error: Error) -> Error {
    let Error::NameTaken { kind, name, by } = error else {
        return error;
    };
    match daemon.registry.pod(&by) {
        Ok(holder) if holder.hidden() => Error::InProgress {
            kind,
            id: by,
            what: format!("{VERB} for the name {name:?} is in progress"),
        },
        Ok(holder) => {
            let by = format!("pod {by}, which is {}", describe(&holder.phase()));
            Error::NameTaken { kind, name, by }
        }
        Err(Error::Unreadable { .. }) => Error::NameTaken {
            kind,
            name,
            by: format!("pod {by}, whose record cannot be read"),
        },
        Err(_) => Error::NameTaken {
            kind,
            name,
            by: format!("pod {by}, which is being removed"),
        },
    }
}

async fn set_up(daemon: &Arc<Daemon>, pod: &Arc<Pod>) -> Result<(), Error> {
    fail::point("run_pod_sandbox.after_intent").await?;
    let dir = PodDir::new(&daemon.paths.pods, pod.id());
    dir.make()?;
    fail::point("run_pod_sandbox.after_directory").await?;

    // The files, the shim and the network's intent need nothing of each other. All run to their end: an undo must not
    // meet a mount that is still on its way.
    let (filled, shim, plan) = tokio::join!(
        fill(daemon, pod, &dir),
        bring_up(daemon, pod, &dir),
        network::plan(daemon, pod)
    );
    let (shim, plan) = (shim?, plan?);
    filled?;

    if let Some(plan) = plan {
        let addresses = network::attach(daemon, pod, plan).await?;
        let config = pod.record().config.clone();
        crate::blocking::run(move || dir.write_hosts(&config, &addresses)).await?;
    }
    fail::point("run_pod_sandbox.after_files").await?;

    pod.transition(&daemon.records, |state| {
        state.phase = PodPhase::Ready;
        true
    })
    .await?;
    watch::spawn(daemon, pod, shim, 0);
    fail::point("run_pod_sandbox.after_record").await?;
    Ok(())
}

/// The shim, and in it the namespaces.
async fn bring_up(daemon: &Daemon, pod: &Pod, dir: &PodDir) -> Result<Shim, Error> {
    let started = daemon.launcher.start(pod.id().as_str(), dir.path()).await;
    let shim = started.map_err(Error::shim("start the shim", pod.id()))?;
    pod.set_shim(Some(shim.clone()));
    fail::point("run_pod_sandbox.after_shim").await?;
    make_namespaces(daemon, pod, dir, &shim).await?;
    fail::point("run_pod_sandbox.after_namespaces").await?;
    Ok(shim)
}

async fn fill(daemon: &Daemon, pod: &Pod, dir: &PodDir) -> Result<(), Error> {
    let (dir, config) = (dir.clone(), pod.record().config.clone());
    let shm_bytes = pod.handler(daemon).shm_size_mib << 20;
    let fill = move || {
        dir.fill(&config, shm_bytes)?;
        // With addresses of its own, they have to be known first.
        match config.namespaces.network {
            Scope::Node => dir.write_hosts(&config, &[]),
            Scope::Pod | Scope::Container => Ok(()),
        }
    };
    crate::blocking::run(fill).await
}

async fn make_namespaces(daemon: &Daemon, pod: &Pod, dir: &PodDir, shim: &Shim) -> Result<(), Error> {
    let made = shim
        .create_pod(request(daemon, pod, dir))
        .await
        .map_err(Error::shim("make the namespaces", pod.id()))?;
    let namespaces = made
        .namespaces
        .into_iter()
        .map(|ns| PinnedNamespace {
            kind: ns.kind,
            path: ns.path.into(),
        })
        .collect();
    // In memory only: it goes to disk with READY, and the pins lie in the directory.
    pod.remember_namespaces(namespaces, (made.init_pid != 0).then_some(made.init_pid))
        .await;
    Ok(())
}

/// Of the built-in init: with it everything in a shared PID namespace dies, so it goes last of a pod, as the sandbox
/// processes of other runtimes do. Where it may not be had, the shim's own stays, which is the nearest.
const INIT_OOM_SCORE_ADJ: i32 = -998;

fn request(daemon: &Daemon, pod: &Pod, dir: &PodDir) -> wire::CreatePodRequest {
    let config = &pod.record().config;
    let mode = |scope: Scope| match scope {
        Scope::Pod => wire::NamespaceMode::Pod,
        Scope::Node => wire::NamespaceMode::Node,
        Scope::Container => wire::NamespaceMode::None,
    } as i32;
    wire::CreatePodRequest {
        pod_id: pod.id().to_string(),
        state_dir: dir.path().to_string_lossy().into_owned(),
        hostname: super::dir::hostname(config),
        net: mode(config.namespaces.network),
        ipc: mode(config.namespaces.ipc),
        // A pod on the node's network has the node's name, as everywhere in Kubernetes.
        uts: mode(config.namespaces.network),
        pid: mode(config.namespaces.pid),
        sysctls: config.sysctls.clone().into_iter().collect(),
        cgroup_parent: cgroup_parent(daemon, pod),
        systemd_cgroup: daemon.config.runtime.cgroup_driver == CgroupDriver::Systemd,
        init_oom_score_adj: INIT_OOM_SCORE_ADJ,
        uid_map: config
            .namespaces
            .user
            .iter()
            .flat_map(|user| id_maps(&user.uids))
            .collect(),
        gid_map: config
            .namespaces
            .user
            .iter()
            .flat_map(|user| id_maps(&user.gids))
            .collect(),
        ..Default::default()
    }
}

fn id_maps(maps: &[slipway_spec::IdMap]) -> impl Iterator<Item = wire::IdMapping> {
    maps.iter().map(|map| wire::IdMapping {
        container_id: map.container,
        host_id: map.host,
        length: map.length,
    })
}

/// The pod's cgroup: the kubelet's, or one of our own under the configured root. With the systemd driver the name of a
/// slice, which says where it lies.
pub fn cgroup_parent(daemon: &Daemon, pod: &Pod) -> String {
    let asked = pod.record().config.cgroup_parent.as_deref();
    let runtime = &daemon.config.runtime;
    parent(runtime.cgroup_driver, &runtime.cgroup_root, asked, pod.id())
}

fn parent(driver: CgroupDriver, root: &str, asked: Option<&str>, id: &PodId) -> String {
    let root = root.trim_end_matches('/');
    match (driver, asked) {
        (CgroupDriver::Cgroupfs, Some(asked)) => asked.to_owned(),
        (CgroupDriver::Cgroupfs, None) => format!("{root}/{id}"),
        // The kubelet sends the slice's path, "/a.slice/a-b.slice"; systemd knows it by its last name alone.
        (CgroupDriver::Systemd, Some(asked)) => {
            let asked = asked.trim_end_matches('/');
            asked.rsplit('/').next().unwrap_or(asked).to_owned()
        }
        (CgroupDriver::Systemd, None) => {
            let slice = root.trim_start_matches('/').trim_end_matches(".slice");
            format!("{slice}-{id}.slice")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systemd_is_given_the_name_of_the_slice_that_the_kubelet_gives_the_path_of() {
        let id = PodId::random().unwrap();
        let path = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice";
        assert_eq!(parent(CgroupDriver::Cgroupfs, "/slipway", Some(path), &id), path);
        let systemd = |asked| parent(CgroupDriver::Systemd, "/slipway.slice", asked, &id);
        for asked in [
            path,
            "kubepods-burstable-pod1.slice",
            "/kubepods-burstable-pod1.slice/",
        ] {
            assert_eq!(systemd(Some(asked)), "kubepods-burstable-pod1.slice");
        }
        assert_eq!(systemd(None), format!("slipway-{id}.slice"));
    }
}
