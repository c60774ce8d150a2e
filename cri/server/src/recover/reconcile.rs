//! Comparing a pod's records with what its living shim says. The shim is right about processes.

use std::sync::Arc;

use slipway_shim_client::pod as wire;

use super::unknown_exit;
use crate::container::{Container, exit, update};
use crate::daemon::Daemon;
use crate::error::Error;
use crate::pod::{Pod, watch};
use crate::records::{ContainerPhase, PinnedNamespace};

const SIGKILL: u32 = 9;

/// The containers of a pod as they are before its shim is asked for them, or is there for others: it may not know yet those
/// that come later.
pub struct Before(Vec<(Arc<Container>, bool)>);

impl Before {
    pub fn of(daemon: &Daemon, pod: &Pod) -> Before {
        let containers = daemon.registry.containers_of(pod.id()).into_iter();
        Before(containers.map(|c| (c.clone(), c.live())).collect())
    }

    /// Each with what the shim knows of it, but those that it need not know yet.
    fn seen<'a>(
        &'a self,
        info: &'a wire::InfoResponse,
    ) -> impl Iterator<Item = (&'a Arc<Container>, Option<&'a wire::Container>)> {
        self.0.iter().filter_map(|(container, live)| {
            let seen = info
                .containers
                .iter()
                .find(|seen| seen.id == container.id().as_str());
            (*live || seen.is_some()).then_some((container, seen))
        })
    }
}

/// Makes the records of a pod and its containers say what its shim knows.
pub async fn note(
    daemon: &Arc<Daemon>,
    pod: &Arc<Pod>,
    before: &Before,
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
    for (container, seen) in before.seen(info) {
        one(daemon, container, seen).await?;
    }
    Ok(())
}

/// What may take its time once the records are right: limits are set as they are recorded, and what no record knows is
/// removed from the shim.
pub async fn tidy(daemon: &Arc<Daemon>, pod: &Arc<Pod>) {
    let Some(shim) = pod.shim() else { return };
    for container in daemon.registry.containers_of(pod.id()) {
        if let Err(error) = update::enforce(&container, &shim).await {
            tracing::warn!(container = %container.id(), error = error.chain(), "its limits could not be set as they are recorded");
        }
    }
    let unreadable = daemon.registry.unreadable();
    let known = shim.info().await.map(|info| info.containers).unwrap_or_default();
    for stray in known
        .iter()
        .filter(|seen| daemon.registry.container(&seen.id).is_err() && !unreadable.contains(&seen.id))
    {
        tracing::warn!(pod = %pod.id(), container = stray.id, "the shim knows a container that no record does; removing it");
        // Answers do not matter: the pod's end takes whatever is left.
        let _ = shim.kill(&stray.id, SIGKILL, true).await;
        let _ = tokio::time::timeout(std::time::Duration::from_secs(5), shim.wait(&stray.id)).await;
        let _ = shim.delete(&stray.id).await;
    }
}

/// Makes a container's record say what its shim knows of it.
async fn one(
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::Container;
    use crate::ids::{ContainerId, PodId};
    use crate::records::ContainerRecord;

    #[test]
    fn a_container_that_was_being_created_before_the_shim_was_asked_need_not_be_known_to_it() {
        let record = ContainerRecord {
            version: crate::records::version(),
            id: ContainerId::random().unwrap(),
            pod: PodId::random().unwrap(),
            created_at_ns: 0,
            boot_id: String::new(),
            config: crate::model::ContainerConfig::default(),
        };
        let container = Arc::new(Container::creating(record));
        let seen = |live, info: &wire::InfoResponse| {
            let before = Before(vec![(container.clone(), live)]);
            before.seen(info).map(|(_, seen)| seen.is_some()).next()
        };
        let nothing = wire::InfoResponse::default();
        assert_eq!(seen(false, &nothing), None, "whatever it is by now");
        assert_eq!(seen(true, &nothing), Some(false), "it has ended unseen");
        let info = wire::InfoResponse {
            containers: vec![wire::Container {
                id: container.id().to_string(),
                ..Default::default()
            }],
            ..Default::default()
        };
        assert_eq!(seen(false, &info), Some(true), "its end may have come early");
    }
}
