//! Comparing a pod's records with what its living shim says. The shim is right about processes.

use std::sync::Arc;

use slipway_shim_client::{Shim, pod as wire};

use super::unknown_exit;
use crate::container::{Container, exit, update};
use crate::daemon::Daemon;
use crate::error::Error;
use crate::pod::{Pod, watch};
use crate::records::{ContainerPhase, PinnedNamespace};

const SIGKILL: u32 = 9;

/// Makes the records of a pod's containers say what its shim knows.
pub async fn with_shim(
    daemon: &Arc<Daemon>,
    pod: &Arc<Pod>,
    shim: &Shim,
    info: &wire::InfoResponse,
) -> Result<(), Error> {
    if pod.state().namespaces.is_empty() {
        let pinned = info.namespaces.iter();
        let pinned = pinned
            .map(|ns| PinnedNamespace {
                kind: ns.kind.clone(),
                path: ns.path.clone().into(),
            })
            .collect();
        pod.remember_namespaces(pinned, (info.init_pid != 0).then_some(info.init_pid))
            .await;
    }
    if pod.state().init_pid.is_some() && info.init_pid == 0 {
        watch::not_ready(daemon, pod, "the init of its PID namespace has ended").await?;
    }
    for container in daemon.registry.containers_of(pod.id()) {
        let seen = info
            .containers
            .iter()
            .find(|seen| seen.id == container.id().as_str());
        one(daemon, &container, seen).await?;
        if container.live()
            && let Err(error) = update::enforce(&container, shim).await
        {
            tracing::warn!(container = %container.id(), error = error.chain(), "its limits could not be set as they are recorded");
        }
    }
    let unreadable = daemon.registry.unreadable();
    for stray in info
        .containers
        .iter()
        .filter(|seen| daemon.registry.container(&seen.id).is_err() && !unreadable.contains(&seen.id))
    {
        tracing::warn!(pod = %pod.id(), container = stray.id, "the shim knows a container that no record does; removing it");
        // Answers do not matter: the pod's end takes whatever is left.
        let _ = shim.kill(&stray.id, SIGKILL, true).await;
        let _ = tokio::time::timeout(std::time::Duration::from_secs(5), shim.wait(&stray.id)).await;
        let _ = shim.delete(&stray.id).await;
    }
    Ok(())
}

/// Makes a container's record say what its shim knows of it.
pub async fn one(
    daemon: &Arc<Daemon>,
    container: &Arc<Container>,
    seen: Option<&wire::Container>,
) -> Result<(), Error> {
    let ended = seen.is_some_and(|seen| seen.state() == wire::ContainerState::Stopped);
    let may_have_ended = container.live() || (ended && container.phase() == ContainerPhase::Creating);
    if !may_have_ended {
        return Ok(());
    }
    let Some(seen) = seen else {
        return exit::note(daemon, container, unknown_exit()).await;
    };
    match seen.state() {
        wire::ContainerState::Stopped => {
            note_start(daemon, container, seen).await?;
            exit::note(daemon, container, exit::seen_exit(seen)).await
        }
        wire::ContainerState::Running | wire::ContainerState::Paused => {
            note_start(daemon, container, seen).await
        }
        wire::ContainerState::Created | wire::ContainerState::Creating | wire::ContainerState::Unknown => {
            Ok(())
        }
    }
}

/// A crash came between the start and its record.
async fn note_start(
    daemon: &Arc<Daemon>,
    container: &Container,
    seen: &wire::Container,
) -> Result<(), Error> {
    container
        .transition(&daemon.records, |state| {
            let late = state.phase == ContainerPhase::Created && seen.started_at_ns > 0;
            if late {
                state.phase = ContainerPhase::Running {
                    started_at_ns: seen.started_at_ns,
                };
                state.made.pid = seen.pid;
            }
            late
        })
        .await
}
